"""Learned factors on the branch, which start small or at zero.

SkipInit     y = x + a F(x), a = 0 at the start    De and Smith 2020, arXiv 2002.10444
ReZero       the same                              Bachlechner et al. 2020, arXiv 2003.04887
LayerScale   y = x + diag(g) F(x), g = 1e-4        Touvron et al. 2021, arXiv 2103.17239

Factors and offsets on both sides:
affine       y = s (x + b) + t (F(x) + c), s = t = 1, b = c = 0; per feature
             ZAYA1 (Zyphra 2026, arXiv 2605.05365, section II-A3; transformers, zaya)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skipscope.nn._connection import Connection, along


def rezero(x: Tensor, f: Tensor, alpha: Tensor) -> Tensor:
    """``x + alpha * f`` with a scalar ``alpha``.

    Example:
        >>> rezero(torch.ones(2), torch.ones(2), torch.tensor(0.5))
        tensor([1.5000, 1.5000])
    """
    return x + alpha * f


def layer_scale(x: Tensor, f: Tensor, gamma: Tensor, dim: int = -1) -> Tensor:
    """``x + gamma * f`` with one ``gamma`` per feature along dimension ``dim``.

    Example:
        >>> layer_scale(torch.ones(2), torch.ones(2), torch.tensor([0.0, 0.5]))
        tensor([1.0000, 1.5000])
    """
    return x + along(gamma, f, dim) * f


class ReZero(Connection):
    """``x + a F(x)``, initially the identity; a has a gradient from the first step, F from the second.

    Args:
        branch: F.

    Example:
        >>> x = torch.randn(3, 4)
        >>> torch.equal(ReZero(nn.Linear(4, 4))(x), x)  # a = 0: x as it was
        True
    """

    identity_at_start = True

    def __init__(self, branch: nn.Module):
        super().__init__(branch)
        self.alpha = nn.Parameter(torch.zeros(()))

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``x + a f``."""
        return rezero(x, f, self.alpha)


class SkipInit(ReZero):
    """``x + a F(x)`` with a = 0 at the start: the equation of :class:`ReZero`.

    De and Smith derive it from the effect of batch normalisation at initialisation.

    Example:
        >>> x = torch.randn(3, 4)
        >>> torch.equal(SkipInit(nn.Linear(4, 4))(x), x)  # a = 0: x as it was
        True
    """


class LayerScale(Connection):
    """``x + diag(g) F(x)``.

    Args:
        branch: F.
        width: size of dimension ``dim``.
        init: initial value of every element of g; 0.1 to 1e-6 in the paper, lower for deeper networks.
        dim: the dimension that holds the features.

    Example:
        >>> LayerScale(nn.Identity(), 2, init=0.5)(torch.ones(2)).detach()
        tensor([1.5000, 1.5000])
    """

    def __init__(self, branch: nn.Module, width: int, *, init: float = 1e-4, dim: int = -1):
        super().__init__(branch)
        self.gamma = nn.Parameter(torch.full((width,), init))
        self.dim = dim

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``x + diag(g) f``."""
        return layer_scale(x, f, self.gamma, self.dim)


def affine_residual(x: Tensor, f: Tensor, scale: Tensor, offset: Tensor, dim: int = -1) -> Tensor:
    """``scale[0] (x + offset[0]) + scale[1] (f + offset[1])``, each with one element per feature.

    Example:
        >>> scale, offset = torch.ones(2, 3), torch.tensor([[0.5] * 3, [0.0] * 3])
        >>> affine_residual(torch.ones(3), torch.ones(3), scale, offset)  # (1 + 0.5) + 1
        tensor([2.5000, 2.5000, 2.5000])
    """
    s, t = (along(row, x, dim) for row in scale)
    b, c = (along(row, x, dim) for row in offset)
    return s * (x + b) + t * (f + c)


class AffineResidual(Connection):
    """``s (x + b) + t (F(x) + c)``.

    Args:
        branch: F.
        width: size of dimension ``dim``.
        dim: the dimension that holds the features.

    Example:
        >>> AffineResidual(nn.Identity(), 2)(torch.ones(2)).detach()  # s = t = 1, b = c = 0 at the start
        tensor([2., 2.])
    """

    kind = "projection"

    def __init__(self, branch: nn.Module, width: int, *, dim: int = -1):
        super().__init__(branch)
        self.scale, self.offset = nn.Parameter(torch.ones(2, width)), nn.Parameter(torch.zeros(2, width))
        self.dim = dim

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``s (x + b) + t (f + c)``."""
        return affine_residual(x, f, self.scale, self.offset, self.dim)
