"""Constant factors on shortcut and branch.

constant scale   y = a x + b F(x)          He et al. 2016, arXiv 1603.05027, section 3.1 (a = b = 0.5)
depth scale      y = x + F(x) / sqrt(L)    Hayou et al. 2021, arXiv 2010.12859; the summed variance of L
                                           branches does not depend on L
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from skipscope.nn._connection import Connection


def scaled_shortcut(x: Tensor, f: Tensor, scale: float, branch_scale: float = 1.0) -> Tensor:
    """``scale * x + branch_scale * f``.

    Example:
        >>> import torch
        >>> scaled_shortcut(torch.ones(2), torch.ones(2), 0.5, 0.25)
        tensor([0.7500, 0.7500])
    """
    return (x if scale == 1 else scale * x) + (f if branch_scale == 1 else branch_scale * f)


class ScaledShortcut(Connection):
    """``scale * x + branch_scale * F(x)``: the gradient shrinks by ``scale`` at every block.

    Args:
        branch: F.
        scale: the factor on the shortcut.
        branch_scale: the factor on the branch.

    Example:
        >>> import torch
        >>> ScaledShortcut(nn.Identity(), scale=0.5, branch_scale=1.0)(torch.ones(2))
        tensor([1.5000, 1.5000])
    """

    kind = "scaled"

    def __init__(self, branch: nn.Module, scale: float = 0.5, branch_scale: float = 0.5):
        super().__init__(branch)
        self.scale, self.branch_scale = scale, branch_scale

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``scale * x + branch_scale * f``."""
        return scaled_shortcut(x, f, self.scale, self.branch_scale)


class DepthScaled(Connection):
    """``x + F(x) / sqrt(depth)``.

    Args:
        branch: F.
        depth: number of such branches in the network.

    Example:
        >>> import torch
        >>> DepthScaled(nn.Identity(), depth=4)(torch.ones(2))
        tensor([1.5000, 1.5000])
    """

    def __init__(self, branch: nn.Module, depth: int):
        super().__init__(branch)
        self.branch_scale = 1 / math.sqrt(depth)

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``x + f / sqrt(depth)``."""
        return scaled_shortcut(x, f, 1.0, self.branch_scale)
