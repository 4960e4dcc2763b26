"""Backward passes that contribute to the gradients that an optimizer receives.

Between two steps there may be other backward passes: an adversarial attack on the inputs, a generator's step
through its discriminator, the first pass of sharpness-aware minimisation. Such a pass either computes no
gradient of the optimizer's parameters, or its gradients are cleared before the step. Both are detected from
``p.grad`` alone, without hooks on parameters: from its identity and version at the beginning and end of a
pass and at the optimizer's step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from skipscope import _torch_private

# Gradient tensor, referenced so that its id is not reused, and its version; None without a gradient.
GradientState = tuple[Tensor, int] | None


@dataclass(eq=False)
class BackwardPass:
    """A backward pass through the model.

    Attributes:
        by_hand: whether it is ``torch.autograd.grad`` with respect to parameters, whose result the user may
            assign or discard.
        partial: whether it computes requested gradients only, possibly not that of the model's input.
        before: ``p.grad`` of each parameter at its beginning.
        touched: parameters whose gradients contain its contribution; None while it runs.
        certain: optimizers that stepped while it ran.
        nonzero: a touched parameter, and whether its gradient was not 0 at the end of the pass.
    """

    by_hand: bool
    partial: bool
    before: list[GradientState]
    touched: set[int] | None = None
    certain: set[int] = field(default_factory=set)
    nonzero: tuple[int, Any] | None = None


class BackwardPasses:
    """Backward passes since the last step.

    Args:
        parameters: index of an optimizer -> the parameters of the model that it updates.
        gathered: function that maps ids of sharded parameters to the unsharded leaves of FSDP2.
    """

    def __init__(
        self, parameters: Mapping[int, Sequence[Tensor]], gathered: Callable[[], Mapping[int, Tensor]]
    ):
        self._gathered = gathered
        self.parameters = [p for group in parameters.values() for p in group]
        self.owners = [owner for owner, group in parameters.items() for _ in group]
        self.cleared = 0  # passes whose gradients were cleared before the step
        self._nodes: list[Any] = []
        self._by_task: dict[int, BackwardPass | None] = {}
        self._finished: list[BackwardPass] = []
        self._last: list[GradientState] | None = None

    # --- while a pass runs ---

    def under_way(self) -> BackwardPass | None:
        """The running backward pass, or None if it computes no gradient of the parameters."""
        task = _torch_private.graph_task()
        if task not in self._by_task:
            self._by_task[task] = self._begin(task)
        return self._by_task[task]

    def stepped_inside(self, owner: int) -> BackwardPass | None:
        """Record that an optimizer steps during the running pass, whose gradients it receives."""
        current = self.under_way()
        if current is not None:
            current.certain.add(owner)
        return current

    def _begin(self, task: int) -> BackwardPass | None:
        kind = self._kind()
        if kind is None:
            return None
        now = self._states()
        self._drop_cleared(now)
        begun = BackwardPass(kind == "by hand", not _torch_private.runs_whole_graph(), now)
        _torch_private.at_end_of_backward(lambda: self._end(task))
        return begun

    def _kind(self) -> str | None:
        """``"backward"``, ``"by hand"`` (``autograd.grad`` of parameters), or None if of inputs only."""
        if not self._nodes:
            gathered = self._gathered()
            leaves = [gathered.get(id(p), p) for p in self.parameters if p.requires_grad]
            self._nodes = [_torch_private.accumulator(leaf) for leaf in leaves]
        for node in self._nodes:
            found = _torch_private.will_run(node)
            if found is not False:
                return "backward" if found else "by hand"
        return None

    def _end(self, task: int) -> None:
        current = self._by_task.pop(task, None)
        if current is None:
            return
        now = self._states()
        self._finish(current, now)
        self._finished.append(current)
        self._last = now

    def _finish(self, current: BackwardPass, now: list[GradientState]) -> None:
        touched = {
            i for i, (a, b) in enumerate(zip(current.before, now)) if b is not None and not _same(a, b)
        }
        current.touched = touched
        for i in sorted(touched, key=lambda i: self.parameters[i].numel()):
            grad = now[i][0]  # type: ignore[index]
            nonzero = _any(grad)
            current.nonzero = (i, nonzero)
            if isinstance(nonzero, Tensor) or nonzero:
                break

    # --- when the gradients are received ---

    def counted(self, owner: int) -> list[BackwardPass]:
        """The passes whose gradients the optimizer ``owner`` is about to use, or used while they ran."""
        now = self._states()
        self._drop_cleared(now)
        inside = [p for p in (*self._by_task.values(), *self._finished) if p is not None and p.certain]
        if inside:
            return inside
        its = {i for i, o in enumerate(self.owners) if o == owner}
        found = [p for p in self._finished if p.touched and p.touched & its]
        if not found and any(now[i] is not None for i in its):
            # No backward() filled the gradients: the user assigned results of torch.autograd.grad.
            found = [p for p in self._finished if p.by_hand]
        return found

    def forget(self, passes: Sequence[BackwardPass]) -> None:
        """Drop passes that have been counted."""
        self._finished = [p for p in self._finished if p not in passes]

    def _drop_cleared(self, now: list[GradientState]) -> None:
        last, self._last = self._last, now
        if last is None or not self._finished:
            return
        changed = {i for i, (a, b) in enumerate(zip(last, now)) if not _same(a, b)}
        for p in self._finished:
            if not p.touched and not p.by_hand:  # FSDP2 hands its gradients over after our end of the pass
                self._finish(p, now)
            elif p.touched and p.touched & changed:
                p.touched = {i for i in p.touched if now[i] is not None}
                if p.touched and self._zeroed(p, now):
                    p.touched = set()
                self.cleared += not p.touched and not p.by_hand
        self._finished = [p for p in self._finished if p.touched or p.by_hand or p.certain]

    def _zeroed(self, p: BackwardPass, now: list[GradientState]) -> bool:
        """Whether the gradients were set to 0 after the pass; gradients that were already 0 do not count."""
        assert p.touched is not None
        if p.nonzero is None or not bool(p.nonzero[1]):
            return False
        first = [p.nonzero[0]] if p.nonzero[0] in p.touched else []
        return not any(bool(_any(now[i][0])) for i in [*first, *sorted(p.touched)])  # type: ignore[index]

    def _states(self) -> list[GradientState]:
        return [None if (g := p.grad) is None else (g, g._version) for p in self.parameters]


def _same(a: GradientState, b: GradientState) -> bool:
    return a is b or (a is not None and b is not None and a[0] is b[0] and a[1] == b[1])


def _any(grad: Tensor) -> Any:
    """Whether any element is not 0: a bool on the host, an unsynchronised tensor on an accelerator."""
    local: Tensor = grad.to_local() if hasattr(grad, "to_local") else grad  # type: ignore[operator]
    local = local.detach()
    if local.is_sparse:
        local = local._values()
    found = (local != 0).any()
    return bool(found) if local.device.type == "cpu" else found


def inside_backward() -> bool:
    """Whether this thread is in a backward pass, so that an optimizer steps from a gradient hook."""
    return _torch_private.graph_task() != -1 and not torch.compiler.is_compiling()
