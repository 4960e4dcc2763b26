"""Views of curvature: extreme eigenvalues and spectral density."""

from __future__ import annotations

import numpy as np

from skipscope._numbers import short
from skipscope.curvature import ExtremeEigenvalues, SpectralDensity
from skipscope.report._charts import Bars, Document, Lines, Mark, Panel, Series
from skipscope.report._document import view


@view.register
def _(result: ExtremeEigenvalues) -> Document:
    values = np.concatenate([result.largest, result.smallest[::-1]])
    bounds = np.concatenate([result.largest_residuals, result.smallest_residuals[::-1]])
    labels = [f"largest {i + 1}" for i in range(len(result.largest))] + [
        f"smallest {i + 1}" for i in range(len(result.smallest))
    ][::-1]
    chart = Bars(
        labels,
        [values.tolist()],
        ["lambda"],
        "eigenvalue",
        [(values - bounds).tolist()],
        [(values + bounds).tolist()],
    )
    table = result.table()
    answer = (
        f"The curvature goes from {short(float(result.smallest[0]))} to {short(float(result.largest[0]))}:"
        f" |smallest/largest| is {short(result.ratio)}" + ("." if result.converged else "; not converged.")
    )
    panel = Panel(
        "Both ends of the spectrum",
        chart,
        "To the left of zero the surface curves down. Whiskers are bounds.",
        [table],
    )
    return Document(table.title, "", [answer], [panel], table.notes)


@view.register
def _(result: SpectralDensity) -> Document:
    floor = float(np.nanmax(result.density)) * 1e-8 or 1e-300
    keep = result.density > floor
    series = Series(
        "density",
        result.grid[keep].tolist(),
        result.density[keep].tolist(),
        np.maximum(result.low[keep], floor).tolist(),
        np.maximum(result.high[keep], floor).tolist(),
    )
    marks = [Mark(0.0, "0")] if keep.any() and result.grid[keep].min() < 0 < result.grid[keep].max() else []
    chart = Lines([series], "eigenvalue", "density", log_y=True, marks=marks)
    table = result.table()
    answer = (
        f"{100 * result.negative_share:.2g} % of the eigenvalues are negative; the trace is"
        f" {short(result.trace)}."
    )
    return Document(
        table.title,
        "",
        [answer],
        [Panel("How the eigenvalues are spread", chart, "The band covers 95 % over random probes.", [table])],
        table.notes,
    )
