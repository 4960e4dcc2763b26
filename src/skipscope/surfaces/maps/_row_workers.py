"""Worker pool for the rows of a map: forked copies of this process, one thread each.

The products of small networks are too short to gain from more threads, and rows are independent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from skipscope.curvature import CurvatureOperator
from skipscope.surfaces.evaluation._memory_limits import fits
from skipscope.surfaces.evaluation._process_pool import CAN_FORK, Forked, Lost, measured_in_a_copy
from skipscope.surfaces.grids._grid_runner import Remote

# Approximate number of float64 vectors of a solve.
_BASIS = 100


@contextmanager
def rows_side_by_side(
    work: Callable[[np.ndarray], np.ndarray], operator: CurvatureOperator, rows: int, points: int
) -> Iterator[Remote | None]:
    """Context with a function that computes rows in copies of this process, or None if that does not pay.

    Args:
        work: flat indices of a row -> its values.
        operator: the matrix, whose products dominate the time.
        rows: number of rows.
        points: points per row.
    """
    cores, copies = torch.get_num_threads(), None
    if CAN_FORK and 1 < cores <= rows and operator.device.type == "cpu":
        copies = _copies(work, operator, cores, points)
    try:
        yield (
            None if copies is None else lambda units: ((units[i], found) for i, found in copies.surely(units))
        )
    finally:
        if copies is not None:
            copies.close()


def _copies(
    work: Callable[[np.ndarray], np.ndarray], operator: CurvatureOperator, cores: int, points: int
) -> Forked[np.ndarray, np.ndarray] | None:
    vector = torch.zeros(1, operator.shape[0], dtype=torch.float64)
    began = time.perf_counter()
    operator.apply(vector)
    seconds = time.perf_counter() - began
    try:
        needed, *_ = measured_in_a_copy(
            lambda _: float(operator.apply(vector).sum()), 0, 10 + 100 * cores * seconds
        )
    except Lost:
        # For instance, autograd cannot run in a copy once a GPU has been used.
        return None
    if not fits(cores * (needed + _BASIS * vector.numel() * vector.element_size())):
        return None
    # The timeout assumes at most hundreds of products at every point.
    return Forked(work, cores, 600 + 1000 * cores * seconds * points)
