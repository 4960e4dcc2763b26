"""Views of gradient paths: split at each fork, by path length, and importance of each shortcut."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from skipscope._numbers import short
from skipscope.flow import Cost, GradientSplit, Importance, PathSpectrum
from skipscope.report._charts import Bars, Document, Lines, Mark, Panel, Series
from skipscope.report._document import view
from skipscope.report._view_flow import number


def split_lines(split: GradientSplit) -> Lines:
    """Chart of the gradient that each shortcut and each branch carries, fork by fork."""
    at = list(range(1, len(split) + 1))
    tips = [
        f"{s.name}: shortcut {short(s.shortcut_rms)}, branch {short(s.branch_rms)}, cosine {short(s.cosine)}"
        for s in split
    ]
    return Lines(
        [
            Series("by the shortcut", at, [s.shortcut_rms for s in split], style=0, tips=tips),
            Series("by the branch", at, [s.branch_rms for s in split], style=1, tips=tips),
        ],
        "shortcut, from the input (left) to the loss (right)",
        "gradient RMS arriving at the fork",
        log_y=True,
    )


def split_answer(split: GradientSplit) -> str:
    """Sentence on how much of the gradient the shortcuts carry."""
    shares = sorted(s.share for s in split if s.share is not None)
    if not shares:
        return "There is no gradient to split."
    middle = statistics.median(shares)
    return (
        f"At the {len(shares)} forks the shortcut carries {100 * middle:.0f} % of the gradient (median; from"
        f" {100 * shares[0]:.0f} to {100 * shares[-1]:.0f} %)."
    )


@view.register
def _(result: GradientSplit) -> Document:
    panel = Panel(
        "Two paths back, at each fork",
        split_lines(result),
        "At each fork the gradient arrives by two paths. Where the upper line is the shortcut's, it is the"
        " shortcut that keeps the gradient alive.",
        [result.table()],
    )
    return Document(
        "Shortcut against branch",
        f"{result.meaning}, {result.mode} mode",
        [split_answer(result)],
        [panel],
        result.notes,
    )


def path_lines(paths: Mapping[str, PathSpectrum], styles: Mapping[str, int] | None = None) -> Lines:
    """Chart of the gradient by path length; norms below 1e-12 of the largest are only in the table."""
    series, marks = [], []
    for i, (name, spectrum) in enumerate(paths.items()):
        top = float(spectrum.norms.max()) if len(spectrum.norms) else 0.0
        kept = [k for k, n in enumerate(spectrum.norms) if n > top * 1e-12] or list(
            range(len(spectrum.norms))
        )
        errors = spectrum.errors
        series.append(
            Series(
                name,
                kept,
                [float(spectrum.norms[k]) for k in kept],
                style=(styles or {}).get(name, i),
                low=None if errors is None else [float(spectrum.norms[k] - 1.96 * errors[k]) for k in kept],
                high=None if errors is None else [float(spectrum.norms[k] + 1.96 * errors[k]) for k in kept],
                tips=[
                    f"{name}  {k} branches: {short(float(spectrum.norms[k]))},"
                    f" {100 * spectrum.shares[k]:.2g} %"
                    for k in kept
                ],
            )
        )
        if len(paths) == 1:
            marks = [Mark(spectrum.mean_length, f"mean length {short(spectrum.mean_length)}")]
    return Lines(
        series,
        "branches crossed on the way back",
        "norm of the gradient by paths of this length",
        log_y=True,
        marks=marks,
    )


def path_answer(spectrum: PathSpectrum) -> str:
    """Sentence on the path lengths that carry most of the gradient."""
    shares, total, inside = spectrum.shares, 0.0, []
    for k in sorted(range(len(shares)), key=lambda k: -shares[k]):
        inside.append(k)
        total += float(shares[k])
        if total >= 0.9:
            break
    return (
        f"Of up to {spectrum.branches} branches, the gradient crosses {spectrum.mean_length:.2g} on average;"
        f" paths of {min(inside)} to {max(inside)} branches carry {100 * total:.0f} % of it."
    )


@view.register
def _(result: PathSpectrum) -> Document:
    panel = Panel(
        "The gradient by the length of its path",
        path_lines({result.meaning: result}),
        "Each point adds up all paths that cross so many branches; at 0 is the path by shortcuts alone. The"
        " axis is logarithmic: a step down is a factor.",
        [result.table()],
    )
    return Document(
        "Which paths the gradient takes",
        f"back to {result.wrt}, {result.meaning}",
        [path_answer(result)],
        [panel],
        result.table().notes,
    )


def importance_bars(result: Importance, what: str = "loss_cost") -> Bars:
    """Chart of what each edit costs, ordered by the cost of removing the shortcut."""

    def cost(edit: Cost | None) -> float:
        return math.nan if edit is None else number(getattr(edit, what))

    rows = sorted(
        result.shortcuts,
        key=lambda s: -math.inf if math.isnan(cost(s.removed)) else cost(s.removed),
        reverse=True,
    )
    title = "change of the loss" if what == "loss_cost" else "decades of gradient lost"
    values = [[cost(s.removed) for s in rows], [cost(s.lesioned) for s in rows]]
    return Bars([s.name for s in rows], values, ["shortcut removed", "branch lesioned"], title)


def importance_answer(result: Importance) -> str:
    """Sentence on the shortcuts that matter most and least."""
    ranked = [
        (s.name, s.removed.loss_cost)
        for s in result.ranked
        if s.removed is not None and not math.isnan(s.removed.loss_cost)
    ]
    if not ranked:
        return "No shortcut could be removed alone."
    (first, most), (last, least) = ranked[0], ranked[-1]
    text = f"Removing {first} alone changes the loss by {short(most)} (from {short(result.loss)})"
    return text + (f", removing {last} by {short(least)}." if len(ranked) > 1 else ".")


def importance_panels(result: Importance) -> list[Panel]:
    """Panels on what each shortcut and each branch is worth, in loss and in flow."""
    return [
        Panel(
            "What each one costs in loss",
            importance_bars(result),
            "One edit at a time, from these weights, without training again: a shortcut taken out, or its"
            " branch.",
            [result.table()],
        ),
        Panel(
            "What each one costs in flow",
            importance_bars(result, "flow_cost"),
            "Decades of gradient that are lost on the way to the first boundary; to the left of zero,"
            " gained.",
        ),
    ]


@view.register
def _(result: Importance) -> Document:
    return Document(
        "Which shortcuts matter",
        f"loss as built {short(result.loss)}, {result.mode} mode",
        [importance_answer(result)],
        importance_panels(result),
        result.notes,
    )
