"""A callback for Hugging Face's Trainer (extra ``hf``)."""

from __future__ import annotations

from typing import Any

from skipscope._errors import MissingExtra
from skipscope.monitor._trainer_runs import LastNumbers, options_of_run
from skipscope.monitor._watch import Monitor, watch

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingExtra("watch", "transformers") from error


class WatchCallback(TrainerCallback):  # type: ignore[misc]
    """Watches the model from the start of training to its end: ``Trainer(..., callbacks=[WatchCallback()])``.

    The numbers are what the optimizer receives: after the trainer's accumulation, unscaling and clipping, the
    norm before clipping beside it (the trainer clips by torch's ``clip_grad_norm_``, which is seen). The
    total norms stand in the trainer's ``state.log_history`` with its own. Steps are counted as the trainer
    counts them; where it resumes from a checkpoint, the history in ``folder`` continues. A second ``train``
    from the start is a new run, in ``folder/2``, ``folder/3``, ...; ``resume=True`` or ``False`` decides it
    otherwise.

    The trainer tells nobody of a training that raised: close the callback, or use it in a ``with``.

    Args:
        log: hand the total norms to the trainer's log.
        options: as for ``skipscope.watch``.

    Attributes:
        monitor: the :class:`Monitor`; None before training.

    Example:
        with WatchCallback(flow_every=100) as callback:
            Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    """

    def __init__(self, *, log: bool = True, **options: Any):
        self.log, self.options = log, options
        self.monitor: Monitor | None = None
        self._numbers = LastNumbers()

    def __enter__(self) -> WatchCallback:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model=None, optimizer=None, **kwargs: Any
    ) -> None:
        """The model is where it will train, and the optimizer exists."""
        self.close()
        options = options_of_run(self.options, state.global_step)
        options["sinks"] = [*options.get("sinks", ()), *([self._numbers] if self.log else [])]
        self.monitor = watch(model, optimizer, **options)  # type: ignore[arg-type]

    def on_log(self, args: Any, state: Any, control: Any, logs=None, **kwargs: Any) -> None:
        """Add the numbers to the entry that the trainer has just made."""
        values = self._numbers.take()
        if logs is not None:
            logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Over."""
        self.close()

    def close(self) -> None:
        """Stop; may be called twice."""
        if self.monitor is not None:
            self.monitor.close()
