"""Model, data and loss are read once at the door of a call, and what an objective calls the model with is learnt."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

import skipscope as ss
from skipscope import _data, _untouched, reference
from skipscope._subject import prepare
from skipscope.shortcuts.finding import _shortcut_finder as _find


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


class ByKeyword(Net):
    def forward(self, image):
        return super().forward(image)


class WithItsLoss(Net):
    def forward(self, x, targets):
        output = super().forward(x)
        return output, F.cross_entropy(output, targets)


class Scaled(Net):
    def forward(self, x, *, scale, flag=True):
        return super().forward(x) * scale if flag else None


def _batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(16, 8, generator=generator), torch.randint(0, 2, (16,), generator=generator)


X, Y = _batch()

# Batches as people have them: the model, the batch, and the objective; each is cross-entropy of the same network.
SHAPES = {
    "a dict": (ByKeyword, {"image": X, "label": Y}, lambda m, b: F.cross_entropy(m(b["image"]), b["label"])),
    "a triple": (Net, (X, Y, torch.arange(16)), lambda m, b: F.cross_entropy(m(b[0]), b[1])),
    "logits and loss": (WithItsLoss, (X, Y), lambda m, b: m(*b)[1]),
    "a bare tensor": (Net, X, lambda m, b: F.cross_entropy(m(b), Y)),
    "a nested dict": (ByKeyword, {"in": {"pix": X}, "gt": {"cls": Y}}, lambda m, b: F.cross_entropy(m(b["in"]["pix"]), b["gt"]["cls"])),
    "inputs in a tuple": (Net, ((X,), Y), lambda m, b: F.cross_entropy(m(*b[0]), b[1])),
    "keywords beside": (Scaled, {"x": X, "y": Y}, lambda m, b: F.cross_entropy(m(b["x"], scale=torch.ones(())), b["y"])),
    "detached halves": (Net, {"x": X, "y": Y}, lambda m, b: F.cross_entropy(m(b["x"].clone().requires_grad_()), b["y"])),
}  # fmt: skip

NUMBERS = {
    "gradient_flow": lambda *given: [b.gradient_rms for b in ss.gradient_flow(*given).boundaries],
    "gradient_split": lambda *given: [row.branch_rms for row in ss.gradient_split(*given)],
    "path_spectrum": lambda *given: ss.path_spectrum(*given).norms,
    "importance": lambda *given: [row.removed.loss_cost for row in ss.importance(*given).shortcuts],
    "landscape": lambda *given: ss.landscape(*given, grid=3, strategy="plain").values.ravel(),
    "extreme_eigenvalues": lambda *given: ss.extreme_eigenvalues(*given, tol=1e-4).largest,
}  # fmt: skip


def _model(kind):
    torch.manual_seed(0)
    return kind()


@pytest.mark.parametrize("call", NUMBERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_objective_takes_batches_of_any_shape(shape, call):
    kind, batch, loss = SHAPES[shape]
    expected = NUMBERS[call](_model(Net), (X, Y), F.cross_entropy)
    given = NUMBERS[call](_model(kind), batch, ss.objective(loss))
    np.testing.assert_allclose(given, expected, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("call", ["gradient_flow", "importance", "landscape"])
def test_an_objective_takes_several_batches_of_any_shape(call):
    objective = ss.objective(SHAPES["a dict"][2])
    parts = [{"image": X[a], "label": Y[a]} for a in (slice(0, 10), slice(10, 16))]
    whole = NUMBERS[call](_model(ByKeyword), {"image": X, "label": Y}, objective)
    given = NUMBERS[call](_model(ByKeyword), ss.batches(parts), objective)
    if call != "gradient_flow":  # the RMS over batches is not that over one batch
        np.testing.assert_allclose(given, whole, rtol=1e-4, atol=1e-6)


def test_statistics_of_a_twin_are_recalibrated_by_the_objective():
    torch.manual_seed(0)

    class Normed(ByKeyword):
        def __init__(self):
            super().__init__()
            self.blocks[0] = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))

    model = Normed()
    for _ in range(20):
        model(X)
    model.eval()
    given = ss.importance(model, {"image": X, "label": Y}, ss.objective(SHAPES["a dict"][2]))
    expected = ss.importance(model, (X, Y), F.cross_entropy)
    assert given.to_dict() == expected.to_dict()


def test_what_an_objective_calls_the_model_with_is_learnt_without_a_forward_pass():
    class Counting(ByKeyword):
        calls = 0

        def forward(self, image):
            Counting.calls += 1
            return super().forward(image)

    subject = prepare(
        Counting(), *SHAPES["a nested dict"][1:2], ss.objective(SHAPES["a nested dict"][2]), "test"
    )
    assert torch.equal(subject.inputs, X) and Counting.calls == 0
    assert not subject.model._forward_pre_hooks


def test_an_objective_that_never_calls_the_model_is_told():
    objective = ss.objective(lambda model, batch: F.cross_entropy(model.head(batch[0]), batch[1]))
    with pytest.raises(ss.SkipscopeError, match="never calls the model") as refusal:
        ss.gradient_flow(Net(), (X, Y), objective)
    assert refusal.value.operation == "gradient_flow" and "call the model itself" in str(refusal.value.cure)


def test_an_error_of_the_objective_is_its_own():
    def broken(model, batch):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        ss.gradient_flow(Net(), (X, Y), ss.objective(broken))


# --- datasets ---


class Pairs(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        return X[i], Y[i]


@pytest.mark.parametrize("data", [Pairs(), TensorDataset(X, Y), torch.utils.data.Subset(Pairs(), range(4))])
@pytest.mark.parametrize("call", [ss.gradient_flow, ss.landscape, ss.extreme_eigenvalues])
def test_a_dataset_is_told_how_to_become_batches(data, call):
    with pytest.raises(ss.SkipscopeError) as refusal:
        call(Net(), data, F.cross_entropy)
    assert "DataLoader(dataset, batch_size=32)" in str(refusal.value.cure)
    assert ss.gradient_flow(Net(), DataLoader(data, batch_size=32), F.cross_entropy).loss > 0


# --- once ---


@pytest.fixture
def counts(monkeypatch):
    counted = Counter()

    def count(owner, name, what):
        function = getattr(owner, name)

        def wrapper(*given, **options):
            counted[what] += 1
            return function(*given, **options)

        for module in list(sys.modules.values()):
            if (
                module is not None
                and module.__name__.startswith("skipscope")
                and vars(module).get(name) is function
            ):
                monkeypatch.setattr(module, name, wrapper)

    import skipscope.surfaces  # so that every name is there to be replaced  # noqa: F401

    count(_find, "find_shortcuts", "finds")
    count(_data, "read", "readings")
    begin = _untouched._Snapshot.__init__

    def counting(self, models):
        counted["snapshots"] += 1
        begin(self, models)

    monkeypatch.setattr(_untouched._Snapshot, "__init__", counting)
    return counted


def test_compare_reads_once_finds_once_and_takes_few_snapshots(counts):
    forwards = []

    def make():
        model = reference.deep_mlp(6, shortcut="identity")
        run = type(model).forward

        class Counting(type(model)):
            def forward(self, x):
                forwards.append(1)
                return run(self, x)

        model.__class__ = Counting
        return model

    result = ss.compare(make, reference.digits(64), F.cross_entropy, train=False, grid=3)
    assert result.importance and result.surfaces and result.paths and result.strength
    assert counts["finds"] <= 3 and counts["readings"] <= 4 and counts["snapshots"] <= 6
    assert 20 < len(forwards) <= 90


def test_importance_reads_once_and_finds_once(counts):
    model = reference.deep_mlp(9, shortcut="identity")
    assert len(ss.importance(model, reference.digits(32), F.cross_entropy)) == 9
    assert (counts["finds"], counts["readings"]) == (1, 1) and counts["snapshots"] <= 3


@pytest.mark.parametrize("call", ["gradient_flow", "gradient_split", "path_spectrum", "gradient_correlation"])
def test_each_call_finds_and_reads_once(counts, call):
    getattr(ss, call)(_model(Net), (X, Y), F.cross_entropy)
    assert (counts["finds"], counts["readings"]) == (1, 1)


class Reentrant(Net):
    def forward(self, x):
        return super().forward(checkpoint(self.stem, x, use_reentrant=True) if x.requires_grad else x)


def test_gradients_that_are_there_do_not_count_in_twins_that_share_the_weights():
    model = _model(Reentrant)
    data = X.clone().requires_grad_(), Y
    expected = ss.importance(model, data, F.cross_entropy).to_dict()
    F.cross_entropy(model(data[0]), Y).backward()
    before = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    assert ss.importance(model, data, F.cross_entropy).to_dict() == expected
    for name, parameter in model.named_parameters():
        assert parameter.grad is before[name][0] and torch.equal(parameter.grad, before[name][1])


def test_inside_one_snapshot_every_run_restores_the_same_state(counts):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    x = torch.randn(8, 4)
    with _untouched.one_snapshot(model):
        for _ in range(3):
            with _untouched.untouched(model, training=True):
                model(x).sum().backward()
            assert torch.equal(model[1].running_mean, torch.zeros(4)) and model[0].weight.grad is None
    assert counts["snapshots"] == 1
    assert not _untouched._shared
    with _untouched.untouched(model):
        model(x)
    assert counts["snapshots"] == 2
