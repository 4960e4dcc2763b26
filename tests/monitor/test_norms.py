"""Norms and sums of |g|: both ways of computing them against element-by-element float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipscope.monitor.history._row_files import Rows, read_rows
from skipscope.monitor.recording import _gradient_norms


def exact(tensor):
    values = [abs(complex(v)) for v in tensor.detach().flatten().to(torch.complex128).tolist()]
    return math.sqrt(math.fsum(v * v for v in values)), math.fsum(values)


def gradients(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (1,), (7,), (0, 3), (5, 3), (2, 3, 4, 5), (300, 450)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
)
def test_on_the_host(dtype):
    expected = [exact(grad) for grad in gradients(dtype)]
    tolerance = 3e-6 if dtype == torch.bfloat16 else 1e-6
    np.testing.assert_allclose(_gradient_norms.on_host(gradients(dtype)).T, expected, rtol=tolerance)
    assert _gradient_norms.on_host([]).shape == (2, 0)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
)
def test_the_accelerators_way(dtype):
    grads = gradients(dtype)
    found = _gradient_norms.on_device(grads)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy().T, [exact(g) for g in grads], rtol=2e-5)


def test_the_accelerators_way_with_several_dtypes():
    grads = [g for kinds in zip(gradients(torch.float32), gradients(torch.float64)) for g in kinds]
    np.testing.assert_allclose(
        _gradient_norms.on_device(grads).numpy().T, [exact(g) for g in grads], rtol=2e-5
    )


def test_half_precision_neither_overflows_nor_rounds():
    grads = [torch.full((1000,), 200.0, dtype=torch.float16)]
    np.testing.assert_allclose(_gradient_norms.on_device(grads)[:, 0], [200 * 1000**0.5, 200e3], rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_any_finite_float32(values):
    grad = torch.tensor(values, dtype=torch.float32)
    norm, total = exact(grad)
    if total < 3e38:
        for found in (_gradient_norms.one_on_host(grad), _gradient_norms.on_host([grad, grad])[:, 1]):
            np.testing.assert_allclose(found, (norm, total), rtol=3e-6, atol=2e-45)  # float32's least


@pytest.mark.parametrize("keep", [2, 3, 8, 64])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 64, 65, 300])
def test_rows_are_bounded_evenly_spaced_and_end_with_the_last(tmp_path, keep, count):
    rows = Rows(2, keep, tmp_path / "x.rows", {"names": ["a"]})
    for i in range(count):
        rows.append(np.array([i, -i], dtype=float))
    held = rows.array()[:, 0]
    assert len(held) <= keep + 1
    assert list(held[:1]) == [0.0][:count]
    assert list(held[-1:]) == [count - 1.0][:count]
    assert len(set(np.diff(held[:-1]))) <= 1
    assert list(rows.last(1)[:, 0]) == list(held[-1:])
    rows.close()
    about, read, whole, changed = read_rows(tmp_path / "x.rows")
    assert about["names"] == ["a"]
    assert (whole, changed) == (count, 0)
    np.testing.assert_array_equal(read[:, 0], np.arange(count))
    few = read_rows(tmp_path / "x.rows", keep)[1][:, 0]
    assert len(few) <= keep + 1
    assert list(few[-1:]) == [count - 1.0][:count]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_rows_or_a_value_error(data):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.rows"
        path.write_bytes(data)
        try:
            rows = read_rows(path)[1]
        except ValueError:
            return
        assert rows.ndim == 2


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_what_float32_cannot_square_is_unknown_once_and_then_right(monkeypatch, size):
    """The accelerator's way, on the CPU: never a zero or an infinity that is none."""
    from skipscope.monitor import STATES, watch
    from skipscope.monitor.recording import _step_recorder

    def sums(tracked, grads, wide):
        return [(list(range(len(grads))), _gradient_norms.on_device(grads, wide).numpy())]

    monkeypatch.setattr(_step_recorder, "local_sums", sums)
    model = torch.nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model.weight.grad = torch.full((4, 4), size)
    with watch(model, optimizer) as monitor:
        for _ in range(3):
            optimizer.step()
    history = monitor.history
    assert math.isnan(history.norm[0, 0])
    np.testing.assert_allclose(history.norm[1:, 0], 4 * float(torch.tensor(size)), rtol=1e-6)
    np.testing.assert_allclose(history.mean_abs[:, 0], size, rtol=1e-6)
    assert {STATES[int(code)] for code in history.states.flat} == {"ok"}


@pytest.mark.parametrize("unit", [1e-310, 1e-200, 1.0, 1e300])
def test_norms_without_scipy(unit):
    x = np.array([7.0, 3.0, -4.0, 0.0, 12.0]) * unit
    assert _gradient_norms._nrm2(x, 3, 1) == pytest.approx(5 * unit)
    assert _gradient_norms._nrm2(x[1:]) == pytest.approx(13 * unit)
    assert _gradient_norms._nrm2(x, 1, 3) == 0.0
    assert _gradient_norms._asum(x, 3, 1) == pytest.approx(7 * unit)
    assert _gradient_norms._dot(x / unit, x / unit, 2, 1, 1, 1) == 25.0
    assert _gradient_norms._nrm2(np.array([1.0, -np.inf])) == np.inf
