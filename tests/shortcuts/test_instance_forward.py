"""A forward, a hook or an attribute that was set on one model: its twin is edited, and runs weights of its own."""

from __future__ import annotations

import copy
import functools
import pickle
import types
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from skipscope._errors import SkipscopeError
from skipscope.shortcuts import ablate, find_shortcuts

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


def without(net, x=X):
    for layer in net.layers:
        x = layer(x).tanh()
    return x


# --- a forward on the instance ---


def as_method(net):
    net.forward = types.MethodType(Net.forward, net)


def as_bound_method(net):
    net.forward = net.forward


def as_partial(net):
    net.forward = functools.partial(Net.forward, net)


def as_closure(net):
    def forward(x):
        for layer in net.layers:
            x = x + layer(x).tanh()
        return x

    net.forward = forward


def as_closure_over_the_old_forward(net):
    old = net.forward

    @functools.wraps(old)
    def forward(*args, **kwargs):
        return old(*args, **kwargs)

    net.forward = forward


def as_closure_over_layers_in_a_list(net):
    layers = list(net.layers)

    def forward(x):
        for layer in layers:
            x = x + layer(x).tanh()
        return x

    net.forward = forward


def as_default_argument(net):
    def forward(x, self=net):
        return Net.forward(self, x)

    net.forward = forward


def as_recursive_closure(net):
    def forward(x, i=0):
        layer = net.layers[i]
        x = x + layer(x).tanh()
        return forward(x, i + 1) if i < 2 else x

    net.forward = forward


class Runner:
    def __init__(self, net):
        self.net, self.calls = net, []

    def forward(self, x):
        self.calls.append(1)
        return Net.forward(self.net, x)

    def __call__(self, x):
        return self.forward(x)


def as_method_of_another_object(net):
    net.forward = Runner(net).forward


def as_callable_object(net):
    net.forward = Runner(net)


def as_closure_over_an_object(net):
    runner = Runner(net)
    net.forward = lambda x: runner.forward(x)


def as_closure_over_a_weak_reference(net):
    this: Any = weakref.ref(net)
    net.forward = lambda x: Net.forward(this(), x)


def as_compiled(net):
    net.forward = torch.compile(net.forward, backend="eager")


def as_method_of_a_compiled_function(net):
    net.forward = types.MethodType(torch.compile(Net.forward, backend="eager"), net)


def as_compiled_closure(net):
    as_closure(net)
    net.forward = torch.compile(net.forward, backend="eager")


def as_accelerate_prepares_for_low_precision(net):  # with the outer wrappers left out
    net._original_forward = net.forward
    inner = net.forward.__func__
    net.forward = types.MethodType(functools.wraps(inner)(lambda *a, **k: inner(*a, **k)), net)


def as_accelerate_hooks(net):
    old = net._old_forward = net.forward

    def new_forward(module, *args, **kwargs):
        return module._old_forward(*args, **kwargs)

    net.forward = functools.update_wrapper(functools.partial(new_forward, net), old)


FORWARDS = [
    as_method, as_bound_method, as_partial, as_closure, as_closure_over_the_old_forward,
    as_closure_over_layers_in_a_list, as_default_argument, as_recursive_closure, as_method_of_another_object,
    as_callable_object, as_closure_over_an_object, as_closure_over_a_weak_reference, as_compiled,
    as_method_of_a_compiled_function, as_compiled_closure, as_accelerate_prepares_for_low_precision,
    as_accelerate_hooks,
]  # fmt: skip


def runs_own_weights(twin, x=X):
    """Whether nothing but the twin's own weights enters."""
    before = twin(x)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    return not torch.equal(twin(x), before) and not twin(x).any()


@pytest.mark.parametrize("set_forward", FORWARDS, ids=lambda f: f.__name__)
def test_a_forward_that_was_set_on_the_model(set_forward):
    net = Net()
    set_forward(net)
    built = net(X)
    found = find_shortcuts(net, X)
    assert len(found) == 3
    twin = ablate(net, found)
    torch.testing.assert_close(twin(X), without(net))
    torch.testing.assert_close(twin.forward(X), without(net))
    assert torch.equal(net(X), built)
    torch.testing.assert_close(ablate(net, found, "lesion")(X), X)
    shared = ablate(net, found, share=True)
    torch.testing.assert_close(shared(X), without(net))
    again = ablate(ablate(net, found[:1]), found[1:])
    torch.testing.assert_close(again(X), without(net))
    assert runs_own_weights(twin) and torch.equal(net(X), built)


@pytest.mark.parametrize("set_forward", FORWARDS, ids=lambda f: f.__name__)
def test_a_forward_that_was_set_on_a_block(set_forward):
    net: Any = nn.Sequential(nn.Linear(6, 6), Net(), Net())
    set_forward(net[1])
    set_forward(net[2])
    found = find_shortcuts(net, X)
    assert len(found) == 6
    twin: Any = ablate(net, found)
    expected = without(net[2], without(net[1], net[0](X)))
    torch.testing.assert_close(twin(X), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(twin, backend="eager")(X), expected)
    twin[0].requires_grad_(False)
    assert not torch.equal(twin(X), net(X))


@pytest.mark.parametrize("set_forward", [as_accelerate_hooks, as_closure_over_the_old_forward, as_compiled])
def test_a_forward_that_was_set_on_every_module(set_forward):
    net: Any = nn.Sequential(*(Net() for _ in range(6)))
    expected = X
    for block in net:
        expected = without(block, expected)
    for module in list(net.modules()):
        module.forward = types.MethodType(type(module).forward, module)
        set_forward(module)
    found = find_shortcuts(net, X)
    assert len(found) == 18
    torch._dynamo.reset()
    twin = ablate(net, found)
    torch.testing.assert_close(twin(X), expected)
    torch.testing.assert_close(torch.compile(twin, backend="eager")(X), expected)


@pytest.mark.parametrize("set_forward", [as_method, as_partial, as_accelerate_hooks, as_compiled])
def test_such_a_twin_is_compiled_and_copied(set_forward):
    net = Net()
    set_forward(net)
    twin = ablate(net, inputs=X)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(twin, backend="eager", fullgraph=True)(X), without(net))
    for same in (copy.deepcopy(twin), twin if set_forward is as_accelerate_hooks else roundtrip(twin)):
        torch.testing.assert_close(same(X), without(net))
        assert runs_own_weights(same)


def roundtrip(twin):
    return pickle.loads(pickle.dumps(twin))


@pytest.mark.parametrize("set_forward", FORWARDS, ids=lambda f: f.__name__)
def test_a_forward_that_is_set_on_the_twin(set_forward):
    net = Net()
    twin = ablate(net, inputs=X)
    torch._dynamo.reset()
    set_forward(twin)
    try:
        torch.testing.assert_close(twin(X), without(net))
    except SkipscopeError as error:  # code of its own, in which nothing was found
        assert "ran other code" in str(error)
        assert set_forward in {
            as_closure, as_closure_over_layers_in_a_list, as_recursive_closure, as_compiled_closure
        }  # fmt: skip


def test_a_forward_in_low_precision_is_edited_in_low_precision():
    """As Accelerate prepares a model: the twin is the same network without shortcuts in that precision."""
    net = Net()
    net.forward = types.MethodType(torch.autocast("cpu", torch.bfloat16)(net.forward.__func__), net)
    twin = ablate(net, inputs=X)
    with torch.autocast("cpu", torch.bfloat16):
        expected = without(net)
    assert torch.equal(twin(X), expected) and not torch.equal(twin(X), without(net))
    assert runs_own_weights(twin)


def test_a_forward_that_pickle_loses_is_not_replaced_silently():
    net = Net()
    net.forward = types.MethodType(lambda self, x: Net.forward(self, x), net)
    net.forward.__func__.__name__ = "forward"
    twin = ablate(net, inputs=X)
    with pytest.raises(SkipscopeError, match="lost the forward"):
        roundtrip(twin)(X)


def global_forward(x):
    return Net.forward(GLOBAL, x)


GLOBAL = Net()


def test_a_function_that_names_the_model_as_a_global_variable_is_refused():
    GLOBAL.forward = global_forward
    try:
        assert len(find_shortcuts(GLOBAL, X)) == 3
        with pytest.raises(SkipscopeError, match=r"(?s)global variable 'GLOBAL'.*make the twin first"):
            ablate(GLOBAL, inputs=X)
    finally:
        del GLOBAL.forward


# --- hooks ---


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x):
        return self.lin(x).tanh()


class Manager:
    def add(self, module, args, output):
        return args[0] + output


def by_method_of_an_object(part):
    part.register_forward_hook(Manager().add)


def by_partial(part):
    part.register_forward_hook(functools.partial(Manager.add, Manager()))


def by_function(part):
    part.register_forward_hook(lambda module, args, output: args[0] + output)


def by_function_of_other_arguments(part):
    part.register_forward_hook(lambda *args: args[1][0] + args[2])


def by_closure_over_the_module(part):
    part.lin.register_forward_hook(lambda _, args, output: output)
    part.register_forward_hook(lambda *args: args[1][0] + part.lin(args[1][0]).tanh())


def by_method_of_the_module(part):
    part.add = types.MethodType(lambda self, _, args, output: args[0] + output, part)
    part.register_forward_hook(part.add)


HOOKS = [
    by_method_of_an_object, by_partial, by_function, by_function_of_other_arguments, by_closure_over_the_module,
    by_method_of_the_module,
]  # fmt: skip


@pytest.mark.parametrize("hook", HOOKS, ids=lambda f: f.__name__)
def test_merges_in_hooks(hook):
    torch.manual_seed(0)
    net: Any = nn.Sequential(Branch(), Branch())
    for part in net:
        hook(part)
    found = find_shortcuts(net, X)
    assert [s.kind for s in found] == ["identity"] * 2
    twin = ablate(net, found)
    torch.testing.assert_close(twin(X), net[1].lin(net[0].lin(X).tanh()).tanh())
    torch.testing.assert_close(ablate(net, found[:1])(X), net[1](net[0].lin(X).tanh()))
    assert runs_own_weights(twin)


@pytest.mark.parametrize("hook", HOOKS, ids=lambda f: f.__name__)
def test_merges_in_a_hook_of_the_outermost_module(hook):
    torch.manual_seed(0)
    net = Branch()
    hook(net)
    twin = ablate(net, inputs=X)
    torch.testing.assert_close(twin(X), net.lin(X).tanh())


# --- attributes ---


class Kept(nn.Module):
    """A model that keeps blocks, and functions of them, where modules are not registered."""

    def __init__(self, form):
        super().__init__()
        self.steps: Any
        torch.manual_seed(0)
        self.first, self.lin, self.form = nn.Linear(6, 6), nn.Linear(6, 6), form
        if form == "functions":
            self.steps = [lambda x: x + self.lin(x).tanh(), functools.partial(Kept.step, self), self.step]
        elif form == "modules":
            self.steps = [Step(self), Step(self), Step(self)]
        elif form == "tuple":
            self.steps = ((lambda x: x + self.lin(x).tanh(), self.step), {"last": self.step})
            self.steps = (*self.steps[0], self.steps[1]["last"])
        else:
            this: Any = weakref.ref(self)
            self.steps = {i: lambda x: this().step(x) for i in range(3)}.values()
            self.steps = list(self.steps)

    def step(self, x):
        return x + self.lin(x).tanh()

    def forward(self, x):
        x = self.first(x)
        for step in self.steps:
            x = step(x)
        return x


class Step(nn.Module):
    def __init__(self, owner):
        super().__init__()
        self.owner = [owner]

    def forward(self, x):
        return x + self.owner[0].lin(x).tanh()


@pytest.mark.parametrize("form", ["functions", "modules", "tuple", "weak"])
def test_functions_and_modules_that_are_kept_in_attributes(form):
    net = Kept(form)
    found = find_shortcuts(net, X)
    assert len(found) == 3
    x = net.first(X)
    for _ in range(3):
        x = net.lin(x).tanh()
    twin = ablate(net, found)
    torch.testing.assert_close(twin(X), x)
    assert runs_own_weights(twin)


def test_an_innocent_closure_stays_the_users():
    net, seen = Net(), []
    net.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    twin = ablate(net, inputs=X)
    seen.clear()
    twin(X)
    assert seen == ["Net"]


def test_a_module_that_is_called_twice_with_a_mode():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.shift = nn.Parameter(torch.full((6,), 2.0)), nn.Parameter(torch.ones(6))

        def forward(self, x, mode):
            if mode == "norm":
                self.mean = x.mean(0, keepdim=True)
                return (x - self.mean) * self.gain + self.shift
            return x / self.gain + self.mean

    class Forecast(nn.Module):
        def __init__(self, removed=False):
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.f, self.g, self.removed = Normalised(), nn.Linear(6, 6), nn.Linear(6, 6), removed

        def forward(self, x):
            h = self.norm(x, "norm")
            h = self.f(h).tanh() if self.removed else h + self.f(h).tanh()
            return self.norm(self.g(h), "denorm")

    net = Forecast()
    found = find_shortcuts(net, X)
    inner = found.select(name="f")
    assert len(inner) == 1
    torch.testing.assert_close(ablate(net, inner)(X), Forecast(removed=True)(X))
    assert torch.equal(ablate(net, found, strength=1.0)(X), net(X))
    every: Any = ablate(net, found)
    torch.testing.assert_close(every(X), every.g(every.f(every.norm(X, "norm")).tanh()) / 2)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(every, backend="eager", fullgraph=True)(X), every(X))
