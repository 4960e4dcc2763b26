"""Callback for Lightning (extra ``lightning``), which ``SKIPSCOPE_WATCH`` adds to every trainer.

With ``SKIPSCOPE_WATCH`` set, Lightning finds this module by its entry point, and every ``Trainer`` watches
its model without changed code: ``SKIPSCOPE_WATCH=1`` reports on the terminal, any other value is a folder for
the history.
"""

from __future__ import annotations

import os
from typing import Any

from skipscope._errors import MissingExtra
from skipscope.monitor._trainer_runs import LastNumbers, options_of_run
from skipscope.monitor._watch import Monitor, watch

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise MissingExtra("watch", "lightning") from error


class WatchCallback(Callback):
    """Callback that watches the module and its optimizers during training, even if the training fails.

    Recorded are the gradients that each optimizer receives: after Lightning's accumulation, unscaling and
    clipping; also the norm before clipping, as Lightning calls torch's ``clip_grad_norm_``. Steps are counted
    as in the trainer. If it resumes from a checkpoint, the history in ``folder`` continues. A second ``fit``
    from the start is a new run, in ``folder/2``, ``folder/3``, ...; ``resume=True`` or ``False`` overrides
    this.

    Args:
        log: whether to pass the total norms to ``self.log``, for the trainer's logger and progress bar.
        options: options of ``skipscope.watch``.

    Attributes:
        monitor: the :class:`Monitor`, or None before training.
    """

    def __init__(self, *, log: bool = True, **options: Any):
        super().__init__()
        self.log, self.options = log, options
        self.monitor: Monitor | None = None
        self._numbers = LastNumbers()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to watch: the optimizers exist, and the model is on its device."""
        self._close()
        optimizers = list(trainer.optimizers)
        # The trainer counts the steps of all optimizers together.
        options = options_of_run(self.options, trainer.global_step // max(1, len(optimizers)))
        options["sinks"] = [*options.get("sinks", ()), *([self._numbers] if self.log else [])]
        self.monitor = watch(pl_module, optimizers, **options)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log the recorded total norms."""
        values = self._numbers.take()
        if values:
            pl_module.log_dict(values, rank_zero_only=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the monitor."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the monitor after a failure or an interrupt."""
        self._close()

    def _close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()


def callbacks_from_environment() -> list[Any]:
    """Callbacks that Lightning adds to every trainer: none unless ``SKIPSCOPE_WATCH`` is set."""
    where = os.environ.get("SKIPSCOPE_WATCH", "")
    if where in {"", "0"}:
        return []
    if where == "1":
        return [WatchCallback(sinks=["terminal"])]
    return [WatchCallback(sinks=["terminal"], folder=where)]
