"""What curvature takes of the memory is said first; what does not fit is refused with what would."""

import io
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope._errors import SkipscopeError
from skipscope._free_memory import SHARE
from skipscope.curvature import _ranked_operator, _vector_memory
from skipscope.curvature._trace_estimate import _append_orthonormal

SIZE = 200
MODEL = nn.Sequential(nn.Linear(20, 9, bias=False), nn.Tanh(), nn.Linear(9, 2)).double()
DATA = torch.randn(30, 20).double(), torch.randn(30, 2).double()


def free(monkeypatch, vectors: float) -> None:
    """As much free memory as that many vectors of the parameters' size take."""
    monkeypatch.setattr(_vector_memory, "free_bytes", lambda device: vectors * 8 * SIZE / SHARE + 1)


CALLS = {
    "extreme_eigenvalues": lambda **o: ss.extreme_eigenvalues(MODEL, DATA, F.mse_loss, **o),
    "spectral_density": lambda **o: ss.spectral_density(MODEL, DATA, F.mse_loss, probes=2, **o),
    "curvature_trace": lambda **o: ss.curvature_trace(MODEL, DATA, F.mse_loss, **o),
    "curvature_map": lambda **o: ss.curvature_map(MODEL, DATA, F.mse_loss, grid=(1,), **o),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_does_not_fit_is_refused_with_what_fits(name, monkeypatch):
    free(monkeypatch, 18)
    with pytest.raises(SkipscopeError, match=f"{name}.*do not fit into memory") as refused:
        CALLS[name](**({"products": 90} if name == "curvature_trace" else {}))
    option, value = re.search(r"(basis|steps|products)=(\d+)", str(refused.value)).groups()
    CALLS[name](**{option: int(value)})  # what it names fits
    with pytest.raises(SkipscopeError, match="do not fit"):
        CALLS[name](**{option: int(value) + 3})


@pytest.mark.parametrize("name", CALLS)
def test_where_nothing_fits_fewer_parameters_are_named(name, monkeypatch):
    free(monkeypatch, 3)
    with pytest.raises(SkipscopeError, match=r"(?s)do not fit.*parameters=\[...\]"):
        CALLS[name]()


def test_hutchinson_needs_no_vectors(monkeypatch):
    free(monkeypatch, 7)
    assert CALLS["curvature_trace"](method="hutchinson").probes == 60


@pytest.mark.parametrize("name", CALLS)
def test_the_estimate_is_said(name):
    said = io.StringIO()
    with ss.progress(file=said):
        CALLS[name]()
    assert re.search(rf"{name}: \d+ vectors, at most [\d.e-]+ GiB", said.getvalue())


def test_hutch_is_exact_on_a_matrix_of_low_rank():
    # Least squares of one output by 3 samples: a Hessian of rank 3; a third of 30 products is more than enough.
    torch.manual_seed(0)
    x = torch.randn(3, 20).double()
    model = nn.Linear(20, 1, bias=False).double()
    found = ss.curvature_trace(model, (x, torch.zeros(3, 1).double()), F.mse_loss, products=30)
    assert found.value == pytest.approx(float(2 / 3 * x.square().sum()), rel=1e-10)


def test_orthonormal_rows_are_appended_in_place():
    torch.manual_seed(0)
    rows, count = torch.zeros(5, 8).double(), 0
    for row in (*torch.randn(4, 8).double(), 2 * rows[0]):
        count += _append_orthonormal(rows, count, row.clone())
    assert count == 4  # zero has no part of its own
    assert not _append_orthonormal(rows, count, rows[1] - 3 * rows[2])
    assert torch.allclose(rows[:4] @ rows[:4].T, torch.eye(4).double(), atol=1e-14)


@pytest.mark.parametrize(("share", "fits"), [(0.9, False), (1.1, True)])
def test_a_whole_copy_that_does_not_fit_on_a_rank_is_refused_with_its_size(monkeypatch, share, fits):
    model = nn.Linear(3000, 3000)
    needed = 3 * 4 * (3000 * 3000 + 3000)  # weights, gradient and product in float32: 0.10 GiB
    monkeypatch.setattr(_ranked_operator, "free_bytes", lambda device: share * needed / SHARE)
    if fits:
        _ranked_operator._require_whole(model, "curvature_operator")
        return
    with pytest.raises(SkipscopeError) as refused:
        _ranked_operator._require_whole(model, "curvature_operator")
    assert refused.value.expected == "0.10 GiB: the weights, their gradient and a product"
    assert refused.value.got == "0.09 GiB that may be used on cpu"
