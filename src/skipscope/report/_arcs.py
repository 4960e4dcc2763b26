"""A network as a line of layers with its shortcuts as arcs, in SVG: 5 layers in one row, 500 in many.

Layers sit on a wire, from the input on the left to the output on the right. Between them are *places*: place i is
before layer i. An arc leaves the wire at the place before the first layer it skips and joins it again after the last.
A long network goes on in the next row; an arc that does too is drawn there as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from skipscope.report._charts import Arc, Network
from skipscope.report._markup import ellipsis, join, tag
from skipscope.report._palette import DASHES

KINDS = ("identity", "scaled", "projection", "gated", "concat")
_DASH = {
    "identity": "",
    "scaled": DASHES[1],
    "projection": DASHES[4],
    "gated": DASHES[3],
    "concat": DASHES[2],
}


@dataclass(frozen=True)
class _Row:
    """Layers ``first`` to ``last`` (exclusive), at this height, with this much room above for arcs."""

    first: int
    last: int
    y: float
    room: float


def network(chart: Network, width: int) -> Markup:
    """The network, ``width`` pixels wide."""
    named = len(chart.layers) <= (40 if width > 500 else 0) or len(chart.layers) <= 8
    per_row = len(chart.layers) if named else max(1, int((width - 40) / (9.5 if width > 500 else 8.5)))
    rows = _rows(chart, per_row, named, width)
    pitch = min(64.0, (width - 44) / max(1, max(r.last - r.first for r in rows)))
    parts = [_row(chart, row, pitch, named, width, final=row is rows[-1]) for row in rows]
    below = _label_room(chart, pitch) if named else 26
    legend, height = _legend(chart, width, rows[-1].y + below + 20)
    title = f"{len(chart.layers)} layers, {len(chart.arcs)} shortcuts"
    return tag(
        "svg",
        *parts,
        legend,
        viewBox=f"0 0 {width} {height:.0f}",
        class_="network",
        role="img",
        aria_label=title,
    )


def _rows(chart: Network, per_row: int, named: bool, width: int) -> list[_Row]:
    count = max(1, math.ceil(len(chart.layers) / per_row))
    size = math.ceil(len(chart.layers) / count)  # even rows look calmer than a short last one
    pitch = min(64.0, (width - 44) / max(1, size))
    rows, y = [], 0.0
    for first in range(0, max(1, len(chart.layers)), max(1, size)):
        last = min(first + size, len(chart.layers))
        room = max(
            [
                _height(arc, first, last, pitch)
                for arc in chart.arcs
                if arc.start <= last and arc.end + 1 >= first
            ]
            or [10.0]
        )
        y += room + 20
        rows.append(_Row(first, last, y, room))
        y += 30
    return rows


def _height(arc: Arc, first: int, last: int, pitch: float) -> float:
    """How high an arc rises: with its length, but ever more slowly."""
    span = (arc.end + 1 - arc.start) * pitch
    crossing = arc.start < first or arc.end >= last
    return (
        min(190.0, 9 + 0.5 * span if span < 90 else 54 + 8.2 * math.sqrt(span - 90))
        if not crossing
        else min(120.0, 26 + 5 * math.sqrt(arc.end + 1 - arc.start))
    )


def _row(chart: Network, row: _Row, pitch: float, named: bool, width: int, *, final: bool) -> Markup:
    def at(place: int) -> float:
        return 22 + (place - row.first) * pitch

    end = at(row.last)
    parts = [
        tag(
            "path",
            d=f"M{8 if row.first == 0 else 2} {row.y:.1f}H{end + (14 if final else 20):.1f}",
            class_="wire",
        )
    ]
    if final:
        parts.append(tag("path", d=f"M{end + 14:.1f} {row.y - 4:.1f}l6 4l-6 4z", class_="layer"))
    # Long arcs first, so that short ones lie on top and can be pointed at
    for arc in sorted(chart.arcs, key=lambda a: a.start - a.end):
        if (
            arc.start < row.last + (arc.start == row.last and final)
            and arc.end + 1 > row.first
            and arc.start <= row.last
        ):
            parts.append(_arc(arc, row, pitch, at))
    size = max(2.6, min(17.0, pitch * 0.5))
    for i in range(row.first, row.last):
        middle = at(i) + pitch / 2
        parts.append(
            tag("rect", tag("title", chart.layers[i]), x=middle - size / 2, y=row.y - min(6.0, size), width=size, height=2 * min(6.0, size),
                rx=min(2.5, size / 4), class_="layer")
        )  # fmt: skip
        if named:
            parts.append(_name(chart.layers[i], middle, row.y, pitch))
    if not named:
        parts += [
            tag(
                "text", ellipsis(chart.layers[row.first], int(width / 16)), x=22, y=row.y + 20, class_="tick"
            ),
            tag(
                "text",
                ellipsis(chart.layers[row.last - 1], int(width / 16)),
                x=end,
                y=row.y + 20,
                text_anchor="end",
                class_="tick",
            ),
        ]
    radius = max(2.0, min(4.5, pitch * 0.16))
    merges = {arc.end + 1 for arc in chart.arcs}
    parts += [
        tag("circle", cx=at(p), cy=row.y, r=radius, class_="merge")
        for p in sorted(merges)
        if row.first < p <= row.last
    ]
    return tag("g", *parts)


def _arc(arc: Arc, row: _Row, pitch: float, at) -> Markup:
    rise = min(_height(arc, row.first, row.last, pitch), row.room)
    left, right = arc.start >= row.first, arc.end + 1 <= row.last
    a, b, y = at(arc.start) if left else 4.0, at(arc.end + 1) if right else at(row.last) + 16, row.y
    if left and right:
        d = f"M{a:.1f} {y:.1f}A{(b - a) / 2:.1f} {rise:.1f} 0 0 1 {b:.1f} {y:.1f}"
    else:  # it goes on in another row: level at the open end
        turn = min(24.0, (b - a) / 2)
        start = (
            f"M{a:.1f} {y:.1f}Q{a:.1f} {y - rise:.1f} {a + turn:.1f} {y - rise:.1f}"
            if left
            else f"M{a:.1f} {y - rise:.1f}"
        )
        d = start + (f"H{b - turn:.1f}Q{b:.1f} {y - rise:.1f} {b:.1f} {y:.1f}" if right else f"H{b:.1f}")
    style = KINDS.index(arc.kind) if arc.kind in KINDS else 5
    told = f"{arc.name}: {arc.kind}" + (
        f", carries {100 * arc.share:.0f} % of the gradient" if arc.share is not None else ""
    )
    return tag(
        "path",
        tag("title", told),
        d=d,
        class_=f"arc s{style}",
        stroke_width=thickness(arc, pitch),
        stroke_dasharray=_DASH.get(arc.kind) or None,
    )


def thickness(arc: Arc, pitch: float = 64.0) -> float:
    """Pixels: in proportion to the share of gradient the shortcut carries."""
    most = 9.0 if pitch > 16 else 5.0
    return max(0.8, most * arc.share) if arc.share is not None and math.isfinite(arc.share) else 2.0


def _name(name: str, x: float, y: float, pitch: float) -> Markup:
    y += 18
    if pitch > 9 * 6.4 and len(name) <= 8:
        return tag("text", name, x=x, y=y + 4, text_anchor="middle", class_="tick")
    return tag(
        "text",
        ellipsis(name, 20),
        tag("title", name),
        x=x,
        y=y,
        text_anchor="end",
        class_="tick",
        transform=f"rotate(-48 {x:.1f} {y:.1f}) translate(4 4)",
    )


def _label_room(chart: Network, pitch: float) -> float:
    longest = max([min(20, len(name)) for name in chart.layers] or [0])
    return 30.0 if pitch > 9 * 6.4 and longest <= 8 else 24 + longest * 6.4 * 0.75


def _legend(chart: Network, width: int, y: float) -> tuple[Markup, float]:
    parts, x = [], 4.0
    counts = {kind: sum(arc.kind == kind for arc in chart.arcs) for kind in KINDS}
    entries: Sequence[tuple[str, int]] = [
        (f"{count} {kind}", KINDS.index(kind)) for kind, count in counts.items() if count
    ]
    for text, style in entries:
        needed = 34 + len(text) * 6.6 + 12
        if x > 4 and x + needed > width:
            x, y = 4.0, y + 19
        d = f"M{x:.1f} {y:.1f}a12 9 0 0 1 24 0"
        parts += [tag("path", d=d, class_=f"arc s{style}", stroke_width=2, stroke_dasharray=_DASH[KINDS[style]] or None),
                  tag("text", text, x=x + 30, y=y, class_="label")]  # fmt: skip
        x += needed
    if any(arc.share is not None for arc in chart.arcs):
        if x > 4 and x + 290 > width:
            x, y = 4.0, y + 19
        parts.append(tag("text", "thickness: share of the gradient it carries", x=x, y=y, class_="note"))
    return join(*parts), y + (10 if parts else 0)
