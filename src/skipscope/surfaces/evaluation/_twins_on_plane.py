"""Twins on one plane, and the named values computed at each point.

For each twin k: ``k/value``; with per-sample losses ``k/stderr``, ``k/centre_stderr`` and the folds of the
jackknife; each metric; and for a twin that shares the first twin's weights ``k/difference_stderr``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from skipscope._data import Batches, Objective
from skipscope._errors import SkipscopeError
from skipscope._rank_batches import RankBatches
from skipscope._ranks import local, whole
from skipscope._sharding import units
from skipscope._untouched import private_copy, set_mode, untouched
from skipscope.shortcuts import average_statistics, norms_with_statistics
from skipscope.surfaces._landscape_settings import Settings
from skipscope.surfaces.evaluation._evaluator import Evaluator, Point, Statistics
from skipscope.surfaces.evaluation._memory_limits import directions_fit, shards_fit
from skipscope.surfaces.evaluation._point_loss import FOLDS, Reading, fold_sums, influence
from skipscope.surfaces.grids._grid import Sheet
from skipscope.surfaces.grids._surface_store import AWAY
from skipscope.surfaces.planes import _directions as dirs


@dataclass
class TwinOnPlane:
    """One twin, ready to be evaluated.

    Attributes:
        name: key of the twin.
        model: the user's model.
        directions: one direction per axis.
        evaluator: evaluates points.
        shared: whether it has the first twin's weights.
        fresh: model with batch-norm statistics measured again, because its own were the first twin's; None if
            that was not needed. A copy, or under FSDP2 the user's model, which has them only while at work.
    """

    name: str
    model: nn.Module
    directions: list[dirs.Direction]
    evaluator: Evaluator
    shared: bool
    fresh: nn.Module | None = None

    @property
    def origin(self) -> Reading:
        """Reading at the origin, by the plain loop."""
        return self.evaluator.origin

    @property
    def centre(self) -> float:
        """Loss at the origin."""
        return float(self.origin.values[0])

    @property
    def has_samples(self) -> bool:
        """Whether standard errors can be computed."""
        return influence(self.origin, self.evaluator.loss.sums) is not None


def make_twins(
    models: Mapping[str, nn.Module], data: Batches, loss: Objective, settings: Settings, axes: int
) -> list[TwinOnPlane]:
    """Prepare every twin; twins that share the first twin's weights get identical directions."""
    first: TwinOnPlane | None = None
    twins: list[TwinOnPlane] = []
    keep = _directions_fit(models, data, axes)
    for name, model in models.items():
        shared = first is None or same_weights(first.model, model)
        if not shared:
            refuse_own_directions(name, settings)
        moving = axes - (settings.strength is not None)
        directions = (
            first.directions
            if first is not None and shared
            else directions_for(model, settings, moving, keep)
        )
        edited, strength_tensor = _with_strength(model, settings)
        make = partial(
            Evaluator,
            data=data,
            loss=loss,
            directions=directions,
            metrics=dict(settings.metrics or {}),
            batch_norm=settings.batch_norm,
            l2=settings.l2,
            strength_tensor=strength_tensor,
        )
        twin = TwinOnPlane(name, model, directions, make(edited), shared)
        frozen = shared and twin.evaluator.mode == "frozen"
        if first and frozen and stale_statistics(first.model, model, first.centre, twin.centre):
            twin.fresh, statistics = _recalibrated(model, data, loss)
            twin.evaluator = make(twin.fresh, statistics=statistics)
            twin.evaluator.batch_norm = (
                "frozen, after one recalibration (the statistics were those of the first twin)"
            )
        twins.append(twin)
        first = first or twin
    return twins


def _directions_fit(models: Mapping[str, nn.Module], data: Batches, axes: int) -> bool:
    """Whether directions are kept in memory; shards always are, or are refused on every rank."""
    moved, error = list(next(iter(models.values())).parameters()), None
    if not isinstance(data, RankBatches):
        return directions_fit(models.values(), moved, axes)
    try:
        shards_fit([local(p) for model in models.values() for p in model.parameters()], axes)
    except SkipscopeError as refused:
        error = refused
    data.together(None, error)
    return True


def _recalibrated(model: nn.Module, data: Batches, loss: Objective) -> tuple[nn.Module, Statistics]:
    """Measure a model's batch-norm statistics again on the data.

    Returns:
        A copy with new statistics, and (); or a sharded model, which cannot be copied, itself and the new
        statistics.
    """
    if not units(model):
        return average_statistics(private_copy(model, "landscape"), data, loss.run), ()
    with untouched(model, operation="landscape"):
        average_statistics(model, data, loss.run)
        layers = norms_with_statistics(model)
        return model, [{n: b.clone() for n, b in layer._buffers.items() if b is not None} for layer in layers]


def refuse_own_directions(name: str, settings: Settings) -> None:
    """Refuse the user's own directions, or a plane, for a twin with other weights than the first.

    Raises:
        SkipscopeError: directions or a plane are given.
    """
    if settings.own_directions is not None:
        raise SkipscopeError(
            "paired_landscapes",
            f"{name} has other weights than the first twin: directions made for one lead elsewhere for the"
            " other",
            expected="twins that share the first one's weights, or no directions=",
            cure="ss.landscape(twin, ..., directions=...) for each",
        )


def stale_statistics(
    first: nn.Module, twin: nn.Module, centre_of_first: float, centre_of_twin: float
) -> bool:
    """Whether the twin has the first twin's batch-norm statistics, but another loss."""
    if twin is first or centre_of_twin == centre_of_first:
        return False
    pairs = [(a.running_mean, b.running_mean) for a, b in zip(*map(norms_with_statistics, (twin, first)))]
    return bool(pairs) and all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


def _with_strength(model: nn.Module, settings: Settings) -> tuple[nn.Module, torch.Tensor | None]:
    """Replace the shortcuts' strength by a tensor if it is an axis. Returns the model and that tensor."""
    if settings.strength is None:
        return model, None
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    strength_tensor = torch.ones((), device=place)
    # Imported lazily: few planes have this axis, and ablate loads all of shortcut detection.
    from skipscope.shortcuts import ablate

    twin = ablate(model, settings.strength, strength=strength_tensor)
    set_mode(twin, False)
    return twin, strength_tensor


def same_weights(first: nn.Module, other: nn.Module) -> bool:
    """Whether both models have parameters of the same names and values."""
    a, b = dict(first.named_parameters()), dict(other.named_parameters())
    return a.keys() == b.keys() and all(
        a[n] is b[n] or (a[n].shape == b[n].shape and torch.equal(whole(a[n]), whole(b[n]))) for n in a
    )


def directions_for(
    model: nn.Module, settings: Settings, count: int, keep: bool = True
) -> list[dirs.Direction]:
    if settings.own_directions is not None:
        return [dirs.checked_direction(d, model) for d in settings.own_directions]
    made: list[dirs.Direction] = []
    for axis in range(count):
        like = made[0] if axis and settings.orthogonal else None
        seeded = dirs.random_direction(
            model,
            seed=settings.seed,
            axis=axis,
            normalize=settings.normalize,
            zero=settings.zeroed,
            parameters=settings.parameters,
            like=like,
            keep=keep,
        )
        made.append(seeded)
    return made


class Work:
    """Computation of all twins' values at grid points.

    Args:
        twins: the twins; differences are to the first.
        axes: the grid's axes.

    Attributes:
        names: names of the values, in order.
    """

    def __init__(self, twins: list[TwinOnPlane], axes: tuple[np.ndarray, ...]):
        self.twins, self.axes = twins, axes
        self.shape: tuple[int, ...] = tuple(len(at) for at in axes)
        self.names = [name for twin in twins for name in self._names(twin)]

    def _names(self, twin: TwinOnPlane) -> list[str]:
        names = [f"{twin.name}/value", *(f"{twin.name}/metric/{m}" for m in twin.origin.metrics)]
        if twin.has_samples:
            names += [f"{twin.name}/stderr", f"{twin.name}/centre_stderr"]
        if fold_sums(twin.origin) is not None:
            names += [f"{twin.name}/fold/{g}" for g in range(FOLDS)]
        if twin.shared and twin.has_samples and twin is not self.twins[0]:
            names.append(f"{twin.name}/difference_stderr")
        return names

    def points(self, flat: np.ndarray) -> list[Point]:
        """Coefficients of the points at flat grid indices."""
        places = np.unravel_index(flat, self.shape)
        return [tuple(float(at[i]) for at, i in zip(self.axes, place)) for place in zip(*places)]

    def __call__(self, flat: np.ndarray) -> np.ndarray:
        """Compute the values at flat grid indices, [names, points]."""
        points, out = self.points(flat), []
        first: np.ndarray | None = None
        for twin in self.twins:
            reading = twin.evaluator(points)
            numbers, own = self._numbers(twin, reading)
            if twin is self.twins[0]:
                first = own
            elif twin.shared and own is not None and first is not None:
                numbers.append(_standard_error(own - first))
            out += numbers
        return np.stack(out)

    def fingerprint(self) -> dict[str, float]:
        """Every twin's loss and metrics at the origin and at two opposite corners of the plane.

        They detect another loss or metric of the same name, for instance a loss that is clipped.
        """
        found = {}
        for twin in self.twins:
            whose = f" of {twin.name}" if len(self.twins) > 1 else ""
            readings = {"at the origin": twin.origin}
            for end in (0, -1):
                corner = tuple(float(axis[end]) for axis in self.axes)
                readings[f"{AWAY}, corner {end % 3 + 1}"] = twin.evaluator([corner])
            for place, reading in readings.items():
                for name, values in {"loss": reading.values, **reading.metrics}.items():
                    kind = "" if name == "loss" else "metric "
                    found[f"{kind}{name}{whose} {place}"] = float(values[0])
        return found

    def _numbers(self, twin: TwinOnPlane, reading: Reading) -> tuple[list[np.ndarray], np.ndarray | None]:
        numbers = [reading.values, *reading.metrics.values()]
        sums = twin.evaluator.loss.sums
        own, origin = influence(reading, sums), influence(twin.origin, sums)
        if own is not None and origin is not None:
            numbers += [_standard_error(own), _standard_error(own - origin)]
        folds = fold_sums(reading)
        if folds is not None:
            numbers += list(_without_each(*folds, sums).T)
        return numbers, own


def _standard_error(influences: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        return np.sqrt(np.square(influences).sum(1))


def _without_each(numerators: np.ndarray, denominators: np.ndarray, sums: bool) -> np.ndarray:
    """The loss without each fold, [points, folds]."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        rest = numerators.sum(1, keepdims=True) - numerators
        if sums:
            return rest * FOLDS / (FOLDS - 1)
        return rest / (denominators.sum() - denominators)


def folds_of(sheet: Sheet, twin: TwinOnPlane) -> list[tuple[float, np.ndarray]] | None:
    """(centre, surface) without each group of samples in turn. None without per-sample losses."""
    folds = fold_sums(twin.origin)
    if folds is None:
        return None
    centres = _without_each(*folds, twin.evaluator.loss.sums)[0]
    return [(float(centres[g]), sheet[f"{twin.name}/fold/{g}"]) for g in range(FOLDS)]
