"""Sink for MLflow (extra ``mlflow``)."""

from __future__ import annotations

import importlib
from typing import Any

from skipscope._errors import MissingExtra
from skipscope.monitor._record import Record, scalars
from skipscope.monitor.history import History, VerdictEvent


class MLflow:
    """Sink that logs total norms at every recorded step, those of each parameter less often, and verdicts.

    They are logged to the active run, or to a new run that this sink begins and ends.

    Args:
        every: number of recorded steps between logs of each parameter's scalars.

    Raises:
        MissingExtra: mlflow is not installed.
    """

    def __init__(self, every: int = 10):
        try:
            self.mlflow: Any = importlib.import_module("mlflow")
        except ImportError as error:
            raise MissingExtra("watch", "mlflow") from error
        self._own = self.mlflow.active_run() is None
        self.run: Any = self.mlflow.start_run() if self._own else self.mlflow.active_run()
        self.every, self._count = every, 0

    def open(self, notes: list[str]) -> None:
        """Set the notes as a tag."""
        if notes:
            self._tag("skipscope/notes", " ".join(notes))

    def step(self, record: Record) -> None:
        """Log the scalars of a step."""
        values = scalars(record, parameters=self._count % self.every == 0)
        self.mlflow.log_metrics(values, step=record.step, run_id=self.run.info.run_id)
        self._count += 1

    def event(self, event: VerdictEvent) -> None:
        """Set the new state as a tag."""
        self._tag("skipscope/state", event.verdict.state)

    def close(self, history: History) -> None:
        """Set the last verdict as tags."""
        self._tag("skipscope/state", history.verdict.state)
        self._tag("skipscope/verdict", str(history.verdict))
        if self._own:
            self.mlflow.end_run()

    def _tag(self, name: str, value: str) -> None:
        self.mlflow.MlflowClient().set_tag(self.run.info.run_id, name, value[:5000])
