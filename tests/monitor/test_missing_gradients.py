"""Missing gradients: each cause is said in words of its own; what starts at zero by design is no cause for alarm."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import skipscope as ss
from skipscope.monitor import watch
from skipscope.monitor.recording._backward_passes import BackwardPasses

from ._loops import data, loss_of, network


def cleared(model, optimizer):
    loss_of(model).backward()
    optimizer.zero_grad()


def cleared_in_place(model, optimizer):
    loss_of(model).backward()
    optimizer.zero_grad(set_to_none=False)


def no_backward(model, optimizer):
    loss_of(model)


def detached(model, optimizer):
    optimizer.zero_grad()
    scale = torch.ones((), requires_grad=True)
    (scale * loss_of(model).detach()).backward()


def of_another_model(model, optimizer):
    optimizer.zero_grad()
    loss_of(network(seed=5)).backward()


def replaced(model, optimizer):
    optimizer.zero_grad()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().clone())
            module.bias = nn.Parameter(module.bias.detach().clone())
    loss_of(model).backward()


CAUSES = {
    cleared: "cleared between backward() and step()",
    cleared_in_place: "cleared between backward() and step()",
    no_backward: "no backward() ran",
    detached: "no path leads from the loss to any parameter",
    of_another_model: "not through the model",
    replaced: "no longer parameters of the model",
}


@pytest.mark.parametrize("flow_every", [None, 1])
@pytest.mark.parametrize("step", CAUSES, ids=lambda f: f.__name__)
def test_each_cause_has_its_own_sentence(step, flow_every):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, flow_every=flow_every) as monitor:
        for _ in range(4):
            step(model, optimizer)
            optimizer.step()
    verdict = monitor.verdict
    assert verdict.state in {"unconnected", "dead"}
    assert CAUSES[step] in verdict.reason
    assert [other for other in set(CAUSES.values()) if other in verdict.reason] == [CAUSES[step]]
    assert verdict.advice.endswith(".") and verdict.advice in str(verdict)
    assert not any(p._backward_hooks for p in model.parameters())


def test_a_fault_that_is_mended_is_forgotten():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as monitor:
        for step in [cleared] * 4:
            step(model, optimizer)
            optimizer.step()
        assert monitor.verdict.state == "unconnected"
        for _ in range(8):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    assert monitor.verdict.state == "healthy"


def test_parts_that_are_not_called_are_unused_and_the_rest_is_judged():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.net = network(seed=1), network()

        def forward(self, x):
            return self.net(x)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    assert monitor.verdict.state == "healthy"
    assert any(
        "does not call the modules that hold unused.0.weight" in note for note in monitor.history.notes
    )


def test_a_path_that_is_cut_in_the_middle_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.net = nn.Linear(6, 6), network()

        def forward(self, x):
            return self.net(self.stem(x).detach())

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    assert monitor.verdict.state == "unconnected"
    assert "no path leads from the loss to stem.weight" in monitor.verdict.reason


def test_a_dead_network_is_dead_from_its_second_step_on():
    model = nn.Sequential(*[part for _ in range(3) for part in (nn.Linear(6, 6), nn.ReLU())], nn.Linear(6, 1))
    with torch.no_grad():
        model[2].bias.fill_(-100.0)
    optimizer = torch.optim.SGD(model[:4].parameters(), lr=0.1)
    states = []
    with watch(model, optimizer) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            states.append(monitor.verdict.state)
    assert states == ["unknown", "dead", "dead", "dead"]


class LowRank(nn.Module):
    """A frozen layer with a low-rank update whose second factor starts at zero."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(6, 6).requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return x + torch.tanh(self.base(x) + self.up(self.down(x)))


class LoRA(nn.Sequential):
    def __init__(self):
        super().__init__(*[LowRank() for _ in range(4)])


class Nested(nn.Module):
    """A gate that starts at zero around a block whose own gate starts at zero: three steps until all is reached."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        self.outer_gate, self.inner_gate = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(6))

    def forward(self, x):
        h = self.first(x)
        return self.head(x + self.outer_gate * (h + self.inner_gate * torch.tanh(self.inner(h))))


@pytest.mark.parametrize("warm_up", [False, True])
@pytest.mark.parametrize("make", [LoRA, Nested])
def test_what_starts_at_zero_by_design_is_never_called_dead(make, warm_up):
    torch.manual_seed(0)
    model = make()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0 if warm_up else 1e-2)
    heard = []
    with watch(model, optimizer, on_verdict=heard.append) as monitor:
        for i in range(12):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 1e-2
            assert monitor.verdict.state in {"unknown", "healthy"}, (i, str(monitor.verdict))
    assert monitor.verdict.state == "healthy"
    assert {event.verdict.state for event in heard} == {"healthy"}


# --- what was not recorded is said at the end ---


def test_an_optimizer_whose_step_is_never_called_is_said(caplog):
    class Manual(torch.optim.SGD):
        def apply(self):
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.sub_(0.1 * p.grad)

    model = network()
    optimizer = Manual(model.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING, "skipscope.monitor"), watch(model, optimizer) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.apply()
    expected = (
        "No step was recorded: step() of the watched Manual was never called, though the parameters changed"
    )
    assert any(expected in note for note in monitor.history.notes) and expected in caplog.text
    assert expected[4:] in monitor.verdict.reason and monitor.verdict.advice


def test_a_watch_without_training_is_no_cause_for_alarm(caplog):
    model = network()
    with watch(model, torch.optim.SGD(model.parameters(), lr=0.1), flow_every=1) as monitor:
        pass
    assert not caplog.text and not monitor.history.notes


class Policy(nn.Module):
    """As a LightningModule or a policy of reinforcement learning: the training never calls its forward."""

    def __init__(self, parts):
        super().__init__()
        self.parts = nn.ModuleList(network(torch.float64, seed=i) for i in range(parts))

    def training_step(self, x):
        return sum(part(x).square().mean() for part in self.parts)


def test_where_the_training_calls_one_part_the_flow_is_read_there():
    model, x = Policy(1), data(torch.float64)
    flow = ss.gradient_flow(
        model.parts[0], (x, torch.zeros(8, 1, dtype=torch.float64)), nn.functional.mse_loss
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, flow_every=1) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            model.training_step(x).backward()
            optimizer.step()
    np.testing.assert_allclose(
        monitor.history.flow[-1],
        [b.gradient_rms * flow.output_gradient_norm for b in flow.boundaries],
        rtol=1e-9,
    )
    np.testing.assert_array_equal(monitor.history.flow_steps, [2, 3, 4])
    assert any("read in parts.0" in note for note in monitor.history.notes)


def test_a_forward_that_is_never_called_is_said(caplog):
    model, x = Policy(2), data(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, flow_every=1) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            model.training_step(x).backward()
            optimizer.step()
    assert "never calls the model's forward. It calls parts of it: parts.0, parts.1" in caplog.text
    assert any("parts.0, parts.1" in note for note in monitor.history.notes)


def test_gradients_that_were_set_to_zero_since_their_pass():
    """Those of a parameter that the pass did not touch are no matter, whatever they hold."""
    zero, one = (torch.zeros(2), 0), (torch.ones(2), 0)
    passes = BackwardPasses.__new__(BackwardPasses)
    ended = SimpleNamespace(touched={0, 2}, nonzero=(0, True))
    for untouched in (None, zero, one):
        assert passes._zeroed(ended, [zero, untouched, zero])
        assert not passes._zeroed(ended, [one, untouched, zero])
        assert not passes._zeroed(ended, [zero, untouched, one])
    assert passes._zeroed(SimpleNamespace(touched={2}, nonzero=(0, True)), [None, one, zero])
    # Those of a dead network were 0 already.
    assert not passes._zeroed(SimpleNamespace(touched={0, 2}, nonzero=(0, False)), [zero, None, zero])
    assert not passes._zeroed(SimpleNamespace(touched={0, 2}, nonzero=None), [zero, None, zero])
