"""Views of loss surfaces: in 3-D and as contours, twins side by side, and their difference."""

from __future__ import annotations

import numpy as np

from skipscope._numbers import short
from skipscope.report import _surface_charts
from skipscope.report._charts import Chart, Document, Lines, Mark, Panel, Series, Surface, Surfaces
from skipscope.report._document import view
from skipscope.surfaces import Difference, PairedSurfaces
from skipscope.surfaces import Surface as LossSurface


def axes_of(surface: LossSurface) -> tuple[str, str]:
    """Names of the axes, with the unit of random directions."""
    by = surface.provenance.normalize
    unit = f" in |w| by {by}" if by != "none" else ""
    names = [f"{n}{unit}" if n.startswith("random direction") else n for n in surface.axis_names]
    return (names[0], names[1] if len(names) > 1 else "direction 2")


def surface_chart(surfaces: dict[str, LossSurface]) -> Chart:
    """Chart of surfaces side by side on one scale, or of lines if there is only one direction."""
    first = next(iter(surfaces.values()))
    if not first.betas.size:
        series = [
            Series(
                name,
                s.alphas.tolist(),
                s.values.tolist(),
                style=i,
                low=None if s.stderr is None else (s.values - 1.96 * s.stderr).tolist(),
                high=None if s.stderr is None else (s.values + 1.96 * s.stderr).tolist(),
            )
            for i, (name, s) in enumerate(surfaces.items())
        ]
        said = [f"{name}: {text}" for name, s in surfaces.items() if (text := _not_numbers(s.values))]
        return Lines(
            series,
            axes_of(first)[0],
            "loss",
            log_y=_wide(surfaces),
            marks=_known_places(first),
            foot="; ".join(said),
        )
    return Surfaces([drawn(s, name) for name, s in surfaces.items()], "loss", axes_of(first))


def drawn(surface: LossSurface, name: str) -> Surface:
    """Surface of a chart, with the known weights, and with dots at computed points unless all are."""
    path, points = [], surface.points
    if points is not None and points.coordinates.ndim == 2 and points.coordinates.shape[1] == 2:
        path = [
            (
                float(a),
                float(b),
                f"{label}: own loss {short(float(loss))}, {100 * float(far):.0f} % off the plane",
            )
            for label, (a, b), far, loss in zip(
                points.names, points.coordinates, points.distances, points.losses
            )
        ]
    dots = None if surface.computed.all() else surface.computed
    note = "; ".join(text for text in (surface.label, _not_numbers(surface.values, "striped: ")) if text)
    return Surface(
        surface.values,
        surface.alphas,
        surface.betas,
        name,
        note,
        path=path,
        dots=dots,
        dots_mean="computed, the rest interpolated",
        broken=np.isnan(surface.values),
        origin=(1.0 if surface.axis_names[:1] == ("shortcut strength",) else 0.0, 0.0),
    )


def _not_numbers(values: np.ndarray, how: str = "") -> str:
    """Text on the number of points without a height, or ""."""
    missing = int(np.isnan(values).sum())
    return f"{how}NaN at {missing} of {values.size} points" if missing else ""


def _known_places(surface: LossSurface) -> list[Mark]:
    """Marks for the known solutions on a line, each with its own loss."""
    points = surface.points
    if points is None:
        return []
    places = zip(points.names, points.coordinates[:, 0], points.losses)
    return [Mark(float(at), f"{name}, own loss {short(float(loss))}") for name, at, loss in places]


def _wide(surfaces: dict[str, LossSurface]) -> bool:
    values = np.concatenate([s.values[np.isfinite(s.values)] for s in surfaces.values()])
    return bool(values.size and values.min() > 0 and values.max() / values.min() > 30)


def height_sentence(chart: Chart) -> str:
    """Sentence on the range and scale of the heights, and on clipping."""
    if not isinstance(chart, Surfaces):
        return ""
    scale = _surface_charts.heights(chart)
    if any(surface.signed for surface in chart.surfaces):
        return f"Colours end at {short(scale.high)} on either side of zero." if scale.cut else ""
    cut = ", where it is cut off" if scale.cut else ""
    under = ", as deep as is shown," if scale.under else ""
    how = "a log scale" if scale.log else "a linear scale"
    return (
        f"The heights run from {short(scale.low)}{under} to {short(scale.high)}{cut}, on {how}; the cross"
        " marks the weights as they are."
    )


def surface_answer(name: str, surface: LossSurface) -> str:
    """Sentence that summarises a surface."""
    scores = surface.scores
    if surface.label:
        return f"{name}: {surface.label}."
    return (
        f"{name}: loss {short(scores.centre)} at the centre; {100 * scores.convexity_share:.0f} % of the"
        f" plane curves up in both directions, roughness {short(scores.roughness)}."
    )


@view.register
def _(result: LossSurface) -> Document:
    chart = surface_chart({result.name: result})
    table = result.table()
    tables = [
        table,
        *([result.points.table()] if result.points else []),
        result.checks.table(),
        result.provenance.table(),
    ]
    panel = Panel("The loss around the weights", chart, height_sentence(chart), tables)
    panels = [panel]
    if result.stderr is not None and result.betas.size:
        known = np.where(np.isfinite(result.stderr), result.stderr, np.nan)
        error = Surfaces(
            [Surface(known, result.alphas, result.betas, "standard error")],
            "standard error of the loss",
            axes_of(result),
            flat=True,
        )
        panels.append(
            Panel("How sure each height is", error, "Standard error over the samples, point by point.")
        )
    panels += [metric_panel(result, name) for name in result.metrics]
    return Document(
        f"The loss surface of {result.name or 'the network'}",
        "",
        [surface_answer(result.name or "The network", result)],
        panels,
        table.notes,
    )


def metric_panel(surface: LossSurface, name: str) -> Panel:
    """Panel of a metric at the same points, on a linear scale."""
    values = surface.metrics[name]
    if surface.betas.size:
        drawn = Surface(values, surface.alphas, surface.betas, name, broken=np.isnan(values))
        chart: Chart = Surfaces([drawn], name, axes_of(surface), flat=True, linear=True)
    else:
        chart = Lines([Series(name, surface.alphas.tolist(), values.tolist())], axes_of(surface)[0], name)
    return Panel(f"{name} on the same points", chart, "Read in the same pass as the loss.")


def difference_chart(result: Difference, like: LossSurface | None = None) -> Chart:
    """Chart of a difference, coloured on both sides of zero."""
    shape = result.values.shape
    alphas = like.alphas if like is not None else np.linspace(-1, 1, shape[0])
    betas = like.betas if like is not None else np.linspace(-1, 1, shape[1] if len(shape) > 1 else 0)
    if len(shape) < 2:
        low, high = (None if v is None else v.tolist() for v in (result.low, result.high))
        return Lines(
            [Series(result.name, alphas.tolist(), result.values.tolist(), low, high)],
            axes_of(like)[0] if like is not None else "direction 1",
            "difference of the loss",
            level=(0.0, "no difference"),
        )
    drawn = Surface(
        result.values,
        alphas,
        betas,
        result.name,
        _not_numbers(result.values, "striped: "),
        signed=True,
        broken=np.isnan(result.values),
    )
    axes = axes_of(like) if like is not None else ("direction 1", "direction 2")
    return Surfaces([drawn], "difference of the loss", axes, flat=True)


def difference_sentence(result: Difference) -> str:
    """Sentence on the median difference, and on the share of points that clearly differ."""
    clear = result.clear_share
    finite = result.values[np.isfinite(result.values)]
    middle = float(np.median(finite)) if finite.size else float("nan")
    sure = (
        f"; at {100 * clear:.0f} % of the points the 95 % interval leaves zero out"
        if clear is not None
        else ""
    )
    return f"{result.name}: the median difference is {short(middle)}{sure}."


@view.register
def _(result: Difference) -> Document:
    panel = Panel(
        "One surface minus the other", difference_chart(result), "White is no difference.", [result.table()]
    )
    return Document(
        f"The difference of two surfaces: {result.name}", "", [difference_sentence(result)], [panel]
    )


def pair_panels(result: PairedSurfaces) -> list[Panel]:
    """Panels of twins side by side, and of their differences, if defined."""
    chart = surface_chart(result.surfaces)
    panels = [Panel("Side by side, on one scale", chart, height_sentence(chart), [result.table()])]
    like = next(iter(result.surfaces.values()))
    for difference in result.differences.values():
        drawn = difference_chart(difference, like)
        text = f"White is no difference; {difference_sentence(difference)} {height_sentence(drawn)}"
        panels.append(Panel(f"The difference: {difference.name}", drawn, text, [difference.table()]))
    return panels


@view.register
def _(result: PairedSurfaces) -> Document:
    answers = [surface_answer(name, surface) for name, surface in result.surfaces.items()]
    return Document("Loss surfaces side by side", "", answers, pair_panels(result), result.table().notes)
