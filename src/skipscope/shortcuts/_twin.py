"""How an edited twin runs: the model's own code under a function mode that rewrites operands at chosen calls.

Each edited module gets a subclass of its own class with the same name, whose forward enters the mode; weights,
``state_dict`` keys and attributes stay. The mode is entered once, by the outermost edited forward. In eager code it
knows a call by its frames (which loops of any length leave right); in compiled code, which has no frames, by counting
calls of one operation since the host's forward began, and it checks that count when the forward ends.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skipscope._errors import SkipscopeError
from skipscope._rebinding import eager
from skipscope.shortcuts import _calls, _sites
from skipscope.shortcuts._results import Boundary, Place

_PLAN = "_skipscope_plan"
_FORWARD = "_skipscope_forward"  # a forward that was set on the instance
_eager = threading.local()


@dataclass(frozen=True, eq=False)
class Rule:
    """What happens to one operand of one call.

    Attributes:
        place: the operand.
        factor: None detaches; 0 gives zeros; anything else multiplies.
        name: of the shortcut, for errors.
    """

    place: Place
    factor: float | Tensor | None
    name: str

    def __deepcopy__(self, memo: Any) -> Rule:
        return self  # a strength tensor stays the user's own, so that its gradient can be read


class Group:
    """What all edited modules of one twin share.

    Attributes:
        boundaries: of the original.
        shares: whether the parameters are the original's own.
        edits: what was done, in words, one edit after the other.
        compiled: the mode that is active while compiled code is traced.
    """

    def __init__(self, boundaries: tuple[Boundary, ...], shares: bool):
        self.boundaries, self.shares = boundaries, shares
        self.compiled: _CompiledEditing | None = None
        self.edits: tuple[str, ...] = ()

    def __deepcopy__(self, memo: Any) -> Group:
        copied = memo[id(self)] = Group(self.boundaries, shares=False)  # a copy has parameters of its own
        copied.edits = self.edits
        return copied


@dataclass(eq=False)
class Plan:
    """The edits in one module's forward.

    Attributes:
        group: the twin it belongs to.
        rules: by site and occurrence.
        everywhere: by site, where every occurrence is edited alike: loops that run longer than the traced one too.
        counted: by call of the host, operation and index in it, for compiled code.
        among: by operation, how many calls of it one run of the host makes.
        calls: by site, in which calls of the host it is edited.
        runs: how many times the host ran.
    """

    group: Group
    rules: dict[tuple[str, int], list[Rule]] = field(default_factory=dict)
    everywhere: dict[str, list[Rule]] = field(default_factory=dict)
    counted: dict[tuple[int, str, int], list[Rule]] = field(default_factory=dict)
    among: dict[str, int] = field(default_factory=dict)
    calls: dict[str, set[int]] = field(default_factory=dict)
    runs: int = 1
    sites: frozenset[str] = frozenset()
    operations: frozenset[str] = frozenset()

    @property
    def every_call_alike(self) -> bool:
        """Whether the host's forward is edited alike in each of its calls."""
        every_call = set(range(self.runs))
        return len(self.everywhere) == len(self.sites) and all(c == every_call for c in self.calls.values())

    def edits_in(self, call: int) -> int:
        """How many calls are edited in one run of the host."""
        return len([key for key in self.counted if key[0] == call])

    def add(self, rule: Rule) -> None:
        """Add a rule; rules for one operand apply one after the other."""
        call = rule.place.call
        operation = call.site.rpartition(":")[2]
        self.rules.setdefault((call.site, call.nth), []).append(rule)
        self.counted.setdefault((call.call, operation, call.index), []).append(rule)
        self.sites |= {call.site}
        self.operations |= {operation}
        self.among[operation] = call.among
        self.calls.setdefault(call.site, set()).add(call.call)
        self.runs = call.runs
        alike = [
            [(r.place.operand, r.factor) for r in rules]
            for (s, _), rules in self.rules.items()
            if s == call.site
        ]
        self.everywhere.pop(call.site, None)
        if len(alike) == call.total and all(a == alike[0] for a in alike):
            self.everywhere[call.site] = self.rules[call.site, call.nth]


def follow(module: nn.Module, group: Group) -> Plan:
    """The module's plan; the module becomes one that follows it."""
    plan = module.__dict__.get(_PLAN)
    if plan is None:
        plan = module.__dict__[_PLAN] = Plan(group)
        own = module.__dict__.pop("forward", None)  # it would stand before the edited class's
        if own is not None and getattr(own, "__func__", None) is not type(module).forward:
            module.__dict__[_FORWARD] = own
        module.__class__ = _edited_class(type(module))
    elif plan.group is not group:  # an edited twin is edited again: all its modules move to the new group
        for other in module.modules():
            if (old := other.__dict__.get(_PLAN)) is not None:
                old.group = group
    return plan


def edits_of(model: nn.Module) -> tuple[str, ...]:
    """What was done to an edited twin, in words; nothing for any other model."""
    plan = model.__dict__.get(_PLAN)
    return () if plan is None else plan.group.edits


def remembered_boundaries(model: nn.Module) -> tuple[Boundary, ...] | None:
    """The original's boundaries, where ``model`` is an edited twin that knows them."""
    plan = model.__dict__.get(_PLAN)
    return plan.group.boundaries if plan is not None and plan.group.boundaries else None


def shares_parameters(model: nn.Module) -> bool:
    """Whether ``model`` is an edited twin made with ``share=True``."""
    plan = model.__dict__.get(_PLAN)
    return plan is not None and plan.group.shares


def refuse_shared(model: nn.Module, operation: str, layer: str | None = None) -> None:
    """Refuse to train what is, or holds, a twin made with ``share=True``.

    Raises:
        SkipscopeError: as said.
    """
    if any(map(shares_parameters, model.modules())):
        raise SkipscopeError(
            operation, "this twin shares its parameters with the original: training one would train the other",
            layer=layer, expected="a twin with parameters of its own", got="ablate(..., share=True)",
            cure="make it with share=False",
        )  # fmt: skip


# --- the classes -----------------------------------------------------------------------------------------------------


@functools.cache
def _edited_class(original: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = self.__dict__.get(_FORWARD)
        if getattr(own, "__func__", None) is forward:
            raise SkipscopeError(
                "ablate", "the twin lost the forward that was set on its original: pickle knows a method by its name only",
                got=type(self).__name__, cure="give the method to the model's class, or edit the model after loading it",
            )  # fmt: skip
        run = functools.partial(original.forward, self) if own is None else own
        return _run(self, run, args, kwargs)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(original.__call__, self)
        # Hooks may merge too. Compiled code edits itself in forward.
        if torch.compiler.is_compiling() or self._compiled_call_impl is not None:
            return run(*args, **kwargs)
        with _seen_into(self.__dict__.get("forward"), forward):
            return _run(self, run, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        inherited: Any = original.__reduce_ex__
        parts = inherited(self, protocol)
        assert isinstance(parts, tuple)
        arguments = tuple(original if argument is type(self) else argument for argument in parts[1])
        return (_rebuild, (parts[0], arguments, original), *parts[2:])

    def apply(self: nn.Module, function: Any, *args: Any, **kwargs: Any) -> nn.Module:
        _refuse_if_shared(self, "move or convert the original first, or make the twin with share=False")
        return original._apply(self, function, *args, **kwargs)

    def load(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _refuse_if_shared(self, "load the original first, or make the twin with share=False")
        return original.load_state_dict(self, *args, **kwargs)

    def require(self: nn.Module, requires_grad: bool = True) -> nn.Module:
        _refuse_if_shared(self, "freeze the original first, or make the twin with share=False")
        return original.requires_grad_(self, requires_grad)

    namespace = {
        "forward": functools.wraps(original.forward)(forward),
        "__call__": call,
        "__reduce_ex__": reduce,
        "_apply": apply,
        "load_state_dict": load,
        "requires_grad_": require,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    make: Any = type(original)
    return make(original.__name__, (original,), namespace)


def _seen_into(own: Any, edited: Any) -> Any:
    """A context in which a compiled forward that was set on a twin runs eagerly, unless it is the edited one."""
    inside = None if own is None else eager(own)
    if inside is own or getattr(inside, "__func__", None) is edited:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _refuse_if_shared(module: nn.Module, cure: str) -> None:
    if shares_parameters(module):
        raise SkipscopeError(
            "ablate",
            "this twin shares its parameters with the original, which would be changed too",
            cure=cure,
        )


def _rebuild(make: Any, arguments: tuple[Any, ...], original: type[nn.Module]) -> nn.Module:
    module = make(*arguments)
    module.__class__ = _edited_class(original)
    return module


# --- the run ---------------------------------------------------------------------------------------------------------


def _run(module: nn.Module, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    plan: Plan | None = module.__dict__.get(_PLAN)
    if plan is None:  # another instance, made by the twin's class
        return run(*args, **kwargs)
    if torch.compiler.is_compiling():
        return _run_compiled(module, plan, run, args, kwargs)
    active = getattr(_eager, "mode", None)
    if active is not None and active.group is plan.group:
        active.ran[id(module)] = plan
        return run(*args, **kwargs)
    mode = _eager.mode = _Editing(module, plan)
    try:
        with mode:
            output = run(*args, **kwargs)
    finally:
        _eager.mode = active
    mode.check()
    return output


class _Editing(TorchFunctionMode):
    """Edits one pass of eager code: a call is known by its frames.

    Args:
        module: the outermost module of the pass.
        plan: its plan.
    """

    def __init__(self, module: nn.Module, plan: Plan):
        super().__init__()
        self.group, self.outermost = plan.group, module
        self.members = set(map(id, module.modules()))
        self.counts: Counter[tuple[int, str]] = Counter()
        self.ran = {id(module): plan}
        self.missed: dict[int, str] = {}
        self.hit: set[int] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        operation = _calls.OPERATIONS.get(name)
        # A compiled block inside eager code is traced under this mode, and edits itself.
        if operation is None or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if operation.is_many:
            return _calls.one_by_one(self, operation, func, args, kwargs)
        values = _calls.operands(operation, args, kwargs)
        if _calls.tensor_operands(values) < 2:
            return func(*args, **kwargs)
        frame = _sites.caller()
        if self._is_compiled(frame):
            return func(*args, **kwargs)
        host = self._host(frame)
        plan = host.__dict__.get(_PLAN)
        if plan is None or plan.group is not self.group or operation.name not in plan.operations:
            return func(*args, **kwargs)
        site = _sites.site_of(frame, operation.name)
        if site not in plan.sites:
            if len([v for v in values if isinstance(v, Tensor) and not isinstance(v, nn.Parameter)]) > 1:
                self.missed.setdefault(id(host), site)
            return func(*args, **kwargs)
        self.hit.add(id(host))
        nth = self.counts[id(host), site]
        self.counts[id(host), site] += 1
        rules = plan.everywhere.get(site) or plan.rules.get((site, nth))
        return (
            func(*args, **kwargs) if rules is None else _edited(rules, operation, func, args, kwargs, values)
        )

    def _is_compiled(self, frame: Any) -> bool:
        """Whether the call is in a graph that the eager backend of ``torch.compile`` runs: it has been edited."""
        is_generated = frame.f_code.co_filename.startswith("<eval_with_key>")
        return is_generated and id(_sites.first_argument(frame)) not in self.members

    def _host(self, frame: Any) -> nn.Module:
        """The module whose forward runs innermost; by the same rule as when the shortcuts were found."""
        while frame is not None:
            if frame.f_code.co_filename != _sites.PLUMBING:
                module = _sites.first_argument(frame)
                if id(module) in self.members and _sites.is_forward(frame):
                    return module
            frame = frame.f_back
        return self.outermost

    def check(self) -> None:
        """Refuse a pass in which a module merged somewhere else than where its shortcuts were found."""
        for key, site in self.missed.items():
            plan = self.ran.get(key)
            if plan is not None and plan.rules and key not in self.hit:
                _refuse(plan, f"only {site}")


def _refuse(plan: Plan, got: str) -> None:
    rule = next(iter(plan.rules.values()))[0]
    raise SkipscopeError(
        "ablate", "the twin ran other code than its shortcuts were found in, and was not edited there",
        layer=rule.name, expected=f"a merge at {rule.place.call.site}", got=got,
        cure="find them again with inputs of this kind and in this mode: ss.find_shortcuts(twin, inputs)",
    )  # fmt: skip


def _run_compiled(module: nn.Module, plan: Plan, run: Any, args: Any, kwargs: Any) -> Any:
    group = plan.group
    if group.compiled is not None:
        return group.compiled.run(module, plan, run, args, kwargs)
    mode = _CompiledEditing()
    group.compiled = mode
    try:
        with mode:
            output = mode.run(module, plan, run, args, kwargs)
    finally:
        group.compiled = None
    for other, edited in mode.ran.values():
        if other.rules and not edited:
            _refuse(other, "no such call in compiled code")
    return output


class _CompiledEditing(TorchFunctionMode):
    """Edits code that is being compiled: a call is known by how many of its operation came before."""

    def __init__(self):
        super().__init__()
        self.counts: dict[str, int] = {}
        self.times: dict[int, int] = {}
        self.open: list[tuple[Plan, int, dict[str, int]]] = []
        self.edited = 0
        self.ran: dict[int, tuple[Plan, int]] = {}  # by plan, how many calls were edited

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "unflatten":
            func = torch.unflatten  # the tensor's method is Python that torch 2.6 cannot trace from in here
        operation = _calls.OPERATIONS.get(name)
        if operation is None:
            return func(*args, **kwargs)
        values = _calls.operands(operation, args, kwargs)
        if _calls.tensor_operands(values) < 2:
            return func(*args, **kwargs)
        count = self.counts.get(operation.name, 0)
        self.counts[operation.name] = count + 1
        for plan, call, before in self.open:
            rules = plan.counted.get((call, operation.name, count - before.get(operation.name, 0)))
            if rules is not None:
                self.edited += 1
                return _edited(rules, operation, func, args, kwargs, values)
        return func(*args, **kwargs)

    def _count(self, module: nn.Module) -> int:
        """How many times a module's forward had run before."""
        time = self.times.get(id(module), 0)
        self.times[id(module)] = time + 1
        return time

    def run(self, module: nn.Module, plan: Plan, run: Any, args: Any, kwargs: Any) -> Any:
        """Run a forward, and refuse when its calls were not those of the traced one."""
        # Looked at only where it is needed: code that depends on which module it is would be compiled for each block.
        call = 0 if plan.every_call_alike else self._count(module)
        before, edited = dict(self.counts), self.edited
        self.open.append((plan, call, before))
        output = run(*args, **kwargs)
        self.open.pop()
        for operation, among in plan.among.items():
            made = self.counts.get(operation, 0) - before.get(operation, 0)
            if among and made != among:
                _refuse(plan, f"{made} calls of {operation} in compiled code, {among} when they were found")
        if self.edited - edited < plan.edits_in(call):
            _refuse(plan, "no such call in compiled code")
        if plan.rules:
            before_this = self.ran[id(plan)][1] if id(plan) in self.ran else 0
            self.ran[id(plan)] = plan, before_this + self.edited - edited
        return output


def _edited(
    rules: list[Rule], operation: _calls.Operation, func: Any, args: Any, kwargs: Any, values: list[Any]
) -> Any:
    target = values[0]
    for rule in rules:
        if rule.place.operand == _calls.WHOLE:
            whole = target if target._base is None else target._base
            whole.copy_(_apply(rule.factor, whole))  # the slice, a view of it, sees that
        else:
            operand = rule.place.operand  # torch 2.6 cannot compile values[operand] = ...
            values = [_apply(rule.factor, v) if i == operand else v for i, v in enumerate(values)]
    overwrites = operation.in_place and values[0] is not target
    if overwrites and any(rule.factor is None for rule in rules):
        values[0] = values[
            0
        ].clone()  # a detached view may be saved for the way back, and target is overwritten
    new_args, new_kwargs = _calls.with_operands(operation, args, kwargs, values)
    if not overwrites:
        return func(*new_args, **new_kwargs)
    return target.copy_(_calls.out_of_place(operation, func)(*new_args, **new_kwargs))


def _apply(factor: float | Tensor | None, operand: Tensor) -> Tensor:
    if factor is None:
        return operand.detach()
    if isinstance(factor, (float, int)):  # a tuple of types: torch 2.6 cannot compile `float | int`
        if factor == 0:
            # In its own layout: the sum takes it on, and a view of the sum may need it.
            return torch.zeros_like(operand)
    elif factor.ndim:
        factor = factor.to(operand.device, operand.dtype)
    if torch.compiler.is_compiling():
        return operand * factor
    with torch._C.DisableTorchFunction():  # a tap around the twin sees the edited call, not how it was edited
        return operand * factor
