"""Where the norm N stands.

post-norm       y = N(x + F(x))       Vaswani et al. 2017, arXiv 1706.03762
pre-norm        y = x + F(N(x))       Xiong et al. 2020, arXiv 2002.04745
sandwich norm   y = x + N(F(N(x)))    Ding et al. 2021, arXiv 2105.13290; Kim et al. 2025, 2502.02732 (peri-norm)
DeepNorm        y = N(a x + F(x))     Wang et al. 2022, arXiv 2203.00555; a = (2L)^(1/4), F's weights times
                                      (8L)^(-1/4), for an encoder or decoder of L layers of two branches
Admin           y = N(w x + F(x))     Liu et al. 2020, arXiv 2004.08249; w learned, one number a feature
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skipscope.nn._connection import Connection, WidthNorm, along
from skipscope.nn._scaled import scaled_shortcut


class _Normed(Connection):
    def __init__(self, branch: nn.Module, width: int, *, dim: int = -1, norm: nn.Module | None = None):
        super().__init__(branch)
        self.norm = norm or WidthNorm(width, dim=dim)


class PreNorm(_Normed):
    """``x + F(N(x))``.

    Args:
        branch: F.
        width: size of dimension ``dim``.
        dim: the dimension that holds the features.
        norm: in place of layer normalisation.
    """

    def read(self, x: Tensor) -> Tensor:
        """``N(x)``."""
        return self.norm(x)


class PostNorm(_Normed):
    """``N(x + F(x))``; arguments as for :class:`PreNorm`."""

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``N(x + f)``."""
        return self.norm(x + f)


class Admin(PostNorm):
    """``N(diag(w) x + F(x))``.

    Arguments as for :class:`PreNorm`, and ``omega``, where every element of w starts: the paper runs the network once
    and takes the root of the summed variances of the branches before.

    Example:
        >>> Admin(nn.Linear(4, 4), 4, omega=3**0.5).omega.shape
        torch.Size([4])
    """

    kind = "scaled"

    def __init__(
        self,
        branch: nn.Module,
        width: int,
        *,
        dim: int = -1,
        norm: nn.Module | None = None,
        omega: float = 1.0,
    ):
        super().__init__(branch, width, dim=dim, norm=norm)
        self.omega, self.dim = nn.Parameter(torch.full((width,), omega)), dim

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``N(diag(w) x + f)``."""
        return self.norm(along(self.omega, x, self.dim) * x + f)


class SandwichNorm(PreNorm):
    """``x + N'(F(N(x)))``: a second norm after the branch.

    Arguments as for :class:`PreNorm`, and ``norm_out`` in place of the second norm.
    """

    def __init__(
        self,
        branch: nn.Module,
        width: int,
        *,
        dim: int = -1,
        norm: nn.Module | None = None,
        norm_out: nn.Module | None = None,
    ):
        super().__init__(branch, width, dim=dim, norm=norm)
        self.norm_out = norm_out or WidthNorm(width, dim=dim)

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``x + N'(f)``."""
        return x + self.norm_out(f)


class DeepNorm(_Normed):
    """``N(a x + F(x))`` with ``a = (2 layers)^(1/4)``.

    Args:
        branch: F; :func:`deep_norm_` gives its weights their scale.
        width: size of dimension ``dim``.
        layers: of the encoder or decoder; each has two branches.
        dim: the dimension that holds the features.
        norm: in place of layer normalisation.
    """

    kind = "scaled"

    def __init__(
        self, branch: nn.Module, width: int, layers: int, *, dim: int = -1, norm: nn.Module | None = None
    ):
        super().__init__(branch, width, dim=dim, norm=norm)
        self.scale = (2 * layers) ** 0.25

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``N(a x + f)``."""
        return self.norm(scaled_shortcut(x, f, self.scale))


@torch.no_grad()
def deep_norm_(branch: nn.Module, layers: int, skip: tuple[str, ...] = ("q_proj", "k_proj")) -> nn.Module:
    """Scale a branch's weights in place by ``(8 layers)^(-1/4)``, as DeepNorm does.

    Args:
        branch: F, with the initialisation whose gain is to be scaled (the paper's is Xavier's).
        layers: of the encoder or decoder.
        skip: weights whose names hold one of these stay as they are: queries and keys.

    Example:
        >>> branch = deep_norm_(nn.Linear(2, 2), layers=2)
    """
    for name, parameter in branch.named_parameters():
        if parameter.ndim > 1 and not any(word in name for word in skip):
            parameter.mul_((8 * layers) ** -0.25)
    return branch
