"""Result of ``gradient_flow``: boundaries, weights, sites and the verdict.

Signs and units are those of the definitions: a *fall* and a *slope* are positive when the gradient shrinks on
its way back from the loss; both are in decades (powers of ten).
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
    """The gradient where it crosses one boundary.

    Attributes:
        name: the boundary, in the words of the model.
        depth: 0 at the first boundary, one more at each next.
        kind: ``"input"``, ``"merge"`` or ``"module"``.
        gradient_rms: RMS over all elements of dL/d(activation), with |dL/d(output)| set to 1; None where no
            gradient arrives (not connected).
        activation_rms: RMS over all elements of the activation.
        factor: the flow here over the flow at the next boundary; None at the last.
        chi: ``factor`` squared, Schoenholz's chi: below 1 the gradient shrinks here on its way back.
        zero_fraction: the share of the gradient's elements that are exactly 0.
        state: ``"ok"``, ``"exact_zero"``, ``"underflow"``, ``"not_connected"`` or ``"nonfinite"``.
        similarity: mean cosine between the activations of different samples (tokens where there are any):
            near 1 the network has stopped telling them apart. None where it cannot be had.
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
    """The gradient dL/dW of one weight (a parameter of two dimensions or more), as training has it.

    Attributes:
        name: the parameter, e.g. ``"layers.0.0.weight"``.
        weight_grad_mean_abs: mean |dL/dW|, what the lecture prints.
        weight_grad_rms: RMS of dL/dW.
        zero_fraction: the share of elements that are exactly 0.
        state: ``"ok"``, ``"exact_zero"``, ``"underflow"``, ``"not_connected"`` or ``"nonfinite"``.
        spread: standard deviation over batches of the RMS, over its mean; None for a single batch.
        trainable: False for a frozen weight, which is never given a gradient.
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
    """The gradient at the output of one weighted call, in order of execution.

    Attributes:
        name: the module whose weight it is.
        function: the call: ``"linear"``, ``"conv2d"``, ``"lstm"``, ...
        step: how many calls with the same weights came before; of a fused recurrent layer the time step.
        gradient_rms: RMS over all elements, with |dL/d(output)| set to 1; None where no gradient arrives.
    """

    name: str
    function: str
    step: int
    gradient_rms: float | None


@dataclass(frozen=True)
class Head:
    """From the last hidden boundary to the output: a step that all layers have in common.

    Attributes:
        averaging: decades that the norm loses by averaging over positions: geometry.
        gain: what else is done to the norm, as a factor.
        slope: RMS slope of an activation function between the last layer and the output; None without one.
    """

    averaging: float
    gain: float
    slope: float | None


@dataclass(frozen=True)
class Worst:
    """The weighted call that gets least.

    Attributes:
        site: its name.
        step: which of its calls.
        decades: how far it is below the one that gets most.
    """

    site: str
    step: int
    decades: float


@dataclass(frozen=True)
class Verdict:
    """What the flow is like, where it breaks, and why.

    Attributes:
        state: ``"healthy"``, ``"vanishing"``, ``"exploding"``, ``"dead"``, ``"nonfinite"``,
            ``"unconnected"``, or ``"cannot tell"``: within the noise of a limit, or resting on a call that
            cannot be looked into.
        fall_decades: decades that the gradient's norm loses from the last hidden boundary to the first one
            whose weights are trained, without averages over positions; positive: shrinks going back. None
            without hidden boundaries.
        slope: decades per boundary by least squares, same sign.
        slope_interval: its 95 % interval.
        where: the boundary where it breaks, None for a healthy flow.
        reason: a sentence with the number that says so.
        cause: the reason in a word: ``"none"``, ``"saturation"``, ``"gain"``, ``"inactive"``, ``"collapse"``,
            ``"missing path"``, ``"underflow"``, ``"overflow"``, ``"weights"`` or ``"data"`` (not finite to
            begin with), ``"loss"``, ``"time"``, ``"branch"``, ``"one position"`` (attention over a single
            one), ``"head"``, ``"batch norm"``, ``"noise"``, ``"opaque"``, ``"unexplained"``; or the function
            that makes NaN: ``"softmax"``, ``"sqrt"``, ``"div"``, ``"log"``, ``"norm"``.
        evidence: that number.
        advice: what to do next, in a sentence.
        agreement: the share of the batches whose own state is the same; None for a single batch.
        chains: the verdicts on the terms of the loss, each for itself; empty where it is one. The whole has
            the worst.
        chain: of a term, the function and the line that make it; summands that one line makes with the same
            weights (the steps of a recurrence) are one term. Of the whole, the worst term's.
        starved: weights that get next to nothing while others do, the most starved first.
        head: what is between the last hidden boundary and the output.
        worst: the weighted call that gets least.
        reach: of a recurrent layer, the steps until a thousandth of the gradient is left; None without one,
            or where more is left at the first step.
        score: how well it may learn: 0 is best; minus the decades by which the flow is uneven, and those that
            what tells samples apart loses on its way forward. No healthy flow's is below that of one in
            trouble.
        hinders: the optimizers that such a flow mostly keeps from learning, of ``"SGD"`` and ``"Adam"``
            (whose steps do not depend on the gradient's size): what was seen on 200 networks. Empty for a
            healthy flow.

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
        """The verdict in one sentence: what, where, how much."""
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
        boundaries: in order of execution, the one nearest the input first.
        layers: the weights, in the model's order.
        verdict: what it comes to.
        chi: the mean change of the squared flow from a boundary to the one before it (geometric; 10 ** (-2
            slope)).
        depth_scale: 1/|ln chi|: over so many boundaries the squared flow changes e-fold.
        product: the product of the factors, which is the flow at the first boundary over that at the last.
        loss: the loss on the data.
        output_gradient_norm: |dL/d(output)|, by which the flow is normalised: multiply ``gradient_rms`` with
            it to get the RMS of dL/d(activation) itself.
        mode: ``"train"``, ``"eval"`` or ``"mixed"``: the modes the modules were in.
        meaning: ``"as built"``, or what was done to this twin: ``"removed"``, ``"detached"``, ...
        dtype: the precision the backward pass ran in.
        batches, samples: how much data it rests on.
        notes: what else a reader should know.
        sites: finer than boundaries: every weighted call, inside branches and at each time step.

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
        """One row a boundary; the verdict above."""
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
        """One row a weight: what the lecture prints, and more."""
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
