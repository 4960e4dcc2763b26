"""Weights as one tensor: whatever a network does with its weights, a run has the bits of a plain loop over them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.comparison.test_train import OPTIMIZERS, batch, course, plain_loop
from torch import nn

from skipscope.comparison.training._flat_weights import FlatWeights
from skipscope.comparison.training._network_makers import Maker
from skipscope.comparison.training._optimizers import choices
from skipscope.comparison.training._training_run import Run, train_each


class Wide(nn.Module):
    """Weights of odd sizes, a number, an LSTM, a normalised weight, batch norm and an embedding."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 7), nn.utils.parametrizations.weight_norm(nn.Linear(7, 5))
        self.norm, self.scale = nn.BatchNorm1d(5), nn.Parameter(torch.tensor(1.3))
        self.memory, self.place = nn.LSTM(5, 3, batch_first=True), nn.Embedding(4, 5)

    def forward(self, x):
        y = self.norm(self.b(F.gelu(self.a(x)))) * self.scale + self.place(torch.arange(len(x)) % 4)
        return self.memory(y[:, None])[0][:, 0]


class Large(nn.Module):
    """Weights of several tables, one of them longer than a table, which is left out now and then."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 300), nn.Linear(300, 500, bias=False)
        self.c, self.d, self.calls = nn.Linear(500, 200), nn.Linear(200, 3), 0

    def forward(self, x):
        self.calls += 1
        y = torch.tanh(self.a(x))
        y = self.b(y) if self.calls % 3 else F.pad(y, (0, 200))
        return self.d(torch.tanh(self.c(y)))


class Experts(nn.Module):
    """Which of two layers runs depends on the batch: the other's weights have no gradient in that step."""

    def __init__(self):
        super().__init__()
        self.experts, self.unused = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)]), nn.Linear(2, 2)

    def forward(self, x):
        return self.experts[int(x.sum() > 0)](x)


class LateExpert(nn.Module):
    """All weights have a gradient at first, and then one has none, has one, has none."""

    def __init__(self):
        super().__init__()
        self.always, self.sometimes, self.calls = nn.Linear(8, 3), nn.Linear(8, 3), 0

    def forward(self, x):
        self.calls += 1
        return self.always(x) + (self.sometimes(x) if self.calls < 4 or self.calls % 3 == 0 else 0)


class TiedByMemory(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.b.weight.data = self.a.weight.data

    def forward(self, x):
        return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Tied(TiedByMemory):
    def __init__(self):
        super().__init__()
        self.b.weight = self.a.weight


class SeesItsMemory(nn.Linear):
    """A tensor of its own is the weight's memory: it follows the training."""

    def __init__(self):
        super().__init__(8, 3)
        self.view = [self.weight.data]

    def forward(self, x):
        return super().forward(x) + self.view[0].mean()


class BufferOfMemory(nn.Linear):
    def __init__(self):
        super().__init__(8, 3)
        self.register_buffer("seen", self.weight.data)

    def forward(self, x):
        return super().forward(x) + self.seen.mean()


class Clamps(nn.Linear):
    def __init__(self):
        super().__init__(8, 3)

    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


class SparseRows(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows, self.out = nn.Embedding(6, 4, sparse=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.rows((x[:, 0] > 0).long()))


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.conv(x.view(-1, 2, 2, 2)).flatten(1)


class TwoTypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 4).double(), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(self.a(x.double()).float())


class StopsTheGradient(nn.Linear):
    """A hook takes the gradient away."""

    def __init__(self):
        super().__init__(8, 3)
        self.bias.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))


def frozen():
    net = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
    net[0].weight.requires_grad_(False)
    return net


FLAT = {
    "many kinds": Wide, "large and small": Large, "experts": Experts, "an expert now and then": LateExpert, "tied": Tied,
    "clamped in place": Clamps, "frozen": frozen, "a hook takes a gradient": StopsTheGradient,
    "sparse gradients": SparseRows,
}  # fmt: skip
APART = {
    "tied by their memory": TiedByMemory, "a tensor of the same memory": SeesItsMemory,
    "a buffer of the same memory": BufferOfMemory, "channels last": Images, "two types": TwoTypes,
    "nothing to train": lambda: nn.Linear(8, 3).requires_grad_(False),
    "an empty weight and another": lambda: nn.ModuleList([nn.Linear(0, 3, bias=False), nn.Linear(0, 2, bias=False)]),
    "complex": lambda: nn.Linear(8, 3, dtype=torch.complex64),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("name_of", [*OPTIMIZERS])
@pytest.mark.parametrize("options", [{}, {"schedule": lambda step: 1 / (1 + step), "clip": 0.05}])
def test_a_run_has_the_bits_of_a_plain_loop(name, name_of, options):
    if name == "sparse gradients" and (name_of != "SGD" or options):
        pytest.skip("torch's Adam and clipping take no sparse gradients")
    make, ours = Maker(FLAT[name]), {"clip_norm" if k == "clip" else k: v for k, v in options.items()}
    assert FlatWeights.of(make(0)) is not None
    the_course = course(make, batch(), **ours)
    run = Run(0, 0.1)
    log = train_each(make, [run], choices("test", {name_of: 0.1})[name_of], the_course, "t")[run]
    expected, model = plain_loop(make.build, the_course, OPTIMIZERS[name_of], **options)
    assert list(log.losses) == expected
    assert all(map(torch.equal, log.network.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize("name", APART)
def test_weights_that_are_no_plain_tensors_of_one_kind_are_moved_one_by_one(name):
    assert FlatWeights.of(APART[name]()) is None


@pytest.mark.parametrize("name", [n for n in APART if n.startswith(("t", "a tensor", "a buffer", "ch"))])
def test_and_have_the_bits_of_a_plain_loop_too(name):
    make = Maker(APART[name])
    the_course, run = course(make, batch()), Run(0, 0.1)
    log = train_each(make, [run], choices("test", {"Adam": 0.1})["Adam"], the_course, "t")[run]
    assert list(log.losses) == plain_loop(make.build, the_course, OPTIMIZERS["Adam"])[0]


def test_afterwards_each_weight_is_in_the_memory_that_it_had():
    """Also where the loss fails in the middle of a run."""
    model, calls = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)), []
    memory = [p.data_ptr() for p in model.parameters()]
    before = [p.detach().clone() for p in model.parameters()]

    def loss(output, target):
        calls.append(1)
        if len(calls) == 6:
            raise ArithmeticError
        return F.cross_entropy(output, target)

    the_course = course(Maker(lambda: model), batch(), steps=4)
    choice, maker = choices("test", {"SGD": 0.1})["SGD"], Maker(lambda: model)
    train_each(maker, [Run(0, 0.1)], choice, the_course, "t")
    assert [p.data_ptr() for p in model.parameters()] == memory
    assert not any(map(torch.equal, before, model.parameters()))
    with pytest.raises(Exception, match="ArithmeticError"):
        train_each(maker, [Run(0, 0.1)], choice, course(maker, batch(), loss, steps=9), "t")
    assert [p.data_ptr() for p in model.parameters()] == memory


@pytest.mark.parametrize("rate", [30.0, 1e13])
def test_a_rate_that_diverges_ends_its_run(rate):
    def quartic(output, target):
        return (output - F.one_hot(target, 3)).pow(4).sum(1).mean()

    make = Maker(lambda: nn.Linear(8, 3))
    log = train_each(
        make, [Run(0, rate)], choices("test", {"SGD": rate})["SGD"], course(make, batch(), quartic, 40), "t"
    )[Run(0, rate)]
    ends = int(np.flatnonzero(~np.isfinite(log.losses))[0])
    assert 0 < ends < 30 and np.isnan(log.losses[ends + 1 :]).all()
