"""Whatever was run is freed: the model, the activations and the graph, after a result and after an error."""

import gc
import weakref

import pytest
import torch
from torch import nn

import skipscope as ss

entropy = nn.functional.cross_entropy


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x):
        return x + self.branch(x)


class Raises(torch.autograd.Function):
    """Identity going forward; an error going back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError("this backward pass fails")


def network():
    return nn.Sequential(Block(), Block(), nn.Linear(8, 3))


def batch():
    return torch.randn(16, 8), torch.randint(0, 3, (16,))


CALLS = {
    "gradient_flow": lambda m, d, loss: ss.gradient_flow(m, d, loss),
    "gradient_flow on batches": lambda m, d, loss: ss.gradient_flow(m, ss.batches([d, d]), loss),
    "gradient_split": lambda m, d, loss: ss.gradient_split(m, d, loss),
    "path_spectrum": lambda m, d, loss: ss.path_spectrum(m, d, loss),
    "gradient_correlation": lambda m, d, loss: ss.gradient_correlation(m, d, loss, of="loss"),
    "importance": lambda m, d, loss: ss.importance(m, d, loss),
    "prescribe": lambda m, d, loss: ss.prescribe(m, d, loss, steps=1),
}


class Watched:
    """Weak references to a model, to its batch and to every activation that its modules return."""

    def __init__(self, call, loss=entropy):
        """Make a model and a batch and hand both to ``call``; nothing else holds them afterwards."""
        model, data = network(), batch()
        self.model, self.data = weakref.ref(model), [weakref.ref(tensor) for tensor in data]
        kept: list[weakref.ref] = []
        self.activations = kept
        for module in model.modules():
            module.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
        self.result = call(model, data, loss)

    def alive(self):
        """What is still there once the caller has let go of everything but the result."""
        gc.collect()
        there = [name for name, ref in (("model", self.model),) if ref() is not None]
        there += ["batch" for ref in self.data if ref() is not None]
        return there + ["activation" for ref in self.activations if ref() is not None]


@pytest.mark.parametrize("name", CALLS)
def test_what_was_run_is_freed_after_a_result(name):
    watched = Watched(CALLS[name])
    assert watched.result is not None and watched.activations
    assert watched.alive() == []


@pytest.mark.parametrize("name", CALLS)
def test_what_was_run_is_freed_after_an_error_going_back(name):
    def fails(output, target):
        return entropy(Raises.apply(output), target)

    def call(model, data, loss):
        with pytest.raises((ss.SkipscopeError, RuntimeError), match="this backward pass fails"):
            CALLS[name](model, data, loss)

    watched = Watched(call, fails)
    assert watched.activations and watched.alive() == []


@pytest.mark.parametrize("name", CALLS)
def test_what_was_run_is_freed_after_an_error_going_forward(name):
    def fails(output, target):
        raise ValueError("this loss fails")

    def call(model, data, loss):
        with pytest.raises(ValueError, match="this loss fails"):
            CALLS[name](model, data, loss)

    watched = Watched(call, fails)
    assert watched.activations and watched.alive() == []


def test_a_comparison_frees_what_it_ran():
    watched = Watched(lambda m, d, loss: ss.compare(m, d, loss, train=False, grid=3))
    assert watched.activations and watched.alive() == []


def test_a_hook_that_leads_back_to_the_loss_would_be_seen():
    """Autograd's nodes keep their hooks alive, and the garbage collector does not see into them."""

    def call(model, data, loss):
        held = []
        hidden = model[0](data[0])
        hidden.register_hook(lambda gradient: held.append(None))
        held.append(loss(model[2](model[1](hidden)), data[1]))

    watched = Watched(call)
    assert "model" not in watched.alive() and "activation" in watched.alive()
