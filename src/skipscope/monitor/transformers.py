"""A callback for Hugging Face's Trainer (extra ``hf``)."""

from __future__ import annotations

from typing import Any

from skipscope._errors import MissingExtra
from skipscope.monitor._watch import Monitor, watch

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingExtra("watch", "transformers", "hf") from error


class WatchCallback(TrainerCallback):  # type: ignore[misc]
    """Watches the model from the start of training to its end: ``Trainer(..., callbacks=[WatchCallback()])``.

    The numbers are what the optimizer receives: after the trainer's accumulation, unscaling and clipping, the norm
    before clipping beside it (the trainer clips by torch's ``clip_grad_norm_``, which is seen).

    Args:
        options: as for ``skipscope.watch``.

    Attributes:
        monitor: the :class:`Monitor`; None before training.
    """

    def __init__(self, **options: Any):
        self.options = options
        self.monitor: Monitor | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model=None, optimizer=None, **kwargs: Any
    ) -> None:
        """The model is where it will train, and the optimizer exists."""
        self.close()
        self.monitor = watch(model, optimizer, **self.options)  # type: ignore[arg-type]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Over."""
        self.close()

    def close(self) -> None:
        """Stop; the trainer tells nobody of a training that raised."""
        if self.monitor is not None:
            self.monitor.close()
