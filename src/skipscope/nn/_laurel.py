"""Learned augmented residual layers: Menghani, Kumar and Kumar 2024 (LAuReL, arXiv 2411.07501).

RW   y = a F(x) + b x            two learned numbers, here 1 at first
LR   y = F(x) + x + W2 W1 x      W1 to a small rank, W2 back; here W2 = 0 at first
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skipscope.nn._connection import Connection


def laurel_weights(x: Tensor, f: Tensor, weights: Tensor) -> Tensor:
    """``a f + b x`` with ``weights`` a and b."""
    return weights[0] * f + weights[1] * x


def laurel_low_rank(x: Tensor, f: Tensor, down: Tensor, up: Tensor, dim: int = -1) -> Tensor:
    """``f + (x + up down x)``: ``down [rank, width]``, ``up [width, rank]``, features in dimension ``dim``."""
    rows = x.movedim(dim, -1)
    return f + (x + (rows @ down.T @ up.T).movedim(-1, dim))


class LaurelWeights(Connection):
    """``a F(x) + b x``.

    Args:
        branch: F.
    """

    kind = "scaled"

    def __init__(self, branch: nn.Module):
        super().__init__(branch)
        self.weights = nn.Parameter(torch.ones(2))

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``a f + b x``."""
        return laurel_weights(x, f, self.weights)


class LaurelLowRank(Connection):
    """``F(x) + x + W2 W1 x``: the shortcut learns a little of its own.

    Args:
        branch: F.
        width: size of dimension ``dim``.
        rank: of the learned part.
        dim: the dimension that holds the features.
    """

    def __init__(self, branch: nn.Module, width: int, *, rank: int = 4, dim: int = -1):
        super().__init__(branch)
        self.down = nn.Parameter(torch.randn(rank, width) / width**0.5)
        self.up = nn.Parameter(torch.zeros(width, rank))
        self.dim = dim

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``f + x + W2 W1 x``."""
        return laurel_low_rank(x, f, self.down, self.up, self.dim)
