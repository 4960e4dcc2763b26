"""Every public call that takes data reads batches of unequal size, sequences of several lengths, and Mappings."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import skipscope as ss


class Residual(nn.Module):
    """Two shortcuts over vectors, after an embedding where ``tokens`` says so; takes ``x`` by position or by name."""

    def __init__(self, tokens=False):
        super().__init__()
        self.embed = nn.Embedding(20, 8) if tokens else nn.Identity()
        self.layers, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(2)), nn.Linear(8, 3)

    def forward(self, x, labels=None):
        x = self.embed(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def per_token(output, target):
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


@ss.objective(weight=lambda batch: batch["labels"].numel())
def by_name(model, batch):
    return per_token(model(**batch), batch["labels"])


def vectors():
    torch.manual_seed(0)
    return TensorDataset(torch.randn(35, 8), torch.randint(3, (35,)))


def sequences():
    torch.manual_seed(0)
    return ss.batches([(torch.randint(20, (4, n)), torch.randint(3, (4, n))) for n in (5, 7, 9)])


def mappings():
    torch.manual_seed(0)
    return ss.batches([
        {"x": torch.randint(20, (4, n)), "labels": torch.randint(3, (4, n))} for n in (5, 7, 9)
    ])  # fmt: skip


def tokens_counted(batch):
    return batch[1].numel()


FORMS = {
    "a shorter last batch": lambda: (Residual(), DataLoader(vectors(), 16), F.cross_entropy, None),
    "sequences of several lengths": lambda: (Residual(True), sequences(), per_token, tokens_counted),
    "Mappings of several lengths": lambda: (Residual(True), mappings(), by_name, None),
}


def paired(model, *arguments, **options):
    twins = {"as built": model, "again": copy.deepcopy(model)}
    return ss.paired_landscapes(twins, *arguments, grid=3, **options)


CALLS = {
    "gradient_flow": ss.gradient_flow,
    "gradient_split": ss.gradient_split,
    "gradient_correlation": ss.gradient_correlation,
    "path_spectrum": ss.path_spectrum,
    "importance": ss.importance,
    "prescribe": ss.prescribe,
    "landscape": partial(ss.landscape, grid=3),
    "paired_landscapes": paired,
    "extreme_eigenvalues": partial(ss.extreme_eigenvalues, tol=0.1),
    "spectral_density": partial(ss.spectral_density, probes=2, steps=5),
    "curvature_trace": partial(ss.curvature_trace, products=6),
    "curvature_map": partial(ss.curvature_map, grid=3, tol=0.1),
    "train_twins": lambda model, *a, **k: ss.train_twins({"m": model}, *a, steps=9, optimizers={"SGD": [0.1]}, **k),
    "compare": partial(ss.compare, steps=9, grid=3, quick=True),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "call", [pytest.param(c, marks=pytest.mark.slow) if c == "compare" else c for c in CALLS]
)
def test_every_call_reads_batches_of_several_shapes(call, form):
    torch.manual_seed(1)
    model, data, loss, weight = FORMS[form]()
    assert CALLS[call](model, data, loss, weight=weight) is not None


def test_compare_takes_a_loader_whose_last_batch_is_shorter():
    result = ss.compare(Residual(), DataLoader(vectors(), 16), F.cross_entropy, quick=True, grid=3, steps=5)
    assert result.training is not None and not any("could not be measured" in note for note in result.notes)
