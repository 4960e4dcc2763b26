"""Recorder of the gradients that an optimizer receives at each of its steps.

The gradients are read in the optimizer's step hook, after accumulation, reduction and clipping. On the host
the numbers are available at once; from an accelerator they arrive later, in order, and are delivered at a
later step.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skipscope._ranks import world
from skipscope.monitor.recording import _rank_sums
from skipscope.monitor.recording._step_row import (
    Clip,
    Step,
    clip_of,
    codes_of,
    local_sums,
    on_its_way,
    whole_sums,
)
from skipscope.monitor.recording._tracked_parameters import same_members, track

# Most steps with pending transfers from an accelerator before the oldest is waited for.
_IN_FLIGHT = 64


class StepRecorder:
    """Recorder of one optimizer.

    Args:
        optimizer: a torch optimizer.
        index: index among the watched optimizers.
        models: models by prefix.
        every: record every n-th step, starting with the first.
        deliver: function called with this recorder and each finished :class:`Step`, in order.
        outer: wrappers around the optimizer.
        first_step: number of steps made before the watch.
        begun: beginning of the watch by ``time.perf_counter``, common to all optimizers.

    Attributes:
        step: number of steps so far, including skipped steps and ``first_step``.
        rows: number of recorded steps.
        refusal: why recording has stopped, or None.
        received: function called with ``index`` and GradScaler's scale (or None) at each step, recorded or
            not, when the gradients are final.
        stepped: function called with this recorder after each step.
        outer: wrappers around the optimizer, whose ``step`` calls the optimizer's.
        late: whether another step pre-hook was registered after this recorder's.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        index: int,
        models: Mapping[str, nn.Module],
        every: int,
        deliver: Callable[[StepRecorder, Step], None],
        begun: float,
        outer: Sequence[Any] = (),
        first_step: int = 0,
    ):
        self.optimizer, self.index, self.models, self.every = optimizer, index, models, every
        self.deliver, self.outer = deliver, tuple(outer)
        self.received: Callable[[int, Tensor | None], None] | None = None
        self.stepped: Callable[[StepRecorder], None] | None = None
        self.ranks = world()[1]
        self.step = self.first_step = first_step
        self._depth = self.rows = 0
        self.refusal: str | None = None
        self._wide = False
        self.scale: Tensor | None = None
        self._clips: list[Clip] = []
        self._steps: deque[Step] = deque()
        self._begun = begun
        self.late = self._is_late = False
        self._track()
        self._checked = self.ranks == 1 or self.sharded
        # The hooks must not be compiled as part of a compiled optimizer.step.
        before: Any = torch.compiler.disable(self._before)
        after: Any = torch.compiler.disable(self._after)
        self._hooks = optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)

    def _track(self) -> None:
        self.tracked = track(self.optimizer, self.index, self.models)
        self.sharded = self.ranks > 1 and any(hasattr(p, "placements") for p in self.tracked.parameters)
        for name, parameter in zip(self.tracked.names, self.tracked.parameters):
            _rank_sums.check_mesh(name, parameter, self.ranks)

    def due(self, step: int) -> bool:
        """Whether this step is recorded."""
        return (step - self.first_step - 1) % self.every == 0 and self.refusal is None

    def due_next(self) -> bool:
        """Whether the next step is recorded or, inside a closure, the current step."""
        return self.due(self.step + 1) or self.due(self.step)

    # --- what torch calls ---

    def _before(
        self, optimizer: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        # If a subclass's step calls its parent's, both are hooked, but only the outer call is a step. The
        # call stack shows whether the depth is real or was left by an exception.
        self._depth = self._depth + 1 if self._depth and _nested(optimizer) else 1
        if self._depth > 1:
            return None
        self.step += 1
        due = self.due(self.step)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            # A later pre-hook may change the gradients, so they are then read after the step.
            self._is_late = next(reversed(optimizer._optimizer_step_pre_hooks)) != self._hooks[0].id
            self._receive()
            if due and not self._is_late:
                self._measure()
            return None
        if not due and self.received is None:
            return None
        self._drop_open()  # a step that raised before it was over
        evaluated = False

        def observed() -> Any:
            nonlocal evaluated
            result = closure()
            # The first evaluation gives the gradient at the start of the step; later ones are only counted.
            if not evaluated:
                evaluated = True
                self._receive()
                if due:
                    self._measure(open=True)
            if step := self._open_step():
                step.evaluations += 1
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": observed}
        return (args[0], observed, *args[2:]), kwargs

    def _after(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        if self._is_late:
            self._is_late, self.late = False, True
            if self.due(self.step):
                self._measure()
            hooks = self.optimizer._optimizer_step_pre_hooks
            hooks[self._hooks[0].id] = hooks.pop(self._hooks[0].id)  # the last one from now on
        if step := self._open_step():
            step.open = False
            self.hand_over()
        self._over()

    def _receive(self) -> None:
        if self.received is not None:
            self.received(self.index, self.scale)

    def _over(self) -> None:
        self._clips.clear()
        if self.stepped is not None:
            self.stepped(self)

    def is_step_of(self, optimizer: Any) -> bool:
        """Whether ``optimizer`` is the recorded optimizer or a wrapper of it."""
        return optimizer is self.optimizer or any(optimizer is outer for outer in self.outer)

    def clipped(self, parameters: Sequence[Tensor], factor: Tensor | None, total: Tensor | None) -> None:
        """Record that some gradients have just been clipped."""
        if self.due_next():
            clip = clip_of(parameters, self.tracked, factor, total)
            if clip is not None:
                self._clips.append(clip)

    def scaled_step(self, scale: Tensor, step: Callable[[], Any]) -> Any:
        """Run a step of GradScaler, and record it if it is skipped, as hooks are not called then."""
        before, self.scale = self.step, scale
        try:
            result = step()
            if self.step == before:
                self.step += 1
                self._receive()
                if self.due(self.step):
                    self._measure(skipped=True)
                self._over()
            return result
        finally:
            self.scale = None

    # --- measuring ---

    @torch.no_grad()
    def _measure(self, *, skipped: bool = False, open: bool = False) -> None:
        if not same_members(self.tracked, self.optimizer):
            self._track()
        grads = [p.grad for p in self.tracked.parameters]
        clips = [clip for clip in self._clips if clip.still_true()]
        step = Step(
            self.tracked,
            self.step,
            time.perf_counter() - self._begun,
            codes_of(self.tracked, grads),
            whole_sums(grads, self.ranks, self._wide)
            if self.sharded
            else local_sums(self.tracked, grads, self._wide),
            self.sharded,
            self._extras(clips, skipped),
            clips,
            open=open,
        )
        if not self._checked:
            self._check_ranks(step)
        if self.refusal is None:
            self._steps.append(step)
            self.hand_over()

    def _extras(self, clips: list[Clip], skipped: bool) -> dict[str, Any]:
        """Further numbers of the step, without waiting for an accelerator."""
        numbers: dict[str, Any] = {"skipped": float(skipped)}
        if self.scale is not None:
            numbers["loss_scale"] = self.scale
        if getattr(self.optimizer, "grad_scale", None) is not None:  # fused: it unscales inside its own step
            numbers["still_scaled"] = self.optimizer.grad_scale  # type: ignore[attr-defined]
        if getattr(self.optimizer, "found_inf", None) is not None:
            numbers["skipped"] = self.optimizer.found_inf  # type: ignore[attr-defined]
        for k, clip in enumerate(clips):
            if clip.factor is not None:
                numbers[f"factor{k}"], numbers[f"total{k}"] = clip.factor, clip.total
        return {key: on_its_way(number) for key, number in numbers.items()}

    def _check_ranks(self, step: Step) -> None:
        """Check at the first step that the gradients are equal on all ranks (collective)."""
        row = step.row()
        P = len(self.tracked.parameters)
        problem = _rank_sums.disagreement(self.tracked.names, np.nan_to_num(row[-3 * P : -2 * P]))
        self._checked = True
        if problem is not None:
            self.refusal = problem

    # --- handing over ---

    def _open_step(self) -> Step | None:
        return self._steps[-1] if self._steps and self._steps[-1].open else None

    def _drop_open(self) -> None:
        if self._open_step():
            self._steps.pop()

    def hand_over(self, *, wait: bool = False) -> None:
        """Deliver the steps whose numbers have arrived, or with ``wait`` all steps."""
        while self._steps and not self._steps[0].open:
            if not (wait or len(self._steps) > _IN_FLIGHT or self._steps[0].ready()):
                break
            step = self._steps.popleft()
            self.deliver(self, step)
            self._wide |= step.too_narrow

    def close(self) -> None:
        """Remove the hooks and deliver the remaining steps."""
        for hook in self._hooks:
            hook.remove()
        self._drop_open()
        self.hand_over(wait=True)
        self._clips.clear()


def _nested(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the hook is called from inside another hooked ``step`` of this optimizer."""
    hooked = type(optimizer).step.__code__  # torch's wrapper: one code for every class's step
    under_way = 0
    frame = sys._getframe(1)
    while frame is not None:
        under_way += frame.f_code is hooked and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return under_way > 1
