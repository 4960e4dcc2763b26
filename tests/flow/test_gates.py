"""A gate t H + (1 - t) x is one thing however it is written: the same paths, split, costs and edits, to 1e-10."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import skipscope as ss
from flow import oracles
from skipscope.shortcuts.taps._gate_sides import Call, GateSides


def in_items(x):
    """The same, written into two halves of a new tensor."""
    out = torch.empty_like(x)
    out[:, :2], out[:, 2:] = x[:, :2], x[:, 2:]
    return out


WAYS = {
    "coupled": lambda x, H, t: t * H + (1 - t) * x,
    "reversed": lambda x, H, t: x * (1.0 - t) + H * t,
    "in place": lambda x, H, t: (t * H).add_((1 - t) * x),
    "difference": lambda x, H, t: x + t * (H - x),
    "difference first": lambda x, H, t: (H - x) * t + x,
    "difference from": lambda x, H, t: x + t * torch.rsub(x, H),
    "difference in functions": lambda x, H, t: torch.add(x, torch.mul(t, torch.sub(H, x))),
    "difference in place": lambda x, H, t: (H - x).mul_(t).add_(x),
    "difference viewed": lambda x, H, t: x + (t * (H - x).view(-1, 2, 3).permute(1, 0, 2).permute(1, 0, 2).reshape_as(x)),
    "difference in a buffer": lambda x, H, t: x + t * torch.empty_like(x).copy_(H - x),
    "difference in items": lambda x, H, t: x + t * in_items(H - x),
    "minus": lambda x, H, t: x - t * (x - H),
    "the negative": lambda x, H, t: x + (-t) * (x - H),
    "minus the negative": lambda x, H, t: x + -(t * (x - H)),
    "lerp": lambda x, H, t: torch.lerp(x, H, t),
    "lerp back": lambda x, H, t: torch.lerp(H, x, 1 - t),
    "lerp in place": lambda x, H, t: (x * 1.0).lerp_(H, t),
    "addcmul": lambda x, H, t: torch.addcmul(x, t, H - x),
    "addcmul turned": lambda x, H, t: torch.addcmul(x, H - x, t),
    "addcmul minus": lambda x, H, t: torch.addcmul(x, t, x - H, value=-1),
    "addcmul of the shortcut": lambda x, H, t: torch.addcmul(t * H, 1 - t, x),
    "addcmul of the branch": lambda x, H, t: torch.addcmul((1 - t) * x, t, H),
    "multiplied out": lambda x, H, t: x - t * x + t * H,
    "multiplied out, the branch first": lambda x, H, t: t * H + x - t * x,
    "multiplied out, x first": lambda x, H, t: x + t * H - t * x,
    "multiplied out, in brackets": lambda x, H, t: x + (t * H - t * x),
    "multiplied out, minus brackets": lambda x, H, t: -(t * x - t * H - x),
    "multiplied out beforehand": lambda x, H, t: (lambda tx: t * H + x - tx)(t * x),
    "multiplied out, negative": lambda x, H, t: sum([x, t * H, -(x * t)]),
    "multiplied out in place": lambda x, H, t: x.add(t * H).sub_(t * x),
    "multiplied out by rsub": lambda x, H, t: torch.rsub(t * x, x + t * H),
    "multiplied out by alpha": lambda x, H, t: torch.add(x + t * H, t * x, alpha=-1),
    "multiplied out by addcmul": lambda x, H, t: torch.addcmul(x, t, H) - t * x,
    "multiplied out by two addcmul": lambda x, H, t: torch.addcmul(torch.addcmul(x, t, H), t, x, value=-1),
    "multiplied out, crossed": lambda x, H, t: H - (1 - t) * H + (1 - t) * x,
    "multiplied out, crossed, x between": lambda x, H, t: H + (1 - t) * x - (1 - t) * H,
    "multiplied out, crossed, in brackets": lambda x, H, t: H + ((1 - t) * x - (1 - t) * H),
    "stacked": lambda x, H, t: (torch.stack([x, H]) * torch.stack([1 - t, t])).sum(0),
    "stacked last, the weights first": lambda x, H, t: torch.sum(torch.stack([t, 1 - t], -1) * torch.stack((H, x), -1), -1),
    "stacked, in place": lambda x, H, t: torch.stack([x, H], 1).mul_(torch.stack([1 - t, t], 1)).sum(1, True).squeeze(1),
    "stacked, by einsum": lambda x, H, t: torch.einsum("nbd,bnd->bd", torch.stack([x, H]), torch.stack([1 - t, t], 1)),
    "stacked, by matmul": lambda x, H, t: (torch.stack([1 - t, t], -1).unsqueeze(-2) @ torch.stack([x, H], -1).unsqueeze(-1)).flatten(-3),
    "stacked, by bmm": lambda x, H, t: torch.bmm(torch.stack([x, H], -1).view(-1, 1, 2), torch.stack([1 - t, t], -1).view(-1, 2, 1)).view_as(x),
    "weighted, then stacked": lambda x, H, t: torch.stack([(1 - t) * x, t * H], 1).sum(1),
    "concatenated": lambda x, H, t: (torch.cat([x[:, None], H[:, None]], 1) * torch.stack([1 - t, t], 1)).sum(1),
    "concatenated and viewed": lambda x, H, t: (torch.cat([x, H], -1).view(-1, 2, 6) * torch.stack([1 - t, t], 1)).sum(1),
    "crossed": lambda x, H, t: H + (1 - t) * (x - H),
    "crossed minus": lambda x, H, t: H - (1 - t) * (H - x),
    "crossed addcmul": lambda x, H, t: torch.addcmul(H, 1 - t, x - H),
}  # fmt: skip


class Highway(nn.Module):
    """One way of writing a highway layer; as the oracle, the canonical one with its branch marked."""

    def __init__(self, way=None, inner=None, width=6):
        super().__init__()
        self.inner = oracles.layer(width) if inner is None else inner
        self.gate, self.way, self.mark = nn.Linear(width, width), way, oracles.Branch()

    def forward(self, x):
        H, t = self.inner(x), torch.sigmoid(self.gate(x))
        return self.mark(t * H) + (1 - t) * x if self.way is None else WAYS[self.way](x, H, t)


def network(ways, width=6):
    torch.manual_seed(len(ways))
    return oracles.Chain(*[Highway(way, width=width) for way in ways], nn.Linear(width, 3)).double()


def loss(output, target):
    return output.square().mean()


def data(n=4, width=6):
    torch.manual_seed(7)
    return torch.randn(n, width, dtype=torch.float64), torch.zeros(1)


def check(model, canonical, batch, wrt=None, **options):
    canonical.load_state_dict(model.state_dict())
    of = None if wrt is None else dict(canonical.named_parameters())[wrt]
    by_length = oracles.by_enumeration(canonical, lambda y: loss(y, None), batch[0], of)
    expected = np.array([float(torch.as_tensor(g).norm()) for g in by_length])
    paths = ss.path_spectrum(model, batch, loss, wrt=wrt, **options)
    n = len(paths.norms)
    np.testing.assert_allclose(paths.norms, expected[:n], rtol=1e-10, atol=1e-13 * expected.max())
    np.testing.assert_allclose(expected[n:], 0, atol=1e-13 * expected.max())
    assert paths.residual < 1e-12


@pytest.mark.parametrize("way", WAYS)
def test_found_as_one_gate(way):
    model, (x, _) = network([way] * 3), data()
    found = ss.find_shortcuts(model, x)
    assert [s.kind for s in found] == ["gated"] * 3
    assert [s.fork for s in found] == ["input", *(f"{s.name} (merged)" for s in found[:2])] or len(
        {s.fork for s in found}
    ) == 3


@pytest.mark.parametrize("wrt", [None, "parts.0.gate.weight", "parts.1.inner.0.weight"])
@pytest.mark.parametrize("way", WAYS)
def test_the_paths(way, wrt):
    check(network([way] * 4), network([None] * 4), data(), wrt)


class Fusion(Highway):
    """The gate looks at H."""

    def forward(self, x):
        H = self.inner(x)
        t = torch.sigmoid(self.gate(H))
        return self.mark(t * H) + (1 - t) * x if self.way is None else WAYS[self.way](x, H, t)


@pytest.mark.parametrize("way", WAYS)
def test_gates_that_look_at_the_branch(way):
    torch.manual_seed(0)
    model, canonical = (
        oracles.Chain(*[Fusion(w) for _ in range(3)], nn.Linear(6, 3)).double() for w in (way, None)
    )
    assert [s.kind for s in ss.find_shortcuts(model, data()[0])] == ["gated"] * 3
    check(model, canonical, data())


@pytest.mark.parametrize("layers", range(1, 9))
def test_the_paths_of_networks_that_mix_ways(layers):
    ways = [list(WAYS)[(5 * i + layers) % len(WAYS)] for i in range(layers)]
    check(network(ways), network([None] * layers), data())


parts = st.recursive(
    st.sampled_from(list(WAYS)),
    lambda inner: st.tuples(st.sampled_from(["residual", "post", "scaled", *WAYS]), inner) | st.tuples(st.just("chain"), inner, inner),
    max_leaves=4,
)  # fmt: skip


def build(part, canonical):
    if isinstance(part, str):
        return Highway(None if canonical else part)
    kind, *inside = part
    inner = [build(p, canonical) for p in inside]
    if kind == "chain":
        return oracles.Chain(*inner)
    first = oracles.Chain(nn.Linear(6, 6), *inner)
    if kind == "post":
        return oracles.PostActivation(first)
    if kind in WAYS:
        return Highway(None if canonical else kind, oracles.Chain(first, nn.Tanh()))
    return oracles.Residual(first, scale=0.5 if kind == "scaled" else None)


@example(("residual", "multiplied out"), 0, False)
@example(("chain", "multiplied out, minus brackets", "difference viewed"), 0, False)
@settings(max_examples=40, deadline=None)
@given(parts, st.integers(0, 10**6), st.booleans())
def test_the_paths_of_nested_networks(part, seed, batched):
    torch.manual_seed(seed)
    model, canonical = (
        oracles.Chain(nn.Linear(6, 6), build(part, c), nn.Linear(6, 2)).double() for c in (False, True)
    )
    marks = sum(isinstance(m, oracles.Branch) for m in canonical.modules())
    if marks > 6:
        return
    check(model, canonical, data(3), batched=batched)


@pytest.mark.parametrize(
    "way", ["coupled", "difference", "lerp", "addcmul", "crossed", "multiplied out, x first", "stacked"]
)
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_paths_under_checkpointing(way, reentrant):
    model, canonical, batch = network([way] * 3), network([None] * 3), data()

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model.parts

        def forward(self, x):
            for part in self.parts:
                x = checkpoint(part, x, use_reentrant=reentrant)
            return x

    if not reentrant:
        check(Checkpointed(), canonical, batch)
        return
    with pytest.raises(ss.SkipscopeError, match="use_reentrant=False"):
        ss.path_spectrum(Checkpointed(), (batch[0].requires_grad_(), batch[1]), loss)


def test_dropout_between_the_difference_and_the_sum_is_drawn_once():
    class Dropped(Highway):
        def forward(self, x):
            H, t = self.inner(x), torch.sigmoid(self.gate(x))
            return x + nn.functional.dropout(t * (H - x), 0.5)

    class Canonical(Highway):
        def forward(self, x):
            H, t = self.inner(x), torch.sigmoid(self.gate(x))
            kept = nn.functional.dropout(torch.ones_like(x), 0.5)
            return self.mark(kept * t * H) + (1 - kept * t) * x

    torch.manual_seed(0)
    model = oracles.Chain(Dropped(), Dropped()).double()
    canonical, batch = oracles.Chain(Canonical(), Canonical()).double(), data()
    canonical.load_state_dict(model.state_dict())
    got = ss.path_spectrum(model, batch, loss)
    expected = ss.path_spectrum(canonical, batch, loss)
    np.testing.assert_allclose(got.norms, expected.norms, rtol=1e-10)
    assert got.residual < 1e-13 and expected.residual < 1e-13


@pytest.mark.parametrize("edit", [{"how": "remove"}, {"how": "detach"}, {"how": "lesion"}, {"strength": 0.4}])
@pytest.mark.parametrize(
    "way", ["difference", "lerp in place", "addcmul minus", "crossed", "multiplied out, x first", "stacked"]
)
def test_the_paths_of_edited_twins(way, edit):
    models, (x, y), norms = (network([way] * 3), network([None] * 3)), data(), []
    for model in models:
        found = ss.find_shortcuts(model, x)
        paths = ss.path_spectrum(ss.ablate(model, found[1:2], **edit), (x, y), loss, found=found)
        assert paths.residual < 1e-12
        norms.append(np.pad(paths.norms, (0, 4 - len(paths.norms))))
    np.testing.assert_allclose(*norms, rtol=1e-10, atol=1e-15)


# --- the split ---


@pytest.mark.parametrize("way", WAYS)
def test_the_split(way):
    """Branch: what comes by t H, through H and through t; shortcut: what comes by (1 - t) x, through x and through t."""
    model, (x, y) = network([way] * 3), data()
    split = ss.gradient_split(model, (x, y), loss)
    for k, row in enumerate(split):
        fork = oracles.Chain(*model.parts[:k])(x).detach().requires_grad_()
        block = model.parts[k]
        H, t = block.inner(fork), torch.sigmoid(block.gate(fork))
        sides = {"branch": t * H, "shortcut": (1 - t) * fork}
        (above,) = torch.autograd.grad(
            loss(oracles.Chain(*model.parts[k + 1 :])(merged := sum(sides.values())), y),
            merged,
            retain_graph=True,
        )
        grads = {
            side: torch.autograd.grad(value, fork, above, retain_graph=True)[0]
            for side, value in sides.items()
        }
        for side, g in grads.items():
            assert getattr(row, f"{side}_rms") == pytest.approx(float(g.square().mean().sqrt()), rel=1e-10)
        assert row.fork_rms == pytest.approx(float(sum(grads.values()).square().mean().sqrt()), rel=1e-10)
        cosine = torch.cosine_similarity(grads["branch"].flatten(), grads["shortcut"].flatten(), 0)
        assert row.cosine == pytest.approx(float(cosine), abs=1e-10)
        assert row.residual < 1e-14 and row.other_rms is None


# --- importance, and the edits behind it ---


@pytest.mark.parametrize("way", WAYS)
def test_the_importance(way):
    batch = data()
    model, canonical = network([way] * 3), network([None] * 3)
    got, expected = ss.importance(model, batch, loss), ss.importance(canonical, batch, loss)
    for a, b in zip(got, expected, strict=True):
        for mine, other in ((a.removed, b.removed), (a.lesioned, b.lesioned)):
            assert mine.loss == pytest.approx(other.loss, rel=1e-10)
            assert mine.fall_decades == pytest.approx(other.fall_decades, rel=1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_the_edits_are_those_of_the_table(way):
    model, (x, _) = network([way]), data()
    block, head = model.parts
    found, x = ss.find_shortcuts(model, x), x.requires_grad_()
    H, t = block.inner(x), torch.sigmoid(block.gate(x))
    expected = {
        "remove": t * H, "detach": t * H + (1 - t) * x.detach(), "lesion": (1 - t) * x, 0.3: t * H + 0.3 * (1 - t) * x,
    }  # fmt: skip
    for edit, value in expected.items():
        twin = (
            ss.ablate(model, found, edit) if isinstance(edit, str) else ss.ablate(model, found, strength=edit)
        )
        y = head(value)
        torch.testing.assert_close(twin(x), y, rtol=1e-12, atol=1e-12)
        if edit == "detach":
            assert torch.equal(twin(x), model(x))
        grads = [torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for out in (twin(x), y)]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weight", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
def test_a_call_in_place_gives_each_side_its_own_and_leaves_its_operand(weight):
    draw = torch.Generator().manual_seed(0)
    x, made, *sides = (torch.randn(3, 4, generator=draw) for _ in range(4))
    gate = GateSides({"shortcut": (), "branch": ()})
    gate.follow(made, dict(zip(("shortcut", "branch"), sides, strict=True)))
    before = x.clone()
    given = gate.on_each_side(Call(None, torch.Tensor.lerp_, (x, made, weight), {}))
    assert torch.equal(x, before)
    for name, side in zip(("shortcut", "branch"), sides, strict=True):
        torch.testing.assert_close(given[name], 0.75 * before + 0.25 * side)
