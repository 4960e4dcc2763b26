"""What happens to a gradient through the steps of a sequence, in layers and in loops of cells, as in ``gradient_flow``."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope.monitor import read_history


class Recurrent(nn.Module):
    """A recurrent layer, or a loop of its cell, whose recurrent weights are orthogonal times a gain."""

    def __init__(self, kind, gain):
        super().__init__()
        torch.manual_seed(0)
        self.net = {
            "layer": lambda: nn.RNN(8, 8, bias=False, batch_first=True),
            "cell": lambda: nn.RNNCell(8, 8, bias=False),
            "lstm cell": lambda: nn.LSTMCell(8, 8),
        }[kind]()
        self.head = nn.Linear(8, 3)
        if kind != "lstm cell":
            nn.init.orthogonal_(self.net.weight_hh_l0 if kind == "layer" else self.net.weight_hh, gain)

    def forward(self, x):
        if isinstance(self.net, nn.RNN):
            return self.head(self.net(x)[0][:, -1])
        state = None
        for t in range(x.shape[1]):
            state = self.net(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


def of(kind, gain, length, scale, forwards=1, **options):
    model, draw = Recurrent(kind, gain), torch.Generator().manual_seed(0)
    x, target = scale * torch.randn(8, length, 8, generator=draw), torch.arange(8) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with ss.watch(model, optimizer, flow_every=1, **options) as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(forwards):
                F.cross_entropy(model(x), target).backward()
            optimizer.step()
    return monitor, ss.gradient_flow(model, (x, target), F.cross_entropy).verdict


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("kind", ["layer", "cell"])
def test_growth_through_time(kind, forwards, tmp_path):
    # So small that no tanh is far from 0: each step back multiplies the gradient by 2.
    monitor, expected = of(kind, 2.0, 24, 1e-9, forwards, folder=tmp_path / "run")
    assert (
        (monitor.verdict.state, monitor.verdict.where)
        == (expected.state, expected.where)
        == ("exploding", "net")
    )
    grown = 23 * np.log10(2) - np.log10(24)
    assert monitor.history.reach[-1, 2] == pytest.approx(grown, abs=0.2)
    assert f"grows by {monitor.history.reach[-1, 2]:.3g} decades" in monitor.verdict.reason
    again = read_history(tmp_path / "run")
    np.testing.assert_array_equal(again.reach, monitor.history.reach)
    assert again.verdict.state == "exploding"


@pytest.mark.parametrize(("kind", "gain", "length", "state"), [
    ("layer", 0.5, 60, "vanishing"), ("cell", 0.5, 60, "vanishing"), ("lstm cell", 1.0, 100, "vanishing"),
    ("layer", 1.0, 16, "healthy"), ("cell", 1.0, 16, "healthy"), ("lstm cell", 1.0, 16, "healthy"),
])  # fmt: skip
def test_reach_through_time(kind, gain, length, state):
    monitor, expected = of(kind, gain, length, 1e-3)
    assert monitor.verdict.state == expected.state == state
    if state == "vanishing":
        assert monitor.verdict.where == "net" and monitor.history.reach[-1, 1] == length
