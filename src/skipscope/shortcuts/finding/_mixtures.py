"""Weighted sums over a stack: (stack([x, H]) * weights).sum(0) is w0 x + w1 H.

The sum may also be a matrix product or ``einsum``. The stack is the merge, and the merge is complete at the
sum. Between them are views and a weight for each stacked tensor. Two numbers identify the stacked axis after
any view: the product of the sizes of the axes before it, and the number of stacked tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from skipscope.shortcuts._shortcut_result import Kind
from skipscope.shortcuts.finding._graph import Graph
from skipscope.shortcuts.finding._kinds import WHOLE
from skipscope.shortcuts.finding._merge import Merge
from skipscope.shortcuts.finding._parts import order_of
from skipscope.shortcuts.trace import TracedCall

Shape = tuple[int, ...]
_SUMS = frozenset({"sum", "mean"})
# For each matrix product, the axis of each factor over which it sums.
_PRODUCTS = {"matmul": (-1, -2), "bmm": (-1, -2), "mm": (-1, -2), "mv": (-1, -1), "dot": (-1, -1)}
_SAME_ORDER = WHOLE - {"transpose", "t", "T", "mT", "H", "mH", "adjoint", "permute", "movedim"}
_TURNING = WHOLE - _SAME_ORDER


@dataclass(frozen=True)
class Mixture:
    """A stack that is summed over.

    Attributes:
        end: the node of the sum.
        kind: ``gated`` if the weights depend on the data, ``identity`` if there are none, else ``scaled``.
        alone: whether nothing else uses the stack.
    """

    end: int
    kind: Kind
    alone: bool


class Mixtures:
    """Finds weighted sums over stacks in one graph."""

    def __init__(self, graph: Graph, made: Mapping[int, Merge]):
        self.graph, self.made = graph, made

    def of(self, call: Merge) -> Mixture | None:
        """The sum over the stack that a call returns. None if there is no such sum, or several."""
        graph, count, start = self.graph, len(call.operands), call.output
        if (
            start is None
            or start >= graph.activations
            or None in call.operands
            or len(graph.children[start]) > 3
        ):
            return None
        left = self._leading_size(call, count)
        following = graph.children[start] if left is not None else []
        found = [m for c in following if (m := self._follow_to_sum(start, c, left or 1, count))]
        if len(found) != 1:
            return None
        end, kind = found[0]
        return Mixture(end, kind, len(graph.children[start]) == 1)

    def _leading_size(self, call: Merge, count: int) -> int | None:
        """The product of the sizes of the axes before the stacked axis. None if a call stacks nothing."""
        graph = self.graph
        shapes = {graph.shape(node) for node in call.operands if node is not None}
        dim = graph.joined_axis(call)
        if count < 2 or len(shapes) != 1 or dim is None or call.output is None:
            return None
        joined = graph.shape(call.output)
        return prod(joined[:dim]) if prod(joined) == count * prod(shapes.pop()) else None

    def _follow_to_sum(self, start: int, at: int, left: int, count: int) -> tuple[int, Kind] | None:
        """Follow the stack through views and weights to the sum; its node and the kind, or None."""
        graph, before, shape = self.graph, start, self.graph.shape(start)
        kind: Kind = "identity"
        while True:
            name, new, axis = graph.kind(at), graph.shape(at), _axis(shape, left, count)
            call = graph.call_at(at)
            others = [p for p in graph.parents[at] if p != before]
            if call is None or (axis is None and name not in _SAME_ORDER):
                return None
            if name in _SUMS:
                ends = _summed(call, len(shape)) == {axis}
                return (at, "scaled" if name == "mean" and kind == "identity" else kind) if ends else None
            if name in _PRODUCTS or name in {"einsum", "tensordot"}:
                place = [graph.node_of(v) for v in call.operands].index(before)
                ends = (
                    len(others) <= 1
                    and len(call.operands) <= 2
                    and axis in _contracted(call, place, len(shape))
                )
                kind = self._kind_with_weights(kind, others) if len(call.operands) == 2 else kind
                return (at, kind) if ends else None
            if name == "mul" and not (len(others) <= 1 and at in self.made):
                return None
            if name in {"mul", "expand", "expand_as"}:
                kind = self._kind_with_weights(kind, others) if name == "mul" else kind
                axis = len(new) - len(shape) + (axis or 0)
            elif name in _TURNING:
                axis = list(order_of(call, len(shape))).index(axis or 0)
            elif name not in _SAME_ORDER or others:
                return None
            if name not in _SAME_ORDER:
                left = prod(new[:axis])
            if len(graph.children[at]) != 1:
                return None
            before, shape, at = at, new, graph.children[at][0]

    def _kind_with_weights(self, kind: Kind, weights: list[int]) -> Kind:
        is_active = any(w < self.graph.activations for w in weights)
        return "gated" if kind == "gated" or is_active else "scaled"


def _axis(shape: Shape, left: int, count: int) -> int | None:
    """The stacked axis, if it is an axis of its own; None if a view has merged it with another."""
    return next((a for a, size in enumerate(shape) if size == count and prod(shape[:a]) == left), None)


def _summed(call: TracedCall, ndim: int) -> set[int]:
    """The axes over which a sum or mean reduces."""
    dims = call.argument(1, "dim", call.keywords.get("axis"))
    return {d % ndim for d in ([dims] if isinstance(dims, int) else dims or range(ndim))}


def _contracted(call: TracedCall, place: int, ndim: int) -> set[int]:
    """The axes of the operand number ``place`` over which a product sums."""
    if call.function == "tensordot":
        dims = call.argument(2, "dims", 2)
        if not isinstance(dims, int):
            return {d % ndim for d in dims[place]}
        return set(range(dims)) if place else set(range(ndim - dims, ndim))
    if call.function != "einsum":
        return {_PRODUCTS[call.function][place] + ndim} if ndim > 1 else {0}
    equation = call.arguments[0]
    if not isinstance(equation, str):
        return set()
    given, _, result = equation.replace(" ", "").replace("...", ".").partition("->")
    labels = given.split(",")[place]
    if "->" not in equation:
        result = "".join(c for c in labels if given.count(c) == 1)
    hidden = ndim - len(labels.replace(".", ""))
    spread = labels.replace(".", "." * hidden)
    return {axis for axis, label in enumerate(spread) if label not in result and label != "."}
