"""Densities against known laws, quadrature against exact moments, traces and shares against dense matrices."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import t as student
from torch import nn

import skipscope as ss
from skipscope.curvature._lanczos import gaussian_blocks
from skipscope.curvature._spectral_density import _summary, quadrature
from skipscope.curvature._trace_estimate import trace_of

from .oracle import dense_gauss_newton, dense_hessian

DOUBLE = torch.float64


def regression(samples, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, width, generator=generator, dtype=DOUBLE)
    return nn.Linear(width, 1, bias=False).to(DOUBLE), (x, torch.zeros(samples, 1, dtype=DOUBLE)), x


def small_net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(DOUBLE)
    return model, torch.randn(20, 4, dtype=DOUBLE), torch.randint(0, 3, (20,))


def test_marchenko_pastur():
    """2/N X'X of Gaussian data has the Marchenko-Pastur law, with variance 2 and ratio width / samples."""
    model, data, _ = regression(1200, 400)
    rho = ss.spectral_density(model, data, F.mse_loss, probes=20, steps=60, bandwidth=0.15)
    ratio = 400 / 1200
    low, high = 2 * (1 - ratio**0.5) ** 2, 2 * (1 + ratio**0.5) ** 2
    x = np.linspace(low, high, 4001)[1:-1]
    law = np.sqrt((high - x) * (x - low)) / (2 * np.pi * 2 * ratio * x)
    kernel = np.exp(-0.5 * ((rho.grid[:, None] - x) / 0.15) ** 2) / (0.15 * np.sqrt(2 * np.pi))
    truth = (kernel * law).sum(1) * (x[1] - x[0])
    assert np.abs(rho.density - truth).max() < 0.1 * truth.max()
    assert float(((rho.density[1:] + rho.density[:-1]) / 2 * np.diff(rho.grid)).sum()) == pytest.approx(
        1, abs=1e-3
    )
    assert ((rho.low <= truth + 0.02) & (truth - 0.02 <= rho.high)).mean() > 0.9


def test_semicircle():
    generator = np.random.default_rng(0)
    a = generator.standard_normal((500, 500))
    a = torch.tensor((a + a.T) / (2 * 500) ** 0.5)
    draw = gaussian_blocks(500, 0)
    rules = [quadrature(lambda rows: rows @ a, 500, 40, draw) for _ in range(8)]
    found = [(nodes[0], weights[0]) for nodes, weights in rules]
    for power, moment in ((2, 1.0), (4, 2.0), (6, 5.0)):  # Catalan numbers
        estimate = np.mean([(weights * np.nan_to_num(nodes) ** power).sum() for nodes, weights in found])
        assert estimate == pytest.approx(moment, rel=0.1)


def test_quadrature_is_exact_for_its_vector():
    model, data, x = regression(60, 30)
    rho = ss.spectral_density(model, data, F.mse_loss, probes=3, steps=5)
    matrix, draw = (2 / 60 * x.T @ x), gaussian_blocks(30, 0)
    for nodes, weights in zip(rho.nodes, rho.weights, strict=True):
        v = draw(1)[0]
        v /= v.norm()
        for power in range(10):  # 2 * 5 - 1 = 9
            truth = float(v @ torch.linalg.matrix_power(matrix, power) @ v)
            assert (weights * nodes**power).sum() == pytest.approx(truth, rel=1e-10)


def test_shares_trace_and_effective_dimension_within_their_errors():
    model, x, y = small_net()
    values = np.linalg.eigvalsh(dense_hessian(model, x, y, F.cross_entropy))
    rho = ss.spectral_density(model, (x, y), F.cross_entropy, probes=40, steps=60)
    edge = rho.cut
    for found, error, truth in (
        (rho.negative_share, rho.negative_share_stderr, (values < -edge).mean()),
        (rho.negative_mass, rho.negative_mass_stderr, -values[values < 0].sum() / np.abs(values).sum()),
        (rho.trace, rho.trace_stderr, values.sum()),
        (
            *rho.effective_dimension(0.01),
            (np.clip(values, 0, None) / (np.clip(values, 0, None) + 0.01)).sum(),
        ),
    ):
        assert abs(found - truth) < 4 * error and error < 0.2 * abs(truth)
    with pytest.raises(ss.SkipscopeError, match="ridge"):
        rho.effective_dimension(0.0)


@pytest.mark.parametrize("kind", ["semicircle", "like a network's"])
def test_errors_cover_the_truth_as_often_as_they_should(kind):
    """A share of a spectrum that runs through zero is a matter of resolution, too."""
    rng, size, probes = np.random.default_rng(0), 200, 15
    values = (
        rng.normal(0, 1, size)
        if kind == "semicircle"
        else np.r_[5, 3, 1, rng.normal(0, 0.02, 157), -0.3, np.zeros(39)]
    )
    basis = torch.linalg.qr(torch.tensor(rng.standard_normal((size, size))))[0]
    matrix, half, inside = (basis * torch.tensor(values)) @ basis.T, student.ppf(0.975, probes - 1), []
    for seed in range(40):
        draw = gaussian_blocks(size, seed)
        rules = [quadrature(lambda rows: rows @ matrix, size, 40, draw) for _ in range(probes)]
        found = _summary(*(np.stack(part, axis=1) for part in zip(*rules)), size, 1e-4)
        truth = {
            "negative_share": (values < -found["cut"]).mean(), "trace": values.sum(),
            "negative_mass": -values[values < 0].sum() / np.abs(values).sum(),
        }  # fmt: skip
        inside.append([abs(found[name] - t) <= half * found[f"{name}_stderr"] for name, t in truth.items()])
    assert (np.mean(inside, axis=0) >= 0.85).all()


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_trace_of_a_network(matrix):
    model, x, y = small_net()
    oracle = dense_hessian if matrix == "hessian" else dense_gauss_newton
    truth = np.trace(oracle(model, x, y, F.cross_entropy))
    for method in ("hutch++", "hutchinson"):
        found = ss.curvature_trace(model, (x, y), F.cross_entropy, matrix=matrix, method=method, products=90)
        assert abs(found.value - truth) < 4 * found.stderr
    whole = ss.curvature_trace(model, (x, y), F.cross_entropy, matrix=matrix, products=3 * 51)
    assert whole.stderr == 0.0 and whole.value == pytest.approx(truth, rel=1e-10)


def test_hutch_plus_plus_beats_hutchinson_on_a_falling_spectrum():
    spectrum = 1.0 / torch.arange(1, 501, dtype=DOUBLE) ** 2
    errors = {
        method: np.mean(
            [
                abs(trace_of(lambda rows: rows @ rotated, 500, 60, method, seed)[0] - 1.6429)
                for seed in range(10)
            ]
        )
        for method in ("hutch++", "hutchinson")
        for q in [
            torch.linalg.qr(torch.randn(500, 500, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)))[
                0
            ]
        ]
        for rotated in [(q * spectrum) @ q.T]
    }
    assert errors["hutch++"] < 0.3 * errors["hutchinson"]


def test_awkward_spectra():
    model, x, _ = small_net()
    zero = ss.spectral_density(model, (x, x), lambda output, target: output.sum(), parameters="2.bias")
    assert zero.trace == 0 and zero.negative_share == 0 and np.isfinite(zero.density).all()
    one = ss.spectral_density(*regression(5, 1)[:2], F.mse_loss)
    assert one.nodes.shape == (10, 1)


def test_wrong_wishes_are_refused():
    model, x, y = small_net()
    with pytest.raises(ss.SkipscopeError, match="probes"):
        ss.spectral_density(model, (x, y), F.cross_entropy, probes=1)
    with pytest.raises(ss.SkipscopeError, match="unknown method"):
        ss.curvature_trace(model, (x, y), F.cross_entropy, method="guess")
    with pytest.raises(ss.SkipscopeError, match="products"):
        ss.curvature_trace(model, (x, y), F.cross_entropy, products=1)
