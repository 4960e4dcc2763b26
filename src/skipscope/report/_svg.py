"""What all charts drawn as SVG share: two widths, the room a letter takes, labels that keep apart.

Charts are crisp at any size, readable without scripts, and the same in print. Every one is drawn at two
widths, so that its letters keep their size on a phone; the style sheet shows one of them. Colours are the
style sheet's variables; each series also has a marker and a dash of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from markupsafe import Markup

from skipscope.report._markup import join, tag

WIDE, NARROW = 720, 344
LETTER = 6.6  # the mean width of a letter at 13 px; generous, so that nothing is cut off


def words(text: object, x: float, y: float, kind: str = "tick", anchor: str | None = None) -> Markup:
    """A piece of text; ``kind`` is its class in the style sheet."""
    return tag("text", text, x=x, y=y, text_anchor=anchor, class_=kind)


def sheet(parts: Sequence[Markup], width: int, height: float, title: str) -> Markup:
    """A whole chart, with the title that a screen reader says."""
    return tag(
        "svg", *parts, viewBox=f"0 0 {width} {height:.0f}", class_="chart", role="img", aria_label=title
    )


def both(draw: Callable[..., Markup], *arguments) -> Markup:
    """A chart at both widths; the style sheet shows the one that fits."""
    return join(
        tag("div", draw(*arguments, WIDE), class_="wide"),
        tag("div", draw(*arguments, NARROW), class_="narrow"),
    )


def rooms(
    places: Sequence[float], lengths: Sequence[float], low: float, high: float, rows: int = 2
) -> list[tuple[float, int] | None]:
    """Place words beside vertical lines: a start and a row (0 is the top one), or None if there is no room.

    A line reaches up to its words, so it must not cross those of a row below.

    Example:
        >>> rooms([0, 10, 20, 95], [30, 30, 30, 30], 0, 100)
        [(5, 0), (15, 1), None, (60, 0)]
    """
    taken: list[tuple[float, float, float, int]] = []  # of each: its line, start, end and row
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
    """Positions near the sorted ``wanted`` ones, at least ``gap`` apart and, if possible, within the range.

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
