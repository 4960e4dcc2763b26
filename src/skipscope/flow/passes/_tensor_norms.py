"""Norms of gradients and activations, squares summed in float64."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor


def dense(value: Tensor) -> Tensor:
    """The values of a sparse tensor, real and imaginary parts of a complex one, any other as it is."""
    value = value.coalesce().values() if value.is_sparse else value
    return torch.view_as_real(value) if value.is_complex() else value


def is_zero(value: Tensor) -> bool:
    """Whether every element is 0; most tensors are known by their first ones."""
    return not bool(value.flatten()[:64].any()) and not bool(value.any())


@functools.cache
def smallest_normal(dtype: torch.dtype) -> float:
    """The smallest number that a dtype holds to its full precision."""
    return float(torch.finfo(dtype).smallest_normal)


@functools.cache
def least(dtype: torch.dtype) -> float:
    """The smallest number above zero that a dtype holds."""
    return smallest_normal(dtype) * float(torch.finfo(dtype).eps)


def norm_of(value: Tensor) -> float:
    """The L2 norm, right as far as float64's own range goes."""
    norm = float(torch.linalg.vector_norm(value, dtype=torch.float64))
    if is_safe(norm):
        return norm
    largest = float(value.abs().max()) if value.numel() else 0.0
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * float(torch.linalg.vector_norm(value.double() / largest))


def rough_norm(value: Tensor) -> float:
    """The L2 norm to the precision of float32, six times as fast for a large weight."""
    if value.ndim < 2 or not value.numel():
        return norm_of(value) if value.numel() else 0.0
    wide = torch.promote_types(value.dtype, torch.float32)
    norm = float(torch.linalg.vector_norm(value.flatten(1), dim=1, dtype=wide).double().norm())
    return norm if is_safe(norm) and norm < 1e18 and norm > 1e-18 else norm_of(value)


def is_safe(norm: float) -> bool:
    """Whether no square in a norm can have left float64's range."""
    return 1e-140 < norm < 1e140 or math.isnan(norm)


def sample_norms(value: Tensor, samples: int) -> np.ndarray:
    """L2 norm of each sample's part, ``[samples]``; ``[0]`` where the first dimension is not the samples'."""
    if value.ndim < 2 or samples < 2 or len(value) != samples or not value.numel():
        return np.empty(0)
    return torch.linalg.vector_norm(value.flatten(1), dim=1, dtype=torch.float64).cpu().numpy()


def similarity(activation: Tensor, most: int = 256) -> float | None:
    """Mean cosine between different tokens of a sample ``[B, T, C]``, else between different samples."""
    if activation.ndim < 2 or not activation.is_floating_point():
        return None
    rows = activation[:8, :most] if activation.ndim == 3 else activation[:most].flatten(1).unsqueeze(0)
    n = rows.shape[1]
    if n < 2 or rows.shape[-1] < 2:
        return None
    rows = rows.float()
    unit = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min_(1e-12)
    pairs = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))
    value = float((pairs / (n * (n - 1))).mean())
    return value if math.isfinite(value) else None
