"""Triton kernels for the L2 norm and sum of |g| of many gradients, in two launches.

torch's fused norms read the gradients once for each statistic and return a tensor for each gradient; for 150
small gradients the host needs longer for that than the device for the numbers. This file is only imported if
Triton is installed, which comes with torch for accelerators.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

KINDS = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
_BLOCK = 1024
# Elements read by a program: few enough to spread the work, many enough to keep the number of pieces low.
_PIECE, _MOST_PIECES = 16 * _BLOCK, 32768


@triton.jit
def _sums_of_pieces(
    addresses,
    tensor_of,
    start_of,
    sizes,
    partial,
    pieces,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
):
    piece = tl.program_id(0)
    tensor = tl.load(tensor_of + piece)
    start = tl.load(start_of + piece)
    size = tl.load(sizes + tensor)
    values = tl.load(addresses + tensor).to(tl.pointer_type(KIND))
    squares = tl.zeros([BLOCK], tl.float64)
    absolutes = tl.zeros([BLOCK], tl.float64)
    for begin in range(start, tl.minimum(start + PIECE, size), BLOCK):
        at = begin + tl.arange(0, BLOCK)
        value = tl.load(values + at, mask=at < size, other=0.0).to(tl.float64)
        squares += value * value
        absolutes += tl.abs(value)
    tl.store(partial + piece, tl.sum(squares, axis=0))
    tl.store(partial + pieces + piece, tl.sum(absolutes, axis=0))


@triton.jit
def _sums_of_tensors(partial, first_piece, out, pieces, tensors, BLOCK: tl.constexpr):
    tensor = tl.program_id(0)
    first = tl.load(first_piece + tensor)
    last = tl.load(first_piece + tensor + 1)
    squares = tl.zeros([BLOCK], tl.float64)
    absolutes = tl.zeros([BLOCK], tl.float64)
    for begin in range(first, last, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        squares += tl.load(partial + at, mask=at < last, other=0.0)
        absolutes += tl.load(partial + pieces + at, mask=at < last, other=0.0)
    tl.store(out + tensor, tl.sqrt(tl.sum(squares, axis=0)))
    tl.store(out + tensors + tensor, tl.sum(absolutes, axis=0))


def norms_and_sums(grads: Sequence[Tensor]) -> Tensor:
    """L2 norms and sums of |g|, ``[2, n]`` on the gradients' device, both summed in float64.

    Args:
        grads: dense, contiguous gradients of one device and one dtype of :data:`KINDS`.
    """
    device, stream = grads[0].device, torch.cuda.current_stream(grads[0].device).cuda_stream
    layout = _layout(tuple(map(Tensor.numel, grads)), device, stream)
    addresses = _table(tuple(map(Tensor.data_ptr, grads)), device, stream)
    pieces, tensors = layout.pieces, len(grads)
    partial = torch.empty((2, pieces), dtype=torch.float64, device=device)
    out = torch.empty((2, tensors), dtype=torch.float64, device=device)
    with torch.cuda.device(device):
        if pieces:
            _sums_of_pieces[(pieces,)](  # type: ignore[index]
                addresses,
                layout.tensor_of,
                layout.start_of,
                layout.sizes,
                partial,
                pieces,
                PIECE=layout.piece,
                BLOCK=_BLOCK,
                KIND=KINDS[grads[0].dtype],
            )
        _sums_of_tensors[(tensors,)](  # type: ignore[index]
            partial, layout.first_piece, out, pieces, tensors, BLOCK=_BLOCK
        )
    return out


class _Layout:
    """Assignment of pieces to tensors, the same at every step."""

    def __init__(self, sizes: tuple[int, ...], device: torch.device, stream: int):
        self.piece = _PIECE
        while sum(sizes) > self.piece * _MOST_PIECES:
            self.piece *= 2
        counts = [-(-size // self.piece) for size in sizes]
        self.pieces = sum(counts)
        first, tensor_of, start_of = [0], [], []
        for tensor, count in enumerate(counts):
            tensor_of += [tensor] * count
            start_of += [k * self.piece for k in range(count)]
            first.append(len(tensor_of))
        self.tensor_of, self.start_of, self.first_piece, self.sizes = (
            _table(tuple(numbers), device, stream) for numbers in (tensor_of, start_of, first, sizes)
        )


@functools.lru_cache(maxsize=8)
def _layout(sizes: tuple[int, ...], device: torch.device, stream: int) -> _Layout:
    return _Layout(sizes, device, stream)


@functools.lru_cache(maxsize=32)
def _table(numbers: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """Copy integers to the device, cached.

    Gradients mostly have the addresses of an earlier step, and then nothing is copied.
    """
    host = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
