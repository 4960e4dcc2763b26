"""Random networks with planted shortcuts of every kind: exactly those are found, and editing them is exact."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from skipscope.shortcuts import ablate, find_shortcuts

ACTIVATIONS = [torch.relu, torch.tanh, nn.functional.gelu, nn.functional.silu]


class Planted(nn.Module):
    """One block: a branch of ``depth`` layers, maybe with a block inside, and what passes it."""

    def __init__(self, width, kind, depth, activation, writing, inner=None):
        super().__init__()
        self.kind, self.activation, self.writing, self.inner = kind, activation, writing, inner
        out = width + 1 if kind == "projection" else width
        sizes = [width] * depth + [out]
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(sizes)])
        self.norm = nn.LayerNorm(width)
        if kind == "projection":
            self.side = nn.Linear(width, out)
        if kind == "gated":
            self.gate = nn.Linear(width, width)
        self.out = out + width if kind == "concat" else out

    def branch(self, x):
        h = self.norm(x)
        if self.inner is not None:
            h = self.inner(h)
        for layer in self.layers[:-1]:
            h = self.activation(layer(h))
        return self.layers[-1](h)

    def forward(self, x, edit=lambda x: x):
        """As built; ``edit`` is applied to the shortcut by hand."""
        f = self.branch(x)
        if self.kind == "none":
            return f
        if self.kind == "concat":
            return torch.cat([edit(x), f] if self.writing % 2 else [f, edit(x)], -1)
        if self.kind == "gated":
            t = torch.sigmoid(self.gate(x))
            x = edit(x)
            if self.writing < 2:
                return t * f + (1 - t) * x if self.writing else x + t * (f - x)
            return torch.lerp(x, f, t) if self.writing == 2 else (1 - t) * x + f * t
        s = edit(self.side(x) if self.kind == "projection" else 0.5 * x if self.kind == "scaled" else x)
        if self.writing == 0:
            return s + f
        if self.writing == 1:
            return torch.add(f, s)
        if self.writing == 2:
            return f.add_(s)
        f += s
        return f


class Net(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(blocks[-1].out, 2)
        self.bridges = nn.ModuleList([nn.Linear(b.out, WIDTH) for b in blocks])
        self.edits = [lambda x: x] * len(blocks)

    def forward(self, x):
        for k, (block, bridge) in enumerate(zip(self.blocks, self.bridges, strict=True)):
            x = block(x, self.edits[k])
            x = bridge(x) if k + 1 < len(self.blocks) else x
        return self.head(x)


WIDTH = 5
KINDS = ["identity", "scaled", "projection", "gated", "concat", "none"]
block = st.tuples(
    st.sampled_from(KINDS),
    st.integers(2, 4),
    st.integers(0, 3),
    st.integers(0, 3),
    st.none() | st.integers(0, 3),
)


def build(plan):
    blocks, kinds = [], []
    for kind, depth, activation, writing, inside in plan:
        inner = None
        if inside is not None:
            inner = Planted(WIDTH, "identity", 2, ACTIVATIONS[inside], inside)
            kinds.append("identity")
        blocks.append(Planted(WIDTH, kind, depth, ACTIVATIONS[activation], writing, inner))
        kinds += [kind] if kind != "none" else []
    torch.manual_seed(len(plan))
    return Net(blocks).double(), kinds


quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@quick
@given(st.lists(block, min_size=1, max_size=5))
def test_exactly_the_planted_ones_are_found(plan):
    model, kinds = build(plan)
    found = find_shortcuts(model, torch.linspace(-1, 1, 2 * WIDTH, dtype=torch.float64).reshape(2, WIDTH))
    assert [s.kind for s in found] == kinds
    assert len({s.name for s in found}) == len(kinds)


@quick
@given(st.lists(block, min_size=1, max_size=4), st.sampled_from(["remove", "detach", "strength"]), st.data())
def test_editing_some_equals_editing_them_by_hand(plan, how, data):
    model, _ = build(plan)
    x = torch.linspace(-1, 1, 2 * WIDTH, dtype=torch.float64).reshape(2, WIDTH).requires_grad_()
    found = find_shortcuts(model, x.detach())
    edit = {"remove": lambda t: t * 0, "detach": lambda t: t.detach(), "strength": lambda t: 0.3 * t}[how]
    chosen, k = [], 0
    for i, (kind, *_, inside) in enumerate(plan):
        k += inside is not None
        if kind != "none":
            if data.draw(st.booleans()):
                chosen.append(found[k])
                model.edits[i] = edit
            k += 1
    by_hand = model(x)
    gradients = torch.autograd.grad(by_hand.square().sum(), [x, *model.parameters()], allow_unused=True)
    model.edits = [lambda t: t] * len(plan)
    twin = ablate(
        model, chosen, allow_empty=True, **({"strength": 0.3} if how == "strength" else {"how": how})
    )
    y = twin(x)
    torch.testing.assert_close(y, by_hand, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(y.square().sum(), [x, *twin.parameters()], allow_unused=True)
    for a, b in zip(ours, gradients, strict=True):
        if a is not None or b is not None:
            zero = torch.zeros_like(a if a is not None else b)
            torch.testing.assert_close(
                zero if a is None else a, zero if b is None else b, rtol=1e-9, atol=1e-12
            )
