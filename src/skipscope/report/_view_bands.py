"""Views of surfaces over several seeds, and of curvature maps."""

from __future__ import annotations

import numpy as np

from skipscope._numbers import short
from skipscope.report._charts import Bars, Chart, Document, Lines, Panel, Series, Surface, Surfaces
from skipscope.report._document import view
from skipscope.report._view_surfaces import axes_of, height_sentence, pair_panels, surface_chart
from skipscope.surfaces import CurvatureMap, PairedBand, PairedMaps, SurfaceBand


@view.register
def _(result: SurfaceBand) -> Document:
    first = next(iter(result.surfaces.values()))
    if result.betas.size:
        parts = {"median": result.median, "lowest": result.low, "highest": result.high}
        chart: Chart = Surfaces(
            [Surface(v, result.alphas, result.betas, name, broken=np.isnan(v)) for name, v in parts.items()],
            "loss",
            axes_of(first),
        )
    else:
        chart = Lines(
            [
                Series(
                    "median over seeds",
                    *(v.tolist() for v in (result.alphas, result.median, result.low, result.high)),
                )
            ],
            axes_of(first)[0],
            "loss",
            log_y=bool(np.nanmin(result.median) > 0),
        )
    table = result.table()
    caption = (
        f"At each point the median, lowest and highest loss over {len(result.surfaces)} seeds: what differs"
        " is the direction's, what stays is the network's. "
    )
    panels = [
        Panel("What the directions change, and what not", chart, caption + height_sentence(chart), [table])
    ]
    seeds = surface_chart({f"seed {seed}": surface for seed, surface in result.surfaces.items()})
    panels.append(Panel("Each seed's own surface", seeds, "The same network along different directions."))
    answer = "; ".join(
        f"{name} {short(mean)} ± {short(spread, 2)}" for name, (mean, spread) in result.scores.items()
    )
    return Document(
        table.title[:1].upper() + table.title[1:],
        "",
        [f"Over {len(result.surfaces)} seeds: {answer}."],
        panels,
        table.notes,
    )


@view.register
def _(result: PairedBand) -> Document:
    table = result.table()
    first = next(iter(result.scores))
    shares = {
        f"{score}, {twin}": share for twin, by in result.agreement.items() for score, share in by.items()
    }
    answers = [
        f"{twin} has a higher {score} than {first} on {100 * share:.0f} % of {len(result.pairs)} seeds."
        for twin, by in result.agreement.items()
        for score, share in by.items()
    ]
    bars = Bars(
        list(shares),
        [list(shares.values())],
        ["share of seeds"],
        f"share of seeds on which the twin scores higher than {first}",
    )
    panels = [
        Panel(
            "Do the seeds agree?",
            bars,
            "Near 0 or 1 the direction does not matter; near a half it decides.",
            [table],
        )
    ]
    seed, pair = next(iter(result.pairs.items()))
    panels += [Panel(f"{p.heading} (seed {seed})", p.chart, p.caption, p.tables) for p in pair_panels(pair)]
    return Document(table.title[:1].upper() + table.title[1:], "", answers[:3], panels, table.notes)


@view.register
def _(result: CurvatureMap) -> Document:
    table = result.table()
    convex = (
        f"{100 * float(result.convex.mean()):.0f} % of the plane is convex in all {result.parameters:,}"
        " directions."
    )
    if not result.betas.size:
        series = [Series("|smallest / largest|", result.alphas.tolist(), result.ratio.tolist())]
        chart: Chart = Lines(series, "direction 1", "|smallest / largest eigenvalue|", log_y=True)
        return Document(
            table.title,
            "",
            [convex],
            [Panel("Curvature along the line", chart, "Low is convex or nearly so.", [table])],
            table.notes,
        )
    doubtful = ~result.converged
    maps = [
        (
            "|smallest / largest|",
            result.ratio,
            (
                "Dark is convex or nearly so, in every direction; bright is where the surface curves down"
                " almost as much as up."
            ),
            "ratio",
        ),
        (
            "largest eigenvalue",
            np.where(result.largest > 0, result.largest, np.nan),
            "How sharp the valley is.",
            "largest eigenvalue",
        ),
    ]
    panels = []
    for name, values, caption, height in maps:
        surface = Surface(values, result.alphas, result.betas, name, dots=doubtful, dots_mean="not converged")
        drawing = Surfaces([surface], height)
        heading = "Where the surface curves down" if not panels else "How steep it is"
        panels.append(
            Panel(heading, drawing, f"{caption} {height_sentence(drawing)}", [] if panels else [table])
        )
    return Document(table.title[:1].upper() + table.title[1:], "", [convex], panels, table.notes)


@view.register
def _(result: PairedMaps) -> Document:
    table = result.table()
    first = next(iter(result.maps.values()))
    answers = [
        f"{name}: {100 * float(found.convex.mean()):.0f} % of the plane is convex in all {found.parameters:,}"
        " directions."
        for name, found in result.maps.items()
    ]
    if first.betas.size:
        surfaces = [
            Surface(m.ratio, m.alphas, m.betas, name, dots=~m.converged, dots_mean="not converged")
            for name, m in result.maps.items()
        ]
        chart: Chart = Surfaces(surfaces, "|smallest / largest eigenvalue|")
    else:
        series = [
            Series(name, m.alphas.tolist(), m.ratio.tolist(), style=i)
            for i, (name, m) in enumerate(result.maps.items())
        ]
        chart = Lines(series, "direction 1", "|smallest / largest eigenvalue|", log_y=True)
    caption = f"Low is convex or nearly so, in every direction. {height_sentence(chart)}"
    panels = [Panel("Where the surface curves down", chart, caption, [table])]
    return Document(table.title[:1].upper() + table.title[1:], "", answers, panels, table.notes)
