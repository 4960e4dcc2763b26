"""Several optimizers: one clock, one verdict for each loss, and one step where they step inside the backward pass."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope.monitor import watch

from ._loops import Spy, agrees, data, loss_of, network, oracle


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = (
            nn.RMSNorm(16),
            nn.Linear(16, 32, bias=False),
            nn.Linear(32, 16, bias=False),
        )

    def forward(self, x):
        return x + self.down(F.silu(self.up(self.norm(x))))


def residual(seed):
    torch.manual_seed(seed)
    return nn.Sequential(*[Block() for _ in range(4)], nn.Linear(16, 1, bias=False))


@pytest.mark.parametrize("one_optimizer", [False, True])
@pytest.mark.parametrize("order", [("actor", "critic"), ("critic", "actor")])
@pytest.mark.parametrize("scale", [1, 1e-4, 1e-6, 1e6])
def test_two_losses_are_never_mixed(tmp_path, scale, order, one_optimizer):
    models = {name: residual(("actor", "critic").index(name)) for name in order}
    x, y = torch.randn(32, 16), torch.randn(32, 1)
    parameters = {name: list(model.parameters()) for name, model in models.items()}
    if one_optimizer:
        optimizers = [torch.optim.Adam([*parameters[order[0]], *parameters[order[1]]], 1e-3)]
    else:
        optimizers = [torch.optim.Adam(parameters[name], 1e-3) for name in ("actor", "critic")]
    with watch(models, optimizers) as monitor:
        for _ in range(6):
            for optimizer in optimizers:
                optimizer.zero_grad()
            (scale * F.mse_loss(models["actor"](x), y)).backward()
            F.mse_loss(models["critic"](x), y).backward()
            for optimizer in optimizers:
                optimizer.step()
    assert monitor.verdict.state == "healthy"
    assert {v.chain: v.state for v in monitor.verdict.chains} == {"actor": "healthy", "critic": "healthy"}
    again = ss.load(monitor.history.save(tmp_path / "history.json"))
    assert again.verdict == monitor.verdict and again.chains == monitor.history.chains


def test_one_loss_in_trouble_is_named():
    torch.manual_seed(0)
    sick = nn.Sequential(*[p for _ in range(10) for p in (nn.Linear(8, 8), nn.Sigmoid())], nn.Linear(8, 1))
    well = network()
    one, two = (torch.optim.SGD(m.parameters(), lr=1e-3) for m in (well, sick))
    with watch({"well": well, "sick": sick}, [one, two]) as monitor:
        for _ in range(4):
            one.zero_grad()
            loss_of(well).backward()
            one.step()
            two.zero_grad()
            sick(torch.randn(8, 8)).sum().backward()
            two.step()
    assert monitor.verdict.state == "vanishing" and monitor.verdict.chain == "sick"
    assert [v.state for v in monitor.verdict.chains] == ["healthy", "vanishing"]
    assert "sick" in str(monitor.verdict)


def in_backward(model, kind=torch.optim.Adam):
    order = []
    optimizers = [kind([p], 1e-3) for p in model.parameters()]

    def hook_of(i):
        def hook(p):
            order.append(i)
            optimizers[i].step()
            optimizers[i].zero_grad()

        return hook

    for i, p in enumerate(model.parameters()):
        p.register_post_accumulate_grad_hook(hook_of(i))
    return optimizers, order


def test_optimizers_that_step_inside_backward_make_one_step():
    torch.manual_seed(0)
    model = nn.Sequential(
        *[q for _ in range(6) for q in (nn.Linear(8, 8), nn.Tanh())], nn.Linear(8, 1)
    ).double()
    x = torch.randn(8, 8, dtype=torch.float64)
    right = []
    optimizers, order = in_backward(model)
    seen = []
    with watch(model, optimizers, flow_every=2, on_verdict=seen.append) as monitor:
        for i in range(3):
            if i % 2 == 0:
                flow = ss.gradient_flow(model, (x, torch.zeros(8, 1, dtype=torch.float64)), F.mse_loss)
                right.append([b.gradient_rms * flow.output_gradient_norm for b in flow.boundaries])
            model(x).square().mean().backward()
    history = monitor.history
    assert [int(i) for i in history.optimizers] == order
    assert history.steps.tolist() == [i + 1 for i in range(3) for _ in optimizers]
    assert (np.diff(history.seconds) > 0).all()
    np.testing.assert_array_equal(history.flow_steps, [1, 3])
    np.testing.assert_allclose(history.flow, right, rtol=1e-9)
    assert monitor.verdict.state == "healthy" and not monitor.verdict.chains
    assert [event.verdict.state for event in seen] == ["healthy"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_without_flow_too_the_verdict_waits_for_the_whole_backward_pass():
    torch.manual_seed(0)
    model = nn.Sequential(*[q for _ in range(12) for q in (nn.Linear(8, 8), nn.Sigmoid())], nn.Linear(8, 1))
    optimizers, _ = in_backward(model, torch.optim.SGD)
    seen = []
    with watch(model, optimizers, on_verdict=seen.append) as monitor:
        for _ in range(3):
            model(torch.randn(8, 8)).square().mean().backward()
    assert monitor.verdict.state == "vanishing" and monitor.verdict.hinders
    assert [event.verdict.state for event in seen] == ["vanishing"]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon came with torch 2.9")
def test_two_optimizers_after_one_backward_have_one_flow():
    model = network(torch.float64)
    x = data(torch.float64)
    flow = ss.gradient_flow(model, (x, torch.zeros(8, 1, dtype=torch.float64)), F.mse_loss)
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    optimizers = [torch.optim.Muon(weights, lr=0.0), torch.optim.AdamW(biases, lr=0.0)]
    with watch(model, optimizers, flow_every=1) as monitor:
        for _ in range(3):
            model.zero_grad()
            model(x).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
    right = [b.gradient_rms * flow.output_gradient_norm for b in flow.boundaries]
    np.testing.assert_allclose(monitor.history.flow, [right] * 3, rtol=1e-9)
    assert {int(o) for o in monitor.history.flow_owners} == {0}


@pytest.mark.parametrize("register", ["first", "later", "much later"])
def test_a_pre_hook_that_changes_gradients_is_seen(register):
    model = network()
    optimizer, received = torch.optim.SGD(model.parameters(), lr=0.05), []

    def halve(opt, args, kwargs):
        for p in model.parameters():
            p.grad.mul_(0.5)

    if register == "first":
        optimizer.register_step_pre_hook(halve)
    with watch(model, optimizer) as monitor:
        for i in range(4):
            if (register, i) in {("later", 0), ("much later", 2)}:
                optimizer.register_step_pre_hook(halve)
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            received.append(oracle(model.parameters()))
    agrees(monitor.history, received)
    assert any("pre-hook was registered" in note for note in monitor.history.notes) == (register != "first")


@pytest.mark.parametrize(
    "kind, hinders", [(torch.optim.SGD, ("SGD",)), (torch.optim.Adam, ()), (torch.optim.RMSprop, ())]
)
def test_the_verdict_is_for_the_optimizer_that_is_watched(kind, hinders):
    torch.manual_seed(0)
    model = nn.Sequential(*[q for _ in range(8) for q in (nn.Linear(16, 16), nn.Sigmoid())], nn.Linear(16, 1))
    optimizer = kind(model.parameters(), lr=0.0)
    with watch(model, optimizer, flow_every=1) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 16)).square().mean().backward()
            optimizer.step()
    assert monitor.verdict.state == "vanishing"
    assert monitor.verdict.hinders == hinders
    assert ("mostly bears it" in monitor.verdict.reason) == (not hinders)


def test_the_oracle_of_two_optimizers_agrees():
    model = network()
    first, second = Spy(list(model.parameters())[:4]), Spy(list(model.parameters())[4:])
    with watch(model, [first, second]) as monitor:
        for _ in range(3):
            model.zero_grad()
            loss_of(model).backward()
            expected = oracle(model.parameters())
            first.step()
            second.step()
            np.testing.assert_allclose(np.nansum(monitor.history.norm[-2:], axis=0), expected[0], rtol=1e-6)
