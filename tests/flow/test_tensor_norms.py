"""Norms of tensors against float64, at every size, stride, dtype and range."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipscope.flow.passes._tensor_norms import norm_of, sample_norms, similarity, sum_of_sizes, zeros_in

SHAPES = (
    (64, 300),
    (6, 5000),
    (3, 16, 33, 50),
    (5, 70001),
    (1, 2**16),
    (2**15, 3),
    (2, 2**16),
    (70000,),
    (7, 11),
)


def strided(x):
    """The same values with other strides."""
    yield x
    yield x.flip(0).clone().flip(0)
    if x.ndim == 4:
        yield x.contiguous(memory_format=torch.channels_last)
    if x.ndim > 1:
        yield x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms_are_those_of_float64(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    wide = x.double()
    for one in strided(x):
        assert norm_of(one) == pytest.approx(float(wide.norm()), rel=1e-7)
        assert sum_of_sizes(one) == pytest.approx(float(wide.abs().sum()), rel=1e-7)
        if x.ndim > 1 and len(x) > 1:
            expected = wide.flatten(1).norm(dim=1).numpy()
            np.testing.assert_allclose(sample_norms(one, len(x)), expected, rtol=2e-7)


@settings(deadline=None)
@given(st.integers(-45, 38), st.integers(-45, 38), st.integers(0, 2**16), st.integers(2**16, 2**17))
def test_no_square_leaves_its_range(low, high, seed, size):
    """Values of any size in float32, mixed in any order."""
    draw = np.random.default_rng(seed)
    sizes = 10.0 ** draw.uniform(min(low, high), max(low, high), size)
    x = torch.from_numpy(draw.standard_normal(size) * sizes).float().clamp(-3e38, 3e38)
    assert norm_of(x) == pytest.approx(float(x.double().norm()), rel=1e-6)
    assert sum_of_sizes(x) == pytest.approx(float(x.double().abs().sum()), rel=1e-6)
    rows = x[: size // 2 * 2].view(2, -1)
    np.testing.assert_allclose(sample_norms(rows, 2), rows.double().norm(dim=1).numpy(), rtol=1e-6)


def test_what_is_not_finite_is_seen():
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.ones(4, 2**15)
        x[2, 77] = bad
        assert not math.isfinite(norm_of(x))
        assert np.isfinite(sample_norms(x, 4)).tolist() == [True, True, False, True]


def test_nothing_and_zeros():
    assert norm_of(torch.empty(0)) == 0 and sum_of_sizes(torch.empty(0, 3)) == 0
    assert norm_of(torch.zeros(2**17)) == 0 and sample_norms(torch.zeros(4, 2**15), 4).tolist() == [0] * 4
    assert norm_of(torch.ones(1).expand(2**16)) == 2**8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_zeros_of_either_sign_are_counted_and_nothing_else(dtype):
    x = torch.relu(torch.randn(50, 700, generator=torch.Generator().manual_seed(1)) * 9).to(dtype)
    expected = int((x == 0).sum())
    assert 0 < expected < x.numel()
    for one in strided(x):
        assert zeros_in(one) == expected
    if dtype.is_floating_point:
        least = torch.finfo(dtype).smallest_normal / 2
        x[0, :5] = torch.tensor([-0.0, 0.0, math.nan, math.inf, least], dtype=dtype)
        assert zeros_in(x[0, :5]) == 2


def test_the_similarity_of_rows_is_their_mean_cosine():
    for x in (torch.randn(9, 40), torch.randn(3, 17, 24), torch.randn(300, 5), torch.randn(6, 2, 3, 4)):
        x = x + 0.5
        rows = (x[:8] if x.ndim == 3 else x[:256].flatten(1)[None]).double()
        unit = rows / rows.norm(dim=-1, keepdim=True)
        cosines = unit @ unit.mT
        n = rows.shape[1]
        expected = float((cosines.sum((1, 2)) - n).mean() / (n * (n - 1)))
        assert similarity(x) == pytest.approx(expected, abs=2e-6)
    assert similarity(torch.ones(4, 3)) == pytest.approx(1, abs=1e-6)
    with_nothing = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])  # a row of zeros is like none
    assert similarity(with_nothing) == pytest.approx(1 / 3, abs=1e-6)
