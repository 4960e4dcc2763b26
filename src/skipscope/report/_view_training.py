"""Views of training curves with bands, and of the strength sweep with its slider."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from skipscope._numbers import short
from skipscope._result import Table
from skipscope.comparison import StrengthSweep, Training, smoothed
from skipscope.report import _view_flow as flows
from skipscope.report._charts import Document, Lines, Panel, Series
from skipscope.report._document import view


def training_lines(training: Training, optimizer: str, style: Mapping[str, int] | None = None) -> Lines:
    """Chart of loss against step: mean over seeds, and a band from the lowest to the highest seed.

    The mean is geometric if all losses are positive.
    """
    series = []
    is_positive = all(
        np.nanmin(by[optimizer].losses) > 0 for by in training.curves.values() if optimizer in by
    )
    for i, (name, by) in enumerate(training.curves.items()):
        if optimizer not in by:
            continue
        losses = smoothed(by[optimizer].losses)
        middle = losses.mean(0)
        if is_positive:
            with np.errstate(divide="ignore", invalid="ignore"):
                middle = np.exp(np.log(losses).mean(0))
        steps = list(range(1, losses.shape[1] + 1))
        series.append(
            Series(
                name,
                steps,
                middle.tolist(),
                losses.min(0).tolist(),
                losses.max(0).tolist(),
                style=(style or {}).get(name, i),
                tips=[f"{name}  step {s}: {short(float(m))}" for s, m in zip(steps, middle)],
            )
        )
    return Lines(
        series,
        f"step, {optimizer}",
        f"training loss, {optimizer}, each at its best rate",
        log_y=is_positive,
        level=(training.target, f"target {training.target:.3g}"),
    )


def update_lines(training: Training, optimizer: str, style: Mapping[str, int] | None = None) -> Lines:
    """Chart of |update| / |weights| against step: geometric mean over seeds, and a band over all seeds."""
    series = []
    for i, (name, by) in enumerate(training.curves.items()):
        if optimizer not in by:
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = smoothed(np.log(by[optimizer].update_ratio))
        low, middle, high = (np.exp(part).tolist() for part in (logs.min(0), logs.mean(0), logs.max(0)))
        steps = list(range(1, logs.shape[1] + 1))
        series.append(
            Series(
                name,
                steps,
                middle,
                low,
                high,
                style=(style or {}).get(name, i),
                tips=[f"{name}  step {s}: {short(m)}" for s, m in zip(steps, middle)],
            )
        )
    return Lines(
        series, f"step, {optimizer}", f"size of an update over size of the weights, {optimizer}", log_y=True
    )


def sweep_table(training: Training) -> Table:
    rates = list(
        dict.fromkeys(rate for by in training.curves.values() for c in by.values() for rate in c.sweep)
    )
    rows = [
        [twin, optimizer, *(c.sweep.get(rate) for rate in rates)]
        for twin, by in training.curves.items()
        for optimizer, c in by.items()
    ]
    return Table(
        "The sweep: final loss by learning rate",
        ["network", "optimizer", *rates],
        rows,
        ["The smoothed loss at the end, on a seed that is not among those shown; inf: it diverged."],
    )


@view.register
def _(result: Training) -> Document:
    optimizers = list(dict.fromkeys(o for by in result.curves.values() for o in by))
    panels = [
        Panel(
            f"Training with {optimizer}",
            training_lines(result, optimizer),
            "The line is the mean over seeds, the band runs from the lowest to the highest of them.",
            [result.table(), sweep_table(result)] if i == 0 else [],
        )
        for i, optimizer in enumerate(optimizers)
    ]
    return Document(
        "Twins, trained side by side",
        f"{len(result.seeds)} seeds, {result.steps} steps",
        _training_answer(result, optimizers),
        panels,
        result.table().notes,
    )


def _training_answer(training: Training, optimizers: list[str]) -> list[str]:
    sentences = []
    for optimizer in optimizers:
        counts = [
            f"{name} {training.steps_text(name, optimizer)}"
            for name, by in training.curves.items()
            if optimizer in by
        ]
        sentences.append(f"Steps to a loss of {training.target:.3g} with {optimizer}: {', '.join(counts)}.")
    return sentences


def strength_lines(sweep: StrengthSweep) -> Lines:
    """Chart of the flow at every strength; a slider highlights one of them."""
    at = list(range(sweep.gradient_rms.shape[1]))
    series = [
        Series(
            "",
            at,
            flow.tolist(),
            frame=i,
            style=0,
            tips=[
                f"strength {short(float(s))}, {name}: {short(float(v))}" for name, v in zip(sweep.names, flow)
            ],
        )
        for i, (s, flow) in enumerate(zip(sweep.strengths, sweep.gradient_rms))
    ]
    labels = [
        f"{short(float(s), 2)}: {state}"
        + (f", {abs(fall):.1f} decades {'lost' if fall >= 0 else 'gained'}" if math.isfinite(fall) else "")
        for s, fall, state in zip(sweep.strengths, sweep.fall_decades, sweep.states)
    ]
    return Lines(
        series,
        flows.DEPTH,
        "gradient RMS, |dL/d(output)| = 1",
        log_y=True,
        frames=labels,
        frame=len(labels) - 1,
        slider="strength of every shortcut",
    )


@view.register
def _(result: StrengthSweep) -> Document:
    caption = (
        "Move the slider: at 0 every shortcut is removed, at 1 the network is as built. The thin lines are"
        " the other strengths."
    )
    first, last = result.fall_decades[0], result.fall_decades[-1]
    answer = (
        f"At strength {short(float(result.strengths[0]))} the gradient loses {short(float(first))} decades,"
        f" at {short(float(result.strengths[-1]))} {short(float(last))}."
    )
    return Document(
        "The flow as shortcuts are turned up",
        "",
        [answer],
        [Panel("Flow by strength", strength_lines(result), caption, [result.table()])],
        result.table().notes,
    )
