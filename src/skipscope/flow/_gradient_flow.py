"""``gradient_flow``: gradient readings at the boundaries, and the verdict on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from skipscope._data import Batch, Batches, tensors_in
from skipscope._numbers import short
from skipscope._option_words import ModelMode, VerdictCause
from skipscope._public_call import public_call
from skipscope._ranks import greatest, ranks_of
from skipscope._subject import Subject, prepare
from skipscope._untouched import one_snapshot
from skipscope.flow._flow_result import BoundaryFlow, GradientFlow, LayerGradient, SiteFlow, Verdict
from skipscope.flow.passes._gradient_pass import measure
from skipscope.flow.passes._gradient_readings import Readings
from skipscope.flow.passes._gradient_sites import LOOKUPS
from skipscope.flow.passes._tensor_norms import dense, norm_of
from skipscope.flow.passes._zero_by_design import settled
from skipscope.flow.passes._zero_gradients import boundary_state, layer, second_opinion
from skipscope.flow.verdict._chain_verdict import judge_chain, worst
from skipscope.flow.verdict._first_nonfinite import first_nonfinite, stale_norm
from skipscope.flow.verdict._flow_rules import FlowContext, Point, StretchGain
from skipscope.flow.verdict._layer_gains import layer_gains
from skipscope.flow.verdict._verdict_evidence import Evidence, evidence_of, size_of
from skipscope.shortcuts import meaning


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
    """Measure the gradient on its way back through a network, and judge it.

    The flow at a boundary is the RMS over all elements of dL/d(activation), with squares summed in float64
    and |dL/d(output)| set to 1. Modules run in their current modes. Inside ``torch.autocast`` the effect of
    autocast is measured. Local: a model wrapped in DDP is measured without the wrapper, on this rank's data.
    Under FSDP2 collective: every rank calls it; boundaries are of this rank's data, and the gradient of a
    weight is the mean over ranks, as in training.

    Args:
        model: any eager module, restored afterwards.
        data: a batch ``(inputs, target)``, a Mapping, or a re-iterable of batches.
        loss: ``loss(output, target)``; not needed if the output carries ``.loss``.
        found: shortcuts from ``find_shortcuts``, whose merges are the boundaries; by default they are found.
        scaler: ``torch.amp.GradScaler`` of the training loop, so that underflow is judged at its scale.
        seed: seed of the random numbers drawn inside (dropout).
        weight: batch -> its weight in the mean over batches.

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
    with one_snapshot(subject.model):
        return flow_of(subject, seed, scale=float(scaler.get_scale()) if scaler is not None else 1.0)


def flow_of(subject: Subject, seed: int = 0, *, scale: float = 1.0) -> GradientFlow:
    """Run :func:`gradient_flow` on a prepared subject; ``scale`` is the loss scale. Local, or collective."""
    subject = subject.with_own_inputs()
    read = _Measurement(subject, seed, scale)
    chains = [_Measurement(subject, seed, scale, term.name, read) for term in read.readings.terms]
    verdict = read.verdict()
    if chains:
        verdicts = tuple(
            replace(one.verdict(), chain=term.name) for one, term in zip(chains, read.readings.terms)
        )
        read.notes += tuple(
            f"{term.name} does not reach {_few(one.elsewhere)}: {one.readings.cuts[-1][1]} lets no gradient"
            " through. Another term does, so this is assumed to be intended."
            for one, term in zip(chains, read.readings.terms)
            if one.elsewhere and one.readings.cuts
        )
        # A term may have no gradient on these batches because of its clamp or margin, which is no defect.
        speaking = [
            v for v, term in zip(verdicts, read.readings.terms) if not (term.clamped and v.cause == "loss")
        ]
        verdict = replace(worst(speaking or verdicts), chains=verdicts)
    return _assemble(subject, read, verdict, scale)


class _Measurement:
    """Readings of a loss or of one of its terms, with the further measurements needed for a verdict.

    Attributes:
        readings: readings in the model's own precision.
        exact: readings in float64, or None if no zero may be an underflow.
        settled: readings after tensors that start at zero by design have moved.
        notes: remarks for the result.
        whole: measurement of all terms, or None if this is not a single term.
        elsewhere: weighted calls that get no gradient from this term, but from another.
    """

    def __init__(
        self, subject: Subject, seed: int, scale: float, term: str = "", whole: _Measurement | None = None
    ):
        self.whole, self.elsewhere = whole, tuple[str, ...]()
        self.subject, self.seed = subject, seed
        self.exact: Readings | None = None
        self.batches: list[Evidence] = []
        self.settled_batches: list[Evidence] = []
        with subject.running(seed):
            self.readings = measure(subject, scale=scale, term=term, each=self._keeper(self.batches))
        self.exact, notes = second_opinion(self.readings, subject, seed, term)
        if self.exact is not None and self.readings.output_gradient == 0:
            self.readings.output_gradient = self.exact.output_gradient
        self.settled, more = settled(self.readings, subject, seed, term, self._keeper(self.settled_batches))
        self.notes = notes + more

    def _keeper(self, batches: list[Evidence]) -> Callable[[Readings], None] | None:
        """A callback that stores the evidence of each batch, or None for a single batch."""
        if self.subject.data.single or self.subject.ranks:
            return None
        return lambda one: batches.append(self._evidence(one, one))

    def _evidence(self, readings: Readings, settled: Readings, exact: Readings | None = None) -> Evidence:
        points, seen, kept = self.subject.boundaries, [], []
        for i, point in enumerate(points):
            state, flow = boundary_state(readings, exact, i)
            if state != "not_met" and not (state == "not_connected" and self._is_reached_elsewhere(i)):
                kept.append(i)
                seen.append(
                    Point(point.name, state, _log(flow), readings.similarities[i], point.kind == "merge")
                )
        sizes = _sizes(self.subject.model, settled)
        if self.whole is not None:
            # A term at a single point (a boundary condition at 0) may give the first weight exactly 0.
            sizes = {n: v for n, v in sizes.items() if not self._is_trained_elsewhere(n, settled)}
        found = evidence_of(seen, points, kept, exact or readings, settled, sizes)
        if self.whole is None:
            return found
        if not seen:
            # This term reaches no boundary: it may train an embedding table without layers before it.
            found = replace(found, lines=((Point("output", "ok", 0.0, hidden=False),),))
        # Only weights that get a gradient from another term count as elsewhere: a codebook has its own term.
        lost = set(self.whole.unreached)
        self.elsewhere = tuple(name for name in found.unconnected if name not in lost)
        return replace(found, unconnected=tuple(name for name in found.unconnected if name in lost))

    def _is_trained_elsewhere(self, name: str, readings: Readings) -> bool:
        """Whether a weight gets exactly 0 from this term, but not from another."""
        assert self.whole is not None
        mine, all_terms = readings.weights[name], self.whole.readings.weights[name]
        return not any(mine.rms) and any(all_terms.rms)

    def _is_reached_elsewhere(self, boundary: int) -> bool:
        return self.whole is not None and self.whole.readings.gradients[boundary].seen

    @property
    def unreached(self) -> tuple[str, ...]:
        """Trained weighted calls without a gradient for any of their weights."""
        got = {name for name, weight in self.readings.weights.items() if weight.total is not None}
        return tuple(s.name for s in self.readings.sites if s.trained and not set(s.weights) & got)

    def verdict(self) -> Verdict:
        """Judge the readings, with a second pass to find the cause if the flow is not healthy."""
        points, readings, batches = self.subject.boundaries, self.readings, self.batches
        merges = sum(p.kind == "merge" for p in points)
        context = FlowContext(2 * merges > len(points), readings.normed, _dtype_name(readings))
        evidence = self._evidence(readings, self.settled, self.exact)
        verdict = judge_chain(evidence, {}, context)
        if verdict.state != "healthy" and self.settled is not readings:
            # A fault that disappears once tensors starting at zero have moved does not count: a
            # zero-initialised head, a layer scale of 1e-5.
            moved = self._evidence(self.settled, self.settled)
            other = judge_chain(moved, {}, context)
            if worst([other, verdict]) is verdict:
                verdict, evidence, readings, batches = other, moved, self.settled, self.settled_batches
        verdict = self._explained(verdict, evidence, readings, context)
        if len(batches) < 2:
            return verdict
        own = [judge_chain(replace(one, starved=evidence.starved), {}, context).state for one in batches]
        return replace(verdict, agreement=own.count(verdict.state) / len(own))

    def _explained(
        self, verdict: Verdict, evidence: Evidence, readings: Readings, context: FlowContext
    ) -> Verdict:
        """Complete a verdict by its cause, from further passes if necessary."""
        subject, spread = self.subject, bool(self.subject.ranks)
        if verdict.state in {"healthy", "cannot tell"} and not spread and not readings.squashed:
            return verdict
        model, stale, culprit = subject.model, "", None
        if verdict.state == "nonfinite":
            culprit = _culprit(model, subject.data, readings)
        if not spread:
            with subject.running(self.seed):
                stale = stale_norm(model, subject.data, subject.loss)
                if verdict.state == "nonfinite" and culprit is None:
                    culprit = first_nonfinite(model, subject.data, subject.loss)
        why = readings.squashed or _needs_gains(verdict, evidence, context.residual)
        gains: dict[str, StretchGain] = {}
        if greatest(model, why) if spread else why:  # all ranks together, or none
            with subject.running(self.seed):
                gains = layer_gains(subject)
        return judge_chain(evidence, gains, context, culprit, stale)


def _sizes(model: nn.Module, readings: Readings) -> dict[str, float]:
    """Reference norm of each weight by :func:`size_of`, for an embedding of its used rows only."""
    found = {}
    tables = {name for site in readings.sites if site.function in LOOKUPS for name in site.weights}
    for name, p in model.named_parameters():
        if name not in readings.weights or ranks_of(model):
            continue
        value, total = p.detach(), readings.weights[name].total
        if name in tables and total is not None and total.shape == value.shape:
            value = value[total.flatten(1).any(1)]
        norm = norm_of(dense(value))
        found[name] = size_of(value, norm)
    return found


def _needs_gains(verdict: Verdict, evidence: Evidence, residual: bool) -> bool:
    """Whether the gains of stretches can explain a verdict: with shortcuts, only if no merge follows."""
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


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def mode_of(model: nn.Module) -> ModelMode:
    """Mode of a model's modules: ``"train"``, ``"eval"`` or ``"mixed"``."""
    modes = {module.training for module in model.modules()}
    return "mixed" if len(modes) > 1 else "train" if modes.pop() else "eval"


def _culprit(model: nn.Module, batches: Batches, readings: Readings) -> tuple[VerdictCause, str] | None:
    """The weights or data that are not finite from the start, or a loss that alone is not finite; or None."""
    order = {name: site.order for site in reversed(readings.sites) for name in site.weights}
    weights = sorted(model.named_parameters(), key=lambda named: order.get(named[0], len(order)))
    if name := _first_nan(weights):
        return "weights", f"{name} holds NaN"
    # Infinities are valid in a mask, but not at the first boundary.
    given = [tensor for batch in batches for tensor in tensors_in(batch)]
    if any(bool(tensor.isnan().any()) for tensor in given) or not readings.activations[0].finite:
        return "data", "the data hold values that are not finite"
    # Buffers are checked after the data, because running statistics of a copy already include the data.
    if name := _first_nan(model.named_buffers()):
        return "weights", f"{name} holds NaN"
    if all(a.finite for a in readings.activations) and not math.isfinite(readings.loss):
        return "loss", f"the loss is {short(readings.loss)}"
    return None


def _first_nan(named: Iterable[tuple[str, Any]]) -> str | None:
    for name, tensor in named:
        here = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if bool(here.detach().isnan().any()):
            return name
    return None


# --- putting it together ---


def _assemble(subject: Subject, read: _Measurement, verdict: Verdict, scale: float) -> GradientFlow:
    readings, exact = read.readings, read.exact
    unit = readings.output_gradient or 1.0
    rows, not_reached = _rows(subject, read, unit)
    layers = tuple(
        layer(name, w, exact.weights.get(name) if exact else None, scale)
        for name, w in readings.weights.items()
    )
    notes = list(read.notes)
    if verdict.hinders == ("SGD",):
        notes.append(
            "This hinders SGD; Adam, whose steps do not depend on the gradient's size, mostly learns all the"
            " same."
        )
    notes += [*_unused(readings), *_notes(readings, layers, scale)]
    if not_reached:
        notes.append(f"Not reached in this pass, and left out: {', '.join(not_reached)}.")
    slope = verdict.slope
    chi = None if slope is None else 10.0 ** (-2 * slope)
    depth_scale = None if slope is None else math.inf if slope == 0 else 1 / abs(2 * slope * math.log(10))
    return GradientFlow(
        tuple(rows),
        layers,
        verdict,
        chi,
        depth_scale,
        _product(rows),
        readings.loss,
        readings.output_gradient,
        mode_of(subject.model),
        meaning(subject.model),
        _dtype_name(readings),
        readings.batches,
        readings.samples,
        tuple(notes),
        _sites(readings, unit),
    )


def _rows(subject: Subject, read: _Measurement, unit: float) -> tuple[list[BoundaryFlow], list[str]]:
    """Rows of the boundaries, in units of the output's gradient, and the names of boundaries not reached."""
    readings = read.readings
    flow = [boundary_state(readings, read.exact, i) for i in range(len(subject.boundaries))]
    values = [None if value is None else value / unit for _, value in flow]
    rows, not_reached = [], []
    for i, (point, (state, _)) in enumerate(zip(subject.boundaries, flow)):
        if state == "not_met":
            not_reached.append(point.name)
            continue
        after = next((v for v in values[i + 1 :] if v is not None), None)
        here = values[i]
        factor = None if here is None or not after else here / after
        gradient = readings.gradients[i]
        rows.append(
            BoundaryFlow(
                point.name,
                point.depth,
                point.kind,
                here,
                readings.activations[i].rms,
                factor,
                None if factor is None else factor**2,
                gradient.zeros / gradient.elements if gradient.elements else None,
                "nonfinite" if state == "nonfinite_activation" else state,
                readings.similarities[i],
            )
        )
    return rows, not_reached


def _product(rows: list[BoundaryFlow]) -> float | None:
    """Flow at the first boundary over flow at the last."""
    there = [row.gradient_rms for row in rows if row.gradient_rms]
    return there[0] / there[-1] if there else None


def _sites(readings: Readings, unit: float) -> tuple[SiteFlow, ...]:
    """Rows of all weighted calls; for a fused recurrent layer, of each time step of its input."""
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
    """Weights of modules that the forward pass did not call."""
    if readings.graph is None:
        return ()
    called = {name for site in readings.sites for name in site.weights}
    names = [n for n, w in readings.weights.items() if w.trainable and w.total is None and n not in called]
    if not names:
        return ()
    return (
        (
            "Unused in this pass, and so without a gradient:"
            f" {', '.join(names[:3])}{', ...' * (len(names) > 3)}."
        ),
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
                f"{len(names)} of {len(layers)} weights {words}:"
                f" {', '.join(names[:3])}{', ...' * (len(names) > 3)}."
            )
    frozen = sum(not w.trainable for w in layers)
    if frozen:
        notes.append(f"{frozen} of {len(layers)} weights are frozen.")
    lost, all_elements = sum(g.lost for g in readings.gradients), sum(g.elements for g in readings.gradients)
    if lost > 1e-3 * all_elements:
        notes.append(
            f"In training, with the loss times {short(scale)}, {100 * lost / all_elements:.1f} % of these"
            " gradients' elements underflow: scale the loss (torch.amp.GradScaler, handed over as scaler=)."
        )
    return tuple(notes)


def _dtype_name(readings: Readings) -> str:
    kinds = {str(g.dtype).removeprefix("torch.") for g in readings.gradients if g.dtype is not None}
    return ", ".join(sorted(kinds)) or "none"


def _log(value: float | None) -> float | None:
    return math.log10(value) if value is not None and value > 0 and math.isfinite(value) else None
