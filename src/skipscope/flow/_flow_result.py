"""Result of ``gradient_flow``: boundaries, weights, sites and the verdict.

A *fall* and a *slope* are positive when the gradient shrinks on its way back from the loss; both are in
decades (powers of ten).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from skipscope._numbers import short
from skipscope._option_words import GradientState, ModelMode, OptimizerKind, VerdictCause, VerdictState
from skipscope._printable import printable
from skipscope._result import Result, Table
from skipscope.flow.verdict._verdict_words import finding


@dataclass(frozen=True)
class BoundaryFlow:
    """Gradient and activation at a boundary.

    Attributes:
        name: name of the boundary in the model.
        depth: index of the boundary, from 0.
        kind: ``"input"``, ``"merge"`` or ``"module"``.
        gradient_rms: RMS over all elements of dL/d(activation), with |dL/d(output)| set to 1; None if no
            gradient arrives (not connected).
        activation_rms: RMS over all elements of the activation.
        factor: flow at this boundary over flow at the next; None at the last boundary.
        chi: ``factor`` squared, Schoenholz's chi: below 1 the gradient shrinks here on its way back.
        zero_fraction: share of the gradient's elements that are exactly 0.
        state: ``"ok"``, ``"exact_zero"``, ``"underflow"``, ``"not_connected"`` or ``"nonfinite"``.
        similarity: mean cosine between the activations of different samples (or tokens); near 1 the network
            no longer distinguishes them. None if it cannot be computed.
    """

    name: str
    depth: int
    kind: str
    gradient_rms: float | None
    activation_rms: float
    factor: float | None
    chi: float | None
    zero_fraction: float | None
    state: GradientState
    similarity: float | None = None


@dataclass(frozen=True)
class LayerGradient:
    """Gradient dL/dW of a weight (a parameter with at least two dimensions), as in training.

    Attributes:
        name: name of the parameter, e.g. ``"layers.0.0.weight"``.
        weight_grad_mean_abs: mean |dL/dW|, as printed in the lecture.
        weight_grad_rms: RMS of dL/dW.
        zero_fraction: share of elements that are exactly 0.
        state: ``"ok"``, ``"exact_zero"``, ``"underflow"``, ``"not_connected"`` or ``"nonfinite"``.
        spread: standard deviation of the RMS over batches, divided by its mean; None for a single batch.
        trainable: False for a frozen weight, which never gets a gradient.
    """

    name: str
    weight_grad_mean_abs: float | None
    weight_grad_rms: float | None
    zero_fraction: float | None
    state: GradientState
    spread: float | None = None
    trainable: bool = True


@dataclass(frozen=True)
class SiteFlow:
    """Gradient at the output of a weighted call.

    Attributes:
        name: name of the module with the weight.
        function: function called: ``"linear"``, ``"conv2d"``, ``"lstm"``, ...
        step: number of earlier calls with the same weights, or the time step of a fused recurrent layer.
        gradient_rms: RMS over all elements, with |dL/d(output)| set to 1; None if no gradient arrives.
    """

    name: str
    function: str
    step: int
    gradient_rms: float | None


@dataclass(frozen=True)
class Head:
    """Head of the network, from the last hidden boundary to the output, shared by all layers.

    Attributes:
        averaging: decades that the norm loses by averaging over positions.
        gain: remaining factor on the norm.
        slope: RMS slope of an activation function between the last layer and the output, or None.
    """

    averaging: float
    gain: float
    slope: float | None


@dataclass(frozen=True)
class Worst:
    """Weighted call with the smallest gradient.

    Attributes:
        site: name of the call's site.
        step: index of the call at that site.
        decades: decades below the call with the largest gradient.
    """

    site: str
    step: int
    decades: float


@dataclass(frozen=True)
class Verdict:
    """Verdict on a gradient flow: its state, where it breaks, and why.

    Attributes:
        state: ``"healthy"``, ``"vanishing"``, ``"exploding"``, ``"dead"``, ``"nonfinite"``,
            ``"unconnected"``, or ``"cannot tell"`` if the flow is within the noise of a limit, or depends on
            an opaque call.
        fall_decades: decades that the norm of the gradient loses from the last hidden boundary to the first
            boundary with trained weights, without averages over positions; positive if it shrinks going back.
            None without hidden boundaries.
        slope: decades per boundary by least squares, same sign.
        slope_interval: its 95 % confidence interval.
        where: boundary at which the flow breaks; None for a healthy flow.
        reason: the reason in a sentence, with the number behind it.
        cause: the cause in a word: ``"none"``, ``"saturation"``, ``"gain"``, ``"inactive"``, ``"collapse"``,
            ``"missing path"``, ``"underflow"``, ``"overflow"``, ``"weights"`` or ``"data"`` (not finite from
            the start), ``"loss"``, ``"time"``, ``"branch"``, ``"one position"`` (attention over a single
            position), ``"head"``, ``"batch norm"``, ``"noise"``, ``"opaque"``, ``"unexplained"``; or the
            function that produces NaN: ``"softmax"``, ``"sqrt"``, ``"div"``, ``"log"``, ``"norm"``.
        evidence: the number behind the reason.
        advice: what to do next, in a sentence.
        agreement: share of the batches with the same state; None for a single batch.
        chains: verdicts on the separate terms of the loss; empty if there is only one. The overall verdict is
            the worst of them.
        chain: function and line of code of a term; summands of one line with the same weights (the steps of a
            recurrence) are one term. For the overall verdict, the worst term.
        starved: weights whose gradient is tiny compared with others, the most starved first.
        head: head between the last hidden boundary and the output.
        worst: weighted call with the smallest gradient.
        reach: time steps until a thousandth of the gradient is left in a recurrent layer; None without such a
            layer, or if more is left at the first step.
        score: trainability score: minus the decades by which the flow is uneven; 0 is best.
        hinders: optimizers that mostly cannot learn with such a flow, of ``"SGD"`` and ``"Adam"`` (whose
            steps do not depend on the gradient's size), as observed on 200 networks. Empty for a healthy
            flow.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = ss.reference.deep_mlp(4, width=16, shortcut="identity"), ss.reference.digits(32)
        >>> loss = torch.nn.functional.cross_entropy
        >>> _ = torch.manual_seed(0)
        >>> verdict = ss.gradient_flow(ss.reference.deep_mlp(24, width=16), data, loss).verdict
        >>> verdict.state, verdict.cause, verdict.where
        ('vanishing', 'gain', 'layers.18.0')
    """

    state: VerdictState
    fall_decades: float | None
    slope: float | None
    slope_interval: tuple[float, float] | None
    where: str | None
    reason: str
    cause: VerdictCause = "none"
    evidence: float | None = None
    hinders: tuple[OptimizerKind, ...] = ()
    advice: str = ""
    agreement: float | None = None
    chains: tuple[Verdict, ...] = ()
    starved: tuple[str, ...] = ()
    head: Head | None = None
    worst: Worst | None = None
    reach: int | None = None
    score: float | None = None
    chain: str = ""

    @property
    def finding(self) -> str:
        """The verdict in one sentence: state, place and size."""
        return finding(self)

    def __str__(self) -> str:
        because = self.reason[:1].upper() + self.reason[1:]
        of = f" ({self.chain})" if self.chain and self.state != "healthy" else ""
        parts = [f"{self.state}{of}: {self.finding}", f"{because}.".replace("..", "."), self.advice]
        if self.state == "healthy":  # there is no reason to give: the number stands below
            parts[1:] = reversed(parts[1:])
        return printable(" ".join(part for part in parts if part))


@dataclass(frozen=True)
class GradientFlow(Result):
    """Gradient flow at each boundary and each weight, and the verdict. A sequence of its boundaries.

    Attributes:
        boundaries: the boundaries in order of execution, nearest the input first.
        layers: the weights, in the model's order.
        verdict: the verdict on the flow.
        chi: geometric mean of the change of the squared flow from a boundary to the previous one, 10 ** (-2
            slope).
        depth_scale: 1/|ln chi|, the number of boundaries over which the squared flow changes e-fold.
        product: product of the factors: the flow at the first boundary over that at the last.
        loss: the loss on the data.
        output_gradient_norm: |dL/d(output)|, by which the flow is normalised: ``gradient_rms`` times this
            norm is the RMS of dL/d(activation) itself.
        mode: ``"train"``, ``"eval"`` or ``"mixed"``: the modes of the modules.
        meaning: ``"as built"``, or the edit of this twin: ``"removed"``, ``"detached"``, ...
        dtype: precision of the backward pass.
        batches, samples: number of batches and samples.
        notes: further remarks.
        sites: every weighted call, including those inside branches and at each time step.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = ss.reference.deep_mlp(4, width=16, shortcut="identity"), ss.reference.digits(32)
        >>> loss = torch.nn.functional.cross_entropy
        >>> flow = ss.gradient_flow(model, data, loss)
        >>> [b.depth for b in flow], flow.verdict.state, flow.samples
        ([0, 1, 2, 3, 4, 5], 'healthy', 32)
    """

    boundaries: tuple[BoundaryFlow, ...]
    layers: tuple[LayerGradient, ...]
    verdict: Verdict
    chi: float | None
    depth_scale: float | None
    product: float | None
    loss: float
    output_gradient_norm: float
    mode: ModelMode
    meaning: str
    dtype: str
    batches: int
    samples: int
    notes: tuple[str, ...] = ()
    sites: tuple[SiteFlow, ...] = ()

    def __len__(self) -> int:
        return len(self.boundaries)

    def __getitem__(self, index: int) -> BoundaryFlow:
        return self.boundaries[index]

    def __iter__(self) -> Iterator[BoundaryFlow]:
        return iter(self.boundaries)

    def table(self) -> Table:
        """Table with a row for each boundary, below the verdict."""
        rows = [
            [b.depth, b.name, b.gradient_rms, b.factor, b.activation_rms, b.state] for b in self.boundaries
        ]
        interval = self.verdict.slope_interval
        notes = [
            str(self.verdict),
            (
                "gradient: RMS of dL/d(activation), with |dL/d(output)| = 1; factor: over the gradient one"
                " boundary nearer the loss, so their product is what reaches the first boundary."
            ),
        ]
        if interval is not None and self.verdict.slope is not None:
            known = math.isfinite(interval[0])
            band = (
                f"95 %: {short(interval[0])} to {short(interval[1])}"
                if known
                else "two boundaries give no interval"
            )
            notes.append(
                f"slope {short(self.verdict.slope)} decades a boundary ({band}): from each boundary to"
                f" the one before it the squared gradient changes by a factor of {short(self.chi)} on average"
                f" (chi); over {short(self.depth_scale)} boundaries (depth scale) it changes 2.72-fold."
            )
        notes.append(
            f"{self.meaning}, {self.mode} mode, {self.samples:,} samples in {self.batches} "
            f"batch{'es' if self.batches != 1 else ''}, loss {short(self.loss)}."
        )
        if self.verdict.chains:
            terms = "; ".join(f"{one.chain}: {one.state}" for one in self.verdict.chains)
            notes.append(f"Each term of the loss, judged alone: {terms}.")
        if self.verdict.agreement is not None:
            notes.append(f"{100 * self.verdict.agreement:.0f} % of the batches have this state.")
        return Table(
            f"Gradient flow: {self.verdict.state}",
            ["depth", "boundary", "gradient", "factor", "activation", "state"],
            rows,
            [*notes, *self.notes],
        )

    def layer_table(self) -> Table:
        """Table with a row for each weight, including the mean |dL/dW| printed in the lecture."""
        rows = [
            [w.name, w.weight_grad_mean_abs, w.weight_grad_rms, w.zero_fraction, w.spread, w.state]
            for w in self.layers
        ]
        return Table(
            "Gradients of the weights",
            ["weight", "mean |dL/dW|", "RMS", "zeros", "spread", "state"],
            rows,
            [
                "Not the flow: dL/dW moves with the scale of loss and activations, and can go the opposite"
                " way."
            ],
        )
