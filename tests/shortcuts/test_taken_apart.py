"""Parts of one product as sides of a merge, factors that carry nothing, and streams of one token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import skipscope as ss
from skipscope.shortcuts.finding._parts import _ranges_overlap


class Net(nn.Module):
    """A network of one function of itself and x."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(6, 6) for _ in range(5))
        self.two, self.three = nn.Linear(6, 12), nn.Linear(6, 18)
        self.conv, self.conv_two = nn.Conv1d(6, 6, 3, padding=1), nn.Conv1d(6, 12, 1)
        self.steps, self.function = nn.Parameter(torch.randn(10, 5)), function

    def branch(self, x):
        return self.b(self.a(x).relu())

    def other(self, x):
        return self.e(self.d(x).tanh())

    def convs(self, x):
        return self.conv(self.conv(x).relu())

    def forward(self, x):
        return self.function(self, x)


def dotted(n, x):
    return torch.einsum("...d,od->...o", x, n.two.weight).chunk(2, -1)


def halves(n, x):
    return n.two(x).chunk(2, -1)


def thirds(n, x):
    return n.three(x).chunk(3, -1)


def gate(n, x):
    return n.c(x).sigmoid()


TOKENS, IMAGE = (4, 5, 6), (4, 6, 8)
# What is built, the kinds of its shortcuts, the shape of its input, and what is left without them.
PARTS = {
    "the gate of x": (lambda n, x: halves(n, x)[1] * gate(n, x) + n.branch(halves(n, x)[0]), ["gated"], (4, 6), None),
    "one product": (
        lambda n, x: (lambda a, b: b * gate(n, x) + n.branch(a))(*halves(n, x)),
        ["gated"],
        (4, 6),
        lambda n, x: n.branch(halves(n, x)[0]),
    ),
    "the gate a part too": (
        lambda n, x: (lambda a, b, c: b * c.sigmoid() + n.branch(a))(*thirds(n, x)),
        ["gated"],
        (4, 6),
        lambda n, x: n.branch(thirds(n, x)[0]),
    ),
    "both sides gated": (
        lambda n, x: (lambda a, b, c: c.sigmoid() * n.branch(a) + (1 - c.sigmoid()) * b)(*thirds(n, x)),
        ["gated"],
        (4, 6),
        lambda n, x: (lambda a, b, c: c.sigmoid() * n.branch(a))(*thirds(n, x)),
    ),
    "lerp": (
        lambda n, x: (lambda a, b, c: torch.lerp(b, n.branch(a), c.sigmoid()))(*thirds(n, x)),
        ["gated"],
        (4, 6),
        lambda n, x: (lambda a, b, c: c.sigmoid() * n.branch(a))(*thirds(n, x)),
    ),
    "addcmul": (
        lambda n, x: (lambda a, b: torch.addcmul(n.branch(a), b, gate(n, a)))(*halves(n, x)),
        ["gated"],
        (4, 6),
        lambda n, x: n.branch(halves(n, x)[0]),
    ),
    "a difference": (
        lambda n, x: (lambda a, b: b + gate(n, x) * (n.branch(a) - b))(*halves(n, x)),
        ["gated"],
        (4, 6),
        lambda n, x: gate(n, x) * n.branch(halves(n, x)[0]),
    ),
    "multiplied out": (
        lambda n, x: (lambda a, b: b - gate(n, x) * b + gate(n, x) * n.branch(a))(*halves(n, x)),
        ["gated"],
        (4, 6),
        None,
    ),
    "slices": (
        lambda n, x: (lambda m: n.branch(m[:, :6]) + m[:, 6:12] * m[:, 12:].sigmoid())(n.three(x)),
        ["gated"],
        (4, 6),
        lambda n, x: n.branch(n.three(x)[:, :6]),
    ),
    "a view": (
        lambda n, x: (lambda m: m[:, 0] * m[:, 1].sigmoid() + n.branch(m[:, 2]))(n.three(x).view(-1, 3, 6)),
        ["gated"],
        (4, 6),
        lambda n, x: n.branch(n.three(x)[:, 12:]),
    ),
    "the branch gated by a part": (
        lambda n, x: (lambda a, b, c: b + c.sigmoid() * n.branch(a))(*thirds(n, x)),
        ["projection"],
        (4, 6),
        lambda n, x: (lambda a, b, c: c.sigmoid() * n.branch(a))(*thirds(n, x)),
    ),
    "channels of a convolution": (
        lambda n, x: (lambda a, b: b + n.convs(a))(*n.conv_two(x).chunk(2, 1)),
        ["projection"],
        IMAGE,
        lambda n, x: n.convs(n.conv_two(x).chunk(2, 1)[0]),
    ),
    "normed before parting": (
        lambda n, x: (lambda a, b: b + n.branch(a))(*F.layer_norm(n.two(x), (12,)).chunk(2, -1)),
        ["projection"],
        (4, 6),
        lambda n, x: n.branch(F.layer_norm(n.two(x), (12,))[:, :6]),
    ),
    "turned before parting": (
        lambda n, x: (lambda a, b: b.mT + n.branch(a.mT))(*n.two(x).mT.chunk(2, 1)),
        ["projection"],
        TOKENS,
        lambda n, x: n.branch(halves(n, x)[0]),
    ),
    "heads": (
        lambda n, x: (lambda m: m[1] + n.branch(m[0]))(n.two(x).view(4, 5, 2, 6).permute(2, 0, 1, 3)),
        ["projection"],
        TOKENS,
        lambda n, x: n.branch(halves(n, x)[0]),
    ),
    "a stack summed": (
        lambda n, x: torch.stack([halves(n, x)[1], n.branch(halves(n, x)[0])]).sum(0),
        ["projection"],
        (4, 6),
        lambda n, x: n.branch(halves(n, x)[0]),
    ),
    "steps made by weights": (
        lambda n, x: (lambda y: y[:, 5:] + n.branch(y[:, :5]))(torch.einsum("ts,bsd->btd", n.steps, x)),
        ["projection"],
        TOKENS,
        lambda n, x: n.branch((n.steps @ x)[:, :5]),
    ),
    "features named after dots": (
        lambda n, x: (lambda a, b: b + n.branch(a))(*dotted(n, x)),
        ["projection"],
        TOKENS,
        lambda n, x: n.branch(dotted(n, x)[0]),
    ),
    "halves of the batch": (lambda n, x: (lambda h: h[:2] + n.branch(h[2:]))(n.c(x)), [], TOKENS, None),
    "halves of the image": (lambda n, x: (lambda a, b: b + n.convs(a))(*n.conv(x).chunk(2, 2)), [], IMAGE, None),
    "features after mixing steps": (
        lambda n, x: (lambda y: y[..., :3] + n.branch(y[..., 3:].repeat(1, 1, 2))[..., :3])(n.steps @ x),
        [],
        TOKENS,
        None,
    ),
    "a recurrence over what a layer made": (
        lambda n, x: (lambda h: h[:, 2] + n.branch(h[:, 1] + n.branch(h[:, 0])))(n.c(x)),
        [],
        TOKENS,
        None,
    ),
    "gates of each other": (
        lambda n, x: (lambda a, b, c: a * b.sigmoid() + c * a.sigmoid())(*thirds(n, x)),
        [],
        (4, 6),
        None,
    ),
    "bent before parting": (
        lambda n, x: (lambda a, b: b + n.branch(a))(*n.two(x).tanh().chunk(2, -1)),
        [],
        (4, 6),
        None,
    ),
}  # fmt: skip
# By a factor of x without weights: whether F(x) times it, beside G(x), is gated.
FACTORS = {
    "x": (lambda x: x, True),
    "twice x": (lambda x: x * 2, True),
    "a mean": (lambda x: x.mean(-1, keepdim=True), True),
    "the largest": (lambda x: x.amax(-1, keepdim=True), False),
    "the largest, and where it is": (lambda x: x.max(-1, keepdim=True)[0], False),
    "a pool": (lambda x: F.adaptive_max_pool1d(x.unsqueeze(1), 1).squeeze(1), False),
    "the smallest, scaled": (lambda x: x.amin(-1, keepdim=True) * 2, False),
    "by way of copies": (lambda x: x.unsqueeze(1).expand(-1, 6, -1).amax(-1), False),
    "a deviation": (lambda x: x.std(-1, keepdim=True), False),
    "a norm": (lambda x: x.norm(dim=-1, keepdim=True), False),
    "a sigmoid": (lambda x: x.sigmoid(), False),
    "a ReLU by hand": (lambda x: torch.where(x > 0, x, 0 * x), False),
    "an inverse": (lambda x: 1 / x, False),
}
# x with a function of itself, beside F(x): the kinds.
SIDES = {
    "over its largest": (lambda x: x / x.amax(-1, keepdim=True), []),
    "over its sum": (lambda x: x / x.sum(-1, keepdim=True), []),
    "times its mean": (lambda x: x.mean(-1, keepdim=True) * x, []),
    "times its neighbour": (lambda x: x * x.roll(1, -1), []),
    "inverted": (lambda x: torch.div(torch.ones(4, 6), x + 9), []),
    "a leaky ReLU by hand": (lambda x: torch.where(x > 0, x, 0.1 * x), []),
    "what is negative filled": (lambda x: x.masked_fill(x < 0, 0), []),
    "padded rows filled": (lambda x: x.masked_fill(x.abs().sum(-1, keepdim=True) == 0, 0), ["identity"]),
    "a pool of stride one": (lambda x: F.max_pool1d(x.unsqueeze(1), 3, 1, 1).squeeze(1), ["identity"]),
}


def kinds_of(function, shape=(4, 6)):
    model, x = Net(function), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = ss.find_shortcuts(model, x)
    return [s.kind for s in found], found, model, x


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_one_product(name):
    function, kinds, shape, without = PARTS[name]
    got, found, model, x = kinds_of(function, shape)
    assert got == kinds, [(r.reason, r.source) for r in found.rejected]
    if not kinds:
        return
    assert found[0].fork == "input"
    with torch.no_grad():
        built, removed = model(x), ss.ablate(model, found)(x)
        assert torch.equal(ss.ablate(model, found, "detach")(x), built)
        assert torch.equal(ss.ablate(model, found, strength=1.0)(x), built)
        assert torch.equal(ss.ablate(model, found, strength=0.0)(x), removed)
        assert not torch.equal(removed, built)
        if without is not None:
            torch.testing.assert_close(removed, without(model, x))


@pytest.mark.parametrize("name", FACTORS)
def test_a_factor_that_bends_x_is_no_gate(name):
    factor, is_gated = FACTORS[name]
    writings = (
        lambda n, x: factor(x) * n.branch(x) + n.other(x),
        lambda n, x: torch.addcmul(n.other(x), factor(x), n.branch(x)),
    )
    for function in writings:
        assert kinds_of(function)[0] == ["gated"] * is_gated
    assert kinds_of(lambda n, x: x + n.branch(x) * factor(x))[0] == ["identity"]


@pytest.mark.parametrize("name", SIDES)
def test_what_x_does_to_itself_without_weights(name):
    side, kinds = SIDES[name]
    assert kinds_of(lambda n, x: side(x) + n.branch(x))[0] == kinds


def test_divisors_and_weights_of_lerp_are_no_sides():
    assert kinds_of(lambda n, x: torch.addcdiv(n.other(x), x, n.branch(x)))[0] == ["gated"]
    assert kinds_of(lambda n, x: torch.addcdiv(n.other(x), n.branch(x), x))[0] == []
    assert kinds_of(lambda n, x: n.branch(x) / x.sum(-1, keepdim=True) + n.other(x))[0] == []
    assert kinds_of(lambda n, x: torch.lerp(n.other(x), n.branch(x), x.mean(-1, keepdim=True)))[0] == []
    assert kinds_of(lambda n, x: torch.lerp(x, n.branch(x), x.mean(-1, keepdim=True)))[0] == ["gated"]


class Query(nn.Module):
    """A learned token that looks at the data, as a class token that enters late does."""

    def __init__(self, spread):
        super().__init__()
        torch.manual_seed(0)
        self.token, self.norm = nn.Parameter(torch.randn(1, 1, 6)), nn.LayerNorm(6)
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)
        self.feed, self.spread = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)), spread

    def forward(self, x):
        q = self.spread(self.token, len(x))
        q = q + self.attend(q.expand(len(x), -1, -1), x, x)[0]
        return q + self.feed(self.norm(q))


SPREADS = {
    "expanded": lambda q, n: q.expand(n, -1, -1),
    "repeated": lambda q, n: q.repeat(n, 1, 1),
    "as it is": lambda q, n: q,
    "a vector, tiled": lambda q, n: q.view(6).tile(n, 1)[:, None],
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("spread", SPREADS)
def test_a_stream_of_one_token_begins_in_weights_at_any_batch_size(spread, count):
    model, x = Query(SPREADS[spread]).eval(), torch.randn(count, 5, 6)
    found = ss.find_shortcuts(model, x)
    assert [(s.kind, s.fork) for s in found] == [("identity", "weights"), ("identity", "attend (merged)")]
    assert torch.equal(ss.ablate(model, found, "detach")(x), model(x))


@pytest.mark.parametrize("count", [1, 3])
def test_a_bias_for_all_tokens_is_no_stream(count):
    def forward(n, x):
        h = n.a(x) + n.c.bias
        return h + n.branch(h)

    got, found, *_ = kinds_of(forward, (count, 5, 6))
    assert got == ["identity"] and found[0].fork != "weights"


ranges = st.builds(
    lambda start, count, step: range(start, start + count * step, step),
    *map(st.integers, (0, 0, 1), (40, 64, 5)),
)


@given(ranges, ranges)
def test_parts_meet_where_they_hold_the_same_place(one, other):
    assert _ranges_overlap(one, other) == _ranges_overlap(other, one) == bool(set(one) & set(other))
