"""Verdict on a term of the loss: its worst line, then time, starved weights and the head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from skipscope._numbers import short
from skipscope._option_words import VerdictCause, VerdictState
from skipscope.flow._flow_result import Head, Verdict
from skipscope.flow.verdict._flow_rules import (
    ADAM_GROWTH,
    ALL,
    GROWTH,
    HEAD,
    STARVED_SHARE,
    FlowContext,
    Point,
    StretchGain,
    in_turn,
    judge,
)
from skipscope.flow.verdict._verdict_evidence import REACHES, Evidence, Reach
from skipscope.flow.verdict._verdict_words import advice_on

# States from worst to best.
ORDER: tuple[VerdictState, ...] = (
    "nonfinite",
    "unconnected",
    "dead",
    "vanishing",
    "exploding",
    "cannot tell",
    "healthy",
)


def judge_chain(
    evidence: Evidence,
    gains: dict[str, StretchGain],
    context: FlowContext,
    culprit: tuple[VerdictCause, str] | None = None,
    stale: str = "",
) -> Verdict:
    """Judge a chain, with the verdict in words.

    Args:
        evidence: evidence from the readings.
        gains: boundary -> gain between it and the next.
        context: properties of the network.
        culprit: (cause, description) of the first value that is not finite, if any.
        stale: first batch norm whose running statistics are far from those of the data, or "".
    """
    none = StretchGain()
    judged = [
        judge(line, _stretches(line, gains) if gains else (), context, culprit) for line in evidence.lines
    ]
    found = min(judged, key=lambda v: (ORDER.index(v.state), -abs(v.fall_decades or 0.0)))
    if found.state == "unconnected" and evidence.cut:
        found = replace(found, reason=f"{evidence.cut} lets no gradient through; {found.reason}")
    last = max(evidence.lines, key=len)[-1] if any(evidence.lines) else None
    after = gains.get(last.name, none) if last else none
    head = evidence.head
    if head is not None and after.activation:
        evidence = replace(evidence, head=replace(head, slope=after.slope))
    found = _beside(found, evidence, after)
    if evidence.single and found.state == "healthy" and found.cause == "none" and not evidence.starved.names:
        n, weights = len(evidence.single), "weight" + "s" * (len(evidence.single) > 1)
        found = replace(
            found,
            cause="one position",
            evidence=float(n),
            reason=(
                f"{found.reason}; {n} {weights} of queries and keys get nothing, for their softmax is over"
                " one entry and always 1"
            ),
        )
    if (
        stale
        and found.state in {"vanishing", "exploding", "nonfinite", "dead"}
        and found.cause not in {"weights", "data", "loss"}
    ):
        found = replace(found, cause="batch norm", reason=f"{stale}; {found.reason}")
    found = replace(
        found,
        head=evidence.head,
        worst=evidence.worst,
        starved=evidence.starved.names + evidence.single,
        reach=evidence.reach.steps if evidence.reach else None,
    )
    return replace(found, advice=advice_on(found))


def _stretches(line: Sequence[Point], gains: dict[str, StretchGain]) -> list[StretchGain]:
    """Combine ``gains`` between boundaries into gains between consecutive points of a line."""
    names = list(gains)
    at = {name: i for i, name in enumerate(names)}
    found = []
    for point, after in zip(line, [*line[1:], None]):
        start = at.get(point.name)
        if start is None:
            found.append(StretchGain())
            continue
        end = start + 1 if after is None else max(start + 1, at.get(after.name, start + 1))
        found.append(in_turn([gains[name] for name in names[start:end]]))
    return found


def _beside(found: Verdict, evidence: Evidence, after: StretchGain) -> Verdict:
    """The worst fault that the lines do not show, or ``found`` if there is none."""
    if ORDER.index(found.state) > ORDER.index("unconnected") and evidence.unconnected:
        return _without_path(found, evidence)
    if found.state == "healthy" and evidence.opaque:
        return _out_of_sight(found, evidence)
    if found.state not in {"healthy", "exploding", "vanishing", "cannot tell"}:
        return found
    if evidence.reach is not None and _vanishes(evidence.reach):
        return _through_time(found, evidence.reach)
    growing = evidence.growing
    if growing is not None and growing.growth > 0:
        found = replace(found, score=min(found.score or 0.0, -growing.growth))
    if growing is not None and growing.growth >= GROWTH and found.state != "vanishing":
        return _growing_through_time(found, growing)
    if found.state != "healthy":
        return found
    if evidence.starved.share > STARVED_SHARE:
        return _starved(found, evidence)
    return _at_the_head(found, evidence, after)


def _without_path(found: Verdict, evidence: Evidence) -> Verdict:
    """Verdict on weighted calls that the loss depends on, but that get no gradient."""
    n = len(evidence.unconnected)
    by = (
        f"{evidence.cut} lets no gradient through"
        if evidence.cut
        else "no way back leads from the loss to it"
    )
    lost = "1 weighted call gets" if n == 1 else f"{n} weighted calls get"
    return replace(
        found,
        state="unconnected",
        where=evidence.unconnected[-1],
        cause="missing path",
        evidence=float(n),
        hinders=ALL,
        score=-math.inf,
        reason=f"{by}; {lost} no gradient though the loss depends on {'it' if n == 1 else 'them'}",
    )


def _out_of_sight(found: Verdict, evidence: Evidence) -> Verdict:
    """Verdict if most weights are inside an opaque call."""
    reason = f"most of the weights are inside {evidence.opaque}, where no gradient between layers can be read"
    return replace(found, state="cannot tell", cause="opaque", where=evidence.opaque, reason=reason)


def _through_time(found: Verdict, reach: Reach) -> Verdict:
    """Verdict on a gradient that does not reach the beginning of the sequence."""
    assert reach.steps is not None
    return replace(
        found,
        state="vanishing",
        where=reach.site,
        cause="time",
        evidence=float(reach.steps),
        hinders=ALL,
        score=min(found.score or 0.0, -3.0 * reach.length / reach.steps),
        reason=f"a thousandth of the gradient is left after {reach.steps} steps, and the sequence has"
        f" {reach.length}",
    )


def _growing_through_time(found: Verdict, growing: Reach) -> Verdict:
    """Verdict on a gradient that grows from time step to time step towards the beginning of the sequence."""
    return replace(
        found,
        state="exploding",
        where=growing.site,
        cause="time",
        evidence=growing.growth,
        hinders=ALL if growing.growth >= ADAM_GROWTH else ("SGD",),
        reason=f"it grows by {short(growing.growth)} decades on its way to the first step, beyond what"
        " adding up a term for each step gives",
    )


def _starved(found: Verdict, evidence: Evidence) -> Verdict:
    """Verdict on weights whose gradient, relative to their size, is far below that of the others."""
    starved = evidence.starved
    n = len(starved.names)
    get, its = ("s get", "their") if n > 1 else (" gets", "its")
    size = "exactly 0" if starved.zero else f"{short(starved.decades)} decades less than the {starved.than}"
    is_last = evidence.last_names.issuperset(starved.names) and not starved.zero
    return replace(
        found,
        state="dead" if starved.zero else "vanishing",
        where=starved.names[0].rpartition(".")[0] or starved.names[0],
        cause="head" if is_last else "branch",
        evidence=starved.decades,
        hinders=ALL if starved.decades > 9 else ("SGD",),
        reason=f"{n} weight{get} {size}, in relation to {its} own size",
        score=min(found.score or 0.0, -starved.decades),
    )


def _at_the_head(found: Verdict, evidence: Evidence, after: StretchGain) -> Verdict:
    """Verdict on a head that passes on almost no gradient, or ``found`` if it does pass it on.

    The gradient may also be small because the loss is near its minimum, as an entropy is at the start; that
    is not a fault of the network.
    """
    head = evidence.head
    if head is None or head.gain >= HEAD:
        return found
    if after.slope < max(math.sqrt(head.gain), HEAD):
        reason = f"the slope of the output's {after.activation} is {short(after.slope)}"
        where, cause, proof = "output", "saturation", after.slope
    elif _is_weak(head, evidence):
        reason = f"the last layer passes on {short(head.gain)} of the gradient"
        where, cause, proof = "head", "head", head.gain
    else:
        return found
    return replace(
        found, state="vanishing", where=where, cause=cause, evidence=proof, hinders=("SGD",), reason=reason
    )


def _is_weak(head: Head, evidence: Evidence) -> bool:
    """Whether the last weights pass on almost no gradient."""
    return (head.gain if evidence.last_weights is None else evidence.last_weights) < HEAD


def _vanishes(reach: Reach) -> bool:
    return reach.steps is not None and reach.length > REACHES * reach.steps


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The worst of several verdicts."""
    return min(verdicts, key=lambda v: (ORDER.index(v.state), v.score if v.score is not None else 0.0))
