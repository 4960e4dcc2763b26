"""The record of one forward pass as plain data: every torch call in order, with its input and output values.

A *value* is one tensor at one time: an input, a parameter, a constant, or the result of a call. A write into
a tensor makes a new value, and so does the next read of every view that shares its memory. Values and calls
are numbered in order of execution, so a value is computed from values with smaller numbers only.
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
    """Whether a dtype is real, complex or quantized, and not that of counts, ids or masks."""
    return dtype.is_floating_point or dtype.is_complex or dtype in _QUANTIZED


@dataclass(slots=True, eq=False)
class Value:
    """One tensor at one time.

    Attributes:
        index: its index in ``Trace.values``.
        origin: input, parameter, constant, or result of a call.
        shape: shape of the tensor.
        dtype: dtype of the tensor.
        call: index of the call that returned it; None for any other origin.
        position: its position among the call's results.
        name: path of a parameter; else empty.
        from_data: whether it is an input or was computed from one.
        is_code: whether it holds integers or booleans from the data (token ids, masks), or was computed from
            those without weights (one-hot ids, additive masks).
        starts: whether activations begin here: a float input, or the result of a lookup of token ids.
        number: for a constant that is a single integer, as an index is, its number; else None.
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
        """Whether its dtype is real or complex, so that it can carry gradients, or quantized."""
        return is_number(self.dtype)

    @property
    def is_activation(self) -> bool:
        """Whether it depends on an input, and a gradient could flow through it."""
        return self.from_data and self.is_float and not self.is_code

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return torch.Size(self.shape).numel()


@dataclass(slots=True, eq=False)
class Operand:
    """Stand-in for a tensor in the arguments of a call: the index of its value."""

    value: int


@dataclass(frozen=True)
class Routed:
    """One call of a chain of masked writes that together replace every element of a tensor.

    Attributes:
        operand: number of the operand of which this call replaces a part.
        base: value of the tensor that the chain replaces.
        before: values that the earlier calls of the chain have written into other parts.
        end: value that the last call of the chain returns.
    """

    operand: int
    base: int
    before: tuple[int | None, ...]
    end: int


@dataclass(slots=True, eq=False)
class TracedCall:
    """One call of a torch function.

    Attributes:
        index: its index in ``Trace.calls``.
        function: the operation, one name for all of its spellings: ``"add"`` for ``+``, ``torch.add`` and
            ``add_``.
        operands: values of the tensors among the arguments, in order.
        results: values that it returned.
        arguments: positional arguments; each tensor as an :class:`Operand`, other objects as their
            type's name.
        keywords: keyword arguments, in the same form.
        module: path of the innermost module that runs.
        run: number of earlier runs of that module.
        step: number of earlier calls of this operation by the same code in this module: the time step of a
            recurrence.
        in_place: whether it writes into its first operand.
        is_view: whether its results share the memory of its first operand.
        inferred: whether it was not executed, but describes the effect of a write into shared memory on
            another view of it.
        inside: the composite torch function that makes it, or empty; no edit can be made there.
        transformed: whether it is made under ``torch.vmap`` or ``torch.func``, where tensors are not the
            model's own.
        key: identifier of the call, if it joins tensors or looks up ids; else None.
        joins: for a call that joins tensors, the operation; else empty.
        joined: the operands that it joins: values, or None for objects that are not tensors.
        whole: for a write into a part of a tensor, the value of the whole tensor before it; else None.
        written: for such a write, the value of the whole tensor after it; else None.
        owner: path of the module whose code makes the call, for calls that join tensors.
        checkpointed: whether it is recomputed in the backward pass, outside of any module's forward.
        lists_index: whether its index is a list, as in ``x[[1]]``; the arguments hold a tuple, as for
            ``x[1,]``.
        routed: for a call of a chain of masked writes that together replace all of a tensor, its part in the
            chain; else None.
        zeroed: whether it multiplies by zeros of the product's size that are not weights: an initial state.
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
        """Identifier of the bytecode instruction that makes the call."""
        return id(self._code), self._instruction

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or keyword, or ``default`` if it was not given."""
        if position < len(self.arguments):
            return self.arguments[position]
        return self.keywords.get(name, default)


@dataclass(slots=True, eq=False)
class ModuleRun:
    """One run of a module.

    Attributes:
        path: path of the module.
        nth: number of its earlier runs.
        begins: index of the first call made inside.
        ends: index of the first call made afterwards.
        inputs: values of its input tensors.
        outputs: values of its output tensors.
    """

    path: str
    nth: int
    begins: int
    ends: int = -1
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


@dataclass(slots=True, eq=False)
class Hidden:
    """A call that may hold shortcuts the trace cannot see.

    Attributes:
        name: name of the called function.
        reason: why its inside cannot be seen.
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
        values: every value, in order of execution.
        calls: every torch call, in order of execution.
        runs: every run of a module, in the order in which they began.
        inputs: values of the model's input tensors.
        outputs: values that the model returned.
        result: values that the recorded function returned, for instance the loss.
        parameters: value of each parameter that was used, by its path.
        hidden: calls that may hold shortcuts the trace cannot see.
        with_gradients: whether the pass was run with gradients, because the model differentiates inside its
            forward.
        writes_inputs: whether the pass wrote into the model's input tensors.
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
        """All values that ``value`` was computed from, including itself."""
        seen, waiting = {value}, [value]
        while waiting:
            fresh = [v for v in self.operands_of(waiting.pop()) if v not in seen]
            seen.update(fresh)
            waiting += fresh
        return seen

    def consumers(self, value: int) -> list[int]:
        """Indices of the calls that have ``value`` as an operand."""
        if self._consumers is None:
            self._consumers = {}
            for call in self.calls:
                for operand in dict.fromkeys(call.operands):
                    self._consumers.setdefault(operand, []).append(call.index)
        return self._consumers.get(value, [])

    def weights_of(self, call: TracedCall) -> frozenset[str]:
        """Paths of the parameters that a call takes, directly or in weights computed from them."""
        mine = (self._parameters_in(v) for v in call.operands if not self.values[v].from_data)
        return frozenset().union(*mine)

    def _parameters_in(self, value: int) -> frozenset[str]:
        known = self._weights.get(value)
        if known is None:
            if self.values[value].origin is Origin.PARAMETER:
                known = frozenset([self.values[value].name])
            else:
                # The recursion is shallow: chains of operations on weights alone are short.
                above = [v for v in self.operands_of(value) if not self.values[v].from_data]
                known = frozenset().union(*map(self._parameters_in, above))
            self._weights[value] = known
        return known

    def addends(self, value: int) -> list[int]:
        """Decompose ``value`` into summands, through sums, constant factors, means and stacks.

        For the scalar loss these are the terms of the loss. ``[value]`` if it is not a sum.
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
        """The operands that a call adds up, or [] if it is not a sum."""
        operands = [v for v in call.operands if self.values[v].from_data]
        constant = len(operands) == 1 and not self.weights_of(call)
        if call.function in {"add", "sub", "rsub", "stack", "cat"}:
            return operands
        if call.function in _SCALING:
            scalar = constant and self._is_sum_of_scalars(operands[0])
            return operands if scalar else []
        return []

    def _is_sum_of_scalars(self, value: int) -> bool:
        """Whether a value is a scalar, or a stack or concatenation."""
        call = self.values[value].call
        stacked = call is not None and self.calls[call].function in {"stack", "cat"}
        return self.values[value].numel == 1 or stacked


_SCALING = frozenset(["mul", "div", "neg", "mean", "sum", "reshape", "view", "squeeze", "to", "getitem"])
