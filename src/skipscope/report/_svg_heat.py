"""SVG renderer of heat maps: layers by steps, colours on a log scale."""

from __future__ import annotations

import base64
import math

import numpy as np
from markupsafe import Markup

from skipscope._numbers import short
from skipscope.report._charts import Heat
from skipscope.report._markup import ellipsis, join, tag
from skipscope.report._palette import heat_png
from skipscope.report._scale import Axis, whole_axis
from skipscope.report._svg import LETTER, rooms, sheet, words


def heat(chart: Heat, width: int) -> Markup:
    """Draw a log-scale heat map, ``width`` pixels wide, with its key.

    Zero is grey, a value that is not finite is striped, and an unknown value is white.
    """
    rows = len(chart.values)
    inside = min(460, max(150, rows * 12))
    labels = [ellipsis(name, 14 if width < 500 else 28) for name in chart.rows]
    step = max(1, math.ceil(rows * 13 / inside))
    left, right = 10 + max([len(label) for label in labels[::step]] or [1]) * LETTER, width - 14
    png, low, high = heat_png(chart.values, (round(right - left), inside))
    x = whole_axis(
        float(chart.columns[0]), float(chart.columns[-1]), left, right, most=4 if width < 500 else 8
    )
    events, top = _events(chart, x, width, inside)
    bottom, pitch = top + inside, inside / rows
    parts = [
        words(chart.title, 2, 13, "title"),
        _image(png, left, top, right - left, inside),
        *(
            words(labels[i], left - 6, top + (i + 0.5) * pitch + 4, anchor="end")
            for i in range(0, rows, step)
        ),
        *(words(label, x.at(value), bottom + 17, anchor="middle") for value, label in x.ticks),
        words(chart.x_title, (left + right) / 2, bottom + 34, "title", "middle"),
        *events,
        _key(left, bottom + 46, min(180.0, width - left - 90), low, high),
    ]
    return sheet(parts, width, bottom + 68, chart.title)


def _events(chart: Heat, x: Axis, width: int, inside: float) -> tuple[list[Markup], float]:
    """Draw the events' lines and labels. Returns them and the top of the map, below the labels."""
    labels = [ellipsis(mark.label, 40, keep="start") for mark in chart.events]
    places = [x.at(mark.x) for mark in chart.events]
    found = rooms(places, [len(label) * LETTER for label in labels], 2, width - 2)
    top = 28.0 + 15 * max([room[1] + 1 for room in found if room] or [0])
    parts = []
    for place, label, room in zip(places, labels, found):
        above = top - 4 if room is None else 19.0 + 15 * room[1]
        parts.append(tag("line", x1=place, x2=place, y1=above, y2=top + inside, class_="mark"))
        if room:
            before = room[0] < place
            parts.append(
                words(
                    label,
                    place - 5 if before else place + 5,
                    above + 10,
                    "note",
                    "end" if before else "start",
                )
            )
    return parts, top


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
