"""Layers that attend over the outputs of all before them.

Attention residuals   h_l = sum over i < l of a_il v_i,   v_0 = x, v_l = F_l(h_l)
                      Kimi Team 2026, arXiv 2603.15031
block                 the v_i are sums of F over blocks of neighbouring layers (those before l, in l's
                      own block); the same paper: about 8 blocks
delta                 h_l = s_l + sum over i < l of a_il v_i,   s_l = v_0 + ... + v_(l-1)
                      the output is s_(L+1); Luo, Cai and Hu 2026, arXiv 2605.18855

a_il = softmax_i(w_l . RMSNorm(v_i)); w_l is one learned vector a layer, zero at the start: then a mean is
read. In the first two a last query reads the network's output; in delta the plain sum s is kept, and h_1 = x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from skipscope.nn._connection import Chain, normed


def depth_attention(outputs: Sequence[Tensor], query: Tensor) -> Tensor:
    """``sum_i softmax_i(query . RMSNorm(v_i)) v_i`` of outputs ``[..., width]``; ``query [width]``.

    Example:
        >>> x, f = torch.ones(2, 4), torch.zeros(2, 4)
        >>> depth_attention([x, f], torch.zeros(4))[0]
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    scores = torch.stack([normed(v) @ query for v in outputs], -1)
    weights = scores.softmax(-1).unsqueeze(-2).unbind(-1)
    total = weights[0] * outputs[0]
    for weight, v in zip(weights[1:], outputs[1:], strict=True):
        total = total + weight * v
    return total


class DepthAttention(Chain):
    """Branches whose inputs, and the output, attend over ``x`` and all branches before.

    Args:
        branches: F_1, F_2, ..., of one width.
        width: size of dimension ``dim``.
        dim: the dimension that holds the features.

    Example:
        >>> network = DepthAttention(nn.Linear(4, 4), nn.Linear(4, 4), width=4)
        >>> network(torch.ones(3, 4)).shape, len(network.queries)
        (torch.Size([3, 4]), 2)
    """

    kind = "gated"

    def __init__(self, *branches: nn.Module, width: int, dim: int = -1):
        super().__init__()
        self.branches, self.dim = nn.ModuleList(branches), dim
        self.queries = nn.ParameterList(torch.zeros(width) for _ in branches)  # h_1 is x, whatever its query

    def begin(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """``v_0 = h_1 = x``."""
        h = x.movedim(self.dim, -1)
        return [h], h.movedim(-1, self.dim)

    def sources(self, index: int, state: list[Tensor], f: Tensor) -> list[Tensor]:
        """What is attended over after branch ``index`` gave ``f``."""
        return [*state, f]

    def step(self, index: int, state: list[Tensor], f: Tensor) -> tuple[list[Tensor], Tensor]:
        """``h_(l+1)`` after ``v_l``."""
        state = self.sources(index, state, f.movedim(self.dim, -1))
        return state, depth_attention(state, self.queries[index]).movedim(-1, self.dim)


class BlockAttention(DepthAttention):
    """Branches that attend over ``x`` and the sums of blocks of branches.

    Args:
        branches: F_1, F_2, ..., of one width.
        width: size of dimension ``dim``.
        blocks: into how many blocks of neighbours the branches are divided, all of one length but the last.
        dim: the dimension that holds the features.

    Example:
        >>> BlockAttention(*[nn.Linear(4, 4) for _ in range(6)], width=4, blocks=2).length
        3
    """

    def __init__(self, *branches: nn.Module, width: int, blocks: int = 8, dim: int = -1):
        super().__init__(*branches, width=width, dim=dim)
        self.length = -(-len(branches) // blocks)

    def sources(self, index: int, state: list[Tensor], f: Tensor) -> list[Tensor]:
        """The block's sum grows by ``f``, or a new block begins."""
        return [*state[:-1], state[-1] + f] if index % self.length else [*state, f]


class DeltaAttention(DepthAttention):
    """``s_l + sum of a_il v_i``: the residual stream s stays, and what is attended over is added to it.

    Args:
        branches: F_1, F_2, ..., of one width.
        width: size of dimension ``dim``.
        dim: the dimension that holds the features.

    Example:
        >>> network = DeltaAttention(nn.Identity(), nn.Identity(), width=2)
        >>> network(torch.ones(2)).detach()  # s_2 = 1 + 1, h_2 = s_2 + the mean of (1, 1) = 3, s_3 = 2 + 3
        tensor([5., 5.])
    """

    kind = "identity"

    def __init__(self, *branches: nn.Module, width: int, dim: int = -1):
        super().__init__(*branches, width=width, dim=dim)
        self.queries = nn.ParameterList(list(self.queries)[:-1])

    def step(self, index: int, state: list[Tensor], f: Tensor) -> tuple[list[Tensor], Tensor]:
        """``h_(l+1)`` after ``v_l``; after the last, the stream itself.

        The state is the stream, then v_0, v_1, ...
        """
        f = f.movedim(self.dim, -1)
        stream, *values = state if index else (state[0], state[0])
        stream, values = stream + f, [*values, f]
        last = index == len(self.branches) - 1
        read = stream if last else stream + depth_attention(values, self.queries[index])
        return [stream, *values], read.movedim(-1, self.dim)
