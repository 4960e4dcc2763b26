"""What a trainer's callback hands to ``watch``: the trainer's step, and a folder for each run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skipscope.monitor._record import Record, scalars
from skipscope.monitor.history import History, VerdictEvent


def options_of_run(options: dict[str, Any], step: int) -> dict[str, Any]:
    """The options of ``watch`` for a training that begins at the trainer's ``step``.

    A folder that already holds a history is gone on with where the trainer resumes, or where ``resume=True``
    asks for it; else the new run gets ``folder/2``, ``folder/3``, ...

    Args:
        options: as for ``watch``; ``resume`` may be None, its default: as the trainer does.
        step: steps that the trainer has made before.
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
    """The last of ``folder``, ``folder/2``, ... that holds a history, and the first that holds none."""
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
        """Nothing to keep."""

    def step(self, record: Record) -> None:
        """Keep the numbers; those of several optimizers stand side by side."""
        self._values.update(scalars(record, parameters=False))

    def event(self, event: VerdictEvent) -> None:
        """Nothing to keep: events are no numbers."""

    def close(self, history: History) -> None:
        """Nothing to close."""

    def take(self) -> dict[str, float]:
        """What has come since the last time."""
        values, self._values = self._values, {}
        return values
