"""Trainings side by side: in copies of this process each has the numbers that it has alone."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope import reference
from skipscope.comparison.training import _threads, _train
from skipscope.comparison.training._threads import Plan, StepSeconds
from skipscope.comparison.training._train import train_and_keep


def net():
    return nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))


class WithState(nn.Module):
    """Batch norm, dropout and a counter: more than a function of its weights."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 10))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.layers(x)


TWINS = {"plain": net, "with state": WithState, "a module": reference.deep_mlp(3, 16, shortcut="identity")}
OPTIONS = {"seeds": 2, "steps": 100, "optimizers": {"SGD": (0.3, 0.03), "Adam": (0.01,)}, "batch_size": 32}


def in_copies(monkeypatch, count):
    """As if so many copies saved time, or none did."""
    monkeypatch.setattr(_train.Plan, "fastest", lambda *_: Plan(count, True, 300.0))


@pytest.mark.parametrize("keep", [False, True])
def test_copies_train_with_the_bits_of_one_process(keep, monkeypatch):
    found = {}
    for count in (1, 3):
        in_copies(monkeypatch, count)
        found[count] = train_and_keep(TWINS, reference.digits(300), F.cross_entropy, keep=keep, **OPTIONS)
    (one, its), (several, theirs) = found[1], found[3]
    assert one.processes == 1 and several.processes == 3
    for name, by in one.curves.items():
        for optimizer, curves in by.items():
            other = several.curves[name][optimizer]
            np.testing.assert_array_equal(curves.losses, other.losses)
            np.testing.assert_array_equal(curves.update_ratio, other.update_ratio)
            assert curves.sweep == other.sweep and curves.rate == other.rate
            assert curves.train_accuracy == other.train_accuracy is not None
            if not keep:
                continue
            ours, copied = its[name][optimizer], theirs[name][optimizer]
            assert getattr(ours, "calls", None) == getattr(copied, "calls", None)
            for a, b in zip(ours.state_dict().values(), copied.state_dict().values(), strict=True):
                assert torch.equal(a, b)
    assert keep or its == {name: {} for name in TWINS} == theirs


def test_a_sweep_that_goes_on_does_so_in_copies_too(monkeypatch):
    def small(output, target):
        return F.cross_entropy(output, target) / 50

    found = {}
    for count in (1, 2):
        in_copies(monkeypatch, count)
        found[count] = ss.train_twins(
            {"m": net}, reference.digits(200), small, seeds=2, steps=60, optimizers={"SGD": (0.1, 0.03)}
        ).curves["m"]["SGD"]
    assert len(found[1].sweep) > 2 and found[1].sweep == found[2].sweep
    np.testing.assert_array_equal(found[1].losses, found[2].losses)


class Fails(nn.Linear):
    """Fails in its fortieth step, wherever that is."""

    def __init__(self):
        super().__init__(64, 10)
        self.calls = 0

    def forward(self, x):
        self.calls += torch.is_grad_enabled()
        if self.calls > 40:
            raise ArithmeticError("step 41")
        return super().forward(x)


def test_the_users_own_error_comes_out_of_a_copy(monkeypatch):
    in_copies(monkeypatch, 2)
    with pytest.raises(ss.SkipscopeError, match="ArithmeticError: step 41"):
        train_and_keep({"m": Fails}, reference.digits(200), F.cross_entropy, **OPTIONS)


class Dies(nn.Linear):
    """Takes the process with it, unless that is the one of the test."""

    def __init__(self):
        super().__init__(64, 10)
        self.home = os.environ["TEST_PROCESS"]

    def forward(self, x):
        if str(os.getpid()) != self.home:
            os._exit(1)
        return super().forward(x)


def test_copies_that_die_leave_their_work_to_this_process(monkeypatch):
    monkeypatch.setenv("TEST_PROCESS", str(os.getpid()))
    in_copies(monkeypatch, 2)
    runs = ss.train_twins({"m": Dies}, reference.digits(200), F.cross_entropy, **OPTIONS)
    assert np.isfinite(runs.curves["m"]["SGD"].losses).all()


def test_copies_are_made_where_they_save_time():
    slow, split = StepSeconds(0.1, 0.1), StepSeconds(0.1, 0.055)
    assert Plan.fastest([slow, slow], 100, 4, 2).copies == 2
    assert Plan.fastest([slow, slow], 100, 1, 2).copies == 1, "there is one piece of work at a time"
    assert Plan.fastest([slow, slow], 2, 4, 2).copies == 1, "it is over at once"
    assert Plan.fastest([split], 1000, 4, 2).copies == 1, "two threads are as good"
    assert Plan.fastest([], 1000, 4, 2) == Plan(1, False, 300.0), "nothing was timed"


def test_what_cannot_be_copied_is_trained_here(monkeypatch):
    """A loader that is not held in memory; a network that cannot be sent, where it is asked for."""

    class Unsendable(nn.Linear):
        def __init__(self):
            super().__init__(64, 10)
            self.act = lambda x: x

    monkeypatch.setattr(_train, "workers", lambda: 2)
    asked = []
    fastest = Plan.fastest
    monkeypatch.setattr(_train.Plan, "fastest", lambda *a: asked.append(a[-1]) or fastest(*a))
    for make, keep in [(net, True), (Unsendable, False), (Unsendable, True)]:
        train_and_keep(
            {"m": make}, reference.digits(200), F.cross_entropy, keep=keep, **{**OPTIONS, "steps": 4}
        )
    monkeypatch.setattr("skipscope.comparison.training._stream.HELD", 2)
    x, y = reference.digits(200)
    many = ss.batches(list(zip(x.split(50), y.split(50))))
    train_and_keep({"m": net}, many, F.cross_entropy, **{**OPTIONS, "steps": 4})
    assert asked == [2, 2, 1, 1]


def test_a_step_is_timed_with_all_threads_and_with_one_and_they_are_left_as_they_were(monkeypatch):
    seen, before = [], torch.get_num_threads()
    monkeypatch.setattr(
        _threads, "_seconds", lambda *_: (seen.append(torch.get_num_threads()), 2.0 - len(seen))[1]
    )
    try:
        torch.set_num_threads(3)
        timed = _threads.step_seconds(None, None, None)
        assert seen == [3, 1] and torch.get_num_threads() == 3
        assert (timed.together, timed.alone) == (1.0, 0.0)
        with Plan(1, True, 1.0).threads():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
