"""The same numbers on an accelerator as on the CPU."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double(), (
        torch.randn(40, 5, dtype=torch.float64), torch.randint(0, 3, (40,)),
    )  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, {"k": 2, "block": 2}, {"matrix": "gauss_newton"}, {"mode": "finite"}], ids=str
)
def test_ends_density_and_trace_equal_those_of_the_cpu(options):
    model, (x, y) = net()
    here = ss.extreme_eigenvalues(model, (x, y), F.cross_entropy, vectors=True, **options)
    there = ss.extreme_eigenvalues(
        model.cuda(), (x.cuda(), y.cuda()), F.cross_entropy, vectors=True, **options
    )
    assert there.converged and there.products == here.products
    assert (
        np.abs(there.largest - here.largest).max() < 1e-7
        and np.abs(there.smallest - here.smallest).max() < 1e-7
    )
    if not options:
        batch = x.cuda(), y.cuda()
        one, two = (ss.spectral_density(m, b, F.cross_entropy, probes=3, steps=10)
                    for m, b in ((model, batch), (net()[0], (x, y))))  # fmt: skip
        assert np.allclose(one.nodes, two.nodes, atol=1e-8)
        on_gpu, on_cpu = (ss.curvature_trace(m, b, F.cross_entropy).value
                          for m, b in ((model, batch), (net()[0], (x, y))))  # fmt: skip
        assert on_gpu == pytest.approx(on_cpu, rel=1e-8)


def test_a_map_and_fused_attention():
    model, (x, y) = net()
    here = ss.curvature_map(model, (x, y), F.cross_entropy, grid=3)
    there = ss.curvature_map(model.cuda(), (x.cuda(), y.cuda()), F.cross_entropy, grid=3)
    assert np.abs(here.largest - there.largest).max() < 1e-6
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).cuda()
    data = torch.randn(4, 6, 8).cuda(), torch.randn(4, 6, 8).cuda()
    ends = ss.extreme_eigenvalues(layer, data, F.mse_loss, tol=1e-2)
    assert ends.converged and "finite differences" not in ends.method
