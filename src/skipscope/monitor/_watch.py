"""``watch``: one line around an ordinary training loop."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skipscope._errors import SkipscopeError
from skipscope._ranks import meet, world
from skipscope.monitor import _live_verdict, _torch_patches
from skipscope.monitor._flow_reader import FlowReader
from skipscope.monitor._history import History, LiveVerdict, VerdictEvent
from skipscope.monitor._record import Record
from skipscope.monitor._run_store import Store
from skipscope.monitor._sinks import Sink, Terminal, as_sink
from skipscope.monitor._start_checks import check, notes_on
from skipscope.monitor._step_recorder import StepRecorder
from skipscope.monitor._step_row import Step
from skipscope.monitor._tracked_parameters import named_models, unwrapped

_log = logging.getLogger("skipscope.monitor")
# The verdict is judged anew at rows 1, 2, 4, 8, ..., then at every so many; at once when a gradient is not finite.
_JUDGE_EVERY = 64


class Monitor:
    """A live recording; made by :func:`watch`, and a context manager.

    Attributes:
        history: everything recorded so far, a :class:`History`. Waits for numbers on their way from an accelerator.
        verdict: the verdict so far, a :class:`LiveVerdict`; says what it rests on.
    """

    def __init__(
        self, models: Mapping[str, nn.Module], optimizers: Sequence[torch.optim.Optimizer], *, every: int, keep: int | None,
        sinks: Sequence[Sink], folder: Path | None, on_verdict: Sequence[Callable[[VerdictEvent], Any]],
        flow_every: int | None,
    ):  # fmt: skip
        rank = world()[0]
        self._first = rank == 0
        self._sinks, self._on_verdict = list(sinks) if self._first else [], tuple(on_verdict)
        self._verdict = _live_verdict.UNKNOWN
        self._rows, self._judged = 0, 0
        self._open = True
        self._flow = (
            None
            if flow_every is None
            else FlowReader(next(iter(models.values())), flow_every, self._deliver_flow)
        )
        self._recorders = [
            StepRecorder(
                optimizer, i, models, every, self._deliver, None if i or not self._flow else self._stepped
            )
            for i, optimizer in enumerate(optimizers)
        ]
        self._tracked = self._recorders[0].tracked
        self._store = Store(keep, folder if self._first else None, notes_on(models, self._recorders))
        _torch_patches.register(self)
        for sink in list(self._sinks):
            self._tell(sink, "open", self._store.notes)
        if self._flow is not None:
            self._flow.begin(1)

    # --- what the user reads ---

    @property
    def history(self) -> History:
        """Everything recorded so far."""
        self._catch_up()
        return self._store.history(self._verdict, complete=not self._open)

    @property
    def verdict(self) -> LiveVerdict:
        """The verdict on the last few steps."""
        self._catch_up()
        return self._verdict

    def close(self) -> None:
        """Stop: torch, the model and the optimizers are as they were; files are closed. May be called twice."""
        if not self._open:
            return
        self._open = False
        _torch_patches.unregister(self)
        if self._flow is not None:
            self._flow.close()
        for recorder in self._recorders:
            recorder.close()
        self._judge()
        history = self._store.history(self._verdict, complete=True) if self._sinks else None
        for sink in list(self._sinks):
            self._tell(sink, "close", history)
        self._store.close()

    def __repr__(self) -> str:
        # What is known already: to print a monitor waits for nothing.
        steps = f"{self._rows:,} step{'s' * (self._rows != 1)} recorded"
        return f"<Monitor, {'open' if self._open else 'closed'}: {steps}; {self._verdict}>"

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what torch tells ---

    def wants_clips(self) -> bool:
        """Whether the coming step of an optimizer is recorded."""
        return any(recorder.due_next() for recorder in self._recorders)

    def clipped(self, parameters: list[Tensor], factor: Tensor, total: Tensor) -> None:
        """``clip_grad_norm_`` was called."""
        for recorder in self._recorders:
            recorder.clipped(parameters, factor, total)

    def clipped_by_value(self, parameters: list[Tensor]) -> None:
        """``clip_grad_value_`` was called."""
        for recorder in self._recorders:
            recorder.clipped(parameters, None, None)

    def scaled_step(self, optimizer: Any, scale: Tensor, step: Callable[[], Any]) -> Any:
        """``GradScaler.step`` was called."""
        for recorder in self._recorders:
            if recorder.optimizer is optimizer or getattr(optimizer, "optimizer", None) is recorder.optimizer:
                return recorder.scaled_step(scale, step)
        return step()

    def _stepped(self, step: int, scale: Tensor | None) -> None:
        assert self._flow is not None
        if self._recorders[0].refusal is None:
            self._flow.end(step, scale)
            if self._recorders[0].tracked is not self._tracked:
                self._tracked = self._recorders[0].tracked
                self._flow.forget_points()
            if self._flow.problem is not None and self._flow.problem not in self._store.notes:
                self._store.notes.append(self._flow.problem)
                warnings.warn(f"skipscope: {self._flow.problem}", stacklevel=2)
            self._flow.begin(step + 1)

    # --- what comes of it ---

    def _deliver_flow(self, names: tuple[str, ...], step: int, rms: np.ndarray) -> None:
        self._store.add_flow(names, step, rms)
        if self._rows:
            self._judge()

    def _deliver(self, recorder: StepRecorder, step: Step) -> None:
        row = step.row()
        self._store.add_gradients(recorder.index, step.tracked, row)
        self._rows += 1
        if self._sinks:
            record = Record.of(recorder.index, step.tracked, row, self._verdict)
            for sink in list(self._sinks):
                self._tell(sink, "step", record)
        n = self._rows
        if n % _JUDGE_EVERY == 0 or (n < _JUDGE_EVERY and n & (n - 1) == 0) or _is_bad(step, row):
            self._judge()

    def _catch_up(self) -> None:
        for recorder in self._recorders:
            recorder.hand_over(wait=True)
        if self._flow is not None:
            self._flow.hand_over(wait=True)
        if self._open and self._judged != self._rows:
            self._judge()

    def _judge(self) -> None:
        self._judged = self._rows
        refusal = next((s.refusal for s in self._recorders if s.refusal), None)
        before = self._verdict.state
        if refusal is not None:
            self._verdict = _live_verdict.refused(refusal, max(s.step for s in self._recorders))
        elif self._rows:
            self._verdict = self._store.verdict(before)
        if self._verdict.state != before:
            self._announce(VerdictEvent(self._verdict.step, before, self._verdict))

    def _announce(self, event: VerdictEvent) -> None:
        self._store.add_event(event)
        if self._first and not any(isinstance(sink, Terminal) for sink in self._sinks):
            good = event.verdict.state in {"healthy", "unknown"}
            _log.log(logging.INFO if good else logging.WARNING, "%s", event)
        for sink in list(self._sinks):
            self._tell(sink, "event", event)
        for callback in self._on_verdict:
            callback(event)

    def _tell(self, sink: Sink, what: str, value: Any) -> None:
        try:
            getattr(sink, what)(value)
        except SkipscopeError:
            raise
        except Exception as error:  # a logger that fails must not end a training
            self._sinks.remove(sink)
            warnings.warn(f"skipscope: {type(sink).__name__} failed, and is dropped: {error!r}", stacklevel=3)


def _is_bad(step: Step, row: Any) -> bool:
    """Whether a gradient that should be there is not finite: judged at once."""
    P = len(step.tracked.names)
    there = step.codes > 0
    return bool(there.any()) and not float(row[-2 * P : -P][there].sum()) < float("inf")


def watch(
    model: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    every: int = 1,
    flow_every: int | None = None,
    sinks: Iterable[Sink | str] = (),
    on_verdict: Callable[[VerdictEvent], Any] | Sequence[Callable[[VerdictEvent], Any]] = (),
    folder: str | Path | None = None,
    keep: int | None = None,
    timeout: float = 60.0,
) -> Monitor:
    """Record, at each optimizer step, the gradient that the optimizer receives.

    Per parameter: L2 norm (from it the RMS) and mean |dL/dw|; after accumulation, without GradScaler's scale, reduced
    under DDP, whole under FSDP2, after clipping; and the norm before clipping where torch's ``clip_grad_norm_`` did
    it. Nothing in the loop changes.

    Collective where ``torch.distributed`` is in use: every rank calls it. Only rank 0 prints and writes; the numbers
    and the verdict are the same on all.

    Args:
        model: a model, or several (a list, or a dict of names).
        optimizer: the optimizer that trains it, or several.
        every: record each such step, the first one always.
        flow_every: read the flow at the boundaries at each such step as well (of the first model), from the training's
            own passes; a compiled model runs those steps uncompiled.
        sinks: where to report as well: ``"terminal"``, ``"run.jsonl"``, ``"tensorboard:FOLDER"``, ``"wandb"``, or
            objects with ``open``, ``step``, ``event`` and ``close`` (see :class:`skipscope.monitor.Sink`).
        on_verdict: called with a :class:`VerdictEvent` when the state changes, on every rank.
        folder: where the history is written as it goes; read it with ``skipscope.load`` or ``skipscope show``, also
            while the run goes on or after it was killed. By default it is kept in memory only.
        keep: most rows in memory; when they are full every second is dropped. By default as many as take about 2 MB
            (405 of a GPT's 148 parameters, at most 1,000). The folder keeps all.
        timeout: seconds to wait for the other ranks' call.

    Returns:
        A :class:`Monitor`: a context manager, or call its ``close()``.

    Raises:
        SkipscopeError: the optimizer's steps cannot be seen, it does not train the model, the parameters are spread in
            a way that cannot be made whole, or a rank is missing.
        MissingExtra: a sink's package is not installed.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with watch(model, optimizer) as monitor:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         model(torch.ones(2, 4)).square().mean().backward()
        ...         optimizer.step()
        >>> monitor.history.rms.shape
        (3, 4)
    """
    models = named_models(model)
    optimizers = [unwrapped(o) for o in (optimizer if isinstance(optimizer, list | tuple) else [optimizer])]
    check(models, optimizers, every, flow_every, keep)
    meet("watch", tuple(range(world()[1])), timeout)
    callbacks = on_verdict if isinstance(on_verdict, Sequence) else [on_verdict]
    first = world()[0] == 0
    return Monitor(
        models, optimizers, every=every, keep=keep, sinks=[as_sink(s) for s in sinks] if first else [],
        folder=None if folder is None else Path(folder), on_verdict=callbacks, flow_every=flow_every,
    )  # fmt: skip
