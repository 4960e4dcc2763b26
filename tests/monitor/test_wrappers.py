"""Optimizers inside wrappers and containers: the one whose step changes the weights is watched, or the cure is said."""

import numpy as np
import pytest
import torch
from torch import nn

import skipscope as ss
from skipscope.monitor import watch

from ._loops import Spy, agrees, data, loss_of, network


class Around:
    """A wrapper as libraries write them: no Optimizer itself, its step ends in that of the one inside."""

    def __init__(self, name, inner):
        self._name = name
        setattr(self, name, inner)

    def step(self):
        getattr(self, self._name).step()


@pytest.mark.parametrize("name", ["optimizer", "_optimizer", "base", "base_optimizer", "_base_optimizer"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_wrapper_is_looked_into(name, depth):
    model = network()
    inner = Spy(model.parameters())
    wrapper = inner
    for _ in range(depth):
        wrapper = Around(name, wrapper)
    with watch(model, wrapper) as monitor:
        for _ in range(3):
            inner.zero_grad()
            loss_of(model).backward()
            wrapper.step()
    agrees(monitor.history, inner.received)


class SharpnessAware(torch.optim.Optimizer):
    """As in the reference implementation: two passes, and a base optimizer that makes the step."""

    def __init__(self, parameters, base, rho=0.05, **options):
        super().__init__(parameters, dict(rho=rho, **options))
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.moved = {}

    @torch.no_grad()
    def first_step(self):
        for p in self.param_groups[0]["params"]:
            self.moved[p] = 0.05 * p.grad / p.grad.norm()
            p.add_(self.moved[p])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p, moved in self.moved.items():
            p.sub_(moved)
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure=None):
        self.first_step()
        closure()
        self.second_step()


@pytest.mark.parametrize("by_closure", [False, True])
def test_of_sharpness_aware_minimization_the_second_pass_is_recorded(by_closure):
    model, batch = network(torch.float64), data(torch.float64)
    optimizer = SharpnessAware(model.parameters(), Spy, lr=0.05)

    def closure():
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    with watch(model, optimizer, flow_every=1) as monitor:
        for _ in range(3):
            closure()
            if by_closure:
                optimizer.step(closure)
            else:
                optimizer.first_step()
                closure()
                optimizer.second_step()
    agrees(monitor.history, optimizer.base_optimizer.received, 1e-12)
    assert len(monitor.history.flow) == 3


def test_a_scaler_that_steps_a_wrapper_is_heard():
    model = network()
    inner = Spy(model.parameters())
    wrapper = Around("base_optimizer", inner)
    wrapper.param_groups = inner.param_groups
    wrapper.zero_grad = inner.zero_grad
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    with watch(model, wrapper) as monitor:
        for _ in range(2):
            inner.zero_grad()
            scaler.scale(loss_of(model)).backward()
            scaler.step(wrapper)
            scaler.update()
    agrees(monitor.history, inner.received)
    np.testing.assert_array_equal(monitor.history.loss_scale, [64.0, 64.0])


@pytest.mark.parametrize("holder", ["optimizers", "optimizer_dict"])
def test_containers_of_several_optimizers_are_opened(holder):
    model = network()
    parameters = list(model.parameters())
    each = {p: Spy([p]) for p in parameters}

    class Container:
        def step(self):
            for optimizer in each.values():
                optimizer.step()

    container = Container()
    setattr(container, holder, each if holder == "optimizer_dict" else list(each.values()))
    with watch(model, container) as monitor:
        for _ in range(2):
            model.zero_grad()
            loss_of(model).backward()
            container.step()
    assert len(monitor.history) == 2 * len(parameters)
    assert set(monitor.history.owners) == set(range(len(parameters)))


def test_a_wrapper_without_a_torch_optimizer_is_refused_with_the_cure():
    class Own:
        def step(self):
            pass

    with pytest.raises(ss.SkipscopeError, match=r"steps cannot be seen") as refusal:
        watch(network(), Own())
    assert (
        "torch.optim.Optimizer.__init__" in refusal.value.cure and ".base_optimizer" in refusal.value.expected
    )


def test_an_optimizer_of_other_parameters_in_an_attribute_is_none_of_ours():
    model, other = network(), network(seed=1)
    optimizer = Spy(model.parameters())
    optimizer.base = torch.optim.SGD(other.parameters(), lr=0.1)
    with watch(model, optimizer) as monitor:
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    agrees(monitor.history, optimizer.received)


def test_a_wrapped_model_is_read_inside():
    class Forward(nn.Module):
        """As Fabric wraps a model: named ``_forward_module``, its own forward passes on."""

        def __init__(self, inner):
            super().__init__()
            self._forward_module = inner

        def forward(self, x):
            return self._forward_module(x)

    inner = network(torch.float64)
    model = Forward(inner)
    optimizer = Spy(inner.parameters())
    with watch(model, optimizer, flow_every=1) as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    assert monitor.history.parameters[0] == "0.weight"
    assert monitor.history.boundaries == ("input", "0", "2", "4", "6") and len(monitor.history.flow) == 2
