"""The eigen-solver on matrices whose spectrum is known: bounds in every case, the claim of the ends as often as it says."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipscope.curvature._eigensolver import (
    Ends,
    SolverOptions,
    _Search,
    _worth_keeping,
    find_ends,
)
from skipscope.curvature._lanczos import Krylov, gaussian_blocks


def with_spectrum(values, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    return (q * np.asarray(values, float)) @ q.T


def solve(matrix: np.ndarray, *, single=False, **options) -> Ends:
    kept = torch.tensor(matrix, dtype=torch.float32 if single else torch.float64)
    return find_ends(
        lambda rows: (rows.to(kept.dtype) @ kept.T).double(),
        len(matrix),
        SolverOptions(**options, precision=1.2e-7 * single),
    )


def check(matrix: np.ndarray, found: Ends, k: int, tol: float) -> None:
    truth = np.linalg.eigvalsh(matrix)
    scale = np.abs(truth).max()
    rounding = 1e-13 * scale
    for value, bound in zip(found.values, found.residuals):
        assert np.abs(truth - value).min() <= bound + rounding
    if found.converged:
        low, high = found.order(k)
        assert np.abs(found.values[low] - truth[:k]).max() <= 2 * tol * scale + rounding
        assert np.abs(found.values[high] - truth[::-1][:k]).max() <= 2 * tol * scale + rounding
        image = found.vectors @ torch.tensor(matrix)
        residual = (image - torch.tensor(found.values)[:, None] * found.vectors).norm(dim=1)
        assert (residual.numpy() <= found.residuals + rounding).all()


SPECTRA = {
    "1 x 1": [3.0],
    "1 x 1, negative": [-3.0],
    "1 x 1, zero": [0.0],
    "2 x 2, opposite": [-1.0, 1.0],
    "5 x 5": [2.0, 2.0, 1.0, 1.0, 0.0],
    "zero": np.zeros(40),
    "identity": np.full(40, 2.0),
    "rank one": np.r_[np.zeros(39), 7.0],
    "rank one, negative": np.r_[np.zeros(39), -7.0],
    "rank three": np.r_[np.zeros(37), -1.0, 2.0, 2.0],
    "all negative": -np.linspace(1, 2, 60),
    "all positive": np.linspace(0.5, 1, 60),
    "three values, many times": np.r_[np.full(10, -1.0), np.zeros(50), np.full(10, 1.0)],
    "clustered end": np.r_[np.linspace(0, 1e-3, 100), 5.0, 5.0001, 5.0002],
    "wide": np.logspace(-12, 3, 80),
    "tiny": np.linspace(-1e-30, 2e-30, 50),
    "huge": np.linspace(-1e30, 2e30, 50),
    "indefinite": np.random.default_rng(1).standard_normal(100),
    "uniform": np.linspace(-1, 1, 150),
}
WISHES = [
    {},
    {"k": 3},
    {"k": 2, "block": 2},
    {"tol": 1e-9},
    {"basis": 12},
    {"k": 2, "basis": 14, "tol": 1e-4},
    {"block": 4},
]


@pytest.mark.parametrize("options", WISHES, ids=str)
@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
def test_awkward_spectra(values, options):
    matrix = with_spectrum(values)
    k = min(options.get("k", 1), len(matrix))
    found = solve(matrix, **{**options, "k": k})
    assert found.converged
    check(matrix, found, k, options.get("tol", 1e-3))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(-100, 100, allow_subnormal=False), min_size=1, max_size=40),
    repeat=st.integers(1, 4),
    k=st.integers(1, 3),
    block=st.integers(1, 3),
    exponent=st.integers(2, 9),
    single=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_bounds_hold_on_any_matrix(values, repeat, k, block, exponent, single, seed):
    matrix = with_spectrum(np.repeat(values, repeat), seed)
    if single:
        matrix = matrix.astype(np.float32).astype(float)
        matrix = (matrix + matrix.T) / 2
    k, tol = min(k, len(matrix)), 10.0**-exponent
    found = solve(matrix, single=single, k=k, block=block, tol=tol, seed=seed)
    check(matrix, found, k, tol)
    assert found.converged or single


def test_a_smaller_tolerance_than_the_products_allow_is_never_converged():
    matrix = with_spectrum(np.linspace(-1, 1, 200)).astype(np.float32).astype(float)
    found = solve((matrix + matrix.T) / 2, single=True, tol=1e-9)
    assert not found.converged and found.noise > 1e-9


def test_products_that_are_not_symmetric_are_never_converged():
    matrix = with_spectrum(np.linspace(-1, 1, 60))
    matrix[0] *= 1.5
    found = solve(matrix)
    assert not found.converged and found.asymmetry > 0.01


def test_too_few_products_are_not_converged_and_still_bounded():
    matrix = with_spectrum(np.linspace(-1, 1, 200))
    found = solve(matrix, max_products=10)
    assert not found.converged and found.products == 10
    check(matrix, found, 1, 1e-3)
    assert len(solve(matrix, max_products=1, k=3).order(3)[0]) == 3


def hidden_end(size: int, seed: int) -> tuple[bool, bool]:
    """H = I + e e': (claimed, true) of the end of its spectrum after at most 3 products."""

    def product(rows):
        image = rows.clone()
        image[:, 0] += rows[:, 0]
        return image

    found = find_ends(product, size, SolverOptions(seed=seed, tol=1e-2, max_products=1))
    return found.converged, abs(found.values.max() - 2) < 0.1


def test_a_small_residual_is_not_taken_for_the_end():
    """After one product the residual is 3e-3 at 1, where the truth is 2."""
    outcomes = [hidden_end(100_000, seed) for seed in range(3)]
    assert outcomes == [(False, False)] * 3


@pytest.mark.parametrize("options", [{}, {"basis": 14}, {"block": 2}], ids=str)
def test_the_probability_is_what_it_says(options):
    """A far eigenvalue that is hard to see: among runs that claim 70 %, at most 30 % (and a margin) are wrong."""
    n, wrong, claims = 400, 0, 0
    values = np.r_[np.linspace(-1, 1, n - 1), 1.05]
    spectrum = torch.tensor(values)
    for seed in range(200):
        found = find_ends(
            lambda rows: rows * spectrum, n, SolverOptions(seed=seed, tol=2e-2, confidence=0.7, **options)
        )
        claims += found.converged
        wrong += found.converged and found.values.max() < 1.05 - 2 * 2e-2 * 1.05
    assert claims > 150
    assert wrong / claims <= 0.3 + 3 * (0.3 * 0.7 / claims) ** 0.5


def test_the_claim_grows_surer_the_more_is_seen():
    spectrum = torch.linspace(-1, 1, 300, dtype=torch.float64)
    doubts = [
        find_ends(lambda rows: rows * spectrum, 300, SolverOptions(confidence=c)).miss_probability
        for c in (0.5, 0.9, 0.999)
    ]
    assert doubts[0] >= doubts[1] > doubts[2] and doubts[2] <= 1e-3


def test_the_basis_is_orthonormal_after_restarts_and_breakdowns():
    spectrum = torch.tensor(np.r_[np.zeros(30), np.linspace(-1, 1, 30)])
    draw = gaussian_blocks(60, 0)
    run = Krylov(
        lambda rows: rows * spectrum, 60, 60, draw, torch.zeros(62, 60, dtype=torch.float64), draw(1)[:0]
    )
    run.start(draw(2))
    while not run.exhausted:
        run.step()
        if run.products == 20:
            run.restart(np.r_[0:5, run.filled - 5 : run.filled])
    basis = run.rows[: run.filled]
    assert (basis @ basis.T - torch.eye(60)).abs().max() < 1e-13
    assert np.abs(run.ritz()[0] - np.sort(spectrum.numpy())).max() < 1e-13


@pytest.mark.parametrize(("k", "own", "expected"), [
    (1, [-1.0, 1.0], (-6.0, 5.0)), (2, [-1.0, 1.0], (-2.0, 4.0)), (3, [-1.0, 1.0], (0.5, 3.0)),
    (2, [-7.0, 9.0], (-7.0, 9.0)), (2, [-3.0, 3.5], (-3.0, 4.0)),
])  # fmt: skip
def test_nothing_may_be_beyond_the_last_known_that_is_asked_for(k, own, expected):
    known = Ends(np.array([4.0, -2.0, 5.0, 3.0, -6.0, 0.5]), np.zeros(6), torch.zeros(6, 9))
    search = _Search(None, known, SolverOptions(k=k), 0.1)
    low, high = search._thresholds(np.array(own))
    assert (low, high) == (min(expected[0], own[0]), expected[1])
    search.known = Ends(np.zeros(0), np.zeros(0), torch.zeros(0, 9))
    assert search._thresholds(np.array(own)) == tuple(own)


@pytest.mark.parametrize(("filled", "k", "block", "each"), [
    (20, 3, 1, 7),  # 3 wanted, a fifth of 20 beside them
    (40, 2, 6, 14),  # two blocks beside them
    (9, 4, 1, 4),  # half of what a block leaves
    (12, 6, 4, 4),
])  # fmt: skip
def test_what_a_restart_keeps(filled, k, block, each):
    kept = _worth_keeping(filled, k, block)
    np.testing.assert_array_equal(kept, [*range(each), *range(filled - each, filled)])
    assert len(set(kept)) == 2 * each <= filled - block


def test_nearly_parallel_rows_of_a_block_are_made_orthogonal_to_the_basis_again():
    """What is left of the second is 1e-9 of it: so is its rounding in the basis, times 1e9."""
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 4, dtype=torch.float64, generator=draw)).Q.T
    first, second = torch.randn(2, 40, dtype=torch.float64, generator=draw)
    block = torch.stack([first, first + 1e-9 * second])
    for _ in range(2):
        block -= block @ basis.T @ basis
    block += 1e-15 * basis.sum(0)
    rows = torch.zeros(10, 40, dtype=torch.float64)
    rows[:4] = basis
    krylov = SimpleNamespace(filled=4, size=10, rows=rows, outside=torch.zeros(0, 40, dtype=torch.float64))
    onward, dropped = Krylov._orthonormal(krylov, block.clone(), 1e-14, sure=True)
    assert onward.shape == (2, 2) and dropped == 0.0
    torch.testing.assert_close(rows[:6] @ rows[:6].T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-13)
    # Rounding takes 1e-16 of 1e-9 apart: seven digits of the second row's own part are left.
    torch.testing.assert_close(torch.as_tensor(onward).T @ rows[4:6], block, rtol=0, atol=1e-13)
