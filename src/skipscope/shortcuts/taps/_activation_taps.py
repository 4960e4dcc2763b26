"""Taps: read and replace activations during a forward pass without changing the model.

A tap is a ``TorchFunctionMode`` that handles the calls whose keys :func:`find_shortcuts` returned. On an
edited twin it sees each edited call once, with the edited operands.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skipscope import _data
from skipscope._torch_private import without_modes
from skipscope.shortcuts._shortcut_result import Boundary, CallKey, OperandSide, Shortcut, Shortcuts
from skipscope.shortcuts.taps._gate_sides import Call, GateSides, make_followed
from skipscope.shortcuts.trace import _call_sites, _operations


@dataclass(frozen=True, eq=False)
class Merge:
    """A merge during a forward pass.

    Attributes:
        name: name of its shortcut.
        operands: its operands, connected to autograd's graph; for an in-place call, their values before it.
            For a gate where one operand carries both sides, as in x + t (H - x), the two summands of
            t H + (1 - t) x.
        sides: side of each operand.
        output: its result, computed from the operands.
        recompute: function that computes the result from other operands, never in place.
        later: whether it only adds to the branch of a shortcut that has merged before, as b in (x + a) + b.
        is_sum: whether it is a sum of two tensors without further arguments.
    """

    name: str
    operands: tuple[Tensor, ...]
    sides: tuple[OperandSide, ...]
    output: Tensor
    recompute: Callable[[Sequence[Tensor]], Tensor]
    later: bool = False
    is_sum: bool = False

    @property
    def is_plain_sum(self) -> bool:
        """Whether it is x + y of equal shapes, so that each operand's gradient is the output's."""
        shape, dtype = self.output.shape, self.output.dtype
        return self.is_sum and all(o.shape == shape and o.dtype == dtype for o in self.operands)


Touch = Callable[[int, Tensor], Tensor]
Handler = Callable[[Call], Any]


class _Tap(TorchFunctionMode):
    """Runs a handler at each call with a given key, and follows gates until their merge."""

    def __init__(self, model: nn.Module, handlers: dict[CallKey, Handler], gates: dict[int, GateSides]):
        super().__init__()
        self.sites, self.gates = _call_sites.Sites(model), gates
        self.handlers = {(key.host, key.site, key.nth): handler for key, handler in handlers.items()}
        self.keyed = {key.site for key in handlers}
        self.lookups = {key.site.rpartition(":")[2] for key in handlers} - _operations.OPERATIONS.keys()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        operation = _operations.operation_of(func)
        if operation is None and not self.gates and name not in self.lookups:
            return func(*args, **kwargs)
        if operation is not None and operation.is_many:
            return _operations.one_by_one(self, operation, func, args, kwargs)
        call = Call(operation, func, args, kwargs)
        handler = self._handler(name, call)
        if handler is not None:
            return handler(call)
        touched = [gate for gate in self.gates.values() if gate.touches(call)]
        if not touched:
            return func(*args, **kwargs)
        output = result = make_followed(touched, call)
        for gate in touched if name in _operations.REDUCTIONS else ():
            if gate.finish is not None:
                result = gate.finish(output)
        return result

    def _handler(self, name: str, call: Call) -> Handler | None:
        if call.operation is None and name not in self.lookups:
            return None
        frame, label = _call_sites.caller(), name if call.operation is None else call.operation.name
        if _call_sites.site_of(frame, label) not in self.keyed:
            return None
        if call.operation is not None:
            # A recorder around the tap must not record these queries.
            with without_modes():
                if _operations.tensor_operands(_values(call)) < 2:
                    return None
        return self.handlers.get(self.sites.occurrence(frame, label))


@contextmanager
def _running(
    model: nn.Module,
    handlers: dict[CallKey, Handler],
    gates: dict[int, GateSides],
    modules: dict[CallKey, Callable[[Tensor], Tensor]] | None = None,
) -> Iterator[None]:
    """Context that runs handlers at calls, and replaces inputs of the model and outputs of modules."""
    tap, runs = _Tap(model, handlers, gates), Counter[str]()

    def reset(*_: Any) -> None:
        tap.sites.reset()
        gates.clear()
        runs.clear()

    def at_output(path: str, _: nn.Module, args: Any, output: Any) -> Any:
        replace = (modules or {}).get(CallKey(path, "output", runs[path]))
        runs[path] += 1
        return None if replace is None else _replace_float(output, 0, replace)

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(reset).remove)
        for key, replace in (modules or {}).items():
            if key.site == "input":
                stack.callback(
                    model.register_forward_pre_hook(_at_input(key.nth, replace), with_kwargs=True).remove
                )
        for path in {key.host for key in modules or () if key.site == "output"}:
            module = model.get_submodule(path)
            stack.callback(module.register_forward_hook(partial(at_output, path)).remove)
        if handlers:
            stack.callback(tap.sites.reset)
            stack.enter_context(tap)
        yield


def _at_input(which: int, replace: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    return lambda module, args, kwargs: _replace_float((args, kwargs), which, replace)


def _replace_float(nest: Any, which: int, replace: Callable[[Tensor], Tensor]) -> Any:
    """A nested structure with its float tensor number ``which`` replaced."""
    count = itertools.count()

    def one(tensor: Tensor) -> Tensor:
        return replace(tensor) if tensor.is_floating_point() and next(count) == which else tensor

    return _data.map_tensors(nest, one)


@contextmanager
def tap_merges(model: nn.Module, found: Shortcuts, touch: Callable[[int, Merge], Tensor]) -> Iterator[None]:
    """Context that calls ``touch`` at the merge of each shortcut.

    Args:
        model: the model on which ``found`` was found, or another instance or an edited twin of it.
        found: its shortcuts.
        touch: ``touch(k, merge) -> Tensor``: called at the merge of ``found[k]``, and again where more is
            added to its branch; its result replaces the merge's output.

    Example:
        >>> import torch
        >>> from skipscope.shortcuts import find_shortcuts
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.lin = nn.Linear(3, 3)
        ...     def forward(self, x):
        ...         return x + self.lin(x)
        >>> model, x = Net(), torch.ones(1, 3)
        >>> with tap_merges(model, find_shortcuts(model, x), lambda k, merge: merge.operands[0]):
        ...     model(x)
        tensor([[1., 1., 1.]])
    """
    gates: dict[int, GateSides] = {}

    def gate_of(k: int) -> GateSides:
        zeros: dict[OperandSide, Any] = {"branch": found[k].shortcut_at, "shortcut": found[k].branch_at}
        return gates.setdefault(k, GateSides(zeros))

    def at_merge(k: int) -> Handler:
        shortcut = found[k]

        def handle(call: Call) -> Any:
            if "both" not in shortcut.sides:
                return _replace(call, touch(k, _merge(shortcut.name, shortcut.sides, call)))
            sides = gate_of(k).on_each_side(call, shortcut.key)
            del gates[k]
            # Run the original call too: a checkpoint around the gate counts the tensors that it saves.
            call.pure(*call.args, **call.kwargs)
            return _replace(call, touch(k, _merge_of_sides(shortcut, sides)))

        return handle

    def at_part(ks: Iterable[int], key: CallKey) -> Handler:
        def handle(call: Call) -> Any:
            begun = [gate_of(k) for k in ks]
            others = [gate for gate in gates.values() if gate not in begun and gate.touches(call)]
            return make_followed([*begun, *others], call, key)

        return handle

    def at_stack(k: int) -> Handler:
        def handle(call: Call) -> Any:
            stacked = at_part([k], found[k].key)(call)
            gates[k].finish = lambda output: touch(k, _merge_of_sides(found[k], gates.pop(k).of(output)))
            return stacked

        return handle

    def at_addend(k: int, operand: int) -> Handler:
        sides: tuple[OperandSide, ...] = ("branch", "shortcut") if operand == 0 else ("shortcut", "branch")

        def handle(call: Call) -> Any:
            return _replace(call, touch(k, replace(_merge(found[k].name, sides, call), later=True)))

        return handle

    parts: dict[CallKey, list[int]] = {}
    handlers: dict[CallKey, Handler] = {}
    for k, shortcut in enumerate(found):
        is_gate = "both" in shortcut.sides
        for place in shortcut.branch_at + shortcut.shortcut_at * is_gate:
            if place.call == shortcut.key:
                continue
            if not is_gate:
                handlers[place.call] = at_addend(k, place.operand)
            elif k not in parts.setdefault(place.call, []):
                parts[place.call].append(k)
    handlers |= {key: at_part(ks, key) for key, ks in parts.items()}
    handlers |= {s.key: at_stack(k) if s.summed else at_merge(k) for k, s in enumerate(found)}
    with _running(model, handlers, gates):
        yield


def _values(call: Call) -> list[Any]:
    return [] if call.operation is None else _operations.operands(call.operation, call.args, call.kwargs)


def _merge(label: str, sides: tuple[OperandSide, ...], call: Call) -> Merge:
    operation, values = call.operation, _values(call)
    assert operation is not None
    pure = call.pure
    # An in-place call would overwrite the value and the grad_fn of its first operand, so copy it first.
    if operation.in_place:
        pure = _operations.put_into(operation, call.func, values[0])
        values[0] = _operations.whole_of(operation, values[0]).clone()
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]

    def recompute(operands: Sequence[Tensor]) -> Tensor:
        new = list(values)
        for place, operand in zip(places, operands, strict=True):
            new[place] = operand
        args, kwargs = _operations.with_operands(operation, call.args, call.kwargs, new)
        return pure(*args, **kwargs)

    operands = tuple(values[i] for i in places)
    is_sum = operation.name == "add" and len(places) == len(call.args) + len(call.kwargs) == 2
    return Merge(label, operands, sides, recompute(operands), recompute, is_sum=is_sum)


def _merge_of_sides(shortcut: Shortcut, sides: Mapping[OperandSide, Tensor]) -> Merge:
    """A gate as a merge of its two summands, branch and shortcut."""
    operands = sides["branch"], sides["shortcut"]
    return Merge(
        shortcut.name,
        operands,
        ("branch", "shortcut"),
        operands[0] + operands[1],
        lambda sides: sides[0] + sides[1],
        is_sum=True,
    )


def _replace(call: Call, output: Tensor) -> Tensor:
    if call.operation is None or not call.operation.in_place:
        return output
    # Write into the first operand, so that its aliases see the new value as in the original call.
    return _operations.whole_of(call.operation, _values(call)[0]).copy_(output)


@contextmanager
def tap_boundaries(model: nn.Module, points: tuple[Boundary, ...], touch: Touch) -> Iterator[None]:
    """Context that calls ``touch`` with the activation at each boundary.

    Args:
        model: the model whose boundaries the points are, or another instance or an edited twin of it.
        points: boundaries from :func:`boundaries`.
        touch: ``touch(i, activation) -> activation``: called when the activation of ``points[i]`` is
            computed; its result replaces the activation downstream.
    """
    gates: dict[int, GateSides] = {}

    def at_call(i: int) -> Handler:
        def handle(call: Call) -> Any:
            in_place = call.operation is not None and call.operation.in_place
            return _replace(call, touch(i, _merge("", (), call).output if in_place else call.make()))

        return handle

    def at_stack(i: int) -> Handler:
        def handle(call: Call) -> Any:
            gates[i] = GateSides()
            output = make_followed([gates[i]], call)
            gates[i].finish = lambda summed: touch(i, (gates.pop(i), summed)[1])
            return output

        return handle

    modules = {
        point.key: partial(touch, i)
        for i, point in enumerate(points)
        if point.key.site in {"input", "output"}
    }
    handlers = {
        point.key: at_stack(i) if point.summed else at_call(i)
        for i, point in enumerate(points)
        if point.key not in modules
    }
    with _running(model, handlers, gates, modules):
        yield
