"""Identity shortcuts: plain, post- and pre-activation. He et al. 2015 (arXiv 1512.03385), 2016 (1603.05027).

identity          y = x + F(x)
post-activation   y = relu(x + F(x))
pre-activation    y = x + F(relu(norm(x)))
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skipscope.nn._connection import Connection, WidthNorm


def identity_shortcut(x: Tensor, f: Tensor) -> Tensor:
    """``x + f``, of one shape.

    Example:
        >>> identity_shortcut(torch.ones(2), torch.ones(2))
        tensor([2., 2.])
    """
    return x + f


class IdentityShortcut(Connection):
    """``x + F(x)``, the shortcut of the lecture.

    Example:
        >>> IdentityShortcut(nn.Linear(4, 4))(torch.ones(2, 4)).shape
        torch.Size([2, 4])
    """

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``x + f``."""
        return identity_shortcut(x, f)


class PostActivation(IdentityShortcut):
    """``relu(x + F(x))``, as in the first residual networks.

    Example:
        >>> PostActivation(nn.Identity())(torch.tensor([-1.0, 2.0]))
        tensor([0., 4.])
    """

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``relu(x + f)``."""
        return torch.relu(identity_shortcut(x, f))


class PreActivation(IdentityShortcut):
    """``x + F(relu(norm(x)))``: along the stream there are only additions, forward and backward.

    Args:
        branch: F.
        width: size of dimension ``dim``.
        dim: the dimension that holds the features.
        norm: module to use instead of layer normalisation; ``nn.BatchNorm2d(width)`` in the paper.

    Example:
        >>> block = PreActivation(nn.Identity(), 2, norm=nn.Identity())
        >>> block(torch.tensor([-1.0, 2.0]))  # x + relu(x)
        tensor([-1.,  4.])
    """

    def __init__(self, branch: nn.Module, width: int, *, dim: int = -1, norm: nn.Module | None = None):
        super().__init__(branch)
        self.norm = norm or WidthNorm(width, dim=dim)

    def read(self, x: Tensor) -> Tensor:
        """``relu(norm(x))``."""
        return torch.relu(self.norm(x))
