"""The plane's grid: its axes, its points, and the sheet of numbers that is filled in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from skipscope._errors import SkipscopeError
from skipscope._validation import is_integer
from skipscope.surfaces.evaluation._memory_limits import check_grid

Cell = tuple[int, ...]  # a point's place on the grid: (a, b), or (a,) on a line


def axes(
    grid: int | Sequence[int], span: object, directions: int | None, strength: bool = False
) -> tuple[np.ndarray, ...]:
    """One array of coefficients an axis.

    Args:
        grid: points an axis; a sequence of one is a line.
        span: half width; or one an axis; or (low, high) an axis.
        directions: how many axes there are, or None when the grid says it.
        strength: the first axis is a shortcut strength, from 0 to 1 where the span is one number.

    Raises:
        SkipscopeError: sizes or ranges that make no grid.
    """
    count = directions or (len(grid) if isinstance(grid, Sequence) else 2)
    sizes = tuple(grid) if isinstance(grid, Sequence) else (grid,) * count
    if len(sizes) != count or count not in {1, 2} or not all(map(is_integer, sizes)):
        raise SkipscopeError(
            "landscape",
            "this is no grid",
            expected=f"points an axis, for {count} axes: 51 or (51, 31); (51,) is a line",
            got=repr(grid),
        )
    check_grid(math.prod(map(int, sizes)), 1, usual=32)  # before the axes are made
    ranges = _ranges(span, [int(n) for n in sizes])
    if strength and not isinstance(span, Sequence | np.ndarray):
        ranges[0] = (0.0, 1.0)
    out = []
    for n, (low, high) in zip(sizes, ranges):
        steps = np.arange(int(n))
        if n == 1:
            at = np.array([(low + high) / 2])  # one point is the middle, not an end
        elif low == -high:  # built from the middle, so that the origin is exactly 0 and both halves mirror
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
            "this is no span",
            expected="1.0; or (1.0, 0.5); or ((-1.0, 1.0), (0.0, 2.0)), low before high",
            got=repr(span),
        )
    return ranges


def _range(span: Any) -> tuple[float, float]:
    low, high = span if isinstance(span, Sequence | np.ndarray) else (-float(span), span)
    return float(low), float(high)


class Sheet:
    """Named numbers on a grid, filled in point by point.

    Attributes:
        names: of the numbers.
        shape: of the grid.
        data: [names, points], NaN where nothing was computed.
        done: which points were computed, [points]; a computed NaN is done all the same.
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
    """Flat indices in units of ``size`` points that lie along the last axis, for moving there is cheapest."""
    length = shape[-1]
    starts = range(0, length, size) if size < length else (0,)
    return [
        np.arange(row * length + start, row * length + min(start + size, length))
        for row in range(int(np.prod(shape)) // length)
        for start in starts
    ]
