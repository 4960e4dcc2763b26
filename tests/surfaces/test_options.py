"""Options at their edges: a grid of one point, spans of every form, metrics that an interpolation must not invent."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss

X, Y = (
    torch.randn(40, 6, generator=torch.Generator().manual_seed(0)),
    torch.randint(4, (40,), generator=torch.Generator().manual_seed(1)),
)


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 4))


@pytest.mark.parametrize("grid", [1, (1,), (1, 1)])
def test_one_point_is_the_middle(grid):
    surface = ss.landscape(_model(), (X, Y), F.cross_entropy, grid=grid, strategy="plain")
    assert surface.alphas.tolist() == [0.0] and surface.values.item() == surface.checks.model_loss


def test_a_span_may_be_a_number_on_one_axis_and_two_ends_on_the_other():
    options: Any = {"grid": (3, 4), "strategy": "plain"}
    mixed = ss.landscape(_model(), (X, Y), F.cross_entropy, span=(0.7, (-0.2, 0.9)), **options)
    both = ss.landscape(_model(), (X, Y), F.cross_entropy, span=((-0.7, 0.7), (-0.2, 0.9)), **options)
    assert np.array_equal(mixed.values, both.values) and mixed.betas[[0, -1]].tolist() == [-0.2, 0.9]


@pytest.mark.parametrize("span", [0.0, (0.0, 1.0), ((0.5, 0.5), (0.0, 1.0)), -1.0, "wide", None])
def test_a_span_of_nothing_is_refused(span):
    with pytest.raises(ss.SkipscopeError, match="this is no span"):
        ss.landscape(_model(), (X, Y), F.cross_entropy, grid=5, span=span)


def test_an_interpolated_accuracy_is_never_above_one():
    model = _model()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    right = {"accuracy": lambda output, target: (output.argmax(1) == target).double().mean()}
    surface = ss.landscape(model, (X, Y), F.cross_entropy, grid=51, tolerance=0.02, metrics=right)
    accuracy = surface.metrics["accuracy"]
    assert not surface.computed.all() and accuracy[surface.computed].max() == 1.0
    assert accuracy.max() <= 1.0 and accuracy.min() >= 0.0
