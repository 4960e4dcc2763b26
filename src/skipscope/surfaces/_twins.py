"""Twins on one plane: what is computed at each point, as named numbers, and how surfaces are made from them.

For each twin k: ``k/value``; with per-sample losses ``k/stderr``, ``k/centre_stderr`` and the folds of
the jackknife; each metric; and for a twin that shares the first one's weights ``k/difference_stderr``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from skipscope.surfaces._evaluate import Evaluator, Point
from skipscope.surfaces._grid import Sheet
from skipscope.surfaces._points import FOLDS, Reading, fold_sums, influence


@dataclass
class TwinOnPlane:
    """One twin, ready to be evaluated.

    Attributes:
        name: its key.
        evaluator: goes to points.
        origin: the reading at the origin.
        shared: its weights are the first twin's.
    """

    name: str
    evaluator: Evaluator
    origin: Reading
    shared: bool

    @property
    def has_samples(self) -> bool:
        """Whether standard errors can be had."""
        return influence(self.origin, self.evaluator.loss.sums) is not None


class Work:
    """What one point of the grid costs and gives: the numbers of every twin.

    Args:
        twins: the twins; differences are taken to the first.
        axes: the grid's axes.

    Attributes:
        names: the numbers' names, in order.
    """

    def __init__(self, twins: Sequence[TwinOnPlane], axes: tuple[np.ndarray, ...]):
        self.twins, self.axes = twins, axes
        self.shape = tuple(len(at) for at in axes)
        self.names = [name for twin in twins for name in self._names(twin)]

    def _names(self, twin: TwinOnPlane) -> list[str]:
        names = [f"{twin.name}/value", *(f"{twin.name}/metric/{m}" for m in twin.origin.metrics)]
        if twin.has_samples:
            names += [f"{twin.name}/stderr", f"{twin.name}/centre_stderr"]
        if fold_sums(twin.origin) is not None:
            names += [f"{twin.name}/fold/{g}" for g in range(FOLDS)]
        if twin.shared and twin.has_samples and twin is not self.twins[0]:
            names.append(f"{twin.name}/difference_stderr")
        return names

    def points(self, flat: np.ndarray) -> list[Point]:
        """Coefficients of flat grid indices."""
        places = np.unravel_index(flat, self.shape)
        return [tuple(float(at[i]) for at, i in zip(self.axes, place)) for place in zip(*places)]

    def __call__(self, flat: np.ndarray) -> np.ndarray:
        """The numbers at flat grid indices, [names, points]."""
        points, out = self.points(flat), []
        first: np.ndarray | None = None
        for twin in self.twins:
            reading = twin.evaluator(points)
            numbers, own = self._numbers(twin, reading)
            if twin is self.twins[0]:
                first = own
            elif twin.shared and own is not None and first is not None:
                numbers.append(_size(own - first))
            out += numbers
        return np.stack(out)

    def _numbers(self, twin: TwinOnPlane, reading: Reading) -> tuple[list[np.ndarray], np.ndarray | None]:
        numbers = [reading.values, *reading.metrics.values()]
        sums = twin.evaluator.loss.sums
        own, origin = influence(reading, sums), influence(twin.origin, sums)
        if own is not None and origin is not None:
            numbers += [_size(own), _size(own - origin)]
        folds = fold_sums(reading)
        if folds is not None:
            numbers += list(_without_each(*folds, sums).T)
        return numbers, own


def _size(influences: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        return np.sqrt(np.square(influences).sum(1))


def _without_each(numerators: np.ndarray, denominators: np.ndarray, sums: bool) -> np.ndarray:
    """The loss without each fold, [points, folds]."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        rest = numerators.sum(1, keepdims=True) - numerators
        if sums:
            return rest * FOLDS / (FOLDS - 1)
        return rest / (denominators.sum() - denominators)


def folds_of(sheet: Sheet, twin: TwinOnPlane) -> list[tuple[float, np.ndarray]] | None:
    """(centre, surface) without each group of samples in turn, or None."""
    folds = fold_sums(twin.origin)
    if folds is None:
        return None
    centres = _without_each(*folds, twin.evaluator.loss.sums)[0]
    return [(float(centres[g]), sheet[f"{twin.name}/fold/{g}"]) for g in range(FOLDS)]
