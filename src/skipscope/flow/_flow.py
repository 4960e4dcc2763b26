"""``gradient_flow``: readings at the boundaries, three kinds of zero told apart, and the verdict on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from skipscope._data import Batch, Batches, Objective, tensors_in
from skipscope._numbers import short
from skipscope._public_call import public_call
from skipscope._ranks import greatest, ranks_of
from skipscope._subject import Subject, prepare
from skipscope.flow._chain_verdict import judge_chain
from skipscope.flow._clues import clues
from skipscope.flow._diagnosis import first_nonfinite, stale_norm
from skipscope.flow._flow_results import BoundaryFlow, GradientFlow, LayerGradient, SiteFlow, Verdict
from skipscope.flow._lines import Evidence, evidence_of
from skipscope.flow._measure import Tap, measure
from skipscope.flow._readings import Readings, dense, norm_of
from skipscope.flow._site_readings import LOOKUPS
from skipscope.flow._verdict import Clue, Point
from skipscope.flow._zero_by_design import settled as _settled
from skipscope.flow._zeros import boundary_state, layer, second_opinion
from skipscope.shortcuts import meaning, tap_boundaries


@public_call("gradient_flow")
def gradient_flow(
    model: nn.Module,
    data: Any,
    loss: Any = None,
    *,
    found: Any = None,
    scaler: Any = None,
    seed: int = 0,
    weight: Callable[[Batch], float] | None = None,
) -> GradientFlow:
    """Read the gradient on its way back through a network, and say what it is like.

    The flow at a boundary is the RMS over all elements of dL/d(activation) there, squares summed in float64, with
    |dL/d(output)| set to 1. The modules run in the modes they are in. Called inside ``torch.autocast`` it measures
    what autocast does. Local: a model wrapped in DDP is measured as itself, on this rank's data. Under FSDP2 collective:
    every rank calls it; boundaries are of this rank's data, a weight's gradient is the mean over ranks that training has.

    Args:
        model: any eager module; as found afterwards.
        data: a batch ``(inputs, target)``, a Mapping, or a re-iterable of batches.
        loss: ``loss(output, target)``; left out when the output carries ``.loss``.
        found: shortcuts already found, whose merges are the boundaries; found anew by default.
        scaler: the training loop's ``torch.amp.GradScaler``, so that underflow is judged at the scale it sets.
        seed: of the random numbers drawn inside (dropout).
        weight: what a batch counts for in the mean over batches.

    Returns:
        The flow at each boundary, the gradient of each weight, and the verdict.

    Raises:
        SkipscopeError: data, loss or model cannot be read, or the loss has no gradient.

    Example:
        >>> import torch, skipscope as ss
        >>> model = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.Sigmoid()) for _ in range(12)])
        >>> flow = ss.gradient_flow(model, (torch.randn(8, 16), torch.zeros(8, 16)), nn.functional.mse_loss)
        >>> flow.verdict.state, flow.verdict.cause
        ('vanishing', 'gain')
    """
    subject = prepare(model, data, loss, "gradient_flow", weight=weight, found=found)
    return flow_of(subject, seed, scale=float(scaler.get_scale()) if scaler is not None else 1.0)


def flow_of(subject: Subject, seed: int = 0, *, scale: float = 1.0) -> GradientFlow:
    """:func:`gradient_flow` of what is prepared; ``scale`` is what training multiplies the loss by. Local, or collective."""
    model, batches, objective, points = subject.model, subject.data, subject.loss, subject.boundaries

    def tap(touch):
        return tap_boundaries(model, points, touch)

    with subject.running(seed):
        mode = mode_of(model)
        readings = measure(model, batches, objective, len(points), tap, scale=scale)
    exact, notes = second_opinion(readings, subject, seed)
    if exact is not None and readings.output_gradient == 0:
        readings.output_gradient = exact.output_gradient
    flow = [boundary_state(readings, exact, i) for i in range(len(points))]
    judged, more = _settled(readings, subject, seed)
    verdict = _verdict(subject, judged, exact if judged is readings else None, tap, seed)
    notes += more
    return _assemble(model, points, flow, readings, exact, verdict, mode, scale, notes)


def _verdict(subject: Subject, readings: Readings, exact: Readings | None, tap: Tap, seed: int) -> Verdict:
    """What the readings come to; a second pass asks why, where there is something to ask."""
    model, batches, objective, points = subject.model, subject.data, subject.loss, subject.boundaries
    spread = bool(subject.ranks)
    states = [boundary_state(readings, exact, i) for i in range(len(points))]
    kept = [i for i, (state, _) in enumerate(states) if state != "not_met"]
    seen = [
        Point(
            points[i].name,
            states[i][0],
            _log(states[i][1]),
            readings.similarities[i],
            points[i].kind == "merge",
        )
        for i in kept
    ]
    residual = sum(p.kind == "merge" for p in points) > len(points) / 2
    base = exact or readings
    evidence = evidence_of(seen, points, kept, base, _sizes(model, readings))
    culprit = _culprit(model, batches, readings) if any("nonfinite" in p.state for p in seen) else None
    options: dict[str, Any] = {
        "residual": residual,
        "normed": residual and _is_normed(model),
        "dtype": _dtype_name(readings),
    }
    verdict = judge_chain(evidence, {}, culprit=culprit, **options)
    why_is_open = _asks_why(verdict, evidence, residual)
    if verdict.state == "healthy" and not spread:
        return verdict
    clues: dict[str, Clue] = {}
    stale = ""
    if not spread:
        with subject.running(seed):
            stale = stale_norm(model, batches, objective)
            if verdict.state == "nonfinite" and culprit is None:
                culprit = first_nonfinite(model, batches, objective)
    if greatest(model, why_is_open) if spread else why_is_open:  # all ranks together, or none
        with subject.running(seed):
            every = _clues(model, batches.first(), objective, len(points), tap)
        clues = {points[i].name: clue for i, clue in enumerate(every)}
    return judge_chain(evidence, clues, culprit=culprit, stale=stale, **options)


def _is_normed(model: nn.Module) -> bool:
    """Whether there is a batch norm that uses the data's own statistics for at least every second weighted layer."""
    modules = list(model.modules())
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in modules)
    weighted = sum(isinstance(m, nn.Linear | nn.modules.conv._ConvNd) for m in modules)
    return norms > 0 and 2 * norms >= weighted


def _sizes(model: nn.Module, readings: Readings) -> dict[str, float]:
    """The norm of each weight; of a lookup that of the rows that were used; of zeros what an initialisation gives."""
    found = {}
    tables = {name for site in readings.sites if site.function in LOOKUPS for name in site.weights}
    for name, p in model.named_parameters():
        if name not in readings.weights or ranks_of(model):
            continue
        value, total = p.detach(), readings.weights[name].total
        if name in tables and total is not None and total.shape == value.shape:
            value = value[total.flatten(1).any(1)]
        norm = norm_of(dense(value)) if value.numel() else 0.0
        found[name] = norm or math.sqrt(value.numel() / max(1, value[0].numel() if len(value) else 1))
    return found


def _asks_why(verdict: Verdict, evidence: Evidence, residual: bool) -> bool:
    """Whether clues can tell: along shortcuts they do so only of a step that ends at none."""
    if verdict.state not in {"vanishing", "exploding"}:
        return verdict.state == "dead"
    if verdict.cause in {"time", "branch"}:
        return False
    seen = next((line for line in evidence.lines if any(p.name == verdict.where for p in line)), ())
    at = next((i for i, point in enumerate(seen) if point.name == verdict.where), None)
    if at is None:
        return True
    after = next((point for point in seen[at + 1 :] if point.log_flow is not None), None)
    return not residual or (after is not None and not after.merge)


def mode_of(model: nn.Module) -> str:
    """``"train"``, ``"eval"`` or ``"mixed"``."""
    modes = {module.training for module in model.modules()}
    return "mixed" if len(modes) > 1 else "train" if modes.pop() else "eval"


def _culprit(model: nn.Module, batches: Batches, readings: Readings) -> tuple[str, str] | None:
    """What is not a number before anything is computed; or the loss, where all activations are finite."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        here = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]
        if bool(here.detach().isnan().any()):
            return "weights", f"{name} holds NaN"
    # Infinities are no mistake in a mask; at the first boundary they are one.
    given = [tensor for batch in batches for tensor in tensors_in(batch)]
    if any(bool(tensor.isnan().any()) for tensor in given) or not readings.activations[0].finite:
        return "data", "the data hold values that are not finite"
    if all(a.finite for a in readings.activations) and not math.isfinite(readings.loss):
        return "loss", f"the loss is {short(readings.loss)}"
    return None


def _clues(model: nn.Module, batch: Batch, loss: Objective, count: int, tap: Tap) -> tuple[Clue, ...]:
    try:
        return clues(model, batch, loss, count, tap)
    except (
        RuntimeError
    ):  # an operation that does not run without gradients: a verdict needs no reason to stand
        return ()


# --- putting it together --------------------------------------------------------------------------------------


def _assemble(
    model: nn.Module, points: Any, flow: list[tuple[str, float | None]], readings: Readings, exact: Readings | None,
    verdict: Verdict, mode: str, scale: float, more: tuple[str, ...],
) -> GradientFlow:  # fmt: skip
    unit = readings.output_gradient or 1.0
    values = [None if value is None else value / unit for _, value in flow]
    rows = []
    for i, (point, (state, _)) in enumerate(zip(points, flow)):
        if state == "not_met":
            continue
        after = next((v for v in values[i + 1 :] if v is not None), None)
        here = values[i]
        factor = None if here is None or not after else here / after
        gradient = readings.gradients[i]
        rows.append(BoundaryFlow(
            point.name, point.depth, point.kind, here, readings.activations[i].rms, factor,
            None if factor is None else factor**2, gradient.zeros / gradient.elements if gradient.elements else None,
            state.removesuffix("_activation"), readings.similarities[i],
        ))  # fmt: skip
    layers = tuple(
        layer(name, w, exact.weights.get(name) if exact else None, scale)
        for name, w in readings.weights.items()
    )
    slope = verdict.slope
    chi = None if slope is None else 10.0 ** (-2 * slope)
    depth_scale = None if slope is None else math.inf if slope == 0 else 1 / abs(2 * slope * math.log(10))
    return GradientFlow(
        tuple(rows), layers, verdict, chi, depth_scale,
        _product(rows), readings.loss, readings.output_gradient,
        mode, meaning(model), _dtype_name(readings), readings.batches, readings.samples,
        more + _hindered(verdict) + _unused(readings) + _notes(readings, layers, scale) + _not_met([p.name for p, (state, _) in zip(points, flow) if state == "not_met"]),
        _sites(readings, unit),
    )  # fmt: skip


def _product(rows: list[BoundaryFlow]) -> float | None:
    """The flow at the first boundary over that at the last."""
    there = [row.gradient_rms for row in rows if row.gradient_rms]
    return there[0] / there[-1] if there else None


def _sites(readings: Readings, unit: float) -> tuple[SiteFlow, ...]:
    """Every weighted call; a fused recurrent layer's steps by the gradient of its input."""
    found = []
    for s in readings.sites:
        rms = s.norm / math.sqrt(s.elements) / unit if s.seen and s.elements else None
        found.append(SiteFlow(s.name, s.function, s.step, rms))
        found += [
            SiteFlow(s.name, f"{s.function} step", t, math.sqrt(q / n) / unit)
            for t, (q, n) in enumerate(zip(s.steps, s.step_elements))
        ]
    return tuple(found)


def _unused(readings: Readings) -> tuple[str, ...]:
    """Weights of parts that the forward pass did not call."""
    if readings.graph is None:
        return ()
    called = {name for site in readings.sites for name in site.weights}
    names = [n for n, w in readings.weights.items() if w.trainable and w.total is None and n not in called]
    if not names:
        return ()
    return (
        f"Unused in this pass, and so without a gradient: {', '.join(names[:3])}{', ...' * (len(names) > 3)}.",
    )


def _hindered(verdict: Verdict) -> tuple[str, ...]:
    if verdict.hinders != ("SGD",):
        return ()
    return (
        "This hinders SGD; Adam, whose steps do not depend on the gradient's size, mostly learns all the same.",
    )


def _notes(readings: Readings, layers: tuple[LayerGradient, ...], scale: float) -> tuple[str, ...]:
    notes = []
    for state, words in (
        ("exact_zero", "get a gradient that is exactly 0"),
        ("underflow", "get a gradient too small for their dtype"),
        ("not_connected", "are not connected to the loss"),
        ("nonfinite", "get a gradient that is not finite"),
    ):
        names = [w.name for w in layers if w.state == state and w.trainable]
        if names:
            notes.append(
                f"{len(names)} of {len(layers)} weights {words}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}."
            )
    frozen = sum(not w.trainable for w in layers)
    if frozen:
        notes.append(f"{frozen} of {len(layers)} weights are frozen.")
    lost, all_elements = sum(g.lost for g in readings.gradients), sum(g.elements for g in readings.gradients)
    if lost > 1e-3 * all_elements:
        notes.append(
            f"In training, with the loss times {short(scale)}, {100 * lost / all_elements:.1f} % of these gradients' elements "
            "underflow: scale the loss (torch.amp.GradScaler, handed over as scaler=)."
        )
    return tuple(notes)


def _not_met(names: list[str]) -> tuple[str, ...]:
    return (f"Not met in this pass, and left out: {', '.join(names)}.",) if names else ()


def _dtype_name(readings: Readings) -> str:
    kinds = {str(g.dtype).removeprefix("torch.") for g in readings.gradients if g.dtype is not None}
    return ", ".join(sorted(kinds)) or "none"


def _log(value: float | None) -> float | None:
    return math.log10(value) if value is not None and value > 0 and math.isfinite(value) else None
