"""Routed tokens: by a mask, some rows go through one block, and all other rows through another.

``y = where(m, A(x), x)`` and then ``where(~m, B(y), y)`` is ``where(m, A(x), B(x))``: two parallel branches.
The rows that the first call keeps are replaced by the second, and the rows that the second keeps went
through A.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch

from skipscope.shortcuts.finding._graph import Graph
from skipscope.shortcuts.finding._kinds import REPEATING, WHOLE
from skipscope.shortcuts.finding._merge import Merge
from skipscope.shortcuts.trace import Operand, TracedCall

_NOT = frozenset({"invert", "bitwise_not", "logical_not"})
# Each comparison and its complement.
_CONTRARY = {"ne": "eq", "not_equal": "eq", "lt": "ge", "less": "ge", "gt": "le", "greater": "le"}
_SAME = {"equal": "eq", "greater_equal": "ge", "less_equal": "le"}


class Routes:
    """Decides whether the rows that a masked call keeps are one of several parallel routes.

    Attributes:
        made: node of a merge's result -> the merge.
    """

    def __init__(self, graph: Graph, made: Mapping[int, Merge]):
        self.graph, self.made = graph, made

    def are_parallel(self, call: Merge, i: int) -> bool:
        """Whether the rows of operand i that a masked call keeps are one of several parallel routes.

        The next masked call replaces them, or the previous masked call wrote them from a block with weights.
        """
        if self._is_one_of_many(call, i):
            return True
        kept = self._kept_where(call, i)
        return kept is not None and (self._is_replaced(call, kept) or self._is_routed(call, i, kept))

    def _is_one_of_many(self, call: Merge, i: int) -> bool:
        """Whether a chain of masked calls replaced every element of operand i in this pass.

        The values written by earlier calls must all come from blocks with weights.
        """
        graph, routed, at = self.graph, call.traced.routed, call.output
        if routed is None or routed.operand != i or at is None:
            return False
        base, end = graph.node_of(routed.base), graph.node_of(routed.end)
        if base is None or end is None or max(at, base, end) >= graph.activations:
            return False
        if at != end and not all(graph.ancestors.reaches(child, end) for child in graph.children[at]):
            return False
        put = [graph.node_of(value) for value in routed.before]
        return all(v is not None and graph.has_weights(graph.inside_of(base, v)) for v in put)

    def _is_replaced(self, call: Merge, kept: tuple[Hashable, bool]) -> bool:
        """Whether a later call replaces the kept rows, and all other uses of the result lead to that call."""
        graph, at = self.graph, call.output
        if at is None or at >= graph.activations:
            return False
        for later in graph.merges:
            if later.output is None or later.traced.index <= call.traced.index:
                continue
            for j in (0, 1):
                is_rest = self._kept_where(later, j) == (kept[0], not kept[1])
                if is_rest and self._origin(later.operands[j]) == at:
                    ends = (v for v in later.operands if v is not None and v < graph.activations)
                    inside = {later.output}
                    for end in ends:
                        inside |= {c for c in graph.children[at] if graph.ancestors.reaches(c, end)}
                    return set(graph.children[at]) <= inside
        return False

    def _is_routed(self, call: Merge, i: int, kept: tuple[Hashable, bool]) -> bool:
        """Whether the previous masked call wrote the rows that operand i keeps, from a block with weights."""
        graph, before = self.graph, self.made.get(self._origin(call.operands[i]) or -1)
        if before is None:
            return False
        for j in (0, 1):
            rows, rest = before.operands[j], before.operands[1 - j]
            if self._kept_where(before, j) == kept and rows is not None and rest is not None:
                return graph.has_weights(graph.inside_of(rest, rows))
        return False

    def _origin(self, node: int | None) -> int | None:
        """The node before views and copies of the whole tensor."""
        while node is not None and node < self.graph.activations and self.graph.kind(node) in WHOLE:
            if node in self.made:
                break
            (node,) = self.graph.active_parents(node)
        return node

    def _kept_where(self, call: Merge, i: int) -> tuple[Hashable, bool] | None:
        """The condition of the rows where a call keeps operand i, and whether it is true there; or None."""
        traced = call.traced
        if i > 1 or len(call.operands) != 2:
            return None
        if call.name == "where":
            is_method = traced.joined[:1] == traced.operands[:1]
            mask, first = traced.argument(1 if is_method else 0, "condition"), True
        elif call.put is None or not call.put.is_chosen:
            return None
        elif traced.function == "masked_scatter":
            mask, first = traced.argument(1, "mask"), False
        else:
            mask, first = traced.argument(1, "indices"), False
            if isinstance(mask, tuple | list):
                whole = [index for index in mask if index is not Ellipsis and index != slice(None)]
                mask = whole[0] if len(whole) == 1 and mask[0] is whole[0] else None
        if not isinstance(mask, Operand) or self.graph.trace.values[mask.value].dtype != torch.bool:
            return None
        condition, holds = self._condition(mask.value)
        return condition, holds == (first if i == 0 else not first)

    def _condition(self, value: int) -> tuple[Hashable, bool]:
        """The condition a mask is computed from, and whether the two agree: ``~m`` gives m and False."""
        trace, holds, shape = self.graph.trace, True, self.graph.trace.values[value].shape
        while (at := trace.values[value].call) is not None:
            call = trace.calls[at]
            if call.function in _NOT:
                holds = not holds
            elif call.function not in WHOLE | REPEATING and not self._is_view_of_all(call):
                name = _SAME.get(call.function, call.function)
                plain = _CONTRARY.get(name, name)
                if plain in {"eq", "ge", "le"}:
                    numbers = tuple(repr(a) for a in call.arguments if not isinstance(a, Operand))
                    return (plain, call.operands, numbers, shape), holds == (name == plain)
                break
            value = call.operands[0]
        return (value, shape), holds

    def _is_view_of_all(self, call: TracedCall) -> bool:
        """Whether a view has as many elements as its base, as ``m[:, None]`` has."""
        values = self.graph.trace.values
        return call.is_view and values[call.results[0]].numel == values[call.operands[0]].numel
