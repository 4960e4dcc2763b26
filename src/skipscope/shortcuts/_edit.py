"""Edited twins: a module goes in, a module comes out whose shortcuts are removed, detached, lesioned or scaled.

The twin runs the model's own code. A function mode, entered inside its forward, rewrites operands at the merges: each
operand that carries the shortcut (or the branch) becomes zeros, its detached self, or itself times a strength. Each
edited module gets a subclass of its own class with the same name; weights, ``state_dict`` keys and attributes stay.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skipscope._errors import SkipscopeError
from skipscope._untouched import require_module
from skipscope.shortcuts import _calls
from skipscope.shortcuts._find import find_shortcuts
from skipscope.shortcuts._results import Boundary, Place, Shortcut, Shortcuts

_PLAN = "_skipscope_plan"
_local = threading.local()


@dataclass(frozen=True, eq=False)
class Rule:
    """What happens to one operand of one call: ``factor`` None detaches, else multiplies (0 gives zeros)."""

    place: Place
    factor: float | Tensor | None


class Group:
    """One twin: shared by all its edited modules."""

    def __init__(self, boundaries: tuple[Boundary, ...]):
        self.boundaries = boundaries


@dataclass(eq=False)
class Plan:
    """The edits in one module's forward.

    Attributes:
        group: the twin it belongs to.
        rules: (site, occurrence) -> what to do with its operands.
    """

    group: Group
    rules: dict[tuple[str, int], list[Rule]] = field(default_factory=dict)
    sites: set[str] = field(default_factory=set)

    def add(self, rule: Rule) -> None:
        """Add a rule; rules for one operand apply one after the other."""
        self.rules.setdefault((rule.place.call.site, rule.place.call.nth), []).append(rule)
        self.sites.add(rule.place.call.site)


def ablate(
    model: nn.Module,
    found: Shortcuts | Shortcut | Iterable[Shortcut] | None = None,
    how: str = "remove",
    *,
    strength: float | Tensor | None = None,
    inputs: Any = None,
    share: bool = False,
    recalibrate: Any = None,
) -> nn.Module:
    """A twin of ``model`` in which shortcuts are edited, exactly as the table in definitions.md has it.

    Args:
        model: any eager module; it is left as found.
        found: which shortcuts: all of a ``Shortcuts``, or one, or several. From this model or another instance.
        how: ``"remove"`` the shortcut, ``"detach"`` it (backward only), or ``"lesion"`` the branch.
        strength: instead of ``how``, a factor on the shortcut: a number or a tensor (1 is as built, 0 is removed).
        inputs: with ``found=None``: what to find all shortcuts with.
        share: share the Parameter objects with ``model`` instead of copying them.
        recalibrate: data to recalibrate batch-norm statistics with.

    Returns:
        A module of the same class name with the same ``state_dict`` keys.

    Raises:
        SkipscopeError: nothing says which shortcuts, or one cannot be edited.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.lin = nn.Linear(3, 3)
        ...     def forward(self, x):
        ...         return x + self.lin(x)
        >>> model, x = Net(), torch.ones(1, 3)
        >>> torch.equal(ablate(model, inputs=x)(x), model.lin(x))
        True
    """
    require_module(model, "ablate")
    chosen, points = _chosen(model, found, inputs)
    factor = _factor(how, strength)
    twin = _copy(model, share)
    group = Group(points)
    _plan_of(twin, group)
    modules = dict(twin.named_modules())
    for shortcut in chosen:
        if shortcut.blocked:
            raise SkipscopeError(
                "ablate", "this shortcut cannot be edited", layer=shortcut.name, got=shortcut.blocked
            )
        for place in shortcut.branch_at if how == "lesion" and strength is None else shortcut.shortcut_at:
            host = modules.get(place.call.host)
            if host is None:
                raise SkipscopeError(
                    "ablate", "the model has no such module: these shortcuts are of another architecture",
                    layer=shortcut.name, expected=place.call.host or "the model itself",
                    cure="find them again: ss.find_shortcuts(model, inputs)",
                )  # fmt: skip
            _plan_of(host, group).add(Rule(place, factor))
    if recalibrate is not None:
        from skipscope.shortcuts._recalibrate import recalibrate as run

        run(twin, recalibrate)
    return twin


def _factor(how: str, strength: float | Tensor | None) -> float | Tensor | None:
    if strength is not None:
        return strength
    if how not in {"remove", "detach", "lesion"}:
        raise SkipscopeError("ablate", "unknown edit", expected="remove, detach or lesion", got=repr(how))
    return None if how == "detach" else 0.0


def _chosen(model: nn.Module, found: Any, inputs: Any) -> tuple[Sequence[Shortcut], tuple[Boundary, ...]]:
    known = boundaries_remembered(model)
    if found is None:
        if inputs is None:
            raise SkipscopeError(
                "ablate", "nothing says which shortcuts", expected="found= or inputs=",
                cure="ablate(model, inputs=x) edits all of them",
            )  # fmt: skip
        found = find_shortcuts(model, inputs)
    if isinstance(found, Shortcuts):
        return found.entries, known or found.boundaries
    chosen = [found] if isinstance(found, Shortcut) else list(found)
    if not known and inputs is not None:
        known = find_shortcuts(model, inputs).boundaries
    return chosen, known or ()


def boundaries(model: nn.Module, inputs: Any, *, found: Shortcuts | None = None) -> tuple[Boundary, ...]:
    """Where the flow is read: the first float activation, each merge, and modules outside every branch, in order.

    An edited twin gives its original's boundaries, so that the two can be compared point by point.

    Args:
        model: any eager module.
        inputs: what it is called with.
        found: its shortcuts, where they are known already.
    """
    known = boundaries_remembered(model)
    if known is None:
        known = (found or find_shortcuts(model, inputs)).boundaries
    return known


def boundaries_remembered(model: nn.Module) -> tuple[Boundary, ...] | None:
    """The original's boundaries, where ``model`` is an edited twin."""
    plan = model.__dict__.get(_PLAN)
    return plan.group.boundaries if plan is not None and plan.group.boundaries else None


def _copy(model: nn.Module, share: bool) -> nn.Module:
    memo = {id(p): p for p in model.parameters()} if share else {}
    return copy.deepcopy(model, memo)


# --- the twin's classes ----------------------------------------------------------------------------------------------


def _plan_of(module: nn.Module, group: Group) -> Plan:
    """The module's plan in this twin; the module becomes one that follows it."""
    plan = module.__dict__.get(_PLAN)
    if plan is None:
        plan = module.__dict__[_PLAN] = Plan(group)
        module.__class__ = _edited_class(type(module))
    plan.group = group
    return plan


@functools.cache
def _edited_class(original: type[nn.Module]) -> type[nn.Module]:
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self, original.forward, args, kwargs)

    def reduce(self, protocol: Any) -> Any:
        parts = original.__reduce_ex__(self, protocol)
        assert isinstance(parts, tuple)
        arguments = tuple(original if a is type(self) else a for a in parts[1])
        return (_rebuild, (parts[0], arguments, original), *parts[2:])

    namespace = {
        "forward": functools.wraps(original.forward)(forward),
        "__reduce_ex__": reduce,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return type(original)(original.__name__, (original,), namespace)


def _rebuild(make: Any, arguments: tuple[Any, ...], original: type[nn.Module]) -> nn.Module:
    module = make(*arguments)
    module.__class__ = _edited_class(original)
    return module


# --- the twin's run --------------------------------------------------------------------------------------------------


def _run(module: nn.Module, original_forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    group = module.__dict__[_PLAN].group
    active = getattr(_local, "group", None)
    if active is group:
        return original_forward(module, *args, **kwargs)
    _local.group = group
    try:
        with _Editing(group):
            return original_forward(module, *args, **kwargs)
    finally:
        _local.group = active


class _Editing(TorchFunctionMode):
    def __init__(self, group: Group):
        super().__init__()
        self.group = group
        self.counts: dict[tuple[int, str], int] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not _calls.is_merge_like(name):
            return func(*args, **kwargs)
        values = _calls.operands(name, args, kwargs)
        if _calls.tensor_operands(values) < 2:
            return func(*args, **kwargs)
        frame = _calls.caller()
        host, plan = self._host(frame)
        if plan is None:
            return func(*args, **kwargs)
        site = _calls.site_of(frame, _calls.base_name(name))
        if site not in plan.sites:
            return func(*args, **kwargs)
        nth = self.counts.get((id(host), site), 0)
        self.counts[id(host), site] = nth + 1
        rules = plan.rules.get((site, nth))
        return func(*args, **kwargs) if rules is None else _edited(rules, name, func, args, kwargs, values)

    def _host(self, frame: Any) -> tuple[nn.Module | None, Plan | None]:
        """The module whose forward runs innermost, and its plan in this twin."""
        while frame is not None:
            code = frame.f_code
            if code.co_name == "forward" and code.co_argcount:
                module = frame.f_locals.get(code.co_varnames[0])
                if isinstance(module, nn.Module):
                    plan = module.__dict__.get(_PLAN)
                    return module, plan if plan is not None and plan.group is self.group else None
            frame = frame.f_back
        return None, None


def _edited(
    rules: list[Rule], name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], values: list[Any]
) -> Any:
    target = values[0]
    with torch._C.DisableTorchFunction():  # a tap around the twin sees the edited call, not how it was edited
        for rule in rules:
            values[rule.place.operand] = _apply(rule.factor, values[rule.place.operand])
    new_args, new_kwargs = _calls.with_operands(name, args, kwargs, values)
    if not _calls.is_in_place(name) or values[0] is target:
        return func(*new_args, **new_kwargs)
    return target.copy_(_calls.out_of_place(name, func)(*new_args, **new_kwargs))


def _apply(factor: float | Tensor | None, operand: Tensor) -> Tensor:
    if factor is None:
        return operand.detach()
    if isinstance(factor, Tensor):
        return operand * (factor.to(operand.device, operand.dtype) if factor.ndim else factor)
    return operand.new_zeros(()).expand(operand.shape) if factor == 0 else operand * factor
