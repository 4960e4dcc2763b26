"""Expanded gates: x - t x + t H, in any order and by any calls, is t H + (1 - t) x.

An expanded gate is a sum of sums. Its addends are collected backward from the last sum. The addend x and the
addend -t x together are (1 - t) x, and the rest is the branch. The same holds with x and H exchanged:
H - c H + c x.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations

from skipscope.shortcuts._shortcut_result import Kind, Place
from skipscope.shortcuts.finding._candidate import Candidate
from skipscope.shortcuts.finding._graph import Graph
from skipscope.shortcuts.finding._kinds import WHOLE
from skipscope.shortcuts.finding._merge import Merge
from skipscope.shortcuts.finding._products import before_map
from skipscope.shortcuts.finding._sides import signs_of

_SUMS = frozenset({"add", "sub", "rsub", "addcmul"})
_SPREAD = WHOLE | {"expand", "expand_as", "broadcast_to"}
_MAX_ADDENDS = 8  # of one gate


@dataclass(frozen=True)
class _Addend:
    """One addend of a sum of sums.

    Attributes:
        place: the operand of the sum that carries it.
        sign: its sign in the sum.
        nodes: its node, or two nodes that the call itself multiplies.
        base: its node, seen through views; None if the call itself multiplies.
        factors: operands of the product that it is, seen through views and broadcasts, each with its place.
    """

    place: Place
    sign: int
    nodes: tuple[int, ...]
    base: int | None
    factors: tuple[tuple[int, Place], ...]


# The fork, the places where the shortcut and the branch are edited, the nodes where the branch ends, and the
# bit set of the shortcut's own nodes.
_Reading = tuple[int, list[Place], list[Place], list[int], int]


class Expanded:
    """Finds expanded gates in one graph."""

    def __init__(self, graph: Graph, made: Mapping[int, Merge]):
        self.graph, self.made = graph, made
        # Outputs of complete gates: to a later sum such a node is one addend, and is not expanded.
        self._gates: set[int] = set()
        self._has_products = any(call.name in {"mul", "addcmul"} for call in made.values())

    def gate(self, call: Merge) -> Candidate | None:
        """The gate of which a call is the last sum, or None; its ``parts`` are the earlier sums."""
        if not self._has_inner(call):
            return None
        addends, parts = self._addends(call)
        if not parts or not 3 <= len(addends) <= _MAX_ADDENDS:
            return None
        for alone, product in permutations(addends, 2):
            if alone.base is None or alone.sign == product.sign:
                continue
            for k, (x, at) in enumerate(product.factors):
                if x != alone.base:
                    continue
                rest = [a for a in addends if a is not alone and a is not product]
                gate = self._branch_ungated(alone, product, rest) or self._shortcut_ungated(
                    x, [alone.place, at], rest
                )
                if gate is not None:
                    if call.output is not None:
                        self._gates.add(call.output)
                    kind = "gated" if product.factors[1 - k][0] < self.graph.activations else "scaled"
                    return self._verdict(call, parts, kind, gate)
        return None

    # --- the two readings ---

    def _shortcut_ungated(self, x: int, places: list[Place], rest: list[_Addend]) -> _Reading | None:
        """Read the gate as x - t x + ...: the addend without a gate is the shortcut."""
        ends = [v for addend in rest for v in addend.nodes if self._depends_through_weights(x, v)]
        for end in () if ends else [v for addend in rest for v in addend.nodes]:
            before = before_map(self.graph, x, end)
            if before is not None and self._depends_through_weights(before[0], end):
                return before[0], places, [a.place for a in rest], [end], before[1]
        return (x, places, [a.place for a in rest], ends, 0) if ends else None

    def _branch_ungated(self, alone: _Addend, product: _Addend, rest: list[_Addend]) -> _Reading | None:
        """Read the gate as H - c H + c x: the addend without a gate is the branch."""
        ends = [*alone.nodes, *product.nodes]
        if len(rest) == 1 and rest[0].sign == alone.sign and alone.base is not None:
            for x, at in sorted(rest[0].factors, key=lambda factor: factor[0]):
                if self._depends_through_weights(x, alone.base):
                    return x, [at], [alone.place, product.place], ends, 0
        return None

    def _depends_through_weights(self, x: int, at: int) -> bool:
        """Whether ``at`` was computed from ``x``, with weights in between."""
        return self.graph.has_weights(self.graph.inside_of(x, at))

    def _verdict(
        self,
        call: Merge,
        parts: list[Merge],
        kind: Kind,
        reading: _Reading,
    ) -> Candidate:
        x, shortcut, branch, ends, side = reading
        graph, region = self.graph, 0
        for end in ends:
            region |= graph.inside_of(x, end)
        operands = tuple(i for i, is_tensor in enumerate(call.tensors) if is_tensor)
        return Candidate(
            call,
            kind,
            (x,),
            operands,
            operands,
            region & ~side,
            side,
            tuple(shortcut),
            tuple(branch),
            tuple(parts),
            operands,
        )

    # --- the addends ---

    def _addends(self, call: Merge) -> tuple[list[_Addend], list[Merge]]:
        """The addends of a sum with its inner sums expanded, and these inner sums."""
        found: list[_Addend] = []
        parts: list[Merge] = []
        waiting = [(call, 1)]
        while waiting and len(found) <= _MAX_ADDENDS:
            outer, sign = waiting.pop()
            for place, operand_sign, nodes in self._operands(outer, sign):
                at, inner_sign = self._seen_through(nodes[0], operand_sign, only=True)
                inner = self._inner(at) if len(nodes) == 1 else None
                if inner is not None:
                    parts.append(inner)
                    waiting.append((inner, inner_sign))
                else:
                    found.append(self._addend(place, operand_sign, nodes))
        return found, parts

    def _has_inner(self, call: Merge) -> bool:
        """Whether an operand is a sum that nothing else uses."""
        if not self._has_products or not self._is_sum(call):
            return False
        for node in call.operands:
            if node is None:
                continue
            at, _ = self._seen_through(node, 1, only=True)
            if self._inner(at) is not None:
                return True
        return False

    def _inner(self, at: int) -> Merge | None:
        """The sum that computes a node, if nothing else uses it; else None."""
        call = self.made.get(at)
        is_sum = call is not None and self._is_sum(call) and at not in self._gates
        return call if is_sum and self._has_one_use(at) else None

    def _is_sum(self, call: Merge) -> bool:
        return call.name in _SUMS and None not in call.operands and call.whole is None

    def _operands(self, call: Merge, sign: int) -> Iterator[tuple[Place, int, tuple[int, ...]]]:
        """Yield the place, the sign and the nodes of each operand, or product of operands, of a sum."""
        if not self._is_sum(call):
            return
        signs = signs_of(call)
        at = [node for node in call.operands if node is not None]
        yield Place(call.key, 0), sign * signs[0], (at[0],)
        yield Place(call.key, 1), sign * signs[1], tuple(at[1:])

    def _addend(self, place: Place, sign: int, nodes: tuple[int, ...]) -> _Addend:
        factors, base = [], None
        inputs: list[tuple[int, Place]] = []
        if len(nodes) == 2:
            inputs = [(nodes[k], Place(place.call, k + 1)) for k in range(2)]
        else:
            base, sign = self._seen_through(nodes[0], sign)
            product = self.made.get(base)
            if product is not None and product.name == "mul" and None not in product.operands:
                inputs = [(n, Place(product.key, k)) for k, n in enumerate(product.operands) if n is not None]
        for node, at in inputs:
            node, sign = self._seen_through(node, sign, _SPREAD)
            factors.append((node, at))
        return _Addend(place, sign, nodes, base, tuple(factors))

    def _seen_through(
        self, at: int, sign: int, kinds: frozenset[str] = WHOLE, only: bool = False
    ) -> tuple[int, int]:
        """Trace a node back through views, additions of constants and negations; track its sign."""
        graph = self.graph
        while True:
            kind, parents = graph.kind(at), graph.parents[at]
            if len(parents) != 1 or not (kind in kinds or kind in {"neg", "add"}):
                return at, sign
            if only and not self._has_one_use(at):
                return at, sign
            sign = -sign if kind == "neg" else sign
            at = parents[0]

    def _has_one_use(self, at: int) -> bool:
        """Whether at most one activation is computed from a node."""
        return at < self.graph.activations and len(self.graph.children[at]) <= 1
