"""Fixup: residual networks without normalisation. Zhang, Dauphin and Ma 2019, arXiv 1901.09321.

y = x + a F(x + b1) + b2,   a = 1, b1 = b2 = 0 at the start
The last of F's m weights starts at zero; the others are scaled by L^(-1 / (2m - 2)) for L branches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skipscope._errors import SkipscopeError
from skipscope.nn._connection import Connection, Elsewhere


@torch.no_grad()
def fixup_(branch: nn.Module, depth: int) -> nn.Module:
    """Initialise a branch in place as Fixup does, by rescaling its current weights.

    Args:
        branch: F. Its weights are its parameters of two or more dimensions, in order. Its biases are set to
            zero.
        depth: number of such branches in the network.

    Raises:
        SkipscopeError: the branch has no weights.

    Example:
        >>> branch = fixup_(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), depth=16)
        >>> branch(torch.ones(1, 4)).abs().sum().item()
        0.0
    """
    weights = [p for p in branch.parameters() if p.ndim > 1]
    if not weights:
        raise SkipscopeError("fixup_", "the branch has no weights", got=type(branch).__name__)
    for weight in weights[:-1]:
        weight.mul_(depth ** (-1 / (2 * len(weights) - 2)))
    weights[-1].zero_()
    for name, parameter in branch.named_parameters():
        if name.rpartition(".")[2] == "bias":
            parameter.zero_()
    return branch


class Fixup(Connection):
    """``x + a F(x + b1) + b2`` with scalars a, b1, b2; F is initialised by :func:`fixup_`.

    Args:
        branch: F, without normalisation.
        depth: number of such branches in the network.

    Example:
        >>> branch = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        >>> x = torch.randn(2, 4)
        >>> torch.equal(Fixup(branch, depth=16)(x), x)  # the last weights of F are 0: x as it was
        True
    """

    identity_at_start = True

    def __init__(self, branch: nn.Module, depth: int):
        super().__init__(branch)
        self.depth = depth
        if not isinstance(branch, Elsewhere):
            self.initialise_(branch)
        self.bias_in, self.bias_out = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.multiplier = nn.Parameter(torch.ones(()))

    def initialise_(self, branch: nn.Module) -> None:
        """Initialise a branch by :func:`fixup_`."""
        fixup_(branch, self.depth)

    def read(self, x: Tensor) -> Tensor:
        """``x + b1``."""
        return x + self.bias_in

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``x + a f + b2``."""
        return x + (self.multiplier * f + self.bias_out)
