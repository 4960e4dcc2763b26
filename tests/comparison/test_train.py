"""Training of twins: the stacked engine is torch's own training, seeds are seeds, and a target never reached says so."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope import reference
from skipscope._data import read
from skipscope._errors import SkipscopeError
from skipscope.comparison._results import smoothed
from skipscope.comparison._stream import Stream
from skipscope.comparison._train import (
    Run,
    _Course,
    _stackable,
    _train_one_by_one,
    _train_stacked,
    train_and_keep,
)

MAKE = partial(reference.deep_mlp, 3, width=16, inputs=64, shortcut="identity")


def stream_and_loss(model, n=200, size=32):
    batches, loss = read(model, reference.digits(n), F.cross_entropy, "test")
    return Stream(batches, size), loss


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_the_stacked_engine_equals_torchs_own_training(optimizer):
    torch.manual_seed(0)
    starts = {0: MAKE().double(), 1: MAKE().double()}
    digits, target = reference.digits(200)
    batches, loss = read(starts[0], (digits.double(), target), F.cross_entropy, "test")
    course = _Course(Stream(batches, 32), loss, 15)
    runs = [Run(0, 0.1), Run(1, 0.01), Run(0, 0.003)]
    together = _train_stacked(starts, runs, optimizer, course, "t")
    alone = _train_one_by_one(starts, runs, optimizer, course, "t")
    for run in runs:
        np.testing.assert_allclose(together[run].losses, alone[run].losses, rtol=1e-9)
        np.testing.assert_allclose(together[run].update_ratio, alone[run].update_ratio, rtol=1e-7)
        for a, b in zip(together[run].trained().parameters(), alone[run].trained().parameters()):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_what_vmap_cannot_do_is_trained_one_by_one():
    norm = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    stream, loss = stream_and_loss(norm)
    assert not _stackable(norm, stream, loss)
    assert _stackable(MAKE(), stream, loss)

    class OnData(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else super().forward(-x)

    assert not _stackable(OnData(64, 10), stream, loss)


def test_what_vmap_only_loops_over_is_not_stacked():
    model = reference.gpt(1, width=16, heads=2)
    batches, loss = read(model, reference.english(4), F.cross_entropy, "test")
    assert [_stackable(model, Stream(batches), loss) for _ in range(2)] == [False, False]


def test_same_seed_same_numbers_and_the_models_given_are_not_trained():
    model = MAKE()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    a, b = (
        ss.train_twins({"m": model}, reference.digits(100), F.cross_entropy, seeds=2, steps=10)
        for _ in range(2)
    )
    np.testing.assert_array_equal(a.curves["m"]["SGD"].losses, b.curves["m"]["SGD"].losses)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert a.varies == "batch order only"
    losses = a.curves["m"]["SGD"].losses
    assert losses[0, 0] != losses[1, 0], "another seed is another order of batches"


def test_a_factory_gives_initialisations():
    runs = ss.train_twins({"m": MAKE}, reference.digits(100), F.cross_entropy, seeds=2, steps=5)
    assert runs.varies == "initialisation and batch order"
    assert runs.curves["m"]["SGD"].losses[0, 0] != runs.curves["m"]["SGD"].losses[1, 0]


def test_a_target_never_reached_prints_more_than_the_steps():
    runs = ss.train_twins({"m": MAKE}, reference.digits(100), F.cross_entropy, seeds=1, steps=5, target=1e-6)
    assert runs.steps_text("m", "Adam") == "> 5"
    assert "> 5" in str(runs)
    assert runs.curves["m"]["Adam"].steps_to_target == (None,)
    assert not runs.curves["m"]["Adam"].learns


def test_steps_to_target_are_those_of_the_smoothed_loss():
    runs = ss.train_twins({"m": MAKE}, reference.digits(400), F.cross_entropy, seeds=2, steps=120, target=1.0)
    curves = runs.curves["m"]["Adam"]
    for row, step in zip(smoothed(curves.losses), curves.steps_to_target):
        assert step is not None
        assert row[step - 1] <= 1.0
        assert (row[: step - 1] > 1.0).all()


def test_smoothing_of_a_constant_and_of_a_step():
    np.testing.assert_allclose(smoothed(np.full((2, 7), 3.0)), 3.0)
    step = smoothed(np.array([0.0, 1.0, 1.0, 1.0]))
    np.testing.assert_allclose(step, [0, 0.1, 0.19, 0.271])


def test_the_stream_cuts_one_batch_and_shuffles_many():
    x = torch.arange(10.0).unsqueeze(1)
    one = Stream(read(nn.Linear(1, 1), (x, x), F.mse_loss, "t")[0], 3)
    batches = one.batches(0)
    epoch = torch.cat([next(batches)[0] for _ in range(3)])
    assert epoch.shape == (9, 1)
    assert len(epoch.unique()) == 9
    many = Stream(
        read(
            nn.Linear(1, 1),
            ss.batches([(x[i : i + 2], x[i : i + 2]) for i in range(0, 10, 2)]),
            F.mse_loss,
            "t",
        )[0]
    )
    source = many.batches(3)
    assert torch.cat([next(source)[0] for _ in range(5)]).sort(0).values.equal(x)


REFUSED = {
    "no twins": (lambda: ss.train_twins({}, reference.digits(8), F.cross_entropy), "nothing to train"),
    "optimizer": (
        lambda: ss.train_twins({"m": MAKE}, reference.digits(8), F.cross_entropy, optimizers={"LARS": (1,)}), "LARS",
    ),
    "not a model": (lambda: ss.train_twins({"m": lambda: 3}, reference.digits(8), F.cross_entropy), "not a torch.nn.Module"),
    "nan": (
        lambda: ss.train_twins({"m": MAKE}, (torch.full((8, 64), torch.nan), torch.zeros(8).long()), F.cross_entropy, steps=3),
        "not finite",
    ),
}  # fmt: skip

OUT_OF_RANGE = [
    {"seeds": 0}, {"seeds": []}, {"seeds": [0.5]}, {"steps": 0}, {"steps": 1.5}, {"batch_size": 0}, {"target": math.nan},
    {"optimizers": {}}, {"optimizers": {"SGD": []}}, {"optimizers": {"SGD": [-0.1]}}, {"optimizers": {"Adam": [math.inf]}},
]  # fmt: skip


@pytest.mark.parametrize("options", OUT_OF_RANGE, ids=str)
def test_numbers_out_of_range_are_refused_before_anything_runs(options):
    def make():
        raise AssertionError("it ran")

    with pytest.raises(SkipscopeError) as refusal:
        ss.train_twins({"m": make}, reference.digits(8), F.cross_entropy, **options)
    assert refusal.value.operation == "train_twins" and refusal.value.cure


@pytest.mark.parametrize("name", REFUSED)
def test_bad_calls_are_refused(name):
    call, words = REFUSED[name]
    with pytest.raises(SkipscopeError, match=words):
        call()


def test_a_ladders_sweep_stops_when_one_rate_is_there():
    options = {"seeds": 1, "steps": 200, "target": 1.0}
    whole, _ = train_and_keep({"m": MAKE}, reference.digits(400), F.cross_entropy, **options)
    short, _ = train_and_keep(
        {"m": MAKE}, reference.digits(400), F.cross_entropy, **options, stop_at_target=True
    )
    first = min(
        int(np.flatnonzero(row <= 1.0)[0]) + 1
        for row in smoothed(np.stack([c.losses[0] for c in whole.curves["m"].values()]))
        if (row <= 1.0).any()
    )
    counts = [c.steps_to_target[0] for c in short.curves["m"].values()]
    assert min(counts) <= first
    assert all(c.losses.shape[1] < 200 for c in short.curves["m"].values())
