"""How a monitor's history is told: layers x steps as a heat map, the verdict's line under it."""

from __future__ import annotations

import numpy as np

from skipscope.monitor import History
from skipscope.report._charts import Heat, Lines, Mark, Panel, Series, Story
from skipscope.report._story import story


def heat_of(result: History, what: str) -> Heat | None:
    """One quantity of a history as a heat map, or None when nothing was recorded."""
    matrix = result.matrix(what)
    values = np.asarray(matrix["values"], dtype=float)
    if not values.size:
        return None
    events = [Mark(e.step, f"{e.before} → {e.verdict.state}") for e in result.events][:6]
    return Heat(
        values,
        matrix["rows"],
        matrix["columns"],
        f"{matrix['label']}, by layer",
        "optimizer step",
        events=events,
        foot=matrix["verdict"],
    )


@story.register
def _(result: History) -> Story:
    panels = []
    for what, heading in (
        ("rms", "The gradient of each weight, step by step"),
        ("flow", "The flow at each boundary, step by step"),
    ):
        chart = heat_of(result, what)
        if chart is not None:
            caption = f"The input is at the top. Colour is a log scale; grey is exactly zero, blank is not known. {chart.foot}"
            panels.append(Panel(heading, chart, caption, [result.table()] if not panels else []))
    if len(result):
        after, before = result.total_norm, result.total_before_clip
        series = [Series("received by the optimizer", result.steps.tolist(), after.tolist())]
        if np.isfinite(before).any():
            series.append(Series("before clipping", result.steps.tolist(), before.tolist(), style=1))
        panels.append(
            Panel(
                "The whole gradient",
                Lines(series, "optimizer step", "L2 norm over all parameters", log_y=True),
                "The norm over all parameters.",
            )
        )
    events = [
        f"Step {e.step}: {e.before} to {e.verdict.state}. {e.verdict.reason}" for e in result.events[-2:]
    ]
    return Story("Gradients during training", f"{len(result):,} steps recorded", [str(result.verdict), *events], panels or [Panel("The numbers", tables=[result.table()])],
                 result.table().notes)  # fmt: skip
