"""Concatenations written by assigning into parts of a tensor: found, edited and split like ``torch.cat``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss


class Net(nn.Module):
    """A network of one function of itself and x."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(4))
        self.down, self.third, self.function = nn.Linear(12, 6), nn.Linear(3, 3), function

    def branch(self, x):
        return self.b(self.a(x).relu())

    def forward(self, x):
        return self.function(self, self.first(x))


def beside(n, x):
    return n.down(torch.cat([x, n.branch(x)], -1))


def assigned(n, x):
    out = torch.empty(*x.shape[:-1], 12)
    out[..., :6] = x
    out[..., 6:] = n.branch(x)
    return n.down(out)


def assigned_last(n, x):
    out = torch.empty(len(x), 12)
    out[:, 6:] = n.branch(x)
    out[:, :6] = x
    return n.down(out)


def copied(n, x):
    out = x.new_zeros(len(x), 12)
    out[:, :6].copy_(x)
    out[:, 6:].copy_(n.branch(x))
    return n.down(out)


def copied_last(n, x):
    out = x.new_zeros(len(x), 12)
    out[:, 6:].copy_(n.branch(x))
    out.narrow(1, 0, 6).copy_(x)
    return n.down(out)


def scattered(n, x):
    out = torch.zeros(len(x), 12).slice_scatter(x, 1, 0, 6)
    return n.down(out.slice_scatter(n.branch(x), 1, 6, 12))


def by_indices(n, x):
    out = torch.zeros(len(x), 12)
    out.index_copy_(1, torch.arange(6), x)
    out[:, torch.arange(6, 12)] = n.branch(x)
    return n.down(out)


def over_a_copy(n, x):
    out = x.repeat(1, 2)
    out[:, 6:] = n.branch(x)
    return n.down(out)


WRITINGS = {f.__name__: f for f in (
    assigned, assigned_last, copied, copied_last, scattered, by_indices, over_a_copy,
)}  # fmt: skip


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)


@pytest.mark.parametrize("name", WRITINGS)
def test_it_is_found_and_edited_like_a_concatenation(name):
    model, right, (x, y) = Net(WRITINGS[name]), Net(beside), data()
    found, expected = ss.find_shortcuts(model, x), ss.find_shortcuts(right, x)
    assert [(s.kind, s.fork, s.branch) for s in found] == [("concat", "first", ("a", "b"))]
    edits = [{"how": how} for how in ("remove", "detach", "lesion")] + [{"strength": 0.3}, {"strength": 0.0}]
    for edit in edits:
        twins = ss.ablate(model, found, **edit), ss.ablate(right, expected, **edit)
        outputs = [twin(x) for twin in twins]
        torch.testing.assert_close(*outputs)
        for twin, output in zip(twins, outputs):
            F.mse_loss(output, y).backward()
            assert twin.first.weight.grad is not None
        torch.testing.assert_close(*(twin.first.weight.grad for twin in twins))
    assert torch.equal(ss.ablate(model, found, "detach")(x), model(x))
    assert torch.equal(ss.ablate(model, found, strength=1.0)(x), model(x))


@pytest.mark.parametrize("name", WRITINGS)
def test_the_gradient_is_split_like_that_of_a_concatenation(name):
    (x, y), numbers = data(), []
    for function in (WRITINGS[name], beside):
        model = Net(function)
        (row,) = ss.gradient_split(model, (x, y), F.mse_loss)
        flow, paths = ss.gradient_flow(model, (x, y), F.mse_loss), ss.path_spectrum(model, (x, y), F.mse_loss)
        numbers.append(
            [row.branch_rms, row.shortcut_rms, *(b.gradient_rms for b in flow.boundaries), *paths.norms]
        )
    assert len(numbers[0]) == len(numbers[1]) and numbers[0] == pytest.approx(numbers[1], rel=1e-5)


@pytest.mark.parametrize("name", ["assigned", "copied", "scattered"])
@pytest.mark.parametrize("how", ["remove", "detach", "lesion"])
def test_compiled_twins_are_edited_too(name, how):
    model, (x, _) = Net(WRITINGS[name]), data()
    twin = ss.ablate(model, inputs=x, how=how)
    expected = twin(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(twin, backend="eager")(x), expected)


FEW, MASK = torch.tensor([0, 2]), torch.tensor([True, False, True, False])


def put(index, value):
    """A copy of x with something put at an index."""

    def function(n, x):
        out = x.clone()
        out[index(x) if callable(index) else index] = value(n, x)
        return n.c(out)

    return function


def dense(n, x):
    out = torch.zeros(len(x), 12)
    out[:, :6] = x
    out[:, 6:] = n.branch(out[:, :6])
    return n.down(out)


def coupling(n, x):
    out, (a, b) = torch.empty_like(x), x.chunk(2, -1)
    out[:, :3] = a
    out[:, 3:] = b + n.third(a).tanh()
    return out


def collected(n, x):
    out, h = torch.zeros_like(x), n.a(x[:, 0]).tanh()
    for t in range(1, 5):
        h = n.b(x[:, t] + h).tanh()
        out[:, t] = h
    return n.c(out)


def rotated(n, x):
    out = torch.empty_like(x)
    out[..., ::2] = x[..., ::2] * 2 - x[..., 1::2]
    out[..., 1::2] = x[..., 1::2] * 2 + x[..., ::2]
    return x + n.branch(out)


def parallel(n, x):
    out = torch.zeros(len(x), 12)
    out[:, :6] = n.a(x).relu()
    out[:, 6:] = n.b(x).relu()
    return n.down(out)


def overwritten(n, x):
    out = torch.zeros_like(x)
    out[:] = n.branch(x)
    return x + out


def stacked(n, x):
    out = torch.zeros(len(x), 2, 6)
    out[:, 0] = x
    out[:, 1] = n.branch(x)
    return n.down(out.flatten(1))


def pieces_of_a_split(n, x):
    out = torch.zeros(len(x), 12)
    one, other = out.chunk(2, -1)
    one.copy_(x)
    other.copy_(n.branch(x))
    return n.down(out)


TOKENS = (4, 5, 6)
OTHERS = {
    "chosen rows": (put(FEW, lambda n, x: n.branch(x[FEW])), ["concat"], (4, 6)),
    "masked rows": (put(MASK, lambda n, x: n.branch(x)[MASK]), ["gated"], (4, 6)),
    "rows that the data choose": (
        put(lambda x: x.sum(-1).topk(2)[1], lambda n, x: n.branch(x[x.sum(-1).topk(2)[1]])),
        ["gated"],
        (4, 6),
    ),
    "the class token": (put((slice(None), 0), lambda n, x: n.branch(x[:, 0])), ["concat"], TOKENS),
    "some channels": (
        put((slice(None), slice(3)), lambda n, x: n.third(x[:, :3]).tanh()),
        ["concat"],
        (4, 6),
    ),
    "a corner": (
        put((slice(2), slice(3)), lambda n, x: n.third(x[:2, 3:]).tanh()),
        ["concat"],
        (4, 6),
    ),
    "a buffer of a dense block": (dense, ["concat"], (4, 6)),
    "a coupling": (coupling, ["identity", "concat"], (4, 6)),
    "the outputs of a recurrence": (collected, [], TOKENS),
    "rotated pairs": (rotated, ["identity"], (4, 6)),
    "parallel branches": (parallel, [], (4, 6)),
    "all of it overwritten": (overwritten, ["identity"], (4, 6)),
    "a stack": (stacked, [], (4, 6)),
    "pieces of a split": (pieces_of_a_split, ["concat"], (4, 6)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_put_into_a_part(name):
    function, kinds, shape = OTHERS[name]
    model, x = Net(function), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = ss.find_shortcuts(model, x)
    assert [s.kind for s in found] == kinds, [(r.reason, r.source) for r in found.rejected]
    if kinds:
        with torch.no_grad():
            built, removed = model(x), ss.ablate(model, found)(x)
            assert torch.equal(ss.ablate(model, found, "detach")(x), built)
            assert torch.equal(ss.ablate(model, found, strength=1.0)(x), built)
            assert torch.equal(ss.ablate(model, found, strength=0.0)(x), removed)
            assert not torch.equal(removed, built)
    elif name != "rotated pairs":
        assert found.rejected


def test_the_steps_of_a_loop_are_listed_once():
    found = ss.find_shortcuts(Net(collected), torch.randn(TOKENS))
    assert [r.reason for r in found.rejected].count("stacked side by side") == 1


def test_a_stack_that_is_written_is_listed():
    found = ss.find_shortcuts(Net(stacked), torch.randn(4, 6))
    assert [r.reason for r in found.rejected] == ["stacked side by side"]
