"""Surfaces that are known in closed form, to a relative 1e-10 in float64, and an independent slow loop."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope.surfaces import random_direction


def _double(module, seed=0):
    torch.manual_seed(seed)
    return module.double()


def _assert_close(surface, expected, tolerance=1e-10):
    assert surface.values.shape == expected.shape
    assert np.max(np.abs(surface.values - expected)) <= tolerance * np.max(np.abs(expected))


def test_a_quadratic_bowl():
    """mean (x.(w + a d + b e) - y)^2 is a quadratic in (a, b), and its coefficients follow from moments."""
    model = _double(nn.Linear(6, 1, bias=False))
    x, y = torch.randn(50, 6).double(), torch.randn(50, 1).double()
    d, e = (random_direction(model, seed=3, axis=k)["weight"] for k in (0, 1))
    surface = ss.landscape(model, (x, y), F.mse_loss, grid=(7, 5), span=(2.0, 0.5), seed=3)
    w = model.weight.detach()
    r, p, q = (x @ w.T - y, x @ d.T, x @ e.T)
    a, b = surface.alphas[:, None], surface.betas[None, :]
    moment = lambda s, t: float((s * t).mean())  # noqa: E731
    expected = (
        moment(r, r) + 2 * a * moment(r, p) + 2 * b * moment(r, q)
        + a**2 * moment(p, p) + b**2 * moment(q, q) + 2 * a * b * moment(p, q)
    )  # fmt: skip
    _assert_close(surface, expected)


@pytest.mark.parametrize("depth", [2, 5])
def test_a_deep_linear_network(depth):
    model = _double(nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(depth))))
    x, y = torch.randn(20, 4).double(), torch.randn(20, 4).double()
    surface = ss.landscape(model, (x, y), F.mse_loss, grid=5, seed=1)
    one, two = (random_direction(model, seed=1, axis=k) for k in (0, 1))
    weights = dict(model.named_parameters())
    expected = np.empty((5, 5))
    for i, a in enumerate(surface.alphas):
        for j, b in enumerate(surface.betas):
            product = torch.eye(4).double()
            for name in weights:
                product = (weights[name].detach() + a * one[name] + b * two[name]) @ product
            expected[i, j] = float((x @ product.T - y).square().mean())
    _assert_close(surface, expected)


def test_logistic_regression():
    model = _double(nn.Linear(3, 1))
    x, y = torch.randn(40, 3).double(), torch.randint(2, (40, 1)).double()
    surface = ss.landscape(model, (x, y), F.binary_cross_entropy_with_logits, grid=6, seed=2, span=3.0)
    d, e = (random_direction(model, seed=2, axis=k)["weight"][0].numpy() for k in (0, 1))
    w, bias = model.weight.detach().numpy()[0], model.bias.item()
    sign = 2 * y.numpy()[:, 0] - 1
    expected = np.array([
        [np.logaddexp(0, -sign * (x.numpy() @ (w + a * d + b * e) + bias)).mean() for b in surface.betas]
        for a in surface.alphas
    ])  # fmt: skip
    _assert_close(surface, expected)


def _slow(model, directions, alphas, betas, value):
    """The definition, one point at a time, on a fresh copy each."""
    out = np.empty((len(alphas), len(betas)))
    for i, a in enumerate(alphas):
        for j, b in enumerate(betas):
            moved = copy.deepcopy(model).eval()
            with torch.no_grad():
                for name, p in moved.named_parameters():
                    for c, d in zip((a, b), directions):
                        if name in d:
                            p += c * d[name]
                out[i, j] = value(moved)
    return out


class _ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 3, 2)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(3, 5)

    def forward(self, x):
        return self.head(self.drop(self.up(self.norm(self.stem(x)).relu()).mean((2, 3))))


def _trained_statistics(model, x):
    model.train()
    with torch.no_grad():
        model(x)
    return model


@pytest.mark.parametrize("mode", ["frozen", "batch", "recalibrate"])
def test_a_network_with_batch_norm_and_dropout(mode):
    model = _double(_ConvNet())
    x, y = torch.randn(12, 1, 6, 6).double(), torch.randint(5, (12,))
    _trained_statistics(model, x)

    def value(moved):
        if mode == "batch":
            moved.norm.train()
        if mode == "recalibrate":
            moved.norm.reset_running_stats()
            moved.norm.momentum = None
            moved.norm.train()
            moved(x)
            moved.norm.eval()
        return F.cross_entropy(moved(x), y).item()

    surface = ss.landscape(model, (x, y), F.cross_entropy, grid=5, seed=4, batch_norm=mode)
    directions = [random_direction(model, seed=4, axis=k) for k in (0, 1)]
    _assert_close(surface, _slow(model, directions, surface.alphas, surface.betas, value))
    assert surface.checks.passed and model.training


def test_one_batch_or_many():
    model = _double(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)))
    x, y = torch.randn(32, 4).double(), torch.randint(3, (32,))
    y[::5] = -100
    whole = ss.landscape(model, (x, y), F.cross_entropy, grid=5)
    parts = ss.batches([(x[:20], y[:20]), (x[20:], y[20:])])
    many = ss.landscape(model, parts, F.cross_entropy, grid=5)
    _assert_close(many, whole.values, 1e-12)
    assert np.allclose(many.stderr, whole.stderr, rtol=1e-10)


def test_the_regulariser_is_counted_in_on_request():
    model = _double(nn.Linear(4, 1))
    x, y = torch.randn(9, 4).double(), torch.randn(9, 1).double()
    plain, with_l2 = (ss.landscape(model, (x, y), F.mse_loss, grid=5, l2=l2) for l2 in (0.0, 0.3))
    directions = [random_direction(model, seed=0, axis=k) for k in (0, 1)]
    penalty = _slow(model, directions, plain.alphas, plain.betas,
                    lambda m: 0.15 * sum(p.square().sum().item() for p in m.parameters()))  # fmt: skip
    _assert_close(with_l2, plain.values + penalty)
    assert with_l2.checks.passed


def test_standard_errors_are_those_of_the_samples():
    model = _double(nn.Linear(4, 1))
    x, y = torch.randn(25, 4).double(), torch.randn(25, 1).double()
    surface = ss.landscape(model, (x, y), F.mse_loss, grid=3)
    directions = [random_direction(model, seed=0, axis=k) for k in (0, 1)]
    losses = lambda m: (m(x) - y).square()[:, 0].detach()  # noqa: E731
    error = _slow(model, directions, surface.alphas, surface.betas, lambda m: losses(m).std().item() / 5)
    paired = _slow(
        model,
        directions,
        surface.alphas,
        surface.betas,
        lambda m: (losses(m) - losses(model)).std().item() / 5,
    )
    assert np.allclose(surface.stderr, error, rtol=1e-10)
    assert np.allclose(surface.centre_stderr, paired, rtol=1e-10) and surface.centre_stderr[1, 1] == 0


def test_a_subset_of_the_data_is_covered_by_its_standard_error():
    model = _double(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)))
    x, y = torch.randn(4000, 4).double(), torch.randn(4000, 1).double()
    everything = ss.landscape(model, (x, y), F.mse_loss, grid=5)
    inside = []
    for seed in range(20):
        part = (
            ss.landscape(model, (x, y), F.mse_loss, grid=5, samples=200, seed=0, directions=None)
            if seed == 0
            else (
                ss.landscape(
                    model,
                    (x[200 * seed : 200 * seed + 200], y[200 * seed : 200 * seed + 200]),
                    F.mse_loss,
                    grid=5,
                )
            )
        )
        inside.append(np.abs(part.values - everything.values) < 1.96 * part.stderr)
    assert 0.85 < np.mean(inside) < 1.0
