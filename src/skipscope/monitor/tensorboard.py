"""Sink for TensorBoard (extra ``tensorboard``)."""

from __future__ import annotations

from typing import Any

from skipscope._errors import MissingExtra
from skipscope.monitor._record import Record, scalars
from skipscope.monitor.history import History, VerdictEvent


class TensorBoard:
    """Sink that logs total norms at every recorded step, those of each parameter less often, and verdicts.

    Args:
        to: a folder, or a ``SummaryWriter`` of your own (left open).
        every: number of recorded steps between logs of each parameter's scalars.

    Raises:
        MissingExtra: tensorboard is not installed.
    """

    def __init__(self, to: Any = "runs", every: int = 10):
        self.every, self._count = every, 0
        self._own = isinstance(to, str) or hasattr(to, "__fspath__")
        if self._own:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MissingExtra("watch", "tensorboard") from error
            to = SummaryWriter(str(to))
        self.writer: Any = to

    def open(self, notes: list[str]) -> None:
        """Write the notes as text."""
        if notes:
            self.writer.add_text("skipscope/notes", "\n\n".join(notes), 0)

    def step(self, record: Record) -> None:
        """Log the scalars of a step."""
        values = scalars(record, parameters=self._count % self.every == 0)
        for name, value in values.items():
            self.writer.add_scalar(name, value, record.step)
        self._count += 1

    def event(self, event: VerdictEvent) -> None:
        """Write the new verdict as text."""
        self.writer.add_text("skipscope/verdict", str(event), event.step)

    def close(self, history: History) -> None:
        """Write the last verdict as text."""
        self.writer.add_text("skipscope/verdict", str(history.verdict), history.verdict.step)
        self.writer.flush()
        if self._own:
            self.writer.close()
