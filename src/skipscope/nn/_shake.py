"""Two branches mixed at random: Gastaldi 2017 (shake-shake, arXiv 1705.07485).

y = x + a F1(x) + (1 - a) F2(x), with a uniform in [0, 1] drawn in each forward pass; the backward pass uses a
separate draw. In evaluation mode a = 1/2.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from skipscope.nn._identity import IdentityShortcut


def shake_shake(f1: Tensor, f2: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
    """``forward * f1 + (1 - forward) * f2``, with the gradient of ``backward * f1 + (1 - backward) * f2``.

    Example:
        >>> f1, f2 = torch.ones(2, requires_grad=True), torch.zeros(2)
        >>> y = shake_shake(f1, f2, torch.tensor(0.25), torch.tensor(0.75))
        >>> y.tolist(), torch.autograd.grad(y.sum(), f1)[0].tolist()
        ([0.25, 0.25], [0.75, 0.75])
    """
    seen = backward * f1 + (1 - backward) * f2
    return seen + ((forward - backward) * (f1 - f2)).detach()


class ShakeShake(IdentityShortcut):
    """``x + a F1(x) + (1 - a) F2(x)``.

    Args:
        branch: F1.
        other: F2; by default a copy of F1 with permuted weights.
        mode: draw for each ``"row"`` (best in the paper) or once for the ``"batch"``.

    Example:
        >>> block = ShakeShake(nn.Identity(), nn.Identity()).eval()
        >>> block(torch.ones(2, 3))[0]  # not training: x + (F1(x) + F2(x)) / 2
        tensor([2., 2., 2.])
    """

    def __init__(
        self, branch: nn.Module, other: nn.Module | None = None, mode: Literal["row", "batch"] = "row"
    ):
        super().__init__(branch)
        self.other = permuted_copy(branch) if other is None else other
        self.mode: Literal["row", "batch"] = mode

    def forward(self, x: Tensor, *args: Any, **keywords: Any) -> Tensor:
        """The sum of ``x`` and the mixed branches; further arguments go to both branches."""
        f1, f2 = (f(self.read(x), *args, **keywords) for f in (self.branch, self.other))
        if not self.training:
            return self.write(x, (f1 + f2) / 2)
        shape = [f1.shape[0] if self.mode == "row" else 1] + [1] * (f1.ndim - 1)
        forward, backward = torch.rand(2, *shape, dtype=f1.dtype, device=f1.device)
        return self.write(x, shake_shake(f1, f2, forward, backward))


@torch.no_grad()
def permuted_copy(branch: nn.Module) -> nn.Module:
    """Copy ``branch`` and permute the columns of each weight, which keeps the initial distribution."""
    other = copy.deepcopy(branch)
    for parameter in other.parameters():
        columns = 1 if parameter.ndim > 1 and parameter.shape[1] > 1 else 0
        if parameter.ndim:
            order = torch.randperm(parameter.shape[columns], device=parameter.device)
            parameter.copy_(parameter.index_select(columns, order))
    return other
