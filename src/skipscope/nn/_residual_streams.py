"""Two residual streams: Xie et al. 2023 (ResiDual, arXiv 2304.14802).

f_k = F_k(x_k),   x_{k+1} = N(x_k + f_k),   d_{k+1} = d_k + f_k,   d_1 = x_1 = x;   y = x_last + N(d_last)

The first stream is that of post-norm, the second that of pre-norm: its gradient does not pass a norm at every
layer. Each layer has two shortcuts, one in each stream. The last sum is not a shortcut: both streams reach it
from the last branch through one norm each, and neither skips anything.
"""

from __future__ import annotations

from torch import Tensor, nn

from skipscope.nn._connection import Chain, WidthNorm


def residual_streams(post: Tensor, pre: Tensor, f: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Both streams after a layer: ``norm(post + f)``, the next layer's input, and ``pre + f``.

    Example:
        >>> import torch
        >>> post, pre = residual_streams(torch.ones(2), torch.ones(2), torch.ones(2), nn.Tanh())
        >>> post, pre
        (tensor([0.9640, 0.9640]), tensor([2., 2.]))
    """
    return norm(post + f), pre + f


class ResidualStreams(Chain):
    """ResiDual: a stack of branches that write to two streams; input and output are one tensor.

    Args:
        branches: the F of each layer.
        width: size of dimension ``dim``.
        dim: the dimension that holds the features.

    Example:
        >>> import torch
        >>> import skipscope as ss
        >>> streams = ResidualStreams(nn.Linear(4, 4), nn.Linear(4, 4), width=4)
        >>> len(ss.find_shortcuts(streams, torch.randn(3, 4)))
        4
    """

    def __init__(self, *branches: nn.Module, width: int, dim: int = -1):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.norms = nn.ModuleList(WidthNorm(width, dim=dim) for _ in branches)
        self.norm_out = WidthNorm(width, dim=dim)

    def begin(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The state ``(x_1, d_1)``, twice ``x``, and the first branch's input ``x_1``."""
        return (x, x), x

    def step(
        self, index: int, state: tuple[Tensor, Tensor], f: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Both streams after a layer, and the next layer's input; after the last layer ``x + N(d)``."""
        post, pre = residual_streams(*state, f, self.norms[index])
        last = index == len(self.branches) - 1
        return (post, pre), post + self.norm_out(pre) if last else post
