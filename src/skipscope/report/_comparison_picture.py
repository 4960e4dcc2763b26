"""Summary figure of a comparison, for a README or a slide: network, gradient flow and two surfaces."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np

from skipscope.comparison import Comparison
from skipscope.report import _matplotlib as by
from skipscope.report import _matplotlib_maps as maps
from skipscope.report import _surface_charts, _view_comparison, _view_flow, _view_shortcuts
from skipscope.report._charts import Surface, Surfaces
from skipscope.report._markup import raised
from skipscope.report._palette import LIGHT


def comparison_picture(result: Comparison) -> Any:
    """Draw the figure of a comparison. Returns its axes: network, flow, and two networks' surfaces.

    Args:
        result: result of ``compare``.
    """
    figure = by.new_figure(11.0, 7.4)
    head, top, bottom = figure.subfigures(3, 1, height_ratios=[0.5, 0.75, 3.3])
    words = textwrap.fill(raised(result.summary[0]) if result.summary else result.subject, 92)
    head.text(0.02, 0.5, by.plain(words), fontsize=14, family="serif", va="center")
    network = _network(result, top.subplots())
    left, right = bottom.subfigures(1, 2, width_ratios=[1.3, 1.0])
    flow = {twin.name: result.flow[twin.name] for twin in result.twins if twin.name in result.flow}
    lines = by.draw(_view_flow.flow_lines(flow, _view_comparison.styles(result)), left.subplots())
    _caption(lines, "How much gradient arrives at each depth")
    return np.array([network, lines, *np.ravel(_surfaces(result, right))])


def _caption(ax: Any, words: str) -> None:
    ax.set_title(words, fontsize=9, color="0.35", loc="left", pad=9)


def _network(result: Comparison, ax: Any) -> Any:
    name = _view_comparison.main_twin(result)
    if name is None or name not in result.found:
        ax.set_axis_off()
        return ax
    split = result.split.get(name)
    shares = {s.name: s.share for s in split} if split else None
    chart = _view_shortcuts.drawing(result.found[name], shares)
    _caption(
        ax,
        f"{len(chart.layers)} layers, {len(chart.arcs)} shortcuts"
        + ("; thickness: the share of gradient that a shortcut carries" if shares else ""),
    )
    return by.draw(chart, ax, names=False)


def _surfaces(result: Comparison, figure: Any) -> Any:
    pair = result.surfaces.get("trained") or next(iter(result.surfaces.values()), None)
    if pair is None or any(s.values.ndim < 2 for s in pair.surfaces.values()):
        return np.array([])
    style = _view_comparison.styles(result)
    having = [name for name in pair.surfaces if len(result.found.get(name, ()))]
    lacking = [name for name in pair.surfaces if name not in having]
    # Prefer a network without shortcuts that has learnt: a flat surface says nothing about smoothness.
    lacking.sort(key=lambda name: bool(pair.surfaces[name].label))
    shown = [*lacking[:1], *having[:1]] or list(pair.surfaces)[:2]
    chart = Surfaces(
        [
            Surface(s.values, s.alphas, s.betas, name, s.label)
            for name, s in ((n, pair.surfaces[n]) for n in shown)
        ]
    )
    axes = np.ravel(figure.subplots(len(shown), 1, subplot_kw={"projection": "3d"}))
    scale = _surface_charts.heights(chart)
    for ax, surface in zip(axes, chart.surfaces):
        maps.relief(ax, surface, scale)
        note = f"\n{surface.note}" if surface.note else ""
        colour = LIGHT[style.get(surface.label, 5) % len(LIGHT)]
        ax.text2D(
            0.0,
            0.9,
            by.plain(f"loss surface\n{surface.label}{note}"),
            fontsize=9,
            color=colour,
            transform=ax.transAxes,
        )
    return axes
