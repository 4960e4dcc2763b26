"""Sentences of a comparison: the summary, the lecture's claims, and the description of the methods.

Every sentence is built from measurements of the network and the depth that it names. A claim has two lines:
what is true here, and what does not follow from it. ``why`` holds the numbers behind them.
"""

from __future__ import annotations

import math
import platform

import numpy as np
import torch

from skipscope._numbers import short
from skipscope._version import __version__
from skipscope.comparison._comparison_result import Claim, Comparison
from skipscope.comparison._evidence import Evidence, Roles, Settings
from skipscope.comparison._stages import Clock
from skipscope.comparison.training import Curves, Training
from skipscope.flow import GradientFlow
from skipscope.surfaces import Scores, Surface

HOLDS, PART, FAILS, UNKNOWN = "holds", "holds in part", "does not hold here", "not measured"
# A surface is called chaotic at or above this roughness, or below this convex share (of the plane's points).
CHAOTIC_ROUGHNESS, CHAOTIC_CONVEXITY = 0.05, 0.5


# --- sizes in words ---


def share(decades: float) -> str:
    """The share of a gradient that remains after a loss of ``decades``, in words.

    Example:
        >>> share(0.1), share(2.0), share(16.6), share(-1.54)
        ('all', 'one part in 100', 'one part in 10^17', '35 times as much')
    """
    if abs(decades) < math.log10(2):
        return "all"
    factor = 10 ** abs(decades)
    size = (
        f"10^{abs(decades):.0f}"
        if abs(decades) >= 6
        else f"{factor:,.0f}"
        if factor >= 10
        else short(factor, 2)
    )
    return f"one part in {size}" if decades > 0 else f"{size} times as much"


def arrival(flow: GradientFlow) -> str:
    """A clause on how much of the gradient reaches the first layer."""
    fall = flow.verdict.fall_decades
    if fall is None or not math.isfinite(fall):
        return f"the gradient is {flow.verdict.state}"
    return arrival_of(fall)


def arrival_of(decades: float) -> str:
    """A clause on how much of the gradient reaches the first layer after a loss of ``decades``.

    Example:
        >>> arrival_of(3.0), arrival_of(-1.0)
        ('one part in 1,000 of the gradient reaches the first layer', 'the gradient reaches the first layer 10
        times larger')
    """
    what = share(decades)
    if what == "all":
        return "the gradient reaches the first layer at full size"
    if decades > 0:
        return f"{what} of the gradient reaches the first layer"
    return f"the gradient reaches the first layer {what.removesuffix(' as much')} larger"


def _arrival_brief(decades: float) -> str:
    """Short form of :func:`arrival_of`, for the second half of a sentence."""
    what = share(decades)
    return f"it arrives {what.removesuffix(' as much')} larger" if decades < 0 and what != "all" else what


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


# --- the answer ---


def summary(evidence: Evidence) -> tuple[str, ...]:
    """Up to four sentences for the top of the page: gradient without and with shortcuts, training, paths."""
    sentences = [*_flow_sentences(evidence), _training_sentence(evidence), _path_sentence(evidence)]
    return tuple(sentence for sentence in sentences if sentence)


def _flow_sentences(evidence: Evidence) -> list[str]:
    roles, flow = evidence.roles, evidence.flow
    if not {roles.with_shortcuts, roles.without_shortcuts} <= flow.keys():
        return []
    lost, grown = (
        flow[name].verdict.fall_decades or 0.0 for name in (roles.without_shortcuts, roles.with_shortcuts)
    )
    beside = (
        ", a small change beside what is lost without" if lost > 6 and -3 < grown < -math.log10(2) else ""
    )
    return [
        f"Without shortcuts, {arrival(flow[roles.without_shortcuts])}.",
        f"With shortcuts, {arrival(flow[roles.with_shortcuts])}{beside}.",
    ]


def _training_sentence(evidence: Evidence) -> str:
    training, roles = evidence.training, evidence.roles
    if training is None:
        return ""
    optimizers = list(training.curves[roles.with_shortcuts])
    shown = [optimizer for optimizer in optimizers if _is_decided(training, roles, optimizer)]
    if not shown:
        return f"Neither network reaches a loss of {short(training.target)} in {training.steps} steps."
    best = min(
        shown,
        key=lambda o: min(
            _median_steps(training.curves[name][o])
            for name in (roles.with_shortcuts, roles.without_shortcuts)
        ),
    )
    with_, without = (
        _median_steps(training.curves[name][best]) for name in (roles.with_shortcuts, roles.without_shortcuts)
    )
    goal = f"a loss of {short(training.target)} under {best}"
    if math.isinf(without):
        return (
            f"With shortcuts training reaches {goal} in {with_:.0f} steps; without, never in"
            f" {training.steps}."
        )
    if math.isinf(with_):
        return (
            f"Without shortcuts training reaches {goal} in {without:.0f} steps; with, never in"
            f" {training.steps}."
        )
    return f"Training reaches {goal} in {with_:.0f} steps with shortcuts, in {without:.0f} without."


def _path_sentence(evidence: Evidence) -> str:
    paths = evidence.paths.get(evidence.roles.with_shortcuts)
    if paths is None or not paths.branches:
        return ""
    middle = int(np.searchsorted(np.cumsum(paths.shares), 0.5))
    return (
        f"With shortcuts, half of the gradient passes at most {middle} of the {paths.branches} branches on"
        " its way back."
    )


# --- the lecture's claims ---


def claims(evidence: Evidence) -> tuple[Claim, ...]:
    """The lecture's claims, judged: those with interactive charts first, the rest in the lecture's order."""
    return tuple(claim(evidence) for claim in CLAIMS)


_SMALLER = "Gradients become progressively smaller as we go back through the network."


def _claim_smaller(evidence: Evidence) -> Claim:
    roles, flow = evidence.roles, evidence.flow
    lacking, having = flow[roles.without_shortcuts], flow[roles.with_shortcuts]
    shrinks = lacking.verdict.state == "vanishing"
    healthy = [
        name
        for name in (*roles.controls, roles.with_shortcuts)
        if name in flow and flow[name].verdict.state == "healthy"
    ]
    without_shortcuts = [name for name in healthy if name.startswith(roles.without_shortcuts)]
    answer = FAILS if not shrinks else PART if without_shortcuts else HOLDS
    if without_shortcuts:
        limits = (
            f"It does not come from depth alone: {without_shortcuts[0]!r} is as deep, has no shortcut, and"
            " keeps its gradient."
        )
    elif healthy:
        limits = f"Depth need not cost the gradient: {healthy[0]!r} is as deep and keeps it."
    elif shrinks:
        limits = f"The other extreme is no cure: with shortcuts, {arrival(having)}."
    else:
        limits = "This says nothing of deeper networks, or of other initialisations."
    why = [f"{_capital(name)}: {f.verdict.finding or f.verdict.state}" for name, f in flow.items()]
    why.append(f"Without shortcuts: {lacking.verdict.reason}.")
    if f"{roles.with_shortcuts}, detached" in flow:
        why.append("Detached: the same forward pass, with no gradient through the shortcuts.")
    return Claim(
        "smaller",
        _SMALLER,
        answer,
        f"Without shortcuts, {arrival(lacking)}.",
        limits,
        " ".join(why),
        "Each line is one network. Read it from right (the loss) to left (the input). A straight line is a"
        " product of equal factors.",
    )


_PRODUCT = "It becomes extremely small because it is a product of small quantities."


def _claim_product(evidence: Evidence) -> Claim:
    flow = evidence.flow[evidence.roles.without_shortcuts]
    factors = np.array([b.factor for b in flow.boundaries if b.factor], dtype=float)
    if not len(factors) or not np.isfinite(factors).all():
        return _not_measured("product", _PRODUCT, "There are no two boundaries with a gradient between them.")
    typical, product = float(np.exp(np.log(factors).mean())), float(np.prod(factors))
    below = float((factors < 1).mean())
    answer = HOLDS if below > 0.5 and product < 0.5 else PART if product < 1 else FAILS
    smallest = float(factors.min())
    # A single factor that explains more than half of the fall, in decades, is named.
    alone = product < 1 and math.log10(smallest) < 0.5 * math.log10(product)
    limits = (
        f"It is no even product: one step alone multiplies the gradient by {short(smallest)}."
        if alone
        else f"No single layer is to blame: the smallest factor is {short(smallest)}."
    )
    why = (
        f"Without shortcuts there are {len(factors)} factors; {below:.0%} of them are below 1; their product"
        f" is {short(product)}."
    )
    having = evidence.flow.get(evidence.roles.with_shortcuts)
    if having is not None and having.product is not None:
        per = having.product ** (1 / max(1, len(having.boundaries) - 1))
        why += f" With shortcuts the mean factor is {short(per)} and the product {short(having.product)}."
    true = (
        f"Without shortcuts each step back multiplies the gradient by {short(typical)} on average,"
        f" {len(factors)} times over."
    )
    return Claim(
        "product",
        _PRODUCT,
        answer,
        true,
        limits,
        why,
        "Each dot is the factor of one step back. Below the line at 1 the gradient shrinks there.",
    )


_STAGNATE = "The weight updates stagnate, learning becomes stagnant, and convergence is delayed."


def _claim_stagnate(evidence: Evidence) -> Claim:
    training, roles = evidence.training, evidence.roles
    if training is None:
        return _not_measured("stagnate", _STAGNATE, "The networks were not trained.")
    optimizers = list(training.curves[roles.with_shortcuts])
    shown = [optimizer for optimizer in optimizers if _is_decided(training, roles, optimizer)]
    slower = [_slower(training, roles, optimizer) for optimizer in shown]
    cures = [
        name
        for name in roles.controls
        if name.startswith(roles.without_shortcuts)
        and any(curves.learns for curves in training.curves.get(name, {}).values())
    ]
    answer = (
        UNKNOWN if not shown else FAILS if not any(slower) else PART if cures or not all(slower) else HOLDS
    )
    lost = [
        o
        for o in optimizers
        if o in shown and math.isinf(_median_steps(training.curves[roles.with_shortcuts][o]))
    ]
    lost = lost or [o for o in optimizers if not training.curves[roles.with_shortcuts][o].learns]
    if not shown:
        limits = "Who is slower is not known: more steps would tell (steps=, --steps)."
    elif cures:
        limits = f"A shortcut is not the only cure: {cures[0]!r} learns too, without one."
    elif lost:
        limits = (
            f"Shortcuts alone are not always enough: under {lost[0]} the network with them does not learn"
            " either."
        )
        better = [
            name
            for name in roles.controls
            if name.startswith(roles.with_shortcuts) and training.curves[name][lost[0]].learns
        ]
        if better:
            limits = (
                f"Shortcuts as they are do not always suffice: under {lost[0]} they fail, and {better[0]!r}"
                " learns."
            )
    else:
        limits = "It is a matter of speed here: both networks learn, each at its best rate."
        if any(math.isinf(_median_steps(training.curves[roles.without_shortcuts][o])) for o in shown):
            limits = (
                "That the network without them can never learn is not shown: these are a few hundred steps."
            )
    return Claim(
        "stagnate",
        _STAGNATE,
        answer,
        _training_sentence(evidence),
        limits,
        _training_numbers(evidence, shown),
        "Bands are the range over seeds. Look where each curve leaves the plateau of guessing.",
    )


def _training_numbers(evidence: Evidence, shown: list[str]) -> str:
    """Steps and update sizes of both networks under each optimizer, and contradictions of a verdict."""
    training, roles = evidence.training, evidence.roles
    assert training is not None
    why = [f"Steps to a loss of {short(training.target)}, each at its best rate."]
    for optimizer in training.curves[roles.with_shortcuts]:
        with_, without = (
            training.curves[name][optimizer] for name in (roles.with_shortcuts, roles.without_shortcuts)
        )
        counts = [
            training.steps_text(name, optimizer) for name in (roles.with_shortcuts, roles.without_shortcuts)
        ]
        if optimizer in shown:
            why.append(f"{optimizer}: {counts[0]} with shortcuts, {counts[1]} without.")
        else:
            why.append(
                f"{optimizer}: neither arrives in {training.steps}; the losses end at"
                f" {short(with_.final_loss)} with shortcuts and {short(without.final_loss)} without."
            )
        why.append(
            f"A step moves the weights by {short(_median_update_ratio(with_))} of their size with,"
            f" {short(_median_update_ratio(without))} without."
        )
    for name, by in training.curves.items():
        hindered = evidence.flow[name].verdict.hinders if name in evidence.flow else ()
        wrong = [optimizer for optimizer in hindered if optimizer in by and by[optimizer].learns]
        if wrong:
            why.append(
                f"The verdict expected {' and '.join(wrong)} to fail on {name!r}; it learns all the same."
            )
    return " ".join(why)


def _is_decided(training: Training, roles: Roles, optimizer: str) -> bool:
    """Whether most seeds of at least one network reach the target, so that their speeds can be compared."""
    both = (training.curves[name][optimizer] for name in (roles.with_shortcuts, roles.without_shortcuts))
    return any(math.isfinite(_median_steps(curves)) for curves in both)


def _slower(training: Training, roles: Roles, optimizer: str) -> bool:
    return _median_steps(training.curves[roles.without_shortcuts][optimizer]) > _median_steps(
        training.curves[roles.with_shortcuts][optimizer]
    )


def _median_steps(curves: Curves) -> float:
    """Median steps to the target, as in the table; inf if most seeds never reach it."""
    steps = sorted(np.inf if s is None else float(s) for s in curves.steps_to_target)
    return steps[len(steps) // 2]


def _median_update_ratio(curves: Curves) -> float:
    return float(np.nanmedian(curves.update_ratio))


_PATH = "Shortcut connections create an alternative path for the gradient by skipping layers."


def _claim_path(evidence: Evidence) -> Claim:
    roles = evidence.roles
    split, paths = evidence.split.get(roles.with_shortcuts), evidence.paths.get(roles.with_shortcuts)
    shares = np.array([s.share for s in split if s.share is not None]) if split is not None else np.array([])
    if not len(shares) or paths is None:
        return _not_measured("path", _PATH, "The split or the path spectrum could not be measured.")
    carried, empty = float(np.median(shares)), 100 * float(paths.shares[0])
    why = (
        f"Over {len(shares)} forks the shortcut's share is {100 * float(shares.min()):.0f} to"
        f" {100 * float(shares.max()):.0f} %. Taken apart by path, exactly: the mean path passes"
        f" {short(paths.mean_length)} of {paths.branches} branches; the parts add up to the plain gradient"
        f" with an error of {short(paths.residual)}."
    )
    return Claim(
        "path",
        _PATH,
        HOLDS if carried >= 0.5 else PART,
        f"At a typical fork {100 * carried:.0f} % of the gradient comes back through the shortcut.",
        f"It does not bypass everything: the path that skips every branch carries {short(empty, 2)} % of the"
        " gradient.",
        why,
        "Height: size of the gradient that passed exactly k branches, on a log scale.",
    )


_SURFACE = "Shortcuts change the loss surface (Li et al. 2018): smooth with them, chaotic without."


def _claim_surface(evidence: Evidence) -> Claim:
    trained, roles = evidence.surfaces.get("trained"), evidence.roles
    if trained is None or not {roles.with_shortcuts, roles.without_shortcuts} <= trained.surfaces.keys():
        return _not_measured("surface", _SURFACE, "The surfaces of these networks were not measured.")
    having, lacking = (trained.surfaces[name] for name in (roles.with_shortcuts, roles.without_shortcuts))
    why = [f"{_capital(name)}: {s.label or _shape(s.scores)}." for name, s in trained.surfaces.items()]
    why.append(
        "Convex share: points of the plane that curve up in both directions. Roughness: how much the surface"
        " goes up and down more than one valley would. Chaotic here means a roughness of"
        f" {CHAOTIC_ROUGHNESS:.0%} or more, or a convex share below {CHAOTIC_CONVEXITY:.0%}."
    )
    why.append(_paired_numbers(evidence))
    answer, true, limits = _compare_surfaces(having, lacking)
    return Claim(
        "surface",
        _SURFACE,
        answer,
        true,
        limits,
        " ".join(filter(None, why)),
        "A bowl is easy to walk down. Look for ridges, and for regions so flat that no step leads anywhere.",
    )


def _compare_surfaces(having: Surface, lacking: Surface) -> tuple[str, str, str]:
    """The answer, what is true, and what does not follow."""
    unlearnt = [word for word, s in (("with", having), ("without", lacking)) if s.label]
    if unlearnt:
        return (
            UNKNOWN,
            f"The network {unlearnt[-1]} shortcuts has not learnt: its surface is flat, not chaotic.",
            "Nothing on smoothness follows from the surface of a network that has not learnt.",
        )
    beyond = _is_significantly_greater(
        lacking.scores, having.scores, "roughness"
    ) or _is_significantly_greater(having.scores, lacking.scores, "convexity_share")
    if not _chaotic(lacking.scores):
        true = (
            "Neither surface is chaotic."
            if not _chaotic(having.scores)
            else "The surface with shortcuts is the chaotic one."
        )
        limits = (
            "The paper's networks were far deeper, and convolutional: this neither confirms nor refutes it."
        )
        return FAILS, true, limits
    if _chaotic(having.scores) or not beyond:
        return (
            FAILS,
            "Both surfaces are alike within their errors.",
            "One pair of directions is not the whole surface.",
        )
    return (
        HOLDS,
        "The surface is chaotic without shortcuts and smooth with them.",
        "One pair of directions through one pair of networks is not the whole surface.",
    )


def _chaotic(scores: Scores) -> bool:
    return scores.roughness >= CHAOTIC_ROUGHNESS or scores.convexity_share < CHAOTIC_CONVEXITY


def _is_significantly_greater(more: Scores, less: Scores, name: str) -> bool:
    """Whether the difference of two scores exceeds its 95 % confidence interval."""
    error = math.hypot(*(scores.errors.get(name) or 0.0 for scores in (more, less)))
    return getattr(more, name) - getattr(less, name) > 1.96 * error


def _paired_numbers(evidence: Evidence) -> str:
    paired = evidence.surfaces.get("paired")
    if paired is None or paired.difference is None:
        return ""
    before, after = (surface.scores.centre for surface in paired.surfaces.values())
    return (
        f"The trained weights with shortcuts have a loss of {short(before)}; take the shortcuts out of them"
        f" and it is {short(after)}; over the plane the median change is"
        f" {short(float(np.nanmedian(paired.difference)))}."
    )


def _shape(scores: Scores) -> str:
    """Convex share and roughness, each with its standard error."""
    words = []
    for name, label in (("convexity_share", "convex share"), ("roughness", "roughness")):
        error = scores.errors.get(name)
        words.append(
            f"{label} {100 * getattr(scores, name):.1f} %"
            + (f" ± {100 * error:.1f}" if error is not None else "")
        )
    return ", ".join(words)


_CRUCIAL = "They play a crucial role in preserving the flow of gradients."


def _claim_crucial(evidence: Evidence) -> Claim:
    """Judge whether shortcuts are crucial, by the gradient flow after removing them from the same weights."""
    roles, flow = evidence.roles, evidence.flow
    removed = flow.get(f"{roles.with_shortcuts}, removed")
    if removed is None and evidence.twins[roles.without_shortcuts].meaning == "removed":
        removed = flow[roles.without_shortcuts]
    if removed is None:
        return _not_measured("which", _CRUCIAL, "The flow without the shortcuts could not be measured.")
    lost, kept = removed.verdict, flow[roles.with_shortcuts].verdict
    broken = lost.state in {"vanishing", "dead"} and kept.state not in {"vanishing", "dead"}
    true = f"With all shortcuts taken out of the same weights, {arrival(removed)}."
    limits, why = _single_shortcuts(evidence)
    return Claim(
        "which",
        _CRUCIAL,
        HOLDS if broken else FAILS,
        true,
        limits,
        why,
        "The longest bar is the shortcut this network can least do without.",
    )


def _single_shortcuts(evidence: Evidence) -> tuple[str, str]:
    """Limits of the claim and the numbers behind it, from the removal of each shortcut alone."""
    ranking = evidence.importance.get(evidence.roles.with_shortcuts)
    removed = (
        [(i.name, i.removed) for i in ranking.ranked if i.removed is not None] if ranking is not None else []
    )
    if not removed:
        return "What each single shortcut does was not measured.", ""
    flows = [cost.flow_cost for _, cost in removed if cost.flow_cost is not None]
    losses = np.array([cost.loss_cost for _, cost in removed])
    limits = "No single one decides it: which matters most is another question."
    if flows:
        limits = (
            "No single shortcut is crucial for it: any of them alone costs a factor of"
            f" {short(10 ** max(0.0, *flows), 2)} at most."
        )
        if max(flows) > 2:
            limits = (
                "They are not alike: taking out one alone costs a factor of"
                f" {share(max(flows)).removeprefix('one part in ')}."
            )
    (first, dearest), (last, cheapest) = removed[0], removed[-1]
    why = (
        f"Each shortcut was taken out alone. The loss changes by {short(dearest.loss_cost)} at {first} and by"
        f" {short(cheapest.loss_cost)} at {last} (median {short(float(np.median(losses)))})."
    )
    lesions = (
        [i.lesioned.loss_cost for i in ranking.ranked if i.lesioned is not None]
        if ranking is not None
        else []
    )
    if lesions:
        why += f" Taking out one branch alone costs {short(float(np.median(lesions)))} (median)."
    return limits, why


_STRENGTH = "The effect is the shortcut's: turn it up and the gradient comes through."


def _claim_strength(evidence: Evidence) -> Claim:
    sweep = evidence.strength.get(evidence.roles.with_shortcuts)
    if sweep is None or not np.isfinite(sweep.fall_decades[[0, -1]]).all():
        return _not_measured("strength", _STRENGTH, "The strength could not be varied.")
    start, end = (float(sweep.fall_decades[i]) for i in (0, -1))
    healthy = [float(s) for s, state in zip(sweep.strengths, sweep.states) if state == "healthy"]
    rises = start - end > 0.3
    answer = FAILS if not rises else HOLDS if sweep.states[-1] == "healthy" else PART
    if not rises:
        limits = "Turning the shortcuts up changes little here."
    elif not healthy:
        limits = "None of the strengths tried gives a healthy flow."
    elif sweep.states[-1] != "healthy":
        limits = (
            f"More is not always better: the flow is healthy at a strength of {healthy[0]:.1f}, no longer"
            " at 1."
        )
    else:
        limits = f"Full strength is not needed: the flow is healthy from a strength of {healthy[0]:.1f} on."
    return Claim(
        "strength",
        _STRENGTH,
        answer,
        f"At strength 0, {arrival_of(start)}; at strength 1, {_arrival_brief(end)}.",
        limits,
        f"The fall goes from {short(start)} decades at strength 0 to {short(end)} at strength 1.",
        "Move the slider from 0 (removed) to 1 (as built).",
    )


def _not_measured(key: str, claim: str, reason: str) -> Claim:
    return Claim(key, claim, UNKNOWN, reason)


CLAIMS = (
    _claim_strength,
    _claim_surface,
    _claim_smaller,
    _claim_product,
    _claim_stagnate,
    _claim_path,
    _claim_crucial,
)


# --- methods ---


def methods(evidence: Evidence, settings: Settings, details: str = "") -> str:
    """A paragraph on how everything was measured, with references."""
    flow = next(iter(evidence.flow.values()))
    parts = [
        details
        + f"Gradients were measured on {flow.samples} samples in {flow.mode} mode. The flow at a boundary is"
        " the RMS of dL/d(activation), with |dL/d(output)| set to 1; boundaries are the input, each merge,"
        " and each weighted module between merges. 'Removed' takes the shortcuts out of these weights as"
        " they are; 'detached' leaves the forward pass and closes them to the gradient. The path spectrum"
        " is exact: the gradient is split by the number of branches passed (Veit et al. 2016 sampled it)."
    ]
    if evidence.training is not None:
        parts.append(_training_methods(evidence.training))
    if evidence.surfaces:
        parts.append(
            f"Loss surfaces: {settings.grid} x {settings.grid} points over [-1, 1]^2 in two random Gaussian"
            " directions, each normalised filter by filter to the weights (Li et al. 2018), biases and norms"
            " zero, in evaluation mode, on the same samples for every network. Twins trained separately have"
            " the same Gaussian draw, and only their scores are compared; the pair that shares weights is"
            " compared point by point."
        )
    return " ".join(parts)


def _training_methods(training: Training) -> str:
    rates: dict[str, set[float]] = {}
    for by in training.curves.values():
        for optimizer, curves in by.items():
            rates.setdefault(optimizer, set()).update(map(float, curves.sweep))
    tried = "; ".join(
        f"{optimizer} {', '.join(f'{rate:g}' for rate in sorted(values, reverse=True))}"
        for optimizer, values in rates.items()
    )
    return (
        f"Training: {training.steps} steps of {training.batch_size} samples, {len(training.seeds)} seeds"
        f" (varying {training.varies}), each network and optimizer at its best rate out of the same sweep on"
        f" a seed of its own ({tried}); SGD has momentum 0.9. A target counts as reached where the mean loss"
        " of ten steps is there. Bands run from the lowest to the highest seed."
    )


def comparison_of(
    evidence: Evidence, subject: str, settings: Settings, clock: Clock, details: str = ""
) -> Comparison:
    """Build the :class:`Comparison` from the evidence: sentences, measurements and provenance."""
    provenance = {
        "skipscope": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "seed": settings.seed,
        "seconds": {name: round(seconds, 2) for name, seconds in clock.stages.items()},
        "seconds in all": round(clock.spent, 1),
    }
    return Comparison(
        subject=subject,
        summary=summary(evidence),
        claims=claims(evidence),
        twins=tuple(evidence.twins.values()),
        found=evidence.found,
        flow=evidence.flow,
        split=evidence.split,
        paths=evidence.paths,
        training=evidence.training,
        depths=tuple(evidence.depths),
        surfaces=evidence.surfaces,
        importance=evidence.importance,
        strength=evidence.strength,
        methods=methods(evidence, settings, details),
        notes=tuple(clock.notes),
        provenance=provenance,
    )
