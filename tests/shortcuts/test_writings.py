"""Shortcuts as other people write them: each kind of writing as the smallest network that has it."""

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
        self.f, self.g, self.h, self.wide = (nn.Linear(6, n) for n in (6, 6, 6, 12))
        self.w, self.m, self.mix = (nn.Parameter(torch.randn(shape)) for shape in ((6, 6), (6,), (3, 2)))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def copied_then_added(n, x):
    out = torch.empty_like(x).copy_(x)
    return out.add_(n.f(x).tanh())


def hyper_connections(n, x):
    mixed = torch.einsum("sn,nbd->sbd", n.mix, x)
    return mixed[1:] + n.f(mixed[0]).tanh()


def fused(n, x):
    a, b = n.wide(x).chunk(2, -1)
    return b + n.f(a.tanh())


def dora(n, x):
    y = n.f(x)
    scale = n.m / (n.f.weight + n.g.weight @ n.h.weight).norm(dim=1).detach()
    return y + ((scale - 1) * y + scale * n.g(n.h(x)))


def looked_at(n, x):
    y = x - n.f(x).tanh()
    n.far = float((y - x).abs().max())
    return y


def gated_by_itself(bend):
    return lambda n, x: bend(x) * n.f(x).tanh() + n.g(x).tanh()


class Scalars(nn.Module):
    """xIELU, as transformers has it: an activation function with two weights, and the smaller of two tensors in it."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.tensor(0.8)), nn.Parameter(torch.tensor(0.8))
        self.register_buffer("least", torch.tensor(-1e-6))

    def forward(self, x):
        below = (torch.expm1(torch.min(x, self.least)) - x) * self.down + 0.5 * x
        return torch.where(x > 0, self.up * x * x + 0.5 * x, below)


def test_the_smaller_of_two_is_no_pool():
    found = ss.find_shortcuts(nn.Sequential(nn.Linear(6, 6), Scalars()), torch.randn(4, 6))
    assert not len(found), [(s.kind, s.source) for s in found]


WRITINGS = {
    "an aten overload": (lambda n, x: torch.ops.aten.add.Tensor(x, n.f(x).tanh()), ["identity"]),
    "copied, then added": (copied_then_added, ["identity"]),
    "scaled by alpha": (lambda n, x: torch.add(n.f(x).tanh(), x, alpha=0.5), ["scaled"]),
    "the branch scaled by alpha": (lambda n, x: torch.add(x, n.f(x).tanh(), alpha=0.5), ["identity"]),
    "addmm of x itself": (lambda n, x: torch.addmm(x, x, n.w), ["identity"]),
    "scaled by beta": (lambda n, x: torch.addmm(x, x, n.w, beta=0.5, alpha=0.5), ["scaled"]),
    "streams mixed at once": (hyper_connections, ["projection"]),
    "both sides in one product": (fused, ["projection"]),
    "two maps, one after the other": (lambda n, x: n.h(n.g(x)) + n.f(n.f(x).relu()), ["projection"]),
    "two maps, side by side": (
        lambda n, x: torch.cat([n.g(x)[:, :3], n.h(x)[:, 3:]], -1) + n.f(n.f(x).relu()),
        ["projection"],
    ),
    "a gain on a linear map and a low-rank update": (dora, []),
    "a factor std(x)": (gated_by_itself(lambda x: x.std(1, keepdim=True)), []),
    "a factor sigmoid(x)": (gated_by_itself(torch.sigmoid), []),
    "only looked at": (looked_at, ["identity"]),
}


@pytest.mark.parametrize("name", WRITINGS)
def test_the_kind_does_not_depend_on_the_writing(name):
    function, kinds = WRITINGS[name]
    model, x = Net(function), torch.randn(2, 4, 6) if "streams" in name else torch.randn(4, 6)
    found = ss.find_shortcuts(model, x)
    assert [s.kind for s in found] == kinds, [(r.reason, r.source) for r in found.rejected]
    if kinds and "streams" not in name:
        assert torch.equal(ss.ablate(model, found, "detach")(x), model(x))
        assert not torch.equal(ss.ablate(model, found)(x), model(x))


def test_what_is_only_looked_at_leaves_the_true_shortcut_whole():
    model, x = Net(looked_at), torch.randn(4, 6)
    found = ss.find_shortcuts(model, x)
    assert [r.reason for r in found.rejected] == ["it leads to no output of the model"]
    torch.testing.assert_close(ss.ablate(model, found)(x), -model.f(x).tanh())


def sigmoid_of(n, x):
    return n.m.sin() * torch.sigmoid(n.h(x))


def branch_of(n, x):
    return n.f(n.f(x).relu())


def carried_by_lerp(n, x):
    y = n.g(x)
    return y + sigmoid_of(n, x) * (branch_of(n, x) - y)


def multiplied_out(n, x):
    y, t = n.g(x), torch.sigmoid(n.h(x))
    return y - t * y + t * branch_of(n, x)


def crossed(n, x):
    y, h = n.g(x), branch_of(n, x)
    return h + torch.sigmoid(n.h(x)) * (y - h)


def by_softmax(n, x):
    a, b = n.wide(x).view(-1, 2, 6).softmax(1).unbind(1)
    return a * branch_of(n, x) + b * n.g(x)


def simple_recurrent_unit(n, x):
    f = torch.sigmoid(n.h(x))
    return f * (n.f(x) * (1 - f)).tanh() + (1 - f) * n.g(x)


def gated(h, carry):
    """t H + (1 - t) of a carry."""

    def function(n, x):
        t = torch.sigmoid(n.h(x))
        return t * h(n, x) + (1 - t) * carry(n, x)

    return function


def linear(n, x):
    return n.g(x)


# Gates whose carry is a linear map, and what is none: both sides linear, both bent, a carry without a gate.
GATED_MAPS = {
    "t H + (1 - t) W x": (gated(branch_of, linear), ["gated"]),
    "a branch of one layer": (gated(lambda n, x: n.f(x).relu(), linear), ["gated"]),
    "two maps": (gated(branch_of, lambda n, x: F.linear(n.g(x), n.w)), ["gated"]),
    "two gates": (lambda n, x: x.new_ones(6) * torch.sigmoid(n.h(x)) * n.g(x) + branch_of(n, x), ["gated"]),
    "a softmax of two": (by_softmax, ["gated"]),
    "lerp": (lambda n, x: torch.lerp(n.g(x), branch_of(n, x), torch.sigmoid(n.h(x))), ["gated"]),
    "y + t (H - y)": (carried_by_lerp, ["gated"]),
    "H + c (y - H)": (crossed, ["gated"]),
    "y - t y + t H": (multiplied_out, ["gated"]),
    "addcmul": (
        lambda n, x: torch.addcmul(branch_of(n, x), torch.sigmoid(n.h(x)), n.g(x)),
        ["gated"],
    ),
    "the recurrent unit without recurrence": (simple_recurrent_unit, ["gated"]),
    "both sides linear": (gated(lambda n, x: F.linear(x, n.w), linear), []),
    "both sides bent": (gated(branch_of, lambda n, x: n.g(x).relu()), []),
    "no gate": (lambda n, x: n.h(x).relu() * n.g(x) + branch_of(n, x), []),
}


@pytest.mark.parametrize("name", GATED_MAPS)
def test_a_gate_whose_carry_is_a_linear_map(name):
    function, kinds = GATED_MAPS[name]
    model, x = Net(function), torch.randn(4, 6)
    found = ss.find_shortcuts(model, x)
    assert [s.kind for s in found] == kinds, [(r.reason, r.source) for r in found.rejected]
    if kinds:
        assert found[0].fork == "input"
        assert "g" in found[0].shortcut
        assert "f" in found[0].branch
        assert torch.equal(ss.ablate(model, found, "detach")(x), model(x))
        parts = ss.ablate(model, found)(x) + ss.ablate(model, found, "lesion")(x)
        torch.testing.assert_close(parts, model(x))


class Tokens(nn.Module):
    """Token ids that enter by what is not an embedding."""

    def __init__(self, enter):
        super().__init__()
        self.table, self.first = nn.Parameter(torch.randn(20, 6)), nn.Linear(20, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.enter = enter

    def forward(self, ids):
        x = self.enter(self, ids)
        for block in self.blocks:
            x = x + block(x).relu()
        return x


ENTRIES = {
    "indexing": lambda n, ids: n.table[ids],
    "index_select": lambda n, ids: n.table.index_select(0, ids.flatten()).view(*ids.shape, 6),
    "one-hot": lambda n, ids: n.first(F.one_hot(ids, 20).float()),
    "one-hot, by a product": lambda n, ids: F.one_hot(ids, 20).float() @ n.table,
    "embedding": lambda n, ids: F.embedding(ids, n.table),
}


@pytest.mark.parametrize("enter", ENTRIES)
def test_token_ids_count_however_they_enter(enter):
    torch.manual_seed(0)
    model, ids = Tokens(ENTRIES[enter]), torch.randint(0, 20, (4, 7))
    found = ss.find_shortcuts(model, ids)
    assert [s.name for s in found] == ["blocks.0", "blocks.1", "blocks.2"]
    first, *rest = found.boundaries
    assert first.kind == "input" and [b.name for b in rest] == ["blocks.0", "blocks.1", "blocks.2"]
    flow = ss.gradient_flow(model, (ids, torch.zeros(4, 7, 6)), F.mse_loss)
    assert len(flow.boundaries) == 4 and all(b.gradient_rms for b in flow.boundaries)


class LayerDrop(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = x if self.training and i % 2 else x + layer(x).tanh()
        return x


def test_what_did_not_run_is_listed():
    model, x = LayerDrop(), torch.randn(4, 6)
    found = ss.find_shortcuts(model.train(), x)
    assert found.not_run == ("layers.1", "layers.3") and "did not run" in str(found)
    assert ss.find_shortcuts(model.eval(), x).not_run == ()


class Decoder(nn.Module):
    """DeepLabV3+: low features pass a block of their own before they meet the enlarged high ones."""

    def __init__(self):
        super().__init__()
        conv = [
            nn.Conv2d(a, b, 3, s, 1) for a, b, s in ((3, 4, 1), (4, 6, 2), (6, 6, 1), (4, 2, 1), (8, 2, 1))
        ]
        self.low, self.down, self.high, self.reduce, self.head = conv

    def forward(self, x):
        low = self.low(x).relu()
        high = F.interpolate(self.high(self.down(low).relu()).relu(), scale_factor=2.0)
        return self.head(torch.cat([self.reduce(low).relu(), high], 1))


def test_a_decoder_skip_that_passes_a_block_is_listed_apart():
    torch.manual_seed(0)
    model, x = Decoder(), torch.randn(1, 3, 8, 8)
    found = ss.find_shortcuts(model, x)
    (passed,) = found.passed
    assert not len(found) and passed.shortcut == ("reduce",) and passed.kind == "concat"
    low = model.low(x).relu()
    high = F.interpolate(model.high(model.down(low).relu()).relu(), scale_factor=2.0)
    by_hand = model.head(torch.cat([torch.zeros(1, 2, 8, 8), high], 1))
    torch.testing.assert_close(ss.ablate(model, passed)(x), by_hand)


class TransformerDecoder(nn.Module):
    """UNETR: tokens of two layers are enlarged by blocks of their own before the decoder joins them."""

    def __init__(self):
        super().__init__()
        self.patches, self.one, self.two = nn.Conv2d(3, 6, 2, 2), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.image, self.skip = nn.Conv2d(3, 2, 3, 1, 1), nn.ConvTranspose2d(6, 4, 2, 2)
        self.up, self.join = nn.ConvTranspose2d(6, 4, 2, 2), nn.Conv2d(8, 2, 3, 1, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x, skip=1.0, image=1.0):
        low = self.patches(x)
        low = self.one(low).relu()
        high = self.two(low).tanh()
        y = self.join(torch.cat([self.up(self.two(high).relu()), skip * self.skip(low).relu()], 1)).relu()
        return self.head(torch.cat([y, image * self.image(x).relu()], 1))


def test_each_decoder_skip_that_passes_a_block_is_edited_by_itself():
    torch.manual_seed(0)
    model, x = TransformerDecoder(), torch.randn(1, 3, 8, 8)
    skip, image = ss.find_shortcuts(model, x).passed
    assert (skip.shortcut, image.shortcut) == (("skip",), ("image",))
    with torch.no_grad():
        built = model(x)
        for chosen, by_hand in (
            (skip, {"skip": 0.0}),
            (image, {"image": 0.0}),
            ([skip, image], {"skip": 0.0, "image": 0.0}),
        ):
            torch.testing.assert_close(ss.ablate(model, chosen)(x), model(x, **by_hand))
            assert torch.equal(ss.ablate(model, chosen, "detach")(x), built)
        torch.testing.assert_close(ss.ablate(model, skip, strength=0.25)(x), model(x, skip=0.25))
    ss.ablate(model, [skip, image], "detach")(x).sum().backward()


@pytest.mark.parametrize("join", [torch.maximum, torch.minimum, torch.logaddexp])
def test_what_is_joined_otherwise_than_by_a_sum_is_listed(join):
    found = ss.find_shortcuts(Net(lambda n, x: join(x, n.f(x).tanh())), torch.randn(4, 6))
    assert not len(found) and [r.name for r in found.rejected] == [join.__name__]


def test_a_gradient_set_inside_the_model():
    def forward(n, x):
        x.requires_grad = True
        return x + n.f(x).tanh()

    x = torch.randn(4, 6)
    assert [s.kind for s in ss.find_shortcuts(Net(forward), x)] == ["identity"] and not x.requires_grad


def test_complex_activations():
    model = Net(lambda n, x: x + x.tanh() @ n.w.to(x.dtype))
    assert [s.kind for s in ss.find_shortcuts(model, torch.randn(4, 6, dtype=torch.complex64))] == [
        "identity"
    ]


def gate(n, x):
    return n.g(x).sigmoid()


def branch(n, x):
    return n.f(x).tanh()


def turned(n, x):
    less = -gate(n, x)
    return x + less * x - less * branch(n, x)


ONE_GATE = {
    "H + c (x - H)": lambda n, x: (h := branch(n, x)) + gate(n, x) * (x - h),
    "H - c (H - x)": lambda n, x: (h := branch(n, x)) - gate(n, x) * (h - x),
    "c (x - H) + H": lambda n, x: gate(n, x) * (x - (h := branch(n, x))) + h,
    "H + w (x - H)": lambda n, x: (h := branch(n, x)) + n.m * (x - h),
    "x + n x - n H, n = -c used twice": turned,
}


@pytest.mark.parametrize("written", ONE_GATE)
def test_one_gate_is_one_shortcut(written):
    found = ss.find_shortcuts(Net(ONE_GATE[written]), torch.randn(4, 6))
    assert [entry.kind for entry in found] == ["scaled" if " w " in written else "gated"]
    assert "both" in found[0].sides
