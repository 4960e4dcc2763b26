"""The verdict on one chain: its worst line, then what lies beside the lines: time, starved weights, the head; and words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from skipscope._numbers import short
from skipscope.flow._flow_results import Verdict
from skipscope.flow._lines import REACHES, Evidence, Reach
from skipscope.flow._verdict import ALL, FALL, HEAD, HEALTHY, STARVED_SHARE, Clue, judge

# The worst first.
ORDER = ("nonfinite", "unconnected", "dead", "vanishing", "exploding", "cannot tell", "healthy")
_TRY = "ss.prescribe(model, data, loss) tries remedies on copies."
ADVICE = {
    "time": "Use gates (LSTM, GRU), orthogonal recurrent weights or shorter sequences, or read the output at more steps.",
    "saturation": "Use an activation that does not saturate (ReLU, GELU), put a norm before it, or start with smaller weights.",
    "inactive": "Lower the learning rate or the bias there, or use an activation with a slope everywhere (LeakyReLU, GELU).",
    "collapse": "Check the initialisation: what distinguishes the samples is lost there.",
    "underflow": "Scale the loss (torch.amp.GradScaler), or run this part in float32.",
    "weights": "Load the weights from before they became NaN, and lower the learning rate.",
    "data": "Remove the samples that are not finite.",
    "loss": "Give the loss raw logits (cross_entropy, binary_cross_entropy_with_logits), and check its targets.",
    "branch": "Give the branch a norm or another activation, or a shortcut of its own.",
    "head": "Start the last layer with weights of the usual size.",
    "batch norm": "Use model.train(), or ss.recalibrate(model, data), so that the running statistics fit the data.",
    "missing path": "Remove the detach, .data or no_grad on the way, or freeze those weights.",
    "softmax": "Leave at least one entry of each row unmasked.",
    "sqrt": "Add a small number under the root: its slope at 0 is infinite.",
    "div": "Add a small number to the divisor.",
    "log": "Clamp the argument of the logarithm away from 0.",
    "norm": "Add a small number to the norm: its slope at 0 is undefined.",
    "overflow": "Lower the learning rate or the weights' size, clip gradients, or use bfloat16 or float32.",
}  # fmt: skip


def judge_chain(
    evidence: Evidence, clues: dict[str, Clue], *, residual: bool = False, normed: bool = False, dtype: str = "",
    culprit: tuple[str, str] | None = None, stale: str = "",
) -> Verdict:  # fmt: skip
    """The verdict on one chain, in words.

    Args:
        evidence: what was read.
        clues: by boundary, what lies between it and the next.
        residual: shortcuts run along the boundaries.
        normed: most weights are followed by a norm over the data.
        dtype: of the gradients.
        culprit: (cause, words): what is not finite to begin with, where something is.
        stale: the first batch norm whose running statistics are far from those of the data, or "".
    """
    judged = [
        judge(line, [clues.get(p.name, Clue()) for p in line] if clues else (), residual=residual, normed=normed, dtype=dtype, culprit=culprit)
        for line in evidence.lines
    ]  # fmt: skip
    found = min(judged, key=lambda v: (ORDER.index(v.state), -abs(v.fall_decades or 0.0)))
    if found.state == "unconnected" and evidence.cut:
        found = replace(found, reason=f"{evidence.cut} lets no gradient through; {found.reason}")
    last = max(evidence.lines, key=len)[-1] if any(evidence.lines) else None
    found = _beside(found, evidence, clues.get(last.name) if last else None)
    if stale and found.state in {"vanishing", "exploding", "nonfinite", "dead"} and found.cause not in {"weights", "data", "loss"}:  # fmt: skip
        found = replace(found, cause="batch norm", reason=f"{stale}; {found.reason}")
    return worded(replace(
        found, head=evidence.head, worst=evidence.worst, starved=evidence.starved.names,
        reach=evidence.reach.steps if evidence.reach else None,
    ))  # fmt: skip


def _beside(found: Verdict, evidence: Evidence, head_clue: Clue | None) -> Verdict:
    """What the lines do not show, the worst first."""
    if ORDER.index(found.state) > ORDER.index("unconnected") and evidence.unconnected:
        where, n = evidence.unconnected[-1], len(evidence.unconnected)
        by = (
            f"{evidence.cut} lets no gradient through"
            if evidence.cut
            else "no way back leads from the loss to it"
        )
        return replace(
            found, state="unconnected", where=where, cause="missing path", evidence=float(n), hinders=ALL, score=-math.inf,
            reason=f"{by}; {n} weighted calls get no gradient though the loss depends on them",
        )  # fmt: skip
    if found.state not in {"healthy", "exploding", "vanishing"}:
        return found
    reach = evidence.reach
    if reach is not None and _vanishes(reach):
        assert reach.steps is not None
        return replace(
            found, state="vanishing", where=reach.site, cause="time", evidence=float(reach.steps), hinders=ALL,
            score=min(found.score or 0.0, -3.0 * reach.length / reach.steps),
            reason=f"a thousandth of the gradient is left after {reach.steps} steps, and the sequence has {reach.length}",
        )  # fmt: skip
    if found.state != "healthy":
        return found
    starved = evidence.starved
    if starved.share > STARVED_SHARE:
        n = len(starved.names)
        size = "exactly 0" if starved.zero else f"{short(starved.decades)} decades less than the median"
        return replace(
            found, state="dead" if starved.zero else "vanishing", where=starved.names[0].rpartition(".")[0] or starved.names[0],
            cause="branch", evidence=starved.decades, hinders=ALL if starved.decades > 9 else ("SGD",),
            reason=f"{n} weights get {size}, in relation to their own size", score=min(found.score or 0.0, -starved.decades),
        )  # fmt: skip
    head = evidence.head
    if head is not None and head.gain < HEAD:
        slope = head_clue.slope if head_clue is not None else 1.0
        saturated = slope < math.sqrt(head.gain)
        return replace(
            found, state="vanishing", where="output" if saturated else "head", cause="saturation" if saturated else "head",
            evidence=slope if saturated else head.gain, hinders=("SGD",),
            reason=f"the slope of the output's {head_clue.activation} is {short(slope)}" if saturated and head_clue
            else f"the last layer passes on {short(head.gain)} of the gradient",
        )  # fmt: skip
    return found


def _vanishes(reach: Reach) -> bool:
    return reach.steps is not None and reach.length > REACHES * reach.steps


# --- words -------------------------------------------------------------------------------------------------------------


def share(decades: float) -> str:
    """How much of a gradient is left, as a beginner reads it.

    Example:
        >>> share(17.0), share(2.5)
        ('one part in 10^17', 'one part in 300')
    """
    if decades >= 5:
        return f"one part in 10^{decades:.0f}"
    return f"one part in {float(f'{10**decades:.1g}'):,.0f}"


def finding(verdict: Verdict) -> str:
    """The verdict in one sentence of at most 25 words."""
    at, fall = verdict.where, verdict.fall_decades
    if verdict.state == "healthy":
        if verdict.starved:
            n = len(verdict.starved)
            return f"The gradient reaches every layer, but {n} weight{'s get' if n > 1 else ' gets'} next to nothing: {verdict.starved[0]} first."
        return "The gradient reaches every layer."
    if verdict.state == "cannot tell":
        return "The gradient's flow lies too close to a limit to be judged."
    if verdict.state == "nonfinite":
        return f"Numbers stop being finite at {at}."
    if verdict.state == "unconnected":
        return f"No gradient reaches {at}: it is cut off from the loss."
    if verdict.state == "dead":
        return f"No gradient passes {at}: it is exactly 0 there."
    if verdict.cause == "time":
        return f"The gradient vanishes through time: it reaches back only {verdict.reach} steps in {at}."
    if verdict.cause == "branch":
        return f"The weights in {at} get next to no gradient, while others do."
    if verdict.cause == "head" or (verdict.cause == "saturation" and at == "output"):
        gain = verdict.head.gain if verdict.head else 0.0
        return f"The output layer lets only {share(-math.log10(gain)) if gain > 0 else 'nothing'} of the gradient through."
    if verdict.state == "vanishing":
        return (
            f"The gradient vanishes: {share(fall or FALL)} of it reaches the first layer; it is lost at {at}."
        )
    return f"The gradient explodes: it grows {_times(-(fall or 0.0))} on its way to the first layer."


def worded(verdict: Verdict) -> Verdict:
    """The verdict with its advice."""
    if verdict.state == "healthy" and verdict.cause == "none":
        advice = HEALTHY
    else:
        advice = ADVICE.get(verdict.cause, _TRY)
    return replace(verdict, advice=advice)


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The worst of several chains'."""
    return min(verdicts, key=lambda v: (ORDER.index(v.state), v.score if v.score is not None else 0.0))


def _times(decades: float) -> str:
    """A growth of so many decades in words."""
    return f"{10**decades:,.0f}-fold" if decades < 6 else f"by a factor of 10^{decades:.0f}"
