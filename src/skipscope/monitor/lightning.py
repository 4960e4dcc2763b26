"""A callback for Lightning (extra ``lightning``), and the one that ``SKIPSCOPE_WATCH`` adds to every trainer.

With ``SKIPSCOPE_WATCH`` set, Lightning finds this module by its entry point and every ``Trainer`` watches its
model, with no line changed: ``SKIPSCOPE_WATCH=1`` reports on the terminal, any other value is a folder for
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
    """Watches the module and its optimizers from the start of training to its end, also when it fails.

    The numbers are what each optimizer receives: after Lightning's accumulation, unscaling and clipping, the
    norm before clipping beside it (Lightning clips by torch's ``clip_grad_norm_``, which is seen). Steps are
    counted as the trainer counts them; where it resumes from a checkpoint, so does the history in ``folder``.
    A second ``fit`` from the start is a new run, in ``folder/2``, ``folder/3``, ...; ``resume=True`` or
    ``False`` decides it otherwise.

    Args:
        log: hand the total norms to ``self.log``, for the trainer's own logger and progress bar.
        options: as for ``skipscope.watch``.

    Attributes:
        monitor: the :class:`Monitor`; None before training.
    """

    def __init__(self, *, log: bool = True, **options: Any):
        super().__init__()
        self.log, self.options = log, options
        self.monitor: Monitor | None = None
        self._numbers = LastNumbers()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Optimizers exist, and the model is where it will train."""
        self._close()
        optimizers = list(trainer.optimizers)
        # The trainer counts the steps of all optimizers together.
        options = options_of_run(self.options, trainer.global_step // max(1, len(optimizers)))
        options["sinks"] = [*options.get("sinks", ()), *([self._numbers] if self.log else [])]
        self.monitor = watch(pl_module, optimizers, **options)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log what was recorded."""
        values = self._numbers.take()
        if values:
            pl_module.log_dict(values, rank_zero_only=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Over."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Failed or interrupted."""
        self._close()

    def _close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()


def callbacks_from_environment() -> list[Any]:
    """What Lightning adds to every trainer: nothing, unless ``SKIPSCOPE_WATCH`` is set."""
    where = os.environ.get("SKIPSCOPE_WATCH", "")
    if where in {"", "0"}:
        return []
    if where == "1":
        return [WatchCallback(sinks=["terminal"])]
    return [WatchCallback(sinks=["terminal"], folder=where)]
