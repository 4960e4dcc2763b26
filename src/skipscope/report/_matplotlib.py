"""Matplotlib renderer of lines, bars and networks, for figures in papers and notebooks.

Heat maps and surfaces are in `_matplotlib_maps.py`, which registers itself here.
"""

from __future__ import annotations

import functools
import textwrap
from typing import Any

import numpy as np

from skipscope._errors import SkipscopeError
from skipscope._printable import printable_lines
from skipscope._table import latex_text
from skipscope.report._arcs import thickness
from skipscope.report._charts import Bars, Chart, Lines, Mark, Network, Series
from skipscope.report._figure_style import current
from skipscope.report._markup import clean
from skipscope.report._palette import DASHES, LIGHT, PLOT_MARKERS
from skipscope.report._svg import spread
from skipscope.shortcuts import KINDS

# The gid of a highlighted line, by which a later result in the same axes counts the lines already there.
OURS = "skipscope"


def new_figure(width: float, height: float) -> Any:
    """Create a figure of the style's size: a plain figure for a file, or a pyplot figure."""
    look = current()
    if look.figsize is not None:
        width, height = look.figsize
    elif look.width is not None:
        width, height = look.width, height * look.width / width
    if look.to_file:
        from matplotlib.figure import Figure

        return Figure(figsize=(width, height), layout="constrained")
    import matplotlib.pyplot as plt

    return plt.figure(figsize=(width, height), layout="constrained")


def new_axes(width: float = 7.2, height: float = 4.0, **options: Any) -> Any:
    """Create axes in a new figure."""
    return new_figure(width, height).subplots(**options)


def require_flat(ax: Any, what: str) -> Any:
    """Return the axes if they are two-dimensional.

    Raises:
        SkipscopeError: the axes are 3-D.
    """
    if getattr(ax, "name", "") == "3d":
        raise SkipscopeError(
            "plot",
            f"{what} is not drawn into 3-D axes",
            expected="two-dimensional axes",
            got="3-D axes",
            cure="plt.figure().add_subplot()",
        )
    return ax


@functools.singledispatch
def draw(chart: Chart, ax: Any = None, **options: Any) -> Any:
    """Draw a chart into ``ax`` or new axes. Returns the axes."""
    raise TypeError(type(chart).__name__)


# --- lines ---


@draw.register
def _(chart: Lines, ax: Any = None, *, label: str | None = None) -> Any:
    ax, legend = new_axes() if ax is None else require_flat(ax, "a line"), current().legend
    before = sum(line.get_gid() == OURS for line in ax.get_lines())
    for series in chart.series:
        _series(ax, chart, series, before, label if len(chart.series) == 1 else None)
    if not before:
        _frame(ax, chart)
    if (limits := current().limits) is not None:
        ax.set_ylim(*limits)
    for mark in chart.marks:
        ax.axvline(mark.x, color="0.5", lw=0.8, ls=(0, (3, 3)))
        remark(ax, mark)
    named = [s for s in chart.series if s.label and not s.faint]
    if chart.back and len(named) > 1 and not before and legend:
        _names(ax, chart, named)
    elif legend and len(ax.get_legend_handles_labels()[1]) > 1:
        ax.legend(frameon=False, fontsize=8)
    if chart.foot:
        foot(ax, (f"{label}: " if label else "") + chart.foot)
    return ax


def _frame(ax: Any, chart: Lines) -> None:
    """Set scales, ticks and labels, which the first result in the axes determines."""
    from matplotlib.ticker import MaxNLocator

    if chart.log_y:
        ax.set_yscale("log")
    if chart.log_x:
        ax.set_xscale("log")
    elif chart.ticks:
        ax.set_xticks(list(chart.ticks), list(chart.ticks.values()))
    elif all(float(x).is_integer() for s in chart.series for x in s.x):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if chart.level:
        ax.axhline(chart.level[0], color="0.5", lw=0.8, ls=(0, (3, 3)))
    ax.set_xlabel(plain(chart.x_title))
    ax.set_ylabel("\n".join(textwrap.wrap(plain(chart.y_title), 44)))
    calm(ax)


def _series(ax: Any, chart: Lines, series: Series, before: int, label: str | None) -> None:
    style = (series.style + before) % len(LIGHT)
    name = plain(label or series.label)
    # An earlier result may have the same name; label= avoids that.
    if name in ax.get_legend_handles_labels()[1]:
        name = f"{name} ({before + 1})"
    if series.faint or (series.frame is not None and series.frame != chart.frame):
        ax.plot(series.x, _visible(series.y, chart.log_y), color="0.65", lw=0.7)
        return
    ax.plot(
        series.x,
        _visible(series.y, chart.log_y),
        color=LIGHT[style],
        lw=1.8,
        gid=OURS,
        label=name or None,
        linestyle="none" if series.points else dash(style),
        marker=PLOT_MARKERS[style],
        ms=4,
        markevery=max(1, len(series.x) // 12),
    )
    # The axis also covers points whose values are not finite.
    ax.dataLim.update_from_data_x(series.x, ignore=False)
    if series.low is not None and series.high is not None:
        ax.fill_between(series.x, series.low, series.high, color=LIGHT[style], alpha=0.16, lw=0)


def _names(ax: Any, chart: Lines, named: list[Series]) -> None:
    """Name lines that are read from the right at their left end, with the y ticks on the right."""
    ax.yaxis.tick_right()
    ax.yaxis.set_label_position("right")
    ax.spines["left"].set_visible(False)
    ax.spines["right"].set_visible(True)
    first = [
        (s, next((y for y in s.y if np.isfinite(y) and (y > 0 or not chart.log_y)), None)) for s in named
    ]
    ends = sorted(((y, s) for s, y in first if y is not None), key=lambda end: end[0])
    # Names are kept apart in points, which requires the final layout.
    ax.get_figure(root=True).draw_without_rendering()
    points = [ax.transData.transform((0, y))[1] * 72 / ax.get_figure(root=True).dpi for y, _ in ends]
    for place, point, (y, series) in zip(spread(points, 11.0, -1e9, 1e9), points, ends):
        at = (min(series.x), y)
        ax.annotate(
            plain(series.label),
            at,
            (-7, place - point),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8.5,
            color=LIGHT[series.style % len(LIGHT)],
        )


def _visible(values: Any, log: bool) -> np.ndarray:
    """Copy the values, with a gap for each that a log axis cannot show."""
    array = np.array([np.nan if v is None else v for v in values], dtype=float)
    if log:
        array[array <= 0] = np.nan
    return array


def dash(style: int) -> Any:
    """Dash pattern of a series, for matplotlib."""
    pattern = DASHES[style % len(DASHES)]
    return (0, tuple(float(d) for d in pattern.split())) if pattern else "-"


# --- bars ---


@draw.register
def _(chart: Bars, ax: Any = None, *, most: int = 40) -> Any:
    count = min(len(chart.labels), most)
    ax = (
        new_axes(7.2, 1.2 + 0.2 * count * max(1, len(chart.names)))
        if ax is None
        else require_flat(ax, "a bar chart")
    )
    thick = 0.8 / len(chart.names)
    for k, name in enumerate(chart.names):
        at = np.arange(count) + (k + 0.5) * thick - 0.4
        values = np.array(chart.values[k][:count], dtype=float)
        colour = LIGHT[chart.styles[k] % len(LIGHT)]
        # On an axis without zero the length of a bar means nothing, so markers are drawn.
        if chart.log:
            ax.plot(values, at, PLOT_MARKERS[k % len(PLOT_MARKERS)], color=colour, label=plain(name))
        else:
            hatch = ("", "///", "...", "xxx")[k % 4]
            ax.barh(at, values, thick * 0.9, color=colour, label=plain(name), hatch=hatch, edgecolor="white")
        if chart.low is not None and chart.high is not None:
            ends = np.array([chart.low[k][:count], chart.high[k][:count]], dtype=float)
            ax.hlines(at, ends[0], ends[1], color="0.2", lw=1)
    ax.set_yticks(range(count), [plain(label) for label in chart.labels[:count]], fontsize=8)
    ax.set_ylim(count - 0.4, -0.6)
    if chart.log:
        ax.set_xscale("log")
    ax.set_xlabel(
        plain(chart.title)
        + (f" (the first {count} of {len(chart.labels)})" if len(chart.labels) > count else "")
    )
    calm(ax, "x")
    if len(chart.names) > 1 and current().legend:
        ax.legend(frameon=False, fontsize=8)
    return ax


# --- the network ---


@draw.register
def _(chart: Network, ax: Any = None, *, names: bool = True) -> Any:
    from matplotlib.patches import Arc as Curve

    count = len(chart.layers)
    rise = {arc: 0.9 * (arc.end + 1 - arc.start) ** 0.75 for arc in chart.arcs}
    top = max(rise.values(), default=1.0)
    width = min(14.0, max(6.0, 0.3 * count))
    height = 1.3 + width * top / (count + 1)
    ax = new_axes(width, height) if ax is None else require_flat(ax, "a network")
    ax.plot([-0.4, count + 0.4], [0, 0], color="0.4", lw=1, zorder=1)
    size = max(1.5, min(6.0, 160 / max(1, count)))
    ax.plot(np.arange(count) + 0.5, np.zeros(count), "s", color="0.35", ms=size, zorder=2)
    for arc in chart.arcs:
        style = KINDS.index(arc.kind) if arc.kind in KINDS else 5
        middle, span = (arc.start + arc.end + 1) / 2, arc.end + 1 - arc.start
        curve = Curve(
            (middle, 0),
            span,
            2 * rise[arc],
            theta1=0,
            theta2=180,
            color=LIGHT[style],
            lw=thickness(arc) * 0.5,
            ls=dash(style),
        )
        ax.add_patch(curve)
    ax.set_ylim(-0.6, 1.08 * top)
    ax.set_xlim(-0.6, count + 0.6)
    step = max(1, count // 36)
    labels = [plain(name) for name in chart.layers[::step]] if names else []
    ax.set_xticks(
        (np.arange(0, count, step) + 0.5)[: len(labels)],
        labels,
        rotation=55,
        ha="right",
        rotation_mode="anchor",
        fontsize=7,
    )
    ax.tick_params(length=0)
    ax.set_yticks([])
    ax.set_aspect("equal", adjustable="box")
    ax.spines[:].set_visible(False)
    return ax


# --- the look ---


def calm(ax: Any, grid: str = "y") -> None:
    """Remove the frame's top and right sides, and put a light grid in the background."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, color="0.9", lw=0.8)
    ax.set_axisbelow(True)


def remark(ax: Any, mark: Mark) -> None:
    """Write a mark's label at the top of the axes, beside its x position."""
    ax.annotate(
        plain(mark.label),
        (mark.x, 1),
        (4, -4),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        va="top",
        fontsize=8,
        color="0.35",
    )


def foot(ax: Any, sentence: str) -> None:
    """Add a sentence under the picture, below those of results drawn before."""
    if not current().notes:
        return
    wrapped = "\n".join(textwrap.wrap(plain(sentence), 100))
    label = ax.get_xlabel()
    ax.set_xlabel(f"{label}\n{wrapped}" if label else wrapped, fontsize=8)


def plain(text: str) -> str:
    """Text that matplotlib reads neither as mathematics nor, where it draws by LaTeX, as commands."""
    import matplotlib

    if matplotlib.rcParams["text.usetex"]:
        return latex_text(text)
    return printable_lines(clean(text)).replace("$", r"\$")
