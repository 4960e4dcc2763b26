"""Result of a monitor: history as plain columns, verdict, and changes of the verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skipscope._errors import SkipscopeError
from skipscope._numbers import short
from skipscope._option_words import LiveBasis, LiveState, OptimizerKind, Quantity
from skipscope._printable import printable
from skipscope._result import Result, Table
from skipscope.monitor.recording._step_row import STATES as STATES

GRADIENTS: LiveBasis = "parameter gradients"
FLOW: LiveBasis = "boundary flow"


def total_of(norm: np.ndarray, states: np.ndarray) -> np.ndarray:
    """L2 norm over all parameters (the last axis); inf if any of them is not finite."""
    total = np.sqrt(np.nansum(np.square(norm), axis=-1))
    return np.where((states == STATES.index("nonfinite")).any(axis=-1), np.inf, total)


@dataclass(frozen=True)
class LiveVerdict:
    """Verdict on the gradients of a running training.

    Attributes:
        state: ``"healthy"``, ``"vanishing"``, ``"exploding"``, ``"dead"``, ``"nonfinite"``,
            ``"unconnected"``; ``"unknown"`` before the first step.
        basis: evidence of the verdict: ``"boundary flow"`` or ``"parameter gradients"`` (weaker: dL/dW can
            fall although the flow does not).
        step: optimizer step of the verdict.
        reason: the reason in a sentence, with the number behind it.
        where: boundary or parameter at which the gradient breaks; None if healthy.
        fall_decades: log10(last / first) of the profile; positive if the gradient shrinks going back.
        slope: decades per boundary (or weight), same sign.
        slope_interval: its 95 % confidence interval.
        advice: what to do; empty if nothing needs to be done.
        hinders: kinds of optimizer that cannot learn with these gradients, of ``"SGD"`` and ``"Adam"``. If
            the kind of the watched optimizer is known, only that kind is judged.
        chain: model or optimizer whose loss is judged; empty if there is only one.
        chains: a verdict for each chain; empty if there is only one. The overall verdict has the worst state.
        finding: the verdict in one sentence, as in ``gradient_flow``.
        starved: weights whose gradient is tiny compared with others, the most starved first; only judged if
            the order of the weights is known.
        score: minus the decades between the largest and the smallest value of the profile, or None without a
            profile.
    """

    state: LiveState
    basis: LiveBasis
    step: int
    reason: str
    where: str | None = None
    fall_decades: float | None = None
    slope: float | None = None
    slope_interval: tuple[float, float] | None = None
    advice: str = ""
    hinders: tuple[OptimizerKind, ...] = ()
    chain: str = ""
    chains: tuple[LiveVerdict, ...] = ()
    finding: str = ""
    score: float | None = None
    starved: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f" at {self.where}" if self.where else ""
        of = f" {self.chain}:" if self.chain else ""
        because = f"{self.reason[:1].upper()}{self.reason[1:]}".rstrip(".")
        words = " ".join(part for part in (self.finding, f"{because}.", self.advice) if part)
        return printable(f"step {self.step}:{of} {self.state}{where} (from {self.basis}): {words}")


@dataclass(frozen=True)
class VerdictEvent:
    """Change of the verdict's state.

    Attributes:
        step: optimizer step of the change.
        before: previous state.
        verdict: new verdict.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = ss.reference.deep_mlp(4, width=16, shortcut="identity"), ss.reference.digits(32)
        >>> loss = torch.nn.functional.cross_entropy
        >>> events = []
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with ss.watch(model, optimizer, flow_every=1, on_verdict=events.append):
        ...     loss(model(data[0]), data[1]).backward()
        ...     optimizer.step()
        >>> [(event.step, event.before, event.verdict.state) for event in events]
        [(1, 'unknown', 'healthy')]
    """

    step: int
    before: LiveState
    verdict: LiveVerdict

    def __str__(self) -> str:
        return f"{self.before} -> {self.verdict.state}: {self.verdict}"


@dataclass(frozen=True, eq=False)
class History(Result):
    """Recording of a monitor: a row for each optimizer step, a column for each parameter.

    Gradients are those that the optimizer received: after accumulation and clipping, without the loss scale,
    reduced over ranks, full under sharding. ``norm_before_clip`` is the norm before clipping, if known.

    Attributes:
        parameters: names, in the model's order; ``[P]``.
        shapes: shapes of the parameters; ``[P]``.
        owners: index of the optimizer that updates each parameter; ``[P]``.
        groups: index of its parameter group in that optimizer; ``[P]``.
        steps: step of the optimizer, counted from 1 since the watch began; ``[rows]``.
        seconds: seconds since the watch began; ``[rows]``.
        optimizers: index of the optimizer that stepped; ``[rows]``.
        norm: L2 norm of dL/dw; ``[rows, P]``; NaN if there is no gradient, and at the first step at which an
            accelerator's float32 could not hold its square.
        mean_abs: mean |dL/dw|, as in the lecture; ``[rows, P]``.
        norm_before_clip: L2 norm before clipping; NaN if unknown; ``[rows, P]``.
        states: index into ``monitor.STATES``; ``[rows, P]``.
        total_before_clip: total norm measured by ``clip_grad_norm_``; NaN if unknown; ``[rows]``.
        loss_scale: scale of GradScaler, already divided out; NaN without a scaler; ``[rows]``.
        skipped: 1 if GradScaler skipped the step; ``[rows]``.
        evaluations: number of evaluations of a closure; 0 without a closure; ``[rows]``.
        boundaries: boundaries at which the flow is read, nearest the input first; ``[B]``.
        flow_steps: optimizer steps of the flow readings; ``[flow rows]``.
        flow: RMS of dL/d(activation), without the loss scale; ``[flow rows, B]``; inf if it is not finite,
            NaN if no gradient arrived.
        verdict: the last verdict.
        events: changes of the state.
        notes: further remarks.
        complete: False if read from the folder of a run that has not been closed.
        roles: ``"table"`` for an embedding, ``"bias"`` for the bias of a linear layer or a convolution,
            ``"norm"`` for the weight of a norm layer, otherwise ``""``; ``[P]``.
        chains: model or optimizer whose loss the parameter belongs to; ``[P]``.
        kinds: ``"SGD"`` or ``"Adam"`` by how the parameter's optimizer scales its step, ``""`` if unknown;
            ``[P]``.
        flow_norm: L2 norm of dL/d(activation) over the whole batch, which does not depend on the width; -1 if
            the boundary was not part of the pass, otherwise inf and NaN as in ``flow``; ``[flow rows, B]``.
        flow_relative: L2 norm of gradient times activation, which does not depend on the scale of a norm
            layer; NaN if there are no norm layers between the weights; ``[flow rows, B]``.
        flow_owners: index of the optimizer of each reading; ``[flow rows]``.
        hidden: whether each boundary is between input and output; the fall is measured over these; ``[B]``.
        averaging: decades that the norm at each boundary loses by averages between it and the output;
            ``[B]``.
        normed: norms over the data stand between the weights.
        recurrent: the recurrent layer whose reach was read; empty without one.
        reach: steps until a thousandth of the gradient is left there (NaN where more is left at the first
            step), length of the sequence, and decades that the gradient grows on its way to the first step;
            ``[flow rows, 3]``.
        lines: the lines that each boundary is on, as bits: one line for each input of the model; 0 beside
            them; ``[B]``.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = ss.reference.deep_mlp(4, width=16, shortcut="identity"), ss.reference.digits(32)
        >>> loss = torch.nn.functional.cross_entropy
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with ss.watch(model, optimizer) as monitor:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         loss(model(data[0]), data[1]).backward()
        ...         optimizer.step()
        >>> history = monitor.history
        >>> history.steps.tolist(), history.rms.shape == (3, len(history.parameters))
        ([1.0, 2.0, 3.0], True)
    """

    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    owners: tuple[int, ...]
    groups: tuple[int, ...]
    steps: np.ndarray
    seconds: np.ndarray
    optimizers: np.ndarray
    norm: np.ndarray
    mean_abs: np.ndarray
    norm_before_clip: np.ndarray
    states: np.ndarray
    total_before_clip: np.ndarray
    loss_scale: np.ndarray
    skipped: np.ndarray
    evaluations: np.ndarray
    boundaries: tuple[str, ...]
    flow_steps: np.ndarray
    flow: np.ndarray
    verdict: LiveVerdict
    events: tuple[VerdictEvent, ...] = ()
    notes: tuple[str, ...] = ()
    complete: bool = True
    roles: tuple[str, ...] = ()
    chains: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    flow_norm: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    flow_relative: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    flow_owners: np.ndarray = field(default_factory=lambda: np.empty(0))
    hidden: tuple[bool, ...] = ()
    averaging: tuple[float, ...] = ()
    normed: bool = False
    recurrent: str = ""
    reach: np.ndarray = field(default_factory=lambda: np.empty((0, 3)))
    lines: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def sizes(self) -> np.ndarray:
        """Elements of each parameter (1 for an empty one), ``[P]``."""
        return np.array([max(1, math.prod(shape)) for shape in self.shapes], dtype=float)

    @property
    def rms(self) -> np.ndarray:
        """RMS of dL/dw, ``[rows, P]``."""
        return self.norm / np.sqrt(self.sizes)

    @property
    def total_norm(self) -> np.ndarray:
        """L2 norm ``[rows]`` over the parameters of the optimizer that stepped; inf if any is not finite."""
        return total_of(self.norm, self.states)

    def matrix(
        self, what: Quantity = "rms", *, optimizer: int = 0, weights_only: bool = True
    ) -> dict[str, Any]:
        """Data of the heat map.

        Args:
            what: ``"rms"``, ``"mean_abs"``, ``"norm"``, ``"norm_before_clip"`` or ``"flow"``.
            optimizer: index of the optimizer whose steps are shown.
            weights_only: leave out parameters with fewer than two dimensions (biases, norms).

        Returns:
            Dict with ``rows`` (names, nearest the input first), ``columns`` (steps), ``values``
            ``[rows, columns]`` (not log; NaN if there is no value), ``label`` and ``verdict``.
        """
        if what == "flow":
            values, names, steps = self.flow.T, list(self.boundaries), self.flow_steps
        elif what in {"rms", "mean_abs", "norm", "norm_before_clip"}:
            rows = self.optimizers == optimizer
            columns = [
                i
                for i, (owner, shape) in enumerate(zip(self.owners, self.shapes))
                if owner == optimizer and (len(shape) > 1 or not weights_only)
            ]
            values = getattr(self, what)[rows][:, columns].T
            names, steps = [self.parameters[i] for i in columns], self.steps[rows]
        else:
            raise SkipscopeError(
                "History.matrix",
                f"there is no quantity {what!r}",
                expected="rms, mean_abs, norm, norm_before_clip or flow",
                got=what,
            )
        return {
            "rows": names,
            "columns": [int(s) for s in steps],
            "values": values,
            "label": _LABELS[what],
            "verdict": str(self.verdict),
        }

    def table(self) -> Table:
        """Table with a row for each parameter: its last gradient and its range over the run."""
        rows = []
        rms = self.rms
        for i, name in enumerate(self.parameters):
            own = self.optimizers == self.owners[i]
            column, states = rms[own, i], self.states[own, i]
            finite = column[np.isfinite(column)]
            rows.append(
                [
                    name,
                    float(column[-1]) if len(column) else None,
                    float(self.mean_abs[own, i][-1]) if len(column) else None,
                    float(finite.min()) if len(finite) else None,
                    float(finite.max()) if len(finite) else None,
                    STATES[int(states[-1])] if len(states) else "absent",
                ]
            )
        count = int(self.steps[-1]) if len(self) else 0
        last = f"{count:,} step{'s' * (count != 1)}, {len(self):,} recorded" if count else "no step yet"
        notes = [
            (
                "Of the gradient the optimizer received: accumulated, unscaled, reduced over ranks, after"
                " clipping."
            ),
            self._clipping_note(),
            *self.notes,
        ]
        if len(self.flow_steps):
            first, end = self.flow[-1][0], self.flow[-1][-1]
            notes.append(
                f"flow at step {int(self.flow_steps[-1]):,}: {short(float(end))} at the last boundary "
                f"({self.boundaries[-1]}), {short(float(first))} at the first ({self.boundaries[0]})."
            )
        return Table(
            f"Gradients over {last}. Verdict at {self.verdict}",
            ["parameter", "RMS now", "mean |g| now", "RMS least", "RMS most", "state"],
            rows,
            notes,
        )

    def _clipping_note(self) -> str:
        known = int(np.isfinite(self.total_before_clip).sum())
        if not known:
            return "Before clipping: unknown (no clip_grad_norm_ was seen)."
        last = float(self.total_before_clip[np.isfinite(self.total_before_clip)][-1])
        return (
            f"Before clipping: known at {known:,} of {len(self):,} steps; total norm at last {short(last)}."
        )


_LABELS = {
    "rms": "RMS of dL/dW", "mean_abs": "mean |dL/dW|", "norm": "L2 norm of dL/dW",
    "norm_before_clip": "L2 norm of dL/dW before clipping", "flow": "RMS of dL/d(activation)",
}  # fmt: skip
