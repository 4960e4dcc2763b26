"""View of a comparison: the answer, the network, then the lecture's claims one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

from skipscope._result import Table
from skipscope.comparison import Claim, Comparison
from skipscope.report import _view_flow as flows
from skipscope.report import _view_paths as paths
from skipscope.report import _view_shortcuts as shortcuts
from skipscope.report import _view_surfaces as surfaces
from skipscope.report import _view_training as trainings
from skipscope.report._charts import Document, Lines, Panel, Series
from skipscope.report._document import view
from skipscope.report._precomputed import resnet56_panel

Thing = TypeVar("Thing")
HEADINGS = {
    "smaller": "The gradient on its way back",
    "product": "A product of small quantities",
    "stagnate": "Training, step by step",
    "path": "An alternative path",
    "surface": "The loss surface",
    "which": "Which shortcuts matter",
    "strength": "Turn the shortcuts up",
}
CREDITS = (
    (
        "Gradient paths: A. Veit, M. Wilber, S. Belongie, Residual Networks Behave Like Ensembles of"
        " Relatively Shallow Networks, 2016. Loss surfaces: H. Li, Z. Xu, G. Taylor, C. Studer, T. Goldstein,"
        " Visualizing the Loss Landscape of Neural Nets, 2018."
    ),
)
DIGITS = (
    "Data: Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning"
    " Repository, CC BY 4.0."
)


def styles(result: Comparison) -> dict[str, int]:
    """Style of each network, the same in every chart: cool colours with shortcuts, warm without."""
    cool, warm = iter((0, 2, 7, 3, 5) * 9), iter((1, 4, 6, 5) * 9)
    return {twin.name: next(cool if len(result.found.get(twin.name, ())) else warm) for twin in result.twins}


def _twins(result: Comparison, things: Mapping[str, Thing]) -> dict[str, Thing]:
    names = {twin.name for twin in result.twins}
    return {name: thing for name, thing in things.items() if name in names}


def main_twin(result: Comparison) -> str | None:
    """First network with shortcuts and a gradient split, else with shortcuts. None if there is none."""
    having = [twin.name for twin in result.twins if len(result.found.get(twin.name, ()))]
    return next((name for name in having if name in result.split), having[0] if having else None)


def _smaller(result: Comparison, style: dict[str, int]) -> list[Panel]:
    tables = [flow.table() for flow in result.flow.values()]
    panels = [Panel("", flows.flow_lines(_twins(result, result.flow), style), "", tables)]
    name = main_twin(result)
    edited = {
        key: flow for key, flow in result.flow.items() if key in {f"{name}, removed", f"{name}, detached"}
    }
    if name in result.flow and edited:
        panels.append(
            Panel(
                "The same network, its shortcuts taken away",
                flows.flow_lines({f"{name}, as built": result.flow[name], **edited}),
                "Removed: taken out, from the same weights. Detached: the forward pass stays bit for bit the"
                " same, only no gradient goes through the shortcuts.",
            )
        )
    if len(result.depths) > 1:
        panels.append(
            Panel(
                "The deeper, the more",
                _depth_lines(result, style),
                "Above zero the gradient shrinks on its way back, below it grows.",
                [_depth_table(result)],
            )
        )
    return panels


def _depth_lines(result: Comparison, style: dict[str, int]) -> Lines:
    depths = [float(row.depth) for row in result.depths]
    series = [
        Series(
            name, depths, [row.fall.get(name, math.nan) for row in result.depths], style=style.get(name, 5)
        )
        for name in dict.fromkeys(n for row in result.depths for n in row.fall)
    ]
    ticks = {d: f"{d:g}" for d in depths}
    return Lines(
        series,
        "hidden layers",
        "decades of gradient lost on the way back",
        ticks=ticks,
        level=(0.0, "arrives as it left"),
    )


def _depth_table(result: Comparison) -> Table:
    rows = []
    for row in result.depths:
        for name in row.fall:
            steps = ", ".join(f"{optimizer} {count}" for optimizer, count in row.steps.get(name, {}).items())
            learns = ", ".join(optimizer for optimizer, yes in row.learns.get(name, {}).items() if yes) or (
                "no" if row.learns else "-"
            )
            rows.append([row.depth, name, row.fall[name], row.state.get(name, "-"), steps or "-", learns])
    return Table(
        "The same question at every depth",
        ["hidden layers", "network", "fall (decades)", "verdict", "steps to target", "learns under"],
        rows,
    )


def _product(result: Comparison, style: dict[str, int]) -> list[Panel]:
    twins = _twins(result, result.flow)
    rows = [[name, flow.product, flow.chi, flow.depth_scale] for name, flow in twins.items()]
    note = (
        "chi: mean change of the squared flow at a boundary; depth scale: boundaries over which it changes"
        " e-fold."
    )
    return [
        Panel(
            "",
            flows.factor_lines(twins, style),
            "",
            [Table("The product of all factors", ["network", "product", "chi", "depth scale"], rows, [note])],
        )
    ]


def _stagnate(result: Comparison, style: dict[str, int]) -> list[Panel]:
    training = result.training
    if training is None:
        return []
    optimizers = list(dict.fromkeys(o for by in training.curves.values() for o in by))
    first, *others = [
        Panel(f"With {o}", trainings.training_lines(training, o, style), f"The same networks under {o}.")
        for o in optimizers
    ]
    updates = [
        Panel(
            f"How far a step moves the weights, {o}",
            trainings.update_lines(training, o, style),
            "Stagnation is a line near the bottom: 10⁻³ is usual, and far below it nothing is learnt. At its"
            " own best rate.",
        )
        for o in optimizers
    ]
    first = Panel("", first.chart, "", [training.table(), trainings.sweep_table(training)])
    return [first, *others, *updates]


def _path(result: Comparison, style: dict[str, int]) -> list[Panel]:
    panels = []
    if result.paths:
        shown = _twins(result, result.paths) or result.paths
        panels.append(
            Panel("", paths.path_lines(shown, style), "", [t.table() for t in result.paths.values()])
        )
    name = main_twin(result)
    if name in result.split:
        split = result.split[name]
        panels.append(
            Panel(
                "At each fork, two paths back",
                paths.split_lines(split),
                paths.split_answer(split),
                [s.table() for s in result.split.values()],
            )
        )
    return panels


def _surface(result: Comparison, style: dict[str, int]) -> list[Panel]:
    panels = []
    headings = {
        "trained": "After training, each from its own weights",
        "paired": "The same weights, with and without",
    }
    for key, pair in result.surfaces.items():
        first, *others = surfaces.pair_panels(pair)
        tables = [*first.tables, *(s.checks.table() for s in pair.surfaces.values())]
        panels += [Panel(headings.get(key, key), first.chart, first.caption, tables), *others]
    return [*panels, resnet56_panel()]


def _which(result: Comparison, style: dict[str, int]) -> list[Panel]:
    ranked = next((i for i in result.importance.values() if len(i)), None)
    return paths.importance_panels(ranked) if ranked is not None else []


def _strength(result: Comparison, style: dict[str, int]) -> list[Panel]:
    return [
        Panel(
            name,
            trainings.strength_lines(sweep),
            f"Shown: {name}, from the same weights; the thin lines are the other strengths.",
            [sweep.table()],
        )
        for name, sweep in result.strength.items()
    ]


EVIDENCE: dict[str, Callable[[Comparison, dict[str, int]], list[Panel]]] = {
    "smaller": _smaller,
    "product": _product,
    "stagnate": _stagnate,
    "path": _path,
    "surface": _surface,
    "which": _which,
    "strength": _strength,
}


def _claim_panel(result: Comparison, claim: Claim, style: dict[str, int]) -> Panel:
    evidence = EVIDENCE[claim.key](result, style) if claim.key in EVIDENCE else []
    first, parts = (evidence[0], evidence[1:]) if evidence else (Panel(""), [])
    caption = f"{claim.see} {first.caption}".strip()
    return Panel(
        HEADINGS.get(claim.key, claim.key),
        first.chart,
        caption,
        first.tables,
        claim.claim,
        claim.answer,
        claim.finding,
        parts,
        claim.limits,
        claim.why,
    )


def _network_panel(result: Comparison) -> Panel | None:
    name = main_twin(result)
    if name is None or name not in result.found:
        return None
    found = result.found[name]
    split = result.split.get(name)
    shares = {s.name: s.share for s in split} if split else None
    drawn = shortcuts.drawing(found, shares)
    thick = (
        " An arc's thickness is the share of the gradient that the shortcut carries at its fork."
        if shares
        else ""
    )
    return Panel(
        f"The network with its {len(found)} shortcut{'s' * (len(found) > 1)}",
        drawn,
        f"Drawn: {name}. Each square is a layer, each arc a shortcut that leaves the line and joins it"
        f" again.{thick}",
        [found.table()],
    )


@view.register
def _(result: Comparison) -> Document:
    style = styles(result)
    network = _network_panel(result)
    panels = [
        *([network] if network else []),
        *(_claim_panel(result, claim, style) for claim in result.claims),
    ]
    whole = result.table()
    rows = [[t.name, t.description, t.meaning, t.parameters] for t in result.twins]
    twins = Table("The networks", ["name", "what it is", "without means", "parameters"], rows)
    panels.append(Panel("All in one table", tables=[Table(whole.title, whole.columns, whole.rows), twins]))
    credits = (*CREDITS, *([DIGITS] if "digits" in result.subject.lower() else []))
    return Document(
        "What do its shortcuts do for this network?",
        result.subject,
        result.summary,
        panels,
        [result.methods, *result.notes],
        credits,
        result.provenance,
        {twin.name: twin.description for twin in result.twins},
    )
