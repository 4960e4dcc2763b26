"""Loss surfaces on a clipped log scale, as contours in SVG and as data for the 3-D view.

A loss surface spans many decades, and its bottom matters most: heights are logarithms, clipped five decades
above the lowest point of all surfaces shown, which share one scale. A point far below all but a few others
(the centre of a network that fits its data) does not count as the lowest. Losses below zero have a linear
scale.
"""

from __future__ import annotations

import base64
import io
import math
import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from skipscope._numbers import short
from skipscope.report._charts import Surface, Surfaces
from skipscope.report._markup import clean, ellipsis, join, tag
from skipscope.report._palette import striped, viridis
from skipscope.report._scale import power

DECADES = 5.0
# Largest number of decades from the 5 % quantile of all points down to the bottom.
_LOWEST = 3.0
# On a linear scale, heights are clipped at so many times the median's rise above the lowest point.
_RISES = 5.0


@dataclass(frozen=True)
class Heights:
    """Scale from losses to heights.

    Attributes:
        low, high: losses at the bottom and at the top, where heights are clipped.
        cut: whether any value is above ``high``.
        log: whether heights are logarithms; False for a difference, or for losses below zero.
        under: whether any value is below ``low``.
    """

    low: float
    high: float
    cut: bool
    log: bool
    under: bool = False

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Convert losses to heights; NaN stays NaN, infinity is clipped."""
        if not self.log:
            return np.clip(values, self.low, self.high)
        with np.errstate(invalid="ignore"):
            return np.log10(np.clip(values, self.low, self.high))

    def ends(self) -> tuple[float, float]:
        """Lowest and highest height."""
        return (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)

    def levels(self, count: int = 9) -> np.ndarray:
        """Heights of the contours, evenly spaced on the scale."""
        low, high = self.ends()
        return np.linspace(low, high, count + 2)[1:-1]

    def ticks(self) -> tuple[list[float], list[str]]:
        """Positions and labels of the ticks on the height axis."""
        if not self.log:
            values = np.linspace(self.low, self.high, 5)
            return values.tolist(), [short(float(v), 2) for v in values]
        bottom, top = math.log10(self.low), math.log10(self.high)
        whole = list(range(math.ceil(bottom), math.floor(top) + 1))
        if len(whole) >= 2:
            return [float(e) for e in whole], [power(e) for e in whole]
        values = np.linspace(bottom, top, 4)
        return values.tolist(), [short(float(10**v), 2) for v in values]


def heights(chart: Surfaces, limits: tuple[float, float] | None = None) -> Heights:
    """Choose one scale for all surfaces of a chart, between ``limits`` if given."""
    values = np.concatenate([np.ravel(s.values) for s in chart.surfaces])
    if limits is not None:
        low, high = limits
        with np.errstate(invalid="ignore"):
            above, below = bool((values > high).any()), bool((values < low).any())
        linear = low <= 0 or chart.linear or any(s.signed for s in chart.surfaces)
        return Heights(low, high, above, log=not linear, under=below)
    if any(s.signed for s in chart.surfaces):
        finite = np.abs(values[np.isfinite(values)])
        reach = float(np.quantile(finite, 0.98)) if finite.size else 1.0
        reach = reach or 1.0
        return Heights(-reach, reach, bool((finite > reach).any()), log=False)
    finite, beyond = values[np.isfinite(values)], bool(np.isposinf(values).any())
    if finite.size and (chart.linear or finite.min() < 0):
        low, top = float(finite.min()), float(finite.max())
        rise = _RISES * (float(np.median(finite)) - low) or top - low
        high = min(top, low + rise) if top > low else low + (abs(low) or 1.0)
        return Heights(low, high, top > high or beyond, log=False)
    positive = finite[finite > 0]
    if not positive.size:
        return Heights(0.1, 1.0, False, log=True)
    lowest, top = float(positive.min()), float(positive.max())
    low = max(lowest, float(np.quantile(positive, 0.05)) / 10**_LOWEST)
    high = max(min(top, low * 10**DECADES), low * 1.25)
    return Heights(low, high, top > high or beyond, log=True, under=lowest < low)


def colours(signed: bool) -> np.ndarray:
    """Colour map ``[256, 3]``: viridis for heights; blue through white to orange for a difference."""
    if not signed:
        return viridis()
    below, middle, above = np.array([0, 103, 165]), np.array([247, 246, 242]), np.array([200, 80, 10])
    part = np.linspace(-1, 1, 256)[:, None]
    return np.where(part < 0, middle + (below - middle) * -part, middle + (above - middle) * part).astype(
        np.uint8
    )


def contours(chart: Surfaces, width: int) -> Markup:
    """Draw all surfaces of a chart as contour maps side by side, on one scale, with its key."""
    scale = heights(chart)
    across = min(len(chart.surfaces), (4 if len(chart.surfaces) == 4 else 3) if width > 500 else 2)
    gap = 18
    side = min(420.0 if across == 1 else 300.0, (width - 4 - gap * (across - 1)) / across)
    notes = [textwrap.wrap(clean(s.note), int(side / 5.8)) for s in chart.surfaces]
    block = side + 32 + 15 * max(map(len, notes))
    axes = textwrap.wrap(_axes(chart), int(width / 5.8))
    parts = []
    for i, surface in enumerate(chart.surfaces):
        at_x, at_y = 2 + (i % across) * (side + gap), (i // across) * block
        parts.append(_map(surface, scale, at_x, at_y + 22, side, most=int(side / 6.6)))
        parts += [
            tag("text", line, x=at_x, y=at_y + side + 38 + 15 * n, class_="note")
            for n, line in enumerate(notes[i])
        ]
    bottom = math.ceil(len(chart.surfaces) / across) * block + 6
    parts.append(_key(scale, chart, 2, bottom, min(240.0, width / 2)))
    parts += [tag("text", line, x=2, y=bottom + 42 + 15 * n, class_="note") for n, line in enumerate(axes)]
    size = f"0 0 {width} {bottom + 34 + 15 * len(axes):.0f}"
    return tag(
        "svg", *parts, viewBox=size, class_="chart", role="img", aria_label=f"contours of the {chart.height}"
    )


def _axes(chart: Surfaces) -> str:
    """Describe the axes to the right and upward, with their ranges."""
    ends = [(axis[0], axis[-1]) for axis in (chart.surfaces[0].alphas, chart.surfaces[0].betas)]
    return "; ".join(
        f"{arrow} {clean(name)}, {short(float(low))} to {short(float(high))}"
        for arrow, name, (low, high) in zip("→↑", chart.axes, ends)
    )


def _map(surface: Surface, scale: Heights, x: float, y: float, side: float, most: int) -> Markup:
    level = scale(np.asarray(surface.values, dtype=float))
    smooth = fine(level)
    body = [
        tag("text", ellipsis(surface.label, most, keep="start"), x=x, y=y - 7, class_="label strong"),
        tag(
            "image",
            href=_png(smooth, scale, surface.signed, surface.broken),
            x=x,
            y=y,
            width=side,
            height=side,
            preserveAspectRatio="none",
        ),
        tag(
            "path",
            d=_lines(smooth, scale, x, y, side),
            class_="contour dark" if surface.signed else "contour",
        ),
    ]
    a, b = (_part(*side) for side in zip((surface.alphas, surface.betas), surface.origin))
    if a is not None and b is not None:
        px, py = x + a * side, y + (1 - b) * side
        d = f"M{px - 5:.1f} {py:.1f}h10M{px:.1f} {py - 5:.1f}v10"
        body += [
            tag("path", d=d, class_="centre under"),
            tag("path", tag("title", "the weights as they are"), d=d, class_="centre"),
        ]
    body += [*_dots(surface, x, y, side), *_path(surface, x, y, side)]
    body.append(tag("rect", x=x, y=y, width=side, height=side, class_="frame"))
    return tag("g", *body)


def _dots(surface: Surface, x: float, y: float, side: float) -> list[Markup]:
    if surface.dots is None or not surface.dots.any():
        return []
    rows, columns = (n - 1 or 1 for n in surface.dots.shape)
    places = "".join(
        f"M{x + a / rows * side:.1f} {y + side - b / columns * side:.1f}h0"
        for a, b in np.argwhere(surface.dots)
    )
    return [tag("path", tag("title", surface.dots_mean), d=places, class_="dots")]


def _path(surface: Surface, x: float, y: float, side: float) -> list[Markup]:
    """Draw known weights on the plane, joined in order; points beyond the edge are drawn on it."""
    if not len(surface.path):
        return []

    def along(axis: np.ndarray, value: float) -> float:
        return float(np.clip((value - axis[0]) / (axis[-1] - axis[0]), 0, 1))

    places = [
        (x + along(surface.alphas, a) * side, y + side - along(surface.betas, b) * side, name)
        for a, b, name in surface.path
    ]
    d = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py, _ in places)
    dots = [tag("circle", tag("title", name), cx=px, cy=py, r=3, class_="stop") for px, py, name in places]
    return [tag("path", d=d, class_="walk under"), tag("path", d=d, class_="walk"), *dots]


def _lines(fine: np.ndarray, scale: Heights, x: float, y: float, side: float) -> str:
    from contourpy import contour_generator

    rows, columns = fine.shape
    if min(rows, columns) < 2 or not np.isfinite(fine).any():
        return "M0 0"
    made = contour_generator(
        np.linspace(0, side, rows), np.linspace(side, 0, columns), np.ma.masked_invalid(fine.T)
    )
    lines: Any = [line for at in scale.levels() for line in made.lines(at)]
    return (
        "".join(
            "M" + "L".join(f"{x + px:.1f} {y + py:.1f}" for px, py in _thinned(line))
            for line in lines
            if len(line) > 2
        )
        or "M0 0"
    )


def _thinned(line: np.ndarray, apart: float = 2.5) -> list[tuple[float, float]]:
    """Keep both ends of a line, and points at least ``apart`` pixels from the last kept point."""
    kept = [line[0]]
    for point in line[1:-1]:
        if math.hypot(*(point - kept[-1])) >= apart:
            kept.append(point)
    return [*kept, line[-1]]


def fine(level: np.ndarray, least: int = 61) -> np.ndarray:
    """Interpolate heights on a finer grid for smooth contours: cubic if all are known, else linear."""
    from scipy.interpolate import RegularGridInterpolator

    known = np.isfinite(level)
    if min(level.shape) < 4 or not known.any():
        return level
    axes = [np.arange(n, dtype=float) for n in level.shape]
    finer = [np.linspace(0, n - 1, max(n, math.ceil(least / (n - 1)) * (n - 1) + 1)) for n in level.shape]
    grid = np.meshgrid(*finer, indexing="ij")
    # A cubic interpolation would spread NaN over the whole plane.
    method = "cubic" if known.all() else "linear"
    made = RegularGridInterpolator(axes, level, method=method)(tuple(grid))
    # A cubic interpolation may overshoot the measured range.
    return np.clip(made, np.nanmin(level), np.nanmax(level))


def _part(axis: np.ndarray, value: float) -> float | None:
    low, high = float(axis[0]), float(axis[-1])
    return (value - low) / (high - low) if low <= value <= high and low < high else None


def _png(
    level: np.ndarray, scale: Heights, signed: bool, broken: np.ndarray | None = None, pixels: int = 120
) -> str:
    """Render heights ``[a, b]``, a to the right, b upward; unknown values are transparent or striped."""
    from PIL import Image
    from scipy.ndimage import map_coordinates

    low, high = scale.ends()
    part = (level - low) / ((high - low) or 1.0)
    known = np.isfinite(part)
    grid = np.meshgrid(*(np.linspace(0, n - 1, pixels) for n in level.shape), indexing="ij")
    smooth = map_coordinates(np.where(known, part, 1.0), grid, order=1)
    clear = map_coordinates(known.astype(float), grid, order=0)
    rgb = colours(signed)[(smooth.clip(0, 1) * 255).astype(int)]
    rgba = np.dstack([rgb, (clear > 0.5).astype(np.uint8) * 255]).transpose(1, 0, 2)[::-1]
    if broken is not None and broken.any():
        rgba = striped(
            np.repeat(np.repeat(rgba, 3, 0), 3, 1), np.repeat(np.repeat(clear.T[::-1] <= 0.5, 3, 0), 3, 1)
        )
    buffer = io.BytesIO()
    # A palette takes a third of the bytes, and there are hardly more colours than it can hold.
    picture = Image.fromarray(np.ascontiguousarray(rgba)).quantize(256, Image.Quantize.FASTOCTREE)
    picture.save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _key(scale: Heights, chart: Surfaces, x: float, y: float, width: float) -> Markup:
    signed = any(s.signed for s in chart.surfaces)
    ramp = Heights(0.0, 1.0, False, log=False)
    image = tag(
        "image",
        href=_png(np.linspace(0, 1, 64)[:, None].repeat(2, 1), ramp, signed, pixels=96),
        x=x,
        y=y,
        width=width,
        height=9.0,
        preserveAspectRatio="none",
    )
    above = "≥ " if scale.cut else ""
    below = "≤ " if scale.under or (scale.cut and signed) else ""
    low, high = scale.ends()
    between: list[tuple[float, str]] = []
    # Tick labels must not overlap the labels of the ends or each other.
    free = x + 58.0
    for value, text in zip(*scale.ticks()):
        at = x + (value - low) / ((high - low) or 1.0) * width
        if free < at < x + width - 58:
            between.append((at, text))
            free = at + 44
    dots = next((s.dots_mean for s in chart.surfaces if s.dots is not None and s.dots.any()), "")
    return join(
        image,
        tag("text", below + short(scale.low, 2), x=x, y=y + 23, class_="tick"),
        *(tag("text", text, x=at, y=y + 23, text_anchor="middle", class_="tick") for at, text in between),
        tag("text", above + short(scale.high, 2), x=x + width, y=y + 23, text_anchor="end", class_="tick"),
        tag("text", chart.height, x=x + width + 12, y=y + 9, class_="title"),
        tag("text", f"dots: {dots}", x=x + width + 12, y=y + 24, class_="note") if dots else join(),
    )


def payload(chart: Surfaces) -> dict[str, Any]:
    """Data for the page's 3-D script: heights, scale and ticks, without markup."""
    scale = heights(chart)
    values, texts = scale.ticks()
    low, high = scale.ends()
    ramp = [
        [i / 15, "rgb({},{},{})".format(*colours(any(s.signed for s in chart.surfaces))[i * 17])]
        for i in range(16)
    ]
    surfaces = [_mesh(surface, scale(np.asarray(surface.values, dtype=float))) for surface in chart.surfaces]
    # Rounded heights must stay within the range.
    room = 0.01 * (high - low)
    return {
        "surfaces": surfaces,
        "low": low - room,
        "high": high + room,
        "ticks": values,
        "texts": texts,
        "scale": ramp,
    }


def _mesh(surface: Surface, level: np.ndarray) -> dict[str, list]:
    """Axes and heights of one surface, interpolated to a finer grid like its map."""
    smooth = fine(level, least=41)
    x, y = (
        np.linspace(axis[0], axis[-1], n) for axis, n in zip((surface.alphas, surface.betas), smooth.shape)
    )
    return {
        "x": np.round(x, 5).tolist(),
        "y": np.round(y, 5).tolist(),
        "z": [[round(float(v), 3) if math.isfinite(v) else None for v in row] for row in smooth.T],
    }
