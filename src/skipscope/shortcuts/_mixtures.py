"""Sums over what was stacked: (stack([x, H]) * weights).sum(0), by matrix product and ``einsum`` too, is w0 x + w1 H.

The stack is the merge, and the sum over it where the merge is complete. Between them are views and one weight for each
that is stacked. A flat index into the stack is (one of L, which of the n stacked, one of the rest): by L and n the
stacked axis is known again after any view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from skipscope.shortcuts._graph import Graph
from skipscope.shortcuts._nodes import shape_of, signed
from skipscope.shortcuts._record import Call

Shape = tuple[int, ...]
_SUMS = frozenset({"Sum", "Mean"})
# Which axis of each factor a matrix product sums over.
_PRODUCTS = {"Bmm": (-1, -2), "Mm": (-1, -2), "Mv": (-1, -1), "Dot": (-1, -1)}
_SAME_ORDER = frozenset({"View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Clone", "ToCopy"})


@dataclass(frozen=True)
class Mixture:
    """A stack that is summed over.

    Attributes:
        end: the node where the sum is.
        kind: ``gated`` where the weights depend on the data; ``scaled``; ``identity`` where there are none.
        alone: whether nothing else is made of the stack.
    """

    end: int
    kind: str
    alone: bool


class Mixtures:
    """Reads sums over stacks in one graph."""

    def __init__(self, graph: Graph, made: Mapping[int, Call]):
        self.graph, self.made = graph, made

    def of(self, call: Call) -> Mixture | None:
        """How what a call stacks is summed; None where it is not, or otherwise too."""
        graph, count = self.graph, len(call.operands)
        start = graph.position.get(call.output)
        if (
            start is None
            or start >= graph.activations
            or None in call.operands
            or len(graph.children[start]) > 3
        ):
            return None
        left = self._left(call, count)
        found = (
            []
            if left is None
            else [m for c in graph.children[start] if (m := self._along(start, c, left, count))]
        )
        if len(found) != 1:
            return None
        end, kind = found[0]
        return Mixture(end, kind, len(graph.children[start]) == 1)

    def _left(self, call: Call, count: int) -> int | None:
        """How many indices go before that of the stacked."""
        shapes = {shape_of(node) for node in call.operands}
        if count < 2 or len(shapes) != 1 or (shape := shapes.pop()) is None:
            return None
        joined = shape_of(call.output)
        dim = getattr(call.output, "_saved_dim", None)
        if joined is None or dim is None or prod(joined) != count * prod(shape):
            return None
        dim = signed(dim)
        return prod(joined[: dim + len(joined) if dim < 0 else dim])

    def _along(self, start: int, at: int, left: int, count: int) -> tuple[int, str] | None:
        """From the stack through views and weights to a sum over it: its node, and the kind."""
        graph, kind, before = self.graph, "identity", start
        shape = shape_of(graph.nodes[start])
        while shape is not None:
            name, node, axis = graph.kind(at), graph.nodes[at], _axis(shape, left, count)
            others = [p for p in graph.parents[at] if p != before]
            if axis is None and name not in _SAME_ORDER:
                return None
            if name in _SUMS:
                ends = _summed(node, len(shape), axis)
                return (at, "scaled" if name == "Mean" and kind == "identity" else kind) if ends else None
            if name in _PRODUCTS:
                edges = [k for k, edge in enumerate(node.next_functions) if edge[0] is not None]
                here = edges[graph.parents[at].index(before)]  # a factor that is a constant has no edge
                ends = len(others) == 1 and axis == _PRODUCTS[name][here] + len(shape)
                return (at, self._heavier(kind, others)) if ends else None
            new = shape_of(node)
            if new is None or (name == "Mul" and not (len(others) <= 1 and id(node) in self.made)):
                return None
            if name in {"Mul", "Expand"}:
                kind = self._heavier(kind, others) if name == "Mul" else kind
                axis = len(new) - len(shape) + (axis or 0)
            elif name in {"Permute", "Transpose", "T"}:
                axis = _moved(node, name, len(shape), axis or 0)
            elif name not in _SAME_ORDER or others:
                return None
            if name not in _SAME_ORDER:
                left = prod(new[:axis])
            if len(graph.children[at]) != 1:
                return None
            before, shape, at = at, new, graph.children[at][0]
        return None

    def _heavier(self, kind: str, weights: list[int]) -> str:
        is_active = any(w < self.graph.activations for w in weights)
        return "gated" if kind == "gated" or is_active else "scaled"


def _axis(shape: Shape, left: int, count: int) -> int | None:
    """The axis of the stacked, where it is one by itself."""
    return next((a for a, size in enumerate(shape) if size == count and prod(shape[:a]) == left), None)


def _summed(node: Any, ndim: int, axis: int | None) -> bool:
    """Whether a sum is over one axis alone."""
    dims = getattr(node, "_saved_dim", None)
    return dims is not None and [signed(d) % ndim for d in dims] == [axis]


def _moved(node: Any, name: str, ndim: int, axis: int) -> int:
    """Where an axis comes to lie."""
    if name == "Permute":
        return [signed(d) % ndim for d in node._saved_dims].index(axis)
    ends = [0, 1] if name == "T" else [signed(node._saved_dim0) % ndim, signed(node._saved_dim1) % ndim]
    return ends[1 - ends.index(axis)] if axis in ends else axis
