"""The part of a tensor that a node takes: steps of a sequence, chunks of channels, by any chain of views.

A part is given by ranges along axes of the whole tensor. So different views (``x[:, 1:][:, t]``,
``x.transpose(0, 1)[t]``, ``x.unbind(1)[t]``) of the same elements give the same part.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from skipscope.shortcuts.finding._kinds import SPLITS
from skipscope.shortcuts.trace import Operand, Trace, TracedCall, Value

# An axis of the whole tensor (its index), or an axis of a reshaped view: the regrouped axes, their new sizes,
# and the index among these.
Axis = Hashable


@dataclass(frozen=True)
class Part:
    """A part of a tensor.

    Attributes:
        axes: for each axis of the part, the axis of the whole that it runs along, and the range there; None
            if unknown.
        limits: for each axis of the whole along which the part is limited, its range, or a range that
            contains it if not all is known.
        shape: shape of the part.
    """

    axes: tuple[tuple[Axis, range] | None, ...]
    limits: dict[Axis, range]
    shape: tuple[int, ...]

    def overlaps(self, other: Part) -> bool:
        """Whether two parts may have elements in common."""
        return all(
            mine[0] <= other.limits[axis][-1]
            and other.limits[axis][0] <= mine[-1]
            and _ranges_overlap(mine, other.limits[axis])
            for axis, mine in self.limits.items()
            if axis in other.limits
        )

    def axis_along(self, dim: int, least: int = 2) -> tuple[Axis, range] | None:
        """The axis of the whole along which axis ``dim`` of the part runs, and its range there.

        None if that is unknown, if the part is limited along another axis too, or if it is shorter than
        ``least``: a class token is not one of several channels.
        """
        axis = self.axes[dim] if -len(self.axes) <= dim < len(self.axes) else None
        return axis if axis and set(self.limits) <= {axis[0]} and len(axis[1]) >= least else None

    def with_new_axis(self, dim: int) -> Part:
        """The same part with an axis of size one inserted before ``dim``."""
        return Part(
            (*self.axes[:dim], None, *self.axes[dim:]), self.limits, (*self.shape[:dim], 1, *self.shape[dim:])
        )

    def within(self, dim: int, where: slice | int) -> Part | None:
        """The part after indexing one axis. None if it is empty."""
        axis, keeps = self.axes[dim], isinstance(where, slice)
        name, run = axis or (None, range(self.shape[dim]))
        taken = run[where] if isinstance(where, slice) else run[where : where + 1]
        if not taken:
            return None
        limits = self.limits
        if axis is not None and len(taken) < len(run):
            limits = {**limits, name: taken if taken.step > 0 else taken[::-1]}
        kept = [(name, taken) if axis is not None else None] if keeps else []
        axes = (*self.axes[:dim], *kept, *self.axes[dim + 1 :])
        return Part(
            axes, limits, (*self.shape[:dim], *([len(taken)] if keeps else []), *self.shape[dim + 1 :])
        )


def _ranges_overlap(one: range, other: range) -> bool:
    short, long = sorted((one, other), key=len)
    return any(i in long for i in short[:64]) or len(short) > 64


def whole(shape: tuple[int, ...]) -> Part:
    """The part that is all of a tensor."""
    return Part(tuple((i, range(size)) for i, size in enumerate(shape)), {}, shape)


def part_after(trace: Trace, value: int, before: Part) -> Part | None:
    """The part that a value computed from the part ``before`` is. None if its call does not take parts."""
    made = trace.values[value]
    call = None if made.call is None else trace.calls[made.call]
    rule = None if call is None else _RULES.get(call.function)
    return None if rule is None or call is None else rule(_Taking(trace, call, made), before)


def part_put(trace: Trace, call: TracedCall) -> Part | None:
    """The part of a tensor into which a call writes another. None if it is unknown, or the whole tensor."""
    whole_of = call.joined[0] if call.whole is None else call.whole
    if whole_of is None:
        return None
    part: Part | None = whole(trace.values[whole_of].shape)
    if call.whole is not None and call.joined[0] is not None:
        part = _viewed_from(trace, call.joined[0], part)
    if part is None:
        return None
    taking = _Taking(trace, call, trace.values[call.results[0]])
    if call.function == "setitem":
        part = _indexed(taking, part)
    elif call.function == "slice_scatter":
        dim, start, end, step = (taking.argument(i + 1, name, default) for i, name, default in _SLICE)
        part = part.within(dim % len(part.shape), slice(start, end, step))
    elif call.function == "select_scatter":
        part = _part_at_index(part, taking.argument(2, "dim") % len(part.shape), taking.argument(3, "index"))
    elif call.function != "copy":
        return None
    return part if part is not None and part.limits else None


def _viewed_from(trace: Trace, value: int, part: Part) -> Part | None:
    """The part of a whole tensor that a view of it is. None if unknown."""
    views = []
    while trace.values[value].shape != part.shape or not views:
        made = trace.values[value].call
        if made is None or not trace.calls[made].is_view:
            break
        views.append(value)
        value = trace.calls[made].operands[0]
    for view in reversed(views):
        after = part_after(trace, view, part)
        if after is None:
            return None
        part = after
    return part


def takes_everything(call: TracedCall, trace: Trace) -> bool:
    """Whether a call returns all of its first operand: an alias, or a slice from end to end."""
    if call.function in {"detach", "alias", "data", "positive", "contiguous", "lift_fresh"}:
        return True
    if call.function not in {"getitem", "slice", "narrow"}:
        return False
    shape = trace.values[call.operands[0]].shape
    after = part_after(trace, call.results[0], whole(shape))
    return after is not None and after == whole(shape)


@dataclass(frozen=True, slots=True)
class _Taking:
    """A call that may take a part of its first operand, and one of its results."""

    trace: Trace
    call: TracedCall
    value: Value

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return self.value.shape

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or keyword; a tensor of one known integer becomes that integer."""
        return self.plain(self.call.argument(position, name, default))

    def plain(self, argument: Any) -> Any:
        """Replace a tensor of one known integer by that integer; any other argument stays."""
        if isinstance(argument, Operand):
            value = self.trace.values[argument.value]
            return argument if value.number is None or value.shape else value.number
        return argument

    def many(self, position: int, name: str) -> tuple[int, ...]:
        """Integers given either as one sequence or as separate arguments."""
        first = self.argument(position, name, ())
        return first if isinstance(first, tuple) else tuple(self.call.arguments[position:])


def _select(taking: _Taking, before: Part) -> Part | None:
    dim, index = taking.argument(1, "dim"), taking.argument(2, "index")
    return _part_at_index(before, dim % len(before.shape), index)


def _part_at_index(before: Part, dim: int, index: Any) -> Part | None:
    return before.within(dim, index % before.shape[dim]) if isinstance(index, int) else None


def _slice(taking: _Taking, before: Part) -> Part | None:
    dim, start, end, step = (taking.argument(i, name, default) for i, name, default in _SLICE)
    return before.within(dim % len(before.shape), slice(start, end, step))


_SLICE = ((1, "dim", 0), (2, "start", None), (3, "end", None), (4, "step", 1))


def _narrow(taking: _Taking, before: Part) -> Part | None:
    dim, start, length = (taking.argument(i, name) for i, name in ((1, "dim"), (2, "start"), (3, "length")))
    if not isinstance(start, int):
        return None
    dim, start = dim % len(before.shape), start % before.shape[dim]
    return before.within(dim, slice(start, start + length))


def _unbind(taking: _Taking, before: Part) -> Part | None:
    return before.within(taking.argument(1, "dim", 0) % len(before.shape), taking.value.position)


def _split(taking: _Taking, before: Part) -> Part | None:
    """The part that one piece of a split is; the sizes of the earlier pieces give its place."""
    name = taking.call.function
    dim = taking.argument(2, "dim", 0) if name in {"split", "chunk", "tensor_split"} else _OWN_AXES[name]
    dim = (dim if name != "hsplit" or len(before.shape) > 1 else 0) % len(before.shape)
    sizes = [taking.trace.values[v].shape[dim] for v in taking.call.results]
    # The trace has no other pieces for an inferred call, so they are recomputed.
    if taking.call.inferred:
        pieces = getattr(torch, name)(
            torch.empty(before.shape, device="meta"), *taking.call.arguments[1:], **taking.call.keywords
        )
        sizes = [piece.shape[dim] for piece in pieces]
    start = sum(sizes[: taking.value.position])
    return before.within(dim, slice(start, start + sizes[taking.value.position]))


_OWN_AXES = {"hsplit": 1, "vsplit": 0, "dsplit": 2}


def _index_select(taking: _Taking, before: Part) -> Part | None:
    return _single(
        taking, before, taking.argument(1, "dim") % len(before.shape), taking.call.argument(2, "index")
    )


def _single(taking: _Taking, before: Part, dim: int, index: Any) -> Part | None:
    """The part at a list or tensor of indices, if it holds a single index. None otherwise."""
    if isinstance(index, Operand):
        value = taking.trace.values[index.value]
        numbers, keeps = ([] if value.number is None else [value.number]), len(value.shape) == 1
    else:
        numbers, keeps = list(index), True
    if len(numbers) != 1 or isinstance(numbers[0], bool) or not isinstance(numbers[0], int):
        return None
    at = numbers[0] % before.shape[dim]
    return before.within(dim, slice(at, at + 1) if keeps else at)


def _getitem(taking: _Taking, before: Part) -> Part | None:
    """The part that ``x[...]`` is: numbers, slices, new axes, and one list or tensor of indices."""
    part = _indexed(taking, before)
    return part if part is not None and part.shape == taking.shape else None


def _indexed(taking: _Taking, before: Part) -> Part | None:
    """The part of a tensor at the index among a call's arguments."""
    index = taking.call.arguments[1]
    items = list(index) if isinstance(index, tuple) and not _is_list(taking.call, index) else [index]
    taken = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis not in items:
        items.append(Ellipsis)
    at, part, lists = items.index(Ellipsis), before, 0
    items[at : at + 1] = [slice(None)] * (len(before.shape) - taken)
    dim = 0
    for item in map(taking.plain, items):
        if item is None:
            part, dim = part.with_new_axis(dim), dim + 1
        elif isinstance(item, slice):
            if (after := part.within(dim, item)) is None:
                return None
            part, dim = after, dim + 1
        elif isinstance(item, bool):
            return None
        else:
            is_list = not isinstance(item, int)
            after = _single(taking, part, dim, item) if is_list else _part_at_index(part, dim, item)
            lists += is_list
            if after is None or lists > 1:
                return None
            dim += len(after.shape) == len(part.shape)
            part = after
    return part


def _is_list(call: TracedCall, index: tuple[Any, ...]) -> bool:
    """Whether an index was written as a list, ``x[[1]]``, not ``x[1,]``; the trace has a tuple for both."""
    return call.lists_index


def _permuted(order: Callable[[_Taking, int], Sequence[int]]) -> Callable[[_Taking, Part], Part]:
    def rule(taking: _Taking, before: Part) -> Part:
        turned = order(taking, len(before.shape))
        axes, shape = tuple(before.axes[i] for i in turned), tuple(before.shape[i] for i in turned)
        return Part(axes, before.limits, shape)

    return rule


def order_of(call: TracedCall, ndim: int) -> Sequence[int]:
    """The axis order of a transposition: for each axis of its result, the axis of its operand."""
    if call.function == "permute":
        first = call.argument(1, "dims", ())
        return [d % ndim for d in (first if isinstance(first, tuple) else call.arguments[1:])]
    if call.function == "transpose":
        return _swap(call.argument(1, "dim0", call.keywords.get("axis0")), call.argument(2, "dim1"), ndim)
    if call.function == "movedim":
        return _moved(_tuple(call.argument(1, "source")), _tuple(call.argument(2, "destination")), ndim)
    return list(range(ndim))[::-1] if call.function in {"T", "t"} else _swap(-1, -2, ndim)


def _tuple(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _swap(one: int, other: int, ndim: int) -> list[int]:
    order = list(range(ndim))
    if ndim:
        order[one % ndim], order[other % ndim] = order[other % ndim], order[one % ndim]
    return order


def _moved(source: tuple[int, ...], destination: tuple[int, ...], ndim: int) -> list[int]:
    places = {d % ndim: s % ndim for s, d in zip(source, destination, strict=True)}
    rest = iter(i for i in range(ndim) if i not in places.values())
    return [places[i] if i in places else next(rest) for i in range(ndim)]


def _flip(taking: _Taking, before: Part) -> Part:
    turned = {d % len(before.shape) for d in taking.many(1, "dims")}
    axes = (
        (axis[0], axis[1][::-1]) if axis is not None and i in turned else axis
        for i, axis in enumerate(before.axes)
    )
    return replace(before, axes=tuple(axes))


def _same(taking: _Taking, before: Part) -> Part | None:
    return before if taking.shape == before.shape else None


def _viewed(taking: _Taking, before: Part) -> Part | None:
    """Map axes through a reshape: unchanged axes stay, regrouped axes that were whole get a combined name."""
    shape, new = before.shape, taking.shape
    if 0 in new or prod(new) != prod(shape):
        return None
    axes: list[tuple[Axis, range] | None] = []
    for old_group, new_sizes in _groups(shape, new):
        olds = [before.axes[i] for i in old_group if shape[i] > 1]
        if len(olds) == 1 and [size for size in new_sizes if size > 1] == [
            shape[i] for i in old_group if shape[i] > 1
        ]:
            axes += [olds[0] if size > 1 else None for size in new_sizes]
            continue
        are_whole = all(axis is not None and axis[0] not in before.limits for axis in olds)
        name = tuple(axis[0] for axis in olds if axis is not None)
        axes += [
            ((name, new_sizes, k), range(size)) if are_whole and olds and size > 1 else None
            for k, size in enumerate(new_sizes)
        ]
    return Part(tuple(axes), before.limits, new)


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> Iterator[tuple[list[int], tuple[int, ...]]]:
    """Match axes of an old shape with sizes of a new shape that hold the same elements, in minimal groups."""
    i = j = 0
    while i < len(old) or j < len(new):
        olds, news = [i] if i < len(old) else [], [new[j]] if j < len(new) else []
        i, j = i + len(olds), j + len(news)
        while prod(old[k] for k in olds) != prod(news):
            if prod(old[k] for k in olds) < prod(news):
                olds.append(i)
                i += 1
            else:
                news.append(new[j])
                j += 1
        yield olds, tuple(news)


_RULES: dict[str, Callable[[_Taking, Part], Part | None]] = {
    "select": _select,
    "slice": _slice,
    "narrow": _narrow,
    "getitem": _getitem,
    "flip": _flip,
    "index_select": _index_select,
    "unbind": _unbind,
    **dict.fromkeys(SPLITS - {"unbind"}, _split),
    **dict.fromkeys(
        ("transpose", "t", "T", "mT", "H", "mH", "adjoint", "permute", "movedim"),
        _permuted(lambda taking, ndim: order_of(taking.call, ndim)),
    ),
    **dict.fromkeys(
        (
            "view",
            "reshape",
            "view_as",
            "reshape_as",
            "flatten",
            "unflatten",
            "ravel",
            "squeeze",
            "unsqueeze",
            "write_all",
        ),
        _viewed,
    ),
    **dict.fromkeys(("clone", "to", "mul", "div", "neg", "contiguous", "detach", "copy", "alias"), _same),
}


class Cuts:
    """The parts cut out of one tensor, and the nodes computed from them, indexed by part.

    Attributes:
        parts: node -> the part of the tensor that it is, including the tensor itself.
    """

    def __init__(self):
        self.parts: dict[int, Part] = {}
        self._by_step: dict[Axis, dict[int, list[tuple[int, Part]]]] = {}
        self._others: list[tuple[int, Part]] = []

    def add(self, node: int, part: Part) -> None:
        """Note a node that is computed from a part."""
        step = next(((axis, run[0]) for axis, run in part.limits.items() if len(run) == 1), None)
        if step is None:
            self._others.append((node, part))
        else:
            self._by_step.setdefault(step[0], {}).setdefault(step[1], []).append((node, part))

    def overlapping(self, parts: list[Part]) -> list[int]:
        """The nodes computed from a part that overlaps any of ``parts``."""
        found: dict[int, None] = {}
        for part in parts:
            for node, other in self._candidates(part):
                if node not in found and part.overlaps(other):
                    found[node] = None
        return list(found)

    def _candidates(self, part: Part) -> Iterator[tuple[int, Part]]:
        yield from self._others
        for axis, by_index in self._by_step.items():
            for index in part.limits.get(axis, by_index):
                yield from by_index.get(index, ())
