"""Gated shortcuts.

highway              y = x + g (F(x) - x)                   Srivastava et al. 2015, arXiv 1505.00387
exclusive gate       y = (1 - g) x + g F(x)                 the same; He et al. 2016, 1603.05027, section 3.2
shortcut-only gate   y = (1 - g) x + F(x)                   He et al. 2016, section 3.3
                     g = sigmoid(W x + b), b < 0: all three start near the identity
variance gate        y = sqrt(1 - g^2) x + g F(x)           Muse Spark (Meta 2026; transformers, muse_spark)
                     g = sigmoid(w / t), per feature: if x and F(x) are uncorrelated and have variance 1,
                     so has y
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skipscope.nn._connection import Connection, Pointwise, along


def highway(x: Tensor, f: Tensor, gate: Tensor) -> Tensor:
    """``x + gate * (f - x)``; all of one shape.

    Example:
        >>> highway(torch.zeros(2), torch.ones(2), torch.tensor([0.0, 0.25]))
        tensor([0.0000, 0.2500])
    """
    return x + gate * (f - x)


def exclusive_gate(x: Tensor, f: Tensor, gate: Tensor) -> Tensor:
    """``(1 - gate) * x + gate * f``; all of one shape.

    Example:
        >>> exclusive_gate(torch.ones(2), torch.zeros(2), torch.tensor([0.0, 0.25]))
        tensor([1.0000, 0.7500])
    """
    return (1 - gate) * x + gate * f


def shortcut_only_gate(x: Tensor, f: Tensor, gate: Tensor) -> Tensor:
    """``(1 - gate) * x + f``; all of one shape.

    Example:
        >>> shortcut_only_gate(torch.ones(2), torch.ones(2), torch.tensor([0.0, 0.25]))
        tensor([2.0000, 1.7500])
    """
    return (1 - gate) * x + f


def variance_gate(x: Tensor, f: Tensor, gate: Tensor) -> Tensor:
    """``sqrt(1 - gate^2) * x + gate * f``, ``gate`` in (0, 1); ``1 - gate^2`` is clamped to at least 0.001.

    Example:
        >>> variance_gate(torch.ones(1), torch.ones(1), torch.tensor([0.6]))  # 0.8 x + 0.6 f
        tensor([1.4000])
    """
    return ((1 - gate) * (1 + gate)).clamp_min(1e-3).sqrt() * x + gate * f


class _Gated(Connection):
    kind = "gated"

    def __init__(self, branch: nn.Module, width: int, *, bias: float = -2.0, dim: int = -1):
        super().__init__(branch)
        self.gate = Pointwise(width, dim=dim)
        nn.init.constant_(self.gate.bias, bias)


class Highway(_Gated):
    """``x + g (F(x) - x)`` with ``g = sigmoid(W x + b)``.

    Args:
        branch: F; one layer in the paper.
        width: size of dimension ``dim``, which F keeps.
        bias: initial value of b; -1 to -10 in the paper, lower for deeper networks.
        dim: the dimension that holds the features.

    Example:
        >>> x = torch.ones(3, 4)
        >>> torch.allclose(Highway(nn.Linear(4, 4), 4, bias=-30.0)(x), x)  # the gate is shut: x as it was
        True
    """

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``x + g (f - x)``."""
        return highway(x, f, torch.sigmoid(self.gate(x)))


class ExclusiveGate(_Gated):
    """``(1 - g) x + g F(x)``; arguments as for :class:`Highway`.

    Example:
        >>> x = torch.randn(3, 4)
        >>> torch.allclose(ExclusiveGate(nn.Identity(), 4)(x), x, atol=1e-6)  # (1 - g) x + g x
        True
    """

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``(1 - g) x + g f``."""
        return exclusive_gate(x, f, torch.sigmoid(self.gate(x)))


class ShortcutOnlyGate(_Gated):
    """``(1 - g) x + F(x)``; arguments as for :class:`Highway`. He et al.: it needs b as low as -6.

    Example:
        >>> x, branch = torch.ones(3, 4), nn.Linear(4, 4)
        >>> torch.allclose(ShortcutOnlyGate(branch, 4, bias=-30.0)(x), x + branch(x))  # g = 0
        True
    """

    def __init__(self, branch: nn.Module, width: int, *, bias: float = -6.0, dim: int = -1):
        super().__init__(branch, width, bias=bias, dim=dim)

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``(1 - g) x + f``."""
        return shortcut_only_gate(x, f, torch.sigmoid(self.gate(x)))


class VarianceGate(Connection):
    """``sqrt(1 - g^2) x + g F(x)`` with ``g = sigmoid(w / t)``, the same for all data.

    Args:
        branch: F.
        width: size of dimension ``dim``.
        init: initial value of every element of w; 0 gives g = 1/2.
        temperature: t; a smaller t makes the gate learn faster.
        dim: the dimension that holds the features.

    Example:
        >>> VarianceGate(nn.Identity(), 2)(torch.ones(2)).detach()  # g = 1/2: sqrt(3)/2 + 1/2
        tensor([1.3660, 1.3660])
    """

    kind = "scaled"

    def __init__(
        self, branch: nn.Module, width: int, *, init: float = 0.0, temperature: float = 0.3, dim: int = -1
    ):
        super().__init__(branch)
        self.gate = nn.Parameter(torch.full((width,), init))
        self.temperature, self.dim = temperature, dim

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``sqrt(1 - g^2) x + g f``."""
        return variance_gate(x, f, along(torch.sigmoid(self.gate / self.temperature), x, self.dim))
