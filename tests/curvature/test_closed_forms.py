"""Hessians and spectra that are known in closed form, to 1e-10 relative in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss

from .oracle import matrix_of, relative

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False).to(DOUBLE)


def assert_ends(found, spectrum, rel=1e-10):
    scale = np.abs(spectrum).max()
    assert found.converged
    assert abs(found.smallest[0] - spectrum.min()) <= rel * scale
    assert abs(found.largest[0] - spectrum.max()) <= rel * scale


def test_linear_regression():
    x, y, model = torch.randn(30, 6, dtype=DOUBLE), torch.randn(30, 1, dtype=DOUBLE), linear(6, 1)
    truth = (2 / 30 * x.T @ x).numpy()
    assert relative(matrix_of(ss.curvature_operator(model, (x, y), F.mse_loss)), truth) < 1e-10
    assert (
        relative(matrix_of(ss.curvature_operator(model, (x, y), F.mse_loss, matrix="gauss_newton")), truth)
        < 1e-10
    )
    assert_ends(ss.extreme_eigenvalues(model, (x, y), F.mse_loss, tol=1e-9), np.linalg.eigvalsh(truth))


def test_logistic_regression():
    x, model = torch.randn(30, 6, dtype=DOUBLE), linear(6, 1)
    y = torch.randint(0, 2, (30, 1)).to(DOUBLE)
    p = torch.sigmoid(model(x)).detach()
    truth = (x.T @ (p * (1 - p) * x) / 30).numpy()
    loss = F.binary_cross_entropy_with_logits
    assert relative(matrix_of(ss.curvature_operator(model, (x, y), loss)), truth) < 1e-10
    assert_ends(ss.extreme_eigenvalues(model, (x, y), loss, tol=1e-9), np.linalg.eigvalsh(truth))


def test_softmax_regression():
    x, y, model = torch.randn(30, 4, dtype=DOUBLE), torch.randint(0, 3, (30,)), linear(4, 3)
    p = torch.softmax(model(x), 1).detach()
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    truth = torch.einsum("nij,na,nb->iajb", inner, x, x).reshape(12, 12).numpy() / 30
    assert relative(matrix_of(ss.curvature_operator(model, (x, y), F.cross_entropy)), truth) < 1e-10
    assert_ends(ss.extreme_eigenvalues(model, (x, y), F.cross_entropy, tol=1e-9), np.linalg.eigvalsh(truth))


def test_two_scalar_weights_over_a_whole_plane():
    """(w2 w1 - a)^2 / 2: lambda = (s +- sqrt((w1^2 - w2^2)^2 + 4 (2 w1 w2 - a)^2)) / 2, s = w1^2 + w2^2."""
    model, a = nn.Sequential(linear(1, 1), linear(1, 1)), 0.7
    data = torch.ones(1, 1, dtype=DOUBLE), torch.full((1, 1), a, dtype=DOUBLE)

    def loss(output, target):
        return (output - target).square().sum() / 2

    for w1 in np.linspace(-1.5, 1.5, 7):
        for w2 in np.linspace(-1.5, 1.5, 7):
            with torch.no_grad():
                model[0].weight.fill_(w1), model[1].weight.fill_(w2)
            root = math.sqrt((w1**2 - w2**2) ** 2 + 4 * (2 * w1 * w2 - a) ** 2)
            low, high = (w1**2 + w2**2 - root) / 2, (w1**2 + w2**2 + root) / 2
            ends = ss.extreme_eigenvalues(model, data, loss)
            assert ends.smallest[0] == pytest.approx(low, rel=1e-10, abs=1e-10 * max(abs(low), abs(high)))
            assert ends.largest[0] == pytest.approx(high, rel=1e-10)
            if high > 1e-3:
                assert ends.ratio == pytest.approx(abs(low / high), rel=1e-9, abs=1e-12)


def test_a_scale_invariant_block_turns_its_vector_into_minus_the_gradient():
    class Invariant(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, dtype=DOUBLE))

        def forward(self, x):
            return torch.tanh(x @ self.w / self.w.norm())

    model, x, y = Invariant(), torch.randn(20, 5, dtype=DOUBLE), torch.randn(20, dtype=DOUBLE)
    operator = ss.curvature_operator(model, (x, y), F.mse_loss)
    gradient = torch.autograd.grad(F.mse_loss(model(x), y), model.w)[0].numpy()
    assert relative(operator @ model.w.detach().numpy(), -gradient) < 1e-10


def test_shifting_every_softmax_bias_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(DOUBLE)
    data = torch.randn(20, 4, dtype=DOUBLE), torch.randint(0, 3, (20,))
    operator = ss.curvature_operator(model, data, F.cross_entropy)
    shift = np.zeros(operator.shape[0])
    shift[-3:] = 1.0
    assert np.abs(operator @ shift).max() < 1e-10 * np.abs(matrix_of(operator)).max()


def test_gradient_descent_diverges_just_beyond_two_over_the_largest_eigenvalue():
    x, y = torch.randn(30, 6, dtype=DOUBLE), torch.zeros(30, 1, dtype=DOUBLE)
    for factor, grows in ((0.99, False), (1.01, True)):
        model = linear(6, 1)
        step = factor * 2 / ss.extreme_eigenvalues(model, (x, y), F.mse_loss, tol=1e-6).largest[0]
        start = float(F.mse_loss(model(x), y))
        for _ in range(600):
            (gradient,) = torch.autograd.grad(F.mse_loss(model(x), y), model.weight)
            with torch.no_grad():
                model.weight -= step * gradient
        assert (float(F.mse_loss(model(x), y)) > start) == grows


# --- deep linear networks at zero (arXiv 1611.01186), end to end ---


class LinearShortcuts(nn.Module):
    """x -> (I + W_b ... W_1) x, L times: ``span`` linear layers under each identity shortcut, all weights zero."""

    def __init__(self, width: int, blocks: int, span: int):
        super().__init__()
        branches = [nn.Sequential(*(linear(width, width) for _ in range(span))) for _ in range(blocks)]
        self.blocks = nn.ModuleList(ss.nn.IdentityShortcut(branch) for branch in branches)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def regression(width=3, samples=40):
    x = torch.randn(samples, width, dtype=DOUBLE)
    return x, x @ torch.randn(width, width, dtype=DOUBLE)


def half_squares(output, target):
    return (output - target).square().sum() / (2 * len(target))


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_two_layer_shortcuts_have_a_condition_number_independent_of_depth(blocks):
    """H's eigenvalues are +-sigma_i(E[x (x - y)']), each width x blocks times; without the shortcuts H vanishes."""
    (x, y), model = regression(), LinearShortcuts(3, blocks, 2)
    sigma = torch.linalg.svdvals(x.T @ (x - y) / len(x)).numpy()
    found = ss.find_shortcuts(model, x)
    assert len(found) == blocks and {s.kind for s in found} == {"identity"}
    ends = ss.extreme_eigenvalues(model, (x, y), half_squares, k=4, tol=1e-6)
    assert ends.converged
    assert ends.largest == pytest.approx(
        np.r_[[sigma[0]] * 3, sigma[0] if blocks > 1 else sigma[1]], rel=1e-10
    )
    assert ends.smallest == pytest.approx(-ends.largest, rel=1e-10)
    assert ends.ratio == pytest.approx(1.0, rel=1e-10)
    dense = np.linalg.eigvalsh(matrix_of(ss.curvature_operator(model, (x, y), half_squares)))
    condition = np.abs(dense).max() / np.abs(dense).min()
    assert condition == pytest.approx(sigma[0] / sigma[-1], rel=1e-9)
    plain = ss.ablate(model, found, how="remove")
    flat = ss.extreme_eigenvalues(plain, (x, y), half_squares)
    without = (
        torch.linalg.svdvals(x.T @ y / len(x))[0].item() if blocks == 1 else 0.0
    )  # four layers and more: none
    assert flat.converged
    assert (-flat.smallest[0], flat.largest[0]) == pytest.approx((without, without), rel=1e-10, abs=0)


@pytest.mark.parametrize(("span", "grows"), [(1, True), (2, False)])
def test_only_one_layer_shortcuts_lose_condition_with_depth(span, grows):
    (x, y), conditions = regression(), []
    for blocks in (1, 4):
        matrix = matrix_of(ss.curvature_operator(LinearShortcuts(3, blocks, span), (x, y), half_squares))
        values = np.abs(np.linalg.eigvalsh(matrix))
        conditions.append(values.max() / values.min())
    assert (conditions[1] > 5 * conditions[0]) == grows
    assert grows or conditions[1] == pytest.approx(conditions[0], rel=1e-9)


def test_three_layer_shortcuts_have_no_curvature_at_zero():
    (x, y), model = regression(), LinearShortcuts(3, 2, 3)
    ends = ss.extreme_eigenvalues(model, (x, y), half_squares)
    assert ends.converged and (ends.smallest[0], ends.largest[0]) == (0.0, 0.0)
