"""Computation of surfaces from models, data and a loss."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from skipscope._data import Batches, Objective, mean_loss, read
from skipscope._errors import SkipscopeError
from skipscope._random import refuse_noise, seed_generators
from skipscope._ranks import RankGroup
from skipscope._sharding import refuse_unmovable, sharded_call, units
from skipscope._untouched import private_copy, require_module, untouched
from skipscope._version import __version__
from skipscope.shortcuts import average_statistics
from skipscope.surfaces._landscape_settings import Settings
from skipscope.surfaces.evaluation._autotune import Choice
from skipscope.surfaces.evaluation._evaluator import prepare_batch_norm
from skipscope.surfaces.evaluation._memory_limits import check_grid
from skipscope.surfaces.evaluation._permutation_test import own_loss
from skipscope.surfaces.evaluation._point_loss import direction_hash, resident, weights_hash
from skipscope.surfaces.evaluation._twins_on_plane import TwinOnPlane, Work
from skipscope.surfaces.evaluation._work_setup import choose_for_all, open_twins, precision_of
from skipscope.surfaces.grids._adaptive_grid import Adaptive
from skipscope.surfaces.grids._grid import Sheet, axes
from skipscope.surfaces.grids._grid_runner import Runner, engine_for, lost_rank
from skipscope.surfaces.grids._rank_store import RankStore
from skipscope.surfaces.grids._ray_cluster import job, on_ray
from skipscope.surfaces.grids._surface_store import Plan, Store, check_plan, read_plan
from skipscope.surfaces.planes._plane import Plane
from skipscope.surfaces.results._surface_assembly import Facts, Interpolated, Run, finish
from skipscope.surfaces.results._surface_result import PairedSurfaces

# About how long a unit of work in a store takes, which is what a killed process can lose.
_UNIT_S = 2.0


def surfaces(models: Mapping[str, nn.Module], data: Any, loss: Any, settings: Settings) -> PairedSurfaces:
    """Compute every twin's surface on the plane that ``settings`` describe.

    Raises:
        SkipscopeError: model, data, loss or settings cannot be used.
    """
    for model in models.values():
        require_module(model, "landscape")
        refuse_unmovable(model, "landscape")
    with ranks_together(models, settings) as group:
        return _surfaces(models, data, loss, settings, group)


def ranks_together(
    models: Mapping[str, nn.Module], settings: Settings
) -> AbstractContextManager[RankGroup | None]:
    """Context of the ranks that evaluate each point together; yields None if no model is sharded.

    Raises:
        SkipscopeError: a model is sharded, and the engine or the directions do not support that.
    """
    if any(map(units, models.values())):
        _refuse_whole(settings)
    lost = functools.partial(lost_rank, settings.store is not None)
    return sharded_call(models.values(), "landscape", lost)


def _refuse_whole(settings: Settings) -> None:
    if settings.engine == "ray":
        raise SkipscopeError(
            "landscape",
            "a sharded model runs on the ranks that hold it, not on Ray",
            expected="local or torchrun",
            got=settings.engine,
            cure="leave engine= out",
        )
    if isinstance(settings.directions, Plane):
        raise SkipscopeError(
            "landscape",
            "a plane's known points are whole weights, and a sharded model is never whole",
            cure="directions=plane.directions; the known points are then not marked",
        )


def _surfaces(
    models: Mapping[str, nn.Module], data: Any, loss: Any, settings: Settings, group: RankGroup | None
) -> PairedSurfaces:
    began, first = time.perf_counter(), next(iter(models.values()))
    engine = "local" if group is not None else engine_for(settings.engine, settings.store is not None)
    at = axes(settings.grid, settings.span, settings.axis_count, settings.strength is not None)
    held = resident(first, data, loss, settings.samples, settings.seed, group)
    held, objective = read(
        first, held, loss, "landscape", weight=settings.weight, sample_loss=settings.sample_loss
    )
    hashes = {name: weights_hash(model) for name, model in models.items()}
    with (
        untouched(*models.values(), training=False, seed=0, operation="landscape"),
        precision_of(settings.precision, first),
        ExitStack() as opened,
    ):
        twins = opened.enter_context(open_twins(models, held, objective, settings, len(at)))
        work = Work(twins, at)
        check_grid(int(np.prod(work.shape)), len(work.names))
        sheet = Sheet(work.names, work.shape)
        facts = {t.name: _facts(t, held, objective, settings) for t in twins}
        store, choices = _prepare(twins, work, settings, hashes, held, objective, group)
        what = f"loss surface of {', '.join(models)} ({_expected(choices, sheet.done.size)})"
        remote, at_once, in_flight = None, _at_once(twins), _unit_points(work, choices)
        if engine == "ray":
            strategies = {name: choice.name for name, choice in choices.items()}
            remote, at_once = on_ray(job(models, held, objective, settings, at, strategies)), min(at_once, 16)
        runner = Runner(sheet, work, store, engine, what, at_once, remote, in_flight, group)

        def end(interpolated: Interpolated | None) -> PairedSurfaces:
            run = Run(settings, at, held, objective, hashes, facts, choices, interpolated, began)
            result = finish(run, _with_origin(sheet, twins, at), twins)
            if store is not None and runner.rank == 0:
                store.finish(result if len(twins) > 1 else result.surfaces[twins[0].name])
            return result

        interpolated = _fill(sheet, runner, twins, at, settings.tolerance, end if store is not None else None)
    return end(interpolated)


def _prepare(
    twins: list[TwinOnPlane],
    work: Work,
    settings: Settings,
    hashes: dict[str, str],
    data: Batches,
    loss: Objective,
    group: RankGroup | None,
) -> tuple[Store | RankStore | None, dict[str, Choice]]:
    """Open the store, if any, and choose the strategy; an existing store determines it."""
    count = int(np.prod(work.shape))
    folder = settings.store
    if folder is None:
        return None, choose_for_all(twins, work, count, settings.strategy)
    identity, probes = _identity(twins, work, settings, hashes, data, loss), work.fingerprint()
    plan = Plan(identity, probes, work.names, count, 1, "plain")
    if group is not None:
        choices = choose_for_all(twins, work, count, "plain")
        plan = replace(plan, unit=_unit(work, choices, settings))
        return RankStore(group, lambda: Store.opened(folder, plan)), choices
    found = read_plan(folder)
    if found is not None:
        check_plan(found, plan, folder)
        return Store(folder, found), choose_for_all(twins, work, count, found.strategy)
    choices = choose_for_all(twins, work, count, settings.strategy)
    name = choices[twins[0].name].name
    store = Store.create(folder, replace(plan, unit=_unit(work, choices, settings), strategy=name))
    # Another process may have created the store first, with another strategy.
    if store.plan.strategy != name:
        choices = choose_for_all(twins, work, count, store.plan.strategy)
    return store, choices


def _expected(choices: dict[str, Choice], points: int) -> str:
    seconds = points * sum(choice.point_seconds for choice in choices.values())
    return f"about {seconds:.0f} s" if seconds < 120 else f"about {seconds / 60:.0f} min"


def _at_once(twins: list[TwinOnPlane]) -> int:
    """Number of points to evaluate at once: up to 64 or four per core, and 64 MiB of per-sample losses."""
    at_point = twins[0].evaluator.plain.at_point
    most = max(64, 4 * torch.get_num_threads())
    return min(at_point.data.together(int(np.clip(2**23 // max(sum(at_point.sizes), 1), 1, most))))


def _unit(work: Work, choices: dict[str, Choice], settings: Settings) -> int:
    """Points per unit in a store; an adaptive run requests single points."""
    return 1 if settings.tolerance is not None else min(work.shape[-1], _unit_points(work, choices))


def _unit_points(work: Work, choices: dict[str, Choice]) -> int:
    seconds = sum(choice.point_seconds for choice in choices.values())
    return int(np.clip(_UNIT_S / max(seconds, 1e-9), 1, _at_once(work.twins)))


def _identity(
    twins: list[TwinOnPlane],
    work: Work,
    settings: Settings,
    hashes: dict[str, str],
    data: Batches,
    loss: Objective,
) -> dict[str, Any]:
    return {
        "weights": hashes,
        "data": data.hash(),
        "loss": loss.name,
        "grid": [at.tolist() for at in work.axes],
        "directions": {t.name: direction_hash(t.directions) for t in twins},
        "settings": {
            "seed": settings.seed,
            "strength": settings.strength and [getattr(s, "name", s) for s in settings.strength],
            "batch_norm": settings.batch_norm,
            "l2": settings.l2,
            "tolerance": settings.tolerance,
            "precision": settings.precision,
        },
        "versions": {"skipscope": __version__, "torch": torch.__version__},
    }


def _fill(
    sheet: Sheet,
    runner: Runner,
    twins: list[TwinOnPlane],
    at: tuple[np.ndarray, ...],
    tolerance: float | None,
    keep: Callable[[Interpolated], object] | None,
) -> Interpolated | None:
    """Compute the values; ``keep``, if given, is called with the interpolation after each level.

    Returns:
        The interpolation, or None if every point was computed.
    """
    everything = np.arange(sheet.done.size)
    if tolerance is None or len(at) == 1 or min(sheet.shape) < 5:
        runner.compute(everything)
        return None
    fields = [(f"{t.name}/value", f"{t.name}/stderr" if t.has_samples else None) for t in twins]
    adaptive = Adaptive(sheet, at, runner.compute, fields, tolerance)

    def known(beyond: float | None) -> Interpolated:
        by_twin = {t.name: adaptive.errors[f"{t.name}/value"] for t in twins}
        return Interpolated(by_twin, adaptive.level, adaptive.held_out, beyond)

    if keep is not None and runner.rank == 0:
        adaptive.after_level = lambda: keep(known(None))
    adaptive.run()
    return None if sheet.done.all() else known(adaptive.beyond)


def _with_origin(sheet: Sheet, twins: list[TwinOnPlane], at: tuple[np.ndarray, ...]) -> Sheet:
    """Set the origin, if it is a grid point, to the plain loop's value: the model's own loss, bit for bit."""
    # Later levels must refine from the computed values.
    sheet = copy.deepcopy(sheet)
    for twin in twins:
        places = [np.flatnonzero(axis == c) for axis, c in zip(at, twin.evaluator.origin_point)]
        if all(len(p) for p in places):
            sheet[f"{twin.name}/value"][tuple(int(p[0]) for p in places)] = twin.centre
    return sheet


def _facts(twin: TwinOnPlane, data: Batches, loss: Objective, settings: Settings) -> Facts:
    """Measure without the evaluator: the model's own loss, whether it has learnt, known points' losses."""
    recalibrated = settings.batch_norm == "recalibrate"
    plane = settings.directions if isinstance(settings.directions, Plane) else None
    with _as_measured(twin, settings) as model:
        if twin.evaluator.plain.draws:
            # The same draws as at every point.
            seed_generators(0)
        if twin.evaluator.plain.recalibrates:
            average_statistics(model, data, loss.run)
        own, learnt = own_loss(model, data, loss)
        some = next((p.dtype for p in model.parameters()), torch.float32)
        refuse_noise("landscape", twin.centre - twin.evaluator.penalty_at_origin(), own, some)
        # If the twin's statistics were stale, they would not fit at a checkpoint either.
        known = _losses_at(model, plane, data, loss, recalibrated or twin.fresh is not None) if plane else []
    return Facts(own, learnt, known)


@contextmanager
def _as_measured(twin: TwinOnPlane, settings: Settings) -> Iterator[nn.Module]:
    """The model in the surface's batch-norm mode; a copy if the mode changes it, unless it is sharded."""
    if units(twin.model):
        with twin.evaluator.plain.moving.at_work():
            yield twin.model
        return
    model = twin.fresh or twin.model
    if settings.batch_norm in {"recalibrate", "batch"}:
        model = private_copy(model, "landscape")
        prepare_batch_norm(model, settings.batch_norm)
    yield model


def _losses_at(
    model: nn.Module, plane: Plane, data: Batches, loss: Objective, recalibrated: bool
) -> list[float]:
    """Loss of each known point, with its own buffers, if any, and the surface's batch-norm mode."""
    copy, losses = private_copy(model, "landscape"), []
    own = {**dict(copy.named_parameters()), **dict(copy.named_buffers())}
    for weights in plane.weights:
        with torch.no_grad():
            for name, tensor in weights.items():
                if name in own and own[name].shape == tensor.shape:
                    own[name].copy_(tensor)
        if recalibrated:
            average_statistics(copy, data, loss.run)
        losses.append(mean_loss(copy, data, loss))
    return losses
