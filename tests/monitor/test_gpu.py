"""On an accelerator: the monitor's numbers are those of float64, whatever the dtype, layout and size."""

import numpy as np
import pytest
import torch
from torch import nn

import skipscope as ss
from skipscope.monitor.recording import _gradient_norms

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")]

SHAPES = [(), (1,), (7,), (0, 3), (5, 3), (2, 3, 4, 5), (300, 450), (16384,), (16385,), (3, 1 << 20)]


def exact(grads):
    kind = torch.complex128 if grads[0].is_complex() else torch.float64
    return torch.stack([torch.stack([g.to(kind).norm().double(), g.to(kind).abs().sum()]) for g in grads]).T


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
)
def test_sums_equal_those_of_float64(dtype):
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator).to(dtype).cuda() for shape in SHAPES]
    torch.testing.assert_close(_gradient_norms.on_device(grads), exact(grads), rtol=1e-6, atol=0)
    if dtype.is_floating_point:
        assert _gradient_norms._kernel(grads[0].device, dtype) is not None
        torch.testing.assert_close(_gradient_norms.on_device(grads), exact(grads), rtol=1e-12, atol=0)


def test_addresses_that_are_not_aligned_and_layouts_that_are_not_contiguous():
    flat = torch.randn(100_001, device="cuda")
    views = [flat[1:50_000], flat[50_003:]]
    torch.testing.assert_close(_gradient_norms.on_device(views), exact(views), rtol=1e-12, atol=0)
    laid = [torch.randn(8, 16, 3, 3, device="cuda").to(memory_format=torch.channels_last), flat]
    torch.testing.assert_close(_gradient_norms.on_device(laid), exact(laid), rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e25])
def test_what_float32_cannot_square(size):
    grads = [torch.full((1000,), size, device="cuda")]
    torch.testing.assert_close(_gradient_norms.on_device(grads), exact(grads), rtol=1e-12, atol=0)
    odd = [
        torch.tensor([1.0, float("nan")], device="cuda"),
        torch.tensor([1.0, -float("inf")], device="cuda"),
    ]
    found = _gradient_norms.on_device(odd).cpu().numpy()
    assert np.isnan(found[:, 0]).all() and np.isinf(found[:, 1]).all()


def test_another_stream_reads_what_the_first_one_wrote():
    """The tables are made once a stream: a step on another stream must not read one that is still on its way."""
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(40)]).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(32, 64, device="cuda")
    rows = []
    with ss.watch(model, optimizer) as monitor:
        for k in range(6):
            with torch.cuda.stream(torch.cuda.Stream() if k % 2 else torch.cuda.current_stream()):
                torch.cuda.synchronize()
                optimizer.zero_grad(set_to_none=k % 3 > 0)
                model(x).square().mean().backward()
                rows.append(
                    [
                        (p.grad if p.grad is not None else p).detach().double().norm()
                        for p in model.parameters()
                    ]
                )
                optimizer.step()
                torch.cuda.synchronize()
    right = torch.tensor(rows).numpy()
    np.testing.assert_allclose(monitor.history.norm, right, rtol=1e-6)
