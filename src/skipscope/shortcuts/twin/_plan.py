"""Plans of a twin: which operands of which calls are rewritten, and how; and the rewriting of a call."""

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
REWIRED = "rewired: "  # prefix of a rewiring in Group.edits


@dataclass(frozen=True, eq=False)
class Rule:
    """A rule that rewrites one operand of one call.

    Attributes:
        place: the operand.
        factor: None detaches, 0 gives zeros, and any other factor multiplies.
        name: name of the shortcut, for errors.
    """

    place: Place
    factor: float | Tensor | None
    name: str

    def __deepcopy__(self, memo: Any) -> Rule:
        return self  # not copied: the user reads the gradient of their own strength tensor

    @property
    def action(self) -> Any:
        """Value that is equal for equal rules, to compare the rules of several calls."""
        return self.place.operand, self.factor


@dataclass(eq=False)
class Group:
    """State shared by all edited modules of one twin.

    Attributes:
        boundaries: boundaries of the original.
        shares: whether the twin shares its parameters with the original.
        edits: description of each edit, in order.
        known: source lines of the merges that were seen when the shortcuts were found.
        sites: sites of all edited calls.
        operations: operations of all edited calls.
        root: the plan of the twin itself, which edits merges outside of every module's forward.
        compiled: the current pass while code is compiled.
        has_warned: whether the user was warned that a pass reached no edit.
        has_readers: whether connections replace the inputs of some modules.
        runs_eagerly: whether an edited call is in a compiled function that a forward calls. Such a function
            is run eagerly.
        has_compiled: whether an edited call is in a compiled module, where an eager pass does not see it.
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
        """Name of the public function that made the twin, for its errors."""
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
        group: the group of the twin it belongs to.
        rules: site and occurrence -> rules.
        everywhere: site -> rules, if every occurrence is edited alike. This covers loops that run longer than
            in the trace.
        counted: run of the host, operation and index within the run -> rules, for compiled code.
        among: operation -> number of its calls in one run of the host.
        calls: site -> the runs of the host in which it is edited.
        runs: number of runs of the host when the shortcuts were found.
        reads: joins that replace the module's first tensor input.
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
        # The root's plan is copied with its group.
        if id(self) not in memo:
            memo[id(self)] = self.copied(group, memo)
        return memo[id(self)]

    def copied(self, group: Group, memo: dict[int, Any]) -> Plan:
        """A copy of the plan in another group, with the copied connections in ``memo``."""
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
        """Whether the host's forward is edited alike in each of its runs."""
        every_call = set(range(self.runs))
        return len(self.everywhere) == len(self.calls) and all(c == every_call for c in self.calls.values())

    def edits_in(self, call: int) -> int:
        """The number of edited calls in one run of the host."""
        return len([key for key in self.counted if key[0] == call])

    def add(self, rule: Rule | Join) -> None:
        """Add a rule. Several rules for one operand apply in order."""
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
        """The rules of all calls at a site."""
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
    """The plan of an edited module. None for any other module."""
    return module.__dict__.get(PLAN)


def operation_of(module: nn.Module) -> str:
    """Name of the public function that made the twin to which an edited module belongs."""
    plan = plan_of(module)
    return "ablate" if plan is None else plan.group.operation


def edits_of(model: nn.Module) -> tuple[str, ...]:
    """Descriptions of the edits of a twin, or of the twins inside a model. Empty for any other model."""
    plans = filter(None, map(plan_of, model.modules()))
    return tuple(edit for group in dict.fromkeys(plan.group for plan in plans) for edit in group.edits)


def remembered_boundaries(model: nn.Module) -> tuple[Boundary, ...] | None:
    """The original's boundaries, if ``model`` is an edited twin that knows them; else None."""
    plan = plan_of(model)
    return plan.group.boundaries if plan is not None and plan.group.boundaries else None


def shares_parameters(model: nn.Module) -> bool:
    """Whether ``model`` is an edited twin made with ``share=True``."""
    plan = plan_of(model)
    return plan is not None and plan.group.shares


def refuse_shared(model: nn.Module, operation: str, layer: str | None = None) -> None:
    """Refuse to train a model that is, or contains, a twin made with ``share=True``.

    Raises:
        SkipscopeError: it is, or contains, such a twin.
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
    """Execute a call with its operands rewritten.

    Args:
        rules: rules for its operands.
        operation: its operation.
        func: its torch function.
        args: its positional arguments.
        kwargs: its keyword arguments.
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
            whole.copy_(_rewritten(rule.factor, whole))  # target, a view of whole, changes too
        else:
            operand = rule.place.operand  # torch 2.6 cannot compile values[operand] = ...
            values = [_rewritten(rule.factor, v) if i == operand else v for i, v in enumerate(values)]
    if join is not None:
        # In eager code the connection's own merges may be edited too. Compiled code counts only merges of the
        # model.
        with nullcontext() if torch.compiler.is_compiling() else this:
            return join.sum(operation, args, kwargs, values, this.passing)
    overwrites = operation.in_place and values[0] is not target
    if overwrites and any(isinstance(rule, Rule) and rule.factor is None for rule in rules):
        # The detached view may be saved for the backward pass, and target is overwritten.
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
            # zeros_like keeps the memory layout: the sum inherits it, and a view of the sum may need it.
            return torch.zeros_like(operand)
    elif factor.ndim:
        factor = factor.to(operand.device, operand.dtype)
    if torch.compiler.is_compiling():
        return operand * factor
    # A tap around the twin must see the edited call, and not this product.
    with without_modes():
        return operand * factor
