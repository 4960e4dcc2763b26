"""The live verdict on networks whose gradients are known to be well or ill, from parameter gradients alone."""

import logging
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope import reference
from skipscope.flow.verdict._flow_rules import FALL
from skipscope.monitor import STATES, read_history, watch
from skipscope.monitor.history._live_verdict import Place, _lasting, judge_flow, judge_gradients

from ._loops import loss_of, network


def deep(width=16, depth=20, gain=1.0, activation=nn.Tanh, seed=0):
    torch.manual_seed(seed)
    layers = []
    for _ in range(depth):
        linear = nn.Linear(width, width)
        nn.init.orthogonal_(linear.weight, gain)
        nn.init.zeros_(linear.bias)
        layers += [linear, activation()]
    return nn.Sequential(*layers, nn.Linear(width, 1))


def verdict_of(model, batch, loss, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model(batch[0]), batch[1]).backward()
            optimizer.step()
    assert monitor.verdict.basis == "parameter gradients"
    return monitor.verdict


def regression(width=16):
    torch.manual_seed(1)
    return 0.1 * torch.randn(16, width), torch.randn(16, 1)


class Backward(torch.autograd.Function):
    """Identity going forward, a factor going back."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


@pytest.mark.parametrize(
    ("factor", "state"),
    [(0.5, "vanishing"), (0.7, "vanishing"), (1.0, "healthy"), (1.02, "healthy"), (2.0, "exploding")],
)
def test_a_known_factor_at_each_layer(factor, state):
    """Orthogonal layers keep activations as they are, so RMS dL/dW changes by the factor at each of 20 layers."""

    class Known(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = deep(activation=nn.Identity)

        def forward(self, x):
            for layer in self.layers:
                x = layer(Backward.apply(x, factor))
            return x

    verdict = verdict_of(Known(), regression(), F.mse_loss)
    assert verdict.state == state
    assert verdict.slope == pytest.approx(
        -2 * np.log10(factor), abs=0.01
    )  # two modules, so two factors, a layer


@pytest.mark.parametrize("biases", [True, False])
def test_biases_tell_of_a_flow_that_weights_hide(biases):
    """With a gain of 0.6 the activation shrinks forward as the gradient does backward: dL/dW, their product, is flat."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(16, 16, bias=biases) for _ in range(20)])
    for layer in model:
        nn.init.orthogonal_(layer.weight, 0.6)
        if biases:
            nn.init.zeros_(layer.bias)
    verdict = verdict_of(model, (torch.randn(64, 16), torch.randn(64, 16)), lambda o, t: (o * t).sum())
    if biases:
        assert verdict.state == "vanishing" and "biases" in verdict.reason
        assert verdict.fall_decades == pytest.approx(-19 * np.log10(0.6), abs=0.01)
    else:
        assert verdict.state == "healthy" and "flow_every" in verdict.reason


def test_saturated_tanh_vanishes_and_shortcuts_do_not():
    batch = reference.digits(32)
    torch.manual_seed(0)
    assert verdict_of(reference.deep_mlp(depth=20), batch, F.cross_entropy).state == "vanishing"
    torch.manual_seed(0)
    healthy = reference.resnet20()
    assert verdict_of(healthy, batch, F.cross_entropy).state == "healthy"


def test_a_gpt_with_its_embedding_and_head_is_healthy():
    torch.manual_seed(0)
    model = reference.gpt(6, 32, 4, context=32)
    assert verdict_of(model, reference.english(8, context=32), F.cross_entropy).state == "healthy"


def test_dead_relu_is_dead():
    model = deep(activation=nn.ReLU, depth=6)
    with torch.no_grad():
        model[6].bias.fill_(-100.0)
    verdict = verdict_of(model, regression(), F.mse_loss)
    assert verdict.state == "dead"


def test_nonfinite_is_said_at_once_and_names_the_place():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    heard = []
    with watch(model, optimizer, on_verdict=heard.append):
        for i in range(40):
            optimizer.zero_grad()
            loss_of(model).backward()
            if i == 36:
                model[2].weight.grad[0, 0] = float("nan")
            optimizer.step()
    bad = next(event for event in heard if event.verdict.state == "nonfinite")
    assert bad.step == 37
    assert bad.verdict.where == "2.weight"


@pytest.mark.parametrize("name", ["bias", "embedding"])
def test_what_is_not_finite_counts_wherever_it_is(name):
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 6), "net": network()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model["net"], model["embedding"](torch.arange(4))).backward()
        bad = model["net"][2].bias if name == "bias" else model["embedding"].weight
        bad.grad.view(-1)[0] = float("nan")
        optimizer.step()
    assert monitor.verdict.state == "nonfinite"
    assert monitor.verdict.where == ("net.2.bias" if name == "bias" else "embedding.weight")


def test_a_change_is_one_line_in_the_log(caplog):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with caplog.at_level(logging.INFO, "skipscope.monitor"), watch(model, optimizer) as monitor:
        for bad in (False, False, True, True):
            optimizer.zero_grad()
            loss_of(model).backward()
            if bad:
                model[0].weight.grad.fill_(float("inf"))
            optimizer.step()
    lines = [record.getMessage() for record in caplog.records if record.name == "skipscope.monitor"]
    assert len(lines) == len(monitor.history.events) == 2
    assert "healthy -> nonfinite" in lines[1]
    assert caplog.records[-1].levelno == logging.WARNING


def test_the_state_does_not_flicker_at_the_threshold():
    places = [Place(f"b{i}", hidden=True) for i in range(11)]

    def flow(decades):
        return 10.0 ** (np.linspace(-decades, 0.0, 11))

    assert judge_flow(places, flow(FALL + 0.1), 1, "healthy").state == "vanishing"
    assert judge_flow(places, flow(FALL - 0.1), 1, "vanishing").state == "vanishing"
    assert judge_flow(places, flow(FALL - 0.1), 1, "healthy").state == "healthy"
    assert judge_flow(places, flow(FALL - 0.4), 1, "vanishing").state == "healthy"
    assert judge_flow(places, flow(-6.0), 1, "healthy").state == "exploding"


@pytest.mark.parametrize(("decades", "normed", "state"), [
    (3.0, False, "exploding"), (3.0, True, "healthy"), (5.0, True, "exploding"), (-3.0, True, "vanishing"),
])  # fmt: skip
def test_norms_between_the_weights_let_gradients_grow(decades, normed, state):
    """The gradient's norm grows through batch norm at the start, and such networks train (a ResNet-110)."""
    shapes = [(4, 4)] * 12
    rms = np.array([10.0 ** np.linspace(decades, 0, 12)] * 8)
    fine = np.full(rms.shape, float(STATES.index("ok")))
    names = [f"w{i}" for i in range(12)]
    assert judge_gradients(names, shapes, rms, fine, 8, "unknown", normed=normed).state == state


def test_a_stock_resnet_is_healthy_without_the_flow():
    torch.manual_seed(0)
    model, (inputs, target) = ss.reference.resnet110(), ss.reference.digits(16)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with ss.watch(model, optimizer) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), target).backward()
            optimizer.step()
            assert monitor.verdict.state in {"unknown", "healthy"}
    assert monitor.verdict.fall_decades < -2.5
    assert "norm" in monitor.history.roles


def test_each_shape_has_its_own_level():
    """Embedding, head and two kinds of block weights at very different levels, none of which changes with depth."""
    shapes = [(100, 4), *[(4, 4), (16, 4)] * 8, (7, 4)]
    rms = np.array([[1e-6, *[1e-2, 1e-5] * 8, 3.0]] * 8)
    fine = np.full(rms.shape, float(STATES.index("ok")))
    names = [f"w{i}" for i in range(len(shapes))]
    assert judge_gradients(names, shapes, rms, fine, 8, "unknown").state == "healthy"
    sloped = rms * 10.0 ** np.linspace(-4, 0, len(shapes))
    found = judge_gradients(names, shapes, sloped, fine, 8, "unknown")
    assert found.state == "vanishing"
    np.testing.assert_allclose(found.slope, 4 / (len(shapes) - 1), rtol=1e-6)


def test_an_embedding_is_compared_with_no_weight_that_happens_to_have_its_shape():
    torch.manual_seed(0)
    width = 8
    model = nn.Sequential(
        nn.Embedding(width, width),
        *[part for _ in range(4) for part in (nn.Linear(width, width), nn.Identity())], nn.Linear(width, 4),
    )  # fmt: skip
    for layer in model[1:-1:2]:
        nn.init.orthogonal_(layer.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer) as monitor:
        (model(torch.zeros(4096, dtype=torch.long)).sum(1) * 1e-3).mean().backward()
        model[0].weight.grad *= 1e4
        optimizer.step()
    assert monitor.history.roles == ("table", *["", "bias"] * 5)
    assert monitor.verdict.state == "healthy"


KILLED = """
import sys, torch
import skipscope as ss
model = torch.nn.Linear(30, 30)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
with ss.watch(model, optimizer, folder=sys.argv[1], flow_every=7):
    print("begun", flush=True)
    while True:
        optimizer.zero_grad()
        model(torch.randn(2, 30)).square().mean().backward()
        optimizer.step()
"""


@pytest.mark.parametrize("seconds", [0.05, 0.4])
def test_a_history_is_read_while_the_run_goes_on_and_after_kill_9(tmp_path, seconds):
    run = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert run.stdout.readline() == "begun\n"
        time.sleep(seconds)
        ss.load(tmp_path / "run")
        while not (seen := len(ss.load(tmp_path / "run"))):
            time.sleep(0.05)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stdout.close()
    history = read_history(tmp_path / "run", all_rows=True)
    assert len(history) >= seen
    np.testing.assert_array_equal(history.steps, np.arange(1, len(history) + 1))
    assert np.isfinite(history.norm).all()
    assert not history.complete
    assert any("cut short" in note for note in history.notes)
    assert history.verdict.state == "healthy"


def test_the_state_that_lasts():
    """A zero or a missing gradient at every step that was made; what is not finite at the last; else it is ok."""
    code = {name: float(i) for i, name in enumerate(STATES)}
    none = float("nan")
    columns = {
        **{name: [code[name]] * 3 for name in STATES if name != "underflow"},
        "too small for its dtype": [code["underflow"]] * 3,
        "zero, then not": [code["exact_zero"], code["exact_zero"], code["ok"]],
        "not, then zero": [code["ok"], code["exact_zero"], code["exact_zero"]],
        "zero where a step was made": [none, code["exact_zero"], none],
        "not finite at last": [code["ok"], code["ok"], code["nonfinite"]],
        "finite again": [code["nonfinite"], code["nonfinite"], code["ok"]],
        "no step": [none, none, none],
    }
    expected = [name for name in STATES if name != "underflow"]
    expected += ["ok", "ok", "ok", "exact_zero", "nonfinite", "ok", "absent"]
    assert _lasting(np.array(list(columns.values())).T) == expected


@pytest.mark.parametrize(("decades", "alike", "state"), [
    (2.3, True, "healthy"), (2.7, True, "vanishing"), (3.3, False, "healthy"), (3.7, False, "vanishing"),
])  # fmt: skip
def test_a_fall_of_weights_has_to_be_greater_where_none_are_of_equal_shape(decades, alike, state):
    names = [f"{i}.weight" for i in range(10)]
    shapes = [(8, 8) if alike else (8, 8 + i) for i in range(10)]
    rms = np.tile(10.0 ** np.linspace(-decades, 0, 10), (8, 1))
    states = np.full((8, 10), STATES.index("ok"))
    verdict = judge_gradients(names, shapes, rms, states, 8, "healthy", "weights")
    assert verdict.state == state


def test_a_matrix_is_no_norm_whatever_its_class_is_called():
    class NormalInitLinear(nn.Linear):
        """A linear layer with a name like that of a norm."""

    model = nn.Sequential(NormalInitLinear(4, 4, bias=False), nn.RMSNorm(4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as monitor:
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
    assert monitor.history.roles == ("", "norm")
