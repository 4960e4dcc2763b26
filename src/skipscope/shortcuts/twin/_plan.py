"""Plans of a twin: which operands of which calls change, and to what; and calls with new operands."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from skipscope._errors import SkipscopeError
from skipscope._torch_private import without_modes
from skipscope.shortcuts._shortcut_result import Boundary, Place
from skipscope.shortcuts.trace import _operations
from skipscope.shortcuts.twin._join import Join

PLAN = "_skipscope_plan"
REWIRED = "rewired: "  # how an edit begins, in words, that put other connections in place of sums


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

    @property
    def action(self) -> Any:
        """What distinguishes this rule from others at the same call."""
        return self.place.operand, self.factor


@dataclass(eq=False)
class Group:
    """What all edited modules of one twin share.

    Attributes:
        boundaries: of the original.
        shares: whether the parameters are the original's own.
        edits: what was done, in words, one edit after the other.
        known: source lines of the merges that were seen when the shortcuts were found.
        sites: of all edited calls.
        operations: of all edited calls.
        root: the plan of the twin itself, by which merges outside of every module's forward are edited.
        compiled: the current pass while code is compiled.
        has_warned: whether the user was warned that a pass reached no edit.
        has_readers: connections read what some modules are given.
        runs_eagerly: an edited call is in a compiled function that a forward calls: it runs as it is written.
        has_compiled: an edited call is in a module that was compiled, where no pass in eager code sees it.
    """

    boundaries: tuple[Boundary, ...]
    shares: bool
    edits: tuple[str, ...] = ()
    known: frozenset[str] = frozenset()
    sites: frozenset[str] = frozenset()
    operations: frozenset[str] = frozenset()
    root: Plan | None = None
    compiled: Any = None
    has_warned: bool = False
    has_readers: bool = False
    runs_eagerly: bool = False
    has_compiled: bool = False

    @property
    def operation(self) -> str:
        """The public call that made the twin, as its errors name it."""
        return "rewire" if self.edits and self.edits[-1].startswith(REWIRED) else "ablate"

    def __deepcopy__(self, memo: Any) -> Group:
        # A copy has parameters of its own.
        copied = memo[id(self)] = replace(self, shares=False, root=None, compiled=None)
        if self.root is not None:
            copied.root = memo[id(self.root)] = self.root.copied(copied, memo)
        return copied


@dataclass(eq=False)
class Plan:
    """The edits in one module's forward.

    Attributes:
        group: the twin it belongs to.
        rules: by site and occurrence.
        everywhere: by site, where every occurrence is edited alike: loops that run longer than the traced one
            too.
        counted: by call of the host, operation and index in it, for compiled code.
        among: by operation, how many calls of it one run of the host makes.
        calls: by site, in which runs of the host it is edited.
        runs: how many times the host ran when the shortcuts were found.
        reads: what the module is given in place of its first tensor.
    """

    group: Group
    rules: dict[tuple[str, int], list[Rule | Join]] = field(default_factory=dict)
    everywhere: dict[str, list[Rule | Join]] = field(default_factory=dict)
    counted: dict[tuple[int, str, int], list[Rule | Join]] = field(default_factory=dict)
    among: dict[str, int] = field(default_factory=dict)
    calls: dict[str, set[int]] = field(default_factory=dict)
    runs: int = 1
    reads: list[Join] = field(default_factory=list)

    def __deepcopy__(self, memo: Any) -> Plan:
        group = memo.get(id(self.group)) or self.group.__deepcopy__(memo)
        if id(self) not in memo:  # the root's has been copied with its group
            memo[id(self)] = self.copied(group, memo)
        return memo[id(self)]

    def copied(self, group: Group, memo: dict[int, Any]) -> Plan:
        """A plan of its own with the same rules; connections are those of the copy."""
        tables: tuple[Any, ...] = (self.rules, self.everywhere, self.counted)
        rules, everywhere, counted = (
            {key: copy.deepcopy(rules, memo) for key, rules in table.items()} for table in tables
        )
        return Plan(
            group,
            rules,
            everywhere,
            counted,
            dict(self.among),
            {site: set(calls) for site, calls in self.calls.items()},
            self.runs,
            copy.deepcopy(self.reads, memo),
        )

    @property
    def every_call_alike(self) -> bool:
        """Whether the host's forward is edited alike in each of its calls."""
        every_call = set(range(self.runs))
        return len(self.everywhere) == len(self.calls) and all(c == every_call for c in self.calls.values())

    def edits_in(self, call: int) -> int:
        """How many calls are edited in one run of the host."""
        return len([key for key in self.counted if key[0] == call])

    def add(self, rule: Rule | Join) -> None:
        """Add a rule; rules for one operand apply one after the other."""
        call = rule.place.call
        operation = call.site.rpartition(":")[2]
        self.rules.setdefault((call.site, call.nth), []).append(rule)
        self.counted.setdefault((call.call, operation, call.index), []).append(rule)
        self.calls.setdefault(call.site, set()).add(call.call)
        self.among[operation] = call.among
        self.runs = call.runs
        self.group.sites |= {call.site}
        self.group.operations |= {operation}
        self.group.runs_eagerly = self.group.runs_eagerly or call.compiled == "function"
        self.group.has_compiled = self.group.has_compiled or call.compiled == "host"
        at_site = [rules for (site, _), rules in self.rules.items() if site == call.site]
        alike = [[r.action for r in rules] for rules in at_site]
        self.everywhere.pop(call.site, None)
        if len(alike) == call.total and all(a == alike[0] for a in alike):
            self.everywhere[call.site] = self.rules[call.site, call.nth]

    def rules_at(self, site: str) -> list[Rule | Join]:
        """The rules of all its calls there."""
        return [rule for (at, _), rules in self.rules.items() if at == site for rule in rules]

    def refuse(self, got: str) -> NoReturn:
        """Refuse a pass that reached none of the calls that this plan edits."""
        rule = next(iter(self.rules.values()))[0]
        raise SkipscopeError(
            self.group.operation,
            "the twin ran other code than its shortcuts were found in, and was not edited there",
            layer=rule.name,
            expected=f"a merge at {rule.place.call.site}",
            got=got,
            cure="find them again with inputs of this kind and in this mode: ss.find_shortcuts(twin, inputs)",
        )


# --- questions about a model ---


def plan_of(module: Any) -> Plan | None:
    """The plan that an edited module follows; None for any other."""
    return module.__dict__.get(PLAN)


def operation_of(module: nn.Module) -> str:
    """The public call that made the twin which an edited module is, or is a part of."""
    plan = plan_of(module)
    return "ablate" if plan is None else plan.group.operation


def edits_of(model: nn.Module) -> tuple[str, ...]:
    """What was done to an edited twin, or to twins inside a model, in words; nothing for any other model."""
    plans = filter(None, map(plan_of, model.modules()))
    return tuple(edit for group in dict.fromkeys(plan.group for plan in plans) for edit in group.edits)


def remembered_boundaries(model: nn.Module) -> tuple[Boundary, ...] | None:
    """The original's boundaries, where ``model`` is an edited twin that knows them."""
    plan = plan_of(model)
    return plan.group.boundaries if plan is not None and plan.group.boundaries else None


def shares_parameters(model: nn.Module) -> bool:
    """Whether ``model`` is an edited twin made with ``share=True``."""
    plan = plan_of(model)
    return plan is not None and plan.group.shares


def refuse_shared(model: nn.Module, operation: str, layer: str | None = None) -> None:
    """Refuse to train what is, or holds, a twin made with ``share=True``.

    Raises:
        SkipscopeError: as said.
    """
    if any(map(shares_parameters, model.modules())):
        raise SkipscopeError(
            operation,
            "this twin shares its parameters with the original: training one would train the other",
            layer=layer,
            expected="a twin with parameters of its own",
            got="ablate(..., share=True)",
            cure="make it with share=False",
        )


# --- an edited call ---


def edited(
    rules: list[Rule | Join],
    operation: _operations.Operation,
    func: Any,
    args: Any,
    kwargs: Any,
    values: list[Any],
    this: Any,
) -> Any:
    """Make a call with its operands rewritten.

    Args:
        rules: what happens to which operand.
        operation: what is called.
        func: the function that is called.
        args: its arguments as built.
        kwargs: the same by name.
        values: its operands.
        this: the current pass.
    """
    target = values[0]
    join: Join | None = None
    for rule in rules:
        if isinstance(rule, Join):
            join = rule
        elif rule.place.operand == _operations.WHOLE:
            whole = target if target._base is None else target._base
            whole.copy_(_rewritten(rule.factor, whole))  # the slice, a view of it, sees that
        else:
            operand = rule.place.operand  # torch 2.6 cannot compile values[operand] = ...
            values = [_rewritten(rule.factor, v) if i == operand else v for i, v in enumerate(values)]
    if join is not None:
        # In eager code the connection's own merges may be edited too; compiled code counts only the model's.
        with nullcontext() if torch.compiler.is_compiling() else this:
            return join.sum(operation, args, kwargs, values, this.passing)
    overwrites = operation.in_place and values[0] is not target
    if overwrites and any(isinstance(rule, Rule) and rule.factor is None for rule in rules):
        # A detached view may be saved for the way back, and target is overwritten.
        values[0] = values[0].clone()
    new_args, new_kwargs = _operations.with_operands(operation, args, kwargs, values)
    if not overwrites:
        return func(*new_args, **new_kwargs)
    return target.copy_(_operations.out_of_place(operation, func)(*new_args, **new_kwargs))


def _rewritten(factor: float | Tensor | None, operand: Tensor) -> Tensor:
    if factor is None:
        return operand.detach()
    if operand.is_quantized:
        scaled = operand.dequantize() * factor
        return torch.quantize_per_tensor(scaled, operand.q_scale(), operand.q_zero_point(), operand.dtype)
    if isinstance(factor, (float, int)):  # a tuple of types: torch 2.6 cannot compile `float | int`
        if factor == 0:
            # In its own layout: the sum takes it on, and a view of the sum may need it.
            return torch.zeros_like(operand)
    elif factor.ndim:
        factor = factor.to(operand.device, operand.dtype)
    if torch.compiler.is_compiling():
        return operand * factor
    with without_modes():  # a tap around the twin sees the edited call, not how it was edited
        return operand * factor
