"""Parts of a tensor: told however they are cut out, and only what has the same part is bypassed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from skipscope.shortcuts import ablate, find_shortcuts, record
from skipscope.shortcuts.finding._parts import part_after, whole

SHAPE = (4, 3, 6)
CUTS = {
    "select": lambda x, d, i: x.select(d, i % x.shape[d]),
    "select from the back": lambda x, d, i: x.select(d, -1 - i % x.shape[d]),
    "slice": lambda x, d, i: x.narrow(d, i % x.shape[d], max(1, (x.shape[d] - i % x.shape[d]) // 2)),
    "every second": lambda x, d, i: torch.ops.aten.slice(x, d, i % 2 if x.shape[d] > 1 else 0, None, 2),
    "slice from the back": lambda x, d, i: torch.ops.aten.slice(x, d, -1 - i % x.shape[d], None),
    "chunk": lambda x, d, i: (c := x.chunk(3, d))[i % len(c)],
    "split": lambda x, d, i: (c := x.split(2, d))[i % len(c)],
    "split by sizes": lambda x, d, i: (c := x.split([1, x.shape[d] - 1] if x.shape[d] > 1 else [1], d))[i % len(c)],
    "unbind": lambda x, d, i: x.unbind(d)[i % x.shape[d]],
    "index": lambda x, d, i: x.index_select(d, torch.tensor([i % x.shape[d]])),
    "list": lambda x, d, i: x[(slice(None),) * d + ([-1 - i % x.shape[d]],)],
    "flip": lambda x, d, i: x.flip(d),
    "transpose": lambda x, d, i: x.transpose(d, i % x.ndim),
    "permute": lambda x, d, i: x.permute([(k + i) % x.ndim for k in range(x.ndim)]),
    "unsqueeze": lambda x, d, i: x.unsqueeze(d),
    "squeeze": lambda x, d, i: x.squeeze(),
    "view": lambda x, d, i: x.reshape(*x.shape[:d], 1, *x.shape[d:]),
    "copy": lambda x, d, i: x.clone(),
}  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(list(CUTS)), st.integers(0, 5), st.integers(0, 5)), max_size=6))
def test_a_part_is_the_elements_that_it_has(steps):
    class Cutting(nn.Module):
        def forward(self, x):
            for name, d, i in steps:
                if x.ndim:
                    x = CUTS[name](x, d % x.ndim, i)
            return x

    x, model, kept = torch.arange(float(math.prod(SHAPE))).reshape(SHAPE), Cutting(), []
    trace = record(model, lambda: kept.append(model(x)))
    (y,) = kept
    (at,) = trace.outputs
    ways = []
    while at not in trace.inputs:
        ways.append(at)
        at = trace.operands_of(at)[0]
    part = whole(SHAPE)
    for value in reversed(ways):
        part = part_after(trace, value, part)
        assert part is not None
    has = torch.ones(SHAPE, dtype=torch.bool)
    for axis, run in part.limits.items():
        here = torch.zeros(SHAPE[axis], dtype=torch.bool)
        here[list(run)] = True
        has &= here.reshape([-1 if k == axis else 1 for k in range(3)])
    assert set(y.flatten().tolist()) == set(x[has].tolist())
    assert part.shape == tuple(y.shape)


class Recurrent(nn.Module):
    """A recurrence that takes each of its steps from the whole sequence anew."""

    def __init__(self, take, cell):
        super().__init__()
        self.take, self.cell = take, cell
        self.first, self.last, self.both = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(10, 5)

    def forward(self, x):
        h = self.first(self.take(x, 0)).tanh()
        for t in range(1, 4):
            h = CELLS[self.cell](self, self.take(x, t), h)
        return h


EDITS = {"strength": {"strength": 0.3}} | {how: {"how": how} for how in ("remove", "detach", "lesion")}
CELLS = {
    "concatenated": lambda net, v, h: net.both(torch.cat([v, h], -1)).tanh(),
    "added": lambda net, v, h: (v + net.last(h)).tanh(),
    "two maps": lambda net, v, h: (net.first(v) + net.last(h)).tanh(),
    "residual": lambda net, v, h: h + net.both(torch.cat([v, h], -1)).tanh(),
}
TAKES = {
    "a step": lambda x, t: x[:, t],
    "from a part": lambda x, t: x[:, 1:][:, t],
    "of a part of a part": lambda x, t: x[:, 1:][:, :-1].select(1, t),
    "unbound": lambda x, t: x.unbind(1)[t],
    "unbound from a part": lambda x, t: x[:, 1:].unbind(1)[t],
    "split": lambda x, t: x.split(1, 1)[t].squeeze(1),
    "chunked": lambda x, t: x.chunk(6, 1)[t][:, 0],
    "narrowed": lambda x, t: x.narrow(1, t, 1).squeeze(1),
    "a slice": lambda x, t: x[:, t : t + 1].flatten(1),
    "transposed": lambda x, t: x.transpose(0, 1)[t],
    "backwards": lambda x, t: x.flip(1)[:, t],
    "by a list": lambda x, t: x[:, [t]].squeeze(1),
    "scaled": lambda x, t: (x * 2)[:, t],
}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("take", TAKES)
def test_other_steps_of_a_sequence_are_not_bypassed(take, cell):
    found = find_shortcuts(Recurrent(TAKES[take], cell), torch.linspace(-1, 1, 60).reshape(2, 6, 5).sin())
    assert [s.kind for s in found] == ["identity"] * 3 * (cell == "residual")


class Halves(nn.Module):
    """Half of the channels go through a layer: added to the other half, to the same half, or put beside it."""

    def __init__(self, cut, join):
        super().__init__()
        self.cut, self.join, self.lin = cut, join, nn.Linear(4, 4)

    def forward(self, x):
        a, b = self.cut(x)
        return {
            "other": lambda: a + self.lin(b).relu(),
            "same": lambda: a + self.lin(self.cut(x)[0]).relu() + b,
            "beside": lambda: torch.cat([a, self.lin(b).relu()], -1),
            "put back": lambda: torch.cat([a + self.lin(b).relu(), b], -1),
            "put back in places": lambda: torch.cat([b, self.lin(b).relu() - a], -1),
            "put back in part": lambda: torch.cat([a + self.lin(b).relu(), b[:, 1:]], -1),
            "put back changed": lambda: torch.cat([a + self.lin(b).relu(), b.tanh()], -1),
        }[self.join]()


HALVES = {
    "chunk": lambda x: x.chunk(2, -1),
    "split": lambda x: x.split([4, 4], -1),
    "slices": lambda x: (x[:, :4], x[:, 4:]),
    "view": lambda x: x.view(-1, 2, 4).unbind(1),
}


JOINS = {
    "other": [],
    "same": ["identity"],
    "beside": ["concat"],
    "put back": ["identity", "concat"],
    "put back in places": ["identity", "concat"],
    "put back in part": ["concat"],
    "put back changed": [],
}


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("cut", HALVES)
def test_the_other_half_is_bypassed_only_where_both_are_put_back(cut, join):
    found = find_shortcuts(Halves(HALVES[cut], join), torch.linspace(-1, 1, 24).reshape(3, 8))
    kinds = JOINS[join]
    if cut == "view" and join != "same":  # single steps: of these only what F was made from is bypassed
        kinds = ["concat"] * ("concat" in kinds and join != "beside")
    assert [s.kind for s in found] == kinds


@pytest.mark.parametrize("how", ["remove", "detach", "lesion", "strength"])
def test_a_coupling_edited_is_the_whole_of_x_edited(how):
    """[a + F(b), b] = x + [F(b), 0]."""
    torch.manual_seed(0)
    model, x = Halves(HALVES["chunk"], "put back"), torch.randn(3, 8, requires_grad=True)
    found = find_shortcuts(model, x.detach())
    twin = ablate(model, found if how != "lesion" else found[:1], **EDITS[how])
    f = torch.cat([model.lin(x[:, 4:]).relu(), torch.zeros(3, 4)], -1)
    by_hand = {"remove": lambda: f, "detach": lambda: x.detach() + f, "lesion": lambda: x + 0 * f}
    expected, y = by_hand.get(how, lambda: 0.3 * x + f)(), twin(x)
    torch.testing.assert_close(y, expected)
    for one, other in zip(*(torch.autograd.grad(v.square().sum(), x) for v in (y, expected))):
        torch.testing.assert_close(one, other)
