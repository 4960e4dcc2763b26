"""The public calls: one surface, or several side by side on the same plane."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from skipscope._data import Batch, Batches, Objective, mean_loss, read
from skipscope._errors import SkipscopeError
from skipscope._progress import track
from skipscope._untouched import require_module, untouched
from skipscope._version import __version__
from skipscope.surfaces import _directions as dirs
from skipscope.surfaces._evaluate import Evaluator, prepare_batch_norm, recalibrate
from skipscope.surfaces._grid import Sheet, axes, rows
from skipscope.surfaces._learnt import has_learnt
from skipscope.surfaces._moving import own_copy
from skipscope.surfaces._points import Metric, data_hash, resident, weights_hash
from skipscope.surfaces._results import Checks, Difference, PairedSurfaces, Provenance, Surface
from skipscope.surfaces._scores import label_of, level_for, scores_of
from skipscope.surfaces._twins import TwinOnPlane, Work, folds_of

_Z95 = 1.959963984540054


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Everything that decides what a surface's numbers are, besides model, data and loss."""

    grid: int | Sequence[int]
    span: Any
    seed: int
    directions: Sequence[Any] | None
    normalize: str
    zero: tuple[str, ...]
    orthogonal: bool
    batch_norm: str
    l2: float
    samples: int | None


def landscape(
    model: nn.Module,
    data: Any,
    loss: Any = None,
    *,
    grid: int | Sequence[int] = 51,
    span: Any = 1.0,
    seed: int = 0,
    store: Any = None,
    directions: Sequence[Any] | None = None,
    normalize: str = "filter",
    zero: Iterable[str] = ("biases", "norms"),
    orthogonal: bool = False,
    batch_norm: str = "frozen",
    samples: int | None = None,
    metrics: Mapping[str, Metric] | None = None,
    l2: float = 0.0,
    weight: Callable[[Batch], float] | None = None,
    sample_loss: Callable[[Any, Any], torch.Tensor] | None = None,
) -> Surface:
    """The loss on a plane w + a d1 + b d2 around the model's weights (Li et al., arXiv 1712.09913).

    Local: no other process is waited for. The model is only read: a copy moves.

    Args:
        model: evaluated in evaluation mode.
        data: one batch or re-iterable batches; read once and kept, so that every point sees the same samples.
        loss: ``loss(output, target)``; left out when the output carries ``.loss``; or ``@ss.objective``.
        grid: points an axis, or one number an axis; ``(51,)`` is a line.
        span: half width in units of the direction (|d_f| = |w_f| by default); or one an axis; or (low, high) an axis.
        seed: of the directions, and of the subset when ``samples`` is given.
        store: a folder to keep results in, to resume from.
        directions: your own instead: one or two dicts from parameter names to tensors, taken as they are.
        normalize: "filter", "layer", "tensor" or "none".
        zero: what does not move: any of "biases", "norms", "embeddings".
        orthogonal: make the second direction orthogonal to the first, filter by filter.
        batch_norm: "frozen" (running statistics as they are), "recalibrate" (measured anew at each point) or "batch"
            (each batch's own statistics).
        samples: use a random subset of the data of this size; ``stderr`` says what that costs.
        metrics: name -> ``f(output, target) -> number``, read in the same pass.
        l2: a regulariser to count in: l2/2 |w|^2 over all parameters.
        weight: what a batch counts for in the mean over batches.
        sample_loss: ``f(output, target) -> [samples]``, for standard errors of a loss that torch does not know.

    Returns:
        The surface; ``values[a, b]`` is the loss at ``alphas[a]``, ``betas[b]``.

    Raises:
        SkipscopeError: model, data, loss or settings that cannot be used, each with its cure.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import skipscope as ss
        >>> batch = torch.randn(20, 4), torch.randn(20, 1)
        >>> surface = ss.landscape(nn.Linear(4, 1), batch, nn.functional.mse_loss, grid=5)
        >>> surface.values.shape, surface.checks.passed
        ((5, 5), True)
    """
    settings = Settings(
        grid=grid, span=span, seed=seed, directions=directions, normalize=normalize, zero=_tuple(zero),
        orthogonal=orthogonal, batch_norm=batch_norm, l2=l2, samples=samples,
    )  # fmt: skip
    name = type(model).__name__
    pair = _surfaces(
        {name: model},
        data,
        loss,
        settings,
        metrics=metrics,
        weight=weight,
        sample_loss=sample_loss,
        store=store,
    )
    return pair.surfaces[name]


def paired_landscapes(
    models: Mapping[str, nn.Module],
    data: Any,
    loss: Any = None,
    *,
    grid: int | Sequence[int] = 51,
    span: Any = 1.0,
    seed: int = 0,
    store: Any = None,
    directions: Sequence[Any] | None = None,
    normalize: str = "filter",
    zero: Iterable[str] = ("biases", "norms"),
    orthogonal: bool = False,
    batch_norm: str = "frozen",
    samples: int | None = None,
    metrics: Mapping[str, Metric] | None = None,
    l2: float = 0.0,
    weight: Callable[[Batch], float] | None = None,
    sample_loss: Callable[[Any, Any], torch.Tensor] | None = None,
) -> PairedSurfaces:
    """Surfaces of twins that can be compared: same data, same seed, same plane.

    Twins that share the first one's weights (removed, detached, another strength) get identical direction tensors,
    and their pointwise difference to it with a 95 % interval from the paired per-sample losses. Twins that were
    trained separately get the same Gaussian draw for the parameters that match by name and shape, each normalised to
    its own filters: they have no pointwise difference, only scores side by side.

    Args:
        models: name -> model; the first is the one that others are compared with.
        data: as in :func:`landscape`; every twin sees the same samples.
        loss: as in :func:`landscape`.
        grid: as in :func:`landscape`.
        span: as in :func:`landscape`.
        seed: as in :func:`landscape`.
        store: as in :func:`landscape`.
        directions: as in :func:`landscape`; only for twins that share weights.
        normalize: as in :func:`landscape`.
        zero: as in :func:`landscape`.
        orthogonal: as in :func:`landscape`.
        batch_norm: as in :func:`landscape`.
        samples: as in :func:`landscape`.
        metrics: as in :func:`landscape`.
        l2: as in :func:`landscape`.
        weight: as in :func:`landscape`.
        sample_loss: as in :func:`landscape`.

    Raises:
        SkipscopeError: as :func:`landscape`; or there is no model.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import skipscope as ss
        >>> batch = torch.randn(40, 4), torch.randn(40, 1)
        >>> twins = {"one": nn.Linear(4, 1), "other": nn.Linear(4, 1)}
        >>> pair = ss.paired_landscapes(twins, batch, nn.functional.mse_loss, grid=5)
        >>> pair.difference is None, list(pair.scores)
        (True, ['one', 'other'])
    """
    if not isinstance(models, Mapping) or not models:
        raise SkipscopeError(
            "paired_landscapes", "no twins were given", expected='{"with": model, "without": plain}',
            got=f"{type(models).__name__}",
        )  # fmt: skip
    settings = Settings(
        grid=grid, span=span, seed=seed, directions=directions, normalize=normalize, zero=_tuple(zero),
        orthogonal=orthogonal, batch_norm=batch_norm, l2=l2, samples=samples,
    )  # fmt: skip
    return _surfaces(
        models, data, loss, settings, metrics=metrics, weight=weight, sample_loss=sample_loss, store=store
    )


def _tuple(names: Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


# --- the straight line --------------------------------------------------------------------------------------------


def _surfaces(
    models: Mapping[str, nn.Module],
    data: Any,
    loss: Any,
    settings: Settings,
    *,
    metrics: Mapping[str, Metric] | None,
    weight: Any,
    sample_loss: Any,
    store: Any,
) -> PairedSurfaces:
    began = time.perf_counter()
    for model in models.values():
        require_module(model, "landscape")
    at = axes(settings.grid, settings.span, None if settings.directions is None else len(settings.directions))
    first = next(iter(models.values()))
    held = resident(first, data, loss, settings.samples, settings.seed)
    held, objective = read(first, held, loss, "landscape", weight=weight, sample_loss=sample_loss)
    with untouched(*models.values(), training=False, seed=0, operation="landscape"):
        hashes = {name: weights_hash(model) for name, model in models.items()}
        shared = {name: _same_weights(first, model) for name, model in models.items()}
        plan = {name: _directions(model, settings, len(at)) for name, model in models.items()}
        twins = [
            _twin(name, model, held, objective, plan[name], settings, dict(metrics or {}), shared[name])
            for name, model in models.items()
        ]
        work = Work(twins, at)
        sheet = Sheet(work.names, work.shape)
        for unit in track(rows(work.shape, 64), f"loss surface of {', '.join(models)}"):
            sheet.put(unit, work(unit))
        _put_origin(sheet, twins, at)
        facts = {name: _facts(model, held, objective, settings) for name, model in models.items()}
    finish = _Finish(models, held, objective, settings, at, plan, hashes, facts, began)
    return finish.all(sheet, twins)


def _same_weights(first: nn.Module, other: nn.Module) -> bool:
    a, b = dict(first.named_parameters()), dict(other.named_parameters())
    return a.keys() == b.keys() and all(
        a[n] is b[n] or (a[n].shape == b[n].shape and torch.equal(a[n], b[n])) for n in a
    )


def _directions(model: nn.Module, settings: Settings, count: int) -> list[dirs.Direction]:
    if settings.directions is not None:
        return [dirs.checked_direction(d, model) for d in settings.directions]
    made: list[dirs.Direction] = []
    for axis in range(count):
        made.append(
            dirs.random_direction(
                model,
                seed=settings.seed,
                axis=axis,
                normalize=settings.normalize,
                zero=settings.zero,
                like=made[0] if axis and settings.orthogonal else None,
            )  # fmt: skip
        )
    return made


def _twin(
    name: str,
    model: nn.Module,
    data: Batches,
    loss: Objective,
    directions: list[dirs.Direction],
    settings: Settings,
    metrics: dict[str, Metric],
    shared: bool,
) -> TwinOnPlane:
    evaluator = Evaluator(
        model,
        data,
        loss,
        directions,
        metrics=metrics,
        batch_norm=settings.batch_norm,
        l2=settings.l2,
        per_sample=True,
    )
    evaluator.notice_draws()
    return TwinOnPlane(name, evaluator, evaluator([(0.0,) * len(directions)]), shared)


def _put_origin(sheet: Sheet, twins: list[TwinOnPlane], at: tuple[np.ndarray, ...]) -> None:
    """Where the origin is a point of the grid it carries the plain loop's value: the model's own loss, bit for bit."""
    places = [np.flatnonzero(axis == 0.0) for axis in at]
    if all(len(p) for p in places):
        for twin in twins:
            sheet[f"{twin.name}/value"][tuple(int(p[0]) for p in places)] = twin.origin.values[0]


def _facts(model: nn.Module, data: Batches, loss: Objective, settings: Settings) -> dict[str, Any]:
    """What is measured apart from the evaluator: the model's own loss, and whether it has learnt."""
    if settings.batch_norm != "frozen":
        model = own_copy(model)
        if prepare_batch_norm(model, settings.batch_norm) != "none" and settings.batch_norm == "recalibrate":
            recalibrate(model, data)
    own = mean_loss(model, data, loss)
    return {"loss": own, "learnt": has_learnt(model, data, loss)}


@dataclass
class _Finish:
    """From a filled sheet to results."""

    models: Mapping[str, nn.Module]
    data: Batches
    loss: Objective
    settings: Settings
    at: tuple[np.ndarray, ...]
    plan: dict[str, list[dirs.Direction]]
    hashes: dict[str, str]
    facts: dict[str, dict[str, Any]]
    began: float

    def all(self, sheet: Sheet, twins: list[TwinOnPlane]) -> PairedSurfaces:
        labels = {t.name: self._label(sheet, t) for t in twins}
        level = level_for(
            [(float(t.origin.values[0]), sheet[f"{t.name}/value"]) for t in twins if not labels[t.name]]
            or [(float(t.origin.values[0]), sheet[f"{t.name}/value"]) for t in twins]
        )
        surfaces = {t.name: self.surface(sheet, t, labels[t.name], level) for t in twins}
        shared = [t for t in twins[1:] if t.shared]
        differences = {t.name: self.difference(sheet, twins[0], t) for t in shared}
        return PairedSurfaces(surfaces, len(shared) == len(twins) - 1, differences, _notes(twins, labels))

    def _label(self, sheet: Sheet, twin: TwinOnPlane) -> str:
        return label_of(
            sheet[f"{twin.name}/value"], float(twin.origin.values[0]), self.facts[twin.name]["learnt"]
        )

    def surface(self, sheet: Sheet, twin: TwinOnPlane, label: str, level: float) -> Surface:
        values, name = sheet[f"{twin.name}/value"], twin.name
        betas = self.at[1] if len(self.at) > 1 else np.zeros(0)
        why = "" if twin.has_samples else (self.loss.why_no_samples or "fewer than two samples")
        scores = scores_of(
            values, self.at[0], betas, centre=float(twin.origin.values[0]), level=level, label=label,
            without_fold=folds_of(sheet, twin),
        )  # fmt: skip
        return Surface(
            name=name, values=values, alphas=self.at[0], betas=betas, computed=sheet.done.reshape(sheet.shape),
            stderr=sheet[f"{name}/stderr"] if twin.has_samples else None,
            centre_stderr=sheet[f"{name}/centre_stderr"] if twin.has_samples else None,
            why_no_stderr=why, label=label, axis_names=self._axis_names(),
            metrics={m: sheet[f"{name}/metric/{m}"] for m in twin.origin.metrics},
            interpolation_error=None, scores=scores, checks=self.checks(sheet, twin), provenance=self.provenance(sheet, twin),
        )  # fmt: skip

    def _axis_names(self) -> tuple[str, ...]:
        own = self.settings.directions is not None
        return tuple(f"{'own' if own else 'random'} direction {i + 1}" for i in range(len(self.at)))

    def difference(self, sheet: Sheet, first: TwinOnPlane, twin: TwinOnPlane) -> Difference:
        values = sheet[f"{twin.name}/value"] - sheet[f"{first.name}/value"]
        name = f"{twin.name} - {first.name}"
        if f"{twin.name}/difference_stderr" not in sheet:
            return Difference(name, values, None, None, None)
        error = sheet[f"{twin.name}/difference_stderr"]
        return Difference(name, values, error, values - _Z95 * error, values + _Z95 * error)

    def checks(self, sheet: Sheet, twin: TwinOnPlane) -> Checks:
        model, directions = self.models[twin.name], self.plan[twin.name]
        moved = dirs.moved_parameters(model, ())
        centre, own = float(twin.origin.values[0]), self.facts[twin.name]["loss"]
        if self.settings.l2:
            own += twin.evaluator.penalty((0.0,) * len(directions))
        values = sheet[f"{twin.name}/value"]
        return Checks(
            axis_cosine=dirs.cosine(*directions) if len(directions) > 1 else 0.0,
            filter_norm_ratio=max(
                (dirs.worst_filter_ratio(d, moved) for d in directions), key=lambda ratio: abs(ratio - 1)
            ),
            centre_loss=centre,
            model_loss=own,
            centre_is_model=centre == own or (centre != centre and own != own),
            weights_restored=weights_hash(model) == self.hashes[twin.name],
            strategy_error=0.0,
            samples=sum(twin.evaluator.at_point.sizes),
            nonfinite=int((~np.isfinite(values) & sheet.done.reshape(values.shape)).sum()),
        )

    def provenance(self, sheet: Sheet, twin: TwinOnPlane) -> Provenance:
        model, directions, own = (
            self.models[twin.name],
            self.plan[twin.name],
            self.settings.directions is not None,
        )
        parameters = {n: p.detach() for n, p in model.named_parameters()}
        some = next(iter(parameters.values()))
        return Provenance(
            seed=self.settings.seed,
            directions="the user's own"
            if own
            else "Gaussian" + (", orthogonal" if self.settings.orthogonal else ""),
            normalize="none" if own else self.settings.normalize,
            zeroed=() if own else self.settings.zero,
            span_in_weights=tuple(_in_weights(d, parameters, at) for d, at in zip(directions, self.at)),
            weights_hash=self.hashes[twin.name],
            data_hash=data_hash(self.data),
            loss=self.loss.name,
            batch_norm=twin.evaluator.batch_norm,
            strategy="plain loop",
            why="the reference",
            dtype=str(some.dtype).removeprefix("torch."),
            device=str(some.device),
            versions={"skipscope": __version__, "torch": torch.__version__, "numpy": np.__version__},
            points_computed=int(sheet.done.sum()),
            seconds=time.perf_counter() - self.began,
        )


def _in_weights(direction: dirs.Direction, parameters: dict[str, torch.Tensor], at: np.ndarray) -> float:
    moved = {n: parameters[n] for n in direction}
    size = dirs.inner(moved, moved) ** 0.5
    return float(np.abs(at).max()) * dirs.inner(direction, direction) ** 0.5 / size if size else float("nan")


def _notes(twins: list[TwinOnPlane], labels: dict[str, str]) -> tuple[str, ...]:
    notes = []
    if len(twins) > 1:
        apart = [t.name for t in twins[1:] if not t.shared]
        if len(apart) < len(twins) - 1:
            notes.append(
                "Twins with the same weights were moved along identical directions; their difference is pointwise, its "
                "interval 95 % from the same samples in both."
            )
        if apart:
            notes.append(
                f"{', '.join(apart)}: other weights than {twins[0].name}; the same Gaussian draw, normalised to their own "
                "filters. Only the scores may be compared."
            )
    notes += [f"{name}: {label}." for name, label in labels.items() if label]
    return tuple(notes)
