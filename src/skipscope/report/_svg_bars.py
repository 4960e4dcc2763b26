"""SVG renderer of horizontal bars, or of dots on an axis without zero."""

from __future__ import annotations

from markupsafe import Markup

from skipscope._numbers import short
from skipscope.report._charts import Bars
from skipscope.report._markup import ellipsis, join, tag
from skipscope.report._palette import MARKERS
from skipscope.report._scale import Axis, axis
from skipscope.report._svg import LETTER, sheet, words


def bars(chart: Bars, width: int, most: int = 24) -> Markup:
    """Draw horizontal bars, ``width`` pixels wide, for ``most`` rows; a note counts the other rows."""
    count, several = min(len(chart.labels), most), len(chart.names) > 1
    labels = [ellipsis(label, 18 if width < 500 else 34) for label in chart.labels[:count]]
    left = 8 + max([len(label) for label in labels] or [1]) * LETTER
    legend, top = _legend(chart, width) if several else (join(), 26.0)
    x = _axis(chart, count, left, width)
    zero = x.start if chart.log else x.at(0.0)
    thick = 9 if several else 14
    pitch = len(chart.names) * (thick + 2) + 9
    end = top + count * pitch
    parts = [words(chart.title, 2, 13, "title"), legend]
    for i in range(count):
        middle = top + (i + 0.5) * pitch
        name = join(labels[i], tag("title", chart.labels[i]))
        parts.append(words(name, left - 2, middle + 4, anchor="end"))
        for k in range(len(chart.names)):
            parts.append(
                _bar(chart, k, i, x, zero, middle + (k - len(chart.names) / 2) * (thick + 2) + 1, thick)
            )
    parts.append(tag("line", x1=zero, x2=zero, y1=top, y2=end, class_="axis"))
    if len(chart.labels) > count:
        parts.append(words(f"and {len(chart.labels) - count} more in the table", left, end + 16, "note"))
        end += 20
    return sheet(parts, width, end + 6, chart.title)


def _axis(chart: Bars, count: int, left: float, width: int) -> Axis:
    rows = [*chart.values, *(chart.low or []), *(chart.high or [])]
    shown = [float(value) for row in rows for value in row[:count]]
    # The values of negative bars are written on their left.
    margin = 56 if any(value < 0 for value in shown) and not chart.log else 4
    return axis(shown, left + margin, width - (58 if width < 500 else 70), log=chart.log, zero=not chart.log)


def _bar(chart: Bars, k: int, i: int, x: Axis, zero: float, at_y: float, thick: float) -> Markup:
    value, style = float(chart.values[k][i]), chart.styles[k] % len(MARKERS)
    end, middle = x(value), at_y + thick / 2
    if end is None:
        return words("not measured", zero + 5, middle + 4, "note")
    tip = tag("title", f"{chart.labels[i]}  {chart.names[k]}: {short(value)}")
    # On an axis without zero the length of a bar means nothing, so a marker on a thin line is drawn.
    if chart.log:
        drawn = join(
            tag("path", d=f"M{x.start:.1f} {middle:.1f}H{end:.1f}", class_="grid"),
            tag("path", tip, d=MARKERS[style](end, middle), class_=f"marker s{style}"),
        )
    else:
        start, long = min(zero, end), max(1.0, abs(end - zero))
        drawn = tag("rect", tip, x=start, y=at_y, width=long, height=thick, class_=f"bar s{style}", rx=1.5)
    low, high, whisker = _whisker(chart, k, i, x, middle)
    if value < 0 and not chart.log:
        number = words(short(value), min(end, low or end) - 5, middle + 4, "value", "end")
    else:
        number = words(
            short(value), max(end, zero, high or end) + (8 if chart.log else 5), middle + 4, "value"
        )
    return join(drawn, whisker, number)


def _whisker(chart: Bars, k: int, i: int, x: Axis, y: float) -> tuple[float | None, float | None, Markup]:
    if chart.low is None or chart.high is None:
        return None, None, join()
    low, high = x(float(chart.low[k][i])), x(float(chart.high[k][i]))
    if low is None or high is None:
        return None, None, join()
    return low, high, tag("path", d=f"M{low:.1f} {y:.1f}H{high:.1f}", class_="whisker")


def _legend(chart: Bars, width: int) -> tuple[Markup, float]:
    parts, at_x, at_y = [], 4.0, 34.0
    for k, name in enumerate(chart.names):
        needed = 18 + len(name) * LETTER + 16
        if at_x > 4 and at_x + needed > width:
            at_x, at_y = 4.0, at_y + 19
        style = chart.styles[k] % len(MARKERS)
        parts += [
            tag("rect", x=at_x, y=at_y - 9, width=11.0, height=9.0, class_=f"bar s{style}"),
            words(name, at_x + 17, at_y, "label"),
        ]
        at_x += needed
    return join(*parts), at_y + 10
