"""Shortcuts that span several calls: gates in any form, and sums of more than two operands.

A gate between x and H is one call (``lerp``), or x + t (H - x), or H + c (x - H), or multiplied out
(``_expanded``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import permutations

from skipscope.shortcuts._shortcut_result import Kind, Place
from skipscope.shortcuts.finding._bit_sets import bits
from skipscope.shortcuts.finding._candidate import Candidate, Reason
from skipscope.shortcuts.finding._graph import Graph
from skipscope.shortcuts.finding._kinds import ELEMENTWISE, PRODUCT, SHAPE, WHOLE
from skipscope.shortcuts.finding._merge import Merge
from skipscope.shortcuts.finding._products import before_map
from skipscope.shortcuts.finding._sides import Side, Sides, signs_of

_SUMS = frozenset({"add", "sub", "rsub"})
# Operations that add one tensor to another, or to a part of it.
_ADDING = frozenset({"add", "index_add", "index_put", "scatter_add", "scatter_reduce"})


class Gates:
    """Finds gates, and sums of more than two operands, in one graph."""

    def __init__(self, graph: Graph, made: Mapping[int, Merge]):
        self.graph, self.made = graph, made
        self._has_differences = any(call.name in {"sub", "rsub"} for call in made.values())

    def product(self, sides: dict[int, Side]) -> Reason | None:
        """``Reason.GATE`` for a product of x and a side with weights. None for any other product."""
        free = [s for s in sides.values() if s.how == "identity" and s.fork is not None]
        held = [
            s
            for s in sides.values()
            if s.how in {"branch", "projection"} and self.graph.has_weights(s.region)
        ]
        return Reason.GATE if free and held else None

    def reaches_past_gates(self, starts: list[int], end: int, nodes: int) -> bool:
        """Whether ``end`` depends on ``starts`` other than through a sigmoid factor of an unrelated node."""
        graph, reached = self.graph, set(starts)
        for v in bits(nodes):
            parents = [p for p in graph.parents[v] if p in reached]
            free = [p for p in graph.active_parents(v) if not nodes >> p & 1 and p not in starts]
            gates = all(graph.kind(p) in {"sigmoid", "hardsigmoid"} for p in parents)
            if parents and not (graph.kind(v) == "mul" and free and gates):
                reached.add(v)
        return end in reached

    def reaches_by_a_weight(self, starts: list[int], end: int, nodes: int) -> bool:
        """Whether ``end`` depends on ``starts`` other than through a weightless factor of an unrelated node.

        A router's output multiplies each expert's output, but is no input of the experts.
        """
        graph = self.graph
        reached = dict.fromkeys(starts, False)  # node -> whether a weight has entered since
        for v in bits(nodes):
            parents = [p for p in graph.parents[v] if p in reached]
            free = [p for p in graph.active_parents(v) if not nodes >> p & 1 and p not in starts]
            touched = bool(graph.weights[v]) or any(reached[p] for p in parents)
            if parents and not (graph.kind(v) == "mul" and free and not touched):
                reached[v] = touched
        return end in reached

    def difference(
        self, reader: Sides, i: int, branches: tuple[int, ...]
    ) -> tuple[Merge, int, tuple[int, ...], Kind] | None:
        """Find H - x in x + t (H - x).

        Returns:
            The call of H - x, the number of its operand x, the operands that carry both sides, and the kind
            (scaled if t does not depend on the data); or None.
        """
        if not self._has_differences:
            return None
        x, signs = reader.position(i), signs_of(reader.call)
        for j in branches:
            inner = self._traced_difference(reader.position(j), x)
            if inner is not None and not self._holds_weights(inner[0].operands[1 - inner[1]], x):
                continue  # x + s (pool(x) - x), as in EfficientFormer: the branch has no weight but the scale
            if inner is not None and inner[2] * signs[j] == -signs[i]:
                both = tuple(reader.factors) if j in reader.factors else (j,)
                return *inner[:2], both, _kind(reader, inner[3])
        return None

    def crossed(self, reader: Sides) -> Candidate | None:
        """Find H + c (x - H), as in recurrent cells, where the operand without a gate is the branch."""
        if not self._has_differences:
            return None
        graph, call, signs = self.graph, reader.call, signs_of(reader.call)
        for i, j in permutations(reader.active, 2):
            end = reader.position(i)
            inner = self._traced_difference(reader.position(j), end)
            if inner is None or inner[2] * signs[j] != -signs[i]:
                continue
            part, h, _, is_gate = inner
            x = part.operands[1 - h]
            assert x is not None
            region, side = graph.inside_of(x, end), 0
            if not graph.has_weights(region) and (before := before_map(graph, x, end)) is not None:
                x, side = before
                region = graph.inside_of(x, end)
            if not graph.has_weights(region):
                continue
            region |= graph.inside_of(x, reader.position(j))
            both = reader.factors if j in reader.factors else (j,)
            at = Place(part.key, 1 - h), Place(call.key, i), Place(part.key, h)
            kind = _kind(reader, is_gate)
            return Candidate(
                call, kind, (x,), (j,), both, region & ~side, side, at[:1], at[1:], (part,), both
            )
        return None

    def with_addend(
        self, call: Merge, sum_at: Callable[[int], Candidate | None]
    ) -> tuple[int, Candidate] | None:
        """Read (x + a) + b, with b computed from x too, as the inner sum's shortcut with b in its branch.

        Each of a and b may be added to only a part of x.

        Args:
            call: a merge that is not a shortcut of its own.
            sum_at: function that returns the shortcut merged at a node, or None.

        Returns:
            The node of the inner sum, and its extended shortcut; or None.
        """
        graph, reader = self.graph, Sides(self.graph, call)
        for i, j in permutations(reader.active, 2) if call.name in _ADDING else ():
            if i != call.part and (call.whole is not None or call.name != "add"):
                continue
            at, end = (
                reader.position(i) if call.whole is None else call.whole,
                reader.position(j),
            )
            while sum_at(at) is None and graph.kind(at) in WHOLE:
                (at,) = graph.active_parents(at)
            inner = sum_at(at)
            if inner is None or inner.call.name not in _ADDING or graph.ancestors.reaches(at, end):
                continue
            fork = inner.forks[0]
            region = graph.inside_of(fork, end)
            if graph.has_weights(region):
                branch_at = (*inner.branch_at, Place(call.key, j))
                return at, replace(inner, region=inner.region | region, branch_at=branch_at)
        return None

    def inner(self, j: int, x: int, reader: Sides) -> bool:
        """Whether operand ``j`` of a merge is t (H - x)."""
        return self._has_differences and self._traced_difference(reader.position(j), x) is not None

    def _holds_weights(self, at: int | None, x: int) -> bool:
        """Whether a weight enters between nodes ``x`` and ``at``, or ``at`` does not depend on ``x``."""
        graph = self.graph
        return at is not None and (
            not graph.ancestors.reaches(x, at) or graph.has_weights(graph.inside_of(x, at))
        )

    def _traced_difference(self, at: int, x: int) -> tuple[Merge, int, int, bool] | None:
        """Trace back through gates and views to a difference with node ``x``.

        Returns:
            The call, the number of its operand x, the sign of x, and whether a gate that depends on the data
            was passed; or None.
        """
        graph, waiting, is_gate = self.graph, [(at, 1)], False
        for _ in range(12):
            if not waiting:
                return None
            at, sign = waiting.pop(0)
            call = self.made.get(at)
            if call is not None and call.name in {"sub", "rsub"} and None not in call.operands:
                for k, node in enumerate(call.operands):
                    if node == x:
                        return call, k, sign if (k == 0) == (call.name == "sub") else -sign, is_gate
            kind = graph.kind(at)
            if kind in ELEMENTWISE or (kind in PRODUCT | SHAPE - _SUMS and not graph.weights[at]):
                parents = graph.active_parents(at)
                is_gate = is_gate or (kind in PRODUCT and len(parents) > 1)
                sign = -sign if kind == "neg" else sign
                # The sign may be in another factor: x + (-t) (x - H).
                negative = {p for p in parents if len(parents) > 1 and graph.kind(p) == "neg"}
                routes = [p for p in parents if p != x and graph.ancestors.reaches(x, p)]
                waiting += [(p, -sign if negative - {p} else sign) for p in routes]
        return None


def _kind(reader: Sides, is_gate: bool) -> Kind:
    """Gated if a gate was passed or the merge itself multiplies by an activation; else scaled."""
    in_call = bool(reader.factors) and all(f in reader.active for f in reader.factors)
    return "gated" if is_gate or in_call else "scaled"
