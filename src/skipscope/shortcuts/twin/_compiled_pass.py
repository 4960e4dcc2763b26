"""Edits in compiled code, which has no frames: a call is identified by its index among equal operations.

Calls are counted from the start of the host's forward, and the count is checked when that forward ends.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from skipscope._errors import SkipscopeError
from skipscope.shortcuts.trace import _operations
from skipscope.shortcuts.twin import _eager_pass
from skipscope.shortcuts.twin._plan import REWIRED, Plan, edited


def run_forward(module: nn.Module, plan: Plan, run: Any, args: Any, kwargs: Any) -> Any:
    """Compile the forward of an edited module.

    Raises:
        SkipscopeError: its calls differ from those of the pass in which the shortcuts were found.
    """
    group = plan.group
    if not torch.compiler.is_compiling():
        # A graph break: pieces compiled from here on would not be edited, so run eagerly instead.
        eagerly: Any = torch.compiler.disable(_eager_pass.run_module)
        return eagerly(module, plan, run, args, kwargs)
    if any(edit.startswith(REWIRED) for edit in group.edits[:-1]):
        raise SkipscopeError(
            "rewire",
            "a rewired twin was edited again, and compiled code cannot tell the connections' merges from the"
            " model's",
            got=", then ".join(group.edits),
            cure="run this twin without torch.compile, or edit first and rewire then",
        )
    if group.compiled is not None:
        return group.compiled.run(module, plan, run, args, kwargs)
    compiled_pass = _CompiledPass()
    group.compiled = compiled_pass
    try:
        with compiled_pass:
            output = compiled_pass.run(module, plan, run, args, kwargs)
    finally:
        group.compiled = None
    for other, count in compiled_pass.ran.values():
        if other.rules and not count:
            other.refuse("no such call in compiled code")
    return output


def run_method(plan: Plan, run: Any, args: Any, kwargs: Any) -> Any:
    """Compile a method of an edited module other than its forward.

    Raises:
        SkipscopeError: it may hold edited merges, whose calls are counted only within a forward.
    """
    root = plan.group.root
    for near in (plan,) if root is None else (plan, root):
        for site in near.calls:
            if plan.group.compiled is None and ".forward:" not in site:
                raise SkipscopeError(
                    plan.group.operation,
                    "in a method other than forward, compiled by itself, edits cannot be assigned to calls",
                    got=f"an edited merge at {site}",
                    cure="compile the twin, or call the method of the twin uncompiled",
                )
    return run(*args, **kwargs)


class _CompiledPass(TorchFunctionMode):
    """Edits the calls of one pass."""

    def __init__(self):
        super().__init__()
        self.counts: dict[str, int] = {}
        self.times: dict[int, int] = {}
        self.open: list[tuple[Plan, int, dict[str, int]]] = []
        self.edited = 0
        self.passing: dict[Any, Any] = {}
        self.is_reading = False
        self.ran: dict[int, tuple[Plan, int]] = {}  # id of a plan -> the plan, and its number of edited calls

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "unflatten":
            # The method of Tensor is Python code that torch 2.6 cannot trace inside a mode.
            func = torch.unflatten
        operation = None if self.is_reading else _operations.OPERATIONS.get(name)
        if operation is None:
            return func(*args, **kwargs)
        values = _operations.operands(operation, args, kwargs)
        if _operations.tensor_operands(values) < 2:
            return func(*args, **kwargs)
        count = self.counts.get(operation.name, 0)
        self.counts[operation.name] = count + 1
        for plan, call, before in self.open:
            rules = plan.counted.get((call, operation.name, count - before.get(operation.name, 0)))
            if rules is not None:
                self.edited += 1
                return edited(rules, operation, func, args, kwargs, values, self)
        return func(*args, **kwargs)

    def _count(self, module: nn.Module) -> int:
        """The number of earlier runs of a module's forward in this pass."""
        time = self.times.get(id(module), 0)
        self.times[id(module)] = time + 1
        return time

    def run(self, module: nn.Module, plan: Plan, run: Any, args: Any, kwargs: Any) -> Any:
        """Run a forward, and refuse if its calls differ from those of the traced pass."""
        # Count runs only if needed: code that depends on the module would be compiled for each block.
        call = 0 if plan.every_call_alike else self._count(module)
        before, already = dict(self.counts), self.edited
        self.open.append((plan, call, before))
        output = run(*args, **kwargs)
        self.open.pop()
        for operation, among in plan.among.items():
            made = self.counts.get(operation, 0) - before.get(operation, 0)
            if among and made != among:
                plan.refuse(f"{made} calls of {operation} in compiled code, {among} when they were found")
        count = self.edited - already
        if count < plan.edits_in(call):
            plan.refuse("no such call in compiled code")
        if plan.rules:
            self.ran[id(plan)] = plan, count + (self.ran[id(plan)][1] if id(plan) in self.ran else 0)
        return output
