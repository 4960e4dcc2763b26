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
