"""Input-gradient correlation against per-sample gradients one by one, and Balduzzi's claim."""

import numpy as np
import pytest
import torch
from torch import nn

import skipscope as ss


def test_against_one_sample_at_a_time():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y = torch.randn(6, 5).double(), torch.randint(0, 3, (6,))
    result = ss.gradient_correlation(model, (x, y), nn.functional.cross_entropy, of="loss")
    rows = []
    for i in range(6):
        leaf = x[i : i + 1].clone().requires_grad_()
        rows.append(torch.autograd.grad(nn.functional.cross_entropy(model(leaf), y[i : i + 1]), leaf)[0][0])
    g, pairs = torch.stack(rows), [(i, j) for i in range(6) for j in range(i + 1, 6)]
    expected = [float(torch.cosine_similarity(g[i], g[j], dim=0)) for i, j in pairs]
    np.testing.assert_allclose(result.correlations, expected, rtol=1e-9)
    np.testing.assert_allclose(result.distances, [float((x[i] - x[j]).norm()) for i, j in pairs], rtol=1e-12)
    assert result.mean == pytest.approx(np.mean(expected))
    assert sum(row[2] for row in result.bins) == 15


class Quadratic(nn.Module):
    """x' A x / 2, whose gradient is A x."""

    def __init__(self, width=5):
        super().__init__()
        root = torch.randn(width, width)
        self.A = nn.Parameter(root @ root.T)

    def forward(self, x):
        return (x * (x @ self.A)).sum(-1, keepdim=True) / 2


def test_a_quadratic_form_in_closed_form():
    torch.manual_seed(0)
    model, x = Quadratic().double(), torch.randn(7, 5).double()
    result = ss.gradient_correlation(model, (x, torch.zeros(7, 1)), nn.functional.mse_loss)
    g, (i, j) = (x @ (model.A + model.A.T)).detach() / 2, torch.triu_indices(7, 7, 1)
    np.testing.assert_allclose(result.correlations, torch.cosine_similarity(g[i], g[j]), rtol=1e-10)
    np.testing.assert_allclose(result.distances, (x[i] - x[j]).norm(dim=1), rtol=1e-12)


def correlation(depth, shortcut):
    torch.manual_seed(0)
    model = ss.reference.deep_mlp(
        depth, 64, shortcut=shortcut, scale="depth" if shortcut else 1.0, init="he", activation="relu"
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.normal_(std=0.5)
    g = torch.Generator().manual_seed(1)
    return ss.gradient_correlation(
        model, (torch.randn(64, 64, generator=g), torch.zeros(64).long()), nn.functional.cross_entropy
    ).mean


def test_plain_networks_shatter_and_shortcuts_hold():
    plain, short = (
        [correlation(d, None) for d in (2, 8, 20)],
        [correlation(d, "identity") for d in (2, 8, 20)],
    )
    assert short[2] > 2 * plain[2]
    assert short[2] > 0.5 * short[0]


def test_refusals():
    model = nn.Linear(3, 3)
    with pytest.raises(ss.SkipscopeError, match="nothing to compare"):
        ss.gradient_correlation(model, (torch.randn(1, 3), torch.zeros(1, 3)), nn.MSELoss())
    with pytest.raises(ss.SkipscopeError, match="unknown quantity"):
        ss.gradient_correlation(model, (torch.randn(2, 3), torch.zeros(2, 3)), nn.MSELoss(), of="weights")
