"""Distinction of dead, underflowing and unconnected gradients, by a second pass in float64."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from skipscope._data import Batches, map_tensors
from skipscope._option_words import GradientState, MeasuredState
from skipscope._ranks import whole
from skipscope._subject import Subject
from skipscope.flow._flow_result import LayerGradient
from skipscope.flow.passes._gradient_pass import measure
from skipscope.flow.passes._gradient_readings import Readings, WeightReading
from skipscope.flow.passes._tensor_norms import least, sum_of_sizes, zeros_in

ROUNDING = (
    "What is exactly 0 here is so by rounding in an activation function (1 - tanh^2, say), which a scale of"
    " the loss does not cure: in float64 it is not quite 0."
)
UNCERTAIN = "What is exactly 0 here may be too small for its dtype instead: no copy in float64 could be run."


def second_opinion(
    readings: Readings, subject: Subject, seed: int, term: str = ""
) -> tuple[Readings | None, tuple[str, ...]]:
    """Measure again in float64 if a zero may be an underflow. Returns these readings or None, and notes."""
    if not _doubtful(readings):
        return None, ()
    exact = None if subject.ranks else _in_float64(subject, seed, term)
    if exact is None:
        return None, (UNCERTAIN,)
    return (None, (ROUNDING,)) if _is_rounding(readings, exact) else (exact, ())


def _doubtful(readings: Readings) -> bool:
    """Whether a gradient is exactly zero in a dtype narrower than float64, so that it may be an underflow."""
    narrow = [w for w in readings.weights.values() if w.total is not None and w.total.dtype != torch.float64]
    return any(not any(weight.rms) for weight in narrow) or any(
        g.all_zero and g.dtype != torch.float64 for g in readings.gradients
    )


def _is_rounding(readings: Readings, exact: Readings) -> bool:
    """Whether zeros come from rounding: their values in float64 are large enough for their dtype."""
    unit = exact.output_gradient or 1.0
    pairs = [
        (mine.dtype, true.rms / unit)
        for mine, true in zip(readings.gradients, exact.gradients)
        if mine.all_zero and mine.dtype is not None and true.norm > 0
    ]
    for name, mine in readings.weights.items():
        true = exact.weights[name].total
        if mine.total is not None and true is not None and not bool(mine.total.any()) and bool(true.any()):
            pairs.append((mine.total.dtype, float(true.abs().max()) * exact.weights[name].unit / unit))
    # Products inside a layer may be smaller than its output, hence the margin.
    return bool(pairs) and all(value > 1e6 * least(dtype) for dtype, value in pairs)


def _in_float64(subject: Subject, seed: int, term: str) -> Readings | None:
    """Readings from a copy in float64, or None if it cannot run."""

    def wide(value: Tensor) -> Tensor:
        return value.double() if value.is_floating_point() else value

    with subject.running(seed):
        try:
            twin = copy.deepcopy(subject.model).double()
            batches = Batches(
                [map_tensors(batch, wide) for batch in subject.data], single=subject.data.single
            )
            with torch.autocast(next(twin.parameters()).device.type, enabled=False):
                return measure(subject, twin, batches, term=term)
        # A model that cannot be copied or run in float64 is judged without this measurement.
        except Exception:
            return None


def boundary_state(readings: Readings, exact: Readings | None, i: int) -> tuple[MeasuredState, float | None]:
    """State of a boundary, and its flow before normalisation."""
    gradient = readings.gradients[i]
    if not readings.activations[i].seen:
        return "not_met", None
    if not readings.activations[i].finite:
        return "nonfinite_activation", None
    if not gradient.seen:
        return "not_connected", None
    if not gradient.finite:
        return "nonfinite", None
    if not gradient.all_zero:
        return "ok", gradient.rms
    if exact is not None and exact.gradients[i].norm > 0:
        return "underflow", exact.gradients[i].rms
    return "exact_zero", 0.0


def layer(name: str, weight: WeightReading, exact: WeightReading | None, scale: float) -> LayerGradient:
    if weight.total is None:
        return LayerGradient(name, None, None, None, "not_connected", trainable=weight.trainable)
    total = whole(weight.total)
    count = max(1, total.numel())
    largest = max(abs(float(end)) for end in total.aminmax()) if total.numel() else 0.0
    rms = weight.norm(total) * weight.unit / math.sqrt(count)
    mean = sum_of_sizes(total) * weight.unit / count
    zeros = zeros_in(total)
    state: GradientState
    if not math.isfinite(largest):
        state = "nonfinite"
    elif largest == 0:
        state = (
            "underflow"
            if exact is not None and exact.total is not None and bool(exact.total.any())
            else "exact_zero"
        )
    else:
        state = "underflow" if largest * weight.unit * scale < least(total.dtype) else "ok"
    return LayerGradient(
        name,
        mean,
        rms,
        zeros / count,
        state,
        _spread(weight.rms),
        weight.trainable,
    )


def _spread(values: list[float]) -> float | None:
    if len(values) < 2 or not sum(values):
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) / mean
