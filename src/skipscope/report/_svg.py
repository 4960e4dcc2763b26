"""Lines, bars and heat maps as SVG: crisp at any size, readable without scripts, and the same in print.

Every chart is drawn at two widths, so that its letters keep their size on a phone; the style sheet shows one of them.
Colours are the style sheet's variables; each series also has a marker and a dash of its own.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup

from skipscope._numbers import short
from skipscope.report._charts import Bars, Heat, Lines, Series
from skipscope.report._markup import ellipsis, join, tag
from skipscope.report._palette import DASHES, MARKERS, heat_png
from skipscope.report._scale import Axis, axis, whole_axis

WIDE, NARROW = 720, 344
LETTER = 6.6  # the mean width of a letter at 13 px; generous, so that nothing is cut off


def lines(chart: Lines, width: int) -> Markup:
    """A line chart of ``width`` pixels."""
    narrow = width < 500
    height = 250 if narrow else 330
    named = _named(chart)
    beside = not narrow and 1 < len(named) <= 9
    words = [s.label for s in named] + ([chart.level[1]] if chart.level else [])
    room = min(200, 27 + max(len(word) for word in words) * LETTER) if beside else 14
    legend, top = (join(), 30) if beside or len(named) < 2 else _legend(named, width)
    y = axis(_heights(chart), height - 46, top, log=chart.log_y, zero=not chart.log_y)
    ticks = 12 + max([len(label) for _, label in y.ticks] or [1]) * 7.4
    left, right = (room, ticks) if beside and chart.back else (ticks, room)
    x = _x_axis(chart, left, width - right, most=4 if narrow else 8)
    body = [
        _grid(chart, x, y, width, height, beside=beside),
        *(_band(s, x, y) for s in chart.series),
        *(_line(s, x, y, chart) for s in chart.series),
        _remarks(chart, x, y, width, beside=beside),
        _hits(chart, x, y),
        _end_labels(chart, named, x, y) if beside else legend,
    ]
    return tag(
        "svg",
        *body,
        viewBox=f"0 0 {width} {height}",
        class_="chart",
        role="img",
        aria_label=chart.y_title or "a chart of lines",
    )


def _named(chart: Lines) -> list[Series]:
    named: dict[str, Series] = {}
    for series in chart.series:
        if series.label and not series.faint:
            named.setdefault(series.label, series)
    return list(named.values())


def _heights(chart: Lines) -> list[float]:
    return [
        float(v)
        for s in chart.series
        for values in (s.y, s.low, s.high)
        if values is not None
        for v in values
        # A band that reaches zero or below says little on a log axis and would stretch it
        if not (chart.log_y and values is not s.y and not v > 0)
    ] + ([chart.level[0]] if chart.level else [])


def _x_axis(chart: Lines, start: float, end: float, most: int) -> Axis:
    xs = [float(v) for s in chart.series for v in s.x if math.isfinite(v)]
    if chart.log_x:
        return axis(xs, start, end, log=True, most=most)
    low, high = (min(xs), max(xs)) if xs else (0.0, 1.0)
    if chart.ticks is None:
        return whole_axis(low, high, start, end, most)
    made = whole_axis(low, high, start, end, most)
    shown = list(chart.ticks.items())
    return Axis(made.low, made.high, start, end, ticks=tuple(shown[:: max(1, math.ceil(len(shown) / most))]))


def _grid(chart: Lines, x: Axis, y: Axis, width: int, height: int, *, beside: bool) -> Markup:
    parts = []
    # Lines that are named at their left end leave the right side to the numbers
    side, anchor = (x.end + 8, "start") if chart.back and beside else (x.start - 7, "end")
    for value, label in y.ticks:
        at = y.at(value)
        parts += [
            tag("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="grid"),
            tag("text", label, x=side, y=at + 4, text_anchor=anchor, class_="tick"),
        ]
    for value, label in x.ticks:
        at = x.at(value)
        parts += [
            tag("line", x1=at, x2=at, y1=y.start, y2=y.start + 4, class_="axis"),
            tag("text", label, x=at, y=y.start + 18, text_anchor="middle", class_="tick"),
        ]
    parts.append(tag("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axis"))
    at, anchor = (width - 2, "end") if chart.back and beside else (2, "start")
    parts.append(tag("text", chart.y_title, x=at, y=13, text_anchor=anchor, class_="title"))
    parts.append(
        tag(
            "text", chart.x_title, x=(x.start + x.end) / 2, y=height - 6, text_anchor="middle", class_="title"
        )
    )
    return join(*parts)


def _remarks(chart: Lines, x: Axis, y: Axis, width: int, *, beside: bool) -> Markup:
    """What is written into the chart, over the lines: a level of reference, and places worth a word."""
    parts = []
    if chart.level:
        at = y.at(chart.level[0])
        parts.append(tag("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="level"))
        if not beside:
            parts.append(
                tag("text", chart.level[1], x=x.end, y=at - 5, text_anchor="end", class_="note halo")
            )
    for mark in chart.marks:
        at = x.at(mark.x)
        late = at > (x.start + x.end) / 2
        label = ellipsis(mark.label, 48 if width > 500 else 26, keep="start")
        place, anchor = (at - 6, "end") if late else (at + 6, "start")
        parts += [
            tag("line", x1=at, x2=at, y1=y.end, y2=y.start, class_="mark"),
            tag("text", label, x=place, y=y.end + 11, text_anchor=anchor, class_="note halo"),
        ]
    return join(*parts)


def _band(series: Series, x: Axis, y: Axis) -> Markup:
    if series.low is None or series.high is None:
        return join()
    upper = [(x(a), y(b)) for a, b in zip(series.x, series.high)]
    lower = [(x(a), y(b)) for a, b in zip(series.x, series.low)]
    points = [p for p in [*_thin(upper), *_thin(lower)[::-1]] if None not in p]
    return tag("path", d=_path(points) + "Z", class_=f"band s{series.style % len(MARKERS)}")


def _line(series: Series, x: Axis, y: Axis, chart: Lines) -> Markup:
    style = series.style % len(MARKERS)
    frame = series.frame
    strong = frame is None or frame == chart.frame
    classes = f"line s{style}" + (" faint" if series.faint or not strong else "")
    points = _thin([(x(a), y(b)) for a, b in zip(series.x, series.y)])
    parts = []
    if not series.points:
        for run in _runs(points):
            parts.append(tag("path", d=_path(run), class_=classes, stroke_dasharray=DASHES[style] or None))
    seen = [p for p in points if None not in p]
    if not series.faint and seen:
        step = max(1, len(seen) // (60 if series.points else 12 if x.end - x.start > 400 else 6))
        # Markers of different lines start at different points, so that lines on top of each other stay apart
        shown = seen if len(seen) <= 16 else seen[(style * step) // 4 :: step]
        parts.append(
            tag("path", d="".join(MARKERS[style](px, py) for px, py in shown), class_=f"marker s{style}")
        )
    return tag(
        "g", *parts, data_frame=frame, class_=None if frame is None else "frame" + (" on" if strong else "")
    )


def _runs(points: Sequence[tuple]) -> list[list[tuple]]:
    runs: list[list[tuple]] = [[]]
    for point in points:
        if None in point:
            runs.append([])
        else:
            runs[-1].append(point)
    return [run for run in runs if run]


def _thin(points: list[tuple], most: int = 400) -> list[tuple]:
    """At most about ``most`` points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= most:
        return points
    kept: list[tuple] = [points[0]]
    stretch = math.ceil(2 * len(points) / most)
    for i in range(1, len(points) - 1, stretch):
        part = [
            (j, points[j][1]) for j in range(i, min(i + stretch, len(points) - 1)) if points[j][1] is not None
        ]
        if part:
            kept += [
                points[j]
                for j in sorted({min(part, key=lambda p: p[1])[0], max(part, key=lambda p: p[1])[0]})
            ]
        else:
            kept.append(points[i])
    return [*kept, points[-1]]


def _path(points: Sequence[tuple]) -> str:
    return "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points) if points else ""


def _hits(chart: Lines, x: Axis, y: Axis) -> Markup:
    """Invisible discs that tell a pointer the numbers; a title serves where scripts do not run."""
    total = sum(len(s.x) for s in chart.series if not s.faint)
    step = max(1, math.ceil(total / (160 if x.end - x.start > 400 else 60)))  # a finger is no mouse
    parts = []
    for series in chart.series:
        if series.faint or (series.frame is not None and series.frame != chart.frame):
            continue
        for i in range(0, len(series.x), step):
            at = x(series.x[i]), y(series.y[i])
            if None not in at:
                told = (
                    series.tips[i]
                    if series.tips
                    else f"{series.label}  {short(float(series.x[i]))}: {short(float(series.y[i]))}"
                )
                parts.append(tag("circle", tag("title", told), cx=at[0], cy=at[1], r=8, class_="hit"))
    return join(*parts)


def swatch(style: int, at_x: float, at_y: float) -> Markup:
    """A short piece of line with its marker."""
    style %= len(MARKERS)
    return join(
        tag(
            "path",
            d=f"M{at_x:.1f} {at_y:.1f}h22",
            class_=f"line s{style}",
            stroke_dasharray=DASHES[style] or None,
        ),
        tag("path", d=MARKERS[style](at_x + 11, at_y), class_=f"marker s{style}"),
    )


def _legend(named: Sequence[Series], width: int, start: float = 24) -> tuple[Markup, float]:
    parts, at_x, at_y = [], 4.0, start + 8
    for series in named:
        label = ellipsis(series.label, int((width - 50) / LETTER), keep="start")
        needed = 30 + len(label) * LETTER + 14
        if at_x > 4 and at_x + needed > width:
            at_x, at_y = 4.0, at_y + 19
        parts += [
            swatch(series.style, at_x, at_y - 4),
            tag("text", label, x=at_x + 28, y=at_y, class_="label"),
        ]
        at_x += needed
    return join(*parts), at_y + 16


def _end_labels(chart: Lines, named: Sequence[Series], x: Axis, y: Axis) -> Markup:
    """The lines' names at their ends, moved apart where they would touch."""
    ends: list[tuple[float, str, int | None]] = (
        [(y.at(chart.level[0]), chart.level[1], None)] if chart.level else []
    )
    for series in named:
        heights = [y(v) for v in series.y]
        last = next((h for h in (heights if chart.back else reversed(heights)) if h is not None), None)
        if last is not None:
            ends.append((last, ellipsis(series.label, 27, keep="start"), series.style % len(MARKERS)))
    ends.sort(key=lambda end: end[0])
    places = spread([end[0] for end in ends], 16, y.end - 4, y.start + 2)
    side, anchor, at_x = (-1, "end", x.start) if chart.back else (1, "start", x.end)
    parts = []
    for place, (_, words, style) in zip(places, ends):
        kind = "note" if style is None else f"label ink s{style}"
        if style is not None:  # the marker again, so that a name is found without its colour
            parts.append(tag("path", d=MARKERS[style](at_x + 11 * side, place), class_=f"marker s{style}"))
        shift = 19 if style is not None else 9
        parts.append(tag("text", words, x=at_x + shift * side, y=place + 4, text_anchor=anchor, class_=kind))
    return join(*parts)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted (sorted) ones, at least ``gap`` apart and within the range when there is room.

    Example:
        >>> spread([10, 11, 50], 10, 0, 100)
        [10, 20, 50]
    """
    places = list(wanted)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    if places and places[-1] > high:
        places[-1] = high
        for i in range(len(places) - 2, -1, -1):
            places[i] = min(places[i], places[i + 1] - gap)
    return places


# --- bars -----------------------------------------------------------------------------------------------------------


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


# --- heat -----------------------------------------------------------------------------------------------------------


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


def both(draw: Callable[..., Markup], *arguments) -> Markup:
    """A chart at both widths; the style sheet shows the one that fits."""
    return join(
        tag("div", draw(*arguments, WIDE), class_="wide"),
        tag("div", draw(*arguments, NARROW), class_="narrow"),
    )
