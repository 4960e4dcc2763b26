"""Heat maps as SVG: layers by steps, colours on a log scale."""

from __future__ import annotations

import base64
import math

import numpy as np
from markupsafe import Markup

from skipscope._numbers import short
from skipscope.report._charts import Heat
from skipscope.report._markup import ellipsis, join, tag
from skipscope.report._palette import heat_png
from skipscope.report._scale import whole_axis
from skipscope.report._svg import LETTER


def heat(chart: Heat, width: int) -> Markup:
    """A heat map of ``width`` pixels, on a log scale, with its key; grey is zero, white is unknown."""
    narrow = width < 500
    rows, _ = chart.values.shape
    height = min(460, max(150, rows * 12)) + 96
    labels = [ellipsis(name, 14 if narrow else 28) for name in chart.rows]
    step = max(1, math.ceil(rows * 13 / (height - 96)))
    left = 10 + max([len(label) for label in labels[::step]] or [1]) * LETTER
    top, bottom = 28.0, height - 68.0
    png, low, high = heat_png(chart.values)
    x = whole_axis(
        float(chart.columns[0]), float(chart.columns[-1]), left, width - 14, most=4 if narrow else 8
    )
    pitch = (bottom - top) / rows
    parts = [
        tag("text", chart.title, x=2, y=13, class_="title"),
        _image(png, left, top, width - 14 - left, bottom - top),
        *(
            tag(
                "text", labels[i], x=left - 6, y=top + (i + 0.5) * pitch + 4, text_anchor="end", class_="tick"
            )
            for i in range(0, rows, step)
        ),
        *(
            tag("text", label, x=x(v), y=bottom + 17, text_anchor="middle", class_="tick")
            for v, label in x.ticks
        ),
        tag(
            "text",
            chart.x_title,
            x=(left + width - 14) / 2,
            y=bottom + 34,
            text_anchor="middle",
            class_="title",
        ),
    ]
    for mark in chart.events:
        at = x.at(mark.x)
        late = at > width / 2
        parts += [
            tag("line", x1=at, x2=at, y1=top - 4, y2=bottom, class_="mark"),
            tag("text", ellipsis(mark.label, 40, keep="start"), x=at + (-5 if late else 5), y=top - 6,
                text_anchor="end" if late else "start", class_="note"),
        ]  # fmt: skip
    parts.append(_key(left, bottom + 46, min(180.0, width - left - 90), low, high))
    return tag(
        "svg", *parts, viewBox=f"0 0 {width} {height:.0f}", class_="chart", role="img", aria_label=chart.title
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
