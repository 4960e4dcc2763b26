"""Rules that turn the flow at boundaries into a verdict, as pure functions.

With g_i the flow (RMS of the gradient) at boundary i of n, and y_i = log10 g_i:
fall = y_last - y_first; slope = the least-squares coefficient of y on i; both positive when the gradient
shrinks on its way back. chi = 10 ** (-2 slope) is Schoenholz's (2016), and 1/|ln chi| his depth scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from skipscope._numbers import short, student_quantile
from skipscope._option_words import (
    GradientState,
    MeasuredState,
    OptimizerKind,
    RecordedState,
    VerdictCause,
    VerdictState,
)
from skipscope.flow._flow_result import Verdict

# Limits in decades lost or gained going back. Of 300 networks labelled by training (benchmarks/verdict.py),
# none that SGD can train loses more than 2.2 decades or gains more than 2.5. The lecture's network with
# unscaled shortcuts learns under SGD at 30, 33 and 36 layers, where it gains 1.8 to 2.8 decades, but not at
# 40 layers (2.7 to 3.0). Adam, whose steps do not depend on the gradient's size, tolerates far more of both.
FALL, GROWTH = 2.5, 2.5
ADAM_FALL, ADAM_GROWTH = 9.0, 4.2
# An explosion is spread over at least three steps: at least this growth remains without the two largest
# steps. Norms after small activations (an embedding of std 0.02, an image of low contrast) have all their
# growth in one or two steps, which is a change of scale.
SPREAD_GROWTH = 1.9
# Limit with norms between the weights, where steps adapt to the gradient's size (Arora, Li, Lyu 2018,
# Theoretical Analysis of Auto Rate-Tuning by Batch Normalization). Batch norms add about 0.1 decades per
# layer (Yang et al. 2019, A Mean Field Theory of Batch Normalization): stock MobileNets gain 3.2 decades, a
# residual network of 110 layers 3.7, and both train.
NORMED_GROWTH = 4.5
# Half-width of the band around a limit in standard errors, and its maximum in decades.
ERRORS, WIDEST = 1.0, 0.3
# Smallest share of the gradient that a healthy head passes on.
HEAD = 1e-4
# A chain vanishes if more than this share of its weighted calls is starved.
STARVED_SHARE = 0.1
ALL: tuple[OptimizerKind, ...] = ("SGD", "Adam")
# Mean cosine between activations of different samples from which later layers cannot distinguish them.
COLLAPSED = 0.995
# Share of the change from which a second cause is named beside the first.
SHARE_OF_SECOND = 0.25
# Rectifiers: about half of their units have no slope by design, and such a unit is inactive, not saturated.
RECTIFIERS = frozenset({"relu", "relu6", "leaky_relu", "gelu", "silu", "mish", "hardswish"})
# Share of the fall from which a single step is named as the place where the flow breaks.
SHARE_OF_ONE = 0.5


@dataclass(frozen=True)
class Point:
    """A boundary in the rules.

    Attributes:
        name: name of the boundary.
        state: state as in :class:`BoundaryFlow`, or a state that is only distinguished by the rules.
        log_flow: log10 of its flow, or None without a flow.
        similarity: mean cosine between the activations of different samples.
        merge: whether a shortcut ends at the boundary.
        hidden: whether it is neither input nor output; the fall is measured over hidden points only.
        given: whether it is an input of the model, through which no weight is trained.
        samples: log10 of the norm of each sample; empty if not known.
        log_relative: log10 of the norm of gradient times activation.
    """

    name: str
    state: MeasuredState | RecordedState
    log_flow: float | None
    similarity: float | None = None
    merge: bool = False
    hidden: bool = True
    given: bool = False
    samples: tuple[float, ...] = ()
    log_relative: float | None = None


@dataclass(frozen=True)
class StretchGain:
    """Factor of the weights and activation functions between two boundaries on the gradient.

    Attributes:
        activation: its activation function, or None.
        slope: RMS of the function's derivative over all units: its factor on the gradient's RMS.
        saturated: share of units whose derivative is below 5 % of its maximum.
        inactive: share of units whose derivative is exactly 0.
        gain: product over its weights of RMS weight x sqrt(fan-out): their factor on the gradient's RMS.
        layer: name of its first weight.
    """

    activation: str | None = None
    slope: float = 1.0
    saturated: float = 0.0
    inactive: float = 0.0
    gain: float = 1.0
    layer: str | None = None


def in_turn(gains: Sequence[StretchGain]) -> StretchGain:
    """Combine parallel stretches, as in an Inception module, with the last, which reads their outputs.

    Example:
        >>> in_turn([StretchGain(gain=0.5), StretchGain(gain=2.0), StretchGain(gain=1e-4, layer="a")])
        StretchGain(activation=None, slope=1.0, saturated=0.0, inactive=0.0, gain=0.0001, layer='a')
    """
    *beside, last = gains
    if not beside:
        return last
    slope, gain = (
        10.0 ** (sum(_log(value) for value in values) / len(beside))
        for values in ([g.slope for g in beside], [g.gain for g in beside])
    )
    steepest = min(gains, key=lambda g: (g.activation is None, g.slope))
    return replace(
        steepest,
        slope=slope * last.slope,
        gain=gain * last.gain,
        layer=min(gains, key=lambda g: (g.layer is None, g.gain)).layer,
    )


@dataclass(frozen=True)
class FlowContext:
    """Properties of the network that the rules need.

    Attributes:
        residual: whether shortcuts run along the boundaries, so that gains of branches do not multiply.
        normed: whether there are norms over the data between the weights. They cancel the scale of their
            inputs and of weights before them (Arora, Li, Lyu 2018), so growth is judged by gradient times
            activation.
        dtype: dtype of the gradients, for the reason of an underflow.
    """

    residual: bool = False
    normed: bool = False
    dtype: str = ""


_PLAIN = FlowContext()


def least_squares(y: Sequence[float]) -> tuple[float, tuple[float, float]] | None:
    """Slope of ``y`` against 0, 1, 2, ... and its 95 % confidence interval; None for fewer than two points.

    Example:
        >>> least_squares([0.0, 1.0, 2.0])
        (1.0, (1.0, 1.0))
    """
    n = len(y)
    if n < 2:
        return None
    mid, mean = (n - 1) / 2, sum(y) / n
    spread = sum((i - mid) ** 2 for i in range(n))
    slope = sum((i - mid) * (v - mean) for i, v in enumerate(y)) / spread
    if n == 2:
        return slope, (-math.inf, math.inf)
    rest = sum((v - mean - slope * (i - mid)) ** 2 for i, v in enumerate(y))
    margin = student_quantile(0.975, n - 2) * math.sqrt(rest / (n - 2) / spread)
    return slope, (slope - margin, slope + margin)


def judge(
    points: Sequence[Point],
    stretches: Sequence[StretchGain] = (),
    context: FlowContext = _PLAIN,
    culprit: tuple[VerdictCause, str] | None = None,
) -> Verdict:
    """Judge a flow.

    Args:
        points: boundaries in order of execution.
        stretches: gain between each boundary and the next (or the output); may be empty.
        context: properties of the network.
        culprit: (cause, description) of the first value that is not finite, if any.
    """
    residual, normed = context.residual, context.normed
    broken = _broken(points, stretches, residual, culprit)
    if broken is not None:
        return broken
    connected = [(i, p) for i, p in enumerate(points) if p.log_flow is not None and p.hidden]
    logs = [p.log_flow for _, p in connected if p.log_flow is not None]
    fall = logs[-1] - logs[0] if logs else None
    fitted = least_squares(logs)
    slope, interval = fitted if fitted else (None, None)
    numbers = {"fall_decades": fall, "slope": slope, "slope_interval": interval, "score": _score(logs)}
    relative = [p.log_relative for _, p in connected if p.log_relative is not None] if normed else []
    growth = relative if len(relative) == len(logs) else logs
    healthy = _healthy(points, fall, numbers)
    if fall is None:
        return healthy
    band, limit = _noise([p for _, p in connected]), NORMED_GROWTH if normed else GROWTH
    surely, maybe = (
        fall >= FALL + by or (fall < 0 and _explodes(growth, limit + by)) for by in (band, -band)
    )
    if not surely:
        return _uncertain(healthy, band, FALL if fall > 0 else limit) if maybe else healthy
    state: VerdictState = "vanishing" if fall > 0 else "exploding"
    at = _where(logs)
    first, last = connected[at][0], connected[at + 1][0]
    alone = abs(logs[at + 1] - logs[at]) >= SHARE_OF_ONE * abs(fall)
    cause, reason, evidence = _why(
        state,
        logs,
        at,
        alone,
        stretches[first:last] if alone else stretches[connected[0][0] : connected[-1][0]],
        residual and not (alone and not points[last].merge),
    )
    collapsed = _collapse(points)
    if collapsed is not None:
        if cause == "unexplained":
            cause, evidence = "collapse", collapsed.similarity
        reason = f"{reason}; {_in_words(collapsed)}"
    if any(p.state == "underflow" for p in points):
        zero = next(p for p in reversed(points) if p.state == "underflow")
        cause, evidence = "underflow", 10.0 ** (zero.log_flow or 0.0)
        reason = (
            f"the gradient underflows {context.dtype or 'its dtype'} at {zero.name}, where it is"
            f" {short(evidence)} in float64; {reason}"
        )
    return Verdict(
        state,
        **numbers,
        where=connected[at][1].name,
        reason=reason,
        cause=cause,
        evidence=evidence,
        hinders=("SGD",) if -ADAM_GROWTH < fall < ADAM_FALL else ALL,
    )


def _noise(line: Sequence[Point]) -> float:
    """Standard error of the fall, from the spread of the samples' falls; 0 if these are not known."""
    if len(line) < 2 or len(line[0].samples) != len(line[-1].samples):
        return 0.0
    falls = [b - a for a, b in zip(line[0].samples, line[-1].samples) if math.isfinite(b - a)]
    if len(falls) < 2:
        return 0.0
    return min(WIDEST, ERRORS * float(np.std(falls, ddof=1)) / math.sqrt(len(falls)))


def _uncertain(healthy: Verdict, band: float, limit: float) -> Verdict:
    """Verdict on a flow within the noise of a limit: neither healthy nor faulty."""
    reason = f"{healthy.reason}, which is nearer the limit of {limit} than its standard error of {band:.2g}"
    return replace(healthy, state="cannot tell", reason=reason, cause="noise", evidence=band)


def _score(logs: Sequence[float]) -> float:
    """Minus the decades between the largest and the smallest flow of a line."""
    return min(logs, default=0.0) - max(logs, default=0.0)


def _explodes(logs: Sequence[float], limit: float) -> bool:
    """Whether the gradient grows on its way back, over several steps: a single one is a change of scale."""
    growth = logs[0] - logs[-1]
    steps = sorted((a - b for a, b in pairwise(logs)), reverse=True)
    return growth >= limit and growth - sum(steps[:2]) >= SPREAD_GROWTH


def _healthy(points: Sequence[Point], fall: float | None, numbers: dict) -> Verdict:
    n = sum(p.log_flow is not None and p.hidden for p in points)
    if fall is None or n < 2:
        size = "there are fewer than two hidden boundaries, so no gradient can be lost between them"
    else:
        size = f"{short(abs(fall))} decades {'lost' if fall >= 0 else 'gained'} over {n} boundaries"
    collapsed = _collapse(points)
    if collapsed is None:
        return Verdict("healthy", **numbers, where=None, reason=size)
    return Verdict(
        "healthy",
        **numbers,
        where=None,
        reason=f"{size}; but {_in_words(collapsed)}: look at the initialisation",
        cause="collapse",
        evidence=collapsed.similarity,
    )


def _collapse(points: Sequence[Point]) -> Point | None:
    """The first hidden boundary from which, up to the last, different samples look the same, or None.

    The output is left out, because no layer follows it, and untrained networks give similar outputs.
    """
    found = None
    for p in reversed([p for p in points if p.hidden]):
        if p.similarity is not None and p.similarity < COLLAPSED:
            break
        found = p if p.similarity is not None else found
    return found


def _in_words(p: Point) -> str:
    return (
        f"from {p.name} on the activations of different samples are nearly one (mean cosine"
        f" {p.similarity:.4f}): rank collapse"
    )


def _broken(
    points: Sequence[Point],
    stretches: Sequence[StretchGain],
    residual: bool,
    culprit: tuple[VerdictCause, str] | None,
) -> Verdict | None:
    """Verdict in states without a meaningful fall (non-finite, unconnected, dead), or None."""
    nothing: dict = {"fall_decades": None, "slope": None, "slope_interval": None}
    forward = next((p for p in points if p.state == "nonfinite_activation"), None)
    back = next((p for p in reversed(points) if p.state == "nonfinite"), None)
    nothing["score"] = -math.inf
    if p := forward or back:
        what = f"the activation at {p.name}" if forward else f"the gradient at {p.name}"
        cause, words = culprit or ("overflow", "overflows going forward" if forward else "is not finite")
        reason = f"{words}; from there on {what} is not finite" if culprit else f"{what} {words}"
        return Verdict("nonfinite", **nothing, where=p.name, reason=reason, cause=cause, hinders=ALL)
    first = next((p for p in points if not p.given), points[0] if points else None)
    if first is None or first.state == "not_connected":
        until = _until(points, "not_connected")
        name = points[until].name if points else None
        rest = len(points) - until - 1
        return Verdict(
            "unconnected",
            **nothing,
            where=name,
            cause="missing path",
            evidence=float(until + 1),
            hinders=ALL,
            reason=(
                f"no path leads from the loss to {name}: {until + 1} of {until + 1 + rest} boundaries get no"
                " gradient"
            ),
        )
    if first.state == "exact_zero":
        return _dead(points, stretches, residual, nothing)
    return None


def _dead(
    points: Sequence[Point], stretches: Sequence[StretchGain], residual: bool, nothing: dict
) -> Verdict:
    until = _until(points, "exact_zero")
    # A dead layer can silence all later layers, so the first is the cause, unless the loss itself passes no
    # gradient on. With shortcuts only the last can be the cause.
    silent = [
        i
        for i, stretch in enumerate(stretches[: until + 1])
        if _is_silent(stretch) and (i == until or not residual)
    ]
    at = silent[0] if silent and (until < len(points) - 1 or silent[-1] == until) else until
    name = points[at].name
    stretch = stretches[at] if at < len(stretches) else StretchGain()
    if stretch.layer and stretch.gain == 0:
        cause, evidence = "gain", 0.0
        reason = f"the weights of {stretch.layer} are all 0"
    elif _is_silent(stretch):
        (cause, word), evidence = _off(stretch), 1.0
        reason = (
            f"every unit of the {stretch.activation} after {name} is {word} on all of the data (100 % have"
            " slope 0)"
        )
    elif at == len(points) - 1:
        cause, evidence = "loss", 0.0
        reason = f"the gradient is exactly 0 already at {name}, the last boundary: the loss passes none on"
    else:
        cause, evidence = "unexplained", 0.0
        reason = f"the gradient is exactly 0 at {name} and all before it"
    return Verdict("dead", **nothing, where=name, reason=reason, cause=cause, evidence=evidence, hinders=ALL)


def _is_silent(stretch: StretchGain) -> bool:
    """Whether an activation function without slope, or weights that are all 0, block the gradient."""
    return bool((stretch.activation and stretch.inactive == 1) or (stretch.layer and stretch.gain == 0))


def _off(stretch: StretchGain) -> tuple[VerdictCause, str]:
    """The cause if units have no slope, and the word for such a unit."""
    return ("inactive", "inactive") if stretch.activation in RECTIFIERS else ("saturation", "saturated")


def _until(points: Sequence[Point], state: GradientState) -> int:
    """Index of the last boundary of the run in ``state`` that starts at the first boundary."""
    last = 0
    for i, p in enumerate(points):
        if p.state != state:
            break
        last = i
    return last


def _where(logs: Sequence[float]) -> int:
    """Index of the largest step if it is half of the fall, otherwise of the step that crosses the limit."""
    fall = logs[-1] - logs[0]
    sign = math.copysign(1.0, fall)
    steps = [sign * (b - a) for a, b in pairwise(logs)]
    worst = max(range(len(steps)), key=steps.__getitem__)
    if steps[worst] >= SHARE_OF_ONE * abs(fall):
        return worst
    limit = FALL if fall > 0 else GROWTH
    return next((i for i in range(len(steps) - 1, -1, -1) if sign * (logs[-1] - logs[i]) >= limit), 0)


def _why(
    state: VerdictState,
    logs: Sequence[float],
    at: int,
    alone: bool,
    stretches: Sequence[StretchGain],
    residual: bool,
) -> tuple[VerdictCause, str, float | None]:
    """The cause in a word, the reason in a sentence, and the number behind it."""
    fall, steps = logs[-1] - logs[0], len(logs) - 1
    word = "shrinks" if state == "vanishing" else "grows"
    each = 10.0 ** (-fall / steps)
    if alone:
        step = 10.0 ** (logs[at] - logs[at + 1])
        size, whole = abs(logs[at + 1] - logs[at]), abs(fall)
        share = f"{short(size)} of {short(whole)} decades"
        if size > whole:  # the other steps change in the other direction
            share = f"{short(size)} decades, where all steps together come to {short(whole)}"
        what = f"one step puts a factor {short(step)} on it, {share}"
    else:
        what = f"it {word} by a factor {short(each)} at each of {steps} boundaries"
    if residual and state == "exploding":
        return "gain", f"{what}: what the branches add to the shortcuts multiplies up", each
    if residual:
        return "unexplained", what, None
    slopes, gains = (
        sum(_log(value) for value in column)
        for column in ([c.slope for c in stretches], [c.gain for c in stretches])
    )
    expected = slopes + gains
    observed = -(logs[at + 1] - logs[at]) if alone else -fall
    if not stretches or expected * observed <= 0 or abs(expected) < 0.5 * abs(observed):
        return "unexplained", what, None
    causes = [(gains, _of_weights(stretches, gains, observed))]
    if observed < 0:
        causes.append((slopes, _of_activations(stretches)))
    causes.sort(key=lambda entry: entry[0] / observed, reverse=True)
    _, (cause, words, evidence) = causes[0]
    besides = [w for size, (_, w, _) in causes[1:] if size / observed >= SHARE_OF_SECOND]
    if cause == "gain" and observed < 0 and not besides and causes[0][0] == slopes:
        words += f", for which the weights' gain of {short(_gain_a_layer(stretches, gains))} does not make up"
    return cause, "; besides, ".join([f"{what}: {words}", *besides]), evidence


def _of_weights(
    stretches: Sequence[StretchGain], gains: float, observed: float
) -> tuple[VerdictCause, str, float]:
    worst = (min if observed < 0 else max)(stretches, key=lambda c: c.gain)
    gain = _gain_a_layer(stretches, gains)
    return (
        "gain",
        (
            f"the weights' gain (RMS weight x sqrt(fan-out)) is {short(gain)} a layer, {short(worst.gain)} at"
            f" {worst.layer}"
        ),
        gain,
    )


def _gain_a_layer(stretches: Sequence[StretchGain], gains: float) -> float:
    return 10.0 ** (gains / max(1, sum(c.layer is not None for c in stretches)))


def _of_activations(stretches: Sequence[StretchGain]) -> tuple[VerdictCause, str, float]:
    worst = min(stretches, key=lambda c: c.slope)
    if worst.inactive >= 0.9:
        cause, word = _off(worst)
        return (
            cause,
            f"{100 * worst.inactive:.0f} % of the units of a {worst.activation} are {word}",
            worst.inactive,
        )
    saturated = [c.saturated for c in stretches if c.activation is not None]
    share = sum(saturated) / max(1, len(saturated))
    if share >= (0.75 if worst.activation in RECTIFIERS else 0.25):
        return (
            "saturation",
            f"{100 * share:.0f} % of the units of its {worst.activation} are saturated",
            share,
        )
    return (
        "gain",
        f"the slope of its {worst.activation} is {short(worst.slope)} (RMS over units)",
        worst.slope,
    )


def _log(value: float) -> float:
    return math.log10(value) if value > 0 else -300.0
