"""Accuracy is shown where targets are classes, is that of a plain count, and is shown nowhere else."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import skipscope as ss
from skipscope import reference
from skipscope._data import read
from skipscope.comparison.training._accuracy import accuracy

torch.manual_seed(3)
X, Y = torch.randn(96, 8), torch.randint(4, (96,))
IMAGES, PIXELS = torch.randn(6, 8, 5, 5), torch.randint(4, (6, 5, 5))
TOKENS = torch.randint(20, (6, 9))


class Convolution(nn.Conv2d):
    def __init__(self):
        super().__init__(8, 4, 1)


class Language(nn.Module):
    """Gives its loss on labels that it shifts by one, as causal models of transformers do."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, input_ids, labels):
        logits = self.head(self.embed(input_ids))
        shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
        return {"loss": F.cross_entropy(logits.flatten(0, 1), shifted.flatten()), "logits": logits}


def smooth(output, target):
    return F.cross_entropy(output, target, label_smoothing=0.1) + 0.01 * output.square().mean()


def log_probabilities(output, target):
    return F.nll_loss(output.log_softmax(-1), target)


@ss.objective
def from_batch(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1].long())


def masked(targets):
    return torch.where(torch.arange(len(targets)) % 3 == 0, -100, targets)


LABELS = {"input_ids": TOKENS, "labels": TOKENS}
CLASSES = {
    "cross_entropy": (nn.Linear(8, 4), (X, Y), F.cross_entropy),
    "a module": (nn.Linear(8, 4), (X, Y), nn.CrossEntropyLoss(label_smoothing=0.1)),
    "a loss of one's own": (nn.Linear(8, 4), (X, Y), smooth),
    "nll_loss": (nn.Linear(8, 4), (X, Y), log_probabilities),
    "an objective that casts": (nn.Linear(8, 4), (X, Y.int()), from_batch),
    "pixels": (Convolution(), (IMAGES, PIXELS), F.cross_entropy),
    "ignored targets": (nn.Linear(8, 4), (X, masked(Y)), F.cross_entropy),
    "another ignored target": (nn.Linear(8, 4), (X, Y), nn.CrossEntropyLoss(ignore_index=2)),
    "shifted labels": (Language(), LABELS, None),
}
EXPECTED = {
    "pixels": lambda model: (model(IMAGES).argmax(1) == PIXELS).float().mean(),
    "ignored targets": lambda model: (model(X).argmax(1) == Y)[masked(Y) != -100].float().mean(),
    "another ignored target": lambda model: (model(X).argmax(1) == Y)[Y != 2].float().mean(),
    "shifted labels": lambda model: (
        (model(**LABELS)["logits"].argmax(-1)[:, :-1] == TOKENS[:, 1:]).float().mean()
    ),
}


def measured(model, data, loss):
    batches, objective = read(model, data, loss, "test")
    return accuracy(model, objective, batches)


@pytest.mark.parametrize("name", CLASSES)
def test_accuracy_is_a_plain_count(name):
    model, data, loss = CLASSES[name]
    expected = EXPECTED.get(name, lambda model: (model(X).argmax(1) == Y).float().mean())(model)
    assert measured(model, data, loss) == pytest.approx(float(expected), abs=1e-6)


@ss.objective
def contrastive(model, batch):
    return F.cross_entropy(model(batch[0]) @ model(batch[0] + 0.1).T, torch.arange(len(batch[0])))


@ss.objective
def made_alike(model, batch):
    return F.cross_entropy(model(batch[0]), torch.zeros_like(batch[1]))


@ss.objective
def two_heads(model, batch):
    scores = model(batch[0])
    return F.cross_entropy(scores, batch[1]) + F.cross_entropy(scores[:, :2], batch[1] % 2)


NO_CLASSES = {
    "regression": (nn.Linear(8, 4), (X, torch.randn(96, 4)), F.mse_loss),
    "counts": (nn.Linear(8, 1), (X, Y), lambda output, y: F.poisson_nll_loss(output[:, 0], y.float())),
    "probabilities": (nn.Linear(8, 4), (X, torch.rand(96, 4).softmax(-1)), F.cross_entropy),
    "contrastive": (nn.Linear(8, 4), (X, Y), contrastive),
    "targets of the loss's own": (nn.Linear(8, 4), (X, Y), made_alike),
    "two sets of classes": (nn.Linear(8, 4), (X, Y), two_heads),
    "embeddings with labels": (
        nn.Linear(8, 4), (X, Y), lambda out, y: (out.unsqueeze(0) - out.unsqueeze(1)).norm(dim=-1)[y[None] == y[:, None]].mean(),
    ),
    "yes or no": (nn.Linear(8, 1), (X, (Y > 1).float()[:, None]), F.binary_cross_entropy_with_logits),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_CLASSES)
def test_where_targets_are_no_classes_there_is_none(name):
    model, data, loss = NO_CLASSES[name]
    assert measured(model, data, loss) is None


@pytest.mark.parametrize("name", ["regression", "contrastive"])
def test_results_without_classes_show_no_accuracy(name):
    _, data, loss = NO_CLASSES[name]
    runs = ss.train_twins(
        {"m": lambda: nn.Linear(8, 4)}, data, loss, seeds=1, steps=3, optimizers={"SGD": 0.1}, test=data
    )
    assert "acc." not in str(runs) and runs.accuracies("m", "SGD") == {}
    curves = runs.curves["m"]["SGD"]
    assert curves.train_accuracy is None and curves.test_accuracy is None


def test_results_show_accuracy_on_training_and_test_data(tmp_path):
    digits, labels = reference.digits()
    train, test = (digits[:1500], labels[:1500]), (digits[1500:], labels[1500:])

    def make():
        return reference.deep_mlp(2, 32, shortcut="identity")

    runs, kept = ss.comparison.training._train.train_and_keep(
        {"m": make}, train, F.cross_entropy, seeds=2, steps=100, optimizers={"Adam": [0.01]},
        test=DataLoader(TensorDataset(*test), 100),
    )  # fmt: skip
    curves, model = runs.curves["m"]["Adam"], kept["m"]["Adam"].eval()
    expected = float((model(test[0]).argmax(1) == test[1]).float().mean())
    assert curves.test_accuracy[0] == pytest.approx(expected, abs=1e-6) and expected > 0.7
    on_all = float((model(train[0]).argmax(1) == train[1]).float().mean())
    assert curves.train_accuracy[0] == pytest.approx(on_all, abs=0.05)
    assert runs.accuracies("m", "Adam")["test accuracy"] == pytest.approx(np.mean(curves.test_accuracy))
    assert {"train acc.", "test acc."} <= set(runs.table().columns)
    runs.save(tmp_path / "runs.json")
    again = ss.load(tmp_path / "runs.json")
    assert again.curves["m"]["Adam"].test_accuracy == pytest.approx(curves.test_accuracy)
    assert "test acc." in again.table().columns and "accuracy" in str(runs.to_dict())
    runs.save(tmp_path / "runs.csv")
    assert "test acc." in (tmp_path / "runs.csv").read_text()


def test_a_run_that_diverged_has_no_accuracy():
    runs = ss.train_twins(
        {"m": lambda: nn.Linear(8, 4)}, (X, Y), lambda o, y: F.cross_entropy(o, y).exp(), seeds=1, steps=30,
        optimizers={"SGD": 1e9},
    )  # fmt: skip
    assert not np.isfinite(runs.curves["m"]["SGD"].losses).all()
    assert runs.curves["m"]["SGD"].train_accuracy is None and "acc." not in str(runs)
