"""Taps: read and replace activations as a forward pass produces them; the model itself is left alone.

A tap is a function mode that handles the calls whose keys :func:`find_shortcuts` returned. On an edited twin it sees
each edited call once, with the edited operands.
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
from skipscope.shortcuts._shortcut_result import Boundary, CallKey, OperandSide, Shortcut, Shortcuts
from skipscope.shortcuts.taps._gate_sides import GateSides, call_followed
from skipscope.shortcuts.trace import _call_sites, _operations
from skipscope.shortcuts.trace._operations import Operation


@dataclass(frozen=True, eq=False)
class Merge:
    """A merge as it happens.

    Attributes:
        name: of its shortcut.
        operands: the tensors that go in, connected to autograd's graph; for a call that writes into its first
            operand these are the values before. For a gate where one operand carries both sides, as in x + t (H - x),
            they are those of t H + (1 - t) x.
        sides: of each operand.
        output: what comes out, computed from the operands.
        recompute: the same from other operands, never in place.
        later: it only adds to the branch of a shortcut that has merged before: b in (x + a) + b.
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
# Makes a call: with the operation, torch's function, its arguments and keywords.
Handler = Callable[[Operation | None, Any, tuple[Any, ...], dict[str, Any]], Any]


class _Tap(TorchFunctionMode):
    """Calls a handler at each call with a key of its own, and follows the gates that are under way between them."""

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
        if operation is not None and operation.is_many:
            return _operations.one_by_one(self, operation, func, args, kwargs)
        handler = self._handler(name, operation, args, kwargs)
        if handler is not None:
            return handler(operation, func, args, kwargs)
        touched = [gate for gate in self.gates.values() if gate.touches(args, kwargs)]
        if not touched:
            return func(*args, **kwargs)
        output = result = call_followed(touched, func, args, kwargs)
        for gate in touched if name in _operations.REDUCTIONS else ():
            if gate.finish is not None:
                result = gate.finish(output)
        return result

    def _handler(self, name: str, operation: Operation | None, args: Any, kwargs: Any) -> Handler | None:
        if operation is None and name not in self.lookups:
            return None
        frame, label = _call_sites.caller(), name if operation is None else operation.name
        if _call_sites.site_of(frame, label) not in self.keyed:
            return None
        if (
            operation is not None
            and _operations.tensor_operands(_operations.operands(operation, args, kwargs)) < 2
        ):
            return None
        return self.handlers.get(self.sites.occurrence(frame, label))


@contextmanager
def _running(
    model: nn.Module,
    handlers: dict[CallKey, Handler],
    gates: dict[int, GateSides],
    modules: dict[CallKey, Callable[[Tensor], Tensor]] | None = None,
) -> Iterator[None]:
    """Run handlers at calls, and replace inputs of the model and outputs of modules; each pass counts from the start."""
    tap, runs = _Tap(model, handlers, gates), Counter[str]()
    places = dict(model.named_modules())

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
            stack.callback(places[path].register_forward_hook(partial(at_output, path)).remove)
        if handlers:
            stack.callback(tap.sites.reset)
            stack.enter_context(tap)
        yield


def _at_input(which: int, replace: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    return lambda module, args, kwargs: _replace_float((args, kwargs), which, replace)


def _replace_float(nest: Any, which: int, replace: Callable[[Tensor], Tensor]) -> Any:
    """The nest with one of its float tensors replaced."""
    count = itertools.count()

    def one(tensor: Tensor) -> Tensor:
        return replace(tensor) if tensor.is_floating_point() and next(count) == which else tensor

    return _data.map_tensors(nest, one)


@contextmanager
def tap_merges(model: nn.Module, found: Shortcuts, touch: Callable[[int, Merge], Tensor]) -> Iterator[None]:
    """Handle the merge of each shortcut as it happens.

    Args:
        model: the model that ``found`` is of, or another instance or an edited twin of it.
        found: its shortcuts.
        touch: ``touch(k, merge) -> Tensor``: called at the merge of ``found[k]``, and again where more is added to its
            branch; what it returns takes the place of the merge's output.

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

        def handle(operation: Operation | None, func: Any, args: Any, kwargs: Any) -> Any:
            assert operation is not None
            if "both" in shortcut.sides:
                sides = gate_of(k).on_each_side(func, args, kwargs, shortcut.key)
                del gates[k]
                # As built too: a checkpoint around the gate counts what the call saves.
                _operations.out_of_place(operation, func)(*args, **kwargs)
                merge = _merge_of_sides(shortcut, sides)
            else:
                merge = _merge(shortcut.name, shortcut.sides, operation, func, args, kwargs)
            return _replace(operation, args, kwargs, touch(k, merge))

        return handle

    def at_part(ks: Iterable[int], key: CallKey) -> Handler:
        def handle(operation: Operation | None, func: Any, args: Any, kwargs: Any) -> Any:
            begun = [gate_of(k) for k in ks]
            others = [g for g in gates.values() if g not in begun and g.touches(args, kwargs)]
            return call_followed([*begun, *others], func, args, kwargs, key)

        return handle

    def at_stack(k: int) -> Handler:
        def handle(operation: Operation | None, func: Any, args: Any, kwargs: Any) -> Any:
            stacked = at_part([k], found[k].key)(operation, func, args, kwargs)
            gates[k].finish = lambda output: touch(k, _merge_of_sides(found[k], gates.pop(k).of(output)))
            return stacked

        return handle

    def at_addend(k: int, operand: int) -> Handler:
        sides: tuple[OperandSide, ...] = ("branch", "shortcut") if operand == 0 else ("shortcut", "branch")

        def handle(operation: Operation | None, func: Any, args: Any, kwargs: Any) -> Any:
            assert operation is not None
            merge = replace(_merge(found[k].name, sides, operation, func, args, kwargs), later=True)
            return _replace(operation, args, kwargs, touch(k, merge))

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


def _merge(
    label: str, sides: tuple[OperandSide, ...], operation: Operation, func: Any, args: Any, kwargs: Any
) -> Merge:
    values = _operations.operands(operation, args, kwargs)
    if operation.in_place:  # its value and its place in the graph are about to be overwritten
        values[0] = values[0].clone()
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    pure = _operations.out_of_place(operation, func)

    def recompute(operands: Sequence[Tensor]) -> Tensor:
        new = list(values)
        for place, operand in zip(places, operands, strict=True):
            new[place] = operand
        new_args, new_kwargs = _operations.with_operands(operation, args, kwargs, new)
        return pure(*new_args, **new_kwargs)

    operands = tuple(values[i] for i in places)
    is_sum = operation.name == "add" and len(places) == len(args) + len(kwargs) == 2
    return Merge(label, operands, sides, recompute(operands), recompute, is_sum=is_sum)


def _merge_of_sides(shortcut: Shortcut, sides: Mapping[OperandSide, Tensor]) -> Merge:
    """A gate as the sum of what comes by the branch and what comes by the shortcut."""
    operands = sides["branch"], sides["shortcut"]
    return Merge(
        shortcut.name, operands, ("branch", "shortcut"), operands[0] + operands[1],
        lambda sides: sides[0] + sides[1], is_sum=True,
    )  # fmt: skip


def _replace(operation: Operation, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    if not operation.in_place:
        return output
    target = _operations.operands(operation, args, kwargs)[0]
    return target.copy_(output)  # every alias of the first operand sees the new value, as built


@contextmanager
def tap_boundaries(model: nn.Module, points: tuple[Boundary, ...], touch: Touch) -> Iterator[None]:
    """Handle the activation at each boundary as it is produced.

    Args:
        model: the model that the points are of, or another instance or an edited twin of it.
        points: from :func:`boundaries`.
        touch: ``touch(i, activation) -> activation``: called as the activation of ``points[i]`` is produced; what it
            returns takes its place downstream.
    """
    gates: dict[int, GateSides] = {}

    def at_call(i: int) -> Handler:
        def handle(operation: Operation | None, func: Any, args: Any, kwargs: Any) -> Any:
            if operation is None or not operation.in_place:
                return touch(i, func(*args, **kwargs))
            output = _merge("", (), operation, func, args, kwargs).output
            return _replace(operation, args, kwargs, touch(i, output))

        return handle

    def at_stack(i: int) -> Handler:
        def handle(operation: Operation | None, func: Any, args: Any, kwargs: Any) -> Any:
            gates[i] = GateSides()
            output = call_followed([gates[i]], func, args, kwargs)
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
