"""Shared parts of all SVG charts: two widths, text size, and labels that do not overlap.

SVG charts are sharp at any size, readable without scripts, and the same in print. Every chart is drawn at
two widths, so that its text keeps its size on a phone; the style sheet shows one of them. Colours are
variables of the style sheet; each series also has its own marker and dash.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from markupsafe import Markup

from skipscope.report._markup import join, tag

WIDE, NARROW = 720, 344
# Mean width of a letter at 13 px, overestimated so that no text is cut off.
LETTER = 6.6


def words(text: object, x: float, y: float, kind: str = "tick", anchor: str | None = None) -> Markup:
    """Text element; ``kind`` is its class in the style sheet."""
    return tag("text", text, x=x, y=y, text_anchor=anchor, class_=kind)


def sheet(parts: Sequence[Markup], width: int, height: float, title: str) -> Markup:
    """SVG element of a whole chart; the title is for screen readers."""
    return tag(
        "svg", *parts, viewBox=f"0 0 {width} {height:.0f}", class_="chart", role="img", aria_label=title
    )


def both(draw: Callable[..., Markup], *arguments) -> Markup:
    """Draw a chart at both widths; the style sheet shows the one that fits."""
    return join(
        tag("div", draw(*arguments, WIDE), class_="wide"),
        tag("div", draw(*arguments, NARROW), class_="narrow"),
    )


def rooms(
    places: Sequence[float], lengths: Sequence[float], low: float, high: float, rows: int = 2
) -> list[tuple[float, int] | None]:
    """Place labels beside vertical lines: a start and a row (0 is the top row), or None if there is no room.

    A line reaches up to its label, so it must not cross a label in a row below.

    Example:
        >>> rooms([0, 10, 20, 95], [30, 30, 30, 30], 0, 100)
        [(5, 0), (15, 1), None, (60, 0)]
    """
    # Line, start, end and row of each placed label.
    taken: list[tuple[float, float, float, int]] = []
    found: list[tuple[float, int] | None] = []
    for place, length in zip(places, lengths):
        choices = [(start, row) for start in (place + 5, place - 5 - length) for row in range(rows)]
        free = (
            (start, row)
            for start, row in choices
            if low <= start
            and start + length <= high
            and not any(
                (row == r and start < e + 9 and s < start + length + 9)
                or (row < r and s - 3 < place < e + 3)
                or (row > r and start - 3 < at < start + length + 3)
                for at, s, e, r in taken
            )
        )
        found.append(room := next(free, None))
        if room:
            taken.append((place, room[0], room[0] + length, room[1]))
    return found


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move the sorted ``wanted`` positions at least ``gap`` apart and, if possible, into the range.

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
