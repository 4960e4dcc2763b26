"""Result of training twins: their curves and steps to the target."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from skipscope._numbers import short
from skipscope._result import Result, Table


@dataclass(frozen=True, eq=False, repr=False)
class Curves:
    """One twin under one optimizer at its best rate.

    Attributes:
        rate: best learning rate of the sweep.
        sweep: learning rate -> smoothed final loss on ``sweep_seed``; inf if training diverged. Empty if only
            one rate was given.
        losses: training loss, [seeds, steps].
        update_ratio: |update| / |weights| over all weights, [seeds, steps].
        steps_to_target: first step at which each seed's smoothed loss is at or below the target; None: never.
        learns: whether the smoothed loss of every seed ends at or below the target.
        is_at_edge: whether the best rate is the largest or smallest tried: a rate beyond it may be better.
        sweep_seed: seed on which the rates were tried, not among those reported.
        train_accuracy: accuracy of each seed's trained network, in evaluation mode, on a tenth as many
            training batches as there were steps (at most one epoch); None for a run that diverged, and for
            all runs if the targets are not classes.
        test_accuracy: the same on the test data; None without test data.
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

    def __repr__(self) -> str:
        seeds, steps = self.losses.shape
        runs = f"{seeds} seed{'s' * (seeds != 1)} x {steps} steps"
        return f"Curves(rate={self.rate:g}, {runs}, final_loss={self.final_loss:.4g}, learns={self.learns})"


def smoothed(losses: np.ndarray, span: int = 10) -> np.ndarray:
    """Mean over the last ``span`` steps along the last axis; at the start over the steps so far."""
    padding = [(0, 0)] * (losses.ndim - 1) + [(span - 1, 0)]
    padded = np.pad(np.asarray(losses, dtype=float), padding)
    sums = np.lib.stride_tricks.sliding_window_view(padded, span, axis=-1).sum(-1)
    return sums / np.minimum(np.arange(losses.shape[-1]) + 1, span)


@dataclass(frozen=True, eq=False)
class Training(Result):
    """Twins trained side by side on the same batches: loss curves, steps to a target loss, update sizes.

    Attributes:
        curves: twin -> optimizer -> :class:`Curves`.
        target: the loss whose first crossing is counted.
        steps: optimizer steps per run.
        batch_size: samples per step.
        seeds: the seeds.
        varies: what differs between seeds: "initialisation and batch order", or "batch order only" (a module
            was given).
        notes: remarks on how the twins were trained.
        processes: number of worker processes, with one thread each; 1: this process trained everything.

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
    def networks(self) -> dict[str, dict[str, nn.Module]]:
        """Twin -> optimizer -> the first seed's network, trained at its best rate.

        Empty without ``train_twins(..., keep=True)``, and in a loaded result: files hold no networks.
        """
        return self.__dict__.get("_networks", {})

    def holding(self, networks: dict[str, dict[str, nn.Module]]) -> Training:
        """Attach trained networks, which are not saved, and return the result."""
        self.__dict__["_networks"] = networks
        return self

    @property
    def engine(self) -> dict[str, str]:
        """Twin -> "one by one". Earlier versions could also train stacked networks."""
        return dict.fromkeys(self.curves, "one by one")

    def learners(self, optimizer: str) -> list[str]:
        """The twins that learn under ``optimizer``."""
        return [name for name, by in self.curves.items() if optimizer in by and by[optimizer].learns]

    def steps_text(self, twin: str, optimizer: str) -> str:
        """Median steps to the target, or "> N" if most seeds do not reach it within N steps."""
        curves = self.curves[twin][optimizer]
        reached = curves.steps_to_target
        steps = sorted(np.inf if s is None else s for s in reached)
        middle = steps[len(steps) // 2]
        return f"> {curves.losses.shape[1]}" if np.isinf(middle) else f"{middle:.0f}"

    def accuracies(self, twin: str, optimizer: str) -> dict[str, float | None]:
        """Mean over seeds of "train accuracy" and "test accuracy", if any twin has them.

        Empty if the targets are not classes; a value is None if a run diverged.
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
                *(["acc.: accuracy, the share of samples that are classified correctly."] if heads else []),
                *self._edges(),
                *self.notes,
            ],
        )

    def _edges(self) -> list[str]:
        """Warn of each best rate at the edge of its sweep."""
        return [
            f"The best rate of {twin} under {optimizer}, {short(c.rate)}, is at the edge of the rates tried:"
            " a rate beyond it may be better."
            for twin, by in self.curves.items()
            for optimizer, c in by.items()
            if c.is_at_edge
        ]
