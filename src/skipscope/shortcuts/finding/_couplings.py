"""Couplings: for a tensor x with parts a and b, [a + F(b), b] equals x + [F(b), 0].

The sum a + F(b) alone bypasses nothing: a and b are two activations, like two steps of a sequence. If it is
concatenated with b again, the whole is a sum: F is a branch, and a is the part of x that skips it (NICE,
RealNVP, reversible networks). The parts may be joined right after the sum, or many sums later, as streams
that were split once.
"""

from __future__ import annotations

from collections.abc import Mapping

from skipscope.shortcuts.finding._graph import Graph
from skipscope.shortcuts.finding._kinds import WHOLE
from skipscope.shortcuts.finding._merge import Merge
from skipscope.shortcuts.finding._parts import Axis, Part
from skipscope.shortcuts.trace import _operations

# Operations between a part and the concatenation: sums on the stream, and gates.
_CARRYING = WHOLE | {"add", "sub", "mul", "div"}

# Operations that write parts into a tensor one by one.
_PUT = frozenset({"setitem", "write", "slice_scatter", "index_copy"})


class Couplings:
    """Finds couplings in one graph."""

    def __init__(self, graph: Graph, made: Mapping[int, Merge]):
        self.graph, self.made = graph, made

    def puts_back(self, call: Merge, fork: int) -> bool:
        """Whether a sum with a part of ``fork`` is later concatenated with all of the other parts."""
        at = call.output
        for end in [] if at is None else self.graph.onward([at], _CARRYING | _PUT, _operations.LISTS | _PUT):
            joined = self.made.get(end)
            if joined is not None and joined.name in _operations.LISTS and self._covers(joined, fork):
                return True
        return False

    def _covers(self, joined: Merge, fork: int) -> bool:
        """Whether a concatenation joins parts of ``fork`` that together cover it along one axis."""
        whole, dim = self.graph.parts_of(fork).get(fork), self.graph.joined_axis(joined)
        # Parts of a single feature may be coupled, but parts of a single time step are a recurrence.
        least = 1 if joined.name != "stack" and self._is_of_features(joined, dim) else 2
        if whole is None or dim is None:
            return False
        taken: dict[Axis, list[range]] = {}
        for node in self._pieces(joined):
            for part in self._parts_carried(node, fork):
                axis = part.axis_along(dim, least)
                if axis is not None and not any(set(axis[1]) & set(run) for run in taken.get(axis[0], ())):
                    taken.setdefault(axis[0], []).append(axis[1])
                    break
        return any(
            isinstance(axis, int) and sum(map(len, runs)) == whole.shape[axis] for axis, runs in taken.items()
        )

    def _pieces(self, joined: Merge) -> list[int | None]:
        """The nodes that a call concatenates; for a write into a part, also those of earlier writes."""
        if joined.put is None:
            return list(joined.operands)
        found: list[int | None] = []
        at: Merge | None = joined
        while at is not None and at.put is not None:
            before, value = at.operands
            found.append(value)
            at = None if before is None else self.made.get(before)
        return found

    def _is_of_features(self, joined: Merge, dim: int | None) -> bool:
        """Whether a call joins along the feature axis: the last, or the channel axis of an image."""
        ndim = 0 if joined.output is None else len(self.graph.shape(joined.output))
        return ndim > 1 and dim is not None and (dim == ndim - 1 or (ndim > 3 and dim == 1))

    def _parts_carried(self, node: int | None, fork: int) -> list[Part]:
        """The parts of ``fork``, of the shape of ``node``, that lead to it through sums and gates."""
        if node is None:
            return []
        graph, parts, shape = self.graph, self.graph.parts_of(fork), self.graph.shape(node)
        waiting = [node]
        seen, found = set(waiting), []
        while waiting:
            at = waiting.pop()
            if at in parts and at != fork:
                found += [parts[at]] if parts[at].shape == shape else []
            elif graph.kind(at) in _CARRYING:
                above = [p for p in graph.active_parents(at) if p > fork and p not in seen]
                seen.update(above)
                waiting += above
        return found
