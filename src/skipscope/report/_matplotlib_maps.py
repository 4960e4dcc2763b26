"""Matplotlib renderer of heat maps and loss surfaces: contours on clipped log levels, and 3-D."""

from __future__ import annotations

import textwrap
from typing import Any, Literal

import numpy as np

from skipscope._errors import SkipscopeError
from skipscope.report import _surface_charts
from skipscope.report._charts import Heat, Surface, Surfaces
from skipscope.report._figure_style import current
from skipscope.report._matplotlib import draw, foot, new_axes, plain, require_flat
from skipscope.report._palette import BROKEN
from skipscope.report._svg import rooms


@draw.register
def _(chart: Heat, ax: Any = None) -> Any:
    from matplotlib.colors import LogNorm

    rows = len(chart.rows)
    ax = new_axes(7.2, min(9.0, 1.6 + 0.16 * rows)) if ax is None else require_flat(ax, "a map")
    positive = chart.values[np.isfinite(chart.values) & (chart.values > 0)]
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (0.1, 1.0)
    low, high = current().limits or (low, high)
    mesh = ax.pcolormesh(
        _edges(chart.columns),
        np.arange(rows + 1),
        np.where(np.isfinite(chart.values) & (chart.values > 0), chart.values, np.nan),
        cmap="viridis",
        norm=LogNorm(low, max(high, low * 1.01)),
        rasterized=True,
    )
    # Exact zeros are grey, as on the page.
    zero = np.ma.masked_where(chart.values != 0, np.zeros_like(chart.values))
    ax.pcolormesh(
        _edges(chart.columns), np.arange(rows + 1), zero, cmap="gray", vmin=-1, vmax=1, rasterized=True
    )
    step = max(1, rows // 36)
    ax.set_yticks(np.arange(0, rows, step) + 0.5, [plain(name) for name in chart.rows[::step]], fontsize=7)
    ax.invert_yaxis()
    ax.set_xlabel(plain(chart.x_title))
    if current().legend:
        ax.figure.colorbar(mesh, ax=ax, label=plain(chart.title), fraction=0.04, pad=0.02)
    _stripes(ax, chart)
    if chart.foot:
        foot(ax, chart.foot)
    _events(ax, chart)
    return ax


def _stripes(ax: Any, chart: Heat) -> None:
    """Stripe values that are not finite, as on the page, with one bar per run in a row."""
    edges = _edges(chart.columns)
    for row, broken in enumerate(np.isinf(chart.values)):
        turns = np.flatnonzero(np.diff(np.concatenate([[0], broken, [0]]).astype(int)))
        runs = [(edges[a], edges[b] - edges[a]) for a, b in turns.reshape(-1, 2)]
        if runs:
            ax.broken_barh(runs, (row, 1), facecolor=BROKEN[0], edgecolor=BROKEN[1], hatch="//////", lw=0)


def _events(ax: Any, chart: Heat) -> None:
    """Draw a line for each event, with its label in one of two rows above the map if there is room."""
    for mark in chart.events:
        ax.axvline(mark.x, color="white", lw=1, ls=(0, (3, 3)))
    # The available room is known only after layout.
    ax.figure.draw_without_rendering()
    point = ax.figure.dpi / 72
    box = ax.get_window_extent()
    places = [ax.transData.transform((mark.x, 0))[0] / point for mark in chart.events]
    # A generous estimate of the width of letters of 8 points.
    lengths = [len(mark.label) * 5.2 for mark in chart.events]
    found = rooms(places, lengths, box.x0 / point, box.x1 / point)
    rows = max([room[1] + 1 for room in found if room] or [0])
    for mark, place, room in zip(chart.events, places, found):
        if room:
            before = room[0] < place
            ax.annotate(
                plain(mark.label),
                (mark.x, 1),
                (-3 if before else 3, 3 + 11 * (rows - 1 - room[1])),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="right" if before else "left",
                va="bottom",
                fontsize=8,
                color="0.35",
            )


def _edges(columns: Any) -> np.ndarray:
    at = np.array(columns, dtype=float)
    if len(at) == 1:
        return np.array([at[0] - 0.5, at[0] + 0.5])
    middle = (at[1:] + at[:-1]) / 2
    return np.concatenate([[2 * at[0] - middle[0]], middle, [2 * at[-1] - middle[-1]]])


@draw.register
def _(chart: Surfaces, ax: Any = None, *, kind: Literal["contour", "3d"] | None = None) -> Any:
    """Draw contours, or 3-D surfaces with ``kind="3d"``, each surface in its own axes.

    Without ``ax`` new axes are created; with it, as many surfaces are drawn as it has axes.
    """
    axes = [] if ax is None else list(np.ravel(ax))
    solid = kind == "3d" or (kind is None and bool(axes) and axes[0].name == "3d")
    if kind not in {None, "contour", "3d"} or any((axis.name == "3d") != solid for axis in axes):
        raise SkipscopeError(
            "plot",
            "these axes are not for this kind of picture",
            expected='kind="contour" in two-dimensional axes, or kind="3d" in 3-D axes',
            got=f"kind={kind!r} in {'3-D' if axes and axes[0].name == '3d' else 'two-dimensional'} axes",
            cure='plt.figure().add_subplot(projection="3d")' if solid else "leave kind= out",
        )
    count = len(axes) or len(chart.surfaces)
    if not axes:
        options = {"subplot_kw": {"projection": "3d"}} if solid else {"sharey": True}
        axes = list(np.ravel(new_axes(3.3 * count + 0.7, 3.5, ncols=count, squeeze=False, **options)))
    scale = _surface_charts.heights(chart, current().limits)
    drawn = None
    for target, surface in zip(axes, chart.surfaces):
        drawn = relief(target, surface, scale) if solid else contours(target, surface, scale)
        note = textwrap.wrap(surface.note, 36 if count > 1 else 46) if current().notes else []
        target.set_title("\n".join(map(plain, [surface.label, *note])), fontsize=9)
        if not solid:
            target.set_xlabel(plain(chart.axes[0]), fontsize=8)
    if not solid:
        axes[0].set_ylabel(plain(chart.axes[1]), fontsize=8)
    if not solid and current().legend:
        values, texts = scale.ticks()
        bar = axes[0].figure.colorbar(drawn, ax=axes, label=plain(chart.height), fraction=0.04)
        bar.set_ticks(values, labels=texts)
    if ax is None and not solid:
        square(axes[0].get_figure(root=True))
    return axes[0] if len(axes) == 1 else np.array(axes)


def square(figure: Any) -> None:
    """Set the layout for square maps: matplotlib's constrained layout would cut off a label at the edge."""
    figure.set_layout_engine("compressed")
    # The layout may need two passes, but writing a file makes only one.
    figure.draw_without_rendering()


def contours(ax: Any, surface: Surface, scale: _surface_charts.Heights) -> Any:
    """Draw one surface as a contour map."""
    from matplotlib.patches import Rectangle

    level = np.ma.masked_invalid(scale(np.asarray(surface.values, dtype=float)).T)
    a, b = np.meshgrid(surface.alphas, surface.betas)
    low, high = scale.ends()
    colours = _colours(surface.signed)
    # A single row of points has no contours.
    if min(level.shape) < 2:
        drawn = ax.pcolormesh(a, b, level, vmin=low, vmax=high + 1e-9, cmap=colours, shading="nearest")
    else:
        levels = np.linspace(low, high + 1e-9, 33)
        drawn = ax.contourf(a, b, level, levels=levels, cmap=colours, extend="both")
        lines = "0.3" if surface.signed else "white"
        ax.contour(a, b, level, levels=scale.levels(), colors=lines, linewidths=0.5, alpha=0.6)
    if surface.broken is not None and surface.broken.any():
        everywhere = Rectangle(
            (0, 0), 1, 1, transform=ax.transAxes, fc=BROKEN[0], ec=BROKEN[1], hatch="//////", lw=0
        )
        # Visible only where no colour covers it.
        everywhere.set_zorder(0)
        ax.add_patch(everywhere)
        ax.set_xlim(surface.alphas[0], surface.alphas[-1])
        ax.set_ylim(surface.betas[0], surface.betas[-1])
    if all(side[0] <= at <= side[-1] for side, at in zip((surface.alphas, surface.betas), surface.origin)):
        cross = "0.1" if surface.signed else "white"
        ax.plot(*surface.origin, "+", color=cross, ms=9, mew=1.6, clip_on=False)
    if surface.dots is not None:
        places = np.argwhere(surface.dots)
        ax.plot(
            surface.alphas[places[:, 0]], surface.betas[places[:, 1]], ".", color="white", ms=1.5, alpha=0.8
        )
    if len(surface.path):
        walk = np.array([place[:2] for place in surface.path])
        ax.plot(walk[:, 0], walk[:, 1], "-o", color="white", mec="0.1", ms=4, lw=1.2)
        ax.set_xlim(surface.alphas[0], surface.alphas[-1])
        ax.set_ylim(surface.betas[0], surface.betas[-1])
    ax.set_box_aspect(1)
    ax.tick_params(labelsize=7)
    ax.locator_params(nbins=5)
    return drawn


def relief(ax: Any, surface: Surface, scale: _surface_charts.Heights) -> Any:
    """Draw one surface in 3-D, from the same side as on the page."""
    level = _surface_charts.fine(scale(np.asarray(surface.values, dtype=float))).T
    sides = zip((surface.alphas, surface.betas), level.T.shape)
    a, b = np.meshgrid(*(np.linspace(side[0], side[-1], count) for side, count in sides))
    low, high = scale.ends()
    drawn = ax.plot_surface(
        a,
        b,
        level,
        cmap=_colours(surface.signed),
        vmin=low,
        vmax=high,
        lw=0.15,
        edgecolor=(1, 1, 1, 0.25),
        rcount=70,
        ccount=70,
    )
    ax.set_zlim(low, high)
    values, texts = scale.ticks()
    ax.set_zticks(values, texts, fontsize=7)
    ax.set_xticks([])
    ax.set_yticks([])
    for side in (ax.xaxis, ax.yaxis, ax.zaxis):
        side.pane.set_visible(False)
        side.line.set_color("0.8")
    ax.zaxis.set_tick_params(pad=-1)
    ax.grid(False)
    ax.view_init(28, -48)
    ax.set_box_aspect((1, 1, 0.75), zoom=1.15)
    return drawn


def _colours(signed: bool) -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap(_surface_charts.colours(signed) / 255)
