"""Shortcuts and branches that are dropped at random in training.

    dropout shortcut    y = dropout(x) + F(x)      He et al. 2016, arXiv 1603.05027, section 3.4 (it fails)
    stochastic depth    y = x + b F(x) / (1 - p)   Huang et al. 2016, arXiv 1603.09382; b ~ Bernoulli(1 - p)

Huang et al. multiply by 1 - p in evaluation mode. Dividing by it in training, as timm and torchvision do, is
the same network up to the scale of the weights.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipscope.nn._connection import Connection


def dropout_shortcut(x: Tensor, f: Tensor, p: float, training: bool) -> Tensor:
    """``dropout(x, p) + f``.

    Example:
        >>> dropout_shortcut(torch.ones(2), torch.ones(2), p=0.5, training=False)
        tensor([2., 2.])
    """
    return F.dropout(x, p, training) + f


def stochastic_depth(f: Tensor, p: float, training: bool, mode: Literal["row", "batch"] = "row") -> Tensor:
    """Zero ``f`` with probability ``p``, per row or per batch; divide what is kept by ``1 - p``.

    Example:
        >>> stochastic_depth(torch.ones(2, 3), p=1.0, training=True)  # every row is dropped
        tensor([[0., 0., 0.],
                [0., 0., 0.]])
    """
    if not training or p == 0:
        return f
    keep = torch.empty(
        [f.shape[0] if mode == "row" else 1] + [1] * (f.ndim - 1), dtype=f.dtype, device=f.device
    )
    keep.bernoulli_(1 - p)
    return f * (keep / (1 - p) if p < 1 else keep)


class DropoutShortcut(Connection):
    """``dropout(x) + F(x)`` in training; ``x + F(x)`` in evaluation mode.

    Args:
        branch: F.
        p: the probability that an element of the shortcut is dropped.

    Example:
        >>> DropoutShortcut(nn.Identity(), p=1.0)(torch.ones(3))  # no element of x is left: F(x)
        tensor([1., 1., 1.])
    """

    def __init__(self, branch: nn.Module, p: float = 0.5):
        super().__init__(branch)
        self.p = p

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``dropout(x) + f``."""
        return dropout_shortcut(x, f, self.p, self.training)


class StochasticDepth(Connection):
    """``x + b F(x) / (1 - p)`` with a random b in training; ``x + F(x)`` in evaluation mode.

    Args:
        branch: F.
        p: the probability that the branch is dropped; in the paper it grows from 0 at the input to 0.5.
        mode: draw for each ``"row"`` (sample) or once for the ``"batch"``, as the paper does.

    Example:
        >>> StochasticDepth(nn.Identity(), p=1.0)(torch.ones(2, 1)).tolist()  # F is always dropped
        [[1.0], [1.0]]
        >>> StochasticDepth(nn.Identity(), p=1.0).eval()(torch.ones(2, 1)).tolist()
        [[2.0], [2.0]]
    """

    def __init__(self, branch: nn.Module, p: float = 0.2, mode: Literal["row", "batch"] = "row"):
        super().__init__(branch)
        self.p = p
        self.mode: Literal["row", "batch"] = mode

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``x + b f / (1 - p)``."""
        return x + stochastic_depth(f, self.p, self.training, self.mode)
