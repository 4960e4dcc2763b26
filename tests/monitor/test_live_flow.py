"""The flow during training equals ``gradient_flow``'s on the same model and batch, whatever the loop does."""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import skipscope as ss
from skipscope import reference
from skipscope.flow import gradient_flow
from skipscope.monitor import read_history, watch
from skipscope.monitor.recording import _flow_reader

from ._loops import loss_of, network


def expected(model, batch, loss):
    flow = gradient_flow(model, batch, loss)
    names = tuple(b.name for b in flow.boundaries)
    return names, [(b.gradient_rms or np.nan) * flow.output_gradient_norm for b in flow.boundaries]


def steps(model, optimizer, batch, loss, n=3, run=None):
    for _ in range(n):
        optimizer.zero_grad()
        loss((model if run is None else run)(batch[0]), batch[1]).backward()
        optimizer.step()


def digits(n=16):
    return reference.digits(n)


MODELS = {
    "plain": lambda: (reference.deep_mlp(depth=8), digits()),
    "shortcuts": lambda: (reference.deep_mlp(depth=8, shortcut="identity"), digits()),
    "resnet": lambda: (reference.resnet20(), digits()),
    "gpt": lambda: (reference.gpt(2, 16, 2, context=16), reference.english(4, context=16)),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_gradient_flow(name):
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    names, rms = expected(model, batch, F.cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, flow_every=2) as monitor:
        steps(model, optimizer, batch, F.cross_entropy, 4)
    history = monitor.history
    assert history.boundaries == names
    np.testing.assert_array_equal(history.flow_steps, [1, 3])
    np.testing.assert_allclose(history.flow, [rms, rms], rtol=2e-4)
    assert monitor.verdict.basis == "boundary flow"
    assert monitor.verdict.state == gradient_flow(model, batch, F.cross_entropy).verdict.state


def test_in_float64_it_is_exact():
    model = network(torch.float64)
    batch = (torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64))
    _, rms = expected(model, batch, F.mse_loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, flow_every=1) as monitor:
        steps(model, optimizer, batch, F.mse_loss, 1)
    np.testing.assert_allclose(monitor.history.flow[0], rms, rtol=1e-12)


def test_accumulation_is_the_whole_batch():
    model = network(torch.float64)
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)
    _, rms = expected(model, (x, y), F.mse_loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, flow_every=1) as monitor:
        for part in (slice(0, 3), slice(3, 8)):
            (F.mse_loss(model(x[part]), y[part]) * (part.stop - part.start) / 8).backward()
        optimizer.step()
    np.testing.assert_allclose(monitor.history.flow, [rms], rtol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_the_loss_scale_is_divided_out(fused):
    model = network()
    batch = (torch.randn(8, 6), torch.randn(8, 1))
    _, rms = expected(model, batch, F.mse_loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    with watch(model, optimizer, flow_every=1) as monitor:
        scaler.scale(F.mse_loss(model(batch[0]), batch[1])).backward()
        scaler.step(optimizer)
        scaler.update()
    np.testing.assert_allclose(monitor.history.flow, [rms], rtol=1e-5)


@pytest.mark.parametrize("order", ["watch first", "compile first", "in place"])
def test_a_compiled_model_runs_only_the_steps_read_uncompiled(order):
    from torch._dynamo.testing import CompileCounter

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = network()
            self.calls = 0

        def forward(self, x):
            return self.layers(x)

    torch._dynamo.reset()
    model = Net()
    batch = (torch.randn(8, 6), torch.randn(8, 1))
    _, rms = expected(model, batch, F.mse_loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    counter, run = CompileCounter(), model
    with contextlib.ExitStack() as stack:
        monitor = None
        if order == "watch first":
            monitor = stack.enter_context(watch(model, optimizer, flow_every=3))
        if order == "in place":
            model.compile(backend=counter, fullgraph=True)
        else:
            run = torch.compile(model, backend=counter, fullgraph=True)
        if monitor is None:
            monitor = stack.enter_context(watch(run, optimizer, flow_every=3))
        steps(model, optimizer, batch, F.mse_loss, 7, run)
    assert counter.frame_count == 1
    np.testing.assert_array_equal(monitor.history.flow_steps, [1, 4, 7])
    np.testing.assert_allclose(monitor.history.flow, [rms] * 3, rtol=1e-5)
    assert torch._dynamo.eval_frame._stance.stance == "default"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.blocks = nn.ModuleList(network() for _ in range(3))

        def forward(self, x):
            x = self.first(x)
            for block in self.blocks:
                x = x + (checkpoint(block, x, use_reentrant=reentrant) if self.saves else block(x))
            return x

    torch.manual_seed(0)
    model = Net().double()
    model.saves = False
    batch = (torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64))
    names, rms = expected(model, batch, F.mse_loss)
    model.saves = True
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, flow_every=1) as monitor:
        steps(model, optimizer, batch, F.mse_loss, 2)
    values = dict(zip(names, rms))
    assert len(monitor.history.boundaries) >= (2 if reentrant else 4)
    right = [values[name] for name in monitor.history.boundaries]
    np.testing.assert_allclose(monitor.history.flow, [right] * 2, rtol=1e-10)


def test_validation_between_steps_and_a_pass_that_raises_do_not_count():
    model = network(torch.float64)
    batch = (torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64))
    _, rms = expected(model, batch, F.mse_loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, flow_every=1) as monitor:
        for _ in range(2):
            with torch.no_grad():
                model(batch[0])
            model(batch[0])  # with a graph, but no backward pass
            with pytest.raises(RuntimeError):
                model(torch.ones(2, 3, dtype=torch.float64))
            steps(model, optimizer, batch, F.mse_loss, 1)
    np.testing.assert_allclose(monitor.history.flow, [rms] * 2, rtol=1e-12)


def test_keywords_and_frozen_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = network(torch.float64)

        def forward(self, x, *, scale=1.0):
            return self.layers(x) * scale

    model = Net()
    model.layers[:4].requires_grad_(False)
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)
    _, rms = expected(model, (x, y), F.mse_loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, flow_every=1) as monitor:
        F.mse_loss(model(x=x, scale=1.0), y).backward()
        optimizer.step()
    np.testing.assert_allclose(monitor.history.flow[0], rms, rtol=1e-12)


def test_a_network_whose_gradient_dies_and_recovers_is_announced():
    torch.manual_seed(0)
    model = nn.Sequential(
        *[part for _ in range(12) for part in (nn.Linear(8, 8), nn.Tanh())], nn.Linear(8, 1)
    )
    for layer in model[::2][:-1]:
        nn.init.orthogonal_(layer.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    heard = []
    with watch(model, optimizer, flow_every=1, on_verdict=heard.append) as monitor:
        for size in (1.0, 1.0, 0.3, 0.3, 1.0):
            with torch.no_grad():
                for layer in model[::2][:-1]:
                    layer.weight.mul_(size / layer.weight.norm() * 8**0.5)
            optimizer.zero_grad()
            loss_of(model, 0.1 * torch.randn(8, 8)).backward()
            optimizer.step()
    assert [(e.before, e.verdict.state) for e in heard[-2:]] == [
        ("healthy", "vanishing"),
        ("vanishing", "healthy"),
    ]
    assert heard[-2].verdict.basis == "boundary flow"
    assert heard == list(monitor.history.events)


def test_the_model_is_left_as_it_was_and_training_too():
    results = []
    for watched in (False, True):
        torch.manual_seed(0)
        model, batch = reference.resnet20(), digits()
        before = {name: list(module._forward_pre_hooks) for name, module in model.named_modules()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with watch(model, optimizer, flow_every=1) if watched else contextlib.nullcontext():
            steps(model, optimizer, batch, F.cross_entropy, 3)
        assert {name: list(module._forward_pre_hooks) for name, module in model.named_modules()} == before
        assert not any(module._forward_hooks for module in model.modules())
        results.append([*model.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_the_flow_is_written_and_read(tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = (torch.randn(8, 6), torch.randn(8, 1))
    with watch(model, optimizer, flow_every=2, folder=tmp_path / "run") as monitor:
        steps(model, optimizer, batch, F.mse_loss, 5)
    history = ss.load(tmp_path / "run")
    np.testing.assert_array_equal(history.flow, monitor.history.flow)
    assert history.matrix("flow")["values"].shape == (len(history.boundaries), 3)
    assert history.verdict == monitor.verdict


def test_where_no_boundary_can_be_found_training_goes_on_and_says_so():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.failures = 2  # finding tries twice

        def forward(self, x):
            if self.failures:
                self.failures -= 1
                raise ZeroDivisionError("this model cannot be traced")
            return self.weight * x

    model = Odd()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="cannot be read"), watch(model, optimizer, flow_every=1) as monitor:
        for _ in range(2):
            with contextlib.suppress(ZeroDivisionError):
                model(torch.ones(3)).sum().backward()
            optimizer.step()
            model.failures = 0
    assert any("cannot be read" in note for note in monitor.history.notes)
    assert len(monitor.history) == 2


def test_a_module_added_later_is_read_from_the_next_reading_on():
    model = network(torch.float64)
    batch = (torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, flow_every=1) as monitor:
        steps(model, optimizer, batch, F.mse_loss, 2)
        assert "7" not in monitor.history.boundaries
        model.append(nn.Linear(1, 1, dtype=torch.float64))
        optimizer.add_param_group({"params": model[-1].parameters()})
        steps(model, optimizer, batch, F.mse_loss, 3)
    names, rms = expected(model, batch, F.mse_loss)
    assert monitor.history.boundaries == names and "7" in names
    np.testing.assert_allclose(monitor.history.flow[-1], rms, rtol=1e-12)


def test_a_flow_that_is_not_finite_is_not_taken_for_none():
    """The gradients and the flow tell of the same trouble: the state does not go to and fro between two words for it."""
    torch.manual_seed(0)
    model, batch = MODELS["plain"]()
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.1), []
    with watch(model, optimizer, flow_every=2, on_verdict=seen.append) as monitor:
        steps(model, optimizer, batch, F.cross_entropy, n=5)
        with torch.no_grad():
            model.head.weight.fill_(np.nan)
        steps(model, optimizer, batch, F.cross_entropy, n=6)
    states = [event.verdict.state for event in seen]
    assert states[-1] == "nonfinite" and states.count("nonfinite") == 1
    assert np.isinf(monitor.history.flow[-1]).all() and np.isfinite(monitor.history.flow[0]).all()


@pytest.mark.parametrize("factor, state", [(1.0, "healthy"), (1e-4, "vanishing")])
def test_averages_between_hidden_boundaries_are_put_back_as_gradient_flow_puts_them(factor, state):
    torch.manual_seed(0)
    convs = [q for i in range(4) for q in (nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2))]  # fmt: skip
    model = nn.Sequential(
        *convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)
    )
    with torch.no_grad():
        model[6].weight.mul_(factor)
    batch = torch.randn(4, 3, 32, 32), torch.randint(0, 2, (4,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, flow_every=1) as monitor:
        steps(model, optimizer, batch, F.cross_entropy, 2)
    verdict = gradient_flow(model, batch, F.cross_entropy).verdict
    assert monitor.verdict.state == verdict.state == state
    assert monitor.verdict.fall_decades == pytest.approx(verdict.fall_decades, abs=1e-4)
    assert monitor.verdict.finding == verdict.finding


@pytest.mark.parametrize("length, state", [(6, "healthy"), (60, "vanishing")])
def test_a_recurrence_that_vanishes_through_time(length, state, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.head = nn.LSTM(4, 16, batch_first=True), nn.Linear(16, 2)

        def forward(self, x):
            return self.head(self.net(x)[0][:, -1])

    torch.manual_seed(0)
    model, batch = Net(), (torch.randn(4, length, 4), torch.randint(0, 2, (4,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, flow_every=1, folder=tmp_path) as monitor:
        steps(model, optimizer, batch, F.cross_entropy, 2)
    verdict = gradient_flow(model, batch, F.cross_entropy).verdict
    assert monitor.verdict.state == verdict.state == state
    assert monitor.verdict.finding == verdict.finding
    assert (monitor.history.recurrent, monitor.history.reach[-1, 1]) == ("net", length)
    if verdict.reach is not None:
        assert monitor.history.reach[-1, 0] == verdict.reach
    np.testing.assert_array_equal(read_history(tmp_path).reach, monitor.history.reach)
    assert not batch[0]._backward_hooks


def test_a_head_that_passes_next_to_nothing_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[4].weight.mul_(1e-6)
    batch, optimizer = (
        (torch.randn(8, 6), torch.randint(0, 2, (8,))),
        torch.optim.SGD(model.parameters(), lr=0.0),
    )
    with watch(model, optimizer, flow_every=1) as monitor:
        steps(model, optimizer, batch, F.cross_entropy, 2)
    verdict = gradient_flow(model, batch, F.cross_entropy).verdict
    assert (
        (monitor.verdict.state, monitor.verdict.where)
        == (verdict.state, verdict.where)
        == ("vanishing", "head")
    )


@pytest.mark.parametrize("asked", [True, False])
def test_the_verdict_on_the_flow_is_current_when_asked_and_announced_within_eight_steps(asked):
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(12) for m in (nn.Linear(16, 16), nn.Tanh())], nn.Linear(16, 1))
    for linear in model[:-1:2]:
        nn.init.orthogonal_(linear.weight)
    optimizer, events = torch.optim.SGD(model.parameters(), 1e-9), []
    with watch(model, optimizer, flow_every=1, on_verdict=events.append) as monitor:
        for step in range(1, 41):
            if step == 21:
                with torch.no_grad():
                    for linear in model[:-1:2]:
                        linear.weight *= 0.1
            optimizer.zero_grad()
            model(torch.randn(8, 16)).square().mean().backward()
            optimizer.step()
            if asked and step in {20, 22}:
                assert monitor.verdict.state == ("healthy" if step == 20 else "vanishing")
    (found,) = [event for event in events if event.verdict.state == "vanishing"]
    assert found.step in ({21, 22} if asked else set(range(21, 30)))


@pytest.mark.parametrize(("error", "reason"), [
    (ss.SkipscopeError("find", "the model returns no tensor", cure="return one"), "the model returns no tensor"),
    (ValueError("too many\nvalues"), "too many"),
    (ValueError(), "ValueError"),
])  # fmt: skip
def test_why_the_flow_cannot_be_read_is_said_in_a_line(monkeypatch, error, reason):
    def fail(*_):
        raise error

    monkeypatch.setattr(_flow_reader, "boundaries", fail)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, flow_every=1) as monitor:
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
    notes = [note for note in monitor.history.notes if "cannot be read" in note]
    assert len(notes) == 1 and notes[0].rstrip(".").endswith(
        f"the flow at boundaries cannot be read: {reason}"
    ), notes


class Modulated(nn.Module):
    """DiT in small: x + gate(c) * F(x), gates that start at 0, and a condition c of the input itself."""

    def __init__(self, width=16, blocks=4):
        super().__init__()
        self.condition, self.stem, self.head = (nn.Linear(width, width) for _ in range(3))
        self.branches = nn.ModuleList([nn.Linear(width, width) for _ in range(blocks)])
        self.gates = nn.ModuleList([nn.Linear(width, width) for _ in range(blocks)])
        for gate in self.gates:
            nn.init.zeros_(gate.weight)
            nn.init.zeros_(gate.bias)

    def forward(self, x):
        c, x = self.condition(x), self.stem(x)
        for branch, gate in zip(self.branches, self.gates):
            x = x + gate(c) * torch.tanh(branch(x))
        return self.head(x)


def test_a_condition_beside_the_line_whose_gates_have_just_left_0_is_no_vanishing_gradient():
    torch.manual_seed(0)
    model, batch = Modulated(), (torch.randn(32, 16), torch.randint(0, 10, (32,)))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with watch(model, optimizer, flow_every=1) as monitor:
        for _ in range(5):
            steps(model, optimizer, batch, F.cross_entropy, n=1)
            assert monitor.verdict.state in {"healthy", "unknown"}
    history = monitor.history
    at = history.boundaries.index("condition")
    assert history.flow_norm[-1, at] < 1e-3 * history.flow_norm[-1, -1] and history.lines[at] == 0
    assert gradient_flow(model, batch, F.cross_entropy).verdict.state == "healthy"
