"""L2 norm and sum of |g| of many gradients in one pass.

On the host each tensor is read in pieces that fit into the cache, by the BLAS functions ``dot`` (or the
slower ``nrm2`` if squares would overflow or underflow) and ``asum``. This is faster and more accurate than
torch's reductions. On an accelerator a Triton kernel runs, or torch's fused reductions if it cannot, and the
numbers are copied to the host asynchronously.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipscope._torch_private import norms_of

# 256 kB of float32: fits into the second-level cache, and BLAS still runs in the calling thread.
_PIECE = 65536
# Sums of squares from here to its inverse are exact enough in float32; NaN is outside of the range.
_SAFE = 1e-25
_BLAS_HAS = (torch.float32, torch.float64)


@functools.cache
def _blas(dtype: np.dtype) -> Any:
    """The BLAS functions ``dot``, ``nrm2`` and ``asum``, or slower NumPy versions without SciPy."""
    try:
        from scipy.linalg.blas import get_blas_funcs
    except ImportError:
        return _dot, _nrm2, _asum
    return get_blas_funcs(("dot", "nrm2", "asum"), dtype=dtype)


def _dot(x: np.ndarray, y: np.ndarray, n: int | None = None, start: int = 0, *_: int) -> float:
    n = x.size if n is None else n
    return float(np.dot(x[start : start + n], y[start : start + n]))


def _nrm2(x: np.ndarray, n: int | None = None, start: int = 0) -> float:
    values = np.abs(x[start : start + (x.size if n is None else n)])
    largest = float(values.max())
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * math.sqrt(float(np.square(values / largest, dtype=np.float64).sum()))


def _asum(x: np.ndarray, n: int | None = None, start: int = 0) -> float:
    return float(np.abs(x[start : start + (x.size if n is None else n)]).sum())


def plain(grad: Tensor) -> Tensor:
    """This rank's part of a gradient as a plain tensor: values of a sparse tensor, shard of a DTensor."""
    if type(grad) is not Tensor and hasattr(grad, "to_local"):
        grad = grad.to_local()  # type: ignore[operator]
    return grad.coalesce().values() if grad.is_sparse else grad


def on_host(grads: Sequence[Tensor]) -> np.ndarray:
    """L2 norm and sum of |g| of each plain gradient on the CPU, ``[2, n]``, in float32 or better."""
    return np.array([one_on_host(grad) for grad in grads]).T.reshape(2, len(grads))


def one_on_host(grad: Tensor) -> tuple[float, float]:
    """L2 norm and sum of |g| of a plain gradient on the CPU."""
    if grad.dtype not in _BLAS_HAS:
        grad = grad.abs() if grad.is_complex() else grad.float()
    if grad.ndim == 4 and not grad.is_contiguous():
        grad = grad.permute(0, 2, 3, 1)  # channels last is dense in this order
    values = (grad.detach() if grad.requires_grad else grad).numpy().reshape(-1)
    dot, nrm2, asum = _blas(values.dtype)
    n = values.size
    if n <= _PIECE:
        if n == 0:
            return 0.0, 0.0
        square = dot(values, values)
        return (math.sqrt(square) if _SAFE < square < 1 / _SAFE else nrm2(values)), asum(values)
    norms, total = [], 0.0
    for start in range(0, n, _PIECE):
        m = min(_PIECE, n - start)
        square = dot(values, values, m, start, 1, start)
        norms.append(math.sqrt(square) if _SAFE < square < 1 / _SAFE else nrm2(values, m, start))
        total += asum(values, m, start)
    return nrm2_of(norms), total


def nrm2_of(norms: Sequence[float] | np.ndarray) -> float:
    """Norm of a whole from the norms of its parts, without overflow."""
    return math.hypot(*norms)


def on_device(grads: Sequence[Tensor], wide: bool = False) -> Tensor:
    """L2 norms and sums of |g|, ``[2, n]`` float64 on the gradients' device, without synchronisation.

    Args:
        grads: plain gradients on one device.
        wide: whether to sum squares in float64 if the Triton kernel, which always does, cannot run; slower,
            for gradients whose squares float32 cannot hold.
    """
    if len({grad.dtype for grad in grads}) > 1:  # the kernels want one dtype
        columns: list[Any] = [None] * len(grads)
        for kind in {grad.dtype for grad in grads}:
            places = [i for i, grad in enumerate(grads) if grad.dtype == kind]
            for i, column in zip(places, on_device([grads[i] for i in places], wide).unbind(1)):
                columns[i] = column
        return torch.stack(columns, dim=1)
    if grads[0].is_complex():
        grads = [grad.abs() for grad in grads]
    kernel = _kernel(grads[0].device, grads[0].dtype) if grads[0].is_cuda else None
    if kernel is not None and all(map(Tensor.is_contiguous, grads)):
        return kernel(grads)
    # Norms of half-precision gradients would be computed in half precision, and overflow.
    kind = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    sums = torch.stack(norms_of(grads, 1, kind))
    if wide:
        norms = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads])
    else:
        norms = torch.stack(norms_of(grads, 2, kind))
    return torch.stack([norms.double(), sums.double()])


@functools.cache
def _kernel(device: torch.device, dtype: torch.dtype) -> Callable[[Sequence[Tensor]], Tensor] | None:
    """The Triton kernel, after a test on this device, or None if it is not available."""
    try:
        from skipscope.monitor.recording._kernels import norms_and_sums

        ramp = (
            torch.arange(40000, device=device).remainder(128).to(dtype)
        )  # more than two pieces; exact in half precision
        found = norms_and_sums([-ramp, ramp[:3]]).cpu()
        right = torch.stack(
            [torch.stack([v.norm(), v.sum()]) for v in (ramp.cpu().double(), ramp[:3].cpu().double())]
        )
        return norms_and_sums if torch.allclose(found.T, right, rtol=1e-12) else None
    except Exception:  # no Triton, a dtype that it does not take, or no compiler beside it
        return None


class Reading:
    """Asynchronous copy of numbers from an accelerator to pinned host memory.

    :meth:`ready` does not wait for the copy, :meth:`array` does.
    """

    def __init__(self, numbers: Tensor):
        self._event = None
        if numbers.is_cuda:
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(numbers.device))
        else:
            self._host = numbers.cpu()

    def ready(self) -> bool:
        """Whether the numbers have arrived."""
        return self._event is None or self._event.query()

    def array(self) -> np.ndarray:
        """The numbers, after waiting for them if necessary."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()
