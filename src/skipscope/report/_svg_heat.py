"""Heat maps as SVG: layers by steps, colours on a log scale."""

from __future__ import annotations

import base64
import math

import numpy as np
from markupsafe import Markup

from skipscope._numbers import short
from skipscope.report._charts import Heat, Mark
from skipscope.report._markup import ellipsis, join, tag
from skipscope.report._palette import heat_png
from skipscope.report._scale import whole_axis
from skipscope.report._svg import LETTER, sheet, words


def heat(chart: Heat, width: int) -> Markup:
    """A heat map of ``width`` pixels, on a log scale, with its key; grey is zero, white is unknown."""
    rows = len(chart.values)
    inside = min(460, max(150, rows * 12))
    labels = [ellipsis(name, 14 if width < 500 else 28) for name in chart.rows]
    step = max(1, math.ceil(rows * 13 / inside))
    left, right, top = 10 + max([len(label) for label in labels[::step]] or [1]) * LETTER, width - 14, 28.0
    bottom, pitch = top + inside, inside / rows
    png, low, high = heat_png(chart.values)
    x = whole_axis(
        float(chart.columns[0]), float(chart.columns[-1]), left, right, most=4 if width < 500 else 8
    )
    parts = [
        words(chart.title, 2, 13, "title"),
        _image(png, left, top, right - left, inside),
        *(
            words(labels[i], left - 6, top + (i + 0.5) * pitch + 4, anchor="end")
            for i in range(0, rows, step)
        ),
        *(words(label, x.at(value), bottom + 17, anchor="middle") for value, label in x.ticks),
        words(chart.x_title, (left + right) / 2, bottom + 34, "title", "middle"),
        *(_event(mark, x.at(mark.x), top, bottom, width) for mark in chart.events),
        _key(left, bottom + 46, min(180.0, width - left - 90), low, high),
    ]
    return sheet(parts, width, bottom + 68, chart.title)


def _event(mark: Mark, at: float, top: float, bottom: float, width: int) -> Markup:
    shift, anchor = (-5, "end") if at > width / 2 else (5, "start")
    return join(
        tag("line", x1=at, x2=at, y1=top - 4, y2=bottom, class_="mark"),
        words(ellipsis(mark.label, 40, keep="start"), at + shift, top - 6, "note", anchor),
    )


def _image(png: bytes, x: float, y: float, width: float, height: float) -> Markup:
    address = "data:image/png;base64," + base64.b64encode(png).decode()
    return tag(
        "image",
        href=address,
        x=x,
        y=y,
        width=width,
        height=height,
        preserveAspectRatio="none",
        class_="pixels",
    )


def _key(x: float, y: float, width: float, low: float, high: float) -> Markup:
    ramp, _, _ = heat_png(np.geomspace(1, 10, 64)[None])
    return join(
        _image(ramp, x, y, width, 8),
        tag("text", short(low, 2), x=x, y=y + 21, class_="tick"),
        tag("text", short(high, 2), x=x + width, y=y + 21, text_anchor="end", class_="tick"),
    )
