"""Accelerate (extra ``accelerate``): a tracker that runs ``watch``, and a sink for other trackers."""

from __future__ import annotations

from typing import Any

from torch import nn

from skipscope._errors import MissingExtra
from skipscope.monitor._record import Record, scalars
from skipscope.monitor._trainer_runs import options_of_run
from skipscope.monitor._watch import Monitor, watch
from skipscope.monitor.history import History, VerdictEvent

try:
    from accelerate.tracking import GeneralTracker
except ImportError as error:
    raise MissingExtra("watch", "accelerate") from error


class WatchTracker(GeneralTracker):
    """Tracker for Accelerate: ``Accelerator(log_with=WatchTracker(folder="run"))``.

    After ``prepare`` call ``accelerator.get_tracker("skipscope").watch(model, optimizer)``, on every process.
    ``end_training`` ends the watch.

    Args:
        options: options of ``skipscope.watch``.

    Attributes:
        logged: arguments of ``accelerator.log``: ``(step, values)``.
    """

    name = "skipscope"
    requires_logging_directory = False
    main_process_only = False  # watching is collective

    def __init__(self, **options: Any):
        super().__init__()
        self.options, self.monitor = options, None
        self.configuration: dict[str, Any] = {}
        self.logged: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> Monitor | None:
        """The :class:`Monitor`, or None before :meth:`watch`."""
        return self.monitor

    def watch(self, model: nn.Module, optimizer: Any, first_step: int = 0) -> Monitor:
        """Begin to watch a model and optimizer from ``accelerator.prepare`` (collective).

        Args:
            model: the prepared model.
            optimizer: the prepared optimizer, or several.
            first_step: number of steps made before, if the training is resumed: the history in ``folder`` is
                then continued. Otherwise, if ``folder`` holds a history, the new run gets ``folder/2``,
                ``folder/3``, ...
        """
        self.finish()
        self.monitor = watch(model, optimizer, **options_of_run(self.options, first_step))
        return self.monitor

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Store the settings of the run."""
        self.configuration.update(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Keep the user's values in ``logged``."""
        self.logged.append((step, values))

    def finish(self) -> None:
        """Stop watching."""
        if self.monitor is not None:
            self.monitor.close()


class AccelerateLog:
    """Sink that logs the monitor's scalars to every tracker of an ``Accelerator``.

    Args:
        accelerator: the Accelerator, after ``init_trackers``.
        every: number of recorded steps between logs of each parameter's scalars.
    """

    def __init__(self, accelerator: Any, every: int = 10):
        self.accelerator, self.every, self._count = accelerator, every, 0

    def open(self, notes: list[str]) -> None:
        """Do nothing: notes are not logged."""

    def step(self, record: Record) -> None:
        """Log the scalars of a step."""
        self.accelerator.log(scalars(record, parameters=self._count % self.every == 0), step=record.step)
        self._count += 1

    def event(self, event: VerdictEvent) -> None:
        """Log the new verdict."""
        self.accelerator.log({"skipscope/verdict": str(event)}, step=event.step)

    def close(self, history: History) -> None:
        """Log the last verdict."""
        self.accelerator.log({"skipscope/verdict": str(history.verdict)}, step=history.verdict.step)
