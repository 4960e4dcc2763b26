"""Parameter gradients are compared along a line, in the order of execution, and never from tower to tower."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import skipscope as ss
from skipscope.monitor import read_history
from skipscope.monitor.recording._tracked_parameters import track
from skipscope.monitor.recording._weight_lines import LineSearch


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


class Field(nn.Module):
    """A radiance field's layers (Mildenhall et al. 2020): the input is concatenated once more half way."""

    def __init__(self, gains=(1.0, 1.0), width=64, joins=True):
        super().__init__()
        torch.manual_seed(0)
        self.joins = joins
        self.first = nn.ModuleList(nn.Linear(16 if i == 0 else width, width) for i in range(5))
        self.join = nn.Linear(width + 16 if joins else width, width)
        self.last = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.head = nn.Linear(width, 3)
        with torch.no_grad():
            for part, gain in zip((self.first, self.last), gains):
                for layer in part:
                    layer.weight.mul_(gain)

    def forward(self, x):
        h = x
        for layer in self.first:
            h = torch.relu(layer(h))
        h = torch.relu(self.join(torch.cat([x, h], -1) if self.joins else h))
        for layer in self.last:
            h = torch.relu(layer(h))
        return self.head(h)


def square(output):
    return (output - 1).square().mean()


@pytest.mark.parametrize("options", [{}, {"flow_every": 1}])
def test_layers_before_the_input_is_concatenated_again_are_a_branch(options):
    events = []
    x, model = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), Field()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with ss.watch(model, optimizer, on_verdict=events.append, **options) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            square(model(x)).backward()
            optimizer.step()
    assert monitor.verdict.state == "healthy"
    assert "vanishing" not in [event.verdict.state for event in events]


def test_without_the_concatenation_the_same_layers_vanish():
    assert trained(Field(joins=False), square).verdict.state == "vanishing"


@pytest.mark.parametrize("gains, where", [((0.3, 1.0), "first"), ((1.0, 0.2), "last")])
def test_a_stretch_that_vanishes_in_itself_is_found(gains, where):
    monitor = trained(Field(gains), square)
    assert monitor.verdict.state == "vanishing" and monitor.verdict.where.startswith(where)


def test_folders_of_earlier_versions_know_no_stretches(tmp_path):
    trained(Field(), square, folder=tmp_path / "run")
    events = tmp_path / "run" / "events.jsonl"
    lines = [json.loads(line) for line in events.read_text().splitlines() if "closed" not in line]
    assert any(place[2] for line in lines for place in line.get("lines", {}).values())
    events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_history(tmp_path / "run").verdict.state == "healthy"  # judged anew, with its stretches
    for line in lines:
        line.update(
            {"lines": {k: (v[0][0], v[1]) for k, v in line["lines"].items()}} if "lines" in line else {}
        )
    events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_history(tmp_path / "run").verdict.state == "vanishing"


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


def convolutions(depth=6, gain=1.0):
    layers = []
    for _ in range(depth):
        layer = nn.Conv2d(4, 4, 3, padding=1)
        nn.init.dirac_(layer.weight)
        with torch.no_grad():
            layer.weight.add_(0.01 * torch.randn_like(layer.weight)).mul_(gain)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 16))


class Joined(nn.Module):
    """Towers with an input each, joined at a head; or one tower for all inputs."""

    def __init__(self, make, gains, joins="sum", shared=False):
        super().__init__()
        torch.manual_seed(0)
        self.towers = nn.ModuleList(make(gain=gain) for gain in (gains[:1] if shared else gains))
        self.joins, self.shared = joins, shared
        self.head = nn.Sequential(
            nn.Linear(16 * len(gains) if joins == "cat" else 16, 16), nn.ReLU(), nn.Linear(16, 3)
        )

    def forward(self, *inputs):
        outputs = [self.towers[0 if self.shared else i](x) for i, x in enumerate(inputs)]
        return self.head(torch.cat(outputs, 1) if self.joins == "cat" else sum(outputs))


def of_joined(make, gains, flow_every, events=None, **options):
    """The verdict of ``watch`` on joined towers, and that of ``gradient_flow``."""
    model, draw = Joined(make, gains, **options), torch.Generator().manual_seed(1)
    shape = (16, 16) if make is tower else (16, 4, 4, 4)
    inputs = tuple(torch.rand(shape, generator=draw) for _ in gains)
    target = torch.arange(16) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with ss.watch(model, optimizer, flow_every=flow_every, on_verdict=events.append if events is not None else ()) as monitor:  # fmt: skip
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(*inputs), target).backward()
            optimizer.step()
    return monitor.verdict, ss.gradient_flow(model, (inputs, target), F.cross_entropy).verdict


@pytest.mark.parametrize("flow_every", [1, None])
@pytest.mark.parametrize("joins", ["sum", "cat"])
@pytest.mark.parametrize("make", [tower, convolutions])
@pytest.mark.parametrize("gains", [(1, 0.2), (0.2, 1), (1, 1, 0.2), (1, 0.2, 1)])
def test_each_of_several_towers_joined_at_a_head_is_judged(make, joins, gains, flow_every):
    live, expected = of_joined(make, gains, flow_every, joins=joins)
    assert live.state == expected.state == "vanishing"
    assert live.where.startswith(f"towers.{gains.index(0.2)}")
    if flow_every:
        assert live.where == expected.where
        assert live.fall_decades == pytest.approx(expected.fall_decades, abs=1e-3)


@pytest.mark.parametrize("flow_every", [1, None])
@pytest.mark.parametrize("make", [tower, convolutions])
@pytest.mark.parametrize(
    ("gains", "shared", "state"),
    [((1, 1), False, "healthy"), ((1, 1, 1), False, "healthy"), ((1, 1), True, "healthy"), ((0.2, 0.2), True, "vanishing")],
)  # fmt: skip
def test_healthy_towers_and_one_tower_used_twice_are_judged_as_before(make, gains, shared, state, flow_every):
    events = []
    live, expected = of_joined(make, gains, flow_every, events, shared=shared)
    assert live.state == expected.state == state
    assert {event.verdict.state for event in events} == {state}


def test_a_second_tower_without_any_gradient_is_dead():
    live, expected = of_joined(tower, (1, 0.0), flow_every=1)
    assert live.state == expected.state == "dead"
    assert live.where.startswith("towers.1")


class Timed(nn.Module):
    """A network that gets the time step by a small network of its own, of little weight in each layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.time = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        self.layers = tower(8)
        self.head = nn.Linear(16, 3)

    def forward(self, x, t):
        for layer in self.layers:
            x = layer(x + 1e-3 * self.time(t)) if isinstance(layer, nn.Linear) else layer(x)
        return self.head(x)


def test_a_small_network_for_the_time_step_is_no_tower():
    model = Timed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    tracked = track(optimizer, 0, {"": model})
    search = LineSearch([tracked], {"": model})
    model(torch.randn(4, 16), torch.rand(4, 16)).sum().backward()
    assert {places[0] for places in search.conclude().values()} == {(0,)}


class LowRank(nn.Module):
    """A frozen layer with a trained update beside it."""

    def __init__(self):
        super().__init__()
        self.base, self.down, self.up = (
            nn.Linear(16, 16),
            nn.Linear(16, 2, bias=False),
            nn.Linear(2, 16, bias=False),
        )
        self.base.requires_grad_(False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return torch.tanh(self.base(x) + self.up(self.down(x)))


def test_an_update_beside_a_frozen_layer_is_beside_the_line():
    torch.manual_seed(0)
    model = nn.Sequential(*[LowRank() for _ in range(3)], nn.Linear(16, 3))
    x, target = torch.randn(16, 16), torch.arange(16) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with ss.watch(model, optimizer, flow_every=1) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()
    assert monitor.verdict.state == "healthy"
