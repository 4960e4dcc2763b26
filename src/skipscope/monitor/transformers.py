"""Callback for the Trainer of Hugging Face (extra ``hf``)."""

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
    """Callback that watches the model during training: ``Trainer(..., callbacks=[WatchCallback()])``.

    Recorded are the gradients that the optimizer receives: after the trainer's accumulation, unscaling and
    clipping; also the norm before clipping, as the trainer calls torch's ``clip_grad_norm_``. The total norms
    are added to the trainer's ``state.log_history``. Steps are counted as in the trainer. If it resumes from
    a checkpoint, the history in ``folder`` continues. A second ``train`` from the start is a new run, in
    ``folder/2``, ``folder/3``, ...; ``resume=True`` or ``False`` overrides this.

    The trainer has no event for a training that raised: close the callback, or use it in a ``with``.

    Args:
        log: whether to add the total norms to the trainer's log.
        options: options of ``skipscope.watch``.

    Attributes:
        monitor: the :class:`Monitor`, or None before training.

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
        """Begin to watch: the optimizer exists, and the model is on its device."""
        self.close()
        options = options_of_run(self.options, state.global_step)
        options["sinks"] = [*options.get("sinks", ()), *([self._numbers] if self.log else [])]
        self.monitor = watch(model, optimizer, **options)  # type: ignore[arg-type]

    def on_log(self, args: Any, state: Any, control: Any, logs=None, **kwargs: Any) -> None:
        """Add the total norms to the trainer's latest log entry."""
        values = self._numbers.take()
        if logs is not None:
            logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the monitor."""
        self.close()

    def close(self) -> None:
        """Close the monitor. May be called twice."""
        if self.monitor is not None:
            self.monitor.close()
