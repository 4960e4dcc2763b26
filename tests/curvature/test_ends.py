"""extreme_eigenvalues on networks: against dense spectra, in float32, with vectors, as a result."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss

from .oracle import dense_gauss_newton, dense_hessian


def net(seed, act=nn.Tanh):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), act(), nn.Linear(8, 8), act(), nn.Linear(8, 3)).double()


def data(seed, n=40):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=generator)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
def test_bounds_hold_on_networks(seed, precision):
    act = (nn.Tanh, nn.GELU, nn.ReLU, nn.Sigmoid)[seed % 4]
    model, (x, y), k = net(seed, act), data(seed), 1 + seed % 2
    matrix, oracle = (("hessian", dense_hessian), ("gauss_newton", dense_gauss_newton))[seed // 4 % 2]
    values = np.linalg.eigvalsh(
        oracle(model.to(precision).double(), x.to(precision).double(), y, F.cross_entropy)
    )
    ends = ss.extreme_eigenvalues(
        model.to(precision), (x.to(precision), y), F.cross_entropy, k=k, tol=1e-4, seed=seed, matrix=matrix
    )
    assert ends.converged and ends.probability >= 0.99
    for value, bound in zip(np.r_[ends.smallest, ends.largest], ends.residuals, strict=True):
        assert np.abs(values - value).min() <= bound + 1e-14
    assert ends.smallest == pytest.approx(values[:k], abs=2e-4 * ends.scale)
    assert ends.largest == pytest.approx(values[::-1][:k], abs=2e-4 * ends.scale)


def test_eigenvectors_are_directions():
    model, (x, y) = net(0), data(0)
    ends = ss.extreme_eigenvalues(model, (x, y), F.cross_entropy, k=2, vectors=True)
    hessian = dense_hessian(model, x, y, F.cross_entropy)
    for vector, value, bound in zip(ends.largest_vectors, ends.largest, ends.largest_residuals, strict=True):
        assert np.linalg.norm(vector) == pytest.approx(1)
        assert np.linalg.norm(hessian @ vector - value * vector) <= bound
    direction = ends.direction("smallest")
    assert {n: t.shape for n, t in direction.items()} == {n: p.shape for n, p in model.named_parameters()}
    again = torch.cat([t.reshape(-1) for t in direction.values()]).numpy()
    assert np.array_equal(again, ends.smallest_vectors[0])
    for wrong in ({"end": 1}, {"end": "both"}, {"index": 2}, {"index": -1}):
        with pytest.raises(ss.SkipscopeError, match="no such eigenvector"):
            ends.direction(**wrong)
    with pytest.raises(ss.SkipscopeError, match="vectors=True"):
        ss.extreme_eigenvalues(model, (x, y), F.cross_entropy).direction()


def test_the_same_seed_gives_the_same_bits():
    model, batch = net(0), data(0)
    one, two = (ss.extreme_eigenvalues(model, batch, F.cross_entropy, seed=3) for _ in range(2))
    assert np.array_equal(one.smallest, two.smallest) and one.products == two.products


def test_the_result_prints_saves_and_loads(tmp_path):
    ends = ss.extreme_eigenvalues(net(0), data(0), F.cross_entropy, vectors=True)
    text = str(ends)
    assert "Converged" in text and "probability" in text and "+-" in text
    assert max(map(len, text.splitlines())) <= 80
    again = ss.load(ends.save(tmp_path / "ends.json"))
    assert again.largest[0] == ends.largest[0] and np.array_equal(again.largest_vectors, ends.largest_vectors)
    rho = ss.spectral_density(net(0), data(0), F.cross_entropy, probes=3, steps=10)
    assert np.array_equal(ss.load(rho.save(tmp_path / "rho.json")).nodes, rho.nodes)
    assert "negative" in str(rho)
    trace = ss.curvature_trace(net(0), data(0), F.cross_entropy)
    assert ss.load(trace.save(tmp_path / "trace.json")).value == trace.value and "hutch++" in str(trace)


def test_an_unconverged_result_says_so():
    ends = ss.extreme_eigenvalues(net(0), data(0), F.cross_entropy, max_products=5)
    assert not ends.converged and "NOT converged" in str(ends)


@pytest.mark.parametrize(
    "options",
    [
        {"k": 0}, {"k": 10_000}, {"k": 1.5}, {"k": "1"}, {"k": True}, {"tol": 0}, {"tol": None}, {"tol": float("nan")},
        {"block": 0}, {"block": 1.5}, {"confidence": 1.0}, {"max_products": 2.5},
    ],
    ids=str,
)  # fmt: skip
def test_wishes_out_of_range_are_refused(options):
    with pytest.raises(ss.SkipscopeError, match="out of range"):
        ss.extreme_eigenvalues(net(0), data(0), F.cross_entropy, **options)


def test_a_loss_that_draws_from_a_generator_of_its_own_is_refused():
    """Noise outside the seeded generators is seen before anything is computed."""
    model, batch = net(0), data(0)
    generator = torch.Generator()

    def noisy(output, target):
        generator.seed()
        keep = torch.rand(output.shape, generator=generator, dtype=output.dtype) > 0.3
        return F.cross_entropy(output * keep, target)

    with pytest.raises(ss.SkipscopeError, match="two values at the same weights and data"):
        ss.curvature_operator(model, batch, noisy, memory=0)


def test_whole_numbers_among_the_weights_need_no_gradient_where_the_loss_has_none():
    class Coded(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3).requires_grad_(False), nn.Linear(2, 2)
            self.codes = nn.Parameter(torch.arange(3), requires_grad=False)

        def forward(self, x):
            return self.used(x)[:, self.codes]

    data = torch.randn(6, 4), torch.arange(6) % 3
    ends = ss.extreme_eigenvalues(Coded(), data, nn.functional.cross_entropy, parameters="unused.*")
    assert ends.largest[0] == ends.smallest[0] == 0


@pytest.mark.parametrize("end", ["largest", "smallest"])
@pytest.mark.parametrize("index", [0, 1])
def test_each_eigenvector_is_that_of_its_eigenvalue(end, index):
    model, (x, y) = net(0).double(), data(0)
    x = x.double()
    ends = ss.extreme_eigenvalues(model, (x, y), F.cross_entropy, k=2, vectors=True, tol=1e-9)
    vector = torch.cat([part.flatten() for part in ends.direction(end, index).values()])
    value = getattr(ends, end)[index]
    product = torch.as_tensor(dense_hessian(model, x, y, F.cross_entropy)) @ vector
    torch.testing.assert_close(product, value * vector, rtol=0, atol=1e-6 * abs(ends.largest[0]))
    assert float(vector.norm()) == pytest.approx(1)
