"""A sink for Trackio (extra ``trackio``)."""

from __future__ import annotations

import importlib
from typing import Any

from skipscope._errors import MissingExtra
from skipscope.monitor._record import Record, scalars
from skipscope.monitor.history import History, VerdictEvent


class Trackio:
    """Total norms at every recorded step, each parameter's at some; changes of the verdict as text.

    Args:
        run: a Trackio run (left open); by default one of the project ``skipscope``, finished at the end.
        every: recorded steps from one set of parameters' numbers to the next.

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
        """Nothing to say."""

    def step(self, record: Record) -> None:
        """Scalars."""
        self.run.log(scalars(record, parameters=self._count % self.every == 0), step=record.step)
        self._count += 1

    def event(self, event: VerdictEvent) -> None:
        """The change."""
        self.run.log({"skipscope/verdict": str(event)}, step=event.step)

    def close(self, history: History) -> None:
        """The last verdict."""
        self.run.log({"skipscope/verdict": str(history.verdict)}, step=history.verdict.step)
        if self._own:
            self.run.finish()
