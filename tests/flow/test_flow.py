"""The flow against hooks and closed forms; the verdict on networks whose flow is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import skipscope as ss
from flow import oracles
from skipscope.flow.passes import _zero_by_design
from skipscope.flow.verdict import _flow_rules
from skipscope.flow.verdict._flow_rules import FALL, GROWTH, SPREAD_GROWTH, Point, judge, least_squares

mse = nn.functional.mse_loss


def data(width, n=8, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, width, generator=g).to(dtype), torch.randn(n, width, generator=g).to(dtype)


# --- the measurement ---


def by_hooks(model, x, y, loss):
    """RMS of dL/d(activation) at the input and after each child, over |dL/d(output)|, in the plainest way."""
    kept = [x.clone().requires_grad_()]
    for child in model:
        kept.append(child(kept[-1]))
        kept[-1].retain_grad()
    loss(kept[-1], y).backward()
    scale = kept[-1].grad.double().norm()
    return [float(k.grad.double().square().mean().sqrt() / scale) for k in kept], float(scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_flow_is_the_rms_of_the_gradient_at_each_boundary(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(*[oracles.Residual(oracles.layer(6)) for _ in range(5)]).to(dtype)
    x, y = data(6, dtype=dtype)
    flow = ss.gradient_flow(model, (x, y), mse)
    expected, scale = by_hooks(model, x, y, mse)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    np.testing.assert_allclose([b.gradient_rms for b in flow.boundaries], expected, rtol=tolerance)
    assert flow.output_gradient_norm == pytest.approx(scale, rel=tolerance)
    factors = [b.factor for b in flow.boundaries[:-1]]
    assert flow.boundaries[-1].factor is None
    assert (
        math.prod(factors)
        == pytest.approx(flow.product, rel=1e-9)
        == pytest.approx(expected[0] / expected[-1], rel=tolerance)
    )
    # The fall is between hidden boundaries: neither the input nor the output.
    assert flow.verdict.fall_decades == pytest.approx(math.log10(expected[-2] / expected[1]), abs=1e-6)
    assert [b.depth for b in flow.boundaries] == list(range(6))
    assert flow.boundaries[0].activation_rms == pytest.approx(float(x.square().mean().sqrt()), rel=1e-6)


def test_the_weights_are_as_autograd_has_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    x, y = torch.randn(6, 5), torch.randn(6, 3)
    flow = ss.gradient_flow(model, (x, y), mse)
    mse(model(x), y).backward()
    for layer in flow.layers:
        g = dict(model.named_parameters())[layer.name].grad.double()
        assert layer.weight_grad_mean_abs == pytest.approx(float(g.abs().mean()), rel=1e-6)
        assert layer.weight_grad_rms == pytest.approx(float(g.square().mean().sqrt()), rel=1e-6)
        assert layer.zero_fraction == pytest.approx(float((g == 0).double().mean()))
    assert [w.name for w in flow.layers] == ["0.weight", "2.weight"]


@pytest.mark.parametrize(
    "use, expected",
    [
        (False, [2.0173587e-4, 1.2011161e-4, 7.1520405e-4, 1.3988736e-3, 5.0496454e-3]),
        (True, [0.22169793, 0.20694108, 0.32896999, 0.26657322, 1.32585418]),
    ],
)
def test_the_lectures_numbers(use, expected):
    torch.manual_seed(123)
    model = ss.book.ExampleDeepNeuralNetwork([3, 3, 3, 3, 3, 1], use)
    flow = ss.gradient_flow(model, (torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[0.0]])), nn.MSELoss())
    np.testing.assert_allclose([w.weight_grad_mean_abs for w in flow.layers], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(ignore_index=2)]
)
def test_several_batches_are_one(loss):
    torch.manual_seed(0)
    model = nn.Sequential(*[oracles.Residual(oracles.layer(6)) for _ in range(3)], nn.Linear(6, 4)).double()
    x, y = torch.randn(32, 6).double(), torch.randint(0, 4, (32,))
    whole = ss.gradient_flow(model, (x, y), loss)
    parts = ss.gradient_flow(model, ss.batches([(x[:20], y[:20]), (x[20:], y[20:])]), loss)
    for name in ("gradient_rms", "activation_rms"):
        ours, theirs = ([getattr(b, name) for b in f.boundaries] for f in (parts, whole))
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    np.testing.assert_allclose(
        [w.weight_grad_rms for w in parts.layers], [w.weight_grad_rms for w in whole.layers], rtol=1e-12
    )
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12)
    assert (
        parts.samples == 32
        and parts.batches == 2
        and parts.layers[0].spread > 0
        and whole.layers[0].spread is None
    )


@pytest.mark.parametrize("factor", [1e6, 1e-6, 1e-20])
def test_a_factor_on_the_loss_cancels(factor):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(12)])
    one = ss.gradient_flow(model, data(16), mse)
    other = ss.gradient_flow(model, data(16), lambda output, target: factor * mse(output, target))
    np.testing.assert_allclose(
        [b.gradient_rms for b in other.boundaries], [b.gradient_rms for b in one.boundaries], rtol=1e-5
    )
    assert (one.verdict.state, one.verdict.where) == (other.verdict.state, other.verdict.where)
    assert other.layers[0].weight_grad_rms == pytest.approx(factor * one.layers[0].weight_grad_rms, rel=1e-5)


# --- the verdict, on networks with a known flow ---


def expected_state(fall, steps):
    """An explosion is spread: enough of it is left without its two greatest steps."""
    explodes = fall <= -GROWTH and -fall * (1 - 2 / max(1, steps)) >= SPREAD_GROWTH
    return "vanishing" if fall >= FALL else "exploding" if explodes else "healthy"


GAINS = (0.05, 0.3, 0.5, 0.8, 0.9, 0.97, 1.0, 1.03, 1.1, 1.3, 2.0, 3.0)
DEPTHS = (3, 8, 20, 40)
LINEAR = [
    (gain, depth, dtype) for gain in GAINS for depth in DEPTHS for dtype in (torch.float32, torch.float64)
]


@pytest.mark.parametrize("gain, depth, dtype", LINEAR)
def test_deep_orthogonal_networks(gain, depth, dtype):
    """Every layer multiplies the gradient's norm by its gain, exactly."""
    torch.manual_seed(depth)
    model = nn.Sequential(*[oracles.orthogonal(8, gain) for _ in range(depth)]).to(dtype)
    verdict = ss.gradient_flow(
        model, data(8, dtype=dtype), lambda output, target: (output * target).sum()
    ).verdict
    fall = -(depth - 2) * math.log10(gain)  # from the last hidden boundary to the first weight's
    assert verdict.fall_decades == pytest.approx(fall, abs=1e-3)
    assert verdict.slope == pytest.approx(-math.log10(gain), abs=1e-4)
    assert verdict.slope_interval[0] - 1e-4 <= -math.log10(gain) <= verdict.slope_interval[1] + 1e-4
    assert verdict.state == expected_state(fall, depth - 2)
    assert (verdict.cause == "gain") == (verdict.state != "healthy") or verdict.cause == "underflow"
    if verdict.state != "healthy" and verdict.cause == "gain":
        assert verdict.evidence == pytest.approx(gain, rel=1e-4)


TURNS = [(a, depth) for a in (0.01, 0.1, 0.3, 0.5, 1.0) for depth in (2, 6, 15, 30, 60)]


@pytest.mark.parametrize("a, depth", TURNS)
def test_deep_residual_networks(a, depth):
    """x + a Q x with Q orthogonal and antisymmetric: sqrt(1 + a^2) a layer, exactly; shortcuts make it grow."""
    torch.manual_seed(depth)
    model = nn.Sequential(*[oracles.Turn(8, a) for _ in range(depth)])
    flow = ss.gradient_flow(model, data(8), lambda output, target: (output * target).sum())
    fall = -(depth - 2) * math.log10(1 + a * a) / 2
    assert flow.verdict.fall_decades == pytest.approx(fall, abs=1e-3)
    assert flow.verdict.state == expected_state(fall, depth - 2)
    assert all(b.kind == "merge" for b in flow.boundaries[1:])


MEAN_FIELD = [("relu", gain, depth) for gain in (0.3, 1.0, 3.0) for depth in (10, 20)] + [
    ("tanh", gain, depth) for gain in (0.1, 0.5) for depth in (10, 20)
]


@pytest.mark.parametrize("name, gain, depth", MEAN_FIELD)
def test_mean_field_gains(name, gain, depth):
    """Wide Gaussian layers: chi = sigma_w^2 E[phi'(z)^2] (Schoenholz 2016): gain^2 for ReLU with sigma_w^2 = 2 gain^2;
    gain^2 for tanh with sigma_w = gain < 1, where the units become linear.
    """
    torch.manual_seed(0)
    width, phi = 256, {"relu": nn.ReLU, "tanh": nn.Tanh}[name]
    layers = []
    for _ in range(depth):
        linear = nn.Linear(width, width, bias=False)
        nn.init.normal_(linear.weight, std=gain * math.sqrt((2 if name == "relu" else 1) / width))
        layers += [linear, phi()]
    x = torch.randn(16, width) * (1 if name == "relu" else 0.1)
    flow = ss.gradient_flow(nn.Sequential(*layers), (x, torch.randn(16, width)), lambda o, t: (o * t).sum())
    fall = -(depth - 2) * math.log10(gain)
    assert flow.verdict.fall_decades == pytest.approx(fall, abs=0.02 * abs(fall) + 0.4)
    assert flow.verdict.state == expected_state(fall, depth - 2)
    if name == "relu" and gain != 1:
        assert flow.verdict.cause == "gain"


BREAKS = [(depth, at) for depth in (6, 12, 24) for at in range(1, 6)]


@pytest.mark.parametrize("depth, at", BREAKS)
def test_one_weak_layer_is_where_it_breaks(depth, at):
    torch.manual_seed(0)
    model = nn.Sequential(*[oracles.orthogonal(8, 1e-3 if i == at else 1.0) for i in range(depth)])
    flow = ss.gradient_flow(model, data(8), lambda output, target: (output * target).sum())
    if at == depth - 1:  # the head: its step is common to all layers
        assert flow.verdict.state == "healthy" and flow.verdict.head.gain == pytest.approx(1e-3, rel=1e-4)
        return
    assert flow.verdict.state == "vanishing" and flow.verdict.fall_decades == pytest.approx(3, abs=1e-3)
    assert flow.verdict.where == flow.boundaries[at].name and flow.verdict.cause == "gain"
    assert f"{at}.weight" in flow.verdict.reason


@pytest.mark.parametrize("depth, at", BREAKS)
def test_a_dead_layer(depth, at):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(depth)])
    with torch.no_grad():
        for layer in model:
            layer[0].bias.fill_(0.5)
        model[at][0].bias.fill_(-1e3)
    flow = ss.gradient_flow(model, data(8), mse)
    assert flow.verdict.state == "dead" and flow.verdict.cause == "inactive" and flow.verdict.evidence == 1
    assert flow.verdict.where == f"{at}.0"
    assert {w.state for w in flow.layers[: at + 1]} == {"exact_zero"}


@pytest.mark.parametrize("depth, at", BREAKS)
def test_a_layer_saturated_beyond_its_dtype_is_dead(depth, at):
    # 1 - tanh^2 rounds to 0 in float32, and is 1e-17 in float64: no scale of the loss brings it back.
    torch.manual_seed(0)
    model = nn.Sequential(
        *[nn.Sequential(oracles.orthogonal(8, 1.0), nn.Tanh()) for _ in range(depth)]
    ).float()
    with torch.no_grad():
        model[at][0].bias = nn.Parameter(torch.full((8,), 18.0))
    x, y = data(8)
    flow = ss.gradient_flow(model, (x.float(), y.float()), mse)
    assert (flow.verdict.state, flow.verdict.cause) == ("dead", "saturation")
    assert "every unit of the tanh" in flow.verdict.reason and "is saturated" in flow.verdict.reason
    assert {w.state for w in flow.layers[: at + 1]} == {"exact_zero"}
    assert any("by rounding" in note for note in flow.notes)


def test_half_of_the_units_of_a_relu_are_off_by_design():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU()) for _ in range(20)])
    with torch.no_grad():
        for layer in model:
            nn.init.normal_(layer[0].weight, std=1 / 8)
    verdict = ss.gradient_flow(model, (torch.randn(32, 64), torch.randn(32, 64)), mse).verdict
    assert (verdict.state, verdict.cause) == ("vanishing", "gain")
    assert "the slope of its relu" in verdict.reason and "the weights' gain of 1.0" in verdict.reason
    assert "saturated" not in verdict.reason


def test_a_model_of_one_layer_has_a_name_for_its_output():
    flow = ss.gradient_flow(nn.Linear(3, 3), (torch.ones(2, 3), torch.zeros(2, 3)), mse)
    assert [b.name for b in flow.boundaries] == ["input", "output"]
    # Without a hidden boundary there is no fall.
    assert flow.verdict.fall_decades is None and "inf" not in str(flow)


@pytest.mark.parametrize("depth, at", BREAKS)
def test_a_missing_path(depth, at):
    model = nn.Sequential(
        *[nn.Linear(8, 8) for _ in range(at)],
        oracles.Severed(),
        *[nn.Linear(8, 8) for _ in range(depth - at)],
    )
    flow = ss.gradient_flow(model, data(8), mse)
    assert flow.verdict.state == "unconnected" and flow.verdict.cause == "missing path"
    assert flow.verdict.where == flow.boundaries[at].name and flow.verdict.evidence == at + 1
    assert [w.state for w in flow.layers] == ["not_connected"] * at + ["ok"] * (depth - at)


@pytest.mark.parametrize("depth, at", BREAKS)
def test_not_finite(depth, at):
    model = nn.Sequential(*[oracles.orthogonal(8, 1e25 if i in (at, at - 1) else 1.0) for i in range(depth)])
    flow = ss.gradient_flow(model, data(8), lambda output, target: (output * target).sum())
    assert flow.verdict.state == "nonfinite" and flow.verdict.cause == "overflow"
    assert flow.verdict.where == flow.boundaries[at + 1].name


@pytest.mark.parametrize("depth", [4, 8])
def test_a_gradient_that_overflows_where_the_activation_does_not(depth):
    model = nn.Sequential(*[oracles.orthogonal(8, 1e12) for _ in range(depth)])
    x, y = data(8)
    flow = ss.gradient_flow(model, (x * 10.0 ** (-12 * min(depth, 3)), y), lambda o, t: (o * t).sum())
    assert flow.verdict.state == "nonfinite"


def test_the_closed_forms_are_many():
    many = len(LINEAR) + len(TURNS) + len(MEAN_FIELD) + 4 * len(BREAKS) + 2
    assert many >= 190


# --- three kinds of zero ---


def test_underflow_is_not_death():
    torch.manual_seed(0)
    model = nn.Sequential(*[oracles.orthogonal(8, 1e-4) for _ in range(20)])
    flow = ss.gradient_flow(model, data(8), lambda output, target: (output * target).sum())
    assert flow.verdict.state == "vanishing" and flow.verdict.cause == "underflow"
    assert flow.verdict.fall_decades == pytest.approx(72, abs=1e-3)
    assert flow.boundaries[0].state == "underflow" and flow.boundaries[-1].state == "ok"
    assert flow.layers[0].state == "underflow" and flow.layers[-1].state != "not_connected"


def test_a_dead_branch_is_dead_where_it_is_more_than_a_tenth():
    model = nn.Sequential(*[oracles.Residual(nn.Sequential(nn.Linear(8, 8), nn.ReLU())) for _ in range(4)])
    with torch.no_grad():
        model[2].inner[0].bias.fill_(-1e3)
    flow = ss.gradient_flow(model, data(8), mse)
    assert flow.verdict.state == "dead" and flow.verdict.starved == ("2.inner.0.weight",)
    assert [w.state for w in flow.layers] == ["ok", "ok", "exact_zero", "ok"]
    assert any("exactly 0" in note for note in flow.notes)


def test_a_loss_without_slope_is_dead_at_the_end():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    flow = ss.gradient_flow(model, data(8), lambda output, target: output.sum() * 0)
    assert flow.verdict.state == "dead" and flow.verdict.cause == "loss"


def test_half_precision_says_what_training_would_lose():
    torch.manual_seed(0)
    model = nn.Sequential(*[oracles.orthogonal(16, 1.0) for _ in range(3)]).half()
    x, y = data(16, dtype=torch.float16)

    def tiny(output, target):
        return (output.float() * target.float()).sum() * 1e-9

    bare = ss.gradient_flow(model, (x, y), tiny)
    assert bare.verdict.state == "healthy" and any("underflow" in note for note in bare.notes)
    assert bare.layers[0].state == "underflow"
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    scaled = ss.gradient_flow(model, (x, y), tiny, scaler=scaler)
    assert not any("underflow" in note for note in scaled.notes) and scaled.layers[0].state == "ok"


# --- awkward models ---


def test_autocast_is_honoured():
    model = nn.Sequential(*[oracles.orthogonal(16, 1.0) for _ in range(3)])
    with torch.autocast("cpu", torch.bfloat16):
        flow = ss.gradient_flow(model, data(16), mse)
    assert "bfloat16" in flow.dtype and flow.verdict.state == "healthy"


def test_frozen_shared_and_unused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.twice, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.first.requires_grad_(False)

        def forward(self, x):
            return self.twice(self.twice(self.first(x)).relu())

    flow = ss.gradient_flow(Net(), data(8), mse)
    assert [(w.state, w.trainable) for w in flow.layers] == [
        ("not_connected", False), ("ok", True), ("not_connected", True),
    ]  # fmt: skip
    assert flow.verdict.state == "healthy" and len(flow.boundaries) == 4


@pytest.mark.parametrize("re_entrant", [True, False])
def test_checkpointing(re_entrant):
    class Checkpointed(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part, self.on = part, True

        def forward(self, x):
            if not self.on:
                return self.part(x)
            return torch.utils.checkpoint.checkpoint(self.part, x, use_reentrant=re_entrant)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 8), *[Checkpointed(oracles.Residual(oracles.layer(8))) for _ in range(3)]
    )
    on = ss.gradient_flow(model, data(8), mse)
    for part in model[1:]:
        part.on = False
    off = ss.gradient_flow(model, data(8), mse, found=None)
    assert on.verdict.fall_decades == pytest.approx(off.verdict.fall_decades, abs=1e-5) or re_entrant
    assert [w.weight_grad_rms for w in on.layers] == pytest.approx(
        [w.weight_grad_rms for w in off.layers], rel=1e-5
    )
    assert all(p.grad is None for p in model.parameters())


def test_an_optimizer_in_a_hook_takes_no_step():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    steps = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: steps.append(p))
    ss.gradient_flow(model, data(8), mse)
    assert not steps


def test_several_outputs_and_in_place():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            hidden = self.a(x)
            out = self.b(hidden.relu())
            out += hidden
            return {"out": out.relu_(), "hidden": hidden, "count": 3}

    flow = ss.gradient_flow(Net(), data(8), lambda output, target: mse(output["out"], target))
    assert flow.verdict.state == "healthy" and all(w.state == "ok" for w in flow.layers)


def test_refusals():
    model = nn.Linear(8, 8)
    with pytest.raises(ss.SkipscopeError, match="the loss has no gradient"):
        ss.gradient_flow(model, data(8), lambda output, target: mse(output.detach(), target))
    with pytest.raises(ss.SkipscopeError, match="not a scalar"):
        ss.gradient_flow(model, data(8), lambda output, target: output - target)


def test_the_result_keeps(tmp_path):
    flow = ss.gradient_flow(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), data(8), mse)
    flow.save(tmp_path / "flow.json")
    assert ss.load(tmp_path / "flow.json") == flow
    assert max(len(line) for line in flow.table().text(80).splitlines()) <= 80


# --- the pure part ---


def test_least_squares_against_scipy():
    from scipy.stats import linregress, t

    y = np.random.default_rng(0).normal(size=12)
    fit = linregress(np.arange(12), y)
    slope, (low, high) = least_squares(list(y))
    margin = t.ppf(0.975, 10) * fit.stderr
    assert (slope, low, high) == pytest.approx((fit.slope, fit.slope - margin, fit.slope + margin))


def test_the_reason_names_saturation():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(12)])
    with torch.no_grad():
        for layer in model:
            layer[0].bias.fill_(3.0)
    verdict = ss.gradient_flow(model, data(16), mse).verdict
    assert verdict.state == "vanishing" and verdict.cause == "saturation" and verdict.evidence > 0.5


def test_judge_needs_no_clues():
    points = [Point(str(i), "ok", -3.0 * (3 - i)) for i in range(4)]
    verdict = judge(points)
    assert (verdict.state, verdict.fall_decades, verdict.cause) == ("vanishing", 9.0, "unexplained")


def test_the_reason_names_rank_collapse():
    """ReLU layers with a common bias: all samples end up alike while the size of the gradient is kept."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(60)])
    with torch.no_grad():
        for layer in model:
            nn.init.kaiming_normal_(layer[0].weight)
            layer[0].bias.zero_()
    flow = ss.gradient_flow(model, data(64, n=16), lambda output, target: (output * target).sum())
    assert (
        flow.verdict.state == "healthy" and flow.verdict.cause == "collapse" and flow.verdict.evidence > 0.995
    )
    assert "rank collapse" in flow.verdict.reason
    one, other = (flow.boundaries[i].similarity for i in (1, -1))
    assert one < 0.5 < other
    with torch.no_grad():
        hidden = data(64, n=16)[0]
        for layer in model[:-1]:
            hidden = layer(hidden)
        last = model[-1][0](hidden).double()
        unit = last / last.norm(dim=1, keepdim=True)
        cosines = unit @ unit.T
        expected = float((cosines.sum() - cosines.diagonal().sum()) / (16 * 15))
    assert other == pytest.approx(expected, abs=1e-5)


def test_a_compiled_or_wrapped_model_is_measured_as_itself():
    torch.manual_seed(0)
    model = nn.Sequential(*[oracles.Residual(oracles.layer(6)) for _ in range(3)])
    plain = ss.gradient_flow(model, data(6), mse)
    compiled = torch.compile(model, backend="eager")
    compiled(data(6)[0])
    for wrapped in (compiled, nn.DataParallel(model)):
        flow = ss.gradient_flow(wrapped, data(6), mse)
        assert flow.boundaries == plain.boundaries and flow.layers == plain.layers
        assert len(ss.importance(wrapped, data(6), mse).notes) == 0
        assert ss.path_spectrum(wrapped, data(6), mse).residual < 1e-5


def test_sparse_gradients_are_read_as_dense_ones():
    def make(sparse):
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Flatten(), nn.Linear(12, 2))

    batches = ss.batches(
        [(torch.arange(6).view(2, 3), torch.zeros(2, 2)), (torch.ones(3, 3).long(), torch.ones(3, 2))]
    )
    sparse, dense = (ss.gradient_flow(make(s), batches, mse) for s in (True, False))
    for one, other in zip(sparse.layers, dense.layers):
        assert one.weight_grad_rms == pytest.approx(other.weight_grad_rms, rel=1e-6)
        assert one.zero_fraction == other.zero_fraction and one.spread == pytest.approx(
            other.spread, rel=1e-6
        )


def test_a_function_outside_its_domain_is_no_overflow():
    class Angle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(torch.acos(3 + self.a(x).square()))

    verdict = ss.gradient_flow(Angle(), data(8), lambda output, target: output.sum()).verdict
    assert verdict.state == "nonfinite" and verdict.cause == "unexplained" and "acos" in verdict.reason


def test_a_flow_is_a_sequence_of_its_boundaries():
    flow = ss.gradient_flow(
        ss.reference.deep_mlp(3, width=8), ss.reference.digits(16), nn.functional.cross_entropy
    )
    assert len(flow) == len(flow.boundaries) and list(flow) == list(flow.boundaries)
    assert flow[-1] is flow.boundaries[-1]


class LastStep(nn.Module):
    """An LSTM whose last state is read."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def test_steps_of_several_batches_of_unequal_length_are_those_of_the_whole_loss():
    torch.manual_seed(0)
    model = LastStep().double()
    inputs = [torch.randn(n, length, 3, dtype=torch.float64) for n, length in ((4, 3), (6, 5), (2, 4))]
    targets = [torch.randint(0, 2, (len(x),)) for x in inputs]
    flow = ss.gradient_flow(model, ss.batches(list(zip(inputs, targets))), nn.functional.cross_entropy)
    found = [site.gradient_rms for site in flow.sites if site.function.endswith(" step")]
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss = (
        sum(nn.functional.cross_entropy(model(x), y, reduction="sum") for x, y in zip(leaves, targets)) / 12
    )
    loss.backward()
    at = [[x.grad[:, t] for x in leaves if t < x.shape[1]] for t in range(5)]
    rms = [math.sqrt(sum(float(g.square().sum()) for g in of) / sum(g.numel() for g in of)) for of in at]
    outputs = torch.cat([model(x) for x in inputs]).detach().requires_grad_()
    (seed,) = torch.autograd.grad(nn.functional.cross_entropy(outputs, torch.cat(targets)), outputs)
    np.testing.assert_allclose(found, np.array(rms) / float(seed.norm()), rtol=1e-10)


def test_the_table_gives_the_interval_of_the_slope():
    flow = ss.gradient_flow(nn.Sequential(*(oracles.layer(6) for _ in range(6))), data(6), mse)
    for interval, words in (
        ((-0.5, 0.125), "slope -0.250 decades a boundary (95 %: -0.500 to 0.125)"),
        ((-math.inf, math.inf), "slope -0.250 decades a boundary (two boundaries give no interval)"),
    ):
        verdict = replace(flow.verdict, slope=-0.25, slope_interval=interval)
        notes = " ".join(replace(flow, verdict=verdict).table().notes)
        assert words in notes, notes


@pytest.mark.parametrize(
    ("residual", "cause", "words"),
    [(True, "gain", "what the branches add"), (False, "unexplained", "by a factor 10.0 at")],
)
def test_a_residual_network_explodes_by_what_its_branches_add(residual, cause, words):
    found = _flow_rules._why("exploding", [2.0, 1.0, 0.0], 0, False, (), residual)
    assert found[0] == cause and words in found[1]
    assert found[2] == (pytest.approx(10.0) if residual else None)
    assert _flow_rules._why("vanishing", [-2.0, -1.0, 0.0], 0, False, (), True)[0] == "unexplained"


@pytest.mark.parametrize("is_residual", [True, False])
def test_a_verdict_knows_whether_shortcuts_run_along_the_boundaries(is_residual):
    torch.manual_seed(0)
    layers = [oracles.orthogonal(8, 1.5) for _ in range(20)]
    model = nn.Sequential(*map(oracles.Residual, layers)) if is_residual else nn.Sequential(*layers)
    verdict = ss.gradient_flow(model, data(8), mse).verdict
    assert (verdict.state, verdict.cause) == ("exploding", "gain")
    assert ("what the branches add to the shortcuts multiplies up" in verdict.reason) == is_residual


def test_what_starts_at_zero_moves_by_little_for_its_fan_in():
    layer = nn.Linear(400, 300)
    bias = layer.bias.detach().clone()
    _zero_by_design._move(layer, {"weight"}, torch.Generator().manual_seed(0))
    size = _zero_by_design.SIZE / 20
    assert layer.weight.std().item() == pytest.approx(size, rel=0.02)
    assert abs(layer.weight.mean().item()) < size / 50
    assert torch.equal(layer.bias, bias)


def test_gradient_times_activation_that_grows_is_no_explosion_where_the_gradient_stays():
    points = [Point(f"{i}", "ok", 0.0, hidden=True, log_relative=-float(i)) for i in range(12)]
    context = _flow_rules.FlowContext(False, True, "float32")
    assert judge(points, [], context).state == "healthy"
    falling = [replace(p, log_flow=1e-9 * (12 - i)) for i, p in enumerate(points)]
    assert judge(falling, [], context).state == "exploding"
