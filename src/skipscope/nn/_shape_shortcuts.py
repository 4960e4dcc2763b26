"""Shortcuts for shape changes, options A, B and C: He et al. 2015, arXiv 1512.03385, section 4.1.

A   y = pad(x[::stride]) + F(x)                    no weights
B   y = W x + F(x) where the shape changes, x + F(x) elsewhere
C   y = W x + F(x) everywhere                      (He et al. 2016 call it the 1 x 1 shortcut)
"""

from __future__ import annotations

from torch import Tensor, nn

from skipscope._validation import require_option
from skipscope.nn._connection import Connection, Pointwise, pad_width


def strided(x: Tensor, stride: int) -> Tensor:
    """Every ``stride``-th pixel of images ``[n, c, h, w]``; with stride 1 the tensor itself."""
    return x[:, :, ::stride, ::stride] if stride > 1 else x


def pad_shortcut(x: Tensor, width: int, *, stride: int = 1, dim: int = 1) -> Tensor:
    """Option A: every ``stride``-th pixel, and zeros for the new features, half in front and half behind.

    Example:
        >>> import torch
        >>> pad_shortcut(torch.ones(1, 2, 4, 4), 4, stride=2)[0, :, 0, 0]
        tensor([0., 1., 1., 0.])
    """
    x = strided(x, stride)
    return x if x.shape[dim] == width else pad_width(x, width, dim)


class PadShortcut(Connection):
    """Option A, ``pad(x[::stride]) + F(x)``.

    Args:
        branch: F, from ``width`` to ``width_out`` features.
        width: features in; with ``dim=1`` the channels of an image.
        width_out: features out; by default ``width``.
        stride: stride of the branch.
        dim: the dimension that holds the features.

    Example:
        >>> import torch
        >>> PadShortcut(nn.Linear(4, 8), 4, 8)(torch.ones(3, 4)).shape
        torch.Size([3, 8])
    """

    def __init__(
        self, branch: nn.Module, width: int, width_out: int | None = None, *, stride: int = 1, dim: int = -1
    ):
        super().__init__(branch)
        self.width_out, self.stride, self.dim = width_out or width, stride, dim

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``pad(x) + f``."""
        return pad_shortcut(x, self.width_out, stride=self.stride, dim=self.dim) + f


class ProjectionShortcut(Connection):
    """Options B and C, ``W x + F(x)``; :func:`option` chooses between this and option A.

    Arguments as for :class:`PadShortcut`.

    Example:
        >>> import torch
        >>> branch = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        >>> ProjectionShortcut(branch, 4, 8, stride=2, dim=1)(torch.ones(1, 4, 6, 6)).shape
        torch.Size([1, 8, 3, 3])
    """

    kind = "projection"

    def __init__(
        self, branch: nn.Module, width: int, width_out: int | None = None, *, stride: int = 1, dim: int = -1
    ):
        super().__init__(branch)
        self.projection = Pointwise(width, width_out, dim=dim, bias=False)
        self.stride = stride

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``W x + f``."""
        return self.projection(strided(x, self.stride)) + f


def option(
    letter: str,
    branch: nn.Module,
    width: int,
    width_out: int | None = None,
    *,
    stride: int = 1,
    dim: int = -1,
) -> Connection:
    """Build the shortcut module of option ``"A"``, ``"B"`` or ``"C"`` for these widths.

    Raises:
        SkipscopeError: an unknown letter.

    Example:
        >>> type(option("B", nn.Linear(4, 4), 4)).__name__, type(option("B", nn.Linear(4, 8), 4, 8)).__name__
        ('PadShortcut', 'ProjectionShortcut')
    """
    require_option("option", "letter", letter, ("A", "B", "C"))
    changes = stride > 1 or (width_out or width) != width
    module = ProjectionShortcut if letter == "C" or (letter == "B" and changes) else PadShortcut
    return module(branch, width, width_out, stride=stride, dim=dim)
