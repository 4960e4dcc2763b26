"""Layers that attend over the outputs of all earlier layers.

Attention residuals   h_l = sum over i < l of a_il v_i,   v_0 = x, v_l = F_l(h_l)
                      Kimi Team 2026, arXiv 2603.15031
block                 the v_i are sums of F over blocks of neighbouring layers (in l's own block, of the
                      layers before l); the same paper: about 8 blocks
delta                 h_l = s_l + sum over i < l of a_il v_i,   s_l = v_0 + ... + v_(l-1)
                      the output is s_(L+1); Luo, Cai and Hu 2026, arXiv 2605.18855

a_il = softmax_i(w_l . RMSNorm(v_i)); w_l is one learned vector per layer, zero at the start, which gives a
mean. In the first two a final query computes the network's output; delta keeps the plain sum s, and h_1 = x.
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
    """A sequence of branches; each input, and the output, attends over ``x`` and all earlier outputs.

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
        # The first branch needs no query, since h_1 = x; the last query computes the output.
        self.queries = nn.ParameterList(torch.zeros(width) for _ in branches)

    def begin(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """``v_0 = h_1 = x``."""
        h = x.movedim(self.dim, -1)
        return [h], h.movedim(-1, self.dim)

    def sources(self, index: int, state: list[Tensor], f: Tensor) -> list[Tensor]:
        """The tensors to attend over after branch ``index`` returned ``f``."""
        return [*state, f]

    def step(self, index: int, state: list[Tensor], f: Tensor) -> tuple[list[Tensor], Tensor]:
        """Append ``v_l`` to the state, and return it with ``h_(l+1)``."""
        state = self.sources(index, state, f.movedim(self.dim, -1))
        return state, depth_attention(state, self.queries[index]).movedim(-1, self.dim)


class BlockAttention(DepthAttention):
    """Branches that attend over ``x`` and the sums of blocks of branches.

    Args:
        branches: F_1, F_2, ..., of one width.
        width: size of dimension ``dim``.
        blocks: number of blocks of neighbouring branches, all of equal length except the last.
        dim: the dimension that holds the features.

    Example:
        >>> BlockAttention(*[nn.Linear(4, 4) for _ in range(6)], width=4, blocks=2).length
        3
    """

    def __init__(self, *branches: nn.Module, width: int, blocks: int = 8, dim: int = -1):
        super().__init__(*branches, width=width, dim=dim)
        self.length = -(-len(branches) // blocks)

    def sources(self, index: int, state: list[Tensor], f: Tensor) -> list[Tensor]:
        """Add ``f`` to the sum of the current block, or begin a new block with it."""
        return [*state[:-1], state[-1] + f] if index % self.length else [*state, f]


class DeltaAttention(DepthAttention):
    """``s_l + sum of a_il v_i``: the residual stream s plus attention over x and all earlier outputs.

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
        """The new state, and ``h_(l+1)``, or after the last branch the stream itself.

        The state is the stream, followed by v_0, v_1, ...
        """
        f = f.movedim(self.dim, -1)
        stream, *values = state if index else (state[0], state[0])
        stream, values = stream + f, [*values, f]
        last = index == len(self.branches) - 1
        read = stream if last else stream + depth_attention(values, self.queries[index])
        return [stream, *values], read.movedim(-1, self.dim)
