"""The record of one forward pass, as plain data: every torch call in order, with the values it took and gave.

A *value* is one tensor at one time: an input, a parameter, a constant, or what a call gave. A call that
writes into its argument gives a new value, and so does every view that shares its memory, when it is next
read. Values and calls are numbered in order of execution, so a value is computed from values with smaller
numbers only.
"""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch

from skipscope.shortcuts._shortcut_result import CallKey


class Origin(enum.Enum):
    """Where a value comes from."""

    INPUT = "input"
    PARAMETER = "parameter"
    CONSTANT = "constant"
    CALL = "call"


_QUANTIZED = frozenset({torch.quint8, torch.qint8, torch.qint32})


def is_number(dtype: torch.dtype) -> bool:
    """Whether tensors of a type hold real or complex numbers, and not counts, ids or truth values."""
    return dtype.is_floating_point or dtype.is_complex or dtype in _QUANTIZED


@dataclass(slots=True, eq=False)
class Value:
    """One tensor at one time.

    Attributes:
        index: its number, an index of ``Trace.values``.
        origin: input, parameter, constant, or result of a call.
        shape: of the tensor.
        dtype: of the tensor.
        call: index of the call that gave it; None for any other origin.
        position: which of the call's results it is.
        name: of a parameter, its path.
        from_data: whether it was computed from an input.
        is_code: whether it is integers or truth values of the data (token ids, masks), or computed from those
            without weights (one-hot ids, additive masks).
        starts: whether activations begin here: an input with numbers, or what a weight makes of token ids.
        number: the value of a constant that is a single integer, as an index is.
    """

    index: int
    origin: Origin
    shape: tuple[int, ...]
    dtype: torch.dtype
    call: int | None = None
    position: int = 0
    name: str = ""
    from_data: bool = False
    is_code: bool = False
    starts: bool = False
    number: int | None = None

    @property
    def is_float(self) -> bool:
        """Whether it holds real or complex numbers, which carry gradients, or those of a quantized model."""
        return is_number(self.dtype)

    @property
    def is_activation(self) -> bool:
        """Whether it was computed from an input, and a gradient could go through it."""
        return self.from_data and self.is_float and not self.is_code

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return torch.Size(self.shape).numel()


@dataclass(slots=True, eq=False)
class Operand:
    """In the arguments of a call, a tensor: the value with this index."""

    value: int


@dataclass(frozen=True)
class Routed:
    """What one of the calls that together replace all of a tensor lets pass.

    Attributes:
        operand: number of the operand that it replaces in part.
        base: value of the tensor that all of them together replace.
        before: values that the calls before it have put in place of other parts.
        end: value that the last of them gives.
    """

    operand: int
    base: int
    before: tuple[int | None, ...]
    end: int


@dataclass(slots=True, eq=False)
class TracedCall:
    """One call of a torch function.

    Attributes:
        index: its number, an index of ``Trace.calls``.
        function: the operation, one name for all of its spellings: ``"add"`` for ``+``, ``torch.add`` and
            ``add_``.
        operands: values of the tensors among the arguments, in order.
        results: values that it gave.
        arguments: positional arguments; each tensor as an :class:`Operand`, other objects as their
            type's name.
        keywords: the same for keyword arguments.
        module: path of the innermost module that runs.
        run: how many times that module had run before.
        step: how many times this line had made this call before in this module: the time step of a
            recurrence.
        in_place: whether it writes into its first operand.
        is_view: whether its results share the memory of its first operand.
        inferred: it was not made, but describes what a write into shared memory does to another view of it.
        inside: the composite function of torch's that makes it, or empty; no edit can be made there.
        transformed: it is made under ``torch.vmap`` or ``torch.func``: its tensors are not the model's own.
        key: identifier of the call site, for calls that join tensors or make activations of ids; None for any
            other.
        joins: for a call that joins tensors, the operation; else empty.
        joined: the operands that it joins: values, or None for other objects.
        whole: for a write into a part of a tensor, all of that tensor before; else None.
        written: the same afterwards.
        owner: path of the module whose code makes the call, for calls that join tensors.
        checkpointed: it is run again in the backward pass, outside of any module's forward.
        lists_index: its index is a list: ``x[[1]]``, which the arguments have as a tuple like ``x[1,]``.
        routed: for one of the calls that together replace all of a tensor, each a part of its own; else None.
        zeroed: a product with zeros of its own size that are not weights: an initial state.
    """

    index: int
    function: str
    operands: tuple[int, ...]
    results: tuple[int, ...]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    module: str
    run: int
    step: int = 0
    in_place: bool = False
    is_view: bool = False
    inferred: bool = False
    inside: str = ""
    transformed: bool = False
    key: CallKey | None = None
    joins: str = ""
    joined: tuple[int | None, ...] = ()
    whole: int | None = None
    written: int | None = None
    owner: str = ""
    checkpointed: bool = False
    zeroed: bool = False
    routed: Routed | None = None
    lists_index: bool = False
    _code: CodeType | None = None
    _instruction: int = 0

    @property
    def source(self) -> str:
        """``file.py:line`` of the code that makes the call."""
        if self._code is None:
            return ""
        lines = (line for start, end, line in self._code.co_lines() if start <= self._instruction < end)
        return f"{os.path.basename(self._code.co_filename)}:{next(lines, None)}"

    @property
    def site(self) -> tuple[int, int]:
        """The same for every call that one instruction of the code makes."""
        return id(self._code), self._instruction

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by its position or its keyword."""
        if position < len(self.arguments):
            return self.arguments[position]
        return self.keywords.get(name, default)


@dataclass(slots=True, eq=False)
class ModuleRun:
    """One run of a module.

    Attributes:
        path: of the module.
        nth: how many times it had run before.
        begins: number of the first call made inside.
        ends: number of the first call made afterwards.
        inputs: values of the tensors that it was given.
        outputs: values of the tensors that it returned.
    """

    path: str
    nth: int
    begins: int
    ends: int = -1
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


@dataclass(slots=True, eq=False)
class Hidden:
    """A call that may hold shortcuts inside, which the trace cannot see.

    Attributes:
        name: what was called.
        reason: why they cannot be seen.
        source: ``file.py:line``.
        module: path of the innermost module that ran.
    """

    name: str
    reason: str
    source: str
    module: str


@dataclass(eq=False)
class Trace:
    """Every torch call of one forward pass, and the values between them.

    Attributes:
        values: every tensor at every time, in order.
        calls: every torch call, in order.
        runs: every run of a module, in the order in which they began.
        inputs: values that the model was called with.
        outputs: values that the model returned.
        result: values that the recorded function returned: the loss, where it computes one.
        parameters: value of each parameter that took part, by its path.
        hidden: calls that may hold shortcuts inside.
        with_gradients: the pass was run with gradients, because the model differentiates inside its forward.
        writes_inputs: the pass wrote into tensors that the model was called with.
    """

    values: list[Value] = field(default_factory=list)
    calls: list[TracedCall] = field(default_factory=list)
    runs: list[ModuleRun] = field(default_factory=list)
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    result: tuple[int, ...] = ()
    parameters: dict[str, int] = field(default_factory=dict)
    hidden: list[Hidden] = field(default_factory=list)
    with_gradients: bool = False
    writes_inputs: bool = False
    _weights: dict[int, frozenset[str]] = field(default_factory=dict)
    _consumers: dict[int, list[int]] | None = None

    def operands_of(self, value: int) -> tuple[int, ...]:
        """The values that a value was computed from directly."""
        call = self.values[value].call
        return () if call is None else self.calls[call].operands

    def ancestors(self, value: int) -> set[int]:
        """Every value that ``value`` was computed from, including itself."""
        seen, waiting = {value}, [value]
        while waiting:
            fresh = [v for v in self.operands_of(waiting.pop()) if v not in seen]
            seen.update(fresh)
            waiting += fresh
        return seen

    def consumers(self, value: int) -> list[int]:
        """The calls that take a value."""
        if self._consumers is None:
            self._consumers = {}
            for call in self.calls:
                for operand in dict.fromkeys(call.operands):
                    self._consumers.setdefault(operand, []).append(call.index)
        return self._consumers.get(value, [])

    def weights_of(self, call: TracedCall) -> frozenset[str]:
        """Paths of the parameters that enter at a call, itself or in weights computed from them."""
        mine = (self._parameters_in(v) for v in call.operands if not self.values[v].from_data)
        return frozenset().union(*mine)

    def _parameters_in(self, value: int) -> frozenset[str]:
        known = self._weights.get(value)
        if known is None:
            if self.values[value].origin is Origin.PARAMETER:
                known = frozenset([self.values[value].name])
            else:  # a value is computed from earlier ones, so this ends; chains of weights are short
                above = [v for v in self.operands_of(value) if not self.values[v].from_data]
                known = frozenset().union(*map(self._parameters_in, above))
            self._weights[value] = known
        return known

    def addends(self, value: int) -> list[int]:
        """The values whose sum ``value`` is, found through sums, constant factors, means and stacks.

        For the scalar loss these are the terms of the loss; ``[value]`` where it is no sum.
        """
        found, waiting = [], [value]
        while waiting:
            at = waiting.pop()
            call = self.values[at].call
            made = None if call is None else self.calls[call]
            parts = [] if made is None else self._summands(made)
            if parts:
                waiting += reversed(parts)
            else:
                found.append(at)
        return found

    def _summands(self, call: TracedCall) -> list[int]:
        """The operands that a call adds up, or []."""
        operands = [v for v in call.operands if self.values[v].from_data]
        constant = len(operands) == 1 and not self.weights_of(call)
        if call.function in {"add", "sub", "rsub", "stack", "cat"}:
            return operands
        if call.function in _SCALING:
            scalar = constant and self._is_sum_of_scalars(operands[0])
            return operands if scalar else []
        return []

    def _is_sum_of_scalars(self, value: int) -> bool:
        """Whether a value is one number, or numbers that were stacked."""
        call = self.values[value].call
        stacked = call is not None and self.calls[call].function in {"stack", "cat"}
        return self.values[value].numel == 1 or stacked


_SCALING = frozenset(["mul", "div", "neg", "mean", "sum", "reshape", "view", "squeeze", "to", "getitem"])
