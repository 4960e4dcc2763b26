"""The words around the numbers: three sentences to read aloud, each claim of the lecture, and how it was measured.

Every sentence is built from what was measured; where a claim is only half true the sentence says so.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from skipscope._numbers import short
from skipscope.comparison._results import Claim, Curves, Training
from skipscope.flow import GradientFlow
from skipscope.surfaces import Scores

if TYPE_CHECKING:
    from skipscope.comparison._compare import Evidence, Roles, Settings


# --- the answer


def summary(evidence: Evidence) -> tuple[str, ...]:
    """Three sentences, each with its number: the gradient, the training, the way it takes."""
    sentences = [_flow_sentence(evidence), _training_sentence(evidence), _path_sentence(evidence)]
    return tuple(sentence for sentence in sentences if sentence)


def _flow_sentence(evidence: Evidence) -> str:
    roles, flow = evidence.roles, evidence.flow
    if not {roles.having, roles.lacking} <= flow.keys():
        return ""
    having, lacking = flow[roles.having], flow[roles.lacking]
    return (
        f"Without shortcuts the gradient {_travel(lacking)} on its way back through {len(lacking.boundaries)} boundaries; "
        f"with them it {_travel(having)}."
    )


def _travel(flow: GradientFlow) -> str:
    """What happens to the gradient between the last and the first boundary, as a factor people can picture."""
    fall = flow.verdict.fall_decades
    if fall is None or not math.isfinite(fall):
        return f"does not arrive ({flow.verdict.state})"
    if abs(fall) < math.log10(2):
        return f"keeps its size ({short(10**-fall, 2)} of it arrives)"
    return f"shrinks {_factor(fall)}" if fall > 0 else f"grows {_factor(-fall)}"


def _factor(decades: float) -> str:
    return f"{10**decades:,.0f}-fold" if decades < 6 else f"by {short(decades, 2)} decades"


def _training_sentence(evidence: Evidence) -> str:
    training, roles = evidence.training, evidence.roles
    if training is None:
        return ""
    optimizers = list(training.curves[roles.having])
    if not any(_tells(training, roles, optimizer) for optimizer in optimizers):
        return (
            f"Neither network reaches a loss of {training.target:.3g} in {training.steps} steps, each at its best rate: they end at "
            + ", and ".join(f"{_ends(training, roles, optimizer)} under {optimizer}" for optimizer in optimizers) + "."
        )  # fmt: skip
    parts = []
    for optimizer in optimizers:
        counts = [training.steps_text(name, optimizer) for name in (roles.having, roles.lacking)]
        parts.append(f"{counts[0]} steps with shortcuts and {counts[1]} without under {optimizer}")
    return f"To reach a loss of {training.target:.3g} it takes {', and '.join(parts)}, each at its best rate."


def _ends(training: Training, roles: Roles, optimizer: str) -> str:
    """Where the smoothed loss ends, with shortcuts and without."""
    having, lacking = (
        short(training.curves[name][optimizer].final_loss) for name in (roles.having, roles.lacking)
    )
    return f"{having} with shortcuts and {lacking} without"


def _tells(training: Training, roles: Roles, optimizer: str) -> bool:
    """Whether the steps were enough to say who is slower: most seeds of one of the two reach the target."""
    both = (training.curves[name][optimizer] for name in (roles.having, roles.lacking))
    return any(math.isfinite(_middle(curves)) for curves in both)


def _path_sentence(evidence: Evidence) -> str:
    paths = evidence.paths.get(evidence.roles.having)
    if paths is None:
        return ""
    middle = int(np.searchsorted(np.cumsum(paths.shares), 0.5))
    reach = int(np.searchsorted(np.cumsum(paths.shares), 0.95))
    return (
        f"Of the {paths.branches} branches a gradient could pass, the paths that carry it pass {short(paths.mean_length)} "
        f"on average: half of it takes paths through at most {middle}, 95 % through at most {reach}."
    )


# --- the lecture's claims


def claims(evidence: Evidence) -> tuple[Claim, ...]:
    """Each claim of the lecture with what was found, in the lecture's order."""
    tellers = (_smaller, _product, _stagnate, _alternative, _landscape, _which, _strength)
    return tuple(teller(evidence) for teller in tellers)


def _smaller(evidence: Evidence) -> Claim:
    roles, flow = evidence.roles, evidence.flow
    lacking, having = flow[roles.lacking], flow[roles.having]
    controls = [(name, flow[name]) for name in roles.controls if name in flow]
    falls = lacking.verdict.fall_decades
    shrinks = lacking.verdict.state == "vanishing"
    kept = [name for name, f in controls if f.verdict.state == "healthy" and name.startswith(roles.lacking)]
    answer = "half true" if shrinks and kept else "holds" if shrinks else "does not hold here"
    finding = f"Without shortcuts: {lacking.verdict}. With them: {having.verdict}."
    if kept:
        fall = flow[kept[0]].verdict.fall_decades
        finding += f" But depth alone does not do it: {kept[0]} has no shortcut either and falls {short(fall, 2)} decades."
    elif falls is not None and not shrinks:
        finding += " Its gradients do arrive, with or without shortcuts."
    detached = flow.get(f"{roles.having}, detached")
    if detached is not None:
        finding += f" Same forward pass, shortcuts closed to the gradient: {_plain_fall(detached)}."
    see = "Each line is one network; read it from right (the loss) to left (the input). A straight line down is a product of equal factors."
    return Claim(
        "smaller",
        "Gradients become progressively smaller as we go back through the network.",
        answer,
        finding,
        see,
    )


def _plain_fall(flow: GradientFlow) -> str:
    fall = flow.verdict.fall_decades
    return flow.verdict.state if fall is None else f"{flow.verdict.state}, fall {short(fall, 3)} decades"


def _product(evidence: Evidence) -> Claim:
    flow = evidence.flow[evidence.roles.lacking]
    factors = np.array([b.factor for b in flow.boundaries if b.factor], dtype=float)
    if not len(factors) or not np.isfinite(factors).all():
        return Claim(
            "product",
            _PRODUCT,
            "not measured",
            "There are no two boundaries with a gradient between them.",
            "",
        )
    typical, product = float(np.exp(np.log(factors).mean())), float(np.prod(factors))
    below = float((factors < 1).mean())
    answer = (
        "holds" if below > 0.5 and product < 0.5 else "half true" if product < 1 else "does not hold here"
    )
    finding = (
        f"Without shortcuts the {len(factors)} factors have a geometric mean of {short(typical)} ({below:.0%} of them are "
        f"below 1); their product, {short(product)}, is what reaches the first boundary."
    )
    having = evidence.flow.get(evidence.roles.having)
    if having is not None and having.product is not None:
        per = having.product ** (1 / max(1, len(having.boundaries) - 1))
        finding += f" With shortcuts the mean factor is {short(per)} and the product {short(having.product)}."
    return Claim(
        "product",
        _PRODUCT,
        answer,
        finding,
        "Each dot is the factor at one boundary; below the line at 1 the gradient shrinks there.",
    )


_PRODUCT = "It becomes extremely small because it is a product of small quantities."
_STAGNATE = "The weight updates stagnate, learning becomes stagnant, and convergence is delayed."


def _stagnate(evidence: Evidence) -> Claim:
    training, roles = evidence.training, evidence.roles
    if training is None:
        return Claim("stagnate", _STAGNATE, "not measured", "The networks were not trained.", "")
    optimizers = training.curves[roles.having]
    told = [optimizer for optimizer in optimizers if _tells(training, roles, optimizer)]
    slower = [_slower(training, roles, optimizer) for optimizer in told]
    texts = [_steps(training, roles, optimizer, optimizer in told) for optimizer in optimizers]
    finding = f"Steps to a loss of {training.target:.3g}, best rate each. " + "; ".join(texts) + "."
    rescued = {
        name: [optimizer for optimizer, curves in training.curves[name].items() if curves.learns]
        for name in roles.controls
        if name.startswith(roles.lacking) and name in training.curves
    }
    cures = [f"{name!r} learns under {' and '.join(by)}" for name, by in rescued.items() if by]
    if cures:
        finding += f" It can also be cured without a shortcut: {'; '.join(cures)}."
    if not told:
        finding += " More steps would tell who is slower (steps=, --steps)."
    answer = (
        "not measured"
        if not told
        else "does not hold here"
        if not any(slower)
        else "half true"
        if cures or not all(slower)
        else "holds"
    )
    deeper = _deeper(evidence)
    return Claim(
        "stagnate",
        _STAGNATE,
        answer,
        finding + deeper,
        "Bands are the range over seeds. Look where each curve leaves the plateau of guessing.",
    )


def _slower(training: Training, roles: Roles, optimizer: str) -> bool:
    return _middle(training.curves[roles.lacking][optimizer]) > _middle(
        training.curves[roles.having][optimizer]
    )


def _steps(training: Training, roles: Roles, optimizer: str, told: bool) -> str:
    """What both networks took under one optimizer; where they end, when neither came to the target."""
    with_, without = (training.curves[name][optimizer] for name in (roles.having, roles.lacking))
    updates = f"updates of {short(_update(with_))} and {short(_update(without))} of the weights' size"
    if not told:
        ends = _ends(training, roles, optimizer)
        return f"{optimizer}: neither in {training.steps} steps, which end at {ends} ({updates})"
    counts = [training.steps_text(name, optimizer) for name in (roles.having, roles.lacking)]
    return f"{optimizer}: {counts[0]} steps with shortcuts, {counts[1]} without ({updates})"


def _middle(curves: Curves) -> float:
    """Median steps to the target; inf where most seeds never reach it."""
    return float(np.median([np.inf if s is None else s for s in curves.steps_to_target]))


def _update(curves: Curves) -> float:
    return float(np.nanmedian(curves.update_ratio))


def _deeper(evidence: Evidence) -> str:
    """What the ladder says beyond the rung that was trained in full."""
    roles = evidence.roles
    stuck = [r for r in evidence.ladder if r.learns and not any(r.learns[roles.lacking].values())]
    return (
        f" At {stuck[0].depth} hidden layers and more the plain network does not get there on the first seed, at any rate tried."
        if stuck and stuck[-1] is evidence.ladder[-1]
        else ""
    )


_ALTERNATIVE = "Shortcut connections create an alternative path for the gradient by skipping layers."


def _alternative(evidence: Evidence) -> Claim:
    roles = evidence.roles
    split, paths = evidence.split.get(roles.having), evidence.paths.get(roles.having)
    if split is None or paths is None:
        return Claim(
            "path", _ALTERNATIVE, "not measured", "The split or the path spectrum could not be had.", ""
        )
    shares = np.array([s.share for s in split if s.share is not None])
    finding = (
        f"At the {len(split)} forks the shortcut carries {short(100 * float(np.median(shares)), 3)} % of the gradient (median; "
        f"the branch the rest). Taken apart by path, exactly: the mean path passes {short(paths.mean_length)} of "
        f"{paths.branches} branches; the path that passes none carries {short(100 * float(paths.shares[0]))} %, and the "
        f"parts add up to the plain gradient with an error of {short(paths.residual)}."
    )
    carried = float(np.median(shares))
    answer = "holds" if carried >= 0.5 else "half true"
    if carried < 0.5:
        finding += " Here the branches carry more than the shortcuts."
    return Claim(
        "path",
        _ALTERNATIVE,
        answer,
        finding,
        "Height: norm of the gradient that passed exactly k branches, on a log scale. Most of it has taken short ways.",
    )


_SURFACE = "Shortcuts change the loss surface (Li et al. 2018): smooth with them, chaotic without."


def _landscape(evidence: Evidence) -> Claim:
    trained, roles = evidence.surfaces.get("trained"), evidence.roles
    if trained is None or not {roles.having, roles.lacking} <= trained.surfaces.keys():
        return Claim("surface", _SURFACE, "not measured", "The surfaces could not be had.", "")
    having, lacking = (trained.surfaces[name] for name in (roles.having, roles.lacking))
    parts = [
        f"{name!r} {'is ' * bool(s.label)}{s.label or _shape(s.scores)}"
        for name, s in trained.surfaces.items()
    ]
    finding = (
        "Share of the surface that curves up in both directions, and of its ups and downs that one valley would not need: "
        + "; ".join(parts) + "."
    )  # fmt: skip
    if having.label or lacking.label:
        answer = "not measured"
        finding += " Nothing about smoothness follows from the surface of a network that has not learnt; often it is flat."
    else:
        smoother = having.scores.roughness < lacking.scores.roughness
        rounder = having.scores.convexity_share > lacking.scores.convexity_share
        answer = (
            "holds" if smoother and rounder else "half true" if smoother or rounder else "does not hold here"
        )
    paired = evidence.surfaces.get("paired")
    if paired is not None and paired.difference is not None:
        before, after = (surface.scores.centre for surface in paired.surfaces.values())
        finding += (
            f" The trained weights with shortcuts have a loss of {short(before)}; take the shortcuts out of them and it is "
            f"{short(after)} (over the plane the median change is {short(float(np.nanmedian(paired.difference)))})."
        )
    return Claim(
        "surface",
        _SURFACE,
        answer,
        finding,
        "A bowl is easy to walk down; look for ridges, and for ground so flat that no step leads anywhere.",
    )


def _shape(scores: Scores) -> str:
    """Convexity and roughness, each with its standard error."""
    words = []
    for name in ("convexity_share", "roughness"):
        error = scores.errors.get(name)
        words.append(
            f"{100 * getattr(scores, name):.1f} %" + (f" ± {100 * error:.1f}" if error is not None else "")
        )
    return " and ".join(words)


_WHICH = "They play a crucial role in preserving the flow of gradients."


def _which(evidence: Evidence) -> Claim:
    ranking = evidence.importance.get(evidence.roles.having)
    ranked = [i for i in ranking.ranked if i.removed is not None] if ranking is not None else []
    if not ranked:
        return Claim("which", _WHICH, "not measured", "No shortcut could be taken out alone.", "")
    costs = np.array([i.removed.loss_cost for i in ranked if i.removed is not None])
    lesions = np.array([i.lesioned.loss_cost for i in ranked if i.lesioned is not None])
    first, last = ranked[0], ranked[-1]
    assert first.removed is not None
    assert last.removed is not None
    finding = (
        f"Taking out one shortcut alone raises the loss by {short(first.removed.loss_cost)} at {first.name} and by "
        f"{short(last.removed.loss_cost)} at {last.name} (median {short(float(np.median(costs)))})"
    )
    if len(lesions):
        finding += f"; taking out one branch alone costs {short(float(np.median(lesions)))} (median)"
    answer = "holds" if len(lesions) and np.median(costs) > np.median(lesions) else "half true"
    return Claim(
        "which",
        _WHICH,
        answer,
        finding + ".",
        "The longest bar is the shortcut this network can least do without.",
    )


_STRENGTH = "The effect is the shortcut's: turn it up and the gradient comes through."


def _strength(evidence: Evidence) -> Claim:
    sweep = evidence.strength.get(evidence.roles.having)
    if sweep is None or not np.isfinite(sweep.fall_decades[[0, -1]]).all():
        return Claim("strength", _STRENGTH, "not measured", "The strength could not be varied.", "")
    start, end = (float(sweep.fall_decades[i]) for i in (0, -1))
    healthy = [float(s) for s, state in zip(sweep.strengths, sweep.states) if state == "healthy"]
    finding = f"The fall goes from {short(start)} decades at strength 0 to {short(end)} at strength 1"
    if not healthy:
        finding += "; it is healthy at none of the strengths tried."
    elif len(healthy) == 1:
        finding += f"; of the strengths tried only {healthy[0]:.1f} is healthy."
    else:
        finding += f"; the verdict is healthy from {healthy[0]:.1f} to {healthy[-1]:.1f}."
    answer = (
        "holds"
        if start - end > 0.3 and sweep.states[-1] == "healthy"
        else "half true"
        if start - end > 0.3
        else "does not hold here"
    )
    return Claim("strength", _STRENGTH, answer, finding, "Move the slider from 0 (removed) to 1 (as built).")


# --- methods


def methods(evidence: Evidence, settings: Settings, details: str = "") -> str:
    """One paragraph that says how everything was measured, with its sources."""
    flow = next(iter(evidence.flow.values()))
    parts = [
        details
        + f"Gradients were measured on {flow.samples} samples in {flow.mode} mode. The flow at a boundary is the RMS of "
        "dL/d(activation), with |dL/d(output)| set to 1; boundaries are the input, each merge, and each weighted module "
        "between merges. 'Removed' takes the shortcuts out of these weights as they are; 'detached' leaves the forward pass "
        "and closes them to the gradient. The path spectrum is exact: the gradient is split by the number of branches passed "
        "(Veit et al. 2016 sampled it)."
    ]
    if evidence.training is not None:
        parts.append(_training_methods(evidence.training))
    if evidence.surfaces:
        parts.append(
            f"Loss surfaces: {settings.grid} x {settings.grid} points over [-1, 1]^2 in two random Gaussian directions, each "
            "normalised filter by filter to the weights (Li et al. 2018), biases and norms zero, in evaluation mode, on the same "
            "samples for every network. Twins trained separately have the same Gaussian draw, and only their scores are compared; "
            "the pair that shares weights is compared point by point."
        )
    return " ".join(parts)


def _training_methods(training: Training) -> str:
    rates = {
        optimizer: ", ".join(curves.sweep)
        for by in training.curves.values()
        for optimizer, curves in by.items()
    }  # fmt: skip
    tried = "; ".join(f"{optimizer} {values}" for optimizer, values in rates.items())
    return (
        f"Training: {training.steps} steps of {training.batch_size} samples, {len(training.seeds)} seeds (varying "
        f"{training.varies}), each network and optimizer at its best rate out of the same sweep on the first seed ({tried}); "
        f"SGD has momentum 0.9. Losses are smoothed over ten steps before a target counts as reached."
    )
