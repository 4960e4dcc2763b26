"""Evaluation of the loss at points of a plane: the plain loop over points, and one twin's evaluator.

The plain loop moves a copy of the model and runs every batch as it came. It is the reference that faster
strategies are tried against on the first points (see :mod:`skipscope.surfaces.evaluation._autotune`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from skipscope._cached_weights import (
    Cache,
    caches_filled_by,
    empty,
    holds_generators,
    refuse_full_caches,
    tensors_kept,
)
from skipscope._data import Batch, Batches, Objective, forward
from skipscope._option_words import BatchNorm
from skipscope._random import generator_states, generators_moved, refuse_noise, seed_generators
from skipscope._sharding import units
from skipscope._validation import require_option
from skipscope.shortcuts import average_statistics, norms_with_statistics
from skipscope.surfaces.evaluation._moving_copy import MovingCopy
from skipscope.surfaces.evaluation._moving_shards import MovingShards
from skipscope.surfaces.evaluation._point_loss import Metric, PointLoss, Reading, gather, joined, parts
from skipscope.surfaces.planes._directions import Direction, inner

BATCH_NORM: dict[BatchNorm, str] = {
    "frozen": "frozen", "recalibrate": "recalibrated at each point", "batch": "batch statistics",
    "as found": "frozen as found",
}  # fmt: skip
Point = tuple[float, ...]
# The buffers of each norm that keeps running statistics.
Statistics = Sequence[Mapping[str, Tensor]]


class Strategy(Protocol):
    """Strategy for evaluating points."""

    name: str

    def __call__(self, points: Sequence[Point]) -> Reading:
        """Evaluate the loss at ``points``."""
        ...

    def close(self) -> None:
        """Release processes and other resources."""
        ...


# --- batch norm ---


def prepare_batch_norm(copy: nn.Module, mode: BatchNorm, statistics: Statistics = ()) -> str:
    """Set the batch-norm mode of a private copy, and replace its statistics if given.

    Returns:
        A description of the mode.

    Raises:
        SkipscopeError: the mode is unknown.
    """
    require_option("landscape", "batch-norm mode", mode, BATCH_NORM)
    layers = norms_with_statistics(copy)
    for layer, values in zip(layers, statistics):
        for name, value in values.items():
            layer._buffers[name] = value.clone()
    if mode == "batch":
        for layer in layers:
            layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    return BATCH_NORM[mode] if layers else "none"


# --- the plain loop, and loops like it ---


class Loop:
    """Evaluate points one by one: move the copy, then run every batch.

    Args:
        model: the user's model in evaluation mode; it is only read.
        directions: one direction per axis.
        at_point: the data and the loss.
        batch_norm: a key of :data:`BATCH_NORM`.
        name: name of the strategy in the result.
        channels_last: whether to store the copy's convolution weights in channels-last format.
        run: the forward pass, ``run(model, batch) -> output``.
        strength_tensor: tensor of the shortcut strength, if the first coefficient is the strength.
        statistics: replace the norms' own statistics.
    """

    def __init__(
        self,
        model: nn.Module,
        directions: Sequence[Direction],
        at_point: PointLoss,
        batch_norm: BatchNorm,
        *,
        name: str = "plain",
        channels_last: bool = False,
        run: Callable[[nn.Module, Batch], Any] | None = None,
        strength_tensor: Tensor | None = None,
        statistics: Statistics = (),
    ):
        self.name, self.at_point, self.strength_tensor = name, at_point, strength_tensor
        prepare = partial(prepare_batch_norm, mode=batch_norm, statistics=statistics)
        self.moving: MovingCopy | MovingShards
        if units(model):
            self.moving = MovingShards(model, directions, prepare)
            at_point.steps = self.moving.steps
        else:
            self.moving = MovingCopy(model, directions, prepare, channels_last=channels_last)
        self.recalibrates = batch_norm == "recalibrate" and bool(norms_with_statistics(model))
        self.run = run or _run
        self.draws = False
        self.caches: list[Cache] = []

    def __call__(self, points: Sequence[Point]) -> Reading:
        with self.moving.at_work():
            return gather([self._one(point) for point in points])

    def close(self) -> None:
        """Do nothing: the loop holds no resources."""

    def _one(self, point: Point) -> dict[str, Any]:
        if self.strength_tensor is not None:
            self.strength_tensor.fill_(point[0])
            point = point[1:]
        copy = self.moving.move(point)
        empty(copy, self.caches)
        if self.draws:
            # A forward pass with random numbers draws the same ones at every point.
            seed_generators(0)
        if self.recalibrates:
            average_statistics(copy, self.at_point.data, self.at_point.loss.run)
        return self.at_point.read(copy, self.run)

    def read_origin(self, origin: Point) -> Reading:
        """Read the origin, and detect random draws and weight caches that must be reset before each point.

        Raises:
            SkipscopeError: a cache of the model is already filled, or the model draws from its own generator.
        """
        with self.moving.at_work():
            return self._read_origin(origin)

    def _read_origin(self, origin: Point) -> Reading:
        before, copy = generator_states(), self.moving.model
        held = tensors_kept(copy)
        reading, self.caches = caches_filled_by(lambda: self([origin]), copy)
        refuse_full_caches(
            "landscape", copy, held, self.moving.names, lambda model: self.at_point.read(model, self.run)
        )
        self.draws = any(self.at_point.data.together(generators_moved(before)))
        if self.draws:
            reading = self([origin])
        if holds_generators(copy):
            again, dtype = self([origin]), next((p.dtype for p in copy.parameters()), torch.float32)
            refuse_noise("landscape", float(reading.values[0]), float(again.values[0]), dtype)
        return reading


def _run(model: nn.Module, batch: Batch) -> Any:
    return forward(model, batch, "landscape")


class Evaluator:
    """Evaluate one twin at points of the plane, by the chosen strategy.

    Args:
        model: the user's model in evaluation mode; it is only read.
        data: resident batches.
        loss: the objective.
        directions: one direction per axis.
        metrics: name -> ``f(output, target)``.
        batch_norm: a key of :data:`BATCH_NORM`.
        l2: weight of l2/2 |w|^2 over all parameters, added to every value.
        strength_tensor: tensor of the shortcut strength in ``model``, if the first axis is the strength.
        statistics: replace the norms' own statistics.

    Attributes:
        plain: the plain loop, the reference.
        strategy: strategy in use; the plain loop until another is chosen.
        origin_point: coefficients of the unchanged model.
        origin: reading at the origin, by the plain loop.
        plain_origin: ``origin`` without the regulariser.
        origin_seconds: seconds that the reading took.
        batch_norm: description of the batch-norm mode.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        data: Batches,
        loss: Objective,
        directions: Sequence[Direction],
        metrics: dict[str, Metric],
        batch_norm: BatchNorm,
        l2: float,
        strength_tensor: Tensor | None = None,
        statistics: Statistics = (),
    ):
        self.model, self.loss, self.directions = model, loss, directions
        self.mode: BatchNorm = batch_norm
        self.strength_tensor = strength_tensor
        self.plain = Loop(
            model,
            directions,
            PointLoss(data, loss, metrics),
            batch_norm,
            strength_tensor=strength_tensor,
            statistics=statistics,
        )
        self.batch_norm = BATCH_NORM[batch_norm] if norms_with_statistics(model) else "none"
        self.strategy: Strategy = self.plain
        self._penalty = _Penalty(model, directions, l2) if l2 else None
        # As built: no step along any direction, and a strength of one.
        self.origin_point = (*([1.0] if strength_tensor is not None else []), *(0.0 for _ in directions))
        began = time.perf_counter()
        reading = self.plain.read_origin(self.origin_point)
        self.origin_seconds = max(data.together(time.perf_counter() - began))
        self.plain_origin = reading
        self.origin = self._with_penalty(reading, [self.origin_point])
        self._kept: dict[Point, Reading] = {}
        self.keep([self.origin_point], reading)

    def __call__(self, points: Sequence[Point]) -> Reading:
        """Evaluate the loss at ``points``; a kept reading is used once instead of a new one."""
        missing = [point for point in points if point not in self._kept]
        computed = iter(parts(self.strategy(missing)) if missing else ())
        each = [self._kept.pop(point) if point in self._kept else next(computed) for point in points]
        return self._with_penalty(joined(each), points)

    def keep(self, points: Sequence[Point], reading: Reading) -> None:
        """Keep readings that the strategy in use has computed."""
        self._kept = dict(zip(points, parts(reading))) | self._kept

    def _with_penalty(self, reading: Reading, points: Sequence[Point]) -> Reading:
        if self._penalty is not None:
            steps = [point[1:] if self.strength_tensor is not None else point for point in points]
            reading = _with_each(reading, np.array([self._penalty(step) for step in steps]), self.loss.sums)
        return reading

    def use(self, strategy: Strategy) -> None:
        """Switch to ``strategy`` and drop readings of the previous one."""
        if strategy is not self.strategy:
            self.strategy.close()
            # All points of a surface come from one strategy; only the origin comes from the plain loop.
            self._kept = {point: r for point, r in self._kept.items() if point == self.origin_point}
            self.strategy = strategy

    def penalty_at_origin(self) -> float:
        """The regulariser's part of the value at the origin."""
        return self._penalty((0.0,) * len(self.directions)) if self._penalty is not None else 0.0


def _with_each(reading: Reading, penalties: np.ndarray, sums: bool) -> Reading:
    """Add the regulariser, split among the samples so that a surface without some of them keeps it whole."""
    n, d = reading.numerators, reading.denominators
    if n is not None and d is not None:
        n = n + penalties[:, None] * (np.full(n.shape[1], 1 / n.shape[1]) if sums else d)
    return replace(reading, values=reading.values + penalties, numerators=n)


class _Penalty:
    """The regulariser l2/2 |w + sum c_i d_i|^2 in closed form, a quadratic in the coefficients."""

    def __init__(self, model: nn.Module, directions: Sequence[Direction], l2: float):
        weights = {name: p.detach() for name, p in model.named_parameters()}
        self.l2, self.constant = l2, inner(weights, weights)
        self.linear = [inner(d, weights) for d in directions]
        self.square = [[inner(d, e) for e in directions] for d in directions]

    def __call__(self, point: Point) -> float:
        size = self.constant + 2 * sum(c * l for c, l in zip(point, self.linear))
        for c, row in zip(point, self.square):
            size += sum(c * e * s for e, s in zip(point, row))
        return self.l2 / 2 * size
