"""SVG drawing of a network as a line of layers with its shortcuts as arcs, in one or several rows.

Layers are drawn on a line, from the input on the left to the output on the right. Between them are *places*:
place i is before layer i. An arc leaves the line at the place before the first layer it skips and joins it
again after the last. A long network continues in the next row; an arc over both rows is drawn in both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from skipscope.report._charts import Arc, Network
from skipscope.report._markup import ellipsis, join, tag
from skipscope.shortcuts import KINDS

# Largest height of an arc in pixels.
MOST = 170.0
_DASH = {"identity": "", "scaled": "6 3", "projection": "11 4", "gated": "8 2.5 2 2.5", "concat": "3 2.5"}


@dataclass(frozen=True)
class _Row:
    """Layers ``first`` to ``last`` (exclusive) on a line at height ``y``, ``pitch`` pixels apart.

    ``longest`` is the span of the longest arc in pixels.
    """

    first: int
    last: int
    y: float
    pitch: float
    longest: float

    def at(self, place: int) -> float:
        """The x position of a place."""
        return 22 + (place - self.first) * self.pitch

    def holds(self, arc: Arc) -> bool:
        """Whether part of an arc is in this row."""
        return arc.start < max(self.last, self.first + 1) and arc.end + 1 > self.first

    def rise(self, arc: Arc) -> float:
        """Height of an arc: half a circle, flattened if the longest arc would be too high."""
        span = (arc.end + 1 - arc.start) * self.pitch
        top = min(0.5 * self.longest, MOST)
        # An arc that continues in another row is drawn flat, at a limited height.
        if arc.start < self.first or arc.end >= self.last:
            top = min(top, 90.0)
        power = 1.0 if self.longest <= 2 * MOST else 0.6
        return 8 + top * (span / self.longest) ** power


def network(chart: Network, width: int) -> Markup:
    """Draw the network, ``width`` pixels wide."""
    count = len(chart.layers)
    named = count <= (40 if width > 500 else 8)
    rows = _rows(chart, count if named else max(1, int((width - 40) / (9.5 if width > 500 else 8.5))), width)
    parts = [_row(chart, row, named, width, final=row is rows[-1]) for row in rows]
    below = _label_room(chart, rows[-1].pitch) if named else 26
    legend, height = _legend(chart, width, rows[-1].y + below + 20)
    title = f"{count} layers, {len(chart.arcs)} shortcuts"
    return tag(
        "svg",
        *parts,
        legend,
        viewBox=f"0 0 {width} {height:.0f}",
        class_="network",
        role="img",
        aria_label=title,
    )


def _rows(chart: Network, per_row: int, width: int) -> list[_Row]:
    cuts = _breaks(chart, per_row)
    pitch = min(64.0, (width - 44) / max(1, max(b - a for a, b in pairwise(cuts))))
    longest = max([arc.end + 1 - arc.start for arc in chart.arcs] or [1]) * pitch
    rows, y = [], 0.0
    for first, last in pairwise(cuts):
        row = _Row(first, last, 0.0, pitch, longest)
        rise = max([row.rise(arc) for arc in chart.arcs if row.holds(arc)] or [0.0])
        y += rise + 20
        rows.append(_Row(first, last, y, pitch, longest))
        y += 30
    return rows


def _breaks(chart: Network, per_row: int) -> list[int]:
    """Row boundaries: rows of about equal length, cut at a nearby place without an arc, if any."""
    count = len(chart.layers)
    covered = {place for arc in chart.arcs for place in range(arc.start + 1, arc.end + 1)}
    cuts, at = [0], 0
    while count - at > per_row:
        size = math.ceil((count - at) / math.ceil((count - at) / per_row))
        whole = [p for p in range(at + size, at + (2 * size) // 3, -1) if p not in covered]
        at = whole[0] if whole else at + size
        cuts.append(at)
    return [*cuts, count] if count else [0, 1]


def _row(chart: Network, row: _Row, named: bool, width: int, *, final: bool) -> Markup:
    end = row.at(row.last)
    wire = f"M{8 if row.first == 0 else 2} {row.y:.1f}H{end + (14 if final else 20):.1f}"
    parts = [tag("path", d=wire, class_="wire")]
    if final:
        parts.append(tag("path", d=f"M{end + 14:.1f} {row.y - 4:.1f}l6 4l-6 4z", class_="layer"))
    # Short arcs are drawn last, on top, so that a pointer can reach them.
    parts += [_arc(arc, row) for arc in sorted(chart.arcs, key=lambda a: a.start - a.end) if row.holds(arc)]
    size = max(2.6, min(17.0, row.pitch * 0.5))
    half = min(6.0, size)
    for i in range(row.first, min(row.last, len(chart.layers))):
        middle = row.at(i) + row.pitch / 2
        box = {
            "x": middle - size / 2,
            "y": row.y - half,
            "width": size,
            "height": 2 * half,
            "rx": min(2.5, size / 4),
        }
        parts.append(tag("rect", tag("title", chart.layers[i]), **box, class_="layer"))
        if named:
            parts.append(_name(chart.layers[i], middle, row.y, row.pitch))
    if not named:
        parts += _ends(chart, row, width)
    radius = max(2.0, min(4.5, row.pitch * 0.16))
    merges = {arc.end + 1 for arc in chart.arcs}
    parts += [
        tag("circle", cx=row.at(p), cy=row.y, r=radius, class_="merge")
        for p in sorted(merges)
        if row.first < p <= row.last
    ]
    return tag("g", *parts)


def _ends(chart: Network, row: _Row, width: int) -> list[Markup]:
    """Names of a row's first and last layer; only the first if both do not fit."""
    end, first, last = row.at(row.last), chart.layers[row.first], chart.layers[row.last - 1]
    most = int((end - 36) / 14)
    if most < min(len(last), 8) or row.last - row.first < 2:
        return [tag("text", ellipsis(first, int((width - 30) / 7)), x=22, y=row.y + 20, class_="tick")]
    return [
        tag("text", ellipsis(first, most), x=22, y=row.y + 20, class_="tick"),
        tag("text", ellipsis(last, most), x=end, y=row.y + 20, text_anchor="end", class_="tick"),
    ]


def _arc(arc: Arc, row: _Row) -> Markup:
    rise, y = row.rise(arc), row.y
    left, right = arc.start >= row.first, arc.end + 1 <= row.last
    a = row.at(arc.start) if left else 4.0
    b = row.at(arc.end + 1) if right else row.at(row.last) + 16
    if left and right:
        d = f"M{a:.1f} {y:.1f}A{(b - a) / 2:.1f} {rise:.1f} 0 0 1 {b:.1f} {y:.1f}"
    else:
        # An arc that continues in another row is flat at its open end.
        turn = min(24.0, (b - a) / 2)
        d = (
            f"M{a:.1f} {y:.1f}Q{a:.1f} {y - rise:.1f} {a + turn:.1f} {y - rise:.1f}"
            if left
            else f"M{a:.1f} {y - rise:.1f}"
        )
        d += f"H{b - turn:.1f}Q{b:.1f} {y - rise:.1f} {b:.1f} {y:.1f}" if right else f"H{b:.1f}"
    style = KINDS.index(arc.kind) if arc.kind in KINDS else 5
    thick = thickness(arc, row.pitch)
    tip = f"{arc.name}: {arc.kind}" + (
        f", carries {100 * arc.share:.0f} % of the gradient" if arc.share is not None else ""
    )
    return tag(
        "path",
        tag("title", tip),
        d=d,
        class_=f"arc s{style}",
        stroke_width=thick,
        stroke_dasharray=_dash(arc.kind, thick),
    )


def _dash(kind: str, thick: float) -> str | None:
    """Dash pattern of a kind, longer for thicker arcs."""
    scale = max(1.0, thick / 2.4)
    return (
        " ".join(f"{float(part) * scale:.1f}" for part in _DASH[kind].split()) or None
        if kind in _DASH
        else None
    )


def thickness(arc: Arc, pitch: float = 64.0) -> float:
    """Thickness of an arc in pixels, proportional to the share of gradient that the shortcut carries."""
    most = max(3.0, min(9.0, 0.4 * pitch))
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
        parts += [
            tag("path", d=d, class_=f"arc s{style}", stroke_width=2, stroke_dasharray=_dash(KINDS[style], 2)),
            tag("text", text, x=x + 30, y=y, class_="label"),
        ]
        x += needed
    if any(arc.share is not None for arc in chart.arcs):
        if x > 4 and x + 290 > width:
            x, y = 4.0, y + 19
        parts.append(tag("text", "thickness: share of the gradient it carries", x=x, y=y, class_="note"))
    return join(*parts), y + (10 if parts else 0)
