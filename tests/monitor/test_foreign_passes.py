"""Backward passes whose gradients the optimizer never receives do not count; those it receives do, added up."""

import copy
import gc
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope.monitor import watch

from ._loops import network

X = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(8, 6).sin()


def loss_of(model, x=X):
    return model(x).square().mean()


def oracle(model, losses, points=("input", "0", "2", "4", "6")):
    """RMS at each boundary of the gradient of the sum of ``losses(model)``, by autograd on a copy."""
    model, kept = copy.deepcopy(model), {}
    x = X.clone().requires_grad_()
    kept["input"] = x
    for name in points[1:]:
        model.get_submodule(name).register_forward_hook(
            lambda _, a, out, name=name: kept.setdefault(name, out)
        )
    total = losses(model, x)
    gradients = torch.autograd.grad(total, [kept[name] for name in points])
    return [float(g.square().mean().sqrt()) for g in gradients]


def plain(model, optimizer):
    optimizer.zero_grad()
    loss_of(model).backward()


def attack(model, optimizer):
    q = X.clone().requires_grad_()
    torch.autograd.grad(1e3 * loss_of(model, q), q)
    plain(model, optimizer)


def attack_by_backward(model, optimizer):
    q = X.clone().requires_grad_()
    (1e3 * loss_of(model, q)).backward()
    plain(model, optimizer)


def attack_by_backward_of_inputs(model, optimizer):
    optimizer.zero_grad()
    q = X.clone().requires_grad_()
    (1e3 * loss_of(model, q)).backward(inputs=[q])
    loss_of(model).backward()


def generator(model, optimizer):
    g = nn.Linear(6, 6, dtype=torch.float64)
    (100 * model(g(X))).mean().backward()
    plain(model, optimizer)


def generator_through_frozen(model, optimizer):
    g = nn.Linear(6, 6, dtype=torch.float64)
    model.requires_grad_(False)
    (100 * model(g(X))).mean().backward()
    model.requires_grad_(True)
    plain(model, optimizer)


def measured(model, optimizer):
    flow = ss.gradient_flow(model, (X, torch.zeros(8, 1, dtype=torch.float64)), F.mse_loss)
    assert flow.verdict.state == "healthy"
    plain(model, optimizer)
    ss.find_shortcuts(model, X)


def cleared_in_place(model, optimizer):
    (7 * loss_of(model)).backward()
    optimizer.zero_grad(set_to_none=False)
    loss_of(model).backward()


def sharpness_aware(model, optimizer):
    optimizer.zero_grad()
    loss_of(model).backward()
    moved = [1e-12 * p.grad for p in model.parameters()]
    with torch.no_grad():
        for p, m in zip(model.parameters(), moved):
            p.add_(m)
    optimizer.zero_grad()
    loss_of(model).backward()
    with torch.no_grad():
        for p, m in zip(model.parameters(), moved):
            p.sub_(m)


FOREIGN = [
    plain, attack, attack_by_backward, attack_by_backward_of_inputs, generator, generator_through_frozen, measured,
    cleared_in_place, sharpness_aware,
]  # fmt: skip


@pytest.mark.parametrize("step", FOREIGN, ids=lambda f: f.__name__)
def test_only_what_the_optimizer_receives_counts(step):
    model = network(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    expected = oracle(model, lambda m, x: loss_of(m, x))
    with watch(model, optimizer, flow_every=1) as monitor:
        for _ in range(3):
            step(model, optimizer)
            optimizer.step()
    assert len(monitor.history.flow) == 3
    np.testing.assert_allclose(monitor.history.flow, [expected] * 3, rtol=1e-9)


def twice_through_one_graph(model, optimizer):
    optimizer.zero_grad()
    loss = loss_of(model)
    (loss / 4).backward(retain_graph=True)
    (3 * loss / 4).backward()


def two_losses_one_graph(model, optimizer):
    optimizer.zero_grad()
    out = model(X)
    (2 * out.square().mean()).backward(retain_graph=True)
    (-out.square().mean()).backward()


def gradients_by_hand(model, optimizer):
    grads = torch.autograd.grad(loss_of(model), list(model.parameters()))
    for p, g in zip(model.parameters(), grads):
        p.grad = g


def clipped(model, optimizer):
    plain(model, optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-6)


def a_scheduler_of_micro_batches(model, optimizer):
    optimizer.zero_grad()
    loss_of(model).backward()
    for p in model.parameters():
        p.grad.mul_(1.0)


@pytest.mark.parametrize(
    "step",
    [twice_through_one_graph, two_losses_one_graph, gradients_by_hand, clipped, a_scheduler_of_micro_batches],
    ids=lambda f: f.__name__,
)
def test_what_it_receives_counts_whole(step):
    model = network(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    expected = oracle(model, lambda m, x: loss_of(m, x))
    with watch(model, optimizer, flow_every=1) as monitor:
        for _ in range(2):
            step(model, optimizer)
            optimizer.step()
    if step is gradients_by_hand:  # autograd does not go on to the input
        assert monitor.history.boundaries == ("0", "2", "4", "6")
        expected = expected[1:]
    np.testing.assert_allclose(monitor.history.flow, [expected] * 2, rtol=1e-9)
    assert monitor.verdict.state == "healthy"


def test_of_lbfgs_the_first_evaluation_counts():
    model = network(torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=6)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    with watch(model, optimizer, flow_every=1) as monitor:
        for i in range(3):
            expected = oracle(model, lambda m, x: loss_of(m, x))
            optimizer.step(closure)
            np.testing.assert_allclose(monitor.history.flow[i], expected, rtol=1e-9)
    assert monitor.history.evaluations.max() > 1


def test_a_physics_informed_loss_differentiates_the_network_inside():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    q = torch.linspace(0, 1, 16, dtype=torch.float64)[:, None].requires_grad_()

    def residual(net, points):
        u = net(points)
        slope = torch.autograd.grad(u.sum(), points, create_graph=True)[0]
        return (slope - torch.cos(points)).square().mean() + u[0].square().sum()

    kept = {}
    twin = copy.deepcopy(model)
    for name in ("0", "2", "4"):
        twin[int(name)].register_forward_hook(lambda _, a, out, name=name: kept.setdefault(name, out))
    # What the loss does with the points outside the network is no part of the flow at its input.
    twin.register_forward_pre_hook(lambda _, a: (kept.setdefault("input", a[0].view_as(a[0])),))
    loss = residual(twin, q)
    gradients = torch.autograd.grad(loss, [kept[name] for name in ("input", "0", "2", "4")])
    expected = [float(g.square().mean().sqrt()) for g in gradients]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, flow_every=1) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            residual(model, q).backward()
            optimizer.step()
    np.testing.assert_allclose(monitor.history.flow, [expected] * 3, rtol=1e-9)
    assert monitor.verdict.state == "healthy"
    assert not q._backward_hooks


def test_no_hook_stays_on_a_tensor_of_the_users():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.query = network(torch.float64), nn.Parameter(torch.ones(6, dtype=torch.float64))

        def forward(self, x):
            self.hidden = self.net[0](x + self.query)
            return self.net[1:](self.hidden)

    model, x = Keeps(), X.clone().requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, flow_every=1) as monitor:
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
        assert len(monitor.history.flow) == 1
    assert not x._backward_hooks and not model.query._backward_hooks and not model.hidden._backward_hooks


# --- copies and files ---


def is_clean(model):
    return not any(
        m._forward_pre_hooks or m._forward_hooks or m._forward_pre_hooks_with_kwargs or m._backward_hooks
        for m in model.modules()
    )


def test_copies_and_files_made_while_the_flow_is_on_hold_nothing_of_ours():
    model = network(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    without = pickle.dumps(model)
    with watch(model, optimizer, flow_every=1) as monitor:
        assert pickle.dumps(model) == without
        averaged = torch.optim.swa_utils.AveragedModel(model)
        for _ in range(3):
            plain(model, optimizer)
            best = copy.deepcopy(model)
            file = io.BytesIO()
            torch.save(model, file)
            optimizer.step()
            averaged.update_parameters(model)
        assert is_clean(model)
    file.seek(0)
    for made in (best, averaged, torch.load(file, weights_only=False), pickle.loads(without)):
        assert is_clean(made)
    loss_of(best).backward()
    gc.collect()
    assert len(monitor.history.flow) == 3


def test_everything_ends_at_close_also_when_the_training_raised():
    from torch.nn.modules import module as hooks

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ZeroDivisionError), watch(model, optimizer, flow_every=1):
        model(torch.ones(2, 6))
        assert hooks._global_forward_pre_hooks
        raise ZeroDivisionError
    assert not hooks._global_forward_pre_hooks and not hooks._global_forward_hooks
    assert is_clean(model) and not optimizer._optimizer_step_pre_hooks


def test_names_of_torchs_own_are_there():
    from skipscope import _torch_private as internals

    seen = []
    weight = torch.ones(2, requires_grad=True)
    node = internals.accumulator(weight)
    product = weight * 2

    def note(_):
        seen.append((internals.graph_task(), internals.keeps_graph(), internals.will_run(node)))
        internals.at_end_of_backward(lambda: seen.append("end"))

    product.register_hook(note)
    before = internals.count_backward_passes()
    product.sum().backward(retain_graph=True)
    assert internals.count_backward_passes() - before == 2
    torch.autograd.grad(product.sum(), product, retain_graph=True)
    torch.autograd.grad(product.sum(), weight)
    assert [s[1:] if s != "end" else s for s in seen] == [
        (True, True), "end", (True, False), "end", (False, None), "end"
    ]  # fmt: skip
    assert internals.graph_task() == -1

    def read(module, args):
        seen.append(internals.keywords_of_call())

    handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda m, a: read(m, a))
    try:
        nn.Linear(2, 1)(input=torch.ones(1, 2))
    finally:
        handle.remove()
