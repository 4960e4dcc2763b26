"""Check that the float64 vectors of a call fit into free memory, before they are allocated."""

from __future__ import annotations

from collections.abc import Callable

import torch

from skipscope._errors import SkipscopeError
from skipscope._free_memory import SHARE, free_bytes
from skipscope._progress import say


def require_vectors(
    operation: str,
    size: int,
    count: int,
    beside: int,
    device: torch.device,
    cure: Callable[[int], str | None],
) -> None:
    """Print the memory that vectors need, or refuse them if they do not fit.

    Args:
        operation: public call named in the error.
        size: length of a vector.
        count: number of vectors to keep.
        beside: number of further vectors at the peak.
        device: device of the vectors.
        cure: returns the error's cure for a number of vectors that fit, or None if too few fit.

    Raises:
        SkipscopeError: the vectors need more than the usable share of the free memory.
    """
    row = 8 * size
    needed, free = (count + beside) * row, SHARE * free_bytes(device)
    if needed > free:
        raise SkipscopeError(
            operation,
            f"{count} vectors of the parameters' size do not fit into memory",
            expected=f"{needed / 2**30:.2f} GiB for {size:,} parameters in float64",
            got=f"{free / 2**30:.2f} GiB that may be used on {device}",
            cure=cure(int(free / row) - beside) or "fewer parameters: parameters=[...]",
        )
    say(f"{operation}: {count} vectors, at most {needed / 2**30:.2g} GiB")
