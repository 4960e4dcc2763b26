"""What the main job hands over: the twins, their training, and everything measured on them, keyed by twin."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from skipscope._numbers import short
from skipscope._option_words import VerdictState
from skipscope._result import Result, Table
from skipscope.flow import GradientFlow, GradientSplit, Importance, PathSpectrum
from skipscope.shortcuts import Shortcuts
from skipscope.surfaces import PairedSurfaces


@dataclass(frozen=True, eq=False)
class Curves:
    """One twin under one optimizer at its best rate.

    Attributes:
        rate: the learning rate that won the sweep.
        sweep: learning rate -> smoothed final loss on ``sweep_seed``; inf where training diverged. Empty
            where there was one rate only.
        losses: training loss, [seeds, steps].
        update_ratio: |update| / |weights| over all weights, [seeds, steps].
        steps_to_target: first step at which each seed's smoothed loss is at or below the target; None: never.
        learns: the smoothed loss of every seed ends at or below the target.
        is_at_edge: the best rate is the greatest or the smallest that was tried: one beyond may be better.
        sweep_seed: the seed on which the rates were tried; not one of those reported.
        train_accuracy: share named rightly by each seed's trained network, in evaluation mode, on a tenth as
            many training batches as there were steps (at most all); None for a run that diverged, and for all
            where the targets are no classes.
        test_accuracy: the same on the test data; None without.
    """

    rate: float
    sweep: dict[str, float]
    losses: np.ndarray
    update_ratio: np.ndarray
    steps_to_target: tuple[int | None, ...]
    learns: bool
    is_at_edge: bool = False
    sweep_seed: int | None = None
    train_accuracy: tuple[float | None, ...] | None = None
    test_accuracy: tuple[float | None, ...] | None = None

    @property
    def final_loss(self) -> float:
        """Mean over seeds of the smoothed loss at the end."""
        return float(np.mean(smoothed(self.losses)[:, -1]))


def smoothed(losses: np.ndarray, span: int = 10) -> np.ndarray:
    """Mean over the last ``span`` steps along the last axis; over those there are, at the start."""
    padding = [(0, 0)] * (losses.ndim - 1) + [(span - 1, 0)]
    padded = np.pad(np.asarray(losses, dtype=float), padding)
    sums = np.lib.stride_tricks.sliding_window_view(padded, span, axis=-1).sum(-1)
    return sums / np.minimum(np.arange(losses.shape[-1]) + 1, span)


@dataclass(frozen=True, eq=False)
class Training(Result):
    """Twins trained side by side on the same batches: loss against step, steps to a loss, update sizes.

    Attributes:
        curves: twin -> optimizer -> :class:`Curves`.
        target: the loss whose first crossing is counted.
        steps: steps each run had.
        batch_size: samples a step.
        seeds: the seeds; ``varies`` says what differs between them.
        varies: "initialisation and batch order", or "batch order only" (a ready model was given).
        notes: what is worth knowing of how the twins were trained.
        processes: how many copies of this process trained side by side, with one thread each; 1: none.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = ss.reference.deep_mlp(4, width=16, shortcut="identity"), ss.reference.digits(32)
        >>> loss = torch.nn.functional.cross_entropy
        >>> runs = ss.train_twins({"with": model}, data, loss, seeds=1, steps=5, optimizers={"Adam": [0.01]})
        >>> runs.steps, runs.curves["with"]["Adam"].losses.shape
        (5, (1, 5))
    """

    curves: dict[str, dict[str, Curves]]
    target: float
    steps: int
    batch_size: int
    seeds: tuple[int, ...]
    varies: str
    notes: tuple[str, ...] = ()
    processes: int = 1

    @property
    def engine(self) -> dict[str, str]:
        """How each twin's runs were trained: "one by one". Earlier versions could also stack networks."""
        return dict.fromkeys(self.curves, "one by one")

    def learners(self, optimizer: str) -> list[str]:
        """The twins that learn under ``optimizer``."""
        return [name for name, by in self.curves.items() if optimizer in by and by[optimizer].learns]

    def steps_text(self, twin: str, optimizer: str) -> str:
        """Median steps to the target, or "> N" after N steps in which most seeds never reach it: never a
        made-up ratio.
        """
        curves = self.curves[twin][optimizer]
        reached = curves.steps_to_target
        steps = sorted(np.inf if s is None else s for s in reached)
        middle = steps[len(steps) // 2]
        return f"> {curves.losses.shape[1]}" if np.isinf(middle) else f"{middle:.0f}"

    def accuracies(self, twin: str, optimizer: str) -> dict[str, float | None]:
        """Mean over seeds of "train accuracy" and "test accuracy", as far as any twin has them.

        Empty where the targets are no classes; None where a run diverged.
        """
        every = [c for by in self.curves.values() for c in by.values()]
        own = self.curves[twin][optimizer]
        found: dict[str, float | None] = {}
        for name in ("train_accuracy", "test_accuracy"):
            if any(getattr(c, name) is not None for c in every):
                values = getattr(own, name) or (None,)
                known = [value for value in values if value is not None]
                is_whole = len(known) == len(values)
                found[name.replace("_", " ")] = float(np.mean(known)) if is_whole else None
        return found

    def table(self) -> Table:
        heads: list[str] = []
        for twin, by in self.curves.items():
            heads = [name.replace("accuracy", "acc.") for name in self.accuracies(twin, next(iter(by)))]
        rows = [
            [
                twin,
                optimizer,
                c.rate,
                c.final_loss,
                *self.accuracies(twin, optimizer).values(),
                self.steps_text(twin, optimizer),
                float(np.median(c.update_ratio)),
                "yes" if c.learns else "no",
            ]
            for twin, by in self.curves.items()
            for optimizer, c in by.items()
        ]
        return Table(
            f"training: {len(self.seeds)} seeds, {self.steps} steps, batches of {self.batch_size}",
            [
                "twin",
                "optimizer",
                "best rate",
                "final loss",
                *heads,
                f"steps to {short(self.target)}",
                "update size",
                "learns",
            ],
            rows,
            [
                (
                    f"Seeds vary {self.varies}. Each twin has its best rate out of the same sweep, on a seed"
                    " of its own. 'learns': every seed's smoothed loss (mean over 10 steps) ends at or below"
                    f" {short(self.target)}."
                ),
                *(["acc.: accuracy, the share of samples whose class is named rightly."] if heads else []),
                *self._edges(),
                *self.notes,
            ],
        )

    def _edges(self) -> list[str]:
        """A sentence for each best rate at the edge of its sweep."""
        return [
            f"The best rate of {twin} under {optimizer}, {short(c.rate)}, is at the edge of the rates tried:"
            " one beyond may be better."
            for twin, by in self.curves.items()
            for optimizer, c in by.items()
            if c.is_at_edge
        ]


@dataclass(frozen=True, eq=False)
class StrengthSweep(Result):
    """The flow as every shortcut's strength goes from 0 (removed) to 1 (as built), from these weights.

    Attributes:
        strengths: the factors, [S].
        names: the boundaries' names, first to last.
        gradient_rms: flow at each boundary, [S, boundaries].
        fall_decades: the fall at each strength, [S].
        states: the verdict's state at each strength.
    """

    strengths: np.ndarray
    names: tuple[str, ...]
    gradient_rms: np.ndarray
    fall_decades: np.ndarray
    states: tuple[VerdictState, ...]

    def table(self) -> Table:
        rows = [
            [float(s), float(f), state] for s, f, state in zip(self.strengths, self.fall_decades, self.states)
        ]
        return Table(
            "flow by shortcut strength",
            ["strength", "fall (decades)", "verdict"],
            rows,
            [
                "Strength 0 removes every shortcut, 1 is as built. Positive fall: the gradient shrinks on its"
                " way back."
            ],
        )


# How a twin's meaning begins, where its shortcuts are of another kind.
KIND = "kind: "


@dataclass(frozen=True)
class Twin:
    """One network of a comparison.

    Attributes:
        name: its key everywhere.
        meaning: "as built", "removed", "detached", "trained without", "shortcuts added", "kind: NAME", or a
            variant's own words.
        description: one line for people.
        parameters: how many trainable numbers it has.
    """

    name: str
    meaning: str
    description: str
    parameters: int


@dataclass(frozen=True)
class DepthResult:
    """One depth: whether each network's gradient arrives, and whether the network learns.

    Attributes:
        depth: hidden layers.
        fall: twin -> fall in decades.
        state: twin -> the verdict's state.
        steps: twin -> optimizer -> steps to the target as text ("> 400" when never).
        learns: twin -> optimizer -> whether any rate tried reaches the target.
    """

    depth: int
    fall: dict[str, float]
    state: dict[str, VerdictState]
    steps: dict[str, dict[str, str]] = field(default_factory=dict)
    learns: dict[str, dict[str, bool]] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """One claim of the lecture, held against the measurement.

    Attributes:
        key: "smaller", "product", "stagnate", "path", "strength", "surface" or "which": its place on the
            page.
        claim: the claim in the lecture's words.
        answer: "holds", "holds in part", "does not hold here" or "not measured".
        finding: what is true here, in at most 25 words.
        limits: what does not follow from it, in at most 25 words; "" where nothing was measured.
        why: the numbers behind it.
        see: what to look at in the chart.
    """

    key: str
    claim: str
    answer: str
    finding: str
    limits: str = ""
    why: str = ""
    see: str = ""


def _learns(optimizer: str, curves: Curves) -> str:
    """The optimizer, where the twin learns under it; how far it came, where it reached the target and does
    not learn.
    """
    reached, seeds = sum(steps is not None for steps in curves.steps_to_target), len(curves.steps_to_target)
    if curves.learns or not reached:
        return optimizer if curves.learns else ""
    return f"{optimizer} (for a time)" if reached == seeds else f"{optimizer} ({reached} of {seeds} seeds)"


@dataclass(frozen=True, eq=False)
class Comparison(Result):
    """What its shortcuts do for a network: everything ``skipscope compare`` measured.

    Every dict is keyed by twin (see :class:`Twin` for what each one is).

    Attributes:
        subject: the network and the data in one line.
        summary: up to four sentences, each with its number, to be read aloud.
        claims: the lecture's claims, each with its finding.
        twins: the networks compared.
        found: the shortcuts of each twin that has any.
        flow: gradient flow; "NAME, removed" and "NAME, detached" stand beside twins that have shortcuts.
        split: branch against shortcut at each merge.
        paths: the exact path spectrum.
        training: the twins trained side by side, or None.
        depths: the same question at several depths, deepest last; empty for a user's own model.
        surfaces: "trained" (each twin from its own training) and "paired" (shared weights, pointwise
            difference).
        importance: each shortcut removed alone, each branch lesioned alone.
        strength: the flow against shortcut strength.
        methods: one paragraph that says how everything was measured.
        notes: what was left out and why.
        provenance: versions, seeds, hashes, the machine, seconds by stage.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = ss.reference.deep_mlp(4, width=16, shortcut="identity"), ss.reference.digits(32)
        >>> loss = torch.nn.functional.cross_entropy
        >>> result = ss.compare(model, data, loss, train=False, grid=5)
        >>> sorted(result.flow), len(result.claims) > 3
        (['with', 'with, detached', 'without'], True)
    """

    RENAMED: ClassVar[dict[str, str]] = {"ladder": "depths"}

    subject: str
    summary: tuple[str, ...]
    claims: tuple[Claim, ...]
    twins: tuple[Twin, ...]
    found: dict[str, Shortcuts]
    flow: dict[str, GradientFlow]
    split: dict[str, GradientSplit]
    paths: dict[str, PathSpectrum]
    training: Training | None
    depths: tuple[DepthResult, ...]
    surfaces: dict[str, PairedSurfaces]
    importance: dict[str, Importance]
    strength: dict[str, StrengthSweep]
    methods: str
    notes: tuple[str, ...]
    provenance: dict[str, Any]

    @property
    def ladder(self) -> tuple[DepthResult, ...]:
        """Deprecated name of ``depths``."""
        warnings.warn("Comparison.ladder is now Comparison.depths", DeprecationWarning, stacklevel=2)
        return self.depths

    def kinds_table(self) -> Table:
        """One line each: as built, without its shortcuts, and with each kind; loss, accuracy and steps under
        each optimizer.

        The table of He et al. 2016 (arXiv 1603.05027, table 1) for one's own network.
        """
        training, rows = self.training, list[list[Any]]()
        heads: list[str] = []
        for twin in self.twins:
            row: list[Any] = [twin.meaning.removeprefix(KIND), twin.parameters]
            for name, curves in (training.curves[twin.name] if training else {}).items():
                assert training is not None
                accuracies = training.accuracies(twin.name, name)
                row += [curves.final_loss, *accuracies.values(), training.steps_text(twin.name, name)]
                if not rows:
                    steps = f"steps to {short(training.target)}"
                    heads += [f"{name}: {head}" for head in ("final loss", *accuracies, steps)]
            rows.append([*row, self.flow[twin.name].verdict.state])
        return Table(
            "kinds of shortcut",
            ["shortcuts", "weights", *heads, "gradient at the start"],
            rows,
            list(self.notes),
        )

    def table(self) -> Table:
        rows = []
        for twin in self.twins:
            flow = self.flow.get(twin.name)
            curves = self.training.curves.get(twin.name, {}) if self.training else {}
            learns = ", ".join(filter(None, (_learns(optimizer, c) for optimizer, c in curves.items())))
            if not learns:
                learns = f"none in {self.training.steps} steps" if self.training and curves else "-"
            rows.append([
                twin.name, len(self.found[twin.name]) if twin.name in self.found else 0,
                flow.verdict.fall_decades if flow else None, flow.verdict.state if flow else "-",
                self.paths[twin.name].mean_length if twin.name in self.paths else None, learns,
            ])  # fmt: skip
        return Table(
            self.subject,
            ["network", "shortcuts", "fall (decades)", "verdict", "mean path", "learns under"],
            rows,
            [*self.summary, *(f"({note})" for note in self.notes)],
        )
