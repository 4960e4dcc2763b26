"""L2 norm and sum of |g| of many gradients in one read: the default statistics, and what they cost.

On the host each tensor is read in pieces that stay in the cache, once by BLAS's ``dot`` (by its slower
``nrm2`` where squares would overflow or underflow) and once by ``asum``; that is faster than torch's own
reductions, and more accurate. On an accelerator a kernel of our own runs (torch's fused reductions where it
cannot), and the numbers travel to the host without anyone waiting.
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

# 256 kB of float32: fits the second-level cache, and BLAS still runs it in the calling thread.
_PIECE = 65536
# Sums of squares inside this range have lost nothing to float32's; NaN is outside too.
_SAFE = 1e-25
_BLAS_HAS = (torch.float32, torch.float64)


@functools.cache
def _blas(dtype: np.dtype) -> Any:
    """BLAS's ``dot``, ``nrm2`` and ``asum``; without SciPy the same by NumPy, slower."""
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
    """This rank's part of a gradient as a plain tensor: sparse values, a DTensor's local shard."""
    if type(grad) is not Tensor and hasattr(grad, "to_local"):
        grad = grad.to_local()  # type: ignore[operator]
    return grad.coalesce().values() if grad.is_sparse else grad


def on_host(grads: Sequence[Tensor]) -> np.ndarray:
    """L2 norm and sum of |g| of each plain gradient on the CPU, ``[2, n]``, in float32 or better."""
    return np.array([one_on_host(grad) for grad in grads]).T.reshape(2, len(grads))


def one_on_host(grad: Tensor) -> tuple[float, float]:
    """(L2 norm, sum of |g|) of one plain gradient on the CPU."""
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
    """The norm of the whole from the norms of its parts, without overflow."""
    return math.hypot(*norms)


def on_device(grads: Sequence[Tensor], wide: bool = False) -> Tensor:
    """``[2, n]`` float64 on the gradients' device: L2 norms, sums of |g|. Nothing waits for the device.

    Args:
        grads: plain gradients of one device.
        wide: sum squares in float64 where our own kernel, which always does, cannot run: slower, for
            gradients whose squares float32 cannot hold.
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
    # half-precision norms come back in half precision, and overflow: ask for single
    kind = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    sums = torch.stack(norms_of(grads, 1, kind))
    if wide:
        norms = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads])
    else:
        norms = torch.stack(norms_of(grads, 2, kind))
    return torch.stack([norms.double(), sums.double()])


@functools.cache
def _kernel(device: torch.device, dtype: torch.dtype) -> Callable[[Sequence[Tensor]], Tensor] | None:
    """Our own kernel, once it has been seen to be right on this device; None where it cannot be had."""
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
    """Numbers on their way from an accelerator to the host.

    The copy goes to pinned memory and is not waited for; :meth:`ready` asks, :meth:`array` waits.
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
        """The numbers; waits for them if it must."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()
