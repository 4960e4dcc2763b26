"""Charts as plain data, drawn as SVG on a page (`_svg.py`) and by matplotlib (`_matplotlib.py`).

A result becomes :class:`Panel` s (`_views`), each one claim: a heading that states it, one chart, a caption
that says what to see, and the table behind the chart. Neither renderer knows what a result is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skipscope._result import Table


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        label: its name, written beside it.
        x, y: the points; NaN is a gap.
        low, high: a band around it, or None.
        style: which colour, marker and dash; the same number means the same thing throughout a page.
        faint: drawn thin, in the background.
        points: the markers are joined by no line.
        tips: the text for a pointer over each point, or None for the numbers alone.
        frame: the step of the slider at which the line is strong, or None for always.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    style: int = 0
    faint: bool = False
    points: bool = False
    tips: Sequence[str] | None = None
    frame: int | None = None


@dataclass(frozen=True)
class Mark:
    """A place on the x axis worth a word."""

    x: float
    label: str


@dataclass(frozen=True)
class Lines:
    """Lines over a common x axis.

    Attributes:
        ticks: words instead of numbers at places on the x axis.
        level: a horizontal line of reference and its label, or None.
        back: the lines are read from right to left and fan out there, so they are named at their left end.
        frames: the labels of a slider's steps; empty for none.
        frame: the step that is strong at first.
        slider: what the slider sets.
        foot: a sentence that belongs under the picture when it stands alone.
    """

    series: Sequence[Series]
    x_title: str = ""
    y_title: str = ""
    log_x: bool = False
    log_y: bool = False
    ticks: Mapping[float, str] | None = None
    marks: Sequence[Mark] = ()
    level: tuple[float, str] | None = None
    back: bool = False
    frames: Sequence[str] = ()
    frame: int = 0
    slider: str = ""
    foot: str = ""


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, each with its name; several values a name are drawn under each other.

    Attributes:
        labels: one a row.
        values: for each series, one value a row.
        names: one a series.
        low, high: whiskers like ``values``, or None.
        styles: one a series.
    """

    labels: Sequence[str]
    values: Sequence[Sequence[float]]
    names: Sequence[str]
    title: str = ""
    low: Sequence[Sequence[float]] | None = None
    high: Sequence[Sequence[float]] | None = None
    styles: Sequence[int] = (0, 1, 2, 3)
    log: bool = False


@dataclass(frozen=True)
class Heat:
    """A matrix of positive numbers as colours on a log scale: rows are layers, columns are steps.

    Zero is exactly zero, inf is not finite, NaN is not known: each is seen to be what it is.
    """

    values: np.ndarray
    rows: Sequence[str]
    columns: Sequence[float]
    title: str = ""
    x_title: str = ""
    y_title: str = ""
    events: Sequence[Mark] = ()
    foot: str = ""


@dataclass(frozen=True)
class Surface:
    """Heights over a plane of weight space.

    Attributes:
        values: ``[a, b]``; NaN is unknown.
        label: its name.
        note: said under the name ("it has not learnt: a flat sheet").
        signed: a difference, coloured on both sides of zero; otherwise heights above zero, coloured by their
            log.
        path: known weights on the plane, in order: (a, b, name).
        dots: places ``[a, b]`` worth a dot, and ``dots_mean`` says what a dot means; None for none.
        origin: the weights as they are, marked by a cross where it is on the plane.
        broken: places ``[a, b]`` whose value is not a number, which are striped; None for none. Elsewhere NaN
            is blank.
    """

    values: np.ndarray
    alphas: np.ndarray
    betas: np.ndarray
    label: str = ""
    note: str = ""
    signed: bool = False
    path: Sequence[tuple[float, float, str]] = ()
    dots: np.ndarray | None = None
    dots_mean: str = ""
    broken: np.ndarray | None = None
    origin: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Surfaces:
    """Surfaces side by side on one scale, turned together.

    Attributes:
        height: what the heights are.
        axes: what the axes are.
        flat: shown as a map only; a difference or an error says nothing more when turned.
        linear: heights are the values themselves, whatever their range; else their logarithms where all are
            above zero.
    """

    surfaces: Sequence[Surface]
    height: str = "loss"
    axes: tuple[str, str] = ("direction 1", "direction 2")
    flat: bool = False
    linear: bool = False


@dataclass(frozen=True)
class Network:
    """A network as a line of layers with its shortcuts as arcs.

    Attributes:
        layers: names in order of execution.
        arcs: the shortcuts.
    """

    layers: Sequence[str]
    arcs: Sequence[Arc]


@dataclass(frozen=True)
class Arc:
    """A shortcut from before layer ``start`` to after layer ``end`` of a :class:`Network`.

    Attributes:
        share: of the gradient at the merge, how much the shortcut carries (0 to 1); None when not measured.
    """

    start: int
    end: int
    name: str
    kind: str
    share: float | None = None


Chart = Lines | Bars | Heat | Surfaces | Network


@dataclass(frozen=True)
class Panel:
    """One claim and its evidence.

    Attributes:
        heading: what the chart shows, as a sentence.
        chart: the chart, or None where words and a table are enough.
        caption: what to see in it.
        tables: the numbers behind it.
        claim: the sentence of the lecture that it weighs, or "".
        verdict: one word on the claim ("holds", "holds in part"), or "".
        finding: what was found, in a sentence before the chart.
        limits: what does not follow from it, or "".
        why: the reason and the numbers behind the finding, folded away at first, or "".
        parts: more charts, each with its own heading and caption, where the claim has several sides.
    """

    heading: str
    chart: Chart | None = None
    caption: str = ""
    tables: Sequence[Table] = ()
    claim: str = ""
    verdict: str = ""
    finding: str = ""
    parts: Sequence[Panel] = field(default=())
    limits: str = ""
    why: str = ""

    @property
    def charts(self) -> list[Chart]:
        """Every chart, in order."""
        own = [] if self.chart is None else [self.chart]
        return own + [chart for part in self.parts for chart in part.charts]


@dataclass(frozen=True)
class Document:
    """A whole page, before it is laid out.

    Attributes:
        title: the question or the name.
        lead: one line under the title.
        answer: the sentences that come first.
        names: name -> what it is, of the networks that the page speaks of.
        panels: the evidence.
        methods: paragraphs: how the numbers came about.
        credits: whose data and ideas were used.
        facts: short name -> value: versions, seeds, times.
    """

    title: str
    lead: str = ""
    answer: Sequence[str] = ()
    panels: Sequence[Panel] = ()
    methods: Sequence[str] = ()
    credits: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
