"""Two reversible streams: Gomez et al. 2017 (RevNet, 1707.04585), Kitaev et al. 2020 (Reformer, 2001.04451).

y1 = x1 + F(x2),   y2 = x2 + G(y1);   inverse x2 = y2 - G(y1), x1 = y1 - F(x2)

Only the equation is implemented; recomputing activations to save memory is left to the caller.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from skipscope.nn._connection import Chain
from skipscope.nn._shake import permuted_copy

Branch = Callable[[Tensor], Tensor]


def reversible(x1: Tensor, x2: Tensor, f: Branch, g: Branch) -> tuple[Tensor, Tensor]:
    """``y1 = x1 + f(x2)`` and ``y2 = x2 + g(y1)``.

    Example:
        >>> import torch
        >>> reversible(torch.ones(2), torch.zeros(2), torch.cos, torch.sin)  # 1 + cos 0, 0 + sin 2
        (tensor([2., 2.]), tensor([0.9093, 0.9093]))
    """
    y1 = x1 + f(x2)
    return y1, x2 + g(y1)


def reversed_from(y1: Tensor, y2: Tensor, f: Branch, g: Branch) -> tuple[Tensor, Tensor]:
    """Recover the inputs ``x1, x2`` of :func:`reversible` from its outputs.

    Example:
        >>> import torch
        >>> x1, x2 = torch.ones(2), torch.zeros(2)
        >>> reversed_from(*reversible(x1, x2, torch.cos, torch.sin), torch.cos, torch.sin)
        (tensor([1., 1.]), tensor([0., 0.]))
    """
    x2 = y2 - g(y1)
    return y1 - f(x2), x2


class Reversible(Chain):
    """Reversible layers between two streams, which begin as copies of one tensor and end as their mean.

    Args:
        branches: F and G of each layer, alternating. If the number is odd, the last F gets as its G a copy of
            itself with permuted weights.

    Example:
        >>> import torch
        >>> Reversible(nn.Linear(4, 4), nn.Linear(4, 4))(torch.ones(3, 4)).shape
        torch.Size([3, 4])
    """

    def __init__(self, *branches: nn.Module):
        super().__init__()
        branches = branches if len(branches) % 2 == 0 else (*branches, permuted_copy(branches[-1]))
        self.branches = nn.ModuleList(branches)

    def begin(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The streams, two copies of ``x``, and the input of the first F."""
        return (x, x), x

    def step(
        self, index: int, state: tuple[Tensor, Tensor], f: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The streams, ``(y1, x2)`` after an F or ``(y1, y2)`` after a G, and the next input or the mean."""
        one, two = state
        state = (one, two + f) if index % 2 else (one + f, two)
        last = index == len(self.branches) - 1
        return state, (state[0] + state[1]) / 2 if last else state[index % 2]
