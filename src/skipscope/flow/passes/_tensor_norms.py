"""Norms of gradients and activations, squares summed in float64."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor


def dense(value: Tensor) -> Tensor:
    """Values of a sparse tensor, or real and imaginary parts of a complex tensor, or the tensor itself."""
    value = value.coalesce().values() if value.is_sparse else value
    return torch.view_as_real(value) if value.is_complex() else value


def is_zero(value: Tensor) -> bool:
    """Whether every element is 0; the first elements are checked first, which mostly suffices."""
    return not bool(value.flatten()[:64].any()) and not bool(value.any())


@functools.cache
def smallest_normal(dtype: torch.dtype) -> float:
    """The smallest positive normal number of a dtype."""
    return float(torch.finfo(dtype).smallest_normal)


@functools.cache
def least(dtype: torch.dtype) -> float:
    """The smallest positive (subnormal) number of a dtype."""
    return smallest_normal(dtype) * float(torch.finfo(dtype).eps)


def norm_of(value: Tensor) -> float:
    """L2 norm, without overflow or underflow within the range of float64."""
    norm = _whole_norm(value, 2)
    if is_safe(norm):
        return norm
    largest = float(value.abs().max()) if value.numel() else 0.0
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * float(torch.linalg.vector_norm(value.double() / largest))


# Squares summed in float32 before these sums are summed in float64; shortest row for this method, because the
# rounding errors of many short sums average out; and largest tensor to be summed in float64 directly. For a
# float64 sum torch converts the tensor, which takes 3 to 20 times as long as reading it.
_RUN, _LONG, _FEW = 256, 2**12, 2**16
# Range of sums of squares without significant overflow or underflow in float32.
_SQUARES = 1e-12, 1e18


def _row_norms(rows: Tensor, order: int = 2) -> Tensor:
    """L1 or L2 norm of each row, in float64: ``[R, N] -> [R]``."""

    def exact(some: Tensor) -> Tensor:
        return torch.linalg.vector_norm(some, order, dim=1, dtype=torch.float64)

    if rows.dtype == torch.float64 or rows.shape[1] < _LONG or rows.numel() < _FEW:
        return exact(rows)
    cut = rows.shape[1] // _RUN * _RUN
    runs = rows[:, :cut].unflatten(1, (-1, _RUN))
    norms = exact(torch.linalg.vector_norm(runs, order, dim=2, dtype=torch.float32))
    if cut < rows.shape[1]:
        norms = exact(torch.stack([norms, exact(rows[:, cut:])], dim=1))
    left = ~((norms > _SQUARES[0]) & (norms < _SQUARES[1]))
    if bool(left.any()):
        norms[left] = exact(rows[left])
    return norms


def _in_memory_order(value: Tensor) -> Tensor:
    """Permute the dimensions into the order of memory, so that the tensor can be read as a row."""
    if value.is_contiguous():
        return value
    return value.permute(sorted(range(value.ndim), key=value.stride, reverse=True))


def sum_of_sizes(value: Tensor) -> float:
    """L1 norm."""
    return _whole_norm(value, 1)


def _whole_norm(value: Tensor, order: int) -> float:
    if value.dtype == torch.float64 or value.numel() < _FEW:
        return float(torch.linalg.vector_norm(value, order, dtype=torch.float64))
    return float(_row_norms(_in_memory_order(value).reshape(1, -1), order))


# Bytes of a number -> integer dtype of that size, and mask of all bits except the sign.
_BITS = {8: (torch.int64, 2**63 - 1), 4: (torch.int32, 2**31 - 1), 2: (torch.int16, 2**15 - 1)}


def zeros_in(value: Tensor) -> int:
    """Number of elements that are exactly 0, of either sign.

    Bits are compared, because torch's count of floating-point numbers takes 15 times as long after a ReLU.
    """
    size = value.element_size() if value.is_floating_point() and value.numel() >= _LONG else 0
    if size in _BITS:
        dtype, mask = _BITS[size]
        value = value.view(dtype) & mask
    return value.numel() - int(torch.count_nonzero(value))


def is_safe(norm: float) -> bool:
    """Whether the squares in a norm are certainly within the range of float64."""
    return 1e-140 < norm < 1e140 or math.isnan(norm)


def sample_norms(value: Tensor, samples: int) -> np.ndarray:
    """L2 norm of each sample, ``[samples]``, or an empty array if the first dimension is not the samples."""
    if value.ndim < 2 or samples < 2 or len(value) != samples or not value.numel():
        return np.empty(0)
    order = _in_memory_order(value)
    return _row_norms((order if order.stride(0) == value.stride(0) else value).flatten(1)).cpu().numpy()


def similarity(activation: Tensor, most: int = 256) -> float | None:
    """Mean cosine between different tokens of a sample for ``[B, T, C]``, otherwise between samples."""
    if activation.ndim < 2 or not activation.is_floating_point():
        return None
    rows = activation[:8, :most] if activation.ndim == 3 else activation[:most].flatten(1).unsqueeze(0)
    n = rows.shape[1]
    if n < 2 or rows.shape[-1] < 2:
        return None
    rows = rows.float()
    norms = torch.linalg.vector_norm(rows, dim=-1)
    scale = 1 / norms.clamp_min(1e-12)
    together = torch.bmm(scale.unsqueeze(1), rows).squeeze(1)  # the sum of the unit vectors
    pairs = together.square().sum(-1) - (norms * scale).square().sum(-1)
    value = float((pairs / (n * (n - 1))).mean())
    return value if math.isfinite(value) else None
