"""A sink for MLflow (extra ``mlflow``)."""

from __future__ import annotations

import importlib
from typing import Any

from skipscope._errors import MissingExtra
from skipscope.monitor._record import Record, scalars
from skipscope.monitor.history import History, VerdictEvent


class MLflow:
    """Total norms at every recorded step, each parameter's at some; the verdict as tags.

    They go to the run under way; else to one that this sink begins and ends.

    Args:
        every: recorded steps from one set of parameters' numbers to the next.

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
        """The notes."""
        if notes:
            self._tag("skipscope/notes", " ".join(notes))

    def step(self, record: Record) -> None:
        """Scalars."""
        values = scalars(record, parameters=self._count % self.every == 0)
        self.mlflow.log_metrics(values, step=record.step, run_id=self.run.info.run_id)
        self._count += 1

    def event(self, event: VerdictEvent) -> None:
        """The state from now on."""
        self._tag("skipscope/state", event.verdict.state)

    def close(self, history: History) -> None:
        """The last verdict."""
        self._tag("skipscope/state", history.verdict.state)
        self._tag("skipscope/verdict", str(history.verdict))
        if self._own:
            self.mlflow.end_run()

    def _tag(self, name: str, value: str) -> None:
        self.mlflow.MlflowClient().set_tag(self.run.info.run_id, name, value[:5000])
