"""Live verdict: the rules of ``gradient_flow`` applied to a running training.

The rules apply directly to the *boundary flow*. *Parameter gradients* are weaker evidence: RMS dL/dW is the
flow times the size of an activation, and depends on the weight's shape. So only weights of equal shape are
compared (each shape has its own level, all share the change with depth), with stricter limits. The gradient
of a layer's *bias* is better: dL/db is the sum of dL/d(the layer's output) over samples and positions, which
differs from the flow only as far as these cancel. Over 200 networks (those of benchmarks/verdict.py that are
not held out) the fall of bias gradients correlated with the fall of the flow by 0.998, that of weight
gradients by 0.79. So biases are used if enough of them are comparable.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from skipscope._numbers import short
from skipscope._option_words import GradientState, LiveState, RecordedState
from skipscope.flow import (
    FALL,
    GROWTH,
    NORMED_GROWTH,
    Evidence,
    FlowContext,
    Head,
    Point,
    Reach,
    Starved,
    advice_on,
    judge_chain,
)
from skipscope.monitor.history._history import FLOW, GRADIENTS, STATES, LiveVerdict

# In one network dL/dW fell by 1.4 decades although dL/dx grew. So the limits are stricter than for a flow,
# and stricter still if no weights of equal shape can be compared.
_OF_WEIGHTS, _OF_UNEQUAL = 2.5, 3.5
# Fewest weights of one shape that can be compared.
ALIKE = 3
# The gradient norm of a stock ResNet grows by 1.9 decades towards the first layer, and it trains.
_GROWTH_OF_NORM = 2.5
# Hysteresis in decades: a state is left only if the fall is this much below the threshold.
_STICKY = 0.3
_STATE_WORDS = np.array(["ok" if state == "underflow" else state for state in STATES])

NONE_STARVED = Starved()
# Gradients do not show which call produced it; another pass over the batch does.
_FIND_NONFINITE = (
    "ss.gradient_flow(model, data, loss) on this batch names the first call that is not finite. Where the"
    " loss grew before, lower the learning rate or clip gradients."
)
UNKNOWN = LiveVerdict("unknown", GRADIENTS, 0, "no step has been recorded yet")


_BADNESS: tuple[LiveState, ...] = (
    "unknown",
    "healthy",
    "vanishing",
    "exploding",
    "unconnected",
    "dead",
    "nonfinite",
)
_EARLY = "not every gradient has arrived yet; parts that start at zero are judged after the first steps"


def badness(state: LiveState) -> int:
    """Rank of a state, from unknown and healthy to the worst."""
    return _BADNESS.index(state)


def severity(verdict: LiveVerdict) -> tuple[int, float]:
    """What the worst of several verdicts is the greatest by."""
    return badness(verdict.state), abs(verdict.fall_decades or 0.0)


def for_optimizer(verdict: LiveVerdict, kinds: Collection[str], chain: str) -> LiveVerdict:
    """Adapt a verdict to the kinds of optimizer in use: which of them are hindered, and the wording."""
    if verdict.state not in {"vanishing", "exploding"}:
        return replace(verdict, chain=chain)
    known = sorted(kind for kind in kinds if kind)
    hinders = tuple(kind for kind in verdict.hinders if kind in known) if known else verdict.hinders
    words = {
        (): f"; the optimizer in use ({' and '.join(known)}) mostly bears it",
        ("SGD",): "; it hinders SGD" + ("" if known else ", Adam mostly bears it"),
    }.get(hinders, "")
    return replace(verdict, chain=chain, hinders=hinders, reason=verdict.reason + words)


@dataclass(frozen=True)
class Place:
    """A boundary in a live verdict.

    Attributes:
        name: of the boundary.
        hidden: it is between input and output. The fall is taken over such places alone: no weight is
            trained through the input's gradient, and the step to the output is common to all layers.
        averaging: decades that its gradient loses by averages between it and the output, which are put back.
        lines: the lines that it is on, as bits; 0 beside them.
    """

    name: str
    hidden: bool
    averaging: float = 0.0
    lines: int = 0


def judge_flow(
    places: Sequence[Place],
    values: np.ndarray,
    step: int,
    was: LiveState,
    *,
    normed: bool = False,
    reach: Reach | None = None,
    is_early: bool = False,
    relative: Sequence[float] = (),
    starved: Starved = NONE_STARVED,
) -> LiveVerdict:
    """The verdict on the flow at boundaries: that on the worst line.

    Args:
        places: boundaries, nearest the input first.
        values: norm of the gradient at each boundary, which does not depend on widths; NaN if none arrived.
        step: step of the reading.
        was: previous state.
        normed: whether there are norm layers over the data between the weights.
        reach: reach of a recurrent layer.
        is_early: whether to leave out boundaries without a gradient.
        starved: weights with a tiny gradient, if known.
        relative: norm of gradient times activation at each boundary; NaN or empty if it was not read.
    """
    products = [*relative] or [math.nan] * len(places)
    count = max((place.lines for place in places), default=0).bit_length()
    found = []
    for line in range(max(1, count)):
        on = [i for i, place in enumerate(places) if not place.lines or place.lines >> line & 1]
        found.append(
            _judge_line(
                [places[i] for i in on],
                values[on],
                [products[i] for i in on],
                step,
                was,
                normed,
                reach,
                is_early,
                starved,
            )
        )
    return max(found, key=severity)


def _judge_line(
    places: Sequence[Place],
    values: np.ndarray,
    relative: Sequence[float],
    step: int,
    was: LiveState,
    normed: bool,
    reach: Reach | None,
    is_early: bool,
    starved: Starved,
) -> LiveVerdict:
    """The verdict on one line, and on what is beside all lines."""
    hidden = [place.hidden for place in places]
    points = [
        Point(place.name, *_flow_state(value, place.averaging), log_relative=_log(product, place.averaging))
        for place, value, product in zip(places, values, relative)
    ]
    inner = [point for point, is_hidden in zip(points, hidden) if is_hidden]
    trained = points[1:] if len(points) > 1 and not hidden[0] else points
    missing = {"not_connected", "exact_zero"}
    if is_early:
        inner, trained = ([p for p in some if p.state not in missing] for some in (inner, trained))
        if not trained:
            return LiveVerdict("unknown", FLOW, step, _EARLY)
    if any(p.state == "nonfinite" for p in points):
        inner = points
    elif trained[0].state in missing:
        inner = trained
    inner = inner or [replace(point, hidden=False) for point in trained]
    evidence = Evidence(
        (tuple(inner),), _head_of(points, hidden, places), reach=reach, growing=reach, starved=starved
    )
    return _live(evidence, "boundaries", step, was, None, normed)


def _head_of(points: Sequence[Point], hidden: Sequence[bool], places: Sequence[Place]) -> Head | None:
    """The head between the last hidden boundary and the output, or None if they are not both read."""
    last = max((i for i, inside in enumerate(hidden) if inside), default=None)
    if last is None or last == len(points) - 1:
        return None
    inside, output = points[last].log_flow, points[-1].log_flow
    if inside is None or output is None:
        return None
    return Head(places[last].averaging, 10.0 ** (inside - output), None)


def judge_gradients(
    names: Sequence[str],
    shapes: Sequence[Any],
    rms: np.ndarray,
    states: np.ndarray,
    step: int,
    was: LiveState,
    what: str = "weights",
    *,
    is_early: bool = False,
    is_ordered: bool = False,
    normed: bool = False,
    starved: Starved = NONE_STARVED,
) -> LiveVerdict:
    """Judge the gradients of weights or biases.

    Args:
        names: names of the parameters, in the model's order; ``[W]``.
        shapes: their shapes, or other keys that are equal for comparable parameters.
        rms: RMS dL/dW of the last few steps; ``[steps, W]``, NaN if there is no gradient.
        states: index into STATES; ``[steps, W]``.
        step: the last of these steps.
        was: previous state.
        what: ``"weights"``; or ``"biases"``, of which some must be comparable.
        is_early: whether to leave out weights without a gradient.
        is_ordered: whether the parameters are in the order of execution.
        normed: whether there are norm layers between the weights, whose gradients grow without harm.
        starved: weights with a tiny gradient, if known.
    """
    state: list[RecordedState] = _lasting(states)
    if is_early:
        state = ["absent" if s in {"exact_zero", "not_connected"} else s for s in state]
    if is_ordered and "ok" in state:
        # A weight with gradient 0 after a weight with a gradient is on a side path, for example q and k that
        # attend to a single position.
        first = state.index("ok")
        state[first:] = ["absent" if s == "exact_zero" else s for s in state[first:]]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(np.where(rms > 0, rms, np.nan))
    level = _medians(logs)
    level, compared = _comparable(level, shapes, state)
    points = [
        Point(name, s, float(y) if math.isfinite(y) else None)
        for name, s, y, use in zip(names, state, level, compared)
        if use or s not in {"ok", "frozen", "absent"}
    ]
    points = [p for p in points if p.state != "ok" or p.log_flow is not None]
    if not points:
        reason = _EARLY if is_early else "no weight has a gradient that can be compared"
        return LiveVerdict("unknown", GRADIENTS, step, reason)
    equal = Counter(shape for shape, use in zip(shapes, compared) if use)
    alike = max(equal.values(), default=0) >= ALIKE
    if what == "biases" and not alike and points[0].state != "exact_zero":
        return LiveVerdict("unknown", GRADIENTS, step, "too few biases are alike")
    limit = _OF_WEIGHTS if alike else _OF_UNEQUAL
    return _live(Evidence((tuple(points),), starved=starved), what, step, was, limit, normed)


_ONE = {"boundaries": "boundary", "weights": "weight", "biases": "bias"}


def _live(
    evidence: Evidence, of: str, step: int, was: LiveState, of_weights: float | None, normed: bool = False
) -> LiveVerdict:
    """Judge as ``gradient_flow`` does, or by the limits for weights, with hysteresis."""
    found = judge_chain(evidence, {}, FlowContext(normed=normed))
    (points,) = evidence.lines
    # That state needs samples or opaque calls, which are not known here.
    assert found.state != "cannot tell"
    state: LiveState = found.state
    reason, where, fall = found.reason, found.where, found.fall_decades
    basis = FLOW if of == "boundaries" else GRADIENTS
    reason = reason.replace("boundaries", of)
    if fall is not None and found.cause not in {"time", "head", "branch"}:
        growth = NORMED_GROWTH if normed else of_weights or max(GROWTH, _GROWTH_OF_NORM)
        trouble, limit = ("vanishing", of_weights or FALL) if fall >= 0 else ("exploding", growth)
        lasting = was == trouble and limit - _STICKY <= abs(fall) < limit
        change = (
            f"{short(abs(fall))} decades {'lost' if fall >= 0 else 'gained'} over {len(points)}"
            f" {of if len(points) != 1 else _ONE[of]}"
        )
        if lasting:
            state, where, reason = trouble, points[0].name, f"{change}, hardly less than before"
        elif abs(fall) < limit or state == "healthy":
            hint = "" if basis == FLOW else "; set flow_every= to read the flow itself"
            state, where, reason = "healthy", None, change + hint
    hinders = () if state == "healthy" else found.hinders or ("SGD",)
    if basis == GRADIENTS and state == "dead" and found.cause == "loss":
        # The gradient of a weight is also 0 if its input is 0.
        reason = "every gradient is exactly 0: the loss passes none on, or the activations before it are 0"
        found = replace(found, cause="unexplained")
    cause = "none" if state == "healthy" else found.cause
    worded = replace(found, state=state, where=where, reason=reason, cause=cause)
    advice = _FIND_NONFINITE if state == "nonfinite" else "" if state == "healthy" else advice_on(worded)
    return LiveVerdict(
        state,
        basis,
        step,
        reason,
        where,
        fall,
        found.slope,
        found.slope_interval,
        advice=advice,
        hinders=hinders,
        finding=worded.finding,
        score=found.score,
        starved=found.starved,
    )


def _log(value: float, averaging: float) -> float | None:
    return math.log10(value) + averaging if math.isfinite(value) and value > 0 else None


def _flow_state(value: float, averaging: float) -> tuple[GradientState, float | None]:
    if math.isnan(value):
        return "not_connected", None
    if math.isinf(value):
        return "nonfinite", None
    return ("ok", math.log10(value) + averaging) if value > 0 else ("exact_zero", None)


def _lasting(codes: np.ndarray) -> list[RecordedState]:
    """State of each weight over several steps: zero or missing only if its gradient is so at every step.

    A non-finite gradient counts if it is in the last step. ``codes`` are ``[steps, W]``, NaN for no step.
    """
    there = np.isfinite(codes)
    last = codes[len(codes) - 1 - there[::-1].argmax(axis=0), np.arange(codes.shape[1])]
    same = ((codes == last) | ~there).all(axis=0) | (last == STATES.index("nonfinite"))
    words = np.where(
        ~there.any(axis=0), "absent", np.where(same, _STATE_WORDS[np.nan_to_num(last).astype(int)], "ok")
    )
    return words.tolist()


def _medians(values: np.ndarray) -> np.ndarray:
    """Median of the finite values of each column; NaN if there are none."""
    kept = np.sort(np.where(np.isfinite(values), values, np.nan), axis=0)  # NaN comes last
    count, column = np.isfinite(kept).sum(axis=0), np.arange(values.shape[1])
    return (kept[np.maximum(count - 1, 0) // 2, column] + kept[count // 2, column]) / 2


def _comparable(
    level: np.ndarray, shapes: Sequence[Any], state: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Remove the level of each shape from log10 RMS. Returns the values, and which weights are comparable.

    A least-squares fit y = level of shape + slope x place + residual leaves slope x place + residual.
    """
    fine = np.isfinite(level) & np.array([s == "ok" for s in state], dtype=bool)
    members = Counter(shape for shape, ok in zip(shapes, fine) if ok)
    compared = np.array([ok and members[shape] >= ALIKE for shape, ok in zip(shapes, fine)], dtype=bool)
    if not compared.any():
        return level, fine
    place = np.cumsum(compared) - 1.0
    kinds = {shape: k for k, shape in enumerate(dict.fromkeys(s for s, use in zip(shapes, compared) if use))}
    rows = np.flatnonzero(compared)
    design = np.zeros((len(rows), 1 + len(kinds)))
    design[:, 0] = place[rows]
    design[np.arange(len(rows)), [1 + kinds[shapes[int(i)]] for i in rows]] = 1.0
    solution = np.linalg.lstsq(design, level[rows], rcond=None)[0]
    adjusted = level.copy()
    adjusted[rows] -= design[:, 1:] @ solution[1:] - solution[1:].mean()
    return adjusted, compared


def awaiting(verdict: LiveVerdict) -> LiveVerdict:
    """Verdict until the order of the weights is known."""
    reason = "which layers follow each other is looked up during the next step"
    return replace(UNKNOWN, step=verdict.step, reason=reason)


def refused(reason: str, step: int) -> LiveVerdict:
    """Verdict of a monitor that cannot record correct numbers."""
    return replace(UNKNOWN, step=step, reason=f"nothing is recorded: {reason}")
