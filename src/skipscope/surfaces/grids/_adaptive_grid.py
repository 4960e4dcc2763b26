"""Adaptive grid: coarse first, refined where needed, interpolated elsewhere, with a check of the errors.

Levels are nested: each halves the gaps of the one before. A cell is tested by computing its centre and
comparing it with a spline through the level's points, which has not seen it. If the test fails, the cell and
its neighbours are computed at the next level; if it passes, the spline's values are kept and marked as not
computed. At the end, points drawn at random are computed and compared with the interpolated values. Around
each point that fails, the area is computed, and twice as many points are drawn. A chaotic surface fails
everywhere and ends as the full grid.

The largest error of n random points bounds most, but not all, of the other errors; :func:`beyond` bounds the
share of exceptions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from skipscope.surfaces.grids._grid import Sheet

# Points per axis at the first level. Bisection of any grid keeps its middle.
_COARSE = 5
# Held-out points of the first draw.
_DRAW = 24
# Probability that the bound on the share of larger errors does not hold.
_DOUBT = 0.05


class Adaptive:
    """Fill a grid to a tolerance.

    Args:
        sheet: the grid to fill.
        axes: the grid's two axes.
        compute: computes points at flat indices into the sheet.
        fields: names of the values that must meet the tolerance, each with its standard error's name or None.
        tolerance: largest error as a share of each value's range over the surface; a larger standard error
            replaces it.
        after_level: called after a level's points are computed and its spline is tested on unseen points: the
            sheet then holds a whole surface, and ``errors``, ``level`` and ``held_out`` are that level's.

    Attributes:
        level: rows and columns of the last level, whose points the splines pass through.
        held_out: number of points in the final random draw, which passed; after a level, number of points it
            was tested on.
        beyond: upper 95 % bound on the share of interpolated points that are further off than ``errors``.
    """

    def __init__(
        self,
        sheet: Sheet,
        axes: Sequence[np.ndarray],
        compute: Callable[[np.ndarray], None],
        fields: Sequence[tuple[str, str | None]],
        tolerance: float,
        after_level: Callable[[], object] | None = None,
    ):
        self.sheet, self.axes, self.compute = sheet, axes, compute
        self.fields, self.tolerance = fields, tolerance
        self.after_level = after_level
        self.shape = sheet.shape
        self.errors = dict.fromkeys((value for value, _ in fields), 0.0)
        # Which values are interpolated in their logarithm, decided at each level.
        self._in_logarithm: dict[str, bool] = {}
        self.level: tuple[np.ndarray, np.ndarray] = np.arange(self.shape[0]), np.arange(self.shape[1])
        self.held_out, self.beyond = 0, 0.0

    def run(self) -> dict[str, float]:
        """Fill the sheet. Returns the largest error on held-out points, for each field."""
        levels = [_levels(n) for n in self.shape]
        rows, columns = levels[0][0], levels[1][0]
        self.compute(self._flat(*np.meshgrid(rows, columns, indexing="ij")))
        active = {(i, j) for i in range(len(rows) - 1) for j in range(len(columns) - 1)}
        for depth in range(1, max(len(axis) for axis in levels)):
            if not active:
                break
            finer = levels[0][min(depth, len(levels[0]) - 1)], levels[1][min(depth, len(levels[1]) - 1)]
            active = self._refine((rows, columns), finer, active)
            rows, columns = finer
        self.level = rows, columns
        self._interpolate(self.level, np.arange(self.sheet.done.size))
        return self._verify(self.level)

    def _flat(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return np.ravel_multi_index((rows.ravel(), columns.ravel()), self.shape)

    # --- one level ---

    def _refine(
        self,
        old: tuple[np.ndarray, np.ndarray],
        new: tuple[np.ndarray, np.ndarray],
        active: set[tuple[int, int]],
    ) -> set[tuple[int, int]]:
        """Test the active cells of ``old``, and compute the points of ``new`` in and around the failing ones.

        Returns:
            The active cells of the next level.
        """
        cells = sorted(active)
        centres = np.array([[_middle(old[axis], cell[axis]) for axis in (0, 1)] for cell in cells])
        centre_points = self._flat(centres[:, 0], centres[:, 1])
        straight, logarithm = (
            {name: self._spline(name, old, centre_points, log) for name, _ in self.fields}
            for log in (False, True)
        )
        self.compute(centre_points)
        predicted = self._better(straight, logarithm, centre_points)
        if self.after_level is not None:
            self._report_level(old, predicted, centre_points, self.after_level)
        failing = [cell for cell, bad in zip(cells, self._fails(predicted, centre_points)) if bad]
        around = {(i + di, j + dj) for i, j in failing for di in (-1, 0, 1) for dj in (-1, 0, 1)}
        around = {
            cell for cell in around if cell[0] in range(len(old[0]) - 1) and cell[1] in range(len(old[1]) - 1)
        }
        inside = [
            np.ix_(*(_between(new[a], old[a][c[a]], old[a][c[a] + 1]) for a in (0, 1)))
            for c in sorted(around)
        ]
        if inside:
            self.compute(
                np.unique(np.concatenate([self._flat(*np.broadcast_arrays(*box)) for box in inside]))
            )
        self._interpolate(old, self._flat(*np.meshgrid(*new, indexing="ij")))
        return {
            (i, j)
            for c in around
            for i in _cells_between(new[0], old[0][c[0]], old[0][c[0] + 1])
            for j in _cells_between(new[1], old[1][c[1]], old[1][c[1] + 1])
        }

    def _report_level(
        self,
        level: tuple[np.ndarray, np.ndarray],
        predicted: dict[str, np.ndarray],
        points: np.ndarray,
        after_level: Callable[[], object],
    ) -> None:
        for name, _ in self.fields:
            value = self.sheet.data[self.sheet.names.index(name), points]
            self.errors[name] = float(self._error(predicted[name], value).max())
        self.level, self.held_out = level, len(points)
        # Restored below: the callback must not change what the next level starts from.
        before = self.sheet.data.copy()
        self._interpolate(level, np.arange(self.sheet.done.size))
        after_level()
        self.sheet.data[:] = before

    def _fails(self, predicted: dict[str, np.ndarray], points: np.ndarray) -> np.ndarray:
        bad = np.zeros(len(points), dtype=bool)
        for name, error_name in self.fields:
            value = self.sheet.data[self.sheet.names.index(name), points]
            bad |= ~(self._error(predicted[name], value) <= self._allowed(name, error_name, points))
        return bad

    @staticmethod
    def _error(predicted: np.ndarray, value: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return np.where(np.isfinite(value), np.abs(predicted - value), np.inf)

    def _allowed(self, name: str, error_name: str | None, points: np.ndarray) -> np.ndarray:
        allowed = np.full(len(points), self.tolerance * self._range(name))
        if error_name is not None:
            error = self.sheet.data[self.sheet.names.index(error_name), points]
            allowed = np.fmax(allowed, error)
        return allowed

    def _range(self, name: str) -> float:
        values = self.sheet[name].ravel()[self.sheet.done]
        values = values[np.isfinite(values)]
        return float(np.ptp(values)) if values.size else 0.0

    # --- interpolation ---

    def _interpolate(self, level: tuple[np.ndarray, np.ndarray], points: np.ndarray) -> None:
        """Set every point that is not computed to the spline's value, for all values of the sheet."""
        points = points[~self.sheet.done[points]]
        if len(points):
            for k, name in enumerate(self.sheet.names):
                values = self._spline(name, level, points)
                computed = self.sheet.data[k, self.sheet.done]
                # A loss, error or share that is nowhere negative is not negative between two points
                # either: a dip below all computed values is an artefact of the spline. A metric (an
                # accuracy) is also limited from above.
                lowest = np.nanmin(computed, initial=np.inf)
                values = np.fmax(values, lowest) if lowest >= 0 else values
                metric = "/metric/" in name and np.isfinite(computed).any()
                highest = np.max(computed[np.isfinite(computed)]) if metric else np.inf
                self.sheet.data[k, points] = np.minimum(values, highest)

    def _better(
        self, straight: dict[str, np.ndarray], logarithm: dict[str, np.ndarray], points: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Select the better of two predictions for each value; the choice also applies to later splines."""
        chosen = {}
        for name, _ in self.fields:
            value = self.sheet.data[self.sheet.names.index(name), points]
            value = np.where(np.isfinite(value), value, np.nan)
            off = [np.nanmax(np.abs(guess[name] - value), initial=0.0) for guess in (straight, logarithm)]
            self._in_logarithm[name] = bool(off[1] < off[0])
            chosen[name] = (logarithm if self._in_logarithm[name] else straight)[name]
        return chosen

    def _spline(
        self, name: str, level: tuple[np.ndarray, np.ndarray], points: np.ndarray, log: bool | None = None
    ) -> np.ndarray:
        from scipy.interpolate import RectBivariateSpline

        rows, columns = level
        values = _finite_filled(self.sheet[name][np.ix_(rows, columns)])
        # Losses that span decades are often smoother in their logarithm, and interpolate to positive values.
        # A value's folds and errors are interpolated like the value itself.
        if log is None:
            log = any(
                chosen and name.startswith(v.removesuffix("value"))
                for v, chosen in self._in_logarithm.items()
            )
        log = log and bool(values.min() > 0)
        degrees = [min(3, len(axis) - 1) for axis in level]
        fit = RectBivariateSpline(
            self.axes[0][rows],
            self.axes[1][columns],
            np.log(values) if log else values,
            kx=degrees[0],
            ky=degrees[1],
        )
        i, j = np.unravel_index(points, self.shape)
        with np.errstate(over="ignore"):
            out = fit.ev(self.axes[0][i], self.axes[1][j])
            return np.exp(out) if log else out

    # --- the end ---

    def _verify(self, level: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
        """Compare interpolated points, drawn at random, with computed values until a whole draw passes."""
        generator, draws, size = np.random.default_rng(0), 0, _DRAW
        gap = [int(np.max(np.diff(axis), initial=1)) for axis in level]
        while (left := np.flatnonzero(~self.sheet.done)).size:
            drawn = np.sort(generator.choice(left, min(size, left.size), replace=False))
            draws, size = draws + 1, 2 * size
            guessed = {
                name: self.sheet.data[self.sheet.names.index(name), drawn].copy() for name, _ in self.fields
            }
            self.compute(drawn)
            for name, _ in self.fields:
                value = self.sheet.data[self.sheet.names.index(name), drawn]
                self.errors[name] = float(self._error(guessed[name], value).max())
            bad = drawn[self._fails(guessed, drawn)]
            if not bad.size:
                self.held_out, self.beyond = len(drawn), beyond(len(drawn), left.size, draws)
                return self.errors
            i, j = np.unravel_index(bad, self.shape)
            near = [
                np.ix_(
                    *(np.arange(max(0, p - g), min(n, p + g + 1)) for p, g, n in zip(place, gap, self.shape))
                )
                for place in zip(i, j)
            ]
            self.compute(np.unique(np.concatenate([self._flat(*np.broadcast_arrays(*box)) for box in near])))
        return dict.fromkeys(self.errors, 0.0)


def beyond(drawn: int, left: int, draws: int = 1) -> float:
    """Upper 95 % bound on the share of points not drawn whose error exceeds the largest of those drawn.

    If K of all ``left`` points were further off, a draw without replacement would miss them all with
    probability C(left - K, drawn) / C(left, drawn); the bound is the largest K for which that is 5 % or more.
    The last of several draws passed, so that they share the 5 %.

    Example:
        >>> round(beyond(24, 2500), 3), round(beyond(59, 2500), 3), beyond(24, 24)
        (0.118, 0.05, 0.0)
    """
    if drawn >= left:
        return 0.0
    further = np.arange(left - drawn + 1)
    missed = np.cumprod([1.0, *(1 - drawn / (left - further[:-1]))])
    return float(further[missed >= _DOUBT / draws].max() / (left - drawn))


def _levels(n: int) -> list[np.ndarray]:
    """Nested index sets from coarse to all points, by halving gaps; each contains the middle point."""
    last = n - 1
    levels = [np.unique([0, last // 2, last])]
    while len(levels[-1]) < n:
        level = levels[-1]
        levels.append(np.unique(np.concatenate([level, (level[:-1] + level[1:]) // 2])))
    start = next((k for k, level in enumerate(levels) if len(level) >= _COARSE), len(levels) - 1)
    return levels[start:]


def _middle(axis: np.ndarray, i: int) -> int:
    return int(axis[i] + axis[i + 1]) // 2


def _between(axis: np.ndarray, low: int, high: int) -> np.ndarray:
    return axis[(axis >= low) & (axis <= high)]


def _cells_between(axis: np.ndarray, low: int, high: int) -> range:
    return range(int(np.searchsorted(axis, low)), int(np.searchsorted(axis, high)))


def _finite_filled(values: np.ndarray) -> np.ndarray:
    """Replace non-finite values by the nearest finite value for a fit (their cells fail the test anyway)."""
    finite = np.isfinite(values)
    if finite.all():
        return values
    if not finite.any():
        return np.zeros_like(values)
    from scipy.ndimage import distance_transform_edt

    nearest = distance_transform_edt(~finite, return_distances=False, return_indices=True)
    return values[tuple(np.asarray(nearest))]
