"""Horizontal bars as SVG; dots where the axis has no zero."""

from __future__ import annotations

from markupsafe import Markup

from skipscope._numbers import short
from skipscope.report._charts import Bars
from skipscope.report._markup import ellipsis, join, tag
from skipscope.report._palette import MARKERS
from skipscope.report._scale import Axis, axis
from skipscope.report._svg import LETTER


def bars(chart: Bars, width: int, most: int = 24) -> Markup:
    """Horizontal bars of ``width`` pixels; beyond ``most`` rows the rest is left to the table, and said so."""
    narrow = width < 500
    count = min(len(chart.labels), most)
    labels = [ellipsis(label, 18 if narrow else 34) for label in chart.labels[:count]]
    left = 8 + max([len(label) for label in labels] or [1]) * LETTER
    several = len(chart.names) > 1
    legend, top = _bar_legend(chart, width) if several else (join(), 26)
    shown = [
        float(v)
        for values in (chart.values, chart.low or [], chart.high or [])
        for row in values
        for v in row[:count]
    ]
    below = any(v < 0 for v in shown) and not chart.log
    x = axis(
        shown,
        left + (56 if below else 4),
        width - (58 if narrow else 70),
        log=chart.log,
        zero=not chart.log,
        most=3 if narrow else 6,
    )
    zero = x.start if chart.log else x(0.0) or x.start
    thick = 9 if several else 14
    pitch = len(chart.names) * (thick + 2) + 9
    parts = [tag("text", chart.title, x=2, y=13, class_="title"), legend]
    for i in range(count):
        middle = top + i * pitch + pitch / 2
        parts.append(
            tag(
                "text",
                labels[i],
                tag("title", chart.labels[i]),
                x=left - 2,
                y=middle + 4,
                text_anchor="end",
                class_="tick",
            )
        )
        for k in range(len(chart.names)):
            at_y = middle + (k - len(chart.names) / 2) * (thick + 2) + 1
            parts.append(_bar(chart, k, i, x, zero, at_y, thick))
    if len(chart.labels) > count:
        note = f"and {len(chart.labels) - count} more in the table"
        parts.append(tag("text", note, x=left, y=top + count * pitch + 16, class_="note"))
    height = top + count * pitch + (26 if len(chart.labels) > count else 6)
    parts.append(tag("line", x1=zero, x2=zero, y1=top, y2=top + count * pitch, class_="axis"))
    return tag(
        "svg", *parts, viewBox=f"0 0 {width} {height:.0f}", class_="chart", role="img", aria_label=chart.title
    )


def _bar(chart: Bars, k: int, i: int, x: Axis, zero: float, at_y: float, thick: float) -> Markup:
    value, style = float(chart.values[k][i]), chart.styles[k] % len(MARKERS)
    end = x(value)
    if end is None:
        return tag("text", "not measured", x=zero + 5, y=at_y + thick - 1, class_="note")
    whisker, reach, least = join(), end, end
    if chart.low is not None and chart.high is not None:
        a, b = x(float(chart.low[k][i])), x(float(chart.high[k][i]))
        if a is not None and b is not None:
            whisker = tag("path", d=f"M{a:.1f} {at_y + thick / 2:.1f}H{b:.1f}", class_="whisker")
            reach, least = max(end, b), min(end, a)
    told = tag("title", f"{chart.labels[i]}  {chart.names[k]}: {short(value)}")
    middle = at_y + thick / 2
    if chart.log:  # a bar's length means nothing where the axis has no zero: a dot on a thread
        drawn = join(
            tag("path", d=f"M{x.start:.1f} {middle:.1f}H{end:.1f}", class_="grid"),
            tag("path", told, d=MARKERS[style](end, middle), class_=f"marker s{style}"),
        )
    else:
        drawn = tag(
            "rect",
            told,
            x=min(zero, end),
            y=at_y,
            width=max(1.0, abs(end - zero)),
            height=float(thick),
            class_=f"bar s{style}",
            rx=1.5,
        )
    return join(
        drawn,
        whisker,
        tag("text", short(value), x=least - 5, y=middle + 4, text_anchor="end", class_="value") if value < 0 and not chart.log
        else tag("text", short(value), x=max(reach, zero) + (8 if chart.log else 5), y=middle + 4, class_="value"),
    )  # fmt: skip


def _bar_legend(chart: Bars, width: int) -> tuple[Markup, float]:
    parts, at_x, at_y = [], 4.0, 34.0
    for k, name in enumerate(chart.names):
        needed = 18 + len(name) * LETTER + 16
        if at_x > 4 and at_x + needed > width:
            at_x, at_y = 4.0, at_y + 19
        style = chart.styles[k] % len(MARKERS)
        parts += [
            tag("rect", x=at_x, y=at_y - 9, width=11.0, height=9.0, class_=f"bar s{style}"),
            tag("text", name, x=at_x + 17, y=at_y, class_="label"),
        ]
        at_x += needed
    return join(*parts), at_y + 10
