"""Models converted to int8: their weights are in objects of their own, and their activations may be quantized."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import skipscope as ss

ao = torch.ao.quantization
pytestmark = [
    pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="needs int8 kernels"),
    pytest.mark.filterwarnings("ignore"),
]


class Block(nn.Module):
    def __init__(self, bends):
        super().__init__()
        self.a, self.b, self.join, self.bends = (
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            torch.ao.nn.quantized.FloatFunctional(),
            bends,
        )

    def forward(self, x):
        f = self.b(self.a(x).relu())
        return self.join.add_relu(x, f) if self.bends else self.join.add(x, f)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = ao.QuantStub(), ao.DeQuantStub()
        self.first, self.blocks = nn.Linear(6, 6), nn.Sequential(Block(False), Block(True), Block(False))

    def forward(self, x):
        return self.leave(self.blocks(self.first(self.enter(x))))


X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


def converted(model):
    model.qconfig = ao.get_default_qconfig("x86")
    prepared = ao.prepare(model.eval())
    prepared(X)
    return ao.convert(prepared)


def with_int8_weights(model):
    return ao.quantize_dynamic(model.eval(), {nn.Linear})


@pytest.mark.parametrize("convert", [converted, with_int8_weights])
def test_it_has_the_shortcuts_that_it_had(convert):
    model = convert(Net())
    found, before = ss.find_shortcuts(model, X), ss.find_shortcuts(Net(), X)
    assert [(s.kind, s.branch) for s in found] == [(s.kind, s.branch) for s in before]
    assert len(found) == 3 and not found.opaque and not found.not_run
    built, removed = model(X), ss.ablate(model, found)(X)
    assert torch.equal(ss.ablate(model, found, "detach")(X), built)
    assert torch.equal(ss.ablate(model, found, strength=1.0)(X), built)
    assert torch.equal(ss.ablate(model, found, strength=0.0)(X), removed)
    # In steps of an eighth bit the twin is that of the network in float.
    expected = ss.ablate(Net(), before)(X)
    assert (removed - expected).abs().mean() < 0.1 * (built - expected).abs().mean()


class Named(Net):
    """The same, whose parts are named for a profiler."""

    def forward(self, x):
        with torch.profiler.record_function("blocks"):
            x = self.blocks(self.first(self.enter(x)))
        return self.leave(x)


@pytest.mark.parametrize("convert", [lambda model: model.eval(), converted, with_int8_weights])
def test_a_name_for_a_profiler_is_no_weight(convert):
    named, plain = (ss.find_shortcuts(convert(kind()), X) for kind in (Named, Net))
    assert len(plain) and [(s.kind, s.branch, s.span) for s in named] == [
        (s.kind, s.branch, s.span) for s in plain
    ]
    assert [layer.name for layer in named.layers] == [layer.name for layer in plain.layers]
