"""A surface in a few numbers, each with its error bar; and whether the network has learnt at all.

Every score is a function of the values alone. Its standard error is a delete-a-group jackknife over samples: the
surface without each tenth of the samples in turn, sqrt((G-1)/G * sum (s_g - mean s)^2). Where values were interpolated, a
score is off by what splines do between their points, too: about as much as it differs on the coarser grid they pass
through (on trained networks 0.04 to 0.09 of the convexity share), which is added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from skipscope.surfaces._results import Scores

_FLAT = 0.1  # a surface whose middle 90 % spans less than this part of its median is a sheet


def convexity_share(values: np.ndarray, alphas: np.ndarray, betas: np.ndarray) -> float:
    """Share of finite interior points whose discrete Hessian (second differences) has no negative eigenvalue."""
    slack = 1e-9 * _size(values)  # rounding in the values is no curvature
    if values.ndim == 1:
        with np.errstate(invalid="ignore"):
            second = np.diff(values, 2)
        second = second[np.isfinite(second)]
        return float(np.mean(second >= -slack)) if second.size else float("nan")
    if min(values.shape) < 3:
        return float("nan")
    with np.errstate(invalid="ignore", over="ignore"):
        a = _second(values, alphas, 0)[:, 1:-1]
        b = _second(values, betas, 1)[1:-1, :]
        step_a, step_b = alphas[2:] - alphas[:-2], betas[2:] - betas[:-2]
        c = values[2:, 2:] - values[2:, :-2] - values[:-2, 2:] + values[:-2, :-2]
        c = c / step_a[:, None] / step_b[None, :]
        smallest = (a + b) / 2 - np.hypot((a - b) / 2, c)
    smallest = smallest[np.isfinite(smallest)]
    scale = slack / min(np.min(np.diff(alphas)), np.min(np.diff(betas))) ** 2
    return float(np.mean(smallest >= -scale)) if smallest.size else float("nan")


def _second(values: np.ndarray, at: np.ndarray, axis: int) -> np.ndarray:
    v, x = np.moveaxis(values, axis, 0), at.reshape(-1, *[1] * (values.ndim - 1))
    left, right = x[1:-1] - x[:-2], x[2:] - x[1:-1]
    return np.moveaxis(2 * ((v[2:] - v[1:-1]) / right - (v[1:-1] - v[:-2]) / left) / (left + right), 0, axis)


def roughness(values: np.ndarray) -> float:
    """Share of the movement up and down, along rows and columns, that a single valley would not need.

    Along a line with ends e, f and minimum m a single valley moves by (e - m) + (f - m); whatever moves more is rough.
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
    """The highest climb out of any valley but the deepest, on the best path to a deeper one.

    Zero-dimensional persistence: points are flooded from the lowest up; where two valleys meet, the shallower ends,
    and its depth below the meeting point is the climb. Neighbours are the eight around a point.
    """
    flat = np.where(np.isfinite(values), values, np.inf).reshape(values.shape[0], -1)
    rows, columns = flat.shape
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


def width(
    values: np.ndarray, alphas: np.ndarray, betas: np.ndarray, level: float, at: Sequence[float] = (0.0, 0.0)
) -> tuple[float, bool]:
    """Radius of the region around the origin (``at``) below ``level``, and whether it reaches the edge.

    For a plane, the radius of the disc with the region's area; for a line, half its length. NaN when the origin is
    not below the level or not on the grid.
    """
    from scipy.ndimage import label

    below = np.nan_to_num(values, nan=np.inf) <= level
    origin = tuple(int(np.argmin(np.abs(axis - c))) for axis, c in zip((alphas, betas)[: values.ndim], at))
    if not below[origin]:
        return float("nan"), False
    regions = np.asarray(label(below)[0])  # type: ignore[index]
    region = regions == regions[origin]
    cells = [np.gradient(axis) if axis.size > 1 else np.ones(1) for axis in (alphas, betas)[: values.ndim]]
    if values.ndim == 1:
        return float((region * cells[0]).sum() / 2), bool(region[0] or region[-1])
    area = float((region * np.outer(*cells)).sum())
    edge = region[0].any() or region[-1].any() or region[:, 0].any() or region[:, -1].any()
    return float(np.sqrt(area / np.pi)), bool(edge)


def level_for(surfaces: list[tuple[float, np.ndarray]]) -> float:
    """The loss at which widths are read, the same for all: halfway from the highest centre to the lowest median."""
    medians = [float(np.median(v[np.isfinite(v)])) for _, v in surfaces if np.isfinite(v).any()]
    centres = [centre for centre, _ in surfaces if np.isfinite(centre)]
    return (max(centres) + min(medians)) / 2 if centres and medians else float("nan")


def label_of(values: np.ndarray, centre: float, learnt: bool | None) -> str:
    """What the reader must know first about a surface, or "".

    Args:
        values: the surface.
        centre: the loss at the origin.
        learnt: what the targets say (see :func:`skipscope.surfaces._learnt.has_learnt`); None: they cannot be asked,
            and the network counts as learnt when its centre lies clearly below the surface's median.
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


def scores_of(
    values: np.ndarray,
    alphas: np.ndarray,
    betas: np.ndarray,
    *,
    centre: float,
    level: float,
    label: str,
    without_fold: list[tuple[float, np.ndarray]] | None,
    origin: Sequence[float] = (0.0, 0.0),
    interpolated_from: tuple[np.ndarray, ...] | None = None,
) -> Scores:
    """All scores of one surface.

    Args:
        values: the surface, [a, b] or [a].
        alphas: first axis.
        betas: second axis, empty for a line.
        centre: the loss at the origin.
        level: where the width is read.
        label: see :func:`label_of`.
        without_fold: (centre, values) without each group of samples in turn, or None.
        origin: the coefficients of the model as it is.
        interpolated_from: rows and columns of the coarser grid, where the rest is interpolated from it.
    """

    def numbers(centre: float, v: np.ndarray, *at: np.ndarray) -> dict[str, float]:
        a, b = at or (alphas, betas)
        return {
            "centre": centre,
            "convexity_share": convexity_share(v, a, b),
            "roughness": roughness(v),
            "barrier": barrier(v),
            "width": width(v, a, b, level, origin)[0],
        }

    errors, found = _jackknife(numbers, without_fold) if without_fold else {}, numbers(centre, values)
    if interpolated_from is not None:
        rows, columns = interpolated_from
        coarse = numbers(centre, values[np.ix_(rows, columns)], alphas[rows], betas[columns])
        gaps = {name: abs(found[name] - coarse[name]) for name in found if name != "centre"}
        errors |= {n: float(np.hypot(errors.get(n, 0.0), gap)) for n, gap in gaps.items() if np.isfinite(gap)}
    return Scores(
        label=label,
        **found,
        level=level,
        width_is_bound=width(values, alphas, betas, level, origin)[1],
        errors=errors,
    )


def _jackknife(
    numbers: Callable[[float, np.ndarray], dict[str, float]], parts: list[tuple[float, np.ndarray]]
) -> dict[str, float]:
    left_out = [numbers(*part) for part in parts]
    groups = len(parts)
    errors = {}
    for name in left_out[0]:
        column = np.array([entry[name] for entry in left_out])
        if np.isfinite(column).all():
            errors[name] = float(np.sqrt((groups - 1) / groups * np.square(column - column.mean()).sum()))
    return errors


def _size(values: np.ndarray) -> float:
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max()) if finite.size else 0.0
