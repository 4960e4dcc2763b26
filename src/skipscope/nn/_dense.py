"""The concatenating shortcut: Huang et al. 2016 (DenseNet, arXiv 1608.06993); U-Net's (1505.04597) is longer.

y = [x, F(x)]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skipscope.nn._connection import Connection


def dense_shortcut(x: Tensor, f: Tensor, dim: int = -1) -> Tensor:
    """Concatenate ``x`` and ``f`` along dimension ``dim``.

    Example:
        >>> dense_shortcut(torch.zeros(2), torch.ones(1))
        tensor([0., 0., 1.])
    """
    return torch.cat([x, f], dim)


class DenseShortcut(Connection):
    """``[x, F(x)]``: the output is wider than the input by the width of F(x), the growth rate.

    Args:
        branch: F.
        dim: the dimension that holds the features.

    Example:
        >>> DenseShortcut(nn.Linear(4, 2))(torch.ones(3, 4)).shape
        torch.Size([3, 6])
    """

    kind = "concat"

    def __init__(self, branch: nn.Module, *, dim: int = -1):
        super().__init__(branch)
        self.dim = dim

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``[x, f]``."""
        return dense_shortcut(x, f, self.dim)
