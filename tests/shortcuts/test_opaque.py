"""What cannot be looked into is listed: functions that are given code, control flow, scripted functions."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

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


def _clamped(x: torch.Tensor, limit: float) -> torch.Tensor:
    return torch.tanh(x / limit) * limit


@pytest.mark.filterwarnings("ignore")
def scripted_block():
    return torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))


SCRIPTED, CLAMPED = scripted(), torch.jit.script(_clamped)


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


class OfAClamp(Net):
    """A scripted function of one activation joins nothing."""

    def forward(self, x):
        return x + CLAMPED(self.lin(x), 2.0)


class NeverCalled(Net):
    """Its code names a scripted function, and this pass does not call it."""

    def __init__(self):
        super().__init__()
        self.run, self.is_clamped = SCRIPTED, False

    def forward(self, x):
        y = self.lin(x)
        return x + (helper(CLAMPED(y, 2.0), self.w) if self.is_clamped else y)


class HiddenBlock(Net):
    """A scripted block in a list, where it is no part of the model."""

    def __init__(self):
        super().__init__()
        self.blocks = [scripted_block()]

    def forward(self, x):
        return self.lin(self.blocks[0].forward(x))


def fill(kernel_of, x):
    """As a kernel or a collective does: it fills what it is given, and no call of torch's is seen."""
    out = torch.empty_like(x)
    out.numpy()[:] = kernel_of(x.detach().numpy())
    return out


class OfAKernel(Net):
    def forward(self, x):
        return x + self.lin(fill(lambda array: array + 2 * array, x))


class OfACache(Net):
    """What is filled in sight, or not read, is no such tensor."""

    def forward(self, x):
        cache = torch.empty(4, 12)
        left, right = cache[:, :6], cache[:, 6:]
        left.copy_(x)
        right[:] = self.lin(x)
        mask = torch.empty_like(cache).bernoulli_(0.5)
        mask = mask + torch.addmm(torch.empty(4, 12), x, torch.zeros(6, 12), beta=0)
        torch.neg(mask, out=mask.new_empty(4, 12))
        return torch.cat([cache * mask, x.new_empty(4, 0)], 1)


@pytest.mark.parametrize(
    ("make", "name", "count"),
    [
        (OfClosure, "Given", 0),
        (OfRounding, None, 0),
        (OfChoice, "cond", 0),
        (OfScript, "_scripted", 1),
        (OfHelper, "_scripted", 1),
        (OfAttribute, "_scripted", 1),
        (OfAClamp, None, 1),
        (NeverCalled, None, 1),
        (HiddenBlock, "forward", 0),
        (OfAKernel, "empty", 0),
        (OfACache, None, 1),
    ],
)
def test_what_may_hold_shortcuts_is_listed(make, name, count):
    found = ss.find_shortcuts(make(), X)
    assert len(found) == count
    assert [item.name for item in found.opaque] == [name] * (name is not None)


def test_scripted_functions_are_called_as_before_afterwards_and_in_other_threads():
    calls = torch.jit.ScriptFunction.__call__
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: ss.find_shortcuts(OfScript(), X), range(8)))
    assert [len(each) for each in found] == [1] * 8
    assert torch.jit.ScriptFunction.__call__ is calls


def test_a_twin_of_a_model_with_a_scripted_function_is_edited():
    net = OfScript()
    twin: Any = ss.ablate(net, inputs=X)
    torch.testing.assert_close(twin(X), _scripted(net.lin(X), net.w))
