"""Result of a comparison: the twins, their training and all measurements, keyed by twin."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from skipscope._numbers import short
from skipscope._option_words import VerdictState
from skipscope._result import Result, Table
from skipscope.comparison.training import Curves, Training
from skipscope.flow import GradientFlow, GradientSplit, Importance, PathSpectrum
from skipscope.shortcuts import Shortcuts
from skipscope.surfaces import PairedSurfaces


@dataclass(frozen=True, eq=False)
class StrengthSweep(Result):
    """Gradient flow at shortcut strengths from 0 (removed) to 1 (as built), with the same weights.

    Attributes:
        strengths: factors on every shortcut, [S].
        names: names of the boundaries, first to last.
        gradient_rms: flow at each boundary, [S, boundaries].
        fall_decades: fall at each strength, [S].
        states: state of the verdict at each strength.
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


# Prefix of the meaning of a twin with another kind of shortcut.
KIND = "kind: "


@dataclass(frozen=True)
class Twin:
    """One network of a comparison.

    Attributes:
        name: key in every dict of the comparison.
        meaning: "as built", "removed", "detached", "trained without", "shortcuts added", "kind: NAME", or the
            text of a variant.
        description: one line for readers.
        parameters: number of trainable parameters.
    """

    name: str
    meaning: str
    description: str
    parameters: int


@dataclass(frozen=True)
class DepthResult:
    """Gradient flow and training of each network at one depth.

    Attributes:
        depth: number of hidden layers.
        fall: twin -> fall in decades.
        state: twin -> state of the verdict.
        steps: twin -> optimizer -> steps to the target as text ("> 400" if it is not reached).
        learns: twin -> optimizer -> whether any rate tried reaches the target.
    """

    depth: int
    fall: dict[str, float]
    state: dict[str, VerdictState]
    steps: dict[str, dict[str, str]] = field(default_factory=dict)
    learns: dict[str, dict[str, bool]] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A claim of the lecture, compared with the measurement.

    Attributes:
        key: identifier of its section on the page: "smaller", "product", "stagnate", "path", "strength",
            "surface" or "which".
        claim: the claim in the lecture's words.
        answer: "holds", "holds in part", "does not hold here" or "not measured".
        finding: what is true here, in at most 25 words.
        limits: what does not follow from it, in at most 25 words; "" if nothing was measured.
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
    """The optimizer's name if the twin learns, qualified if it only reached the target; otherwise ''."""
    reached, seeds = sum(steps is not None for steps in curves.steps_to_target), len(curves.steps_to_target)
    if curves.learns or not reached:
        return optimizer if curves.learns else ""
    return f"{optimizer} (for a time)" if reached == seeds else f"{optimizer} ({reached} of {seeds} seeds)"


@dataclass(frozen=True, eq=False)
class Comparison(Result):
    """A network with and without its shortcuts: everything ``skipscope compare`` measured.

    Every dict is keyed by the name of a :class:`Twin`.

    Attributes:
        subject: the network and the data in one line.
        summary: up to four sentences, each with its number.
        claims: the lecture's claims, each with its finding.
        twins: the networks compared.
        found: the shortcuts of each twin with shortcuts.
        flow: gradient flow; twins with shortcuts also have entries "NAME, removed" and "NAME, detached".
        split: branch against shortcut at each merge.
        paths: the exact path spectrum.
        training: the twins trained side by side, or None.
        depths: results at several depths, deepest last; empty for a user's own model.
        surfaces: "trained" (each twin from its own training) and "paired" (shared weights, pointwise
            difference).
        importance: the effect of removing each shortcut alone and of lesioning each branch alone.
        strength: gradient flow against shortcut strength.
        methods: a paragraph on how everything was measured.
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
        """Loss, accuracy and steps to the target under each optimizer, one row for each kind of shortcut.

        The first two rows are the network with and without its shortcuts. The layout follows table 1 of
        He et al. 2016 (arXiv 1603.05027).
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
            rows.append(
                [
                    twin.name,
                    len(self.found[twin.name]) if twin.name in self.found else 0,
                    flow.verdict.fall_decades if flow else None,
                    flow.verdict.state if flow else "-",
                    self.paths[twin.name].mean_length if twin.name in self.paths else None,
                    learns,
                ]
            )
        return Table(
            self.subject,
            ["network", "shortcuts", "fall (decades)", "verdict", "mean path", "learns under"],
            rows,
            [*self.summary, *(f"({note})" for note in self.notes)],
        )
