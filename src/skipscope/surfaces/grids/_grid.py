"""The plane's grid: its axes, its points, and the values at each point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from skipscope._errors import SkipscopeError
from skipscope._validation import is_integer
from skipscope.surfaces.evaluation._memory_limits import check_grid

# Index of a grid point: (a, b), or (a,) on a line.
Cell = tuple[int, ...]


def axes(
    grid: int | Sequence[int], span: object, directions: int | None, strength: bool = False
) -> tuple[np.ndarray, ...]:
    """One array of coefficients per axis.

    Args:
        grid: points per axis; a sequence of length 1 is a line.
        span: half width; or one per axis; or (low, high) per axis.
        directions: number of axes, or None if the grid determines it.
        strength: whether the first axis is a shortcut strength, from 0 to 1 if the span is one number.

    Raises:
        SkipscopeError: the sizes or ranges are invalid.
    """
    count = directions or (len(grid) if isinstance(grid, Sequence) else 2)
    sizes = tuple(grid) if isinstance(grid, Sequence) else (grid,) * count
    if len(sizes) != count or count not in {1, 2} or not all(map(is_integer, sizes)):
        raise SkipscopeError(
            "landscape",
            "this is not a grid",
            expected=f"points an axis, for {count} axes: 51 or (51, 31); (51,) is a line",
            got=repr(grid),
        )
    # Before the axes are allocated.
    check_grid(math.prod(map(int, sizes)), 1, usual=32)
    ranges = _ranges(span, [int(n) for n in sizes])
    if strength and not isinstance(span, Sequence | np.ndarray):
        ranges[0] = (0.0, 1.0)
    out = []
    for n, (low, high) in zip(sizes, ranges):
        steps = np.arange(int(n))
        if n == 1:
            at = np.array([(low + high) / 2])
        # Built from the middle, so that the origin is exactly 0 and both halves mirror.
        elif low == -high:
            at = high * (2 * steps - (n - 1)) / (n - 1)
        else:
            at = np.linspace(low, high, int(n))
        out.append(np.where(np.abs(at) < 1e-12 * max(abs(low), abs(high)), 0.0, at))
    return tuple(out)


def _ranges(span: object, sizes: Sequence[int]) -> list[tuple[float, float]]:
    try:
        each = list(span) if isinstance(span, Sequence | np.ndarray) else [span] * len(sizes)
        ranges = [_range(s) for s in each]
    except (TypeError, ValueError):
        ranges = []
    if len(ranges) != len(sizes) or not all(
        np.isfinite(r).all() and (r[0] < r[1] or (n == 1 and r[0] == r[1])) for r, n in zip(ranges, sizes)
    ):
        raise SkipscopeError(
            "landscape",
            "this is not a span",
            expected="1.0; or (1.0, 0.5); or ((-1.0, 1.0), (0.0, 2.0)), low before high",
            got=repr(span),
        )
    return ranges


def _range(span: Any) -> tuple[float, float]:
    low, high = span if isinstance(span, Sequence | np.ndarray) else (-float(span), span)
    return float(low), float(high)


class Sheet:
    """Named values on a grid, filled in point by point.

    Attributes:
        names: names of the values.
        shape: shape of the grid.
        data: values [names, points], NaN at points that are not computed.
        done: which points are computed, [points]; also True for a computed NaN.
    """

    def __init__(self, names: Sequence[str], shape: tuple[int, ...]):
        self.names, self.shape = tuple(names), shape
        self.data = np.full((len(self.names), int(np.prod(shape))), np.nan)
        self.done = np.zeros(self.data.shape[1], dtype=bool)

    def put(self, points: np.ndarray, numbers: np.ndarray) -> None:
        """Fill in ``numbers`` [names, len(points)] at flat indices."""
        self.data[:, points] = numbers
        self.done[points] = True

    def __getitem__(self, name: str) -> np.ndarray:
        return self.data[self.names.index(name)].reshape(self.shape)

    def __contains__(self, name: str) -> bool:
        return name in self.names


def rows(shape: tuple[int, ...], size: int) -> list[np.ndarray]:
    """Flat indices in units of ``size`` points along the last axis, where moving is cheapest."""
    length = shape[-1]
    starts = range(0, length, size) if size < length else (0,)
    return [
        np.arange(row * length + start, row * length + min(start + size, length))
        for row in range(int(np.prod(shape)) // length)
        for start in starts
    ]
