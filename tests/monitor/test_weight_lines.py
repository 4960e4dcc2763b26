"""Parameter gradients are compared along a line, in the order of execution, and never from tower to tower."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import skipscope as ss
from skipscope.monitor import read_history


def tower(depth=6, gain=1.0):
    layers = []
    for _ in range(depth):
        linear = nn.Linear(16, 16)
        nn.init.orthogonal_(linear.weight, gain)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers)


class Towers(nn.Module):
    """An actor and a critic: heads registered last, as policies of reinforcement learning have them."""

    def __init__(self, critic_gain=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.actor, self.critic = tower(), tower(gain=critic_gain)
        self.act, self.value = nn.Linear(16, 2), nn.Linear(16, 1)

    def forward(self, x):
        return self.act(self.actor(x)), self.value(self.critic(x))


def trained(model, loss, steps=3, rate=0.0, **options):
    x = 0.3 * torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    with ss.watch(model, optimizer, **options) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model(x)).backward()
            optimizer.step()
    assert monitor.verdict.basis == "parameter gradients"
    return monitor


def two_losses(output):
    act, value = output
    return F.cross_entropy(act, torch.zeros(len(act), dtype=torch.int64)) + 1e5 * (value - 1).square().mean()


def test_towers_whose_losses_differ_by_five_decades_are_healthy():
    events = []
    monitor = trained(Towers(), two_losses, on_verdict=events.append)
    assert monitor.verdict.state == "healthy"
    assert [event.verdict.state for event in events] == ["healthy"]


def test_a_tower_that_vanishes_is_found_beside_one_that_does_not():
    monitor = trained(Towers(critic_gain=0.2), two_losses)
    assert monitor.verdict.state == "vanishing" and monitor.verdict.where.startswith("critic")
    # Five orthogonal layers of gain 0.2 lie between the first layer and the last.
    assert monitor.verdict.fall_decades == pytest.approx(-5 * np.log10(0.2), abs=0.1)


class Reversed(nn.Module):
    """A plain network whose layers are registered from the last to the first."""

    def __init__(self, gain):
        super().__init__()
        layers = tower(10, gain)
        self.layers = nn.ModuleList(reversed(list(layers)))
        self.head = nn.Linear(16, 1)

    def forward(self, x):
        for layer in reversed(self.layers):
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("gain, state", [(0.3, "vanishing"), (3.0, "exploding")])
def test_the_order_of_registration_changes_nothing(gain, state):
    class Plain(Reversed):
        def __init__(self):
            super().__init__(gain)
            self.layers = nn.ModuleList(reversed(self.layers))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x) if gain < 1 or isinstance(layer, nn.Linear) else x
            return self.head(x)

    class Turned(Reversed):
        def forward(self, x):
            for layer in reversed(self.layers):
                x = layer(x) if gain < 1 or isinstance(layer, nn.Linear) else x
            return self.head(x)

    torch.manual_seed(0)
    plain = trained(Plain(), torch.sum).verdict
    torch.manual_seed(0)
    turned = trained(Turned(gain), torch.sum).verdict
    assert turned.state == plain.state == state
    assert turned.fall_decades == pytest.approx(plain.fall_decades, abs=0.2)


def test_layers_in_checkpoints_stay_one_line():
    """A re-entrant checkpoint runs each part again, cut off from the others: no towers can be seen."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers, self.head = tower(10, 0.3), nn.Linear(16, 1)

        def forward(self, x):
            x = x.requires_grad_()
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=True)
            return self.head(x)

    assert trained(Checkpointed(), torch.sum).verdict.state == "vanishing"


def test_what_was_found_is_kept_in_the_folder(tmp_path):
    trained(Towers(), two_losses, folder=tmp_path / "run")
    # As after a kill: without the line that says that the run is over, the verdict is judged anew.
    events = tmp_path / "run" / "events.jsonl"
    events.write_text("".join(line for line in events.read_text().splitlines(True) if "closed" not in line))
    assert read_history(tmp_path / "run").verdict.state == "healthy"


def test_nothing_is_left_of_the_search():
    from torch.nn.modules import module as hooks

    before = len(hooks._global_forward_hooks)
    monitor = trained(Towers(), two_losses, steps=1)  # the search begins, and no step follows
    assert len(hooks._global_forward_hooks) == before
    assert monitor.verdict.state in {"vanishing", "healthy"}
