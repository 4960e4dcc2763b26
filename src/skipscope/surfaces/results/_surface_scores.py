"""Scores of a surface with standard errors, and a label if the network has not learnt.

Every score is a function of the values alone. Its standard error is a delete-a-group jackknife over samples:
the surface without each tenth of the samples in turn, sqrt((G-1)/G * sum (s_g - mean s)^2). The level for the
width is recomputed each time, so that the width's error includes the level's. A 95 % interval is Student's
with G - 1 degrees of freedom. Two errors that a jackknife does not see are added:

- If values were interpolated, a score is off by about its difference to the coarser grid that the splines
  pass through (on trained networks 0.04 to 0.09 of the convexity share).
- If over a third of a surface curves less than its own standard error, the signs there are noise that
  neighbours share, and noise makes curvature look negative. The error of the convexity share is then at
  least half of that part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from skipscope.surfaces.results._score_result import Scores

# Share of a surface that may curve less than its error before the signs count as shared noise.
_MANY = 1 / 3
# Height above the level, relative to it, of other regions and of points that are not finite.
_FAR = 1e12
# A surface whose middle 90 % spans less than this share of its median is flat.
_FLAT = 0.1


def convexity_share(values: np.ndarray, alphas: np.ndarray, betas: np.ndarray) -> float:
    """Share of the interior where the discrete Hessian (second differences) has no negative eigenvalue.

    The smallest eigenvalue is interpolated linearly on triangles between points, as the surface is for
    :func:`width`: whole rows of points may change sign together, and a count would jump. Values that are not
    finite are ignored.
    """
    smallest = _smallest_curvature(values, alphas, betas)
    steps = [np.min(np.diff(axis)) for axis in (alphas, betas)[: values.ndim] if len(axis) > 1]
    # Rounding in the values must not count as curvature.
    slack = 1e-9 * _size(values) / min(steps) ** 2 if steps else 0.0
    smallest = np.where(np.isfinite(smallest), smallest + slack, np.nan)
    if min(smallest.shape) > 1:
        share = _share_above(smallest[:-1], smallest[1:]) if values.ndim == 1 else _share_of_squares(smallest)
        if np.isfinite(share).any():
            return float(np.nanmean(share))
    smallest = smallest[np.isfinite(smallest)]
    return float(np.mean(smallest >= 0)) if smallest.size else float("nan")


def _smallest_curvature(values: np.ndarray, alphas: np.ndarray, betas: np.ndarray) -> np.ndarray:
    """Smaller eigenvalue of the second differences at interior points, [a - 2, b - 2] (on a line [a - 2])."""
    if min(values.shape) < 3:
        return np.zeros(0)
    with np.errstate(invalid="ignore", over="ignore"):
        if values.ndim == 1:
            return _second(values, alphas, 0)
        a = _second(values, alphas, 0)[:, 1:-1]
        b = _second(values, betas, 1)[1:-1, :]
        step_a, step_b = alphas[2:] - alphas[:-2], betas[2:] - betas[:-2]
        c = values[2:, 2:] - values[2:, :-2] - values[:-2, 2:] + values[:-2, :-2]
        c = c / step_a[:, None] / step_b[None, :]
        return (a + b) / 2 - np.hypot((a - b) / 2, c)


def _second(values: np.ndarray, at: np.ndarray, axis: int) -> np.ndarray:
    v, x = np.moveaxis(values, axis, 0), at.reshape(-1, *[1] * (values.ndim - 1))
    left, right = x[1:-1] - x[:-2], x[2:] - x[1:-1]
    return np.moveaxis(2 * ((v[2:] - v[1:-1]) / right - (v[1:-1] - v[:-2]) / left) / (left + right), 0, axis)


def roughness(values: np.ndarray) -> float:
    """Share of the total variation, along rows and columns, beyond that of a single valley.

    A line with ends e, f and minimum m has the variation (e - m) + (f - m) if it is a single valley; any
    further variation is roughness.
    """
    moved = needed = 0.0
    for lines in (values,) if values.ndim == 1 else (values, values.T):
        for line in np.atleast_2d(lines):
            line = line[np.isfinite(line)]
            if line.size > 2:
                moved += float(np.abs(np.diff(line)).sum())
                needed += float(line[0] + line[-1] - 2 * line.min())
    return max(0.0, 1 - needed / moved) if moved > 1e-12 * _size(values) else 0.0


def barrier(values: np.ndarray) -> float:
    """Highest rise out of any valley but the deepest, on the best path to a deeper valley.

    Zero-dimensional persistence: points are flooded from the lowest up. Where two valleys meet, the shallower
    ends, and its depth below the meeting point is the rise. Each point has eight neighbours.
    """
    flat = np.where(np.isfinite(values), values, np.inf).reshape(values.shape[0], -1)
    rows, columns = flat.shape
    if _valleys(flat) < 2:
        return 0.0
    order = np.argsort(flat, axis=None, kind="stable")
    parent = np.full(flat.size, -1)
    bottom, level, highest = np.full(flat.size, np.inf), flat.ravel(), 0.0

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i in order:
        if not np.isfinite(level[i]):
            break
        parent[i], bottom[i] = i, level[i]
        r, c = divmod(int(i), columns)
        for rr in range(max(0, r - 1), min(rows, r + 2)):
            for cc in range(max(0, c - 1), min(columns, c + 2)):
                j = rr * columns + cc
                if parent[j] >= 0 and (x := root(j)) != (y := root(int(i))):
                    deep, shallow = (x, y) if bottom[x] <= bottom[y] else (y, x)
                    highest = max(highest, float(level[i] - bottom[shallow]))
                    parent[shallow] = deep
    return highest


def _valleys(flat: np.ndarray) -> int:
    """Number of points without a deeper neighbour (at least the number of valleys)."""
    around = np.pad(flat, 1, constant_values=np.inf)
    rows, columns = flat.shape
    lowest = np.ones(flat.shape, dtype=bool)
    for i, j in np.ndindex(3, 3):
        lowest &= flat <= around[i : i + rows, j : j + columns]
    return int((lowest & np.isfinite(flat)).sum())


def width(
    values: np.ndarray, alphas: np.ndarray, betas: np.ndarray, level: float, at: Sequence[float] = (0.0, 0.0)
) -> tuple[float, bool]:
    """Radius of the region around the origin (``at``) below ``level``, and whether it reaches the edge.

    For a plane, the radius of the disc with the region's area; for a line, half its length. The surface is
    interpolated linearly on triangles between grid points, so that the width changes smoothly with the values
    and has an error. NaN if the origin is not below the level.
    """
    below = np.nan_to_num(values, nan=np.inf) <= level
    origin = tuple(int(np.argmin(np.abs(axis - c))) for axis, c in zip((alphas, betas)[: values.ndim], at))
    if not below[origin]:
        return float("nan"), False
    region = joined_to(origin, below)
    # Other regions below the level do not belong to this region, so its triangles see them as very high.
    depth = np.where(region | ~below & np.isfinite(values), level - values, -_FAR * (abs(level) + 1))
    if values.ndim == 1:
        length = float((_share_above(depth[:-1], depth[1:]) * np.diff(alphas)).sum())
        return length / 2, bool(region[0] or region[-1])
    cells = np.outer(np.diff(alphas), np.diff(betas))
    area = float((_share_of_squares(depth) * cells).sum())
    edge = region[0].any() or region[-1].any() or region[:, 0].any() or region[:, -1].any()
    return float(np.sqrt(area / np.pi)), bool(edge)


def joined_to(origin: tuple[int, ...], below: np.ndarray) -> np.ndarray:
    """Mask of the points of ``below`` that are connected to ``origin`` by steps along the axes.

    Whole runs are added at once, along one axis and then along the other, until nothing changes.
    (``scipy.ndimage.label`` does the same, but importing it takes longer than a small surface.)
    """
    runs = [_runs(below, axis) for axis in range(below.ndim)]
    region, size = np.zeros(below.shape, dtype=bool), 0
    region[origin] = below[origin]
    while size != (size := int(region.sum())):
        for run in runs:
            reached = np.zeros(run.max() + 1, dtype=bool)
            reached[run[region]] = True
            region = below & reached[run]
    return region


def _runs(below: np.ndarray, axis: int) -> np.ndarray:
    """Label each point, with one label per unbroken run of points along an axis."""
    begins = ~np.moveaxis(below, axis, -1)
    begins[..., 0] = True
    return np.moveaxis(np.cumsum(begins).reshape(begins.shape), -1, axis)


def _share_above(*corners: np.ndarray) -> np.ndarray:
    """Share of a segment or triangle where the linear interpolation of its corner values is positive."""
    first, *middle, last = np.sort(np.stack(corners), axis=0)[::-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        if not middle:
            part = first / (first - last)
        else:
            few = first**2 / ((first - middle[0]) * (first - last))
            part = np.where(middle[0] < 0, few, 1 - last**2 / ((first - last) * (middle[0] - last)))
        part = np.where(last >= 0, 1.0, np.where(first <= 0, 0.0, part))
    return np.where(np.isnan(sum(corners)), np.nan, part)


def _share_of_squares(depth: np.ndarray) -> np.ndarray:
    """:func:`_share_above` of each square of a grid, as four triangles around its middle."""
    corners = depth[:-1, :-1], depth[:-1, 1:], depth[1:, 1:], depth[1:, :-1]
    middle = np.mean(np.stack(corners), axis=0)
    return np.mean([_share_above(corners[k], corners[(k + 1) % 4], middle) for k in range(4)], axis=0)


def level_for(surfaces: list[tuple[float, np.ndarray]]) -> float:
    """Loss level of all widths: halfway from the highest centre to the lowest median."""
    medians = [float(np.median(v[np.isfinite(v)])) for _, v in surfaces if np.isfinite(v).any()]
    centres = [centre for centre, _ in surfaces if np.isfinite(centre)]
    return (max(centres) + min(medians)) / 2 if centres and medians else float("nan")


def label_of(values: np.ndarray, centre: float, learnt: bool | None) -> str:
    """Warning label of a surface, or "".

    Args:
        values: the surface.
        centre: the loss at the origin.
        learnt: result of the permutation test (see
            :func:`skipscope.surfaces.evaluation._permutation_test.own_loss`). If it is None, the network has
            learnt if its centre is clearly below the surface's median.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return "no point of this surface is finite"
    median = float(np.median(finite))
    low, high = np.quantile(finite, [0.05, 0.95])
    flat = high - low < _FLAT * max(abs(median), abs(centre), 1e-12)
    if learnt is None:
        learnt = bool(median - centre > _FLAT * max(abs(median), 1e-12) / 2)
    if not learnt:
        return "flat: this network has not learnt" if flat else "not flat, but this network has not learnt"
    return "flat over this span: widen it" if flat else ""


@dataclass(frozen=True)
class Part:
    """Surface with all samples, or without one group of them.

    Attributes:
        centre: the loss at the origin.
        values: the surface.
        level: loss level of the width.
    """

    centre: float
    values: np.ndarray
    level: float


def scores_of(
    whole: Part,
    alphas: np.ndarray,
    betas: np.ndarray,
    *,
    label: str,
    parts: Sequence[Part],
    origin: Sequence[float] = (0.0, 0.0),
    interpolated_from: tuple[np.ndarray, ...] | None = None,
) -> Scores:
    """Compute all scores of one surface.

    Args:
        whole: the surface with all samples.
        alphas: first axis.
        betas: second axis, empty for a line.
        label: see :func:`label_of`.
        parts: the surface without each group of samples in turn; empty without per-sample losses.
        origin: coefficients of the unchanged model.
        interpolated_from: rows and columns of the coarser grid that the rest is interpolated from, or None.
    """

    def numbers(part: Part, a: np.ndarray, b: np.ndarray) -> dict[str, float]:
        return {
            "centre": part.centre,
            "convexity_share": convexity_share(part.values, a, b),
            "roughness": roughness(part.values),
            "barrier": barrier(part.values),
            "width": width(part.values, a, b, part.level, origin)[0],
            "level": part.level,
        }

    found, errors = numbers(whole, alphas, betas), {}
    if parts:
        errors = _jackknife([numbers(part, alphas, betas) for part in parts])
        undecided = _undecided(whole, parts, alphas, betas)
        if undecided > _MANY and "convexity_share" in errors:
            errors["convexity_share"] = max(errors["convexity_share"], undecided / 2)
    if interpolated_from is not None:
        rows, columns = interpolated_from
        coarse = replace(whole, values=whole.values[np.ix_(rows, columns)])
        gaps = {n: abs(found[n] - x) for n, x in numbers(coarse, alphas[rows], betas[columns]).items()}
        errors |= {
            n: float(np.hypot(errors.get(n, 0.0), gap))
            for n, gap in gaps.items()
            if n not in {"centre", "level"} and np.isfinite(gap)
        }
    bound = width(whole.values, alphas, betas, whole.level, origin)[1]
    return Scores(label=label, **found, width_is_bound=bound, errors=errors)


def _jackknife(left_out: list[dict[str, float]]) -> dict[str, float]:
    errors = {}
    for name in left_out[0]:
        column = np.array([entry[name] for entry in left_out])
        if np.isfinite(column).all():
            errors[name] = float(_spread(column))
    return errors


def _spread(parts: np.ndarray) -> np.ndarray:
    """Jackknife standard error over the first dimension."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.sqrt((len(parts) - 1) / len(parts) * np.square(parts - parts.mean(0)).sum(0))


def _undecided(whole: Part, parts: Sequence[Part], alphas: np.ndarray, betas: np.ndarray) -> float:
    """Share of interior points whose smallest curvature is within one standard error of zero."""
    smallest = _smallest_curvature(whole.values, alphas, betas)
    errors = _spread(np.stack([_smallest_curvature(part.values, alphas, betas) for part in parts]))
    known = np.isfinite(smallest) & np.isfinite(errors)
    return float(np.mean(np.abs(smallest[known]) < errors[known])) if known.any() else 0.0


def _size(values: np.ndarray) -> float:
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max()) if finite.size else 0.0
