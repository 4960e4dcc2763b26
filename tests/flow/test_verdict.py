"""The verdict: terms of a loss apart, agreement of batches, what cannot be told, and what is no fault."""

import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope._numbers import student_quantile
from skipscope.flow._flow_result import Head
from skipscope.flow.passes import _gradient_sites
from skipscope.flow.verdict import _verdict_evidence
from skipscope.flow.verdict._chain_verdict import judge_chain
from skipscope.flow.verdict._flow_rules import FALL, GROWTH, NORMED_GROWTH, FlowContext, Point, judge
from skipscope.flow.verdict._verdict_evidence import Evidence, Reach, Starved


def batch(n=16, width=8, classes=2):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(n, width, generator=draw), torch.randint(0, classes, (n,), generator=draw)


# --- terms of the loss ---


class Two(nn.Module):
    """A part that is healthy, and one in which the gradient vanishes."""

    def __init__(self, order):
        super().__init__()
        torch.manual_seed(0)
        parts = {
            "good": nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)], nn.Linear(8, 2)),
            "bad": nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Sigmoid()) for _ in range(10)], nn.Linear(8, 2)),
        }  # fmt: skip
        for name in order:
            self.add_module(name, parts[name])

    def forward(self, x):
        return {"good": self.good(x), "bad": self.bad(x)}


def added(output, target):
    return F.mse_loss(output["good"], F.one_hot(target, 2).float()) + 0.5 * F.cross_entropy(output["bad"], target)  # fmt: skip


def turned_round(output, target):
    return 0.5 * F.cross_entropy(output["bad"], target) + F.mse_loss(output["good"], F.one_hot(target, 2).float())  # fmt: skip


def stacked(output, target):
    return torch.stack([F.mse_loss(output["good"], F.one_hot(target, 2).float()), F.cross_entropy(output["bad"], target)]).mean()  # fmt: skip


@pytest.mark.parametrize("loss, factor, order", [
    (added, 1.0, ("good", "bad")), (turned_round, 1e6, ("bad", "good")), (stacked, 1e-6, ("good", "bad")),
])  # fmt: skip
def test_each_term_of_the_loss_has_its_own_verdict(loss, factor, order):
    verdict = ss.gradient_flow(Two(order), batch(), lambda o, t: factor * loss(o, t)).verdict
    alone = ss.gradient_flow(Two(order), batch(), lambda o, t: F.cross_entropy(o["bad"], t)).verdict
    states = {one.chain.split(" ")[0]: one for one in verdict.chains}
    assert {name: one.state for name, one in states.items()} == {"mse_loss": "healthy", "cross_entropy": "vanishing"}  # fmt: skip
    assert states["cross_entropy"].fall_decades == pytest.approx(alone.fall_decades, rel=1e-5)
    assert (verdict.state, verdict.where, verdict.cause) == (alone.state, alone.where, alone.cause)
    assert verdict.chain == states["cross_entropy"].chain and verdict.chain in str(verdict)


def test_a_loss_of_one_term_has_no_chains():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert ss.gradient_flow(model, batch(), F.cross_entropy).verdict.chains == ()
    decayed = lambda o, t: F.cross_entropy(o, t) + 1e-3 * sum(p.square().sum() for p in model.parameters())  # noqa: E731
    assert ss.gradient_flow(model, batch(), decayed).verdict.chains == ()


def test_the_steps_of_a_recurrence_are_one_term():
    class Cells(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.LSTMCell(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            state, outputs = None, []
            for t in range(x.shape[1]):
                state = self.cell(x[:, t], state)
                outputs.append(self.head(state[0]))
            return outputs

    data = torch.randn(4, 40, 8), torch.randint(0, 2, (4,))
    each = ss.gradient_flow(Cells(), data, lambda o, t: sum(F.cross_entropy(one, t) for one in o) / len(o))
    last = ss.gradient_flow(Cells(), data, lambda o, t: F.cross_entropy(o[-1], t))
    assert each.verdict.chains == () and each.verdict.state == "healthy"
    assert (last.verdict.state, last.verdict.cause) == ("vanishing", "time")


def test_a_term_that_its_own_margin_silences_is_no_fault():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)], nn.Linear(8, 2))
    verdict = ss.gradient_flow(
        model, batch(), lambda o, t: F.cross_entropy(o, t) + (o.square().mean() - 1e3).clamp(min=0)
    ).verdict
    assert verdict.state == "healthy" and [one.state for one in verdict.chains] == ["healthy", "dead"]
    unclamped = ss.gradient_flow(model, batch(), lambda o, t: F.cross_entropy(o, t) + 0 * o.square().mean())
    assert unclamped.verdict.state == "dead"


# --- batches, noise, opaque calls ---


def test_the_share_of_the_batches_that_agree():
    def identity():
        layer = nn.Linear(8, 8, bias=False)
        nn.init.eye_(layer.weight)
        return layer

    torch.manual_seed(0)
    model = nn.Sequential(identity(), nn.Tanh(), identity(), nn.Tanh(), identity())
    y, large = torch.randn(8, 8), 5 * torch.randn(8, 8).sign()  # tanh has a slope of 2e-4 at 5
    saturated, other = (large, y), (large / 100, y)
    of = lambda *batches: ss.gradient_flow(model, ss.batches(batches), F.mse_loss).verdict  # noqa: E731
    verdict = of(saturated, other, other, other)
    assert (verdict.state, verdict.agreement) == ("healthy", 0.75)
    assert (of(other, other).agreement, of(saturated, saturated).state) == (1.0, "vanishing")
    assert ss.gradient_flow(model, other, F.mse_loss).verdict.agreement is None


@pytest.mark.parametrize("fall, state", [(2.2, "healthy"), (2.45, "cannot tell"), (2.55, "cannot tell"), (2.8, "vanishing")])  # fmt: skip
def test_within_the_noise_of_a_limit_it_cannot_be_told(fall, state):
    noise = np.random.default_rng(0).normal(size=100)
    noise = (noise - noise.mean()) / noise.std(ddof=1)  # a standard error of 0.1
    points = [
        Point("a", "ok", 0.0, samples=tuple(noise)), Point("b", "ok", fall / 2), Point("c", "ok", fall, samples=(fall,) * 100),
    ]  # fmt: skip
    verdict = judge(points)
    assert verdict.state == state
    if state == "cannot tell":
        assert verdict.cause == "noise" and verdict.evidence == pytest.approx(0.1)
    exact = judge([Point(p.name, p.state, p.log_flow) for p in points])
    assert exact.state == ("vanishing" if fall >= FALL else "healthy")


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *weights):
        ctx.save_for_backward(x, *weights)
        with torch.no_grad():
            for w in weights:
                x = (x @ w).tanh()
        return x

    @staticmethod
    def backward(ctx, gradient):
        x, *weights = ctx.saved_tensors
        with torch.enable_grad():
            x, *weights = (t.detach().requires_grad_() for t in (x, *weights))
            y = x
            for w in weights:
                y = (y @ w).tanh()
            return torch.autograd.grad(y, [x, *weights], gradient)


def test_a_verdict_that_would_rest_on_an_opaque_call_is_not_given():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList(torch.randn(8, 8) / 3 for _ in range(4))
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            return self.head(_Hidden.apply(x, *self.weights))

    verdict = ss.gradient_flow(Net(), batch(), F.cross_entropy).verdict
    assert (verdict.state, verdict.cause, verdict.where) == ("cannot tell", "opaque", "_Hidden")


class Reversible(torch.autograd.Function):
    """y1 = x1 + f(x2), y2 = x2 + g(y1), undone going back (Gomez et al. 2017, The Reversible Residual Network)."""

    @staticmethod
    def forward(ctx, x1, x2, f, g, *weights):
        with torch.no_grad():
            y1 = x1 + f(x2)
            y2 = x2 + g(y1)
        ctx.branches = f, g
        ctx.is_told = bool(weights)
        ctx.save_for_backward(y1, y2)
        return y1, y2

    @staticmethod
    def backward(ctx, d1, d2):
        (y1, y2), (f, g) = ctx.saved_tensors, ctx.branches
        with torch.enable_grad():
            y1 = y1.detach().requires_grad_()
            of_g = g(y1)
        into, *of_weights = torch.autograd.grad(of_g, [y1, *g.parameters()], d2)
        d1 = d1 + into
        with torch.enable_grad():
            x2 = (y2 - of_g).detach().requires_grad_()
            of_f = f(x2)
        into, *others = torch.autograd.grad(of_f, [x2, *f.parameters()], d1)
        found = [*others, *of_weights]
        if ctx.is_told:
            return d1, d2 + into, None, None, *found
        # As memcnn and Reformer do it: autograd is not told of the weights, their gradients are added up here.
        for p, gradient in zip([*f.parameters(), *g.parameters()], found):
            p.grad = gradient if p.grad is None else p.grad + gradient
        return d1, d2 + into, None, None


class Streams(nn.Module):
    def __init__(self, depth, how):
        super().__init__()
        torch.manual_seed(0)
        branch = lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))  # noqa: E731
        self.stem, self.head, self.how = nn.Linear(8, 16), nn.Linear(16, 2), how
        self.f, self.g = (nn.ModuleList(branch() for _ in range(depth)) for _ in range(2))

    def forward(self, x):
        a, b = self.stem(x).chunk(2, -1)
        for f, g in zip(self.f, self.g):
            if self.how == "plain":
                a = a + f(b)
                b = b + g(a)
            else:
                weights = [*f.parameters(), *g.parameters()] if self.how == "told" else []
                a, b = Reversible.apply(a, b, f, g, *weights)
        return self.head(torch.cat([a, b], -1))


@pytest.mark.parametrize("how", ["told", "untold"])
def test_a_reversible_network_is_judged_by_what_passes_between_its_calls(how):
    plain, reversible = (
        ss.gradient_flow(Streams(6, kind), batch(), F.cross_entropy) for kind in ("plain", how)
    )
    assert reversible.verdict.state == plain.verdict.state == "healthy"
    weights = {layer.name: layer.weight_grad_rms for layer in plain.layers}
    assert {layer.name: layer.weight_grad_rms for layer in reversible.layers} == pytest.approx(
        weights, rel=1e-5
    )
    # Both streams after a block are one activation: by autograd, with the seed of the verdict.
    model, norms = Streams(6, "plain"), []
    a, b = model.stem(batch()[0]).chunk(2, -1)
    for f, g in zip(model.f, model.g):
        a = a + f(b)
        b = b + g(a)
        both = torch.cat([a, b], -1)
        both.retain_grad()
        a, b = both.chunk(2, -1)
        norms.append(both)
    F.cross_entropy(model.head(both), batch()[1]).backward()
    expected = np.log10(float(norms[-1].grad.norm() / norms[0].grad.norm()))
    assert reversible.verdict.fall_decades == pytest.approx(expected, abs=1e-5)


def test_what_one_or_two_calls_hide_cannot_be_told():
    verdict = ss.gradient_flow(Streams(2, "told"), batch(), F.cross_entropy).verdict
    assert (verdict.state, verdict.cause) == ("cannot tell", "opaque")


def test_the_slope_of_what_follows_the_last_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    x, y = batch()
    squashed = ss.gradient_flow(nn.Sequential(model, nn.Sigmoid()), (x, F.one_hot(y, 2).float()), F.mse_loss)
    s = torch.sigmoid(model(x)).detach().double()
    expected = float((s * (1 - s)).square().mean().sqrt())
    assert squashed.verdict.head.slope == pytest.approx(expected, rel=1e-6)
    assert ss.gradient_flow(model, (x, y), F.cross_entropy).verdict.head.slope is None


# --- false alarms ---


class _Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.up.bias)
        nn.init.zeros_(self.down.bias)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def test_blank_positions_that_a_norm_amplifies_are_no_explosion():
    """LayerNorm of zeros has a slope of 1/sqrt(eps): blank patches and padding gain 2 decades a block, and teach nothing."""
    torch.manual_seed(0)
    stem = nn.Linear(8, 32, bias=False)
    model = nn.Sequential(stem, *[_Block(32) for _ in range(8)], nn.LayerNorm(32), nn.Linear(32, 2))
    x = torch.randn(4, 12, 8)
    x[:, 4:] = 0
    verdict = ss.gradient_flow(model, (x, torch.randn(4, 12, 2)), F.mse_loss).verdict
    assert verdict.fall_decades < -GROWTH - 1 and verdict.state == "healthy"


def test_a_direction_that_is_read_at_its_first_step_only():
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.LSTM(8, 8, num_layers=2, batch_first=True, bidirectional=True)
            self.head = nn.Linear(16, 2)

        def forward(self, x):
            return self.head(self.net(x)[0][:, -1])

    verdict = ss.gradient_flow(Net(), (torch.randn(4, 8, 8), batch(4)[1]), F.cross_entropy).verdict
    assert verdict.state == "healthy" and verdict.starved == ("net.weight_hh_l1_reverse",)


class Policy(nn.Module):
    """An actor as reinforcement learning starts it: its last weights are small, so that all actions are alike."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.act = (
            nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh()),
            nn.Linear(32, 2),
        )
        nn.init.orthogonal_(self.act.weight, 0.01)
        nn.init.zeros_(self.act.bias)

    def forward(self, x):
        log = F.log_softmax(self.act(self.body(x)), -1)
        return log, -(log.exp() * log).sum(-1)


def test_an_entropy_at_its_greatest_is_no_fault_of_the_head():
    """Its slope is 0 where all shares are equal, whatever the weights: it grows as soon as they are not."""
    loss = lambda o, t: F.nll_loss(o[0], t) - 0.01 * o[1].mean()  # noqa: E731
    verdict = ss.gradient_flow(Policy(), batch(), loss).verdict
    assert [one.state for one in verdict.chains] == ["healthy", "healthy"]
    assert min(one.head.gain for one in verdict.chains) < 1e-4

    weak = Policy()
    with torch.no_grad():
        weak.act.weight.mul_(1e-4)
    assert (ss.gradient_flow(weak, batch(), loss).verdict.cause) == "head"


def _classifier(factor):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    with torch.no_grad():
        model[4].weight.mul_(factor)
    return model


@pytest.mark.parametrize(
    "classes, factor, state", [(10, 1, "healthy"), (10, 0.01, "healthy"), (10, 1e5, "vanishing")]
)
def test_a_softmax_before_the_loss(classes, factor, state):
    """Equal shares pass on 1/classes of the gradient, and train; shares of 0 and 1 pass on nothing."""
    if factor == 1e5 and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
        pytest.skip("its softmax ends at exactly 0 also in float64: dead, and true")
    x, y = batch(32, classes=classes)
    model = nn.Sequential(*_classifier(factor), nn.Softmax(-1))
    verdict = ss.gradient_flow(model, (x, y), lambda o, t: F.mse_loss(o, F.one_hot(t, 10).float())).verdict
    assert verdict.state == state
    p = model(x).detach().double()
    expected = float((p * (1 - p) / 0.09).square().mean().sqrt())
    assert verdict.head.slope == pytest.approx(expected, rel=1e-3, abs=1e-12)


def test_last_weights_that_are_far_too_large_are_named_as_the_last_layers():
    verdict = ss.gradient_flow(_classifier(1e4), batch(32, classes=10), F.cross_entropy).verdict
    assert (verdict.state, verdict.cause, verdict.where) == ("vanishing", "head", "4")
    assert verdict.finding == "The weights of the last layer, 4, get next to no gradient for their size."
    assert "1 weight gets" in verdict.reason


def test_outputs_that_look_alike_are_no_collapse():
    """So do those of most untrained classifiers (cosines of 0.995 to 1 on 22 stock models), which train."""
    model = _classifier(0.01)
    nn.init.ones_(model[4].bias)
    verdict = ss.gradient_flow(model, batch(32, classes=10), F.cross_entropy).verdict
    assert (verdict.state, verdict.cause) == ("healthy", "none")


@pytest.mark.parametrize("seed", range(5))
def test_unscaled_shortcuts_of_30_layers_learn_and_are_healthy(seed):
    """Under SGD at 0.003 and 0.01 they reach a loss of 0.6 and 0.2 in 200 steps, from every seed that was tried."""
    torch.manual_seed(seed)
    model = ss.reference.deep_mlp(30, shortcut="identity")
    verdict = ss.gradient_flow(model, ss.reference.digits(64, seed=seed), F.cross_entropy).verdict
    assert verdict.state == "healthy" and -GROWTH < verdict.fall_decades < -1.5


class Codebook(nn.Module):
    """A straight-through quantiser (van den Oord et al. 2017, VQ-VAE): each term detaches what it must not train."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 8))
        self.codes = nn.Parameter(torch.randn(16, 4))

    def forward(self, x):
        z = self.encoder(x)
        q = self.codes[torch.cdist(z, self.codes).argmin(-1)]
        return self.decoder(z + (q - z).detach()), z, q


def of_codebook(output, x):
    y, z, q = output
    return F.mse_loss(y, x) + F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())


def test_what_a_term_detaches_and_another_trains_is_meant_and_noted():
    x = torch.randn(32, 8)
    flow = ss.gradient_flow(Codebook(), (x, x), of_codebook)
    assert flow.verdict.state == "healthy" and len(flow.verdict.chains) == 3
    assert sum("lets no gradient through. Another term does" in note for note in flow.notes) == 3


def test_what_every_term_detaches_is_cut_off():
    x = torch.randn(32, 8)
    verdict = ss.gradient_flow(
        Codebook(), (x, x), lambda o, t: F.mse_loss(o[0], t) + 0.25 * F.mse_loss(o[1], o[2].detach())
    ).verdict
    assert (verdict.state, verdict.where) == ("unconnected", "codes")
    assert "1 weighted call gets no gradient though the loss depends on it" in verdict.reason


def test_a_condition_at_the_point_0_gives_the_first_weight_nothing_and_another_term_does():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))

    @ss.objective
    def oscillator(model, x):
        x = x.clone().requires_grad_()
        u = model(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
        return (ddu + u).square().mean() + model(torch.zeros(1, 1)).square().mean()

    verdict = ss.gradient_flow(model, torch.rand(64, 1), oscillator).verdict
    assert verdict.state == "healthy" and [one.starved for one in verdict.chains] == [(), ()]


def test_gates_that_are_shut_starve_most_of_the_weights():
    """With sigmoid(-30) = 9e-14 in front, 16 of 18 weights get 13 decades less: their median starves as well."""

    class Highway(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.h, self.t = nn.Linear(16, 16), nn.Linear(16, 16)
            nn.init.constant_(self.t.bias, bias)

        def forward(self, x):
            t = torch.sigmoid(self.t(x))
            return t * torch.tanh(self.h(x)) + (1 - t) * x

    def of(bias):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), *[Highway(bias) for _ in range(8)], nn.Linear(16, 2))
        return ss.gradient_flow(model, batch(), F.cross_entropy).verdict

    assert (of(-30.0).state, of(-30.0).cause, len(of(-30.0).starved)) == ("vanishing", "branch", 16)
    assert (of(-2.0).state, of(-2.0).starved) == ("healthy", ())  # as Srivastava et al. 2015 start them


# --- the pure part ---


def test_students_quantile_against_scipy():
    from scipy.special import stdtrit

    for freedom in (*range(1, 30), 100, 101, 1000):
        for probability in (0.75, 0.975, 0.9995):
            expected = float(stdtrit(freedom, probability))
            # SciPy 1.12 is right to 1e-9.
            assert student_quantile(probability, freedom) == pytest.approx(expected, rel=1e-8)


@pytest.mark.slow
def test_a_first_measurement_imports_no_scipy_sympy_or_compiler():
    code = (
        "import sys, torch; from torch import nn; import skipscope as ss\n"
        "m = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Sigmoid()) for _ in range(6)], nn.Linear(8, 2), nn.Sigmoid())\n"
        "v = ss.gradient_flow(m, (torch.randn(4, 8), torch.rand(4, 2)), nn.functional.mse_loss).verdict\n"
        "assert v.state == 'vanishing', v\n"
        "print([n for n in ('scipy', 'sympy', 'torch._dynamo') if n in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_healthy_verdict_says_what_to_do_next_before_its_number():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)), nn.Linear(8, 3))
    data = torch.randn(16, 8), torch.randint(0, 3, (16,))
    verdict = ss.gradient_flow(model, data, nn.functional.cross_entropy).verdict
    assert verdict.state == "healthy"
    assert str(verdict).startswith(f"healthy: {verdict.finding} {verdict.advice}")


def test_of_several_recurrent_layers_the_one_that_reaches_back_least_counts():
    squares = {"long": [1.0] * 10, "short": [100.0 ** (t - 9) for t in range(10)]}
    sites = [SimpleNamespace(name=name, steps=steps, weights=(name,)) for name, steps in squares.items()]
    for order in (sites, sites[::-1]):
        reach = _verdict_evidence._reach(order)
        assert (reach.site, reach.steps, reach.length) == ("short", 3, 10)


class TwoTowers(nn.Module):
    """Two chains of orthogonal layers, each with an input and a gain of its own, and a head on their sum."""

    def __init__(self, *gains, depth=12):
        super().__init__()
        self.towers = nn.ModuleList()
        for gain in gains:
            layers = [nn.Linear(16, 16, bias=False) for _ in range(depth)]
            for layer in layers:
                nn.init.orthogonal_(layer.weight, gain)
            self.towers.append(nn.Sequential(*layers))
        self.head = nn.Linear(16, 3)

    def forward(self, x, y):
        return self.head(self.towers[0](x) + self.towers[1](y))


@pytest.mark.parametrize(
    ("gains", "state"),
    [((1, 0.4), "vanishing"), ((0.4, 1), "vanishing"), ((1, 1), "healthy"), ((1, 4), "exploding")],
)
def test_each_of_two_towers_is_a_line_of_its_own(gains, state):
    torch.manual_seed(0)
    data = (torch.randn(8, 16), torch.randn(8, 16)), torch.arange(8) % 3
    verdict = ss.gradient_flow(TwoTowers(*gains), data, nn.functional.cross_entropy).verdict
    assert verdict.state == state
    if state != "healthy":  # 11 steps between the 12 layers of one tower, not 23
        assert "at each of 11 boundaries" in str(verdict), verdict
        assert f"towers.{int(gains[0] == 1)}." in str(verdict)


@pytest.mark.parametrize(("profile", "growth"), [
    ([1.0, 1.0, 1e-2, 1e-2, 1e-2, 1e-4], 4.0),
    ([0.0, 1.0, 1e-2, 1e-2, 1e-2, 1e-3], 3.0),
    ([1.0, 1.0, 1e-2, 1e-2, 1e-2, 0.0], 0.0),  # it is not known by how much
    ([1e-2, 1e-2, 1e-2, 1.0, 1.0, 1e-2], 0.0),  # its greatest is not in the first half
])  # fmt: skip
def test_how_much_greater_the_gradient_is_at_early_steps(profile, growth):
    # Adding up a term for each of n steps gives log10(n) decades by itself.
    expected = growth and growth - math.log10(len(profile))
    assert _verdict_evidence.reach_of("rnn", profile).growth == pytest.approx(expected)


AVERAGES = {
    "mean": lambda h: h.mean(1),
    "sum over": lambda h: h.sum(1) / h.shape[1],
    "sum times": lambda h: h.sum(1) * (1 / h.shape[1]),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_over_positions_loses_nothing_however_it_is_written(name):
    """Six orthogonal layers on each of 900 equal positions, then five on their average: each position has its share."""

    class Averaged(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(11))
            for layer in self.layers:
                nn.init.orthogonal_(layer.weight)

        def forward(self, x):
            for i, layer in enumerate(self.layers):
                x = layer(AVERAGES[name](x) if i == 6 else x)
            return x

    torch.manual_seed(0)
    x = torch.randn(4, 1, 8).expand(4, 900, 8).contiguous()
    flow = ss.gradient_flow(Averaged(), (x, torch.arange(4)), F.cross_entropy)
    assert flow.verdict.state == "healthy"
    assert flow.verdict.fall_decades == pytest.approx(0, abs=1e-5)


def test_what_an_average_loses_is_put_back_before_it_and_not_after():
    """Outputs of calls that cannot be looked into: at the first two of four an average over positions comes later."""
    sites = [
        SimpleNamespace(name=f"call {order}", order=order, seen=True, finite=True, norm=norm)
        for order, norm in ((1, 1e-3), (4, 1e-3), (6, 1e-2), (9, 1e-1))
    ]
    graph = SimpleNamespace(ancestors=lambda orders: set(range(*orders)))
    line = _verdict_evidence._between_hidden(
        SimpleNamespace(graph=graph, hidden=sites), [(4, 9.0), (5, 1.5)], 10.0
    )
    np.testing.assert_allclose([point.log_flow for point in line], [-4 + 10.5, -4 + 1.5, -3, -2])
    assert [point.name for point in line] == ["call 1", "call 4", "call 6", "call 9"]


def test_gradient_times_activation_is_read_at_each_boundary(monkeypatch):
    kept = []
    evidence_of = _verdict_evidence.evidence_of

    def keep(points, places, numbers, readings, *others):
        kept.append({p.name: readings.gradients[k].relative for p, k in zip(points, numbers)})
        return evidence_of(points, places, numbers, readings, *others)

    for module in [m for name, m in sys.modules.items() if name.startswith("skipscope.flow")]:
        if getattr(module, "evidence_of", None) is evidence_of:
            monkeypatch.setattr(module, "evidence_of", keep)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)
    ).double()
    batches = [(torch.randn(n, 6, dtype=torch.float64), torch.arange(n) % 3) for n in (4, 8)]
    ss.gradient_flow(model, ss.batches(batches), F.cross_entropy)
    squares = dict.fromkeys("01234", 0.0)
    for x, y in batches:
        outputs = [x]
        for layer in model:
            outputs.append(layer(outputs[-1]))
        loss = F.cross_entropy(outputs[-1], y, reduction="sum") / 12
        for name, output, gradient in zip(squares, outputs[1:], torch.autograd.grad(loss, outputs[1:])):
            squares[name] += float((output.detach() * gradient).square().sum())
    read = {name: relative for name, relative in kept[-1].items() if name in squares}
    assert len(read) >= 2
    for name, relative in read.items():
        assert relative == pytest.approx(squares[name] ** 0.5, rel=1e-12), name


def test_a_healthy_network_is_told_where_to_look_next_and_no_other():
    torch.manual_seed(0)
    data = (torch.randn(8, 16), torch.randn(8, 16)), torch.arange(8) % 3
    healthy, vanishing = (ss.gradient_flow(TwoTowers(1, g), data, F.cross_entropy).verdict for g in (1, 0.4))
    words = "If training still stalls, check the data, the learning rate and the initialisation."
    assert words in healthy.advice and words not in vanishing.advice


def test_starved_weights_are_compared_with_the_median():
    ratio = dict(zip("abcdefg", (1e-8, 1e-2, 1e-2, 1.0, 1.0, 1.0, 1.0)))
    found = _verdict_evidence.starved_of(ratio, [(name,) for name in ratio])
    assert (found.names, found.than, found.zero) == (("a",), "median", False)
    assert found.decades == pytest.approx(8) and found.share == pytest.approx(1 / 7)


@pytest.mark.parametrize(
    ("into", "out", "decades"), [(2.0, 20.0, 1.0), (4.0, 0.04, -2.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)]
)
def test_decades_of_an_average_without_a_gradient_are_none(into, out, decades):
    reading = _gradient_sites.PoolReading(3, "mean", 100.0, into=into, out=out)
    assert reading.decades == pytest.approx(decades)


# --- attention over a single position ---


class Attends(nn.Module):
    """Blocks of attention with a shortcut; q, k and v are maps of their own."""

    def __init__(self, how, layers=3, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.stem, self.head = how, nn.Linear(8, width), nn.Linear(width, 2)
        self.q, self.k, self.v, self.o = (
            nn.ModuleList(nn.Linear(width, width) for _ in range(layers)) for _ in range(4)
        )

    def forward(self, x):
        x = self.stem(x)
        for q, k, v, o in zip(self.q, self.k, self.v, self.o):
            if self.how == "fused":
                mixed = F.scaled_dot_product_attention(q(x), k(x), v(x))
            else:
                mixed = (q(x) @ k(x).transpose(-1, -2)).softmax(dim=-1) @ v(x)
            x = x + o(mixed)
        return self.head(x.mean(1))


def tokens(length):
    x, y = batch(16)
    return torch.stack([(t + 1) * x for t in range(length)], 1), y


QUERIES = {f"{name}.{i}.weight" for name in "qk" for i in range(3)}


@pytest.mark.parametrize("how", ["fused", "written out"])
def test_attention_over_one_position_is_no_fault_and_is_named(how):
    verdict = ss.gradient_flow(Attends(how), tokens(1), F.cross_entropy).verdict
    assert verdict.state == "healthy" and verdict.cause == "one position"
    assert set(verdict.starved) == QUERIES and verdict.hinders == ()
    assert "queries and keys that attend to a single position" in verdict.finding
    assert len(verdict.finding.split()) <= 25
    more = ss.gradient_flow(Attends(how), tokens(4), F.cross_entropy).verdict
    assert more.state == "healthy" and more.cause == "none" and more.starved == ()


def test_what_rounding_leaves_of_the_queries_gradient_is_nothing(monkeypatch):
    """As the fused attention of torch 2.14 does: 1e-9 of what the values get."""
    fused = F.scaled_dot_product_attention

    def rounded(q, k, v):
        return fused(q, k, v) + 1e-9 * (q + k)

    monkeypatch.setattr(F, "scaled_dot_product_attention", rounded)
    verdict = ss.gradient_flow(Attends("fused"), tokens(1), F.cross_entropy).verdict
    assert (verdict.state, verdict.cause) == ("healthy", "one position") and set(verdict.starved) == QUERIES


def test_of_several_batches_all_must_have_one_position():
    data = ss.batches([tokens(1), tokens(4)])
    verdict = ss.gradient_flow(Attends("fused"), data, F.cross_entropy).verdict
    assert verdict.state == "healthy" and verdict.cause == "none" and verdict.starved == ()


def test_a_dead_branch_beside_attention_over_one_position_is_still_found():
    model = Attends("fused")
    with torch.no_grad():
        for o in model.o:
            o.weight.zero_()
            o.weight.requires_grad_(False)
    verdict = ss.gradient_flow(model, tokens(1), F.cross_entropy).verdict
    assert verdict.state == "dead" and verdict.cause == "branch"
    assert {name for name in verdict.starved if name.startswith("v")} == {f"v.{i}.weight" for i in range(3)}


TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
FUSED = pytest.param(
    "fused",
    marks=pytest.mark.skipif(
        TORCH >= (2, 14),
        reason="its kernel leaves rounding of what is 0, which a weight's gradient does not tell",
    ),
)


@pytest.mark.parametrize("how", [FUSED, "written out"])
@pytest.mark.parametrize("options", [{}, {"flow_every": 1}])
def test_a_training_that_attends_to_one_position_is_healthy(options, how):
    model, (x, y), events = Attends(how), tokens(1), []
    optimizer = torch.optim.Adam(model.parameters())
    with ss.watch(model, optimizer, on_verdict=events.append, **options) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert monitor.verdict.state == "healthy"
    assert {event.verdict.state for event in events} <= {"healthy", "unknown"}


class Fire(nn.Module):
    """SqueezeNet's module: two convolutions beside each other, after a narrow one."""

    def __init__(self, width):
        super().__init__()
        self.squeeze = nn.Conv2d(width, width // 2, 1)
        self.one = nn.Conv2d(width // 2, width // 2, 1)
        self.three = nn.Conv2d(width // 2, width // 2, 3, padding=1)
        for layer in (self.squeeze, self.one, self.three):
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, x):
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


def test_a_tiny_weight_after_branches_is_named_as_the_cause():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), *[Fire(16) for _ in range(4)], nn.Flatten(), nn.Linear(16 * 36, 2)
    )
    with torch.no_grad():
        model[3].squeeze.weight.mul_(1e-4)
    x = torch.randn(8, 3, 6, 6)
    verdict = ss.gradient_flow(model, (x, torch.arange(8) % 2), F.cross_entropy).verdict
    assert verdict.state == "vanishing" and verdict.cause == "gain"
    assert "3.squeeze.weight" in verdict.reason


# --- through time ---


class OverTime(nn.Module):
    def __init__(self, kind, gain, reads, layers=1, width=16, **more):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.head, self.reads = (
            kind(2, width, layers, batch_first=True, **more),
            nn.Linear(width, 4),
            reads,
        )
        with torch.no_grad():
            for name, weight in self.net.named_parameters():
                if gain and "weight_hh" in name:
                    weight.normal_(std=gain / width**0.5)

    def forward(self, x):
        h = self.net(x)[0]
        return self.head(h[:, -1] if self.reads == "last" else h.mean(1))


def series(steps=32):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(32, steps, 2, generator=draw), torch.randint(0, 4, (32,), generator=draw)


@pytest.mark.parametrize("reads", ["last", "mean"])
def test_a_gradient_that_grows_through_time_explodes(reads):
    verdict = ss.gradient_flow(
        OverTime(nn.RNN, 2.5, reads, nonlinearity="relu"), series(), F.cross_entropy
    ).verdict
    assert verdict.state == "exploding" and verdict.cause == "time" and verdict.where == "net"
    assert verdict.evidence > 4.2 and verdict.hinders == ("SGD", "Adam")
    assert verdict.score < -NORMED_GROWTH - verdict.evidence + GROWTH + 1e-9
    assert "explodes through time" in verdict.finding and len(verdict.finding.split()) <= 25
    assert "Clip gradients" in verdict.advice


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("gain", [0.0, 0.3])
def test_terms_of_many_steps_that_add_up_are_no_explosion(kind, gain):
    """Each state reaches all later ones that are read: at most as many equal terms as there are steps."""
    verdict = ss.gradient_flow(OverTime(kind, gain, "mean", layers=2), series(), F.cross_entropy).verdict
    # Gates that are half open keep a state that all samples share: that is in the score, and no growth.
    assert verdict.state == "healthy" and verdict.score > -1


# --- the score --------------------------------------------------------------------------------------------------------


def line(*logs, alike=None):
    return tuple(Point(f"p{i}", "ok", log, alike=alike) for i, log in enumerate(logs))


def score_of(points, state, *, normed=False, **evidence):
    verdict = judge_chain(Evidence((points,), **evidence), {}, FlowContext(normed=normed))
    assert verdict.state == state
    return verdict.score


def test_no_healthy_flow_scores_below_one_in_trouble():
    healthy = [
        score_of(line(*range(9), 0.0), "healthy"),  # 8 decades apart, none of them lost from end to end
        score_of(line(4.4, 3.3, 2.2, 1.1, 0.0), "healthy", normed=True),
        score_of((Point("x", "ok", 0.0, alike=0.0), *line(0.0, 0.0, alike=1.0)), "healthy"),
    ]
    level = line(0.0, 0.0)
    troubled = [
        score_of(line(0.0, FALL), "vanishing"),
        score_of(line(4.6, 3.4, 2.3, 1.1, 0.0), "exploding"),
        score_of(level, "vanishing", reach=Reach("rnn", 5, 16)),
        score_of(level, "vanishing", starved=Starved(("a",), 0.5, 4.1)),
        score_of(level, "vanishing", head=Head(0.0, 1e-5, None)),
        score_of(level, "exploding", growing=Reach("rnn", None, 16, GROWTH)),
    ]
    assert min(healthy) >= max(troubled)
    assert healthy[2] > healthy[1] > max(troubled) + 0.05


def test_a_sequence_hardly_longer_than_is_borne_scores_as_a_fall_hardly_greater():
    level = line(0.0, 0.0)
    hardly, far = (score_of(level, "vanishing", reach=Reach("rnn", steps, 16)) for steps in (5, 1))
    assert hardly == pytest.approx(score_of(line(0.0, FALL * 16 / 15), "vanishing"))
    assert far == pytest.approx(score_of(line(0.0, FALL * 16 / 3), "vanishing"))


def test_what_tells_samples_apart_counts_in_decades():
    given = Point("input", "ok", 0.0, alike=0.0, hidden=False)
    for alike, decades in ((0.0, 0.0), (0.99, 1.0), (1 - 1e-6, 3.0), (-0.5, 0.0)):
        points = (given, *line(0.0, 1.0, alike=alike))
        assert score_of(points, "healthy") == pytest.approx(-1.0 - decades, abs=1e-3)


def test_tokens_that_are_alike_in_samples_that_are_not_lose_nothing():
    """Rank collapse within a sample (tokens) is told of, and leaves samples apart."""

    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            one_for_all = self.one(x).mean(1, keepdim=True).expand(-1, 5, -1)
            return self.head(self.two(one_for_all).mean(1))

    torch.manual_seed(0)
    model, batch = Same(), (torch.randn(16, 5, 4), torch.arange(16) % 2)
    flow = ss.gradient_flow(model, batch, F.cross_entropy)
    assert next(b for b in flow if b.name == "two").similarity > 0.999
    assert flow.verdict.state == "healthy" and flow.verdict.score > -1.5
    model.one.bias.data.fill_(1e4)  # now samples are alike as well
    assert ss.gradient_flow(model, batch, F.cross_entropy).verdict.score < -2.5


class Loop(nn.Module):
    """A recurrence over the steps of a sequence by a loop of Python, linear but for a gain at each step."""

    def __init__(self, kind, gain, each=False):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.each, self.head = kind, each, nn.Linear(8, 3)
        self.cell = nn.RNNCell(8, 8, bias=False, nonlinearity="relu" if kind == "relu" else "tanh")
        self.given, self.kept = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.both = nn.Linear(16, 8, bias=False)
        for weight in (self.cell.weight_hh, self.kept.weight, self.both.weight[:, 8:]):
            nn.init.orthogonal_(weight, gain)
        used = {"cell": [self.cell], "two layers": [self.given, self.kept], "one layer": [self.both], "depth": [self.given, self.kept]}  # fmt: skip
        for part in (self.cell, self.given, self.kept, self.both):
            part.requires_grad_(part in used[kind])

    def step(self, x, h):
        if self.kind == "cell":
            return self.cell(x, h)
        if self.kind == "one layer":
            return torch.tanh(self.both(torch.cat([x, h], 1)))
        return torch.tanh(self.kept(h)) if self.kind == "depth" else torch.tanh(self.given(x) + self.kept(h))

    def forward(self, x):
        h = self.given(x[:, 0]) if self.kind == "depth" else x.new_zeros(len(x), 8)
        states = []
        for t in range(x.shape[1]):
            h = self.step(x[:, t], h)
            states.append(h)
        return self.head(torch.stack(states, 1)) if self.each else self.head(h)


def of_loop(kind, gain, each=False, steps=24):
    # Small enough that no tanh is far from 0: each step multiplies the gradient by the gain.
    x, target = (
        1e-9 * torch.randn(8, steps, 8, generator=torch.Generator().manual_seed(0)),
        torch.arange(8) % 3,
    )
    loss = (
        (lambda o, t: F.cross_entropy(o.transpose(1, 2), t[:, None].expand(-1, steps)))
        if each
        else F.cross_entropy
    )
    return ss.gradient_flow(Loop(kind, gain, each), (x, target), loss).verdict


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("kind", ["cell", "two layers", "one layer"])
def test_growth_through_the_steps_of_a_loop(kind, each):
    verdict = of_loop(kind, 2.0, each)
    assert (verdict.state, verdict.cause) == ("exploding", "time")
    assert verdict.where == {"cell": "cell", "two layers": "kept", "one layer": "both"}[kind]
    # From the last call to the first, without what adding up a term for each gives; no gradient is lost at h = 0.
    calls = 23 if kind == "two layers" else 24
    if not each:
        assert verdict.evidence == pytest.approx((calls - 1) * math.log10(2) - math.log10(calls), abs=0.05)
    assert of_loop(kind, 1.0, each).state == "healthy"
    assert of_loop(kind, 0.5, False, 60).cause == "time"


def test_a_network_that_uses_one_layer_again_and_again_is_no_loop_over_time():
    assert of_loop("depth", 2.0).cause != "time"
