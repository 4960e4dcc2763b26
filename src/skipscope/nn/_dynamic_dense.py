"""Multiway dynamic dense connections: Xiao et al. 2025 (MUDDFormer, arXiv 2502.12170), section 2.

X_i = B_i(Y_{i-1}^1, ..., Y_{i-1}^C),   Y_i^c = sum over j <= i of A_ij^c(X_i) X_j,   X_0 = x, Y_0^c = x
A_i(X_i) = a_i + GELU(RMSNorm(X_i) W1) W2;   a_ii = 1, the others and W2 are 0 at the start

B_i are the blocks of a network with their own shortcuts; each of the C sums is a separate input (a
transformer's query, key, value and residual). At the start the network computes the same as without the sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipscope.nn._connection import Chain, normed


def dynamic_dense(outputs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``sum_j weights[..., j] * outputs[j]``, summed from the last to the first.

    Each output is ``[..., width]``; ``weights`` are ``[..., len(outputs)]``.

    Example:
        >>> outputs = [torch.ones(1, 2), 4 * torch.ones(1, 2)]
        >>> dynamic_dense(outputs, torch.tensor([[0.5, 0.25]]))
        tensor([[1.5000, 1.5000]])
    """
    columns = weights.unsqueeze(-2).unbind(-1)
    total = columns[-1] * outputs[-1]
    for column, output in zip(reversed(columns[:-1]), reversed(outputs[:-1]), strict=True):
        total = total + column * output
    return total


class DynamicDense(Chain):
    """A sequence of blocks; each reads C sums of x and all earlier outputs, with weights for each token.

    Args:
        blocks: B_1, B_2, ..., each called with ``ways`` tensors of one width.
        width: size of dimension ``dim``.
        ways: C, the number of inputs of a block; 4 in the paper's transformer. The output is one sum.
        dim: the dimension that holds the features.

    Example:
        >>> from skipscope.nn import IdentityShortcut
        >>> network = DynamicDense(*[IdentityShortcut(nn.Linear(4, 4)) for _ in range(3)], width=4)
        >>> [tuple(a.shape) for a in network.static]
        [(1, 2), (1, 3), (1, 4)]
    """

    kind = "gated"
    of_blocks = True

    def __init__(self, *blocks: nn.Module, width: int, ways: int = 1, dim: int = -1):
        super().__init__()
        self.blocks, self.ways, self.dim = nn.ModuleList(blocks), ways, dim
        self.static, self.inner, self.outer = nn.ParameterList(), nn.ModuleList(), nn.ModuleList()
        for i in range(len(blocks)):
            out, size = ways if i < len(blocks) - 1 else 1, i + 2
            self.static.append(torch.eye(size)[-1].repeat(out, 1))
            self.inner.append(nn.Linear(width, out * size, bias=False))
            self.outer.append(nn.Linear(out * size, out * size, bias=False))
            nn.init.zeros_(self.outer[i].weight)  # type: ignore[arg-type]

    @property
    def branches(self) -> nn.ModuleList:
        """The blocks."""
        return self.blocks

    def begin(self, x: Tensor) -> tuple[list[Tensor], Tensor | tuple[Tensor, ...]]:
        """The state ``[X_0]`` with ``X_0 = x``, and ``x`` as every input of the first block."""
        h = x.movedim(self.dim, -1)
        read = tuple(h.movedim(-1, self.dim) for _ in range(self.ways))
        return [h], read[0] if self.ways == 1 else read

    def step(
        self, index: int, state: list[Tensor], f: Tensor
    ) -> tuple[list[Tensor], Tensor | tuple[Tensor, ...]]:
        """Append ``X_i`` to the state, and return it with ``Y_i^1, ..., Y_i^C``."""
        state, static = [*state, f.movedim(self.dim, -1)], self.static[index]
        hidden = F.gelu(self.inner[index](normed(state[-1])))
        weights = static + self.outer[index](hidden).unflatten(-1, static.shape)
        read = [dynamic_dense(state, sum_weights).movedim(-1, self.dim) for sum_weights in weights.unbind(-2)]
        return state, read[0] if len(read) == 1 else tuple(read)
