"""Couplings: with a and b the parts of one tensor x, [a + F(b), b] is x + [F(b), 0].

By itself a + F(b) bypasses nothing: a and b are two activations, as two steps of a sequence are. Put back
beside b, each in its own place, it is a sum over the whole: F is a branch, and a the part of x that goes past
it (NICE, RealNVP, reversible networks). The parts may be put back where they were summed, or many sums later,
as streams that were parted once.
"""

from __future__ import annotations

from collections.abc import Mapping

from skipscope.shortcuts.finding._graph import Graph
from skipscope.shortcuts.finding._kinds import WHOLE
from skipscope.shortcuts.finding._merge import Merge
from skipscope.shortcuts.finding._parts import Axis, Part
from skipscope.shortcuts.trace import _operations

# What carries a part on: a stream of sums, and gates on it.
_CARRYING = WHOLE | {"add", "sub", "mul", "div"}

# What puts parts into a tensor one by one.
_PUT = frozenset({"setitem", "write", "slice_scatter", "index_copy"})


class Couplings:
    """Reads couplings in one graph."""

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
        """Whether a concatenation comes from parts of ``fork`` along one axis that together are all of it."""
        whole, dim = self.graph.parts_of(fork).get(fork), self.graph.joined_axis(joined)
        # Two features of one number each may be coupled; steps of a sequence, one by one, are a recurrence.
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
        """What a call puts together; with a put, also what was put there before."""
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
        """Whether a call joins along the axis of the features: the last, or that of an image's channels."""
        ndim = 0 if joined.output is None else len(self.graph.shape(joined.output))
        return ndim > 1 and dim is not None and (dim == ndim - 1 or (ndim > 3 and dim == 1))

    def _parts_carried(self, node: int | None, fork: int) -> list[Part]:
        """The parts of ``fork``, in the shape of ``node``, that it may carry on."""
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
