"""View of a monitor's history: a heat map of layers by steps, with the verdict below."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from skipscope._option_words import Quantity
from skipscope._result import Table
from skipscope.monitor import STATES, History, VerdictEvent
from skipscope.report._charts import Document, Heat, Lines, Mark, Panel, Series
from skipscope.report._document import view

KEY = (
    "Colour is a log scale; grey is exactly zero, red stripes are not finite (inf or NaN), blank is not"
    " known."
)


def heat_of(result: History, what: Quantity) -> Heat | None:
    """Heat map of one quantity of a history. None if nothing was recorded."""
    matrix = result.matrix(what)
    values = np.array(matrix["values"], dtype=float)
    if not values.size:
        return None
    # A norm that is not finite is stored as NaN, like an unknown one; the recorded state distinguishes them.
    if what != "flow":
        columns = [result.parameters.index(name) for name in matrix["rows"]]
        states = result.states[result.optimizers == 0][:, columns].T
        values[(states == STATES.index("nonfinite")) & np.isnan(values)] = np.inf
    return Heat(
        values,
        matrix["rows"],
        matrix["columns"],
        f"{matrix['label']}, by layer",
        "optimizer step",
        events=_marks(result.events, matrix["columns"]),
        foot=f"{KEY} {_sentence(matrix['verdict'])}",
    )


@view.register
def _(result: History) -> Document:
    panels = []
    headings: dict[Quantity, str] = {
        "rms": "The gradient of each weight, step by step",
        "flow": "The flow at each boundary, step by step",
    }
    for what, heading in headings.items():
        chart = heat_of(result, what)
        if chart is not None:
            caption = f"The input is at the top. {chart.foot}"
            panels.append(Panel(heading, chart, caption, _tables(result) if not panels else []))
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
    return Document(
        "Gradients during training",
        f"{len(result):,} steps recorded",
        [_sentence(str(result.verdict)), *_event_sentences(result.events)],
        panels or [Panel("The numbers", tables=_tables(result))],
        result.table().notes,
    )


def _marks(events: Sequence[VerdictEvent], columns: Sequence[int]) -> list[Mark]:
    """Marks for the events among the columns, thinned so that a flickering state does not hide the map."""
    marks: list[Mark] = []
    apart = (columns[-1] - columns[0]) / 150
    for e in events:
        if columns[0] <= e.step <= columns[-1] and (not marks or e.step - marks[-1].x >= apart):
            marks.append(Mark(e.step, f"{e.before} → {e.verdict.state}"))
    return marks


def _event_sentences(events: Sequence[VerdictEvent]) -> list[str]:
    """Sentences on the first and the last two changes of the state, and their number in between."""
    sentences = [
        _sentence(f"step {e.step:,}: from {e.before} to {e.verdict.state}: {e.verdict.reason}")
        for e in events
    ]
    if len(sentences) <= 3:
        return sentences
    return [sentences[0], f"And {len(sentences) - 3:,} more, listed under the numbers.", *sentences[-2:]]


def _tables(result: History) -> list[Table]:
    rows = [[e.step, e.before, e.verdict.state, e.verdict.where, e.verdict.reason] for e in result.events]
    changes = Table("When the state changed", ["step", "from", "to", "where", "reason"], rows)
    return [result.table(), changes] if rows else [result.table()]


def _sentence(text: str) -> str:
    """Capitalise the first letter and add a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "…")) else ".")
