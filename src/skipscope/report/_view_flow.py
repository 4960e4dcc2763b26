"""Views of gradient flow, remedies and gradient correlations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from skipscope._numbers import short
from skipscope.flow import (
    GradientCorrelation,
    GradientFlow,
    Prescription,
)
from skipscope.report._charts import Bars, Document, Lines, Mark, Panel, Series
from skipscope.report._document import view

DEPTH = "boundary, from the input (left) to the loss (right)"


def number(value: float | None) -> float:
    """Convert a missing number to NaN, so that a line has a gap there."""
    return math.nan if value is None else float(value)


def flow_lines(flows: Mapping[str, GradientFlow], styles: Mapping[str, int] | None = None) -> Lines:
    """Chart of the flow of one or several networks, boundary by boundary, on a log axis."""
    series = []
    for i, (name, flow) in enumerate(flows.items()):
        series.append(
            Series(
                name,
                [b.depth for b in flow.boundaries],
                [number(b.gradient_rms) for b in flow.boundaries],
                style=(styles or {}).get(name, i),
                tips=[
                    f"{name}  {b.depth} {b.name}: {short(b.gradient_rms)}, factor {short(b.factor)}"
                    for b in flow.boundaries
                ],
            )
        )
    alone = next(iter(flows.values())) if len(flows) == 1 else None
    marks = (
        [Mark(b.depth, f"breaks at {b.name}") for b in alone.boundaries if b.name == alone.verdict.where][:1]
        if alone
        else []
    )
    return Lines(
        series,
        DEPTH,
        "gradient RMS, |dL/d(output)| = 1",
        log_y=True,
        back=True,
        marks=marks,
        foot=str(alone.verdict) if alone else "",
    )


def factor_lines(flows: Mapping[str, GradientFlow], styles: Mapping[str, int] | None = None) -> Lines:
    """Chart of the factor at each boundary; their product is the gradient that reaches the first."""
    series = [
        Series(
            name,
            [b.depth for b in flow.boundaries if b.factor is not None],
            [number(b.factor) for b in flow.boundaries if b.factor is not None],
            style=(styles or {}).get(name, i),
            tips=[
                f"{name}  {b.depth} {b.name}: {short(b.factor)}"
                for b in flow.boundaries
                if b.factor is not None
            ],
        )
        for i, (name, flow) in enumerate(flows.items())
    ]
    return Lines(
        series,
        DEPTH,
        "factor by which each boundary multiplies it",
        log_y=True,
        back=True,
        level=(1.0, "nothing lost"),
    )


@view.register
def _(result: GradientFlow) -> Document:
    verdict = result.verdict
    because = f"{verdict.reason[:1].upper()}{verdict.reason[1:]}".rstrip(".")
    broken = f"It breaks at {verdict.where}." if verdict.where else ""
    panels = [
        Panel(
            heading=f"The gradient on its way back: {verdict.state}",
            chart=flow_lines({result.meaning: result}),
            caption=(
                "Read from right to left, as the gradient travels. A level line is a healthy flow; a line"
                f" that sinks to the left is a gradient that vanishes. {broken}"
            ),
            tables=[result.table()],
        )
    ]
    if len(result.boundaries) > 2:
        panels.append(
            Panel(
                heading="A product of factors",
                chart=factor_lines({result.meaning: result}),
                caption=f"What each stretch passes on. All factors multiplied: {short(result.product)}.",
            )
        )
    if result.layers:
        panels.append(
            Panel(
                heading="What the lecture prints: mean |dL/dW|",
                chart=Bars(
                    [w.name for w in result.layers],
                    [[number(w.weight_grad_mean_abs) for w in result.layers]],
                    ["mean |dL/dW|"],
                    title="mean |dL/dW| by weight",
                    log=True,
                ),
                caption=(
                    "The size of each weight's own gradient: not the flow, and it can change otherwise."
                ),
                tables=[result.layer_table()],
            )
        )
    return Document(
        "How the gradient flows",
        f"{result.meaning}, {result.mode} mode, {result.samples:,} samples",
        [verdict.finding, f"{because}.", verdict.advice],
        panels,
        methods=result.table().notes,
    )


@view.register
def _(result: Prescription) -> Document:
    rows = (result.before, *result.remedies)
    charts: Sequence[Bars] = [
        Bars(
            [r.name for r in rows],
            [[number(r.fall_decades) for r in rows]],
            ["fall"],
            title="decades of gradient lost on the way back (0 is best)",
        )
    ]
    panels = [
        Panel(
            "What each remedy did to the flow",
            charts[0],
            "The first row is the network as it is; each remedy was applied to a copy.",
            [result.table()],
        )
    ]
    if any(r.reached is not None for r in rows):
        reached = Bars(
            [r.name for r in rows],
            [[number(r.reached) for r in rows]],
            ["loss"],
            title="loss after the same few training steps",
        )
        panels.append(Panel("And what it did to the training", reached, "Shorter is better."))
    return Document(
        "Remedies that were tried", "", [result.advice] if result.advice else [], panels, result.refused
    )


@view.register
def _(result: GradientCorrelation) -> Document:
    chart = Lines(
        [
            Series(
                "correlation",
                [b[0] for b in result.bins],
                [b[1] for b in result.bins],
                tips=[f"distance {short(b[0])}: {short(b[1])} ({b[2]} pairs)" for b in result.bins],
            )
        ],
        "distance between two inputs",
        "correlation of their gradients",
        level=(0.0, "0: unrelated"),
    )
    panel = Panel(
        "Gradients of near inputs",
        chart,
        "A line near zero: the gradient is shattered, neighbours get unrelated gradients.",
        [result.table()],
    )
    return Document(
        "How alike the gradients of two inputs are",
        f"read at {result.boundary}",
        [f"The mean correlation is {short(result.mean)}."],
        [panel],
        result.notes,
    )
