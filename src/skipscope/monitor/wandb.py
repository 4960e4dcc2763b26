"""Sink for Weights & Biases (extra ``wandb``), online or offline."""

from __future__ import annotations

import importlib
from typing import Any

from skipscope._errors import MissingExtra
from skipscope.monitor._record import Record, scalars
from skipscope.monitor.history import History, VerdictEvent


class WandB:
    """Sink that logs total norms at every recorded step, those of each parameter less often, and verdicts.

    The x axis is ``skipscope/step``. Scalars are committed with your own next ``run.log``, so that your step
    count does not change; in a run that this sink began they are committed at once.

    Args:
        run: a W&B run; by default the active run, or a new run.
        every: number of recorded steps between logs of each parameter's scalars.

    Raises:
        MissingExtra: wandb is not installed.
    """

    def __init__(self, run: Any = None, every: int = 10):
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise MissingExtra("watch", "wandb") from error
        run = run or wandb.run
        self._own = run is None
        self.run = run or wandb.init()
        self.every, self._count = every, 0

    def open(self, notes: list[str]) -> None:
        """Define the x axis of the scalars, and store the notes in the summary."""
        self.run.define_metric("skipscope/step")
        for group in ("gradients/*", "gradient_rms/*", "gradient_mean_abs/*", "skipscope/verdict"):
            self.run.define_metric(group, step_metric="skipscope/step")
        self.run.summary["skipscope/notes"] = notes

    def step(self, record: Record) -> None:
        """Log the scalars of a step."""
        values = scalars(record, parameters=self._count % self.every == 0)
        self.run.log({**values, "skipscope/step": record.step}, commit=self._own)
        self._count += 1

    def event(self, event: VerdictEvent) -> None:
        """Log the new verdict."""
        self.run.log({"skipscope/verdict": str(event), "skipscope/step": event.step}, commit=self._own)
        self.run.summary["skipscope/state"] = event.verdict.state

    def close(self, history: History) -> None:
        """Store the last verdict in the summary."""
        self.run.summary["skipscope/state"] = history.verdict.state
        self.run.summary["skipscope/verdict_at_end"] = str(history.verdict)
        if self._own:
            self.run.finish()
