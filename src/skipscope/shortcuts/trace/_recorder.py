"""The recorder of a forward pass: a ``TorchFunctionMode`` for calls, and hooks for module runs."""

from __future__ import annotations

import functools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skipscope import _data, _sharding
from skipscope._tensor_layouts import shape_of
from skipscope._torch_private import (
    applied_function,
    arguments_applied,
    as_written,
    compiler_is_loaded,
    inner_tensors,
    is_transformed,
    scripted_calls,
    untransformed,
    without_modes,
)
from skipscope.shortcuts.trace import _call_sites, _operations
from skipscope.shortcuts.trace._argument_order import in_order
from skipscope.shortcuts.trace._function_names import (
    COMPOSITES,
    LIKE_ANOTHER,
    LINEAR,
    LOOKUPS,
    OVERWRITES,
    QUERIES,
    SHAPE_ONLY,
    UNINITIALISED,
    VIEWS,
    Function,
    function_of,
    words,
)
from skipscope.shortcuts.trace._lent_inputs import LentInputs
from skipscope.shortcuts.trace._recorded_trace import (
    Hidden,
    ModuleRun,
    Operand,
    Origin,
    Trace,
    TracedCall,
    Value,
    is_number,
)
from skipscope.shortcuts.trace._routed_rows import RoutedRows
from skipscope.shortcuts.trace._tensor_memory import Memory, memory_of

_CHECKPOINT = os.path.join(_call_sites.TORCH, "utils", "checkpoint.py")
_TRANSFORMS = os.path.join(_call_sites.TORCH, "_functorch") + os.sep
_MODULE = os.path.join(_call_sites.TORCH, "nn", "modules", "module.py")
_DIFFERENTIATING = frozenset({"grad", "backward"})
# Single calls that take weights and join activations inside.
CELLS = words(
    "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell transformer_encoder_layer"
)
IN_FUNCTION = "an autograd.Function: what it joins cannot be seen"
CELL = "a fused recurrent cell: the gates in it cannot be seen"
SCRIPTED = "a scripted function: what it joins cannot be seen"
UNSEEN_WRITE = "code outside of recorded torch calls fills this tensor (a kernel, a collective)"
LIBRARY = "an operator of a library: what it joins cannot be seen"
TRANSFORMED = "a function under torch.vmap or torch.func: what it joins cannot be tapped"


# Operators that run functions of the model inside.
_CONTROL = words("cond while_loop map_impl scan associative_scan")


class NeedsGradients(BaseException):
    """Raised if the model differentiates in its forward. Not an Exception, which its code might catch."""


def record(model: nn.Module, call: Callable[[], Any], lent: LentInputs | None = None) -> Trace:
    """Run ``call`` once, and record every torch call that it makes.

    The pass runs without gradients. If the model's own forward differentiates (forces, a gradient penalty),
    the pass is run once more with gradients, and ``Trace.with_gradients`` is set. Use it inside
    ``untouched(model)``: hooks are set, and buffers may change.

    Args:
        model: the eager module that ``call`` runs. Its arguments are the trace's inputs.
        call: ``lambda: model(x)``, or ``lambda: loss(model(x), y)`` to record the loss too. It is run twice
            if the model differentiates, so it must not consume its inputs (an iterator).
        lent: inputs of ``call``, to be restored after each run.

    Returns:
        The trace. It holds no tensor.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.ones(1, 2)
        >>> trace = record(model, lambda: model(x).square().mean())
        >>> [(call.function, call.module) for call in trace.calls]
        [('linear', '0'), ('relu', '1'), ('square', ''), ('mean', '')]
        >>> sorted(trace.weights_of(trace.calls[0]))
        ['0.bias', '0.weight']
    """
    lent = lent or LentInputs()
    is_loaded = compiler_is_loaded()
    try:
        return _with_gradients_if_needed(model, call, lent)
    except Exception:
        if is_loaded or not compiler_is_loaded():
            raise
        # The pass itself loaded the compiler, as torch.cond does. Once loaded it can be switched off, so the
        # second attempt runs eagerly.
        return _with_gradients_if_needed(model, call, lent)


def _with_gradients_if_needed(model: nn.Module, call: Callable[[], Any], lent: LentInputs) -> Trace:
    try:
        return _recorded(model, call, lent, gradients=False)
    except NeedsGradients:
        return _recorded(model, call, lent, gradients=True)


def _recorded(model: nn.Module, call: Callable[[], Any], lent: LentInputs, gradients: bool) -> Trace:
    try:
        with recording(model, lent=lent, gradients=gradients) as recorder:
            recorder.trace.result = recorder.values_in(call())
    finally:
        is_changed = lent.restore()
    recorder.trace.writes_inputs = is_changed
    return recorder.trace


# Called after each recorded call with the call, the torch function, its arguments, keywords and output. A
# call inside an ``autograd.Function`` is not part of the trace and has index -1.
Listener = Callable[[TracedCall, Callable[..., Any], tuple[Any, ...], dict[str, Any], Any], None]


@contextmanager
def recording(
    model: nn.Module, listener: Listener | None = None, *, gradients: bool, lent: LentInputs | None = None
) -> Iterator[Recorder]:
    """Context that records the torch calls made inside it; a listener also receives their tensors."""
    recorder = Recorder(model, gradients, listener, lent)
    try:
        scripted = scripted_calls.heard_by(recorder.run_scripted)
        with as_written(), recorder.watching(), torch.set_grad_enabled(gradients), scripted, recorder:
            yield recorder
    finally:
        recorder.finish()
        if not gradients:
            # Older versions of torch would reuse the casts made without gradients.
            torch.clear_autocast_cache()


class Recorder(TorchFunctionMode):
    """Records every torch call in a :class:`Trace`.

    Args:
        model: the module whose module runs are recorded.
        gradients: whether the pass is run with gradients.
        listener: called after each call.
        lent: inputs whose contents are kept before a call writes into them.
    """

    def __init__(
        self,
        model: nn.Module,
        gradients: bool = False,
        listener: Listener | None = None,
        lent: LentInputs | None = None,
    ):
        super().__init__()
        self.model, self.trace, self.listener = model, Trace(with_gradients=gradients), listener
        self.lent = lent or LentInputs()
        self.memory, self.sites = Memory(self.trace, self._infer), _call_sites.Sites(model)
        self.stack: list[ModuleRun] = []
        # For each entry of the stack, the index in _unseen of the call that runs it, or None.
        self._unseen_modules: list[int | None] = []
        self._times: Counter[str] = Counter()
        self._steps: Counter[tuple[str, int, int, str]] = Counter()
        self._weights: dict[int, tuple[str, Tensor]] = {}
        self._packed_weights: dict[int, tuple[int, torch.ScriptObject]] = {}
        # For the inner tensors of a weight of a tensor subclass: the tensor and the weight.
        self._weight_parts: dict[int, tuple[Tensor, Tensor]] = {}
        # Values that were computed from an input or a parameter.
        self._derived: set[int] = set()
        # Name and operands of each call whose inside is not recorded.
        self._unseen: list[tuple[str, tuple[int, ...]]] = []
        # Name and source of the unseen calls with a single activation as operand. Such a call is reported
        # as hidden once a weight is used inside.
        self._may_use_weights: dict[int, tuple[str, str]] = {}
        # Uninitialised tensors that were not read yet: value -> source line.
        self._unfilled: dict[int, str] = {}
        # The frame of the last call of an autograd.Function, and its index in _unseen.
        self._applied: tuple[Any, int] | None = None
        self._keys: list[TracedCall] = []
        self._routed = RoutedRows()
        self._constants: set[int] = set()
        self._composite = ""

    # --- calls ---

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        function = function_of(func)
        if function.may_write or "out" in kwargs or kwargs.get("inplace"):
            self.lent.before_write(_tensors(args, kwargs))
        if function.name in QUERIES:
            return func(*args, **kwargs)
        if function.name in _DIFFERENTIATING and not self.trace.with_gradients:
            raise NeedsGradients
        operation = _operations.operation_of(func)
        if operation is not None and operation.is_many:
            return _operations.one_by_one(self, operation, func, args, kwargs)
        if function.name in COMPOSITES and isinstance(func, FunctionType):
            return self._run_composite(func, args, kwargs)
        as_given, named = args, kwargs
        args, kwargs = in_order(func, args, kwargs)
        tensors = _tensors(args, kwargs)
        frame = _call_sites.caller()
        unseen = self._unseen_around(frame)
        if unseen is not None:
            return self._noted_unseen(unseen, func, function, as_given, named)
        operands = tuple(self.value_of(tensor) for tensor in tensors)
        # Buffers that torch itself allocates (FSDP) are filled without joining activations.
        is_empty = function.name in UNINITIALISED and sys._getframe(1) is frame
        if self._unfilled:
            self._note_unseen_write(function, operands, kwargs)
        packed = self._packed_in(func, args) if type(func).__module__ == "torch._ops" else ()
        transformed = any(map(is_transformed, tensors))
        call = self._new_call(function, operands, args, kwargs, frame)
        if function.name in LIKE_ANOTHER:
            call.operands = operands[:1]
        call.operands += packed
        if transformed:
            call.transformed = True
            self._unseen.append(("unseen", tuple(v for v in operands if v in self._derived)))
        if operation is not None and not self._composite:
            self._identify(call, operation, args, kwargs, frame)
        elif not self._composite and self._looks_up(call):
            call.key, call.owner, call.checkpointed = self.sites.key(frame, _label(func, call))
            self._keys.append(call)
        output = func(*as_given, **named)
        if function.name not in SHAPE_ONLY or function.in_place:
            self._note(call, tensors, args, kwargs, output)
            if call.joins:
                self._routed.note(call, args, kwargs)
            if is_empty:
                self._unfilled |= dict.fromkeys(call.results, call.source)
            elif call.is_view and call.operands[0] in self._unfilled:
                self._unfilled |= dict.fromkeys(call.results, self._unfilled[call.operands[0]])
            if not call.joins and _is_of_a_library(func):
                self._note_library(call)
            if self.listener is not None:
                self.listener(call, func, args, kwargs, output)
        elif isinstance(output, Tensor):
            value = self._new(output, Origin.CONSTANT).index
            self.memory.set(output, value)
            if is_empty:
                self._unfilled[value] = call.source
        return output

    def _note_unseen_write(self, function: Function, operands: tuple[int, ...], kwargs: Any) -> None:
        """Report a read of a tensor that no recorded call has filled: unseen code has filled it."""
        if function.name in VIEWS or function.name in SHAPE_ONLY or function.name in LIKE_ANOTHER:
            return
        is_target = function.in_place or kwargs.get("beta") == 0
        read = operands[1:] if is_target else operands[:-1] if "out" in kwargs else operands
        for value in read:
            source = self._unfilled.pop(value, None)
            if source is not None and self.trace.values[value].is_float and self.trace.values[value].numel:
                self._report_hidden("empty", UNSEEN_WRITE, source)

    def _new_call(
        self, function: Function, operands: tuple[int, ...], args: Any, kwargs: Any, frame: Any
    ) -> TracedCall:
        run = self.stack[-1] if self.stack else None
        path, code, at = run.path if run else "", frame.f_code, frame.f_lasti
        site = (path, id(code), at, function.name)
        step = self._steps[site]
        self._steps[site] += 1
        given = iter(operands)
        return TracedCall(
            -1,
            function.name,
            operands,
            (),
            _plain(args, given),
            {key: _plain(a, given) for key, a in kwargs.items()} if kwargs else {},
            path,
            run.nth if run else 0,
            step,
            in_place=function.in_place or bool(kwargs.get("inplace")),
            inside=self._composite,
            _code=code,
            _instruction=at,
        )

    def _identify(
        self, call: TracedCall, operation: _operations.Operation, args: Any, kwargs: Any, frame: Any
    ) -> None:
        """Set the key and the operands of a call that joins tensors."""
        values = _operations.operands(operation, args, kwargs)
        if _operations.tensor_operands(values) < 2 or _call_sites.is_between_processes(frame):
            return
        if call.transformed:
            self._report_hidden("torch.func", TRANSFORMED, _call_sites.source_of(frame))
            return
        call.key, call.owner, call.checkpointed = self.sites.key(frame, operation.name)
        self._keys.append(call)
        call.joins = operation.name
        call.joined = tuple(self.value_of(v) if isinstance(v, Tensor) else None for v in values)
        call.zeroed = operation.name in _operations.PRODUCTS and self._is_zeroed(values)

    def _looks_up(self, call: TracedCall) -> bool:
        """Whether a call may compute an activation from token ids."""
        if call.function == "embedding":
            return True
        if call.function not in LOOKUPS and call.function not in LINEAR:
            return False
        given = [self.trace.values[v] for v in call.operands]
        return any(v.is_code for v in given) and not any(v.is_activation for v in given)

    def _note(self, call: TracedCall, tensors: list[Tensor], args: Any, kwargs: Any, output: Any) -> None:
        """Record the results of a call, or its write into a tensor."""
        out = kwargs.get("out")
        if call.in_place or out is not None:
            self._note_write(call, out if isinstance(out, Tensor) else args[0] if args else tensors[0], args)
            return
        given = [output] if isinstance(output, Tensor) else _data.tensors_in(output)
        before = {id(tensor) for tensor in tensors}
        fresh = [tensor for tensor in given if id(tensor) not in before]
        if not fresh:
            return
        call.lists_index = call.function == "getitem" and isinstance(args[1], list)
        call.is_view = bool(call.operands) and call.function in VIEWS and _shares(fresh[0], tensors[0])
        self._append(call)
        results = []
        for position, tensor in enumerate(given):
            if id(tensor) in before:
                continue
            value = self._new(tensor, Origin.CALL, call.index, position)
            self._inherit(value, call)
            if value.index not in self._derived:
                value.number = _number(tensor)
            self.memory.set(tensor, value.index)
            self._unwrap(tensor, value.index)
            results.append(value.index)
        call.results = tuple(results)
        if call.function in CELLS and any(self.trace.values[v].from_data for v in results):
            self._report_hidden(call.function, CELL, call.source)

    def _note_library(self, call: TracedCall) -> None:
        """Report a library operator that may join activations, or an activation and weights."""
        takes = sum(v in self._derived for v in dict.fromkeys(call.operands))
        if (takes > 1 or call.function in _CONTROL) and any(
            self.trace.values[v].from_data for v in call.results
        ):
            self._report_hidden(call.function, LIBRARY, call.source)

    def _inherit(self, value: Value, call: TracedCall) -> None:
        """Set the properties of a value that follow from the operands of its call."""
        given = [self.trace.values[v] for v in call.operands]
        has_weight = is_activation = False
        for v in given:
            is_derived = v.index in self._derived
            if is_derived:
                self._derived.add(value.index)
            if v.from_data:
                value.from_data = True
                is_activation = is_activation or (v.is_float and not v.is_code)
            elif is_derived:
                has_weight = True
        if not value.from_data:
            return
        if not value.is_float:
            value.is_code = True
        elif not is_activation:
            looks_up = call.function in LOOKUPS and given[0].is_float and not given[0].from_data
            maps = has_weight and (call.function in LINEAR or looks_up)
            value.starts = maps or call.function.startswith("embedding")
            value.is_code = not value.starts

    def _note_write(self, call: TracedCall, target: Any, args: Any) -> None:
        if not isinstance(target, Tensor):
            return
        if call.function == "setitem" and isinstance(args[2], Tensor) and not _tensors((args[1],), None):
            into = _indexed(target, args[1])
            # x[1:] += y ends with a write of the updated view to where it already is.
            if into is not None and _same_place(into, args[2]):
                return
        before = self.value_of(target)
        if call.function in OVERWRITES or not call.in_place:
            # An overwritten target is not an input: drop it once, as the first operand, or as the last for
            # ``out=``. If it occurs among the operands again, it is read too.
            at = [i for i, v in enumerate(call.operands) if v == before]
            dropped = at[0 if call.in_place else -1] if at else None
            call.operands = tuple(v for i, v in enumerate(call.operands) if i != dropped)
        self._append(call)
        value = self._new(target, Origin.CALL, call.index)
        self._inherit(value, call)
        call.results = (value.index,)
        parts = self.memory.wrote(target, before, value.index)
        self._unwrap(target, value.index)
        if parts is not None:
            call.whole, call.written = parts

    def _run_composite(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a Python function of torch so that the calls inside it are recorded."""
        outer, self._composite = self._composite, self._composite or func.__name__
        try:
            with self:
                return _without_dispatch(func)(*args, **kwargs)
        finally:
            self._composite = outer

    # --- values ---

    def value_of(self, tensor: Tensor) -> int:
        """The value that a tensor holds."""
        value = self.memory.get(tensor)
        if value is None:
            return self._value_of_new_tensor(tensor)
        return value if value >= 0 else self._unseen_result(-1 - value, tensor)

    def values_in(self, nest: Any) -> tuple[int, ...]:
        """The values of the tensors in a nested structure."""
        return tuple(self.value_of(tensor) for tensor in _data.tensors_in(nest))

    def _value_of_new_tensor(self, tensor: Tensor) -> int:
        """The value of a tensor seen for the first time: a weight, a constant or an unseen call's result."""
        known = self._weights.get(id(tensor))
        if known is not None:
            value = self._new(tensor, Origin.PARAMETER)
            value.name = known[0]
            self._derived.add(value.index)
            self.trace.parameters[known[0]] = value.index
        elif (alias := self._alias_of(tensor)) is not None or (alias := self._wrapped(tensor)) is not None:
            return alias
        elif self._unseen and id(tensor) not in self._constants and _is_float(tensor):
            return self._unseen_result(len(self._unseen) - 1, tensor)
        else:
            value = self._new(tensor, Origin.CONSTANT)
            value.number = _number(tensor)
        self.memory.set(tensor, value.index)
        return value.index

    def _packed_in(self, func: Any, args: Any) -> tuple[int, ...]:
        """The values of the packed weights among a quantized operator's arguments."""
        # Script objects of other operators may hold anything, for instance a profiler's handle.
        is_quantized = str(func).startswith("quantized.")
        return tuple(self._packed(a) for a in args if is_quantized and isinstance(a, torch.ScriptObject))

    def _packed(self, weights: torch.ScriptObject) -> int:
        """The value of a quantized module's packed weights."""
        path = self.stack[-1].path if self.stack else ""
        known = self._packed_weights.get(id(weights))
        if known is None:
            value = Value(len(self.trace.values), Origin.PARAMETER, (1, 1), torch.qint8)
            value.name = f"{path}.packed" if path else "packed"
            self.trace.values.append(value)
            self._derived.add(value.index)
            known = self._packed_weights[id(weights)] = value.index, weights
        return known[0]

    def _alias_of(self, tensor: Tensor) -> int | None:
        """The value of a view, or of a ``torch.func`` wrapper, that no recorded call made; else None."""
        is_wrapped = is_transformed(tensor)
        base = untransformed(tensor) if is_wrapped else tensor._base
        value = None if base is None else self.memory.get(base)
        if base is not None and value is None and is_wrapped and is_transformed(base):
            value = self._alias_of(base)
        if value is None or base is None:
            return None
        if base.shape != tensor.shape:
            value = self._infer("alias", (value,), tensor)
        self.memory.set(tensor, value)
        return value

    def _wrapped(self, tensor: Tensor) -> int | None:
        """The value of a subclass that wraps known tensors, or of an inner tensor of a weight; else None."""
        whole = self._weight_parts.get(id(tensor))
        parts = inner_tensors(tensor) if whole is None else (whole[1],)
        known = [self.value_of(part) for part in parts if whole is not None or self._is_known(part)]
        if not known:
            return None
        value = self._infer("alias", tuple(known), tensor)
        self.memory.set(tensor, value)
        return value

    def _is_known(self, tensor: Tensor) -> bool:
        return self.memory.get(tensor) is not None or self._wrapped(tensor) is not None

    def _unwrap(self, tensor: Tensor, value: int) -> None:
        """Give the same value to the inner tensors of a transformed tensor or subclass: they outlive it."""
        for part in [untransformed(tensor)] if is_transformed(tensor) else inner_tensors(tensor):
            inner = self._infer("alias", (value,), part)
            self.memory.set(part, inner)
            self._unwrap(part, inner)

    def _unseen_result(self, unseen: int, tensor: Tensor) -> int:
        """The value of the result of an unseen call."""
        name, operands = self._unseen[unseen]
        index = self._infer(name, operands, tensor)
        self.memory.set(tensor, index)
        return index

    def _new(self, tensor: Tensor, origin: Origin, call: int | None = None, position: int = 0) -> Value:
        value = Value(len(self.trace.values), origin, shape_of(tensor), tensor.dtype, call, position)
        self.trace.values.append(value)
        return value

    def _append(self, call: TracedCall) -> None:
        call.index = len(self.trace.calls)
        self.trace.calls.append(call)

    def _infer(
        self, function: str, operands: tuple[int, ...], like: Tensor | Value, again: TracedCall | None = None
    ) -> int:
        """Add a call that was not executed to the trace.

        Args:
            function: name of the operation.
            operands: values of the operands.
            like: a tensor or value with the shape and dtype of the result.
            again: the call that this one repeats with another first operand.

        Returns:
            The value of its result.
        """
        run, values = self.stack[-1] if self.stack else None, self.trace.values
        arguments, keywords = tuple(map(Operand, operands)), {}
        if again is not None:
            starts_with_it = bool(again.arguments) and isinstance(again.arguments[0], Operand)
            arguments = (arguments[0], *again.arguments[1:]) if starts_with_it else again.arguments
            keywords = dict(again.keywords)
        call = TracedCall(
            -1,
            function,
            operands,
            (),
            arguments,
            keywords,
            run.path if run else "",
            run.nth if run else 0,
            inferred=True,
            is_view=function in VIEWS,
        )
        self._append(call)
        position = like.position if isinstance(like, Value) and again is not None else 0
        value = Value(len(values), Origin.CALL, tuple(like.shape), like.dtype, call.index, position)
        values.append(value)
        self._inherit(value, call)
        call.results = (value.index,)
        return value.index

    def _is_zeroed(self, values: list[Any]) -> bool:
        """Whether a constant factor of a product is all zeros and as large as the product.

        A smaller factor is a gain (a frozen norm's may start at 0).
        """
        tensors = [value for value in values if isinstance(value, Tensor)]
        most = max(tensor.numel() for tensor in tensors)
        constant = [
            t
            for t in tensors
            if t.numel() == most > 1 and not t.is_meta and self.value_of(t) not in self._derived
        ]
        with without_modes():
            return any(not bool(tensor.any()) for tensor in constant)

    # --- unseen calls ---

    def _unseen_around(self, frame: Any) -> int | None:
        """The index in ``_unseen`` of the call inside which ``frame`` runs, or None."""
        found = _collective_inside(frame)
        if found is not None:
            return self._apply(found, "collective", is_listed=False)
        for _ in range(17):
            applied = applied_function(frame)
            if applied is not None and applied[0] != "torch.utils.checkpoint":
                found = frame, applied[1]
            frame = frame.f_back
            if frame is None or frame.f_code.co_filename == _MODULE:
                break
        if found is not None:
            return self._apply(*found)
        return self._unseen_modules[-1] if self._unseen_modules else None

    def _apply(self, frame: Any, name: str, is_listed: bool = True) -> int:
        """Note a call of an ``autograd.Function`` by its frame, and report it as hidden if it may merge.

        Returns:
            Its index in ``_unseen``.
        """
        if self._applied is not None and self._applied[0] is frame:
            return self._applied[1]
        arguments = arguments_applied(frame)
        given = [self.value_of(t) for t in _data.tensors_in(arguments)]
        self._unseen.append((name, tuple(given)))
        self._applied = frame, len(self._unseen) - 1
        is_data = [self.trace.values[v].from_data and self.trace.values[v].is_float for v in given]
        is_derived = [v in self._derived for v in given]
        runs_modules = any(isinstance(argument, nn.Module) for argument in arguments)
        source = _call_sites.source_of(frame.f_back)
        if not is_listed:
            return len(self._unseen) - 1
        if any(is_data) and (sum(is_derived) > 1 or runs_modules):
            self._report_hidden(name, IN_FUNCTION, source)
        elif any(is_data):
            self._may_use_weights[len(self._unseen) - 1] = name, source
        return len(self._unseen) - 1

    def _noted_unseen(self, unseen: int, func: Any, function: Function, args: Any, kwargs: Any) -> Any:
        # A function among its arguments may use weights that are not its operands.
        if unseen in self._may_use_weights and any(id(t) in self._weights for t in _tensors(args, kwargs)):
            name, source = self._may_use_weights.pop(unseen)
            self._report_hidden(name, IN_FUNCTION, source)
        output = func(*args, **kwargs)
        if self.listener is not None:
            path = self.stack[-1].path if self.stack else ""
            self.listener(TracedCall(-1, function.name, (), (), (), {}, path, 0), func, args, kwargs, output)
        for tensor in _data.tensors_in(output):
            if id(tensor) not in self._weights:
                self.memory.set(tensor, -1 - unseen)
        return output

    def run_scripted(self, function: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a scripted function or module method; a ``TorchFunctionMode`` sees no call inside it."""
        frame = _call_sites.caller()
        given = [self.value_of(tensor) for tensor in _data.tensors_in((args, kwargs))]
        self._unseen.append((f"scripted {function.name}", tuple(given)))
        is_data = any(self.trace.values[v].is_activation for v in given)
        # The module of a scripted method is not hooked, and may hold weights.
        joins = sum(v in self._derived for v in dict.fromkeys(given)) > 1
        if is_data and (joins or not isinstance(function, torch.jit.ScriptFunction)):
            self._report_hidden(str(function.name), SCRIPTED, _call_sites.source_of(frame))
        output = run(*args, **kwargs)
        before = set(map(id, _data.tensors_in((args, kwargs))))
        for tensor in _data.tensors_in(output):
            if id(tensor) not in before:
                self.memory.set(tensor, -len(self._unseen))
        return output

    def _report_hidden(self, name: str, reason: str, source: str) -> None:
        path = self.stack[-1].path if self.stack else ""
        if not any((h.name, h.source, h.module) == (name, source, path) for h in self.trace.hidden):
            self.trace.hidden.append(Hidden(name, reason, source, path))

    # --- modules ---

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context in which hooks record each module run, with its inputs and outputs."""
        named = list(self.model.named_modules())
        places = {id(module): path for path, module in named}

        def hold(modules: Iterable[nn.Module]) -> None:
            for module in modules:
                for name, weight in module._parameters.items():
                    if weight is not None:
                        path = places[id(module)]
                        self._weights.setdefault(id(weight), (f"{path}.{name}" if path else name, weight))
                        self._weight_parts |= {id(part): (part, weight) for part in inner_tensors(weight)}

        hold(module for _, module in named)
        for _, module in named:
            self._constants.update(map(id, _attributes(module)))
        self._constants -= self._weights.keys()
        with ExitStack() as handles:
            # FSDP replaces shards by whole weights as a unit's forward begins.
            for unit in _sharding.units(self.model):
                handles.callback(
                    unit.register_forward_pre_hook(lambda inner, *_: hold(inner.modules())).remove
                )
            for path, module in named:
                enter, leave = functools.partial(self._enter, path), functools.partial(self._leave, path)
                entered = module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
                handles.callback(entered.remove)
                handles.callback(module.register_forward_hook(leave).remove)
            yield

    def _enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        run = ModuleRun(path, self._times[path], len(self.trace.calls))
        self._times[path] += 1
        if module is self.model:
            self.note_inputs((args, kwargs))
        known = map(self.memory.get, _data.tensors_in((args, kwargs)))
        run.inputs = tuple(value for value in known if value is not None)
        self.trace.runs.append(run)
        self._unseen_modules.append(self._unseen_around(_outside_of_the_call()))
        self.stack.append(run)

    def _leave(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        self.sites.leave(path)
        while self.stack:
            run = self.stack.pop()
            self._unseen_modules.pop()
            run.ends = len(self.trace.calls)
            if run.path == path:
                run.outputs = self.values_in(output)
                if module is self.model:
                    self.trace.outputs = run.outputs
                return

    def note_inputs(self, nest: Any) -> None:
        """Record the tensors in a nested structure as inputs, except those computed from inputs."""
        for tensor in _data.tensors_in(nest):
            known = self.memory.get(tensor)
            if known is not None and (known < 0 or self.trace.values[known].from_data):
                continue
            value = self._new(tensor, Origin.INPUT)
            value.from_data, value.starts, value.is_code = True, value.is_float, not value.is_float
            self._derived.add(value.index)
            self.memory.set(tensor, value.index)
            self.trace.inputs += (value.index,)

    def finish(self) -> None:
        """Complete the keys of call sites, and release every frame and tensor."""
        for call in self._keys:
            if call.key is not None:
                call.key = self.sites.complete(call.key)
        self.sites.reset()
        self._applied = None
        self._weights.clear()
        self._packed_weights.clear()
        self._weight_parts.clear()
        self._routed = RoutedRows()
        del self.memory


def _collective_inside(frame: Any) -> Any:
    """Find the frame of a differentiable collective between ``frame`` and the current call, if any."""
    inner = sys._getframe(3)
    while inner is not None and inner is not frame:
        applied = applied_function(inner)
        if applied is not None and applied[0].startswith("torch.distributed.nn."):
            return inner
        inner = inner.f_back
    return None


def _outside_of_the_call() -> Any:
    """The outermost frame of the module call that runs the current hook."""
    frame: Any = sys._getframe(2)
    while frame.f_back is not None and frame.f_back.f_code.co_filename == _MODULE:
        frame = frame.f_back
    return frame


def _without_dispatch(func: FunctionType) -> FunctionType:
    """A copy of a Python function of torch that runs its body instead of dispatching to the mode."""
    plain = {name: _never for name in func.__code__.co_names if name.startswith("has_torch_function")}
    copied = FunctionType(
        func.__code__, {**func.__globals__, **plain}, func.__name__, func.__defaults__, func.__closure__
    )
    copied.__kwdefaults__ = func.__kwdefaults__
    return copied


def _is_of_a_library(func: Any) -> bool:
    """Whether a function is an operator of another library, or a control-flow operator of torch."""
    if any(kind.__name__ == "HigherOrderOperator" for kind in type(func).__mro__):
        return func.__name__ in _CONTROL
    is_operator = type(func).__name__ in {"OpOverload", "OpOverloadPacket"}
    return is_operator and str(func).partition(".")[0] not in {"aten", "prims", "prim", "quantized"}


def _label(func: Any, call: TracedCall) -> str:
    """The function's own name, by which a tap identifies a lookup."""
    return getattr(func, "__name__", call.function)


def _never(*_: Any) -> bool:
    return False


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors among the arguments of a call, in order."""
    found: list[Tensor] = []
    for argument in (*args, *kwargs.values()) if kwargs else args:
        kind = type(argument)
        if kind in _ATOM_TYPES:
            continue
        if kind is Tensor or isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, (tuple, list)):
            found += _tensors(argument, None)
        elif isinstance(argument, dict):
            found += _tensors(argument.values(), None)
    return found


def _attributes(module: nn.Module) -> Iterator[Tensor]:
    """The tensors among a module's attributes, and in lists, tuples and dicts there."""
    for value in vars(module).values():
        if isinstance(value, dict | list | tuple):
            if value:
                items = value.values() if isinstance(value, dict) else value
                yield from (item for item in items if isinstance(item, Tensor))
        elif isinstance(value, Tensor):
            yield value


_ATOMS = (int, float, complex, bool, str, type(None), torch.dtype, torch.device, type(Ellipsis))
_ATOM_TYPES = frozenset(_ATOMS)


def _plain(argument: Any, values: Iterator[int]) -> Any:
    """Convert an argument to plain data; tensors take the next of ``values``."""
    kind = type(argument)
    if kind in _ATOM_TYPES:
        return argument
    if kind is Tensor or isinstance(argument, Tensor):
        return Operand(next(values))
    if isinstance(argument, (tuple, list)):
        return tuple([a if type(a) in _ATOM_TYPES else _plain(a, values) for a in argument])
    if isinstance(argument, _ATOMS):
        return argument
    if isinstance(argument, slice):
        return slice(*(_as_int(end) for end in (argument.start, argument.stop, argument.step)))
    if isinstance(argument, dict):
        return {key: _plain(item, values) for key, item in argument.items()}
    return kind.__name__


_INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})


def _is_float(tensor: Tensor) -> bool:
    return is_number(tensor.dtype)


def _as_int(end: Any) -> int | None:
    return None if end is None else int(end)


def _number(tensor: Tensor) -> int | None:
    """The number in a tensor of a single integer in CPU memory. None for any other tensor."""
    if tensor.dtype not in _INTEGERS or tensor.numel() != 1 or tensor.device.type != "cpu":
        return None
    try:
        with without_modes():
            return int(tensor)
    except (RuntimeError, TypeError, ValueError):
        return None


def _shares(one: Tensor, other: Tensor) -> bool:
    memory = memory_of(one)
    return memory is not None and memory == memory_of(other)


def _indexed(target: Tensor, index: Any) -> Tensor | None:
    """The part of a tensor at an index, if it is a view. None if it is a copy or the index is invalid."""
    try:
        part = target[index]
    except (RuntimeError, IndexError, TypeError):
        return None
    return part if _shares(part, target) else None


def _same_place(one: Tensor, other: Tensor) -> bool:
    return (
        one.shape == other.shape
        and one.data_ptr() == other.data_ptr()
        and one.stride() == other.stride()
        and _shares(one, other)
    )
