"""Gated shortcuts: Srivastava et al. 2015 (arXiv 1505.00387); He et al. 2016 (1603.05027), section 3.2.

g = sigmoid(W x + b)
highway              y = x + g (F(x) - x)          b < 0: it starts near the identity
exclusive gate       y = (1 - g) x + g F(x)        the same, as He et al. write it
shortcut-only gate   y = (1 - g) x + F(x)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skipscope.nn._connection import Connection, Pointwise


def highway(x: Tensor, f: Tensor, gate: Tensor) -> Tensor:
    """``x + gate * (f - x)``; all of one shape."""
    return x + gate * (f - x)


def exclusive_gate(x: Tensor, f: Tensor, gate: Tensor) -> Tensor:
    """``(1 - gate) * x + gate * f``; all of one shape."""
    return (1 - gate) * x + gate * f


def shortcut_only_gate(x: Tensor, f: Tensor, gate: Tensor) -> Tensor:
    """``(1 - gate) * x + f``; all of one shape."""
    return (1 - gate) * x + f


class _Gated(Connection):
    kind = "gated"

    def __init__(self, branch: nn.Module, width: int, *, bias: float = -2.0, dim: int = -1):
        super().__init__(branch)
        self.gate = Pointwise(width, dim=dim)
        nn.init.constant_(self.gate.bias, bias)


class Highway(_Gated):
    """``x + g (F(x) - x)`` with ``g = sigmoid(W x + b)``.

    Args:
        branch: F; the paper's is one layer.
        width: size of dimension ``dim``, which F keeps.
        bias: where b starts; the paper takes -1 to -10, the deeper the network the lower.
        dim: the dimension that holds the features.
    """

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``x + g (f - x)``."""
        return highway(x, f, torch.sigmoid(self.gate(x)))


class ExclusiveGate(_Gated):
    """``(1 - g) x + g F(x)``; arguments as for :class:`Highway`."""

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``(1 - g) x + g f``."""
        return exclusive_gate(x, f, torch.sigmoid(self.gate(x)))


class ShortcutOnlyGate(_Gated):
    """``(1 - g) x + F(x)``; arguments as for :class:`Highway`. He et al.: it needs b as low as -6."""

    def __init__(self, branch: nn.Module, width: int, *, bias: float = -6.0, dim: int = -1):
        super().__init__(branch, width, bias=bias, dim=dim)

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``(1 - g) x + f``."""
        return shortcut_only_gate(x, f, torch.sigmoid(self.gate(x)))
