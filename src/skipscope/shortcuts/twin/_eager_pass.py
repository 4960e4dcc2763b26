"""Edits in eager code: a call is identified by its stack frames, which works in loops of any length.

A pass begins with the outermost call of an edited module. It is checked at its end: if merges ran but none
was an edited merge, an error is raised; if the edited modules did not run at all, the user is warned.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skipscope._errors import SkipscopeError
from skipscope.shortcuts.trace import _call_sites, _operations
from skipscope.shortcuts.twin._join import SECOND_READER, Join
from skipscope.shortcuts.twin._plan import Plan, Rule, edited, plan_of

# Operations that may join a shortcut and a branch. Products and selections are excluded: most code has them.
_MERGES = (
    {one.name for one in _operations.OPERATIONS.values()}
    - _operations.PRODUCTS
    - _operations.PUTTING
    - {"where"}
)
_thread = threading.local()


def pass_of(plan: Plan) -> _EagerPass | None:
    """The current pass of a plan's twin, or None."""
    around: _EagerPass | None = getattr(_thread, "current", None)
    return around if around is not None and around.group is plan.group else None


def run_module(
    module: nn.Module, plan: Plan, run: Any, args: Any, kwargs: Any, method: str | None = None
) -> Any:
    """Run an edited module: within the current pass, or in a pass of its own.

    Args:
        module: the edited module.
        plan: its plan.
        run: function to run: its forward, its ``__call__`` or another method.
        args: positional arguments of ``run``.
        kwargs: keyword arguments of ``run``.
        method: name of the method, if it is neither forward nor ``__call__``.

    Raises:
        SkipscopeError: the pass ran other code than that in which the shortcuts were found.
    """
    around: _EagerPass | None = getattr(_thread, "current", None)
    if around is not None and around.group is plan.group:
        begins_whole_twin = method is None and plan is plan.group.root and not around.is_whole_twin
        if not begins_whole_twin:
            around.ran[id(module)] = plan
            return run(*args, **kwargs)
    this = _thread.current = _EagerPass(module, plan, method)
    stance = torch.compiler.set_stance("force_eager") if plan.group.runs_eagerly else nullcontext()
    try:
        with stance, this:
            output = run(*args, **kwargs)
    finally:
        _thread.current = around
    if around is not None and around.group is plan.group:
        around.reached |= this.reached
    this.check()
    return output


class _EagerPass(TorchFunctionMode):
    """Edits the calls of one pass.

    Args:
        module: the outermost module.
        plan: its plan.
        method: name of the method that was called, or None for the forward.
    """

    def __init__(self, module: nn.Module, plan: Plan, method: str | None):
        super().__init__()
        self.group, self.outermost, self.method = plan.group, module, method
        self.is_whole_twin = method is None and plan is plan.group.root
        self.members = set(map(id, module.modules()))
        self.ran = {id(module): plan}
        self.counts: Counter[tuple[int, str]] = Counter()
        self.reached: set[int] = set()  # ids of the plans with an edited call in this pass
        # Id of a plan -> site of a merge that was not there when the shortcuts were found.
        self.unknown: dict[int, str] = {}
        self.merged = self.used_weights = False
        self.passing: dict[Any, Any] = {}  # state of connections between their calls
        self.is_reading = False
        self.used: dict[int, weakref.ref[Tensor]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.is_reading or not self.group.has_readers:
            return func(*args, **(kwargs or {})) if self.is_reading else self._call(func, args, kwargs)
        waiting = [(key, x) for key, x in self.passing.items() if isinstance(x, Tensor)]
        output = self._call(func, args, kwargs)
        self._note_uses(waiting, args, kwargs, output)
        return output

    def _note_uses(self, waiting: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Note the inputs of a call, and refuse an input that a connection has read for its merge."""
        outputs = output if isinstance(output, tuple | list) else (output,)
        if not any(isinstance(t, Tensor) for t in outputs):
            return
        for value in (*args, *(kwargs or {}).values()):
            if not isinstance(value, Tensor) or any(value is t for t in outputs):
                continue
            self.used[id(value)] = weakref.ref(value)
            for key, x in waiting:
                if value is x and key in self.passing:
                    raise self.passing[key, "join"].misfit(SECOND_READER)
        for made in outputs:
            self.used.pop(id(made), None)  # after an in-place write the used value no longer exists

    def is_used(self, x: Tensor) -> bool:
        """Whether a call of this pass has computed something from ``x``."""
        known = self.used.get(id(x))
        return known is not None and known() is x

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        kwargs = kwargs or {}
        # A compiled block inside eager code is traced under this mode, and applies its own edits.
        if torch.compiler.is_compiling() or _thread.current is not self:
            return func(*args, **kwargs)
        if self.method is not None and not self.used_weights:
            self.used_weights = any(isinstance(argument, nn.Parameter) for argument in args)
        operation = _operations.operation_of(func)
        if operation is None:
            return func(*args, **kwargs)
        if operation.is_many:
            return _operations.one_by_one(self, operation, func, args, kwargs)
        values = _operations.operands(operation, args, kwargs)
        if _operations.tensor_operands(values) < 2:
            return func(*args, **kwargs)
        rules = self._rules(operation, values)
        if rules is None:
            return func(*args, **kwargs)
        return edited(rules, operation, func, args, kwargs, values, self)

    def _rules(self, operation: _operations.Operation, values: list[Any]) -> list[Rule | Join] | None:
        """The rules for the call that the model's code is making. None if it is not edited."""
        if operation.name not in _MERGES and operation.name not in self.group.operations:
            return None
        frame = _call_sites.caller()
        if self._is_compiled(frame):
            return None
        host, site = self._host(frame), _call_sites.site_of(frame, operation.name)
        plan = self._plan(host, site)
        if plan is None or site not in plan.calls:
            if operation.name in _MERGES and self._joins_activations(values):
                self.merged = True
                if plan is not None and _call_sites.source_of(frame) not in self.group.known:
                    self.unknown.setdefault(id(plan), site)
            return None
        self.reached.add(id(plan))
        nth = self.counts[id(plan), site]
        self.counts[id(plan), site] += 1
        if site in plan.everywhere:
            return plan.everywhere[site]
        if not self.is_whole_twin and (host is None or plan.runs > 1):
            _refuse_ambiguous(plan, site)
        return plan.rules.get((site, nth))

    def _host(self, frame: Any) -> nn.Module | None:
        """The innermost module whose forward runs, determined as when the shortcuts were found."""
        while frame is not None:
            if _call_sites.is_model_code(frame):
                module = _call_sites.first_argument(frame)
                if id(module) in self.members and _call_sites.is_forward(frame):
                    return module
            frame = frame.f_back
        return None

    def _plan(self, host: nn.Module | None, site: str) -> Plan | None:
        """The plan that edits a call; outside every forward, that of the outermost module or of the twin."""
        if host is not None:
            plan = plan_of(host)
            return plan if plan is not None and plan.group is self.group else None
        own, root = plan_of(self.outermost), self.group.root
        return root if root is not None and site in root.calls else own

    def _is_compiled(self, frame: Any) -> bool:
        """Whether the call is in a graph of ``torch.compile``'s eager backend, and so edited already."""
        is_generated = frame.f_code.co_filename.startswith("<eval_with_key>")
        return is_generated and id(_call_sites.first_argument(frame)) not in self.members

    def _joins_activations(self, values: list[Any]) -> bool:
        """Whether a call joins two or more tensors other than weights and, in other methods, losses."""
        least = 0 if self.method is None else 2
        return (
            sum(isinstance(v, Tensor) and not isinstance(v, nn.Parameter) and v.ndim >= least for v in values)
            > 1
        )

    def _may_have_been_compiled(self) -> bool:
        """Whether edited calls may have run in compiled code, which this pass does not see."""
        return self.group.has_compiled or any(
            module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
            for module in self.outermost.modules()
        )

    def check(self) -> None:
        """Refuse a pass in which no edit was reached, or warn about it."""
        group = self.group
        outside = self.unknown.pop(id(self._plan(None, "")), None) if self.method is not None else None
        for plan in self.ran.values():
            if plan.calls and id(plan) not in self.reached and id(plan) in self.unknown:
                plan.refuse(f"only {self.unknown[id(plan)]}")
        if self.reached or not group.sites:
            return
        if self.method is not None and self.used_weights and outside is not None:
            _refuse_method(group.operation, self.method, outside)
        if self.is_whole_twin and self.merged and not group.has_warned and not self._may_have_been_compiled():
            group.has_warned = True
            warnings.warn(
                f"{group.operation}: none of the edited shortcuts was reached in this pass of the twin, so it"
                " returned the output of the network as built. Find the shortcuts with inputs of this kind"
                " and in this mode: ss.find_shortcuts(twin, inputs).",
                stacklevel=4,
            )


def _refuse_ambiguous(plan: Plan, site: str) -> NoReturn:
    raise SkipscopeError(
        plan.group.operation,
        "a part of the twin was run by itself, and which of its merges are edited is known only where the "
        "twin runs as a whole",
        layer=plan.rules_at(site)[0].name,
        expected="a call of the twin, or edits of all merges made by one line",
        got=f"the merge at {site}",
        cure="call the twin itself, or edit every shortcut of this line",
    )


def _refuse_method(operation: str, method: str, site: str) -> NoReturn:
    raise SkipscopeError(
        operation,
        f"the method {method} merges by code of its own, in which no shortcuts were looked for",
        expected="a method that runs the code in which the shortcuts were found",
        got=f"a merge at {site}",
        cure=(
            "call the twin itself; or find and edit them in a module whose forward is that method: class"
            f" Part(nn.Module) with forward(self, *args): return self.model.{method}(*args)"
        ),
    )
