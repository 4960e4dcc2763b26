"""The data behind every point, and what one point hands over: its loss and each sample's share of it."""

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

FOLDS = 10  # groups of samples left out in turn, for the scores' standard errors
Metric = Callable[[Any, Any], Any]


def resident(
    model: nn.Module, data: Any, loss: Any, samples: int | None, seed: int, group: RankGroup | None = None
) -> Batches:
    """Read the data once, keep it on the model's device, and draw the subset that every point will see.

    Reading once is also what makes points comparable: a loader that shuffles or augments gives other data
    each time. Where there is a ``group``, each of its ranks keeps a part.
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
    """Where a model is, and what it is run on belongs."""
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
    """A hash of directions: which parameters they move, and how."""
    digest = hashlib.blake2b(digest_size=16)
    for direction in directions:
        for name, tensor in direction.items():
            digest.update(f"{name}/{hash_of([tensor])}".encode())
        digest.update(b"/")
    return digest.hexdigest()


def weights_hash(model: nn.Module) -> str:
    """A hash of everything a model's state dict holds in tensors."""
    return hash_of(t for t in model.state_dict().values() if isinstance(t, Tensor))


@dataclass
class Reading:
    """What one or more points gave; every array's first dimension is the points.

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
    """The loss of one placed model on the resident data, with each sample's share.

    Args:
        data: as :func:`resident` gave them.
        loss: the objective.
        metrics: name -> ``f(output, target)``; averaged over batches by samples.
        once: where the samples' shares are the loss's own terms, add these up instead of computing the loss
            as well: its value to rounding, in less time.
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
        """One point as tensors on the model's device; ``run(model, batch)`` is the forward pass.

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
        """Run the same batch on every rank once, which fails on all or on none: then the steps are known."""
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
        if turn.share:  # a batch with nothing to count has an undefined mean, and counts for nothing
            sums.total = sums.total + turn.share * value.double()
            sums.share += turn.share
        for name, metric in self.metrics.items():
            target = batch[1] if isinstance(batch, tuple | list) else batch
            sums.metrics[name] = sums.metrics[name] + turn.size * _number(name, metric(output, target))


@dataclass(frozen=True)
class _Turn:
    """A batch to run.

    Attributes:
        batch: its inputs and target.
        share: what its loss counts for.
        size: its samples.
        counts: False where it is run only because another rank runs one.
    """

    batch: Batch
    share: float
    size: int
    counts: bool


@dataclass
class _Sums:
    """What a pass over some batches adds up to."""

    total: Any = 0.0
    share: float = 0.0
    numerators: list[Tensor] = field(default_factory=list)
    denominators: list[Tensor] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)


def _combined(parts: list[_Sums], sums: bool, samples: int) -> dict[str, Any]:
    """One point from the sums over each part of the data, in order."""
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
    """Points' tensors as one :class:`Reading` (one copy to the host)."""
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
    """Readings of one point after another as one."""
    first = readings[0]
    numerators = [r.numerators for r in readings if r.numerators is not None]
    return Reading(
        values=np.concatenate([r.values for r in readings]),
        numerators=np.concatenate(numerators) if numerators else None,
        denominators=first.denominators,
        metrics={name: np.concatenate([r.metrics[name] for r in readings]) for name in first.metrics},
    )


def parts(reading: Reading) -> list[Reading]:
    """A reading of several points as one of each."""
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
    """Each sample's influence on each value, [points, samples]: value's error is their root sum of squares.

    For a mean sum(n)/sum(d) it is (n_i - value d_i) / sum(d), the delta method; for a sum it is n_i less
    their mean. Influences at two points, or of two twins, subtract: that is what makes a paired error small.
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
    """Numerators and denominators summed over each of :data:`FOLDS` groups: [points, folds] and [folds]."""
    n, d = reading.numerators, reading.denominators
    if n is None or d is None or n.shape[1] < 2 * FOLDS:
        return None
    fold = np.arange(n.shape[1]) % FOLDS
    return np.stack([n[:, fold == g].sum(1) for g in range(FOLDS)], 1), np.array(
        [d[fold == g].sum() for g in range(FOLDS)]
    )
