"""The data behind every point, and the loss at one point with each sample's share of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skipscope._batches import hash_of
from skipscope._data import (
    Batch,
    Batches,
    Objective,
    as_batches,
    batch_size,
    map_tensors,
    rows,
    sample_count,
)
from skipscope._errors import SkipscopeError
from skipscope._model_calls import differentiates
from skipscope._random import random_state_kept
from skipscope._rank_batches import RankBatches, spread_batches
from skipscope._ranks import RankGroup
from skipscope._sharding import ForwardSteps

# Groups of samples left out in turn, for the scores' standard errors.
FOLDS = 10
Metric = Callable[[Any, Any], Any]


def resident(
    model: nn.Module, data: Any, loss: Any, samples: int | None, seed: int, group: RankGroup | None = None
) -> Batches:
    """Read the data once, keep it on the model's device, and draw the subset that every point will see.

    Reading once also makes points comparable: a loader that shuffles or augments gives other data each time.
    Each rank of a ``group`` keeps a part.
    """
    if isinstance(data, RankBatches):
        return data
    place = device_of(model)

    def read() -> Batches:
        source = as_batches(data, "landscape", any_shape=isinstance(loss, Objective))
        held = [map_tensors(batch, lambda t: t.detach().to(place)) for batch in source]
        return Batches(held, single=source.single)

    def subset(held: list[Batch], first: int, total: int) -> list[Batch]:
        return held if samples is None else _subset(held, samples, seed, first, total)

    if group is not None:
        return spread_batches(group, read, place, subset)
    found = read()
    held = list(found)
    if samples is not None:
        held = _subset(held, samples, seed, 0, sum(batch_size(batch) for batch in held))
    return Batches(held, single=found.single)


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first tensor; the CPU for a model without tensors."""
    return next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))


def _subset(held: list[Batch], samples: int, seed: int, first: int, total: int) -> list[Batch]:
    if any(sample_count(batch) is None for batch in held):
        raise SkipscopeError(
            "landscape",
            "samples= cannot choose among samples that are not seen in a batch",
            expected="tensors in inputs and target whose first dimension is the samples",
            cure="pass fewer data instead",
        )
    sizes = [batch_size(batch) for batch in held]
    if samples >= total:
        return held
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    kept, start = [], first
    for batch, size in zip(held, sizes):
        chosen = order[(order >= start) & (order < start + size)] - start
        if len(chosen):
            kept.append(rows(batch, chosen, size))
        start += size
    return kept


def direction_hash(directions: Iterable[Mapping[str, Tensor]]) -> str:
    """Hash of the directions' parameter names and tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for direction in directions:
        for name, tensor in direction.items():
            digest.update(f"{name}/{hash_of([tensor])}".encode())
        digest.update(b"/")
    return digest.hexdigest()


def weights_hash(model: nn.Module) -> str:
    """Hash of the tensors in a model's state dict."""
    return hash_of(t for t in model.state_dict().values() if isinstance(t, Tensor))


@dataclass
class Reading:
    """Loss, samples' shares and metrics at one or more points.

    Attributes:
        values: the loss, [points], float64.
        numerators: each sample's share of the loss's numerator, [points, samples], or None.
        denominators: each sample's share of the denominator, [samples], or None: the same at every point.
        metrics: name -> [points].
    """

    values: np.ndarray
    numerators: np.ndarray | None
    denominators: np.ndarray | None
    metrics: dict[str, np.ndarray]


class PointLoss:
    """Loss of a model on the resident data, with each sample's share.

    Args:
        data: batches from :func:`resident`.
        loss: the objective.
        metrics: name -> ``f(output, target)``; averaged over batches, weighted by their samples.
        once: whether to add up per-sample losses instead of computing the loss too, if that gives the same
            value to rounding; saves time.
    """

    def __init__(self, data: Batches, loss: Objective, metrics: dict[str, Metric], *, once: bool = False):
        if metrics and loss.from_output is None:
            raise SkipscopeError(
                "landscape",
                "metrics are read from the model's output, and an @objective has none to hand over",
                expected="loss(output, target)",
                got=loss.name,
                cure="leave metrics= out, or pass a loss of the output",
            )
        self.data, self.loss, self.metrics = data, loss, metrics
        self.once = once and loss.is_its_samples
        self.samples = loss.samples if loss.from_output is not None else None
        self._turns = [
            _Turn(
                batch,
                (1.0 if loss.sums or data.single else float(loss.weight(batch))) if counts else 0.0,
                batch_size(batch),
                counts,
            )
            for batch, counts in data.turns()
        ]
        own = [turn.size for turn in self._turns if turn.counts]
        self.sizes = [size for part in data.together(own) for size in part]
        self.records = False
        self.steps: ForwardSteps | None = None

    def read(self, model: nn.Module, run: Callable[[nn.Module, Batch], Any]) -> dict[str, Any]:
        """Evaluate one point, as tensors on the model's device; ``run(model, batch)`` is the forward pass.

        Gradients are recorded only if the loss or the model differentiates the network itself.
        """
        try:
            with torch.set_grad_enabled(self.records):
                found = self._read(model, run)
        except Exception as error:
            if self.records or not differentiates(error):
                raise
            self.records = True
            return self.read(model, run)
        return map_tensors(found, torch.Tensor.detach) if self.records else found

    def _read(self, model: nn.Module, run: Callable[[nn.Module, Batch], Any]) -> dict[str, Any]:
        sums, error = _Sums(metrics=dict.fromkeys(self.metrics, 0.0)), None
        self._rehearse(model, run)
        for turn in self._turns:
            try:
                with self.steps.one_pass() if self.steps is not None else nullcontext():
                    self._add(turn, sums, model, run)
            except Exception as failed:
                error = error or self.data.defer(failed)
        return _combined(self.data.together(sums, error), self.loss.sums, sum(self.sizes))

    def _rehearse(self, model: nn.Module, run: Callable[[nn.Module, Batch], Any]) -> None:
        """Run one batch on every rank once, to record the forward steps; an error occurs on all ranks."""
        if self.steps is not None and self.steps.order is None:
            first = _Turn(self.data.first(), 0.0, 0, counts=False)
            with random_state_kept(), self.steps.one_pass():
                self._add(first, _Sums(), model, run)

    def _add(
        self, turn: _Turn, sums: _Sums, model: nn.Module, run: Callable[[nn.Module, Batch], Any]
    ) -> None:
        of_output, samples, batch = self.loss.from_output, self.samples, turn.batch
        if of_output is None:
            value, output = self.loss.function(model, batch), None
        else:
            output = run(model, batch)
            value = None
        if not turn.counts:
            return
        if of_output is not None and not self.once:
            value = of_output(output, batch)
        if samples is not None:
            n, d = samples(output, batch)
            sums.numerators.append(n.double())
            sums.denominators.append(d.double())
        if value is None:
            value = sums.numerators[-1].sum() / (1.0 if self.loss.sums else sums.denominators[-1].sum())
        # A batch without weight has an undefined mean and must not enter the sum.
        if turn.share:
            sums.total = sums.total + turn.share * value.double()
            sums.share += turn.share
        for name, metric in self.metrics.items():
            target = batch[1] if isinstance(batch, tuple | list) else batch
            sums.metrics[name] = sums.metrics[name] + turn.size * _number(name, metric(output, target))


@dataclass(frozen=True)
class _Turn:
    """A batch to run.

    Attributes:
        batch: inputs and target.
        share: weight of its loss.
        size: number of samples.
        counts: False if it is run only because another rank runs a batch.
    """

    batch: Batch
    share: float
    size: int
    counts: bool


@dataclass
class _Sums:
    """Sums over a pass through some batches."""

    total: Any = 0.0
    share: float = 0.0
    numerators: list[Tensor] = field(default_factory=list)
    denominators: list[Tensor] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)


def _combined(parts: list[_Sums], sums: bool, samples: int) -> dict[str, Any]:
    """Combine the sums over each part of the data, in order, into one point."""
    normaliser = 1.0 if sums else sum(part.share for part in parts)
    total: Any = sum(part.total for part in parts)
    numerators, denominators = (
        [t for part in parts for t in getattr(part, name)] for name in ("numerators", "denominators")
    )
    return {
        "value": total / normaliser if normaliser else torch.tensor(float("nan")),
        "numerators": torch.cat(numerators) if numerators else None,
        "denominators": torch.cat(denominators) if denominators else None,
        "metrics": {name: sum(part.metrics[name] for part in parts) / samples for name in parts[0].metrics},
    }


def _number(name: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value).double().reshape(())
    except (TypeError, ValueError, RuntimeError) as error:
        raise SkipscopeError(
            "landscape",
            f"the metric {name!r} gave no number",
            expected="f(output, target) -> one number a batch",
            got=f"{type(value).__name__}: {value!r:.80}",
        ) from error


def gather(points: list[dict[str, Any]]) -> Reading:
    """Stack the points' tensors into one :class:`Reading` on the host."""
    has = points[0]["numerators"] is not None
    return Reading(
        values=torch.stack([torch.as_tensor(p["value"]).reshape(()) for p in points]).cpu().numpy(),
        numerators=torch.stack([p["numerators"] for p in points]).cpu().numpy() if has else None,
        denominators=points[0]["denominators"].cpu().numpy() if has else None,
        metrics={
            name: torch.stack([p["metrics"][name].reshape(()) for p in points]).cpu().numpy()
            for name in points[0]["metrics"]
        },
    )


def joined(readings: list[Reading]) -> Reading:
    """Concatenate readings."""
    first = readings[0]
    numerators = [r.numerators for r in readings if r.numerators is not None]
    return Reading(
        values=np.concatenate([r.values for r in readings]),
        numerators=np.concatenate(numerators) if numerators else None,
        denominators=first.denominators,
        metrics={name: np.concatenate([r.metrics[name] for r in readings]) for name in first.metrics},
    )


def parts(reading: Reading) -> list[Reading]:
    """Split a reading into one per point."""
    n = reading.numerators
    return [
        Reading(
            reading.values[i : i + 1],
            None if n is None else n[i : i + 1],
            reading.denominators,
            {name: values[i : i + 1] for name, values in reading.metrics.items()},
        )
        for i in range(len(reading.values))
    ]


# --- standard errors ---


def influence(reading: Reading, sums: bool) -> np.ndarray | None:
    """Influence of each sample on each value, [points, samples]. None without per-sample losses.

    A value's standard error is the root sum of squares of its influences. For a mean sum(n)/sum(d) the
    influence is (n_i - value d_i) / sum(d), the delta method; for a sum it is n_i minus the mean of all n.
    Influences at two points, or of two twins, subtract, which makes a paired error small.
    """
    n, d = reading.numerators, reading.denominators
    if n is None or d is None or n.shape[1] < 2:
        return None
    with np.errstate(invalid="ignore", over="ignore"):
        scale = np.sqrt(n.shape[1] / (n.shape[1] - 1))
        if sums:
            return scale * (n - n.mean(1, keepdims=True))
        return scale * (n - n.sum(1, keepdims=True) / d.sum() * d) / d.sum()


def fold_sums(reading: Reading) -> tuple[np.ndarray, np.ndarray] | None:
    """Numerators [points, folds] and denominators [folds], summed over each of :data:`FOLDS` groups."""
    n, d = reading.numerators, reading.denominators
    if n is None or d is None or n.shape[1] < 2 * FOLDS:
        return None
    fold = np.arange(n.shape[1]) % FOLDS
    return np.stack([n[:, fold == g].sum(1) for g in range(FOLDS)], 1), np.array(
        [d[fold == g].sum() for g in range(FOLDS)]
    )
