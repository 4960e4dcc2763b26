"""Assembly of results from a filled grid: surfaces, differences, labels, scores, checks, provenance."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from skipscope._data import Batches, Objective
from skipscope._numbers import student_quantile
from skipscope._version import __version__
from skipscope.surfaces._landscape_settings import Settings
from skipscope.surfaces.evaluation._autotune import Choice
from skipscope.surfaces.evaluation._point_loss import weights_hash
from skipscope.surfaces.evaluation._twins_on_plane import TwinOnPlane, folds_of
from skipscope.surfaces.grids._grid import Sheet
from skipscope.surfaces.planes import _directions as dirs
from skipscope.surfaces.planes._plane import Plane
from skipscope.surfaces.results._surface_result import (
    Checks,
    Difference,
    KnownPoints,
    PairedSurfaces,
    Provenance,
    Surface,
)
from skipscope.surfaces.results._surface_scores import Part, label_of, level_for, scores_of


@dataclass(frozen=True)
class Facts:
    """Measurements made without the evaluator.

    Attributes:
        loss: the model's own loss.
        learnt: whether the network has learnt its targets; None if they cannot be permuted.
        known: own losses of the known weights on the plane, if any.
    """

    loss: float
    learnt: bool | None
    known: list[float]


@dataclass(frozen=True)
class Interpolated:
    """Accuracy of the values that were interpolated.

    Attributes:
        errors: twin -> largest error on points drawn at random.
        level: rows and columns of the points that the rest was interpolated from.
        held_out: number of drawn points.
        beyond: share of the other points that may be further off (see
            :func:`skipscope.surfaces.grids._adaptive_grid.beyond`); None after a level, whose test points are
            not random.
    """

    errors: dict[str, float]
    level: tuple[np.ndarray, ...]
    held_out: int
    beyond: float | None


@dataclass(frozen=True)
class Run:
    """One run, except its values.

    Attributes:
        settings: settings of the call.
        at: the grid's axes.
        data: data behind every point.
        loss: the objective.
        hashes: twin -> hash of its weights before the run.
        facts: twin -> measurements made without the evaluator.
        choices: twin -> its strategy.
        interpolated: accuracy of the interpolation; None if every point was computed.
        began: start of the run, by ``time.perf_counter``.
    """

    settings: Settings
    at: tuple[np.ndarray, ...]
    data: Batches
    loss: Objective
    hashes: dict[str, str]
    facts: dict[str, Facts]
    choices: dict[str, Choice]
    interpolated: Interpolated | None
    began: float


def finish(run: Run, sheet: Sheet, twins: list[TwinOnPlane]) -> PairedSurfaces:
    """Assemble all results of a run."""
    values = {t.name: sheet[f"{t.name}/value"] for t in twins}
    labels = {t.name: label_of(values[t.name], t.centre, run.facts[t.name].learnt) for t in twins}
    sound = [t for t in twins if not labels[t.name]] or twins
    readings = {t.name: [(t.centre, values[t.name]), *(folds_of(sheet, t) or ())] for t in twins}
    # All twins share a level, which is recomputed without each group of samples in turn.
    levels = [level_for(list(together)) for together in zip(*(readings[t.name] for t in sound))]
    parts = {name: [Part(*r, level) for r, level in zip(found, levels)] for name, found in readings.items()}
    surfaces = {t.name: _surface(run, sheet, t, labels[t.name], parts[t.name]) for t in twins}
    shared = [t for t in twins[1:] if t.shared]
    differences = {t.name: _difference(run, sheet, twins[0], t) for t in shared}
    return PairedSurfaces(surfaces, len(shared) == len(twins) - 1, differences, _notes(twins, labels))


def _surface(run: Run, sheet: Sheet, twin: TwinOnPlane, label: str, parts: list[Part]) -> Surface:
    values, name = sheet[f"{twin.name}/value"], twin.name
    alphas, *more = run.at
    betas = more[0] if more else np.zeros(0)
    guessed = run.interpolated
    scores = scores_of(
        parts[0],
        alphas,
        betas,
        label=label,
        parts=parts[1:],
        origin=twin.evaluator.origin_point,
        interpolated_from=guessed.level if guessed else None,
    )
    return Surface(
        name=name,
        values=values,
        alphas=alphas,
        betas=betas,
        computed=sheet.done.reshape(sheet.shape),
        stderr=sheet[f"{name}/stderr"] if twin.has_samples else None,
        centre_stderr=sheet[f"{name}/centre_stderr"] if twin.has_samples else None,
        why_no_stderr="" if twin.has_samples else (run.loss.why_no_samples or "fewer than two samples"),
        label=label,
        axis_names=_axis_names(run),
        metrics={m: sheet[f"{name}/metric/{m}"] for m in twin.origin.metrics},
        interpolation_error=guessed.errors[name] if guessed else None,
        scores=scores,
        checks=_checks(run, sheet, twin),
        provenance=_provenance(run, sheet, twin),
        points=_known_points(run, twin),
        held_out=guessed.held_out if guessed else 0,
        beyond=guessed.beyond if guessed else None,
    )


def _axis_names(run: Run) -> tuple[str, ...]:
    first = ["shortcut strength"] if run.settings.strength is not None else []
    if isinstance(run.settings.directions, Plane):
        return (*first, *run.settings.directions.axis_names)
    kind = "random direction" if run.settings.directions is None else "own direction"
    return (*first, *(f"{kind} {i + 1}" for i in range(len(run.at) - len(first))))


def _known_points(run: Run, twin: TwinOnPlane) -> KnownPoints | None:
    plane = run.settings.directions
    if not isinstance(plane, Plane):
        return None
    losses = np.array(run.facts[twin.name].known)
    return KnownPoints(plane.names, plane.coordinates, plane.distances, losses, plane.explained)


def _difference(run: Run, sheet: Sheet, first: TwinOnPlane, twin: TwinOnPlane) -> Difference:
    values = sheet[f"{twin.name}/value"] - sheet[f"{first.name}/value"]
    name = f"{twin.name} - {first.name}"
    if f"{twin.name}/difference_stderr" not in sheet:
        return Difference(name, values, None, None, None)
    error = sheet[f"{twin.name}/difference_stderr"]
    half = student_quantile(0.975, sum(twin.evaluator.plain.at_point.sizes) - 1) * error
    # An interpolated point may be off in both surfaces, so its interval is widened by both errors.
    off = sum(run.interpolated.errors[t.name] for t in (first, twin)) if run.interpolated else 0.0
    guess = off * ~sheet.done.reshape(sheet.shape)
    return Difference(name, values, error, values - half - guess, values + half + guess)


def _checks(run: Run, sheet: Sheet, twin: TwinOnPlane) -> Checks:
    moved = dirs.moved_parameters(twin.model, ())
    own = run.facts[twin.name].loss + twin.evaluator.penalty_at_origin()
    values = sheet[f"{twin.name}/value"]
    ratios = [dirs.worst_filter_ratio(d, moved) for d in twin.directions] or [1.0]
    return Checks(
        axis_cosine=dirs.cosine(*twin.directions) if len(twin.directions) > 1 else 0.0,
        filter_norm_ratio=max(ratios, key=lambda ratio: abs(ratio - 1)),
        centre_loss=twin.centre,
        model_loss=own,
        centre_is_model=twin.centre == own or (twin.centre != twin.centre and own != own),
        weights_restored=weights_hash(twin.model) == run.hashes[twin.name],
        strategy_error=run.choices[twin.name].error,
        samples=sum(twin.evaluator.plain.at_point.sizes),
        nonfinite=int((~np.isfinite(values) & sheet.done.reshape(values.shape)).sum()),
    )


def _provenance(run: Run, sheet: Sheet, twin: TwinOnPlane) -> Provenance:
    settings, choice = run.settings, run.choices[twin.name]
    parameters = {n: p.detach() for n, p in twin.model.named_parameters()}
    some = next(iter(parameters.values()))
    own = settings.directions is not None
    kind = ", ".join(_axis_names(run)) if isinstance(settings.directions, Plane) else "the user's own"
    return Provenance(
        seed=settings.seed,
        directions=kind if own else "Gaussian" + (", orthogonal" if settings.orthogonal else ""),
        normalize="none" if own else settings.normalize,
        zeroed=() if own else settings.zeroed,
        span_in_weights=tuple(
            _in_weights(d, parameters, at) for d, at in zip(twin.directions, run.at[-len(twin.directions) :])
        ),
        weights_hash=run.hashes[twin.name],
        data_hash=run.data.hash(),
        loss=run.loss.name,
        batch_norm=twin.evaluator.batch_norm,
        strategy=twin.evaluator.strategy.name,
        why=choice.why,
        dtype=str(some.dtype).removeprefix("torch.")
        + (f", run in {settings.precision}" if settings.precision else ""),
        device=str(some.device),
        versions={"skipscope": __version__, "torch": torch.__version__, "numpy": np.__version__},
        points_computed=int(sheet.done.sum()),
        seconds=time.perf_counter() - run.began,
    )


def _in_weights(direction: dirs.Direction, parameters: dict[str, torch.Tensor], at: np.ndarray) -> float:
    moved = {n: parameters[n] for n in direction}
    size = dirs.inner(moved, moved) ** 0.5
    return float(np.abs(at).max()) * dirs.inner(direction, direction) ** 0.5 / size if size else float("nan")


def _notes(twins: list[TwinOnPlane], labels: dict[str, str]) -> tuple[str, ...]:
    notes = []
    apart = [t.name for t in twins[1:] if not t.shared]
    if len(apart) < len(twins) - 1:
        notes.append(
            "Twins with the same weights were moved along identical directions; their difference is"
            " pointwise, its interval 95 % from the same samples in both."
        )
    if apart:
        notes.append(
            f"{', '.join(apart)}: other weights than {twins[0].name}; the same Gaussian draw, normalised to"
            " their own filters. Only the scores may be compared."
        )
    notes += [f"{t.name}: batch norm {t.evaluator.batch_norm}." for t in twins if t.fresh is not None]
    notes += [f"{name}: {label}." for name, label in labels.items() if label]
    return tuple(notes)
