"""Learned augmented residual layers: Menghani, Kumar and Kumar 2024 (LAuReL, arXiv 2411.07501).

RW   y = a F(x) + b x            two learned scalars, here 1 at the start
LR   y = F(x) + x + W2 W1 x      W2 W1 of low rank; here W2 = 0 at the start
PA   x_{i+1} = F_i(x_i) + x_i + W2 W1 (c_0 x_i + c_1 x_{i-1} + ...)   over k inputs; here c = 1/k at the start
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skipscope.nn._connection import Chain, Connection
from skipscope.nn._depth import depth_average


def laurel_weights(x: Tensor, f: Tensor, weights: Tensor) -> Tensor:
    """``a f + b x`` with ``weights`` a and b.

    Example:
        >>> laurel_weights(torch.ones(2), torch.ones(2), torch.tensor([2.0, 0.5]))
        tensor([2.5000, 2.5000])
    """
    return weights[0] * f + weights[1] * x


def laurel_low_rank(
    x: Tensor, f: Tensor, down: Tensor, up: Tensor, dim: int = -1, mapped: Tensor | None = None
) -> Tensor:
    """``f + (x + up down mapped)`` with ``down [rank, width]`` and ``up [width, rank]``.

    ``mapped`` is ``x`` by default.

    Example:
        >>> x, down, up = torch.ones(2), torch.ones(1, 2), torch.ones(2, 1)
        >>> laurel_low_rank(x, torch.zeros(2), down, up)  # 0 + 1 + (1 + 1)
        tensor([3., 3.])
    """
    rows = (x if mapped is None else mapped).movedim(dim, -1)
    return f + (x + (rows @ down.T @ up.T).movedim(-1, dim))


class LaurelWeights(Connection):
    """``a F(x) + b x``.

    Args:
        branch: F.

    Example:
        >>> LaurelWeights(nn.Identity())(torch.ones(2)).detach()  # a = b = 1 at the start
        tensor([2., 2.])
    """

    kind = "scaled"

    def __init__(self, branch: nn.Module):
        super().__init__(branch)
        self.weights = nn.Parameter(torch.ones(2))

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``a f + b x``."""
        return laurel_weights(x, f, self.weights)


class LaurelLowRank(Connection):
    """``F(x) + x + W2 W1 x``: a shortcut with a learned low-rank term.

    Args:
        branch: F.
        width: size of dimension ``dim``.
        rank: rank of W2 W1.
        dim: the dimension that holds the features.

    Example:
        >>> connection = LaurelLowRank(nn.Linear(8, 8), 8, rank=2)
        >>> connection.down.shape, connection.up.abs().max().item()  # W2 = 0: as x + F(x)
        (torch.Size([2, 8]), 0.0)
    """

    def __init__(self, branch: nn.Module, width: int, *, rank: int = 4, dim: int = -1):
        super().__init__(branch)
        self.down = nn.Parameter(torch.randn(rank, width) / width**0.5)
        self.up = nn.Parameter(torch.zeros(width, rank))
        self.dim = dim

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``f + x + W2 W1 x``."""
        return laurel_low_rank(x, f, self.down, self.up, self.dim)


class LaurelPrevious(Chain):
    """``F_i(x_i) + x_i + W2 W1 (c_0 x_i + c_1 x_{i-1} + ...)``: the shortcut reads the last few inputs.

    Args:
        branches: F_1, F_2, ..., of one width.
        width: size of dimension ``dim``.
        rank: rank of W2 W1.
        previous: k, the largest number of inputs that it reads.
        dim: the dimension that holds the features.

    Example:
        >>> chain = LaurelPrevious(*[nn.Linear(4, 4) for _ in range(4)], width=4, previous=3)
        >>> [len(weights) for weights in chain.weights]
        [1, 2, 3, 3]
    """

    def __init__(self, *branches: nn.Module, width: int, rank: int = 4, previous: int = 3, dim: int = -1):
        super().__init__()
        self.branches, self.dim = nn.ModuleList(branches), dim
        counts = [min(i + 1, previous) for i in range(len(branches))]
        self.weights = nn.ParameterList(torch.full((count,), 1 / count) for count in counts)
        self.down = nn.ParameterList(torch.randn(rank, width) / width**0.5 for _ in branches)
        self.up = nn.ParameterList(torch.zeros(width, rank) for _ in branches)

    def step(self, index: int, state: list[Tensor], f: Tensor) -> tuple[list[Tensor], Tensor]:
        """The state ``[x_0, ..., x_{i+1}]``, and ``x_{i+1}``."""
        weights, x = self.weights[index], state[-1]
        mapped = depth_average(state[-len(weights) :][::-1], weights)
        y = laurel_low_rank(x, f, self.down[index], self.up[index], self.dim, mapped)
        return [*state, y], y
