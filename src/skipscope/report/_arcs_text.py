"""Text drawing of a network for a terminal: layers from top to bottom, shortcuts as rails on the left.

Each line is a layer or a merge. In a long network, repeated blocks are drawn once and counted, so that 500
layers fit on a screen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from skipscope._printable import printable
from skipscope.report._charts import Arc, Network
from skipscope.report._markup import ellipsis

_LINES = {
    "start": "╭",
    "end": "╰",
    "both": "├",
    "pass": "│",
    "cross": "┼",
    "level": "─",
    "wire": "│",
    "layer": "■",
    "fork": "○",
    "merge": "⊕",
    "input": "●",
    "more": "⋮",
    "out": "▽",
}
_ASCII = {
    "start": ".",
    "end": "`",
    "both": "+",
    "pass": "|",
    "cross": "+",
    "level": "-",
    "wire": "|",
    "layer": "#",
    "fork": "o",
    "merge": "@",
    "input": "*",
    "more": ":",
    "out": "v",
}
RAILS = 12
# Networks with at most so many layers are not folded.
SHORT = 36


@dataclass(frozen=True)
class _Context:
    """Context of every line of the drawing."""

    chart: Network
    # The rail of each arc, or None without room for it.
    rails: tuple[int | None, ...]
    count: int
    width: int
    signs: dict[str, str]


def text(chart: Network, width: int = 80, *, ascii: bool = False) -> str:
    """Draw the network, at most ``width`` columns wide.

    Args:
        chart: the network.
        width: number of columns.
        ascii: use ASCII characters only.

    Example:
        >>> print(text(Network(["stem", "conv1", "conv2", "head"], [Arc(1, 2, "block", "identity", 0.8)])))
           ● input
           ■ stem
        ╭──○
        │  ■ conv1
        │  ■ conv2
        ╰──⊕ block  identity, 80 % of the gradient
           ■ head
           ▽ output
    """
    rails = _assign(chart.arcs)
    count = min(RAILS, max([rail + 1 for rail in rails if rail is not None] or [0]))
    context = _Context(chart, tuple(rails), count, width, _ASCII if ascii else _LINES)
    lines = _lines_between(context, 0)
    for first, last, repeats in _runs(chart):
        for i in range(first, last):
            lines.append(_line(context, _passing(context, i), "layer", printable(chart.layers[i])))
            lines += _lines_between(context, i + 1)
        if repeats:
            going_on = {rail for arc, rail in zip(chart.arcs, rails) if arc.start == last}
            dots = [context.signs["more"] if rail in going_on else " " for rail in range(count)]
            lines.append(_line(context, dots, "more", repeats))
    lines.append(_line(context, [" "] * count, "out", "output"))
    left_out = sum(rail is None for rail in rails)
    if left_out:
        lines.append(f"{left_out} more shortcuts do not fit here: see the table")
    return "\n".join(line.rstrip() for line in lines)


def _assign(arcs: Sequence[Arc]) -> list[int | None]:
    """Assign non-overlapping rails to the arcs, the shortest nearest to the layers."""
    rails: list[int | None] = [None] * len(arcs)
    taken: list[list[Arc]] = [[] for _ in range(RAILS)]
    for i in sorted(range(len(arcs)), key=lambda i: arcs[i].end - arcs[i].start):
        for rail in range(RAILS):
            if all(arcs[i].end < other.start or arcs[i].start > other.end for other in taken[rail]):
                taken[rail].append(arcs[i])
                rails[i] = rail
                break
    return rails


def _line(context: _Context, rails: Sequence[str], sign: str, words: str) -> str:
    start = "".join(rail.ljust(3) for rail in reversed(rails)) or "  "
    room = max(12, context.width - len(start) - 2)
    return f"{start}{context.signs[sign]} {ellipsis(words, room, keep='start')}"


def _passing(context: _Context, layer: int) -> list[str]:
    rails = [" "] * context.count
    for arc, rail in zip(context.chart.arcs, context.rails):
        if rail is not None and arc.start <= layer <= arc.end:
            rails[rail] = context.signs["pass"]
    return rails


def _lines_between(context: _Context, place: int) -> list[str]:
    """Lines between two layers: one per merge, else one for a fork, else none."""
    arcs = list(zip(context.chart.arcs, context.rails))
    ends = sorted((p for p in arcs if p[0].end + 1 == place), key=lambda p: p[0].start, reverse=True)
    starts = [p for p in arcs if p[0].start == place and p[1] is not None]
    if place == 0:
        return [_event(context, place, [], starts, [], "input", "input")]
    lines = []
    for n, (arc, rail) in enumerate(ends):
        last = n == len(ends) - 1
        waiting = [p for p in ends[n + 1 :] if p[1] is not None]
        here = [(arc, rail)] if rail is not None else []
        lines.append(_event(context, place, here, starts if last else [], waiting, "merge", _words(arc)))
    return lines or ([_event(context, place, [], starts, [], "fork", "")] if starts else [])


def _event(context: _Context, place: int, ends, starts, waiting, sign: str, words: str) -> str:
    ending, starting = {rail for _, rail in ends}, {rail for _, rail in starts}
    passing = {rail for _, rail in waiting}
    passing |= {
        rail
        for arc, rail in zip(context.chart.arcs, context.rails)
        if rail is not None and arc.start < place < arc.end + 1
    }
    farthest = max(ending | starting, default=-1)
    signs, rails = context.signs, []
    for rail in range(context.count):
        level = signs["level"] * 2 if rail <= farthest else "  "
        if rail in ending or rail in starting:
            sign_here = signs[
                "both" if rail in ending and rail in starting else "end" if rail in ending else "start"
            ]
        elif rail in passing:
            sign_here = signs["cross"] if rail < farthest else signs["pass"]
        else:
            sign_here = signs["level"] if rail < farthest else " "
        rails.append(sign_here + level)
    return _line(context, rails, sign, words)


def _words(arc: Arc) -> str:
    share = f", {100 * arc.share:.0f} % of the gradient" if arc.share is not None else ""
    return f"{printable(arc.name)}  {arc.kind}{share}"


# --- folding ---


def _runs(chart: Network) -> list[tuple[int, int, str]]:
    """Ranges of layers to draw, each with the text about its repetitions ("" for none)."""
    count = len(chart.layers)
    if count <= SHORT:
        return [(0, count, "")]
    covered = {p for arc in chart.arcs for p in range(arc.start + 1, arc.end + 1)}
    cuts = [p for p in range(count + 1) if p not in covered]
    pieces = list(pairwise(cuts))
    signatures = [_signature(chart, *piece) for piece in pieces]
    runs, i = [], 0
    while i < len(pieces):
        period, repeats = _best_period(signatures, i)
        words = ""
        if repeats > 1:
            ahead = _to_whole_blocks(chart, pieces, signatures, i, period, repeats)
            if ahead:
                runs.append((pieces[i][0], pieces[i + ahead - 1][1], ""))
                i += ahead
            period, repeats = _best_period(signatures, i)
            blocks = [_home(chart, pieces[i + n * period : i + (n + 1) * period]) for n in (1, repeats - 1)]
            words = _repeated(
                chart, pieces[i + period][0], pieces[i + period * repeats - 1][1], repeats - 1, blocks
            )
        runs.append((pieces[i][0], pieces[i + period - 1][1], words))
        i += period * repeats
    return runs


def _to_whole_blocks(
    chart: Network,
    pieces: Sequence[tuple[int, int]],
    signatures: Sequence[tuple],
    i: int,
    period: int,
    repeats: int,
) -> int:
    """Number of pieces to draw first, so that the repeated unit is a whole block and not two halves."""

    def depth(ahead: int) -> int:
        return _home(chart, pieces[i + ahead : i + ahead + period]).count(".")

    as_many = [ahead for ahead in range(period) if _best_period(signatures, i + ahead) == (period, repeats)]
    return max(as_many, key=lambda ahead: (depth(ahead), -ahead), default=0)


def _home(chart: Network, pieces: Sequence[tuple[int, int]]) -> str:
    """Common module path of the layers of some pieces."""
    levels = zip(*(printable(name).split(".") for name in chart.layers[pieces[0][0] : pieces[-1][1]]))
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))


def _signature(chart: Network, first: int, last: int) -> tuple:
    names = tuple(re.sub(r"\d+", "#", name) for name in chart.layers[first:last])
    return names, tuple(
        (a.start - first, a.end - first, a.kind) for a in chart.arcs if first <= a.start and a.end < last
    )


def _best_period(signatures: Sequence[tuple], start: int) -> tuple[int, int]:
    best = (1, 1)
    for period in range(1, min(12, (len(signatures) - start) // 3) + 1):
        block, repeats = signatures[start : start + period], 1
        while list(signatures[start + repeats * period : start + (repeats + 1) * period]) == list(block):
            repeats += 1
        if repeats >= 3 and period * repeats > best[0] * best[1]:
            best = (period, repeats)
    return best


def _repeated(chart: Network, first: int, last: int, repeats: int, blocks: Sequence[str]) -> str:
    shares = [
        arc.share for arc in chart.arcs if arc.start >= first and arc.end < last and arc.share is not None
    ]
    carried = f", carrying {100 * min(shares):.0f} to {100 * max(shares):.0f} %" if shares else ""
    a, b = (
        blocks
        if "" not in blocks and len(set(blocks)) == 2
        else (printable(chart.layers[i]) for i in (first, last - 1))
    )
    return f"{repeats} more like this, {a} to {b}{carried}"
