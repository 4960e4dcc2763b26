"""Layers that read weighted sums of earlier activations; the weights are learned and static.

DenseFormer      X_i = B_i(Y_{i-1}),   Y_i = sum of a_ij X_j over the j <= i with j = i mod dilation, for
                 every i that is a multiple of the period, Y_i = X_i for the others;   X_0 = Y_0 = x
                 Pagliardini et al. 2024, arXiv 2402.02622;   a_ii = 1 and the others 0 at the start
stream scalars   x_{i+1} = a_i x_i + b_i F_i(x_i) + c_i x_0;   a = b = 1, c = 0 at the start
                 Jordan et al. 2024, github.com/KellerJordan/modded-nanogpt; Karpathy 2025,
                 github.com/karpathy/nanochat

B_i are the blocks of a network with their own shortcuts. At the start the network computes the same as
without the averages or scalars.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from skipscope.nn._connection import Chain


def depth_average(outputs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``sum_j weights[j] * outputs[j]``, summed from the last to the first.

    Example:
        >>> depth_average([torch.ones(2), 4 * torch.ones(2)], torch.tensor([0.5, 0.25]))
        tensor([1.5000, 1.5000])
    """
    total = weights[len(outputs) - 1] * outputs[-1]
    for j in range(len(outputs) - 2, -1, -1):
        total = total + weights[j] * outputs[j]
    return total


class DepthAveraged(Chain):
    """A sequence of blocks; a block's input is a weighted average of x and earlier outputs.

    Args:
        blocks: B_1, B_2, ..., of one width.
        dilation: step between the outputs in an average; 1 averages over all of them.
        period: number of blocks between averages; 1 averages after every block.

    Example:
        >>> from skipscope.nn import IdentityShortcut
        >>> network = DepthAveraged(*[IdentityShortcut(nn.Linear(4, 4)) for _ in range(3)])
        >>> [tuple(weights.shape) for weights in network.weights]
        [(2,), (3,), (4,)]
    """

    kind = "scaled"
    of_blocks = True

    def __init__(self, *blocks: nn.Module, dilation: int = 1, period: int = 1):
        super().__init__()
        self.blocks, self.dilation, self.period = nn.ModuleList(blocks), dilation, period
        averaged = range(period, len(blocks) + 1, period)
        self.weights = nn.ParameterList(torch.eye(i // dilation + 1)[-1] for i in averaged)

    @property
    def branches(self) -> nn.ModuleList:
        """The blocks."""
        return self.blocks

    def step(self, index: int, state: list[Tensor], f: Tensor) -> tuple[list[Tensor], Tensor]:
        """Append ``X_i`` to the state, and return it with ``Y_i``."""
        state, i = [*state, f], index + 1
        if i % self.period:
            return state, f
        return state, depth_average(
            state[i % self.dilation :: self.dilation], self.weights[i // self.period - 1]
        )


def stream_scalars(x: Tensor, f: Tensor, first: Tensor, weights: Tensor) -> Tensor:
    """``a x + b f + c first`` with ``weights`` a, b and c.

    Example:
        >>> x, f, first = torch.ones(2), torch.ones(2), 4 * torch.ones(2)
        >>> stream_scalars(x, f, first, torch.tensor([1.0, 1.0, 0.5]))
        tensor([4., 4.])
    """
    return weights[0] * x + weights[1] * f + weights[2] * first


class StreamScalars(Chain):
    """``a x + b F(x) + c x_0``: three learned scalars per layer, with the network's input x_0 in each.

    Args:
        branches: F_1, F_2, ..., of one width.

    Example:
        >>> StreamScalars(nn.Linear(4, 4), nn.Linear(4, 4)).weights.tolist()
        [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]
    """

    kind = "scaled"

    def __init__(self, *branches: nn.Module):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.weights = nn.Parameter(torch.tensor([[1.0, 1.0, 0.0]]).repeat(len(branches), 1))

    def begin(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The state ``(x_0, x_i)``, initially twice ``x``, and the first branch's input."""
        return (x, x), x

    def step(
        self, index: int, state: tuple[Tensor, Tensor], f: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The state ``(x_0, x_{i+1})``, and ``x_{i+1}``."""
        first, x = state
        x = stream_scalars(x, f, first, self.weights[index])
        return (first, x), x
