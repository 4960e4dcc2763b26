"""Taps: read and replace activations as a forward pass produces them, without touching the model.

A tap is a function mode that knows, from what :func:`find_shortcuts` returned, which calls to stop at. On an edited
twin it sees each edited call once, with the operands the edit left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skipscope import _data
from skipscope.shortcuts import _calls, _sites
from skipscope.shortcuts._calls import Operation
from skipscope.shortcuts._results import Boundary, CallKey, Shortcut, Shortcuts
from skipscope.shortcuts._tape import Tape


@dataclass(frozen=True, eq=False)
class Merge:
    """A merge as it happens.

    Attributes:
        name: of its shortcut.
        operands: the tensors that go in, connected to autograd's graph; for a call that writes into its first
            operand these are the values before. For a gate where one operand carries both sides, as in x + t (H - x),
            they are those of t H + (1 - t) x.
        sides: ``"branch"`` or ``"shortcut"`` for each operand.
        output: what comes out, computed from the operands.
        recompute: the same from other operands, never in place.
        later: it only adds to the branch of a shortcut that has merged before: b in (x + a) + b.
    """

    name: str
    operands: tuple[Tensor, ...]
    sides: tuple[str, ...]
    output: Tensor
    recompute: Callable[[Sequence[Tensor]], Tensor]
    later: bool = False


Handler = Callable[[Operation | None, Any, tuple[Any, ...], dict[str, Any]], Any]


class _Tap(TorchFunctionMode):
    """Calls a handler at each call whose key is wanted; between the calls of a gate its tape runs."""

    def __init__(self, model: nn.Module, handlers: dict[CallKey, Handler], tapes: dict[int, Tape]):
        super().__init__()
        self.sites, self.tapes = _sites.Sites(model), tapes
        self.handlers = {(key.host, key.site, key.nth): handler for key, handler in handlers.items()}
        self.wanted = {key.site for key in handlers}
        self.lookups = {key.site.rpartition(":")[2] for key in handlers} - _calls.OPERATIONS.keys()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        operation = _calls.OPERATIONS.get(name)
        if operation is not None and operation.is_many:
            return _calls.one_by_one(self, operation, func, args, kwargs)
        handler = self._handler(name, operation, args, kwargs)
        if handler is not None:
            return handler(operation, func, args, kwargs)
        touched = [tape for tape in self.tapes.values() if tape.touches(args, kwargs)]
        output = _taped(touched, func, args, kwargs) if touched else func(*args, **kwargs)
        for tape in touched if name in _calls.REDUCTIONS else ():
            if (finish := tape.finish) is not None:
                tape.finish = None
                output = finish(output)
        return output

    def _handler(self, name: str, operation: Operation | None, args: Any, kwargs: Any) -> Handler | None:
        if operation is None and name not in self.lookups:
            return None
        frame, label = _sites.caller(), name if operation is None else operation.name
        if _sites.site_of(frame, label) not in self.wanted:
            return None
        if operation is not None and _calls.tensor_operands(_calls.operands(operation, args, kwargs)) < 2:
            return None
        return self.handlers.get(self.sites.occurrence(frame, label))


def _taped(tapes: Sequence[Tape], func: Any, args: Any, kwargs: Any, key: CallKey | None = None) -> Any:
    """Make a call, and note it."""
    for tape in tapes:
        tape.note(func, args, kwargs, key)
    output = func(*args, **kwargs)
    for tape in tapes:
        tape.made(output)
    return output


@contextmanager
def tap_merges(model: nn.Module, found: Shortcuts, touch: Callable[[int, Merge], Tensor]) -> Iterator[None]:
    """Stop at the merge of each shortcut.

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
    tapes: dict[int, Tape] = {}

    def at_merge(k: int) -> Handler:
        shortcut = found[k]

        def handle(operation: Operation | None, func: Any, args: Any, kwargs: Any) -> Any:
            assert operation is not None
            if "both" in shortcut.sides:
                merge = _gate(shortcut, tapes.pop(k, Tape()), operation, func, args, kwargs)
            else:
                merge = _merge(shortcut.name, shortcut.sides, operation, func, args, kwargs)
            return _replace(operation, args, kwargs, touch(k, merge))

        return handle

    def at_part(ks: Iterable[int], key: CallKey) -> Handler:
        def handle(operation: Operation | None, func: Any, args: Any, kwargs: Any) -> Any:
            begun = [tapes.setdefault(k, Tape()) for k in ks]
            others = [t for t in tapes.values() if t not in begun and t.touches(args, kwargs)]
            return _taped([*begun, *others], func, args, kwargs, key)

        return handle

    def at_stack(k: int) -> Handler:
        def handle(operation: Operation | None, func: Any, args: Any, kwargs: Any) -> Any:
            output = at_part([k], found[k].key)(operation, func, args, kwargs)
            tapes[k].finish = lambda _: touch(k, _by_sides(found[k], tapes.pop(k)))
            return output

        return handle

    def at_addend(k: int, operand: int) -> Handler:
        def handle(operation: Operation | None, func: Any, args: Any, kwargs: Any) -> Any:
            assert operation is not None
            sides = tuple("branch" if i == operand else "shortcut" for i in range(2))
            merge = replace(_merge(found[k].name, sides, operation, func, args, kwargs), later=True)
            return _replace(operation, args, kwargs, touch(k, merge))

        return handle

    inside: dict[CallKey, dict[int, None]] = {}
    handlers: dict[CallKey, Handler] = {}
    for k in range(len(found)):
        is_gate = "both" in found[k].sides
        for place in found[k].branch_at + found[k].shortcut_at * is_gate:
            if place.call != found[k].key and is_gate:
                inside.setdefault(place.call, {})[k] = None
            elif place.call != found[k].key:
                handlers[place.call] = at_addend(k, place.operand)
    handlers |= {key: at_part(ks, key) for key, ks in inside.items()}
    merges = {s.key: at_stack(k) if s.summed else at_merge(k) for k, s in enumerate(found)}
    with _running(model, handlers | merges, tapes):
        yield


def _merge(
    label: str, sides: tuple[str, ...], operation: Operation, func: Any, args: Any, kwargs: Any
) -> Merge:
    values = _calls.operands(operation, args, kwargs)
    if operation.in_place:  # its value and its place in the graph are about to be overwritten
        values[0] = values[0].clone()
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    pure = _calls.out_of_place(operation, func)

    def recompute(operands: Sequence[Tensor]) -> Tensor:
        new = list(values)
        for place, operand in zip(places, operands, strict=True):
            new[place] = operand
        new_args, new_kwargs = _calls.with_operands(operation, args, kwargs, new)
        return pure(*new_args, **new_kwargs)

    operands = tuple(values[i] for i in places)
    return Merge(label, operands, sides, recompute(operands), recompute)


def _gate(shortcut: Shortcut, tape: Tape, operation: Operation, func: Any, args: Any, kwargs: Any) -> Merge:
    """A gate by its sides: the tape up to its merge, played without x and without H."""
    tape.note(func, args, kwargs, shortcut.key)
    tape.steps[-1].again(args, kwargs)  # a checkpoint around it counts what the call saves
    return _by_sides(shortcut, tape)


def _by_sides(shortcut: Shortcut, tape: Tape) -> Merge:
    branch, bypass = tape.play(shortcut.shortcut_at), tape.play(shortcut.branch_at)
    return Merge(
        shortcut.name,
        (branch, bypass),
        ("branch", "shortcut"),
        branch + bypass,
        lambda sides: sides[0] + sides[1],
    )


def _replace(operation: Operation, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    if not operation.in_place:
        return output
    target = _calls.operands(operation, args, kwargs)[0]
    return target.copy_(output)  # every alias of the first operand sees the new value, as built


@contextmanager
def _running(model: nn.Module, handlers: dict[CallKey, Handler], tapes: dict[int, Tape]) -> Iterator[None]:
    if not handlers:  # hooks do all of it
        yield
        return
    tap = _Tap(model, handlers, tapes)

    def begin_anew(*_: Any) -> None:
        tap.sites.reset()
        tap.tapes.clear()

    begin = model.register_forward_pre_hook(begin_anew)
    try:
        with tap:
            yield
    finally:
        begin.remove()
        tap.sites.reset()


@contextmanager
def tap_boundaries(
    model: nn.Module, points: tuple[Boundary, ...], touch: Callable[[int, Tensor], Tensor]
) -> Iterator[None]:
    """Stop at each boundary.

    Args:
        model: the model that the points are of, or another instance or an edited twin of it.
        points: from :func:`boundaries`.
        touch: ``touch(i, activation) -> activation``: called as the activation of ``points[i]`` is produced; what it
            returns takes its place downstream.
    """
    handlers: dict[CallKey, Handler] = {}
    tapes: dict[int, Tape] = {}
    hooks = []
    modules = dict(model.named_modules())

    def output_handler(i: int) -> Handler:
        def handle(operation: Operation | None, func: Any, args: Any, kwargs: Any) -> Any:
            if operation is not None and operation.in_place:
                values = _calls.operands(operation, args, kwargs)
                values[0] = values[0].clone()  # may be saved for the way back, and is about to be overwritten
                new_args, new_kwargs = _calls.with_operands(operation, args, kwargs, values)
                new = _calls.out_of_place(operation, func)(*new_args, **new_kwargs)
                return _replace(operation, args, kwargs, touch(i, new))
            return touch(i, func(*args, **kwargs))

        return handle

    def stack_handler(i: int) -> Handler:
        def finish(output: Tensor) -> Tensor:
            del tapes[i]
            return touch(i, output)

        def handle(operation: Operation | None, func: Any, args: Any, kwargs: Any) -> Any:
            tapes[i] = Tape()
            output = _taped([tapes[i]], func, args, kwargs)
            tapes[i].finish = finish
            return output

        return handle

    try:
        for i, point in enumerate(points):
            if point.key.site == "input":
                hooks.append(_hook_input(model, point.key.nth, i, touch))
            elif point.key.site == "output":
                hooks += _hook_output(model, modules[point.key.host], point.key.nth, i, touch)
            else:
                handlers[point.key] = stack_handler(i) if point.summed else output_handler(i)
        with _running(model, handlers, tapes):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _hook_input(model: nn.Module, which: int, i: int, touch: Callable[[int, Tensor], Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        count = -1

        def replace(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.is_floating_point()
            return touch(i, tensor) if tensor.is_floating_point() and count == which else tensor

        return _data.map_tensors(args, replace), _data.map_tensors(kwargs, replace)

    return model.register_forward_pre_hook(hook, with_kwargs=True)


def _hook_output(
    model: nn.Module, module: nn.Module, nth: int, i: int, touch: Callable[[int, Tensor], Tensor]
) -> list[Any]:
    calls = 0

    def begin(*_: Any) -> None:
        nonlocal calls
        calls = 0

    def hook(_: nn.Module, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls - 1 != nth:
            return None
        done = False

        def replace(tensor: Tensor) -> Tensor:
            nonlocal done
            if done or not tensor.is_floating_point():
                return tensor
            done = True
            return touch(i, tensor)

        return _data.map_tensors(output, replace)

    return [model.register_forward_pre_hook(begin), module.register_forward_hook(hook)]
