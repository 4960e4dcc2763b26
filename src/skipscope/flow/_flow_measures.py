"""Results of the flow functions other than ``gradient_flow``, with their tables.

A *fall* and a *slope* are positive when the gradient shrinks on its way back from the loss; both are in
decades (powers of ten).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from skipscope._numbers import short
from skipscope._option_words import ModelMode, VerdictState
from skipscope._result import Result, Table

# --- gradient_split ---


@dataclass(frozen=True)
class SplitAt:
    """Gradient arriving at a fork, by path.

    Attributes:
        name: name of the shortcut.
        kind: kind of the shortcut.
        fork: activation at which branch and shortcut part.
        branch_rms: RMS of the gradient that came through the branch.
        shortcut_rms: RMS of the gradient that came through the shortcut.
        cosine: cosine between these two gradients; None if either is zero.
        fork_rms: RMS of the total gradient at the fork.
        other_rms: RMS of the gradient from other consumers of the fork; None if there are none.
        share: |shortcut| / (|shortcut| + |branch|); None if both are zero.
        residual: measured |branch + shortcut + other - total| / |total|, zero up to rounding.
    """

    name: str
    kind: str
    fork: str
    branch_rms: float
    shortcut_rms: float
    cosine: float | None
    fork_rms: float
    other_rms: float | None = None
    share: float | None = None
    residual: float | None = None


@dataclass(frozen=True)
class GradientSplit(Result):
    """Gradient through the branch and through the shortcut, for each shortcut. A sequence of its rows.

    Attributes:
        shortcuts: a row for each shortcut, in order of execution.
        loss: the loss on the data.
        mode, meaning: as in :class:`GradientFlow`.
        notes: further remarks.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = ss.reference.deep_mlp(4, width=16, shortcut="identity"), ss.reference.digits(32)
        >>> loss = torch.nn.functional.cross_entropy
        >>> split = ss.gradient_split(model, data, loss)
        >>> [one.name for one in split], 0 < split[0].share < 1
        (['layers.1', 'layers.2', 'layers.3'], True)
    """

    shortcuts: tuple[SplitAt, ...]
    loss: float
    mode: ModelMode
    meaning: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.shortcuts)

    def __getitem__(self, index: int) -> SplitAt:
        return self.shortcuts[index]

    def __iter__(self) -> Iterator[SplitAt]:
        return iter(self.shortcuts)

    def table(self) -> Table:
        """Table with a row for each shortcut."""
        rows = [[s.name, s.kind, s.shortcut_rms, s.branch_rms, s.share, s.cosine] for s in self.shortcuts]
        return Table(
            "Where the gradient comes from, at each fork",
            ["shortcut", "kind", "by the shortcut", "by the branch", "share", "cosine"],
            rows,
            [
                (
                    "RMS of the gradient arriving at the fork by each path; share: shortcut / (shortcut +"
                    " branch)."
                ),
                *self.notes,
            ],
        )


# --- path_spectrum ---


@dataclass(frozen=True, eq=False)
class PathSpectrum(Result):
    """The gradient by the number of branches that it crossed.

    Attributes:
        norms: ``[branches + 1]``; ``norms[k]`` is the L2 norm over the whole batch of G_k, the sum over all
            paths that cross exactly k branches.
        mean_length: sum k |G_k| / sum |G_k|.
        residual: |sum_k G_k - G| / |G|, with G from a plain backward pass.
        gradient_norm: |G|.
        branches: number of branch operands (the greatest possible length).
        wrt: boundary or parameter at which the paths end.
        method: method of computation: ``"batched"``, ``"loop"`` or ``"mixed"``; for an estimate with the
            prefix ``"estimate, "``.
        loss: the loss on the data.
        mode, meaning: as in :class:`GradientFlow`.
        errors: approximate error of each norm for an estimate; None if exact.
        notes: further remarks.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = ss.reference.deep_mlp(4, width=16, shortcut="identity"), ss.reference.digits(32)
        >>> loss = torch.nn.functional.cross_entropy
        >>> paths = ss.path_spectrum(model, data, loss)
        >>> paths.branches, len(paths.norms), 0 < paths.mean_length < 4
        (3, 4, True)
    """

    norms: np.ndarray
    mean_length: float
    residual: float
    gradient_norm: float
    branches: int
    wrt: str
    method: str
    loss: float
    mode: ModelMode
    meaning: str
    errors: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    @property
    def shares(self) -> np.ndarray:
        """``norms`` over their sum, ``[branches + 1]``."""
        total = self.norms.sum()
        return self.norms / total if total else np.zeros_like(self.norms)

    def table(self) -> Table:
        """Table with a row for each path length."""
        rows = [[k, float(n), float(s)] for k, (n, s) in enumerate(zip(self.norms, self.shares))]
        if self.errors is not None:
            rows = [[*row, float(e)] for row, e in zip(rows, self.errors)]
        kind = "exact" if self.errors is None else "an estimate"
        return Table(
            f"Paths by length: {self.branches} branches, mean length {short(self.mean_length)}",
            ["branches crossed", "|gradient|", "share"] + (["error"] if self.errors is not None else []),
            rows,
            [
                (
                    f"|gradient|: norm of the sum over all paths of that length, back to {self.wrt}; {kind}"
                    f" ({self.method}); their sum differs from the plain gradient by {short(self.residual)}"
                    " of it."
                ),
                "The parts may cancel: their norms add up to more than the norm of the gradient.",
                *self.notes,
            ],
        )


# --- importance ---


@dataclass(frozen=True)
class Cost:
    """Cost of an edit, without further training.

    Attributes:
        loss: loss after the edit.
        loss_cost: loss after the edit minus loss before.
        fall_decades: fall of the flow after the edit; None if it has none (dead, unconnected, non-finite).
        flow_cost: fall after the edit minus fall before: decades of gradient lost.
        state: state of the flow after the edit.
    """

    loss: float
    loss_cost: float
    fall_decades: float | None
    flow_cost: float | None
    state: VerdictState


@dataclass(frozen=True)
class ImportanceOf:
    """Costs of removing a shortcut alone, and of removing its branch alone.

    Attributes:
        name: name of the shortcut.
        kind: kind of the shortcut.
        removed: cost of removing the shortcut; None if it cannot be edited, for the reason in ``why``.
        lesioned: cost of removing its branch (Veit's lesion).
        why: reason for a missing cost.
    """

    name: str
    kind: str
    removed: Cost | None
    lesioned: Cost | None
    why: str | None = None


@dataclass(frozen=True)
class Importance(Result):
    """Importance of each shortcut and branch. A sequence of its rows, in order of execution.

    Attributes:
        shortcuts: a row for each shortcut.
        loss: loss of the unedited network.
        fall_decades: fall of the flow of the unedited network.
        mode: as in :class:`GradientFlow`.
        notes: further remarks.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = ss.reference.deep_mlp(4, width=16, shortcut="identity"), ss.reference.digits(32)
        >>> loss = torch.nn.functional.cross_entropy
        >>> rank = ss.importance(model, data, loss)
        >>> [one.name for one in rank][:2], len(rank)
        (['layers.1', 'layers.2'], 3)
    """

    shortcuts: tuple[ImportanceOf, ...]
    loss: float
    fall_decades: float | None
    mode: ModelMode
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.shortcuts)

    def __getitem__(self, index: int) -> ImportanceOf:
        return self.shortcuts[index]

    def __iter__(self) -> Iterator[ImportanceOf]:
        return iter(self.shortcuts)

    @property
    def ranked(self) -> tuple[ImportanceOf, ...]:
        """The rows by descending loss cost of removal; shortcuts that could not be removed come last."""
        return tuple(
            sorted(
                self.shortcuts,
                key=lambda s: np.inf if s.removed is None else _descending(s.removed.loss_cost),
            )
        )

    def table(self) -> Table:
        """Table with a row for each shortcut, by descending cost of removal."""

        def cells(cost: Cost | None) -> list[float | None]:
            return [None, None] if cost is None else [cost.loss_cost, cost.flow_cost]

        rows = [[s.name, s.kind, *cells(s.removed), *cells(s.lesioned)] for s in self.ranked]
        return Table(
            "Which shortcuts matter",
            ["shortcut", "kind", "removed: loss", "flow", "lesioned: loss", "flow"],
            rows,
            [
                (
                    f"Change of the loss (as built {short(self.loss)}) and of the flow's fall in decades (as"
                    f" built {short(self.fall_decades)}), from these weights, one edit at a time; removed:"
                    " the shortcut is taken out, lesioned: its branch is."
                ),
                *self.notes,
            ],
        )


def _descending(value: float) -> float:
    return -np.inf if np.isnan(value) else -value


# --- prescribe ---


@dataclass(frozen=True)
class Remedy:
    """A remedy, tried on a copy.

    Attributes:
        name: description of the remedy.
        code: line of code that applies it.
        state: state of the copy's flow with the remedy.
        fall_decades: fall of its flow.
        loss: its loss.
        reached: loss after the same few training steps as for every candidate; None without training.
        notes: learning rate that reached this loss.
        reason: reason for the state of the flow, in a sentence.
    """

    name: str
    code: str
    state: VerdictState
    fall_decades: float | None
    loss: float
    reached: float | None = None
    notes: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Prescription(Result):
    """Remedies that were tried on copies of a network, best first.

    Attributes:
        before: the unedited network, as a row.
        remedies: the remedies tried, best first.
        refused: remedies that could not be tried, with reasons.
        advice: the answer in a sentence or two.
        notes: the reason for the state of the flow, how to apply the best remedies, and details of the
            training steps.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = ss.reference.deep_mlp(4, width=16, shortcut="identity"), ss.reference.digits(32)
        >>> loss = torch.nn.functional.cross_entropy
        >>> _ = torch.manual_seed(0)
        >>> advice = ss.prescribe(ss.reference.deep_mlp(12, width=16), data, loss, steps=3)
        >>> advice.before.state, advice.remedies[0].state
        ('vanishing', 'healthy')
    """

    before: Remedy
    remedies: tuple[Remedy, ...]
    refused: tuple[str, ...] = ()
    advice: str = ""
    notes: tuple[str, ...] = ()

    def table(self) -> Table:
        """Table with a row for each remedy, after the unedited network."""
        rows = [[r.name, r.state, r.fall_decades, r.loss, r.reached] for r in (self.before, *self.remedies)]
        return Table(
            self.advice or "Remedies tried",
            ["remedy", "flow", "fall", "loss", "after a few steps"],
            rows,
            [
                *(
                    [
                        "Each remedy was applied to a copy and measured on the same data. fall: decades"
                        " (powers of ten) that the gradient loses on its way back; negative: it grows."
                    ]
                    if self.remedies
                    else []
                ),
                *self.notes,
                *self.refused,
            ],
        )


# --- gradient_correlation ---


@dataclass(frozen=True, eq=False)
class GradientCorrelation(Result):
    """Correlation of input gradients against the distance between the inputs (Balduzzi et al. 2017).

    Attributes:
        distances: ``[pairs]``, |x_i - x_j|.
        correlations: ``[pairs]``, cosine between the gradients with respect to x_i and x_j.
        mean: mean correlation.
        bins: rows ``(distance, mean correlation, pairs)`` with equally many pairs.
        boundary: boundary at which the gradient was read.
        notes: further remarks.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = ss.reference.deep_mlp(4, width=16, shortcut="identity"), ss.reference.digits(32)
        >>> loss = torch.nn.functional.cross_entropy
        >>> found = ss.gradient_correlation(model, data, loss, pairs=100, bins=4)
        >>> found.correlations.shape, len(found.bins), -1 <= found.mean <= 1
        ((100,), 4, True)
    """

    distances: np.ndarray
    correlations: np.ndarray
    mean: float
    bins: tuple[tuple[float, float, int], ...]
    boundary: str
    notes: tuple[str, ...] = field(default=())

    def table(self) -> Table:
        """Table with a row for each distance bin."""
        return Table(
            f"Correlation of input gradients: mean {short(self.mean)}",
            ["distance", "correlation", "pairs"],
            [list(row) for row in self.bins],
            [
                ("Near 0 the gradients are shattered: two inputs that are close get unrelated gradients."),
                *self.notes,
            ],
        )
