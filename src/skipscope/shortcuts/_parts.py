"""Which part of a tensor a node takes: steps of a sequence, chunks of channels, however they are cut out.

A part is told by ranges along axes of the whole. Views may be taken anew at each step (``x[:, 1:][:, t]``,
``x.transpose(0, 1)[t]``, ``x.unbind(1)[t]``): what counts is what they amount to.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any

import torch

from skipscope.shortcuts._nodes import Step, kind_of, shape_of, signed

SPLITS = frozenset({"Unbind", "Split", "SplitWithSizes", "UnsafeSplit"})
Axis = Hashable  # an axis of the whole; or of a view of it: the axes that were regrouped, their new sizes, and which


@dataclass(frozen=True)
class Part:
    """A part of a tensor.

    Attributes:
        axes: for each axis of the part which axis of the whole it runs along, and where; None where that is not known.
        limits: along which axes of the whole it is less than all of it, and where it lies; at most there, if not all is
            known.
        shape: of the part.
    """

    axes: tuple[tuple[Axis, range] | None, ...]
    limits: dict[Axis, range]
    shape: tuple[int, ...]

    def overlaps(self, other: Part) -> bool:
        """Whether the two may have something in common."""
        return all(
            mine[0] <= other.limits[axis][-1]
            and other.limits[axis][0] <= mine[-1]
            and _meet(mine, other.limits[axis])
            for axis, mine in self.limits.items()
            if axis in other.limits
        )

    def axis_along(self, dim: int) -> tuple[Axis, range] | None:
        """The axis of the whole along which one of its own axes runs, and where, if it is a part along that alone, and
        more than a single step: a class token is none of several channels.
        """
        dim = signed(dim)
        axis = self.axes[dim] if -len(self.axes) <= dim < len(self.axes) else None
        return axis if axis is not None and set(self.limits) <= {axis[0]} and len(axis[1]) > 1 else None

    def within(self, dim: int, where: slice | int) -> Part | None:
        """What is left after taking some of one axis."""
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


def _meet(one: range, other: range) -> bool:
    short, long = sorted((one, other), key=len)
    return any(i in long for i in short[:64]) or len(short) > 64


def whole(shape: tuple[int, ...]) -> Part:
    """All of a tensor."""
    return Part(tuple((i, range(size)) for i, size in enumerate(shape)), {}, shape)


def part_after(node: Any, before: Part) -> Part | None:
    """The part that a node gives, whose one input is a part; None where it does not take parts."""
    if isinstance(node, Step):
        return _output(node, before)
    way = _WAYS.get(kind_of(node))
    return None if way is None else way(node, before)


def _output(step: Step, before: Part) -> Part | None:
    node, dim = step.node, signed(step.node._saved_dim) % len(before.shape)
    if kind_of(node) == "Unbind":
        return before.within(dim, step.index)
    if hasattr(node, "_saved_split_sizes"):
        ends = [0, *accumulate(signed(size) for size in node._saved_split_sizes)]
        return before.within(dim, slice(ends[step.index], ends[step.index + 1]))
    size = signed(node._saved_split_size)
    return before.within(dim, slice(step.index * size, (step.index + 1) * size))


def _select(node: Any, before: Part) -> Part | None:
    dim = signed(node._saved_dim) % len(before.shape)
    return before.within(dim, signed(node._saved_index) % before.shape[dim])


def _slice(node: Any, before: Part) -> Part | None:
    start, end = signed(node._saved_start or 0), node._saved_end
    where = slice(start, None if end is None else signed(end), node._saved_step)
    return before.within(signed(node._saved_dim) % len(before.shape), where)


def _index_select(node: Any, before: Part) -> Part | None:
    return _single(before, signed(node._saved_dim), node._saved_index, keeps=True)


def _index(node: Any, before: Part) -> Part | None:
    given = [(dim, index) for dim, index in enumerate(node._saved_indices) if index is not None]
    return _single(before, *given[0], keeps=given[0][1].ndim == 1) if len(given) == 1 else None


def _single(before: Part, dim: int, index: Any, keeps: bool) -> Part | None:
    """One step that a tensor of indices takes."""
    if index.numel() != 1 or index.ndim > 1 or index.is_meta or index.dtype == torch.bool:
        return None
    at = int(index) % before.shape[dim]
    return before.within(dim % len(before.shape), slice(at, at + 1) if keeps else at)


def _permuted(order: Callable[[Any, int], list[int]]) -> Callable[[Any, Part], Part]:
    def way(node: Any, before: Part) -> Part:
        turned = order(node, len(before.shape))
        axes, shape = tuple(before.axes[i] for i in turned), tuple(before.shape[i] for i in turned)
        return Part(axes, before.limits, shape)

    return way


def _swap(one: int, other: int, ndim: int) -> list[int]:
    order = list(range(ndim))
    order[one % ndim], order[other % ndim] = order[other % ndim], order[one % ndim]
    return order


def _flip(node: Any, before: Part) -> Part:
    turned = {signed(d) % len(before.shape) for d in node._saved_dims}
    axes = (
        (axis[0], axis[1][::-1]) if axis is not None and i in turned else axis
        for i, axis in enumerate(before.axes)
    )
    return replace(before, axes=tuple(axes))


def _same(node: Any, before: Part) -> Part | None:
    return before if shape_of(node) == before.shape else None


def _viewed(node: Any, before: Part) -> Part | None:
    """Axes that keep their size are kept; what is merged or split has a name made of theirs, if it was whole."""
    shape, new = before.shape, shape_of(node)
    if new is None or 0 in new or prod(new) != prod(shape):
        return None
    axes: list[tuple[Axis, range] | None] = []
    for old_group, new_sizes in _groups(shape, new):
        olds = [before.axes[i] for i in old_group if shape[i] > 1]
        if len(olds) == 1 and [size for size in new_sizes if size > 1] == [
            shape[i] for i in old_group if shape[i] > 1
        ]:
            axes += [olds[0] if size > 1 else None for size in new_sizes]
            continue
        is_whole = all(axis is not None and axis[0] not in before.limits for axis in olds)
        name = tuple(axis[0] for axis in olds if axis is not None)
        axes += [
            ((name, new_sizes, k), range(size)) if is_whole and olds and size > 1 else None
            for k, size in enumerate(new_sizes)
        ]
    return Part(tuple(axes), before.limits, new)


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> Iterator[tuple[list[int], tuple[int, ...]]]:
    """Axes of an old shape and sizes of a new one that hold the same elements, as few together as can be."""
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


_WAYS: dict[str, Callable[[Any, Part], Part | None]] = {
    "Select": _select,
    "Slice": _slice,
    "Flip": _flip,
    "IndexSelect": _index_select,
    "Index": _index,
    "Transpose": _permuted(lambda node, n: _swap(signed(node._saved_dim0), signed(node._saved_dim1), n)),
    "T": _permuted(lambda node, n: _swap(0, n - 1, n)),
    "Permute": _permuted(lambda node, n: [signed(d) % n for d in node._saved_dims]),
    **dict.fromkeys(("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze"), _viewed),
    **dict.fromkeys(("Clone", "ToCopy", "Mul", "Div", "Neg"), _same),
    # One node of many outputs, each of which is a step of its own.
    **dict.fromkeys(SPLITS, lambda node, before: before),
}


class Cuts:
    """What is cut out of one tensor, and what is computed from that, found again by the part.

    Attributes:
        parts: of each node that is a part of the tensor, which; the tensor itself among them.
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
        """The nodes that were computed from what any of some parts has."""
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
