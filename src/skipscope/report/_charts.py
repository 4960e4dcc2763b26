"""Charts as plain data, drawn as SVG on a page (`_svg.py`) and by matplotlib (`_matplotlib.py`).

The views (`_view_*.py`) turn a result into :class:`Panel` s, one per claim: a heading that states it, a
chart, a caption that says what to see, and the table behind the chart. The renderers do not know about
results.
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
        label: name of the line, written beside it.
        x, y: the points; NaN is a gap.
        low, high: band around the line, or None.
        style: index of colour, marker and dash; it means the same throughout a page.
        faint: whether the line is thin, in the background.
        points: whether only markers are drawn, without a line.
        tips: tooltip of each point, or None for its values.
        frame: step of the slider at which the line is highlighted, or None for always.
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
    """Labelled position on the x axis."""

    x: float
    label: str


@dataclass(frozen=True)
class Lines:
    """Lines over a common x axis.

    Attributes:
        ticks: text labels at positions on the x axis, instead of numbers.
        level: horizontal reference line and its label, or None.
        back: whether the lines are read from right to left, and so are named at their left end.
        frames: labels of a slider's steps; empty without a slider.
        frame: step that is highlighted at first.
        slider: name of the quantity that the slider sets.
        foot: sentence under a standalone picture.
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
    """Horizontal bars with labels; a row's values of several series are drawn one below the other.

    Attributes:
        labels: one per row.
        values: for each series, one value per row.
        names: one per series.
        low, high: ends of whiskers, shaped like ``values``, or None.
        styles: one per series.
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
    """Matrix of positive numbers as colours on a log scale: rows are layers, columns are steps.

    Exact zeros, values that are not finite (inf) and unknown values (NaN) each have their own look.
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
        values: heights ``[a, b]``; NaN is unknown.
        label: name of the surface.
        note: remark under the name, such as why it is flat.
        signed: whether it is a difference, coloured on both sides of zero; else heights are coloured by their
            logarithm.
        path: known weights on the plane, in order: (a, b, name).
        dots: mask ``[a, b]`` of points with a dot, or None; ``dots_mean`` explains the dots.
        origin: coordinates of the unchanged weights, marked by a cross if on the plane.
        broken: mask ``[a, b]`` of points that are striped because their value is NaN, or None. NaN elsewhere
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
    """Surfaces side by side on one scale; their 3-D views rotate together.

    Attributes:
        height: name of the heights.
        axes: names of the axes.
        flat: whether only a map is drawn, because a 3-D view of a difference or an error adds nothing.
        linear: whether heights are the values themselves; else their logarithms if all are positive.
    """

    surfaces: Sequence[Surface]
    height: str = "loss"
    axes: tuple[str, str] = ("direction 1", "direction 2")
    flat: bool = False
    linear: bool = False


@dataclass(frozen=True)
class Network:
    """Network as a line of layers with its shortcuts as arcs.

    Attributes:
        layers: layer names in order of execution.
        arcs: the shortcuts.
    """

    layers: Sequence[str]
    arcs: Sequence[Arc]


@dataclass(frozen=True)
class Arc:
    """A shortcut from before layer ``start`` to after layer ``end`` of a :class:`Network`.

    Attributes:
        share: share of the gradient that the shortcut carries (0 to 1); None if not measured.
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
        chart: the chart, or None if text and a table are enough.
        caption: what to see in the chart.
        tables: the numbers behind the chart.
        claim: the lecture's sentence that the evidence is about, or "".
        verdict: verdict on the claim ("holds", "holds in part"), or "".
        finding: the finding, in a sentence before the chart.
        limits: what does not follow from the finding, or "".
        why: the reason and the numbers behind the finding, initially collapsed, or "".
        parts: more charts, each with its own heading and caption.
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
        """All charts, in order."""
        own = [] if self.chart is None else [self.chart]
        return own + [chart for part in self.parts for chart in part.charts]


@dataclass(frozen=True)
class Document:
    """Content of a page, before layout.

    Attributes:
        title: title of the page, a question or a name.
        lead: line under the title.
        answer: sentences that answer the title's question.
        names: network's name -> its description.
        panels: the evidence.
        methods: paragraphs on how the numbers were computed.
        credits: sources of data and ideas.
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
