"""The same charts by matplotlib, for figures in papers and notebooks: `plot(ax=...)`, PNG, SVG, PDF."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from skipscope.report import _terrain
from skipscope.report._arcs import KINDS, thickness
from skipscope.report._charts import Bars, Chart, Heat, Lines, Network, Surfaces
from skipscope.report._palette import DASHES, LIGHT, PLOT_MARKERS

_hidden: ContextVar[bool] = ContextVar("_hidden", default=False)


@contextmanager
def hidden() -> Iterator[None]:
    """New figures inside are for a file: no window opens, and the user's backend is not touched."""
    token = _hidden.set(True)
    try:
        yield
    finally:
        _hidden.reset(token)


def new_axes(width: float = 7.2, height: float = 4.0, **options: Any) -> Any:
    """Axes of a new figure."""
    if _hidden.get():
        from matplotlib.figure import Figure

        return Figure(figsize=(width, height), layout="constrained").subplots(**options)
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained", **options)[1]


@functools.singledispatch
def draw(chart: Chart, ax: Any = None, **options: Any) -> Any:
    """Draw a chart into ``ax``, or into new axes; returns the axes."""
    raise TypeError(type(chart).__name__)


def _dash(style: int) -> Any:
    dash = DASHES[style % len(DASHES)]
    return (0, tuple(float(d) for d in dash.split())) if dash else "-"


@draw.register
def _(chart: Lines, ax: Any = None, *, label: str | None = None, legend: bool = True) -> Any:
    ax = new_axes() if ax is None else ax
    before = len(ax.get_lines()) and len([line for line in ax.get_lines() if line.get_gid() == "skipscope"])
    for series in chart.series:
        style = (series.style + before) % len(LIGHT)
        strong = not series.faint and (series.frame is None or series.frame == chart.frame)
        ax.plot(
            series.x, _visible(series.y, chart.log_y), color=LIGHT[style] if strong else "0.6", lw=1.8 if strong else 0.7,
            linestyle="none" if series.points else _dash(style) if strong else "-", gid="skipscope" if strong else None,
            marker=PLOT_MARKERS[style] if strong else None, ms=4, markevery=max(1, len(series.x) // 12),
            label=(label if label and len(chart.series) == 1 else series.label) if strong else None,
        )  # fmt: skip
        if series.low is not None and series.high is not None:
            ax.fill_between(series.x, series.low, series.high, color=LIGHT[style], alpha=0.16, lw=0)
    if chart.log_y:
        ax.set_yscale("log")
    if chart.log_x:
        ax.set_xscale("log")
    if chart.ticks:
        ax.set_xticks(list(chart.ticks), list(chart.ticks.values()))
    if chart.level and not before:
        ax.axhline(chart.level[0], color="0.5", lw=0.8, ls=(0, (3, 3)))
    for mark in chart.marks:
        ax.axvline(mark.x, color="0.5", lw=0.8, ls=(0, (3, 3)))
        ax.annotate(
            _plain(mark.label),
            (mark.x, 1),
            (4, -4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            fontsize=8,
            color="0.35",
        )
    ax.set_xlabel(_plain(chart.x_title))
    ax.set_ylabel("\n".join(textwrap.wrap(_plain(chart.y_title), 44)))
    _calm(ax)
    if legend and len(ax.get_legend_handles_labels()[1]) > 1:
        ax.legend(frameon=False, fontsize=8)
    if chart.foot:
        _foot(ax, (f"{label}: " if label else "") + chart.foot)
    return ax


def _visible(values: Any, log: bool) -> np.ndarray:
    """On a log axis zero has no place: a gap, which the verdict under the picture explains."""
    # copied: a chart holds any sequence, and the gaps are ours
    array = np.array([np.nan if v is None else v for v in values], dtype=float)
    if log:
        array[array <= 0] = np.nan
    return array


@draw.register
def _(chart: Bars, ax: Any = None, *, most: int = 40) -> Any:
    count = min(len(chart.labels), most)
    ax = new_axes(7.2, 1.2 + 0.22 * count * max(1, len(chart.names))) if ax is None else ax
    thick = 0.8 / len(chart.names)
    for k, name in enumerate(chart.names):
        at = np.arange(count) + (k + 0.5) * thick - 0.4
        errors = None
        if chart.low is not None and chart.high is not None:
            value = np.array(chart.values[k][:count], dtype=float)
            errors = np.abs(np.array([chart.low[k][:count], chart.high[k][:count]], dtype=float) - value)
        hatch = ("", "//", "..", "xx")[k % 4]
        ax.barh(
            at,
            chart.values[k][:count],
            thick * 0.9,
            color=LIGHT[chart.styles[k] % len(LIGHT)],
            label=_plain(name),
            xerr=errors,
            hatch=hatch,
            edgecolor="white",
        )
    ax.set_yticks(range(count), [_plain(label) for label in chart.labels[:count]], fontsize=8)
    ax.invert_yaxis()
    if chart.log:
        ax.set_xscale("log")
    ax.set_xlabel(_plain(chart.title))
    _calm(ax, "x")
    if len(chart.names) > 1:
        ax.legend(frameon=False, fontsize=8)
    return ax


@draw.register
def _(chart: Heat, ax: Any = None) -> Any:
    from matplotlib.colors import LogNorm

    rows = len(chart.rows)
    ax = new_axes(7.2, min(9.0, 1.6 + 0.16 * rows)) if ax is None else ax
    positive = chart.values[np.isfinite(chart.values) & (chart.values > 0)]
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (0.1, 1.0)
    ax.set_facecolor("0.92")
    edges = _edges(chart.columns)
    mesh = ax.pcolormesh(
        edges, np.arange(rows + 1), np.where(chart.values > 0, chart.values, np.nan), cmap="viridis",
        norm=LogNorm(low, max(high, low * 1.01)), rasterized=True,
    )  # fmt: skip
    step = max(1, rows // 36)
    ax.set_yticks(np.arange(0, rows, step) + 0.5, [_plain(name) for name in chart.rows[::step]], fontsize=7)
    ax.invert_yaxis()
    ax.set_xlabel(_plain(chart.x_title))
    ax.figure.colorbar(mesh, ax=ax, label=_plain(chart.title), fraction=0.04, pad=0.02)
    for mark in chart.events:
        ax.axvline(mark.x, color="white", lw=1, ls=(0, (3, 3)))
        ax.annotate(
            _plain(mark.label),
            (mark.x, 1),
            (3, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=7,
        )
    if chart.foot:
        _foot(ax, chart.foot)
    return ax


def _edges(columns: Any) -> np.ndarray:
    at = np.array(columns, dtype=float)
    if len(at) == 1:
        return np.array([at[0] - 0.5, at[0] + 0.5])
    middle = (at[1:] + at[:-1]) / 2
    return np.concatenate([[2 * at[0] - middle[0]], middle, [2 * at[-1] - middle[-1]]])


@draw.register
def _(chart: Surfaces, ax: Any = None, *, kind: str = "contour") -> Any:
    """Contours, or ``kind="3d"``: several surfaces get axes of their own unless ``ax`` is given for the first."""
    subject = {"projection": "3d"} if kind == "3d" else {}
    count = 1 if ax is not None else len(chart.surfaces)
    axes = (
        [ax]
        if ax is not None
        else np.ravel(new_axes(3.6 * count + 0.6, 3.7, ncols=count, squeeze=False, subplot_kw=subject))
    )
    scale = _terrain.heights(chart)
    values, texts = scale.ticks()
    cmap = "RdBu_r" if chart.surfaces[0].signed else "viridis"
    drawn = None
    for where, surface in zip(axes, chart.surfaces):
        level = scale(np.array(surface.values, dtype=float)).T
        a, b = np.meshgrid(surface.alphas, surface.betas)
        if kind == "3d":
            where.plot_surface(a, b, level, cmap=cmap, lw=0, antialiased=True, rcount=60, ccount=60)
            where.set_zticks(values, texts, fontsize=7)
        else:
            shades = np.linspace(scale.levels()[0] - 1e-9, scale.levels()[-1], 24) if level.size else 8
            drawn = where.contourf(a, b, np.ma.masked_invalid(level), levels=shades, cmap=cmap, extend="both")
            where.contour(
                a,
                b,
                np.ma.masked_invalid(level),
                levels=scale.levels(),
                colors="white",
                linewidths=0.5,
                alpha=0.7,
            )
            where.plot(0, 0, "+", color="white", ms=9, mew=1.6)
            where.set_aspect("auto")
        where.set_title(
            _plain(surface.label) + (f"\n{_plain(surface.note)}" if surface.note else ""), fontsize=9
        )
        where.set_xlabel(_plain(chart.axes[0]), fontsize=8)
        where.set_ylabel(_plain(chart.axes[1]), fontsize=8)
    if drawn is not None:
        bar = axes[0].figure.colorbar(drawn, ax=list(axes), label=_plain(chart.height), fraction=0.04)
        bar.set_ticks(values, labels=texts)
    return axes[0] if len(axes) == 1 else axes


@draw.register
def _(chart: Network, ax: Any = None) -> Any:
    from matplotlib.patches import Arc as Curve

    ax = new_axes(min(14.0, max(6.0, 0.3 * len(chart.layers))), 2.6) if ax is None else ax
    ax.plot([-0.4, len(chart.layers) + 0.4], [0, 0], color="0.4", lw=1, zorder=1)
    ax.plot(
        np.arange(len(chart.layers)) + 0.5,
        np.zeros(len(chart.layers)),
        "s",
        color="0.35",
        ms=max(1.5, min(7, 200 / max(1, len(chart.layers)))),
        zorder=2,
    )
    for arc in chart.arcs:
        style = KINDS.index(arc.kind) if arc.kind in KINDS else 5
        span = arc.end + 1 - arc.start
        ax.add_patch(Curve(((arc.start + arc.end + 1) / 2, 0), span, 2 * span**0.6, theta1=0, theta2=180, color=LIGHT[style],
                           lw=thickness(arc) * 0.7, ls=_dash(style), alpha=0.85))  # fmt: skip
    top = max([(arc.end + 1 - arc.start) ** 0.6 for arc in chart.arcs] or [1.0])
    ax.set_ylim(-0.5 * top, 1.15 * top)
    ax.set_xlim(-0.6, len(chart.layers) + 0.6)
    step = max(1, len(chart.layers) // 30)
    ax.set_xticks(
        np.arange(0, len(chart.layers), step) + 0.5,
        [_plain(name) for name in chart.layers[::step]],
        rotation=60,
        ha="right",
        fontsize=7,
    )
    ax.set_yticks([])
    for side in ("left", "right", "top", "bottom"):
        ax.spines[side].set_visible(False)
    return ax


def _calm(ax: Any, grid: str = "y") -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, color="0.9", lw=0.8)
    ax.set_axisbelow(True)


def _foot(ax: Any, sentence: str) -> None:
    """A sentence under the picture; several results drawn into one picture each get theirs."""
    wrapped = "\n".join(textwrap.wrap(_plain(sentence), 100))
    label = ax.get_xlabel()
    ax.set_xlabel(f"{label}\n{wrapped}" if label else wrapped, fontsize=8)


def _plain(text: str) -> str:
    """Text that matplotlib does not read as mathematics."""
    return str(text).replace("$", r"\$")
