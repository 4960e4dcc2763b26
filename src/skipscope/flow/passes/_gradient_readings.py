"""Readings of gradients, activations and weights, summed over batches in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from skipscope._ranks import whole
from skipscope.flow.passes._gradient_sites import CallGraph, PoolReading, SiteReading, Term
from skipscope.flow.passes._tensor_norms import (
    dense,
    is_safe,
    least,
    norm_of,
    sample_norms,
    smallest_normal,
    zeros_in,
)


@dataclass
class Reading:
    """Readings of a gradient or an activation over all batches.

    Attributes:
        norm: L2 norm.
        relative: L2 norm of the elementwise product of gradient and activation, which does not depend on the
            scale of a norm layer, nor on positions where the activation is 0 (blank patches, padding).
        elements: number of elements.
        zeros: number of elements of a gradient that are 0.
        lost: number of elements that would be flushed to zero in training, with its loss scale.
        samples: log10 of the norm of each sample; empty if not known.
    """

    norm: float = 0.0
    elements: int = 0
    zeros: int = 0
    lost: int = 0
    relative: float = 0.0
    finite: bool = True
    seen: bool = False
    dtype: torch.dtype | None = None
    samples: list[float] = field(default_factory=list)

    def add(self, value: Tensor, unit: float = 1.0, training_unit: float = 1.0, samples: int = 0) -> None:
        """Add a tensor.

        Args:
            value: tensor of any shape, dense or sparse.
            unit: factor from its units to reported units.
            training_unit: factor from its units to those of training with the user's GradScaler.
            samples: number of samples of the batch for a gradient; 0 for an activation, whose zeros are not
                counted.
        """
        value = dense(value.detach())
        self.seen, self.dtype = True, value.dtype
        self.elements += value.numel()
        if not value.numel():
            return
        by_sample = sample_norms(value, samples if unit > 0 else 0)
        norm = math.sqrt(by_sample @ by_sample)
        norm = norm if is_safe(norm) else norm_of(value)
        self.finite = self.finite and math.isfinite(norm)
        self.norm = math.hypot(self.norm, norm * unit)
        if samples:
            self.zeros += zeros_in(value)
        if len(by_sample):
            with np.errstate(divide="ignore"):  # of 0 it is minus infinity
                self.samples += (np.log10(by_sample) + math.log10(unit)).tolist()
        # Smaller values would be rounded to 0.
        floor = 0.5 * least(value.dtype) / training_unit if training_unit else 0.0
        if floor > smallest_normal(value.dtype):
            self.lost += int(((value.abs() < floor) & (value != 0)).sum())

    def merge(self, other: Reading) -> None:
        """Add another batch's reading."""
        self.norm = math.hypot(self.norm, other.norm)
        self.elements += other.elements
        self.zeros += other.zeros
        self.relative = math.hypot(self.relative, other.relative)
        self.lost += other.lost
        self.finite = self.finite and other.finite
        self.seen = self.seen or other.seen
        self.dtype = other.dtype or self.dtype
        self.samples += other.samples

    @property
    def rms(self) -> float:
        """Root mean square."""
        return self.norm / math.sqrt(self.elements) if self.elements else 0.0

    @property
    def all_zero(self) -> bool:
        """Whether a tensor arrived and all its elements were 0."""
        return self.seen and self.elements > 0 and self.norm == 0


@dataclass
class WeightReading:
    """Gradient of a weight: its sum over batches, and its RMS in each batch."""

    trainable: bool
    total: Tensor | None = None  # under FSDP2 this rank's shard: all of them at once would not fit
    unit: float = 1.0  # what one unit of ``total`` is worth
    rms: list[float] = field(default_factory=list)
    _norm: float = 0.0  # of the last batch's gradient

    def add(self, gradient: Tensor, unit: float, share: float) -> None:
        """Add the gradient of a batch, times ``unit``, with its ``share`` in the mean over batches."""
        gradient = gradient.detach()
        gradient = dense(gradient.to_dense() if gradient.is_sparse else gradient)
        self._norm = norm_of(whole(gradient))
        self.rms.append(self._norm * unit / math.sqrt(max(1, gradient.numel())))
        self._sum(gradient, unit * share)

    def norm(self, total: Tensor) -> float:
        """L2 norm of ``total``, which is cached for a single batch."""
        return self._norm if len(self.rms) == 1 else norm_of(total)

    def merge(self, other: WeightReading) -> None:
        """Add another batch's reading."""
        self.rms += other.rms
        self._norm = other._norm
        if other.total is not None:
            self._sum(other.total, other.unit)

    def _sum(self, gradient: Tensor, unit: float) -> None:
        if self.total is None:
            self.total, self.unit = gradient, unit
        elif unit:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            self.total = self.total.to(wide) + gradient.to(wide) * (unit / self.unit)


@dataclass
class Readings:
    """All readings of a measurement, by boundary and by weight.

    Attributes:
        gradients: readings of gradients by boundary.
        activations: readings of activations by boundary.
        similarities: similarity of samples by boundary, for the first batch.
        weights: name -> reading, for parameters with at least two dimensions.
        output_gradient: |dL/d(output)|.
        loss, batches, samples: loss, number of batches and number of samples.
        sites, pools: weighted calls and pooling calls, in order of execution.
        graph: call graph of the first batch; None if nothing was recorded.
        calls: boundary -> index of the call that produced it in the first batch (-1 for an input), and bits
            of the model's inputs upstream of it.
        cuts: calls of the first batch that let no gradient through.
        opaque: names of opaque calls of the first batch.
        hidden: outputs of opaque calls of the first batch, in order of execution.
        single: calls that produced queries and keys of attention over a single position, in every batch.
        terms: terms of the loss in the first batch; empty if there is only one.
        normed: whether there are norm layers over the data between the weights, in the first batch.
        squashed: whether an activation function follows the last weights, in the first batch.
        moving: parameters that are exactly 0 and have a non-zero gradient.
    """

    gradients: list[Reading]
    activations: list[Reading]
    similarities: list[float | None]
    weights: dict[str, WeightReading]
    output_gradient: float = 0.0
    loss: float = 0.0
    batches: int = 0
    samples: int = 0
    sites: list[SiteReading] = field(default_factory=list)
    pools: list[PoolReading] = field(default_factory=list)
    graph: CallGraph | None = None
    calls: dict[int, tuple[int, int]] = field(default_factory=dict)
    cuts: list[tuple[int, str]] = field(default_factory=list)
    opaque: list[str] = field(default_factory=list)
    hidden: list[SiteReading] = field(default_factory=list)
    single: list[int] = field(default_factory=list)
    terms: tuple[Term, ...] = ()
    normed: bool = False
    squashed: bool = False
    moving: set[str] = field(default_factory=set)

    @classmethod
    def empty(cls, boundaries: int, trainable: dict[str, bool]) -> Readings:
        """Make empty readings; ``trainable`` maps the names of the weights."""
        return cls(
            [Reading() for _ in range(boundaries)],
            [Reading() for _ in range(boundaries)],
            [None] * boundaries,
            {name: WeightReading(trained) for name, trained in trainable.items()},
        )

    def merge(self, other: Readings) -> None:
        """Add another batch's readings."""
        first = self.batches == 0
        for mine, theirs in ((self.gradients, other.gradients), (self.activations, other.activations)):
            for one, more in zip(mine, theirs):
                one.merge(more)
        for name, weight in other.weights.items():
            self.weights[name].merge(weight)
        self.moving |= other.moving
        self.loss += other.loss
        self.output_gradient = math.hypot(self.output_gradient, other.output_gradient)
        self.batches += other.batches
        self.samples += other.samples
        if first:
            self.similarities = other.similarities
            self.sites, self.pools, self.graph, self.calls = (
                other.sites,
                other.pools,
                other.graph,
                other.calls,
            )
            self.cuts, self.opaque, self.terms = other.cuts, other.opaque, other.terms
            self.hidden, self.single = other.hidden, other.single
            self.normed, self.squashed = other.normed, other.squashed
            return
        # Calls of another batch may have other indices. If that batch has such calls, the first batch's are
        # kept.
        self.single = self.single if other.single else []
        known = {(site.weights, site.step): site for site in self.sites}
        for site in other.sites:
            if (mine_ := known.get((site.weights, site.step))) is not None:
                mine_.merge(site)
            else:
                site.order = -1  # the graph is the first batch's
                self.sites.append(site)
        for pool, more in zip(self.pools, other.pools):
            pool.into, pool.out = math.hypot(pool.into, more.into), math.hypot(pool.out, more.out)
