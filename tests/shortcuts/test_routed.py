"""Tokens that a mask routes: a block for some beside another for the rest is no shortcut; a mask that lets rows pass is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import skipscope as ss


class Net(nn.Module):
    """A network of one function of itself and x."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.function = nn.Linear(6, 6), nn.Linear(6, 3), function
        self.a, self.b = (nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)) for _ in range(2))

    def forward(self, x):
        return self.last(self.function(self, self.first(x)))


def rows(x):
    return x.sum(-1) > 0


def scattered(n, x):
    m = rows(x)
    y = x.masked_scatter(m.unsqueeze(-1), n.a(x[m]))
    return y.masked_scatter(~m.unsqueeze(-1), n.b(y[~m]))


def by_position(n, x):
    m = torch.arange(len(x)) % 2 == 0
    y = x.masked_scatter(m[:, None], n.a(x[m]))
    return y.masked_scatter((~m)[:, None], n.b(y[~m]))


def where(n, x):
    m = rows(x)[:, None]
    y = torch.where(m, n.a(x), x)
    return torch.where(~m, n.b(y), y)


def where_comparisons(n, x):
    total = x.sum(-1, keepdim=True)
    y = torch.where(total > 0, n.a(x), x)
    return torch.where(total <= 0, n.b(y), y)


def where_method(n, x):
    m = rows(x)[:, None]
    y = n.a(x).where(m, x)
    return y.where(m, n.b(y))


def assigned(n, x):
    m, y = rows(x), x.clone()
    y[m] = n.a(x[m])
    y[m.logical_not()] = n.b(x[~m])
    return y


def assigned_to_zeros(n, x):
    m, y = rows(x), torch.zeros_like(x)
    y[m] = n.a(x[m])
    y[~m] = n.b(x[~m])
    return y


ROUTED = (
    scattered, by_position, where, where_comparisons, where_method, assigned, assigned_to_zeros,
)  # fmt: skip


def one_block(n, x):
    m, y = rows(x), x.clone()
    y[m] = n.a(x[m])
    return y


def another_mask(n, x):
    y = torch.where(rows(x)[:, None], n.a(x), x)
    return torch.where(~(x[:, :1] > 0), n.b(y), y)


def the_same_mask(n, x):
    m = rows(x)[:, None]
    y = torch.where(m, n.a(x), x)
    return torch.where(m, n.b(y), y)


def read_elsewhere(n, x):
    m = rows(x)[:, None]
    y = torch.where(m, n.a(x), x)
    return y * 2 + torch.where(~m, n.b(y), y)


def put_back(n, x):
    m = rows(x)[:, None]
    return torch.where(m, x, torch.where(~m, n.a(x), x))


def around(n, x):
    return x + assigned(n, x)


def added(n, x):
    m, y = rows(x), x.clone()
    y[m] += n.a(x[m])
    return y


PASSING = {
    one_block: ["gated"],
    another_mask: ["gated", "gated"],
    the_same_mask: ["gated", "gated"],
    read_elsewhere: ["gated", "scaled"],
    put_back: ["gated"],
    around: ["identity"],
    added: ["identity"],
}


def x_():
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("function", ROUTED, ids=lambda f: f.__name__)
def test_two_blocks_for_the_two_sides_of_a_mask_are_parallel(function):
    found = ss.find_shortcuts(Net(function), x_())
    assert not len(found), [(s.kind, s.source) for s in found]
    assert {r.reason for r in found.rejected} == {"parallel branches"}


@pytest.mark.parametrize("function", PASSING, ids=lambda f: f.__name__)
def test_rows_that_pass_are_a_shortcut(function):
    model, x = Net(function), x_()
    found = ss.find_shortcuts(model, x)
    assert [s.kind for s in found] == PASSING[function], [(r.reason, r.source) for r in found.rejected]
    with torch.no_grad():
        built = model(x)
        assert torch.equal(ss.ablate(model, found, "detach")(x), built)
        assert not torch.equal(ss.ablate(model, found)(x), built)


class Experts(nn.Module):
    """A block for each id: what it is given takes the place of the rows that have this id."""

    def __init__(self, put, ids):
        super().__init__()
        torch.manual_seed(0)
        self.experts, self.put, self.ids = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), put, ids

    def forward(self, x):
        y, ids = x.clone(), torch.arange(len(x)) % self.ids
        for i, expert in enumerate(self.experts):
            y = self.put(y, ids == i, expert, x)
        return y


def by_rows(y, m, expert, x):
    y[m] = expert(x[m]).relu()
    return y


def by_rows_of_the_result(y, m, expert, x):
    y[m] = expert(y[m]).relu()
    return y


def by_numbers(y, m, expert, x):
    return y.index_copy(0, m.nonzero()[:, 0], expert(x[m]).relu())


PUTTING = {
    "rows": by_rows, "rows of the result": by_rows_of_the_result, "numbers": by_numbers,
    "where": lambda y, m, expert, x: torch.where(m[:, None], expert(x).relu(), y),
    "where not": lambda y, m, expert, x: torch.where(~m[:, None], y, expert(x).relu()),
    "scattered": lambda y, m, expert, x: y.masked_scatter(m[:, None], expert(x[m]).relu()),
}  # fmt: skip


@pytest.mark.parametrize("put", PUTTING.values(), ids=PUTTING)
def test_rows_of_which_each_has_its_own_block_pass_nowhere(put):
    found = ss.find_shortcuts(Experts(put, ids=3), x_())
    assert not len(found), [(s.kind, s.source) for s in found]
    assert {r.reason for r in found.rejected} == {"parallel branches"}
    # Rows of an id that no block has pass by all of them.
    passing = ss.find_shortcuts(Experts(put, ids=4), x_())
    assert {s.kind for s in passing} == {"concat" if put is by_numbers else "gated"}


class Captions(nn.Module):
    """The features of an image stand in place of some tokens of a text."""

    def __init__(self, replace):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.see, self.replace = nn.Embedding(20, 6), nn.Linear(5, 6), replace
        self.norm, self.block, self.last = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 20)

    def forward(self, ids, image):
        x = self.replace(self.embed(ids), ids == 19, self.see(image).relu())
        return self.last(x + self.block(self.norm(x)).tanh())


def put_in(x, m, seen):
    x = x.clone()
    x[m] = seen.flatten(0, 1)
    return x


def gathered(x, m, seen):
    places = (m.flatten().cumsum(0) - 1).clamp(min=0)
    return torch.where(m[..., None], seen.flatten(0, 1)[places].view_as(x), x)


REPLACING = {
    "masked_scatter": lambda x, m, seen: x.masked_scatter(m[..., None], seen),
    "expanded mask": lambda x, m, seen: x.masked_scatter(m[..., None].expand_as(x), seen),
    "assigned": put_in,
    "where": gathered,
    "a sum of both": lambda x, m, seen: x * ~m[..., None] + gathered(x, m, seen) * m[..., None],
}


@pytest.mark.parametrize("replace", REPLACING.values(), ids=REPLACING)
def test_an_image_in_place_of_tokens_is_no_shortcut(replace):
    ids, image = torch.tensor([[1, 19, 19, 4], [19, 3, 5, 19]]), torch.randn(2, 2, 5)
    found = ss.find_shortcuts(Captions(replace), (ids, image))
    assert [(s.kind, s.branch) for s in found] == [("identity", ("norm", "block"))]
