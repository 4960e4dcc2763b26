"""What cannot be looked into is listed: functions that are given code, control flow, scripted functions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import skipscope as ss

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Given(torch.autograd.Function):
    """A reversible block as packages write it: the function is given code that runs modules."""

    @staticmethod
    def forward(ctx, x, run):
        return x + run(x)

    @staticmethod
    def backward(ctx, *grads):
        return grads[0], None


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, *grads):
        return grads[0]


@pytest.mark.filterwarnings("ignore")
def scripted():
    return torch.jit.script(_scripted)


def _scripted(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x + torch.tanh(x @ w)


SCRIPTED = scripted()


def helper(x, w):
    return SCRIPTED(x, w)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.w = nn.Linear(6, 6), nn.Parameter(torch.randn(6, 6))


class OfClosure(Net):
    def forward(self, x):
        return Given.apply(x, lambda y: self.lin(y).tanh())


class OfRounding(Net):
    def forward(self, x):
        return self.lin(Rounded.apply(x))


class OfChoice(Net):
    def forward(self, x):
        return torch.cond(
            x.sum() > 0, lambda y: y + self.lin(y).tanh(), lambda y: y - self.lin(y).tanh(), (x,)
        )


class OfScript(Net):
    def forward(self, x):
        return x + SCRIPTED(self.lin(x), self.w)


class OfHelper(Net):
    def forward(self, x):
        return x + helper(self.lin(x), self.w)


class OfAttribute(Net):
    def __init__(self):
        super().__init__()
        self.run = SCRIPTED

    def forward(self, x):
        return x + self.run(self.lin(x), self.w)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (OfClosure, "Given"),
        (OfRounding, None),
        (OfChoice, "cond"),
        (OfScript, "_scripted"),
        (OfHelper, "_scripted"),
        (OfAttribute, "_scripted"),
    ],
)
def test_what_may_hold_shortcuts_is_listed(make, name):
    found = ss.find_shortcuts(make(), X)
    assert not len(found)
    assert [item.name for item in found.opaque] == [name] * (name is not None)
