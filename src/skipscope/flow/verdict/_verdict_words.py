"""Wording of a verdict: the finding in a sentence, and advice for each cause."""

from __future__ import annotations

import math
from typing import Any, Protocol

from skipscope._option_words import VerdictCause, VerdictState

HEALTHY = "If training still stalls, check the data, the learning rate and the initialisation."
_TRY = "ss.prescribe(model, data, loss) tries remedies on copies."
_CLIP = (
    "Clip gradients (torch.nn.utils.clip_grad_norm_), or use orthogonal recurrent weights, gates or shorter"
    " sequences."
)
ADVICE: dict[VerdictCause, str] = {
    "time": (
        "Use gates (LSTM, GRU), orthogonal recurrent weights or shorter sequences, or read the output at more"
        " steps."
    ),
    "saturation": (
        "Use an activation that does not saturate (ReLU, GELU), put a norm before it, or start with smaller"
        " weights."
    ),
    "inactive": (
        "Lower the learning rate or the bias there, or use an activation with a slope everywhere (LeakyReLU,"
        " GELU)."
    ),
    "collapse": "Check the initialisation: what distinguishes the samples is lost there.",
    "underflow": "Scale the loss (torch.amp.GradScaler), or run this part in float32.",
    "weights": "Load the weights from before they became NaN, and lower the learning rate.",
    "data": "Remove the samples that are not finite.",
    "loss": (
        "Give the loss raw logits (cross_entropy, binary_cross_entropy_with_logits), and check its targets."
    ),
    "one position": (
        "Pass longer sequences. If one position is what you mean, do nothing: its queries and keys have no"
        " part in the output."
    ),
    "branch": "Give the branch a norm or another activation, or a shortcut of its own.",
    "head": "Start the last layer with weights of the usual size.",
    "batch norm": (
        "Use model.train(), or ss.recalibrate(model, data), so that the running statistics fit the data."
    ),
    "missing path": "Remove the detach, .data, no_grad or argmax on the way, or freeze those weights.",
    "softmax": "Leave at least one entry of each row unmasked.",
    "sqrt": "Add a small number under the root: its slope at 0 is infinite.",
    "div": "Add a small number to the divisor.",
    "log": "Clamp the argument of the logarithm away from 0.",
    "norm": "Add a small number to the norm: its slope at 0 is undefined.",
    "noise": "Pass more batches: ss.gradient_flow(model, loader, loss).",
    "opaque": "Measure a copy in which this call is written in plain PyTorch.",
    "overflow": "Lower the learning rate or the weights' size, clip gradients, or use bfloat16 or float32.",
}


def share(decades: float) -> str:
    """The share of a gradient that is left, in words for beginners.

    Example:
        >>> share(17.0), share(2.5)
        ('one part in 10^17', 'one part in 300')
    """
    if decades >= 5:
        return f"one part in 10^{decades:.0f}"
    return f"one part in {float(f'{10**decades:.1g}'):,.0f}"


class Judged(Protocol):
    """Attributes used in the wording; see :class:`skipscope.flow.Verdict`."""

    @property
    def state(self) -> VerdictState: ...
    @property
    def cause(self) -> VerdictCause: ...
    @property
    def where(self) -> str | None: ...
    @property
    def fall_decades(self) -> float | None: ...
    @property
    def starved(self) -> tuple[str, ...]: ...
    @property
    def reach(self) -> int | None: ...
    @property
    def head(self) -> Any: ...
    @property
    def evidence(self) -> float | None: ...


def finding(verdict: Judged) -> str:
    """The verdict in one sentence of at most 25 words."""
    at, fall = verdict.where, verdict.fall_decades
    if verdict.state == "healthy" and verdict.cause == "one position":
        return (
            "The gradient reaches every layer but the queries and keys that attend to a single position:"
            f" {verdict.starved[0]} first."
        )
    if verdict.state == "healthy":
        if verdict.starved:
            n = len(verdict.starved)
            return (
                f"The gradient reaches every layer, but {n} weight{'s get' if n > 1 else ' gets'} next to"
                f" nothing: {verdict.starved[0]} first."
            )
        return "The gradient reaches every layer."
    if verdict.state == "cannot tell":
        if verdict.cause == "opaque":
            return f"No layer can be judged: {at} cannot be looked into."
        return "The gradient's flow is too close to a limit to be judged."
    if verdict.state == "nonfinite":
        return f"Numbers stop being finite at {at}."
    if verdict.state == "unconnected":
        return f"No gradient reaches {at}: it is cut off from the loss."
    if verdict.state == "dead":
        return f"No gradient passes {at}: it is exactly 0 there."
    if verdict.state == "exploding" and verdict.cause == "time":
        size = _times(verdict.evidence or 0.0)
        return f"The gradient explodes through time: it grows {size} over the steps of {at}."
    if verdict.cause == "time":
        return f"The gradient vanishes through time: it reaches back only {verdict.reach} steps in {at}."
    if verdict.cause == "branch":
        return f"The weights in {at} get next to no gradient, while others do."
    if verdict.cause == "head" and verdict.starved and at != "head":
        return f"The weights of the last layer, {at}, get next to no gradient for their size."
    if verdict.cause == "head" or (verdict.cause == "saturation" and at == "output"):
        gain = verdict.head.gain if verdict.head else 0.0
        return (
            f"The output layer lets only {share(-math.log10(gain)) if gain > 0 else 'nothing'} of the"
            " gradient through."
        )
    if verdict.state == "vanishing":
        return (
            f"The gradient vanishes: {share(fall or 0.0)} of it reaches the first layer; it is lost at {at}."
        )
    return f"The gradient explodes: it grows {_times(-(fall or 0.0))} on its way to the first layer."


def advice_on(verdict: Judged) -> str:
    """What to do next, in a sentence."""
    if verdict.state == "healthy" and verdict.cause == "none":
        return HEALTHY
    if verdict.state == "exploding" and verdict.cause == "time":
        return _CLIP
    return ADVICE.get(verdict.cause, _TRY)


def _times(decades: float) -> str:
    """A growth of ``decades`` in words."""
    return f"{10**decades:,.0f}-fold" if decades < 6 else f"by a factor of 10^{decades:.0f}"
