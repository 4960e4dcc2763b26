"""Every layer reads a weighted average of all before it: Pagliardini et al. 2024 (DenseFormer, arXiv 2402.02622).

X_i = B_i(Y_{i-1}),   Y_i = sum over j <= i of a_ij X_j,   X_0 = Y_0 = x;   a_ii = 1 and the others 0 at the start

B_i are the blocks of a network, with the shortcuts that they have; at the start the network is what it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from skipscope.nn._connection import Chain


def depth_average(outputs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``sum_j weights[j] * outputs[j]``, the last first."""
    total = weights[len(outputs) - 1] * outputs[-1]
    for j in range(len(outputs) - 2, -1, -1):
        total = total + weights[j] * outputs[j]
    return total


class DepthAveraged(Chain):
    """Blocks in a row, each fed the weighted average of the input and of all outputs before.

    Args:
        blocks: B_1, B_2, ..., of one width.

    Example:
        >>> from skipscope.nn import IdentityShortcut
        >>> network = DepthAveraged(*[IdentityShortcut(nn.Linear(4, 4)) for _ in range(3)])
        >>> [tuple(weights.shape) for weights in network.weights]
        [(2,), (3,), (4,)]
    """

    kind = "scaled"
    of_blocks = True

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.weights = nn.ParameterList(torch.eye(i + 2)[-1] for i in range(len(blocks)))

    @property
    def branches(self) -> nn.ModuleList:
        """The blocks."""
        return self.blocks

    def step(self, index: int, state: list[Tensor], f: Tensor) -> tuple[list[Tensor], Tensor]:
        """``Y_i`` after ``X_i``."""
        state = [*state, f]
        return state, depth_average(state, self.weights[index])
