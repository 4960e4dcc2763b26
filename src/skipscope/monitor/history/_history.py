"""Result of a monitor: history as plain columns, verdict, and events when the verdict changed."""

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
    """L2 norm over all parameters (the last axis); inf where one of them is not finite."""
    total = np.sqrt(np.nansum(np.square(norm), axis=-1))
    return np.where((states == STATES.index("nonfinite")).any(axis=-1), np.inf, total)


@dataclass(frozen=True)
class LiveVerdict:
    """What the gradients are like, as far as a running training lets it be known.

    Attributes:
        state: ``"healthy"``, ``"vanishing"``, ``"exploding"``, ``"dead"``, ``"nonfinite"``,
            ``"unconnected"``; ``"unknown"`` before the first step.
        basis: what it rests on: ``"boundary flow"`` or ``"parameter gradients"`` (weaker: dL/dW can fall
            where the flow does not).
        step: the optimizer step it was given at.
        reason: a sentence with the number that says so.
        where: the boundary or parameter where it breaks; None for a healthy one.
        fall_decades: log10(last / first) of the profile it rests on; positive: shrinks going back.
        slope: decades per boundary (or weight), same sign.
        slope_interval: its 95 % interval.
        advice: what to do about it; empty where nothing need be done.
        hinders: the kinds of optimizer that it keeps from learning, of ``"SGD"`` and ``"Adam"``: judged for
            the one that is watched where its kind is known, so empty where that one bears it.
        chain: the model, or the optimizer, whose loss it is about; empty where there is only one.
        chains: one verdict for each of them; empty where there is only one. The whole has the worst state of
            them.
        finding: the verdict in one sentence, as ``gradient_flow`` has it.
        starved: weights that get next to nothing while others do, the most starved first; judged where it is
            known which weights follow each other.
        score: minus the decades between the greatest and the least of the profile; None where there is none.
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
    """The state changed.

    Attributes:
        step: the optimizer step.
        before: the state until then.
        verdict: the verdict from then on.

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
    """What a monitor recorded: one row an optimizer step, one column a parameter.

    Every gradient is the one that the optimizer received: after accumulation, without the loss scale, reduced
    over the ranks, whole, and after clipping; ``norm_before_clip`` is that before clipping where it could be
    known.

    Attributes:
        parameters: names, in the model's order; ``[P]``.
        shapes: of each; ``[P]``.
        owners: the optimizer that updates it, by its place among those watched; ``[P]``.
        groups: its parameter group in that optimizer; ``[P]``.
        steps: the optimizer's step, counted from 1 since the watch began; ``[rows]``.
        seconds: since the watch began; ``[rows]``.
        optimizers: the optimizer that stepped; ``[rows]``.
        norm: L2 norm of dL/dw; ``[rows, P]``; NaN where there is none, and at the first step at which an
            accelerator's float32 could not hold its square.
        mean_abs: mean |dL/dw|, the lecture's; ``[rows, P]``.
        norm_before_clip: L2 norm before clipping; NaN where unknown; ``[rows, P]``.
        states: index into ``monitor.STATES``; ``[rows, P]``.
        total_before_clip: the total norm that ``clip_grad_norm_`` found; NaN where unknown; ``[rows]``.
        loss_scale: GradScaler's scale, already divided out; NaN without a scaler; ``[rows]``.
        skipped: 1 where GradScaler skipped the step; ``[rows]``.
        evaluations: how often a closure was evaluated; 0 without a closure; ``[rows]``.
        boundaries: where the flow is read, nearest the input first; ``[B]``.
        flow_steps: ``[flow rows]``.
        flow: RMS of dL/d(activation), without the loss scale; ``[flow rows, B]``; inf where it is not finite,
            NaN where none arrived.
        verdict: the last verdict.
        events: when the state changed.
        notes: what else a reader should know.
        complete: False when read from a folder whose run has not been closed.
        roles: ``"table"`` of an embedding, ``"bias"`` of a linear map or a convolution, else ``""``; ``[P]``.
        chains: the model, or the optimizer, whose loss the parameter belongs to; ``[P]``.
        kinds: ``"SGD"`` or ``"Adam"`` by how the parameter's optimizer scales its step, ``""`` where unknown;
            ``[P]``.
        flow_norm: L2 norm of dL/d(activation) over the whole batch, as ``flow``: a change of width leaves it
            alone; -1 where the boundary was no part of the pass; ``[flow rows, B]``.
        flow_relative: L2 norm of gradient times activation there, which the scale of a norm has no part in;
            NaN where no norms stand between the weights; ``[flow rows, B]``.
        flow_owners: the optimizer whose step it was; ``[flow rows]``.
        hidden: whether each boundary is between input and output, where the fall is taken; ``[B]``.
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
        """L2 norm over the parameters of the optimizer that stepped, ``[rows]``; inf where one is not
        finite.
        """
        return total_of(self.norm, self.states)

    def matrix(
        self, what: Quantity = "rms", *, optimizer: int = 0, weights_only: bool = True
    ) -> dict[str, Any]:
        """What the heat map shows, as plain data.

        Args:
            what: ``"rms"``, ``"mean_abs"``, ``"norm"``, ``"norm_before_clip"`` or ``"flow"``.
            optimizer: whose steps.
            weights_only: leave out parameters with fewer than two dimensions (biases, norms).

        Returns:
            ``rows`` (names, nearest the input first), ``columns`` (steps), ``values`` ``[rows, columns]``
            (not log; NaN where there is none), ``label``, ``verdict``.
        """
        if what == "flow":
            values, names, steps = self.flow.T, list(self.boundaries), self.flow_steps
        elif what in {"rms", "mean_abs", "norm", "norm_before_clip"}:
            rows = self.optimizers == optimizer
            columns = [
                i for i, (owner, shape) in enumerate(zip(self.owners, self.shapes))
                if owner == optimizer and (len(shape) > 1 or not weights_only)
            ]  # fmt: skip
            values = getattr(self, what)[rows][:, columns].T
            names, steps = [self.parameters[i] for i in columns], self.steps[rows]
        else:
            raise SkipscopeError(
                "History.matrix", f"there is no quantity {what!r}",
                expected="rms, mean_abs, norm, norm_before_clip or flow", got=what,
            )  # fmt: skip
        return {
            "rows": names, "columns": [int(s) for s in steps], "values": values, "label": _LABELS[what],
            "verdict": str(self.verdict),
        }  # fmt: skip

    def table(self) -> Table:
        """One row a parameter: its last gradient and its range over the run."""
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
            ["parameter", "RMS now", "mean |g| now", "RMS least", "RMS most", "state"], rows, notes,
        )  # fmt: skip

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
