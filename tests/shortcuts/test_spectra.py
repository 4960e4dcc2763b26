"""Shortcuts in unusual writing: their path spectrum equals the enumeration of all paths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import skipscope as ss
from flow import oracles
from shortcuts.architectures import COLUMNS, ROWS, on_parts


class Written(nn.Module):
    """Three blocks whose branch, marked for the oracle, is merged in a given way."""

    def __init__(self, write, width=8):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"a": nn.Linear(width, width), "b": nn.Linear(width, width), "mark": oracles.Branch()}
            )
            for _ in range(3)
        )
        self.write, self.first, self.head = write, nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = self.write(Parts(layer), x, torch.tanh(layer["a"](x)))
        return self.head(x)


class Parts:
    """A layer as the ways of writing know it: ``b`` is the end of its branch."""

    def __init__(self, layer):
        self.layer = layer

    def b(self, h):
        return self.layer["mark"](self.layer["b"](h))


def in_place(s, x, h):
    x = x.clone()
    torch._foreach_add_([x], [s.b(h)])
    return x


WAYS = {
    "masks": on_parts(ROWS, ~ROWS),
    "columns": on_parts((slice(None), COLUMNS), (slice(None), ~COLUMNS)),
    "assigned slices": on_parts((slice(None), slice(3)), (slice(None), slice(3, None)), assigned=True),
    "one assigned slice": on_parts((slice(None), slice(3)), assigned=True),
    "lists": lambda s, x, h: torch._foreach_add([x], [s.b(h)])[0],
    "lists in place": in_place,
    "chosen from the branch": lambda s, x, h: s.b(h).where(COLUMNS, x),
    "chosen from x": lambda s, x, h: x.where(ROWS[:, None], s.b(h)),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_spectrum_equals_the_enumeration_of_all_paths(way):
    torch.manual_seed(0)
    model, x = Written(WAYS[way]).double(), torch.randn(3, 8, dtype=torch.float64)
    found = ss.find_shortcuts(model, x)
    assert len(found) == 3
    paths = ss.path_spectrum(model, (x, torch.zeros(3, 2)), lambda y, _: y.square().mean())
    expected = [float(g.norm()) for g in oracles.by_enumeration(model, lambda y: y.square().mean(), x)]
    np.testing.assert_allclose(paths.norms, expected, rtol=1e-10)
    assert paths.residual < 1e-13
    y = model(x)
    for neutral in ({"how": "detach"}, {"strength": 1.0}):
        assert torch.equal(ss.ablate(model, found, **neutral)(x), y)
    assert torch.equal(ss.ablate(model, found, strength=0.0)(x), ss.ablate(model, found)(x))
    assert not torch.equal(ss.ablate(model, found)(x), y)


class Coupled(nn.Module):
    """Couplings by their definition: the sum's branch is F(b), that of what is put together is a + F(b)."""

    def __init__(self, gated):
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)) for _ in range(3)
        )
        self.gates = nn.ModuleList(nn.Linear(3, 3) for _ in range(3)) if gated else [None] * 3
        self.sums, self.joins = (nn.ModuleList(oracles.Branch() for _ in range(3)) for _ in range(2))

    def forward(self, x):
        for net, gate, summed, joined in zip(self.nets, self.gates, self.sums, self.joins):
            a, b = x.chunk(2, -1)
            a = a if gate is None else a * gate(b).tanh().exp()
            x = torch.cat([b, joined(a + summed(net(b)))], -1)
        return x


@pytest.mark.parametrize("gated", [False, True])
def test_the_spectrum_of_couplings(gated):
    torch.manual_seed(0)
    model, x = Coupled(gated).double(), torch.randn(4, 6, dtype=torch.float64)
    found = ss.find_shortcuts(model, x)
    assert [s.kind for s in found] == ["gated" if gated else "identity", "concat"] * 3
    paths = ss.path_spectrum(model, (x, torch.zeros(4, 6)), lambda y, _: y.square().mean())
    expected = [float(g.norm()) for g in oracles.by_enumeration(model, lambda y: y.square().mean(), x)]
    np.testing.assert_allclose(paths.norms, expected[: len(paths.norms)], rtol=1e-10)
    assert not any(expected[len(paths.norms) :]) and paths.residual < 1e-13
    for neutral in ({"how": "detach"}, {"strength": 1.0}):
        assert torch.equal(ss.ablate(model, found, **neutral)(x), model(x))
    assert torch.equal(ss.ablate(model, found, strength=0.0)(x), ss.ablate(model, found)(x))
