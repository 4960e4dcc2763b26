"""Mean field theory of wide random tanh networks: what Schoenholz 2017 and Yang & Schoenholz 2017 predict.

A layer is tanh(W x + b), the weights of variance s_w / width, the biases of variance s_b.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import nn

# The normal distribution on an even grid: Gauss-Hermite points are too sparse where tanh is steep.
_POINTS = np.linspace(-8, 8, 4001)
_WEIGHTS = np.exp(-(_POINTS**2) / 2)
_WEIGHTS /= _WEIGHTS.sum()


def initialise_(model: nn.Module, weight_variance: float, bias_variance: float) -> nn.Module:
    """Draw the hidden layers of a `deep_mlp` as the theory has it."""
    for layer in model.get_submodule("layers").modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=math.sqrt(weight_variance / layer.in_features))
            nn.init.normal_(layer.bias, std=math.sqrt(bias_variance))
    return model


def mean_square(q: float) -> float:
    """E[tanh(sqrt(q) z)^2]."""
    return float(_WEIGHTS @ np.tanh(math.sqrt(q) * _POINTS) ** 2)


def mean_square_slope(q: float) -> float:
    """E[tanh'(sqrt(q) z)^2]."""
    return float(_WEIGHTS @ (1 - np.tanh(math.sqrt(q) * _POINTS) ** 2) ** 2)


@functools.cache
def fixed_variance(weight_variance: float, bias_variance: float) -> float:
    """The variance q* of the pre-activations that a deep plain network comes to."""
    q = 1.0
    for _ in range(10_000):
        before, q = q, weight_variance * mean_square(q) + bias_variance
        if abs(q - before) < 1e-13:
            break
    return q


def chi(weight_variance: float, bias_variance: float) -> float:
    """chi_1: the factor on the squared gradient at each layer of a plain network; 1 at the edge of chaos."""
    return weight_variance * mean_square_slope(fixed_variance(weight_variance, bias_variance))


@functools.cache
def correlation_scale(weight_variance: float, bias_variance: float) -> float:
    """xi_c: over so many layers the correlation of two inputs comes e-fold closer to its fixed point."""
    q = fixed_variance(weight_variance, bias_variance)
    coarse = slice(None, None, 20)
    first, second = np.meshgrid(_POINTS[coarse], _POINTS[coarse], indexing="ij")
    weights = np.outer(_WEIGHTS[coarse], _WEIGHTS[coarse])
    weights /= weights.sum()

    def both(c: float) -> tuple[np.ndarray, np.ndarray]:
        return np.tanh(math.sqrt(q) * first), np.tanh(
            math.sqrt(q) * (c * first + math.sqrt(max(1 - c * c, 0.0)) * second)
        )

    c = 0.5
    for _ in range(5000):
        a, b = both(c)
        before, c = c, float((weight_variance * (weights * a * b).sum() + bias_variance) / q)
        if abs(c - before) < 1e-12:
            break
    a, b = both(min(c, 1.0))
    slope = float(weight_variance * (weights * (1 - a**2) * (1 - b**2)).sum())
    return math.inf if slope >= 1 else -1 / math.log(slope)


@functools.cache
def critical_weight_variance(bias_variance: float) -> float:
    """The weight variance at which chi_1 is 1."""
    low, high = 0.5, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if chi(middle, bias_variance) < 1 else (low, middle)
    return low


def residual_gains(weight_variance: float, bias_variance: float, depth: int, start: float) -> np.ndarray:
    """The factor on the squared gradient at each layer of ``x + tanh(W x + b)``, from the first one on."""
    p, found = start, []
    for _ in range(depth):
        q = weight_variance * p + bias_variance
        found.append(1 + weight_variance * mean_square_slope(q))
        p += mean_square(q)
    return np.array(found)


def hidden_gradients(flow: object) -> list[float]:
    """The gradient's RMS at the input and after each hidden layer, from a `ss.gradient_flow` of a `deep_mlp`."""
    boundaries = [b for b in flow.boundaries if b.kind == "input" or b.name.startswith("layers")]  # type: ignore[attr-defined]
    return [float("nan") if b.gradient_rms is None else b.gradient_rms for b in boundaries]


def normal_batch(samples: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of unit variance, and classes."""
    return torch.randn(samples, width), torch.arange(samples) % 10
