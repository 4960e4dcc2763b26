"""Sink for Trackio (extra ``trackio``)."""

from __future__ import annotations

import importlib
from typing import Any

from skipscope._errors import MissingExtra
from skipscope.monitor._record import Record, scalars
from skipscope.monitor.history import History, VerdictEvent


class Trackio:
    """Sink that logs total norms at every recorded step, those of each parameter less often, and verdicts.

    Args:
        run: a Trackio run (left open); by default a new run of the project ``skipscope``, finished on close.
        every: number of recorded steps between logs of each parameter's scalars.

    Raises:
        MissingExtra: trackio is not installed.
    """

    def __init__(self, run: Any = None, every: int = 10):
        try:
            trackio: Any = importlib.import_module("trackio")
        except ImportError as error:
            raise MissingExtra("watch", "trackio") from error
        self._own = run is None
        self.run: Any = run if run is not None else trackio.init(project="skipscope")
        self.every, self._count = every, 0

    def open(self, notes: list[str]) -> None:
        """Do nothing: notes are not logged."""

    def step(self, record: Record) -> None:
        """Log the scalars of a step."""
        self.run.log(scalars(record, parameters=self._count % self.every == 0), step=record.step)
        self._count += 1

    def event(self, event: VerdictEvent) -> None:
        """Log the new verdict."""
        self.run.log({"skipscope/verdict": str(event)}, step=event.step)

    def close(self, history: History) -> None:
        """Log the last verdict."""
        self.run.log({"skipscope/verdict": str(history.verdict)}, step=history.verdict.step)
        if self._own:
            self.run.finish()
