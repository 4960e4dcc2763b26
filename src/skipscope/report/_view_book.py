"""View of the lecture's own experiment: what it shows, and what a thousand seeds do not confirm."""

from __future__ import annotations

import numpy as np

from skipscope._numbers import short, times
from skipscope.book import BookExperiment
from skipscope.report._charts import Document, Lines, Panel, Series
from skipscope.report._document import view


def seed_lines(result: BookExperiment) -> Lines:
    """Chart of the lecture's five numbers, without and with shortcuts."""
    at = list(range(1, len(result.layers) + 1))
    without = [g.without for g in result.gradient_means]
    having = [g.with_shortcuts for g in result.gradient_means]
    return Lines(
        [
            Series(
                "without",
                at,
                without,
                style=1,
                tips=[f"{n}: {short(v)} without" for n, v in zip(result.layers, without)],
            ),
            Series(
                "with shortcuts",
                at,
                having,
                style=0,
                tips=[f"{n}: {short(v)} with" for n, v in zip(result.layers, having)],
            ),
        ],
        "layer, from the first to the last",
        "mean |dL/dW|, the lecture's seed",
        log_y=True,
        ticks={float(i): f"{i}" for i in at},
        back=True,
    )


def distribution(result: BookExperiment) -> Lines:
    """Cumulative distribution over seeds of the first layer's gradient over the last layer's."""
    series = []
    for name, means, style in (
        ("without", result.means_without, 1),
        ("with shortcuts", result.means_with, 0),
    ):
        with np.errstate(divide="ignore", invalid="ignore"):
            flow = np.sort(means[:, 0] / means[:, -1])
        flow = flow[np.isfinite(flow) & (flow > 0)]
        kept = np.unique(np.linspace(0, len(flow) - 1, min(200, len(flow))).round().astype(int))
        series.append(Series(name, flow[kept].tolist(), (100 * (kept + 1) / len(flow)).tolist(), style=style))
    return Lines(
        series,
        "gradient of the first layer over that of the last",
        "% of seeds at or below",
        log_x=True,
        level=(50.0, "half of the seeds"),
    )


@view.register
def _(result: BookExperiment) -> Document:
    first, last, flow = result.gradient_means[0], result.gradient_means[-1], result.first_over_last
    median = result.median_first_over_last
    answer = [
        (
            f"In the lecture's seed the first layer's gradient grows {times(first.factor)} with shortcuts,"
            f" but the last layer's, which has none, grows {times(last.factor)}."
        ),
        (
            f"What the shortcuts did to the flow, first layer over last, is {short(flow.without)} to"
            f" {short(flow.with_shortcuts)}: {times(flow.factor)}."
        ),
        (
            f"Over {len(result.means_with):,} seeds the median goes from {short(median.without)} to"
            f" {short(median.with_shortcuts)}, better in {100 * result.share_better:.1f} % of them."
        ),
    ]
    table = result.table()
    panels = [
        Panel(
            "The lecture's five numbers",
            seed_lines(result),
            f"With shortcuts every number is larger, also the last, {times(last.factor)}, whose layer has"
            " none: that is the loss. What the shortcuts did is in how the lines slope.",
            [table],
        ),
        Panel(
            "The same over many seeds",
            distribution(result),
            "Each seed is a network of its own. The further to the right a line, the more of the gradient"
            " reaches the first layer.",
        ),
    ]
    return Document(
        "What the lecture's experiment shows, and what it does not",
        f"{len(result.layers)} layers, {len(result.means_with):,} seeds",
        answer,
        panels,
        table.notes,
    )
