"""Attention residuals: every layer attends over the outputs of all before it. Kimi Team 2026, arXiv 2603.15031.

h_l = sum over i < l of a_il v_i,   a_il = softmax_i(w_l . RMSNorm(v_i)),   v_0 = x, v_l = F_l(h_l)

w_l is one learned vector a layer, zero at the start: then h_l is the mean of what came before. A last one reads the
network's output.
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

    def step(self, index: int, state: list[Tensor], f: Tensor) -> tuple[list[Tensor], Tensor]:
        """``h_(l+1)`` after ``v_l``."""
        state = [*state, f.movedim(self.dim, -1)]
        return state, depth_attention(state, self.queries[index]).movedim(-1, self.dim)
