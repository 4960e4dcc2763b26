"""``watch``: live recording of gradients in an ordinary training loop."""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skipscope import _torch_private
from skipscope._errors import SkipscopeError
from skipscope._ranks import RankGroup, meet, world
from skipscope._validation import is_integer
from skipscope.flow import FALL, size_of, tiny_scales
from skipscope.monitor._record import Record
from skipscope.monitor._sinks import Sink, Terminal, as_sink
from skipscope.monitor.history import STATES, History, LiveVerdict, VerdictEvent, _live_verdict
from skipscope.monitor.history._history import GRADIENTS
from skipscope.monitor.history._run_store import Recorded, Store, begin_folder
from skipscope.monitor.recording import _torch_patches
from skipscope.monitor.recording._backward_passes import inside_backward
from skipscope.monitor.recording._flow_reader import FlowReader, FlowRow
from skipscope.monitor.recording._missing_gradients import GradientSearch, MissingGradients
from skipscope.monitor.recording._start_checks import check, notes_on
from skipscope.monitor.recording._step_recorder import StepRecorder
from skipscope.monitor.recording._step_row import SCALARS, Step
from skipscope.monitor.recording._tracked_parameters import TrackedParameters, named_models
from skipscope.monitor.recording._weight_lines import LineSearch
from skipscope.monitor.recording._wrappers import inner_optimizers, innermost

_log = logging.getLogger("skipscope.monitor")
# The verdict is updated at rows 1, 2, 4, 8, ..., then at every 64th row, and at once when a gradient is not
# finite.
_JUDGE_EVERY = 64
# Steps between two verdicts on the flow, after the first few; reading ``monitor.verdict`` always updates it.
_JUDGE_FLOW_EVERY = 8
# In the first recorded steps, tensors that start at zero by design may block gradients; and in a few of these
# steps the causes of missing gradients are searched.
_EARLY_ROWS, _SEARCHES = 8, 3


class Monitor:
    """Live recording of a training, created by :func:`watch`; a context manager.

    Attributes:
        history: everything recorded so far, a :class:`History`. Waits for pending transfers from an
            accelerator.
        verdict: the verdict so far, a :class:`LiveVerdict`, with its basis.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = ss.reference.deep_mlp(4, width=16, shortcut="identity"), ss.reference.digits(32)
        >>> loss = torch.nn.functional.cross_entropy
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> monitor = ss.watch(model, optimizer, flow_every=1)
        >>> loss(model(data[0]), data[1]).backward()
        >>> optimizer.step()
        >>> monitor.close()
        >>> monitor.verdict.state, len(monitor.history.steps)
        ('healthy', 1)
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        optimizers: Sequence[tuple[torch.optim.Optimizer, tuple[Any, ...]]],
        *,
        every: int,
        keep: int | None,
        sinks: Sequence[Sink],
        folder: Path | None,
        on_verdict: Sequence[Callable[[VerdictEvent], Any]],
        flow_every: int | None,
        first_step: int | None,
        resume: bool,
    ):
        self._first = world()[0] == 0
        self._sinks, self._on_verdict = list(sinks) if self._first else [], tuple(on_verdict)
        self._verdict = _live_verdict.UNKNOWN
        self._rows, self._flow_rows, self._flow_judged = 0, 0, 0
        self._judged, self._judge_at_end = (0, 0), False
        self._open = True
        self._models = models
        before, found = RankGroup.everyone().done_by_first("watch", lambda: _begun(folder, resume))
        begun_at = found if first_step is None else first_step
        begun = time.perf_counter() - (before.seconds if before is not None else 0.0)
        self._recorders = [
            StepRecorder(optimizer, i, models, every, self._deliver, begun, outer, begun_at)
            for i, (optimizer, outer) in enumerate(optimizers)
        ]
        self._flow = None
        if flow_every is not None:
            self._flow = FlowReader(
                next(iter(models.values())),
                self._parameters_of_flow(),
                flow_every,
                self._deliver_flow,
                self._flow_read,
                begun_at,
            )
        for recorder in self._recorders:
            recorder.received, recorder.stepped = self._received, self._stepped
        self._tracked = [recorder.tracked for recorder in self._recorders]
        self._inside: set[int] = set()
        self._search: dict[int, GradientSearch] = {}
        self._to_search: set[int] = set()
        self._searched: dict[int, int] = {}
        self._missing: dict[int, MissingGradients] = {}
        self._zeros: dict[int, list[Tensor]] | None = None
        self._line_search: LineSearch | None = None
        self._line_owners: set[int] = set()  # whose step the search still waits for
        # All ranks must reach the same verdict, but a rank observes only its own forward passes.
        self._lines_wanted, self._lines_sought, self._lines_known = False, world()[1] > 1, False
        self._silent: set[str] = set()  # parameters that had no gradient in the first steps
        # Whether scales that are tiny by design damp branches; after the first step they are no longer equal.
        self._is_damped = any(tiny_scales(innermost(model)) for model in models.values())
        self._versions = [p._version for r in self._recorders for p in r.tracked.parameters[:8]]
        self._store = Store(
            keep, folder if self._first else None, notes_on(models, self._recorders), before, begun_at
        )
        _torch_patches.register(self)
        for sink in list(self._sinks):
            self._tell(sink, "open", self._store.notes)
        if self._flow is not None:
            self._flow.begin()

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
        """Stop recording, restore torch, models and optimizers, and close files. May be called twice."""
        if not self._open:
            return
        self._open = False
        _torch_patches.unregister(self)
        if self._flow is not None:
            self._flow.close()
        for search in self._search.values():
            search.close()
        if self._line_search is not None:
            self._line_search.close()
        for recorder in self._recorders:
            recorder.close()
        self._say_what_is_missing()
        self._judge()
        history = self._store.history(self._verdict, complete=True) if self._sinks else None
        for sink in list(self._sinks):
            self._tell(sink, "close", history)
        self._store.close(self._verdict)

    def watches(self, optimizer: Any) -> bool:
        """Whether steps of ``optimizer``, or of the optimizer that it wraps, are recorded here."""
        return self._open and any(recorder.is_step_of(optimizer) for recorder in self._recorders)

    def reads_flow_of(self, model: nn.Module) -> bool:
        """Whether this monitor reads the flow of ``model``."""
        return self._open and self._flow is not None and self._flow.model is innermost(model)

    def replaced(self) -> None:
        """Close, because a later ``watch`` takes over."""
        self._note("A later watch of the same optimizer or model took over, and this one was closed.")
        self.close()

    def _say_what_is_missing(self) -> None:
        """Add a note and a log line for everything that was not recorded, with its reason."""
        total = sum(recorder.step - recorder.first_step for recorder in self._recorders)
        if not total:
            now = [p._version for r in self._recorders for p in r.tracked.parameters[:8]]
            names = " and ".join(sorted({type(r.optimizer).__name__ for r in self._recorders}))
            reason = f"no step was recorded: step() of the watched {names} was never called"
            advice = ""
            if now != self._versions:
                reason += ", though the parameters changed"
                advice = "Watch the optimizer whose step() is called, or call step()."
            self._verdict = replace(self._verdict, reason=reason, advice=advice)
            if advice:
                self._note(f"{reason[0].upper()}{reason[1:]}. {advice}", loud=True)
            return
        for recorder in self._recorders if len(self._recorders) > 1 else ():
            if recorder.step == recorder.first_step:
                self._note(f"Optimizer {recorder.index} ({type(recorder.optimizer).__name__}) made no step.")
        why = self._flow.why_nothing() if self._flow is not None else None
        if why is not None:
            self._note(why, loud=True)

    def _note(self, text: str, *, loud: bool = False) -> None:
        if text not in self._store.notes:
            self._store.notes.append(text)
            if loud and self._first:
                _log.warning("%s", text)

    def __repr__(self) -> str:
        # Printing a monitor does not wait for the accelerator.
        steps = f"{self._rows:,} step{'s' * (self._rows != 1)} recorded"
        return f"<Monitor, {'open' if self._open else 'closed'}: {steps}; {self._verdict}>"

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- callbacks from torch ---

    def wants_clips(self) -> bool:
        """Whether the next step of any optimizer is recorded."""
        return any(recorder.due_next() for recorder in self._recorders)

    def clipped(self, parameters: list[Tensor], factor: Tensor, total: Tensor) -> None:
        """Notify the recorders of a call of ``clip_grad_norm_``."""
        for recorder in self._recorders:
            recorder.clipped(parameters, factor, total)

    def clipped_by_value(self, parameters: list[Tensor]) -> None:
        """Notify the recorders of a call of ``clip_grad_value_``."""
        for recorder in self._recorders:
            recorder.clipped(parameters, None, None)

    def scaled_step(self, optimizer: Any, scale: Tensor, step: Callable[[], Any]) -> Any:
        """Run a step of ``GradScaler.step`` through the recorder of its optimizer."""
        for recorder in self._recorders:
            if recorder.is_step_of(optimizer):
                return recorder.scaled_step(scale, step)
        return step()

    def _received(self, owner: int, scale: Tensor | None) -> None:
        if self._flow is not None and self._recorders[owner].refusal is None:
            self._flow.received(owner, scale)
        search = self._search.pop(owner, None)
        if search is not None:
            found = search.conclude()
            if found is None:
                self._missing.pop(owner, None)
            else:
                self._missing[owner] = found
                self._note(f"{found.reason[0].upper()}{found.reason[1:]}. {found.advice}")
            self._judge_soon()

    def _stepped(self, recorder: StepRecorder) -> None:
        if inside_backward():
            self._inside.add(recorder.index)
        if recorder.late:
            self._note(
                "A step pre-hook was registered after the watch began. Gradients are recorded after it; at"
                " its first step they were read after the step."
            )
        if recorder.tracked is not self._tracked[recorder.index]:
            self._tracked[recorder.index] = recorder.tracked
            if self._flow is not None:
                self._flow.replace_parameters(self._parameters_of_flow())
        self._follow_lines(recorder)
        if recorder.index in self._to_search and self._open and not inside_backward():
            self._to_search.discard(recorder.index)
            self._search[recorder.index] = GradientSearch(recorder.tracked, self._models)
        if self._flow is not None and recorder.refusal is None:
            self._flow.stepped(recorder.index, recorder.step)

    def _follow_lines(self, recorder: StepRecorder) -> None:
        """Observe a step of every optimizer to find the order of the layers, once a verdict depends on it."""
        if self._line_search is not None:
            self._line_owners.discard(recorder.index)
            if not self._line_owners:
                lines, self._line_search = self._line_search.conclude(), None
                if lines is not None:
                    self._lines_known = True
                    self._store.set_lines(lines)
                self._judge_soon()
        elif self._lines_wanted and self._open and not inside_backward():
            self._lines_wanted = False
            self._line_owners = {one.index for one in self._recorders if one.rows}
            self._line_search = LineSearch([one.tracked for one in self._recorders], self._models)

    def _weight_sizes(self) -> dict[str, float]:
        """L2 norms of the weights whose gradient can be judged relative to their size.

        Excluded are embedding tables, of which few rows are used, and weights without a gradient in the first
        steps, which may still grow from a tensor that started at 0. The result is empty if tiny scales (layer
        scale) damp branches by design, or if the order of the weights is not known.
        """
        if self._lines_sought and not (self._lines_known or self._lines_wanted or self._line_search):
            return {}
        if self._is_damped:
            return {}
        found = {
            name: p.detach()
            for recorder in self._recorders
            for tracked in [recorder.tracked]
            for name, p, role in zip(tracked.names, tracked.parameters, tracked.roles)
            if p.ndim > 1 and p.requires_grad and role != "table" and name not in self._silent
        }
        wide = {name: torch.promote_types(p.dtype, torch.float32) for name, p in found.items()}
        norms = {n: float(torch.linalg.vector_norm(p, dtype=wide[n])) for n, p in found.items()}
        return {name: size_of(p, norms[name]) for name, p in found.items()}

    def _is_order_awaited(self, verdict: LiveVerdict) -> bool:
        """Whether the verdict compares weights whose order and towers are to be found in a later step."""
        unsure = [
            one
            for one in verdict.chains or (verdict,)
            if one.basis == GRADIENTS
            and one.score is not None
            and one.state in {"vanishing", "exploding", "dead", "healthy"}
            and (one.state != "healthy" or one.score <= -FALL)
            # The order makes no difference if no weight gets a gradient.
            and (one.state != "dead" or self._gets_some())
        ]
        unsure += [one for one in verdict.chains or (verdict,) if one.starved]
        if not unsure or not self._open:
            return False
        if not self._lines_sought:
            self._lines_sought = self._lines_wanted = True
        is_coming = self._lines_wanted or self._line_search is not None
        return is_coming and any(one.state != "healthy" or one.starved for one in unsure)

    def _gets_some(self) -> bool:
        """Whether any recorded matrix had a gradient in the first steps."""
        tracked = [recorder.tracked for recorder in self._recorders]
        named = [(n, p) for one in tracked for n, p in zip(one.names, one.parameters)]
        return any(n not in self._silent for n, p in named if p.ndim > 1 and p.requires_grad)

    def _flow_read(self) -> None:
        assert self._flow is not None
        if self._flow.problem is not None and self._flow.problem not in self._store.notes:
            self._note(self._flow.problem)
            warnings.warn(f"skipscope: {self._flow.problem}", stacklevel=2)
        if self._flow.root:
            self._note(
                f"The flow is read in {self._flow.root}, the part of the model that the training calls."
            )

    def _parameters_of_flow(self) -> dict[int, list[Tensor]]:
        """Map each optimizer to its parameters in the model whose flow is read."""
        own = {id(p) for p in next(iter(self._models.values())).parameters()}
        found = {r.index: [p for p in r.tracked.parameters if id(p) in own] for r in self._recorders}
        return {owner: parameters for owner, parameters in found.items() if parameters}

    # --- what comes of it ---

    def _deliver_flow(self, row: FlowRow) -> None:
        self._store.add_flow(row)
        self._flow_rows += 1
        is_due = abs(row.step - self._flow_judged) >= _JUDGE_FLOW_EVERY or self._flow_rows < _JUDGE_FLOW_EVERY
        if self._rows and (is_due or np.isinf(row.norm).any()):
            self._flow_judged = row.step
            self._judge_soon()

    def _deliver(self, recorder: StepRecorder, step: Step) -> None:
        row = step.row()
        self._store.add_gradients(recorder.index, step.tracked, row, self._chains_of(recorder, step.tracked))
        self._rows += 1
        recorder.rows += 1
        if self._sinks:
            record = Record.of(recorder.index, step.tracked, row, self._verdict)
            for sink in list(self._sinks):
                self._tell(sink, "step", record)
        if recorder.rows <= _EARLY_ROWS:
            self._look_for_zeros(recorder, step, row)
        n = recorder.rows
        if n % _JUDGE_EVERY == 0 or (n < _JUDGE_EVERY and n & (n - 1) == 0) or _is_bad(step, row):
            self._judge_soon()

    def _chains_of(self, recorder: StepRecorder, tracked: TrackedParameters) -> list[str]:
        """Name the loss of each parameter: by its model, or by its optimizer if several update one model.

        Optimizers that step inside the same backward pass share its loss.
        """
        updates = Counter(prefix for r in self._recorders for prefix in set(r.tracked.models))
        alone = recorder.index in self._inside or inside_backward()
        return [
            prefix.rstrip(".")
            if updates[prefix] < 2 or alone
            else f"{prefix.rstrip('.')} optimizer {recorder.index}".strip()
            for prefix in tracked.models
        ]

    def _look_for_zeros(self, recorder: StepRecorder, step: Step, row: np.ndarray) -> None:
        """Look for parts that are zero by design and for missing gradients, in the first steps."""
        P = len(step.tracked.names)
        mean = row[-2 * P : -P]
        empty = (step.codes == -STATES.index("not_connected")) | ((step.codes > 0) & (mean == 0))
        if not empty.any():
            return
        self._silent |= {name for name, is_empty in zip(step.tracked.names, empty) if is_empty}
        if self._zeros is None:
            self._zeros = {r.index: _zero_by_design(r.tracked) for r in self._recorders}
        if not row[SCALARS.index("skipped")] and self._searched.get(recorder.index, 0) < _SEARCHES:
            self._searched[recorder.index] = self._searched.get(recorder.index, 0) + 1
            self._to_search.add(recorder.index)

    def _is_early(self) -> bool:
        """Whether it is too early to judge zero and missing gradients.

        This is the case before the second step of any optimizer that has stepped, and for a few more steps
        while tensors that started at zero by design are still exactly zero.
        """
        rows = [recorder.rows for recorder in self._recorders if recorder.rows]
        if not rows:
            return False
        if not self._open:
            # A single step does not show whether a tensor only starts at zero by design.
            return min(rows) < 2 and any((self._zeros or {}).values())
        if min(rows) < 2:
            return True
        if self._zeros is None or min(rows) > _EARLY_ROWS:
            return False
        waiting = any(not bool((p.detach() != 0).any()) for ps in self._zeros.values() for p in ps)
        if not waiting and any(self._zeros.values()):
            self._zeros = {owner: [] for owner in self._zeros}
            return True  # what they held back arrives with the next step
        return waiting

    def _catch_up(self) -> None:
        for recorder in self._recorders:
            recorder.hand_over(wait=True)
        if self._flow is not None:
            self._flow.hand_over(wait=True)
        if self._open and self._judged != (self._rows, self._flow_rows):
            self._judge()

    def _judge_soon(self) -> None:
        """Judge now, or at the end of the current backward pass, when all of the step is known."""
        if not inside_backward():
            self._judge()
        elif not self._judge_at_end:
            self._judge_at_end = True
            _torch_private.at_end_of_backward(self._judge_at_end_of_backward)

    def _judge_at_end_of_backward(self) -> None:
        self._judge_at_end = False
        if self._open:
            self._judge()

    def _judge(self) -> None:
        self._judged = self._rows, self._flow_rows
        refusal = next((s.refusal for s in self._recorders if s.refusal), None)
        before = self._verdict.state
        if refusal is not None:
            self._verdict = _live_verdict.refused(refusal, max(s.step for s in self._recorders))
        elif self._rows:
            is_early = self._is_early()
            sizes = {} if is_early else self._weight_sizes()
            found = self._store.verdict(
                self._verdict, self._missing, is_early=is_early, sizes=sizes, is_damped=self._is_damped
            )
            if not self._is_order_awaited(found):
                self._verdict = found
            elif self._verdict.state == "unknown":
                self._verdict = _live_verdict.awaiting(found)
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
    """Whether any gradient of the step is not finite, so that the verdict is updated at once."""
    P = len(step.tracked.names)
    there = step.codes > 0
    return bool(there.any()) and not float(row[-2 * P : -P][there].sum()) < float("inf")


def _zero_by_design(tracked: TrackedParameters) -> list[Tensor]:
    """Trained tensors, except biases, that are exactly 0: gates, zero-initialised norms, LoRA's B."""
    return [
        p
        for p, name, role in zip(tracked.parameters, tracked.names, tracked.roles)
        if p.requires_grad
        and role != "bias"
        and not name.endswith("bias")
        and not bool((p.detach() != 0).any())
    ]


def _begun(folder: Path | None, resume: bool) -> tuple[Recorded | None, int]:
    """Create or resume the folder of a run. Returns its record, if any, and the step to continue from."""
    before = begin_folder(folder, resume=resume) if folder is not None else None
    return before, 0 if before is None else before.step


def watch(
    model: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    every: int = 1,
    flow_every: int | None = None,
    sinks: Iterable[Sink | str | Callable[[int, dict[str, float]], Any]] = (),
    on_verdict: Callable[[VerdictEvent], Any] | Sequence[Callable[[VerdictEvent], Any]] = (),
    folder: str | Path | None = None,
    resume: bool = False,
    first_step: int | None = None,
    keep: int | None = None,
    timeout: float = 60.0,
) -> Monitor:
    """Record, at each optimizer step, the gradient that the optimizer receives.

    For each parameter: L2 norm (hence the RMS) and mean |dL/dw|, after accumulation and clipping, without
    GradScaler's scale, reduced under DDP, full under FSDP2; also the norm before clipping if it is done by
    torch's ``clip_grad_norm_``. The training loop is not changed.

    An optimizer is watched by one monitor at a time: a later ``watch`` of it closes the earlier monitor, for
    example when a notebook cell is run twice. Copies and files of the model made during the watch contain
    nothing of skipscope.

    Collective with ``torch.distributed``: every rank calls it. Only rank 0 prints and writes; the numbers and
    the verdict are the same on all ranks.

    Args:
        model: a model, or several (a list, or a dict of names).
        optimizer: the optimizer that trains it, or several.
        every: record every n-th step, starting with the first.
        flow_every: also read the flow at the boundaries (of the first model) every n-th step, from the
            training's own passes; a compiled model runs those steps uncompiled. Passes whose gradients the
            optimizer never receives do not count. If the training calls only a part of the model, the flow
            is read there.
        sinks: further outputs: ``"terminal"``, ``"run.jsonl"``, ``"run.csv"``, ``"tensorboard:FOLDER"``,
            ``"wandb"``, ``"mlflow"``, ``"trackio"``, any ``callable(step, values)``, or objects with
            ``open``, ``step``, ``event`` and ``close`` (see :class:`skipscope.monitor.Sink`).
        on_verdict: function called with a :class:`VerdictEvent` when the state changes, on every rank.
        folder: folder to which the history is written during the run; read it with ``skipscope.load`` or
            ``skipscope show``, even during the run or after a crash. By default it is kept in memory only.
        resume: continue the history that ``folder`` already holds; by default such a folder is refused.
        first_step: number of steps made before the watch, so that a resumed training continues its count; by
            default that of the resumed folder, or 0.
        keep: most rows in memory; when full, every second row is dropped. The default takes about 2 MB (405
            rows for a GPT with 148 parameters, at most 1,000). The folder keeps all rows.
        timeout: seconds to wait for the call on other ranks.

    Returns:
        A :class:`Monitor`, to be used as a context manager or closed with ``close()``.

    Raises:
        SkipscopeError: the optimizer's steps cannot be observed, it does not train the model, the parameters
            are sharded such that their gradients cannot be summed, or a rank is missing.
        MissingExtra: the package of a sink is not installed.

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
    given = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    optimizers = list({id(o): (o, outer) for each in given for o, outer in inner_optimizers(each)}.values())
    check(models, [o for o, _ in optimizers], every, flow_every, keep)
    if first_step is not None and not is_integer(first_step, 0):
        raise SkipscopeError(
            "watch",
            "first_step is the number of steps already made",
            expected="0 or more",
            got=repr(first_step),
            cure="first_step=trainer.global_step",
        )
    meet("watch", tuple(range(world()[1])), timeout)
    callbacks = on_verdict if isinstance(on_verdict, Sequence) else [on_verdict]
    made, _ = RankGroup.everyone().done_by_first("watch", lambda: ([as_sink(s) for s in sinks], None))
    for other in _torch_patches.registered():
        if isinstance(other, Monitor) and (
            any(other.watches(o) for o, _ in optimizers)
            or (flow_every is not None and other.reads_flow_of(next(iter(models.values()))))
        ):
            other.replaced()
    return Monitor(
        models,
        optimizers,
        every=every,
        keep=keep,
        sinks=made or [],
        folder=None if folder is None else Path(folder),
        on_verdict=callbacks,
        flow_every=flow_every,
        first_step=first_step,
        resume=resume,
    )
