"""SVG renderer of line charts: bands, markers, names at the lines' ends, a reference level, tooltips."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from markupsafe import Markup

from skipscope._numbers import short
from skipscope.report._charts import Lines, Series
from skipscope.report._markup import ellipsis, join, tag
from skipscope.report._palette import DASHES, MARKERS
from skipscope.report._scale import Axis, axis, whole_axis
from skipscope.report._svg import LETTER, spread


def lines(chart: Lines, width: int) -> Markup:
    """Draw a line chart, ``width`` pixels wide."""
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
        # A band that reaches zero or below would stretch a log axis.
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
    # If lines are named at their left end, the tick labels are on the right.
    side, anchor = (x.end + 8, "start") if chart.back and beside else (x.start - 7, "end")
    rows, columns = [y.at(value) for value, _ in y.ticks], [x.at(value) for value, _ in x.ticks]
    length = x.end - x.start
    parts += [
        tag("path", d="".join(f"M{x.start:.1f} {at:.1f}h{length:.1f}" for at in rows), class_="grid"),
        tag("path", d="".join(f"M{at:.1f} {y.start:.1f}v4" for at in columns), class_="axis"),
    ]
    heights = [tag("text", label, x=side, y=at + 4) for (_, label), at in zip(y.ticks, rows)]
    places = [tag("text", label, x=at, y=y.start + 18) for (_, label), at in zip(x.ticks, columns)]
    parts += [
        tag("g", *heights, text_anchor=anchor, class_="tick"),
        tag("g", *places, text_anchor="middle", class_="tick"),
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
    """Draw the reference level and the marks, over the lines."""
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
    return tag("path", d=_path(points, _SOFT) + "Z", class_=f"band s{series.style % len(MARKERS)}")


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
        # Markers of different lines start at different points, so that overlapping lines can be told apart.
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
    """Keep about ``most`` points: the lowest and the highest of each stretch, so that no spike is lost."""
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


def _path(points: Sequence[tuple], invisible: float = 5.0) -> str:
    """SVG path through points, in relative coordinates to a tenth of a pixel (half as long as absolute ones).

    Example:
        >>> _path([(41.62, 168.3), (47.0, 171.04), (52.5, 170.0)])
        'M41.6 168.3l5.4 2.7 5.5-1'
    """
    kept = _without_invisible([(round(10 * px), round(10 * py)) for px, py in points], invisible)
    steps = [_pair(bx - ax, by - ay) for (ax, ay), (bx, by) in itertools.pairwise(kept)]
    line = " ".join(steps).replace(" -", "-")
    return "M" + _pair(*kept[0]) + (f"l{line}" if line else "") if kept else ""


# Tenths of a pixel within which a point of a band's edge may be dropped, because the edge is soft. Lines,
# which are 2 pixels wide, need the smaller default of _path.
_SOFT = 6.0


def _without_invisible(places: list[tuple[int, int]], invisible: float) -> list[tuple[int, int]]:
    """Drop points that are near the line between others (Ramer-Douglas-Peucker algorithm)."""
    keeps, stretches = {0, len(places) - 1}, [(0, len(places) - 1)]
    while stretches:
        first, last = stretches.pop()
        if last - first < 2:
            continue
        distances = [_distance(place, places[first], places[last]) for place in places[first + 1 : last]]
        farthest = max(distances)
        if farthest > invisible:
            middle = first + 1 + distances.index(farthest)
            keeps.add(middle)
            stretches += [(first, middle), (middle, last)]
    return [place for i, place in enumerate(places) if i in keeps]


def _distance(place: tuple[int, int], start: tuple[int, int], end: tuple[int, int]) -> float:
    """Distance from a point to the segment between two others."""
    x, y = place[0] - start[0], place[1] - start[1]
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = max(0.0, min(1.0, (x * dx + y * dy) / (dx * dx + dy * dy))) if dx or dy else 0.0
    return math.hypot(x - along * dx, y - along * dy)


def _pair(a: int, b: int) -> str:
    """Format two numbers given in tenths, separated by a space or by the second one's minus sign."""
    first, second = (
        f"{value / 10:g}".replace("0.", ".") if abs(value) < 10 else f"{value / 10:g}" for value in (a, b)
    )
    return first + ("" if second.startswith("-") else " ") + second


def _hits(chart: Lines, x: Axis, y: Axis) -> Markup:
    """Draw invisible discs with tooltips; as title elements they work without scripts."""
    total = sum(len(s.x) for s in chart.series if not s.faint)
    # A finger on a phone needs more room than a mouse.
    step = max(1, math.ceil(total / (60 if x.end - x.start > 400 else 28)))
    parts = []
    for series in chart.series:
        if series.faint or (series.frame is not None and series.frame != chart.frame):
            continue
        for i in range(0, len(series.x), step):
            across, down = x(series.x[i]), y(series.y[i])
            if across is not None and down is not None:
                tip = (
                    series.tips[i]
                    if series.tips
                    else f"{series.label}  {short(float(series.x[i]))}: {short(float(series.y[i]))}"
                )
                parts.append(tag("circle", tag("title", tip), cx=round(across), cy=round(down)))
    return tag("g", *parts, class_="hits")


def swatch(style: int, at_x: float, at_y: float) -> Markup:
    """Draw a sample of a line with its marker, for a legend."""
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
    """Draw the lines' names at their ends, moved apart where they would overlap."""
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
        # The marker is repeated, so that a name can be found without its colour.
        if style is not None:
            parts.append(tag("path", d=MARKERS[style](at_x + 11 * side, place), class_=f"marker s{style}"))
        shift = 19 if style is not None else 9
        parts.append(tag("text", words, x=at_x + shift * side, y=place + 4, text_anchor=anchor, class_=kind))
    return join(*parts)
