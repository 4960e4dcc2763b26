"""Parallel branches: GPT-J (Wang and Komatsuzaki 2021), PaLM (Chowdhery et al. 2022, arXiv 2204.02311).

y = x + F_1(N(x)) + F_2(N(x)) + ...: one shortcut around all branches, in a transformer around attention and
feed-forward layer
"""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

from torch import Tensor, nn

from skipscope.nn._connection import WidthNorm
from skipscope.nn._identity import identity_shortcut


class ParallelBranches(nn.Module):
    """``x + F_1(N(x)) + F_2(N(x)) + ...``.

    Args:
        branches: F_1, F_2, ...; each keeps the shape.
        width: size of dimension ``dim``.
        dim: the dimension that holds the features.

    Example:
        >>> import torch
        >>> ParallelBranches(nn.Linear(4, 4), nn.Linear(4, 4), width=4)(torch.ones(3, 4)).shape
        torch.Size([3, 4])
    """

    kind = "identity"
    identity_at_start = False

    def __init__(self, *branches: nn.Module, width: int, dim: int = -1):
        super().__init__()
        self.norm, self.branches = WidthNorm(width, dim=dim), nn.ModuleList(branches)

    def forward(self, x: Tensor, *args: Any, **keywords: Any) -> Tensor:
        """The sum of ``x`` and all branches; further arguments go to every branch."""
        read = self.norm(x)
        parts = [branch(read, *args, **keywords) for branch in self.branches]
        return identity_shortcut(x, reduce(add, parts))
