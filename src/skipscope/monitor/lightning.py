"""A callback for Lightning (extra ``lightning``), and the one that ``SKIPSCOPE_WATCH`` adds to every trainer.

With ``SKIPSCOPE_WATCH`` set, Lightning finds this room by its entry point and every ``Trainer`` watches its model, with
no line changed: ``SKIPSCOPE_WATCH=1`` reports on the terminal, any other value is a folder for the history.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from skipscope._errors import MissingExtra
from skipscope.monitor._watch import Monitor, watch

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise MissingExtra("watch", "lightning", "lightning") from error


class WatchCallback(Callback):
    """Watches the module and its optimizers from the start of training to its end, also when it fails.

    The numbers are what each optimizer receives: after Lightning's accumulation, unscaling and clipping, the norm
    before clipping beside it (Lightning clips by torch's ``clip_grad_norm_``, which is seen).

    Args:
        options: as for ``skipscope.watch``.

    Attributes:
        monitor: the :class:`Monitor`; None before training.
    """

    def __init__(self, **options: Any):
        super().__init__()
        self.options = options
        self.monitor: Monitor | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Optimizers exist, and the model is where it will train."""
        self._close()
        self.monitor = watch(pl_module, list(trainer.optimizers), **self.options)

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
    return [WatchCallback(sinks=["terminal"], folder=_unused(Path(where)))]


def _unused(folder: Path) -> Path:
    """The folder, or the first of ``folder/2``, ``folder/3``, ... that holds no history yet."""
    taken, n = folder, 1
    while (taken / "monitor.json").exists():
        n += 1
        taken = folder / str(n)
    return taken
