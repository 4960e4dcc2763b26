"""A sink for Weights & Biases (extra ``wandb``), online or offline."""

from __future__ import annotations

import importlib
from typing import Any

from skipscope._errors import MissingExtra
from skipscope.monitor._record import Record, scalars
from skipscope.monitor.history import History, VerdictEvent


class WandB:
    """Total norms at every recorded step, each parameter's at some; verdict changes as alerts.

    The x axis is ``skipscope/step``. Numbers go with your own next ``run.log``, so that your steps stay
    yours; into a run that this sink began they go at once.

    Args:
        run: a W&B run; by default the one under way, else a new one.
        every: recorded steps from one set of parameters' numbers to the next.

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
        """Say what the steps are."""
        self.run.define_metric("skipscope/step")
        for group in ("gradients/*", "gradient_rms/*", "gradient_mean_abs/*", "skipscope/verdict"):
            self.run.define_metric(group, step_metric="skipscope/step")
        self.run.summary["skipscope/notes"] = notes

    def step(self, record: Record) -> None:
        """Scalars."""
        values = scalars(record, parameters=self._count % self.every == 0)
        self.run.log({**values, "skipscope/step": record.step}, commit=self._own)
        self._count += 1

    def event(self, event: VerdictEvent) -> None:
        """The change."""
        self.run.log({"skipscope/verdict": str(event), "skipscope/step": event.step}, commit=self._own)
        self.run.summary["skipscope/state"] = event.verdict.state

    def close(self, history: History) -> None:
        """The last verdict."""
        self.run.summary["skipscope/state"] = history.verdict.state
        self.run.summary["skipscope/verdict_at_end"] = str(history.verdict)
        if self._own:
            self.run.finish()
