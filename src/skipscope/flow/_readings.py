"""What was read of gradients, activations and weights, added up over batches in Python's float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skipscope._ranks import whole

if TYPE_CHECKING:
    from skipscope.flow._site_readings import CallGraph, PoolReading, SiteReading


@dataclass
class Reading:
    """What was read of one tensor over all batches: of a gradient, or of an activation."""

    norm: float = 0.0
    elements: int = 0
    zeros: int = 0
    lost: int = 0  # elements that training, with its own scale of the loss, would flush to zero
    finite: bool = True
    seen: bool = False
    dtype: torch.dtype | None = None

    def add(self, value: Tensor, unit: float = 1.0, training_unit: float = 1.0) -> None:
        """Take in a tensor.

        Args:
            value: any shape, dense or sparse.
            unit: what one unit of it is worth in what is reported.
            training_unit: what one unit of it is worth in training, scaled as the user's GradScaler scales.
        """
        value = dense(value.detach())
        self.seen, self.dtype = True, value.dtype
        self.elements += value.numel()
        if not value.numel():
            return
        norm = norm_of(value)
        self.finite = self.finite and math.isfinite(norm)
        self.norm = math.hypot(self.norm, norm * unit)
        self.zeros += value.numel() - int(torch.count_nonzero(value))
        floor = (
            0.5 * least(value.dtype) / training_unit if training_unit else 0.0
        )  # below, it is rounded to 0
        if floor > float(torch.finfo(value.dtype).tiny):
            self.lost += int(((value.abs() < floor) & (value != 0)).sum())

    @property
    def rms(self) -> float:
        """Root mean square."""
        return self.norm / math.sqrt(self.elements) if self.elements else 0.0

    @property
    def all_zero(self) -> bool:
        """Something arrived, and it was nothing."""
        return self.seen and self.elements > 0 and self.norm == 0


@dataclass
class WeightReading:
    """The gradient of one weight: its sum over batches, and its RMS in each."""

    trainable: bool
    total: Tensor | None = None  # under FSDP2 this rank's shard: all of them at once would not fit
    unit: float = 1.0  # what one unit of ``total`` is worth
    rms: list[float] = field(default_factory=list)

    def add(self, gradient: Tensor, unit: float, share: float) -> None:
        """Take in one batch's gradient; ``unit``: what one unit of it is worth; ``share``: the batch's in the mean."""
        gradient = gradient.detach()
        gradient = dense(gradient.to_dense() if gradient.is_sparse else gradient)
        self.rms.append(norm_of(whole(gradient)) * unit / math.sqrt(max(1, gradient.numel())))
        if self.total is None:
            self.total, self.unit = gradient, unit * share
        elif unit * share:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            self.total = self.total.to(wide) + gradient.to(wide) * (unit * share / self.unit)


@dataclass
class Readings:
    """Everything one measurement read, boundary by boundary and weight by weight."""

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
    graph: CallGraph | None = None  # of the first batch
    # By boundary, of the first batch: the call that gave it, and the model's inputs it was computed from, as bits.
    calls: dict[int, tuple[int, int]] = field(default_factory=dict)
    cuts: list[tuple[int, str]] = field(default_factory=list)
    moving: set[str] = field(
        default_factory=set
    )  # parameters that are exactly 0 and get a gradient that is not


def merge(total: Reading, one: Reading) -> None:
    """Add one batch's reading to the total."""
    total.norm = math.hypot(total.norm, one.norm)
    total.elements += one.elements
    total.zeros += one.zeros
    total.lost += one.lost
    total.finite = total.finite and one.finite
    total.seen = total.seen or one.seen
    total.dtype = one.dtype or total.dtype


def dense(value: Tensor) -> Tensor:
    """The values of a sparse tensor, real and imaginary parts of a complex one, any other as it is."""
    value = value.coalesce().values() if value.is_sparse else value
    return torch.view_as_real(value) if value.is_complex() else value


def least(dtype: torch.dtype) -> float:
    """The smallest number above zero that it holds."""
    info = torch.finfo(dtype)
    return float(info.smallest_normal) * float(info.eps)


def norm_of(value: Tensor) -> float:
    """The L2 norm, squares summed in float64, right as far as float64's own range goes."""
    norm = float(torch.linalg.vector_norm(value, dtype=torch.float64))
    if 1e-140 < norm < 1e140 or math.isnan(norm):
        return norm
    largest = float(value.abs().max()) if value.numel() else 0.0
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * float(torch.linalg.vector_norm(value.double() / largest))


def similarity(activation: Tensor, most: int = 256) -> float | None:
    """Mean cosine between different tokens of a sample ``[B, T, C]``, else between different samples."""
    if activation.ndim < 2 or not activation.is_floating_point():
        return None
    rows = activation[:8, :most] if activation.ndim == 3 else activation[:most].flatten(1).unsqueeze(0)
    n = rows.shape[1]
    if n < 2 or rows.shape[-1] < 2:
        return None
    unit = torch.nn.functional.normalize(rows.float(), dim=-1)
    pairs = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))
    value = float((pairs / (n * (n - 1))).mean())
    return value if math.isfinite(value) else None
