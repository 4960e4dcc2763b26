"""Helpers for trainer callbacks: the options of ``watch`` for each run, and the latest total norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skipscope.monitor._record import Record, scalars
from skipscope.monitor.history import History, VerdictEvent


def options_of_run(options: dict[str, Any], step: int) -> dict[str, Any]:
    """Options of ``watch`` for a training that begins at the trainer's ``step``.

    If the folder already holds a history, it is continued if the trainer resumes or with ``resume=True``;
    otherwise the new run gets ``folder/2``, ``folder/3``, ...

    Args:
        options: options of ``watch``; ``resume=None``, the default, resumes if the trainer does.
        step: number of steps that the trainer has already made.
    """
    chosen = {**options, "first_step": step}
    resume = chosen.pop("resume", None)
    folder = chosen.get("folder")
    if folder is not None:
        latest, unused = _latest_and_unused(Path(folder))
        goes_on = latest is not None and (bool(step) if resume is None else bool(resume))
        chosen.update(folder=latest if goes_on else unused, resume=goes_on)
    return chosen


def _latest_and_unused(folder: Path) -> tuple[Path | None, Path]:
    """The last of ``folder``, ``folder/2``, ... with a history (or None), and the first without."""
    latest, candidate, n = None, folder, 1
    while (candidate / "monitor.json").exists():
        latest, n = candidate, n + 1
        candidate = folder / str(n)
    return latest, candidate


class LastNumbers:
    """Sink that keeps the total norms of the latest step for a trainer's own logger."""

    def __init__(self):
        self._values: dict[str, float] = {}

    def open(self, notes: list[str]) -> None:
        """Do nothing: there is nothing to keep."""

    def step(self, record: Record) -> None:
        """Keep the total norms; those of several optimizers are merged."""
        self._values.update(scalars(record, parameters=False))

    def event(self, event: VerdictEvent) -> None:
        """Do nothing: events are not scalars."""

    def close(self, history: History) -> None:
        """Do nothing: there is nothing to close."""

    def take(self) -> dict[str, float]:
        """Return the scalars since the last call, and clear them."""
        values, self._values = self._values, {}
        return values
