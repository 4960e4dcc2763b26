"""On an accelerator: every way of evaluating agrees with the CPU in float64."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import skipscope as ss
from skipscope import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("tf32", 1e-2), ("bf16", 5e-2)])
@pytest.mark.parametrize(
    "strategy", ["plain", "channels last, CUDA graph", "channels last", "compiled, channels last, CUDA graph"]
)
def test_the_gpu_agrees_with_the_cpu(precision, tolerance, strategy):
    torch.manual_seed(0)
    model, batch = reference.resnet20(), reference.digits(128)
    with torch.no_grad():
        model(batch[0])
    truth_batch = batch[0].double(), batch[1]
    truth = ss.landscape(
        copy.deepcopy(model).double(), truth_batch, F.cross_entropy, grid=3, strategy="plain"
    )
    surface = ss.landscape(
        model.cuda(), batch, F.cross_entropy, grid=3, precision=precision, strategy=strategy
    )
    assert np.allclose(surface.values, truth.values, rtol=tolerance) and surface.checks.passed
    assert surface.provenance.device.startswith("cuda")
