"""What ``gradient_flow`` says of a network, ``watch`` says too: starved weights, blank positions, layers beside the line."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope.monitor.history import _history_reader


def watched(model, x, loss, *, flow=None, steps=4, rate=0.0, kind=torch.optim.SGD):
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=rate)
    with ss.watch(model, optimizer, flow_every=flow) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model(x)).backward()
            optimizer.step()
    return monitor.verdict


def classified(output):
    return F.cross_entropy(output, torch.arange(len(output)) % output.shape[-1])


class Branches(nn.Module):
    """Six branches beside shortcuts, two of them times a constant that is no parameter."""

    def __init__(self, factor, trained=False):
        super().__init__()
        torch.manual_seed(0)
        self.factor = nn.Parameter(torch.full((1,), factor)) if trained else factor
        self.stem, self.head = nn.Linear(16, 16), nn.Linear(16, 10)
        branch = lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))  # noqa: E731
        self.branches = nn.ModuleList(branch() for _ in range(6))

    def forward(self, x):
        x = self.stem(x)
        for i, branch in enumerate(self.branches):
            x = x + (self.factor if i in (1, 2) else 1.0) * branch(x)
        return self.head(x)


X = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("flow", [None, 1])
def test_starved_weights_are_those_that_gradient_flow_names(flow):
    once = ss.gradient_flow(Branches(1e-6), (X, X), lambda o, t: classified(o)).verdict
    live = watched(Branches(1e-6), X, classified, flow=flow)
    assert (live.state, live.where, set(live.starved)) == ("vanishing", once.where, set(once.starved))
    assert live.reason.split(";")[0] == once.reason and live.finding == once.finding
    assert {name.split(".")[1] for name in live.starved} == {"1", "2"}


@pytest.mark.parametrize("flow", [None, 1])
def test_a_branch_that_a_trained_scale_holds_back_by_design_is_not_starved(flow):
    """Layer scale (Touvron et al. 2021) starts at 1e-6, and grows."""
    live = watched(Branches(1e-6, trained=True), X, classified, flow=flow, rate=1e-3, kind=torch.optim.Adam)
    assert live.state == "healthy" and live.starved == ()


@pytest.mark.parametrize("flow", [None, 1])
@pytest.mark.parametrize("rate", [1e-6, 1e-3])
def test_what_grows_from_a_zero_is_not_starved(flow, rate):
    class Adapted(nn.Module):
        """Low-rank updates of which the second factor starts at 0 (LoRA), around layers that are frozen."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fixed = nn.ModuleList(nn.Linear(16, 16).requires_grad_(False) for _ in range(4))
            self.a = nn.ModuleList(nn.Linear(16, 2, bias=False) for _ in range(4))
            self.b = nn.ModuleList(nn.Linear(2, 16, bias=False) for _ in range(4))
            self.head = nn.Linear(16, 10)
            for b in self.b:
                nn.init.zeros_(b.weight)

        def forward(self, x):
            for fixed, a, b in zip(self.fixed, self.a, self.b):
                x = torch.tanh(fixed(x) + b(a(x)))
            return self.head(x)

    live = watched(Adapted(), X, classified, flow=flow, steps=12, rate=rate, kind=torch.optim.Adam)
    assert live.state == "healthy" and live.starved == ()


def test_blank_positions_that_a_norm_amplifies_are_no_explosion():
    """LayerNorm of zeros has a slope of 1/sqrt(eps): stock ConvNeXts gain ten decades on images with a blank border."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
            nn.init.zeros_(self.up.bias)
            nn.init.zeros_(self.down.bias)

        def forward(self, x):
            return x + self.down(F.gelu(self.up(self.norm(x))))

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 16, bias=False), *[Block() for _ in range(8)], nn.LayerNorm(16), nn.Linear(16, 2)
    )
    x = torch.randn(4, 12, 16)
    x[:, 4:] = 0
    target = torch.randn(4, 12, 2)
    loss = lambda output: F.mse_loss(output, target)  # noqa: E731
    once = ss.gradient_flow(model, (x, target), F.mse_loss).verdict
    live = watched(model, x, loss, flow=1, steps=1)
    assert live.fall_decades == pytest.approx(once.fall_decades, abs=1e-4) and live.fall_decades < -4.5
    assert (live.state, once.state) == ("healthy", "healthy")


class Doubled(torch.autograd.Function):
    """Identity going forward, three times the gradient going back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient


@pytest.mark.parametrize("passes", [1, 2])
def test_gradient_times_activation_by_autograd(passes):
    """Against autograd, also where two backward passes through one graph are added up."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)) for _ in range(12))
            self.head, self.seen = nn.Linear(16, 10), []

        def forward(self, x):
            self.seen.clear()
            for layer in self.layers:
                x = Doubled.apply(x + layer(x))
                self.seen.append(x)
            return self.head(x)

    model = Net()
    value = classified(model(X))
    gradients = torch.autograd.grad(passes * value, model.seen)
    # The boundary is the sum, before the function that follows it.
    expected = [float((3 * g * x).norm()) for g, x in zip(gradients, model.seen)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with ss.watch(model, optimizer, flow_every=1) as monitor:
        value = classified(model(X))
        for i in range(passes):
            value.backward(retain_graph=i < passes - 1)
        optimizer.step()
    history = monitor.history
    found = [v for v, h in zip(history.flow_relative[0], history.hidden) if h]
    assert found == pytest.approx(expected, rel=1e-5)
    # Grown by 3 at each of 12 layers, and by what the branches add.
    assert monitor.verdict.state == "exploding" and monitor.verdict.fall_decades < -5


def test_dead_units_are_placed_by_biases():
    """A dead layer zeroes the gradient of the weight after it, too, and not that of its bias."""
    torch.manual_seed(0)
    model = nn.Sequential(*[q for _ in range(4) for q in (nn.Linear(16, 16), nn.ReLU())], nn.Linear(16, 10))
    nn.init.constant_(model[4].bias, -100.0)
    verdict = watched(model, X, classified)
    assert (verdict.state, verdict.where) == ("dead", "4.bias")


def test_a_number_that_is_not_finite_says_how_its_call_is_found():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    verdict = watched(model, X, lambda output: (output - output).norm(dim=1).sqrt().sum())
    assert verdict.state == "nonfinite" and "gradient_flow(model, data, loss) on this batch" in verdict.advice
    assert "overflow" not in str(verdict)


@pytest.mark.parametrize("flow", [None, 1])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_last_layer_that_starts_at_zero_is_not_dead(flow, steps):
    """Couplings of flows and last convolutions of diffusion models start at 0; one step does not tell more."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
    nn.init.zeros_(model[4].weight)
    verdict = watched(model, X, classified, flow=flow, steps=steps, rate=1e-3, kind=torch.optim.Adam)
    assert verdict.state in ({"healthy", "unknown"} if steps == 1 else {"healthy"})


class Attention(nn.Module):
    """Attention in other people's manner: the queries and keys of a single position get rounding."""

    def __init__(self, width=16):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class OneToken(nn.Module):
    """A token of its own is read; what it is told of the others is damped by layer scale (DeiT III, CaiT)."""

    def __init__(self, width=16, scale=1e-6):
        super().__init__()
        self.stem, self.head = nn.Linear(width, width), nn.Linear(width, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.ModuleList([Attention(width) for _ in range(4)])
        self.scales = nn.ParameterList([scale * torch.ones(width) for _ in range(4)])

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.stem(x)], 1)
        for block, scale in zip(self.blocks, self.scales):
            x = x + scale * block(x)
        return self.head(x[:, 0])


def states_of(model, batch, flow, steps=4):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with ss.watch(model, optimizer, flow_every=flow) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
            yield monitor.verdict.state


@pytest.mark.parametrize("flow", [None, 1])
def test_what_layer_scale_damps_is_no_vanishing_gradient_after_the_first_step_either(flow):
    torch.manual_seed(0)
    batch = torch.randn(8, 5, 16), torch.randint(0, 4, (8,))
    assert set(states_of(OneToken(), batch, flow)) <= {"unknown", "healthy"}


@pytest.mark.parametrize("flow", [None, 1])
def test_rounding_of_queries_and_keys_that_attend_to_one_position_is_no_starved_weight(flow):
    class Net(nn.Sequential):
        def forward(self, x):
            x = self[0](x)
            for block in list(self)[1:-1]:
                x = x + block(x)
            return self[-1](x.mean(1))

    torch.manual_seed(0)
    model = Net(nn.Linear(16, 16), *[Attention() for _ in range(4)], nn.Linear(16, 4))
    batch = torch.randn(8, 1, 16), torch.randint(0, 4, (8,))
    assert set(states_of(model, batch, flow)) <= {"unknown", "healthy"}
    assert model[1].q.weight.grad.abs().max() < 1e-6 * model[1].v.weight.grad.abs().max()


@pytest.mark.parametrize(("ratio", "share"), [(1e-5, 0.25), (1e-8, 0.0)])
def test_a_gradient_as_small_as_the_rounding_of_others_starves_nothing(ratio, share):
    norms = np.array([[1.0] * 9 + [ratio] * 3] * 8)
    names = tuple(f"w{i}" for i in range(12))
    history = SimpleNamespace(owners=(0,) * 12, optimizers=np.zeros(8, int), norm=norms, parameters=names)
    assert _history_reader._starved(history, range(12), dict.fromkeys(names, 1.0)).share == share
