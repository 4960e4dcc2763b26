"""Streams that begin in weights and not in the data: a decoder's learned queries, a resampler's latents.

In q + F(q, data) the first q depends on no data, so it is not an activation by itself. It still counts as an
activation if the sum continues as a stream, that is, if a later shortcut forks at it. This excludes a
position embedding that is added again in every layer, whose sum only the branch reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from skipscope.shortcuts.finding._candidate import Candidate, Reason
from skipscope.shortcuts.finding._graph import Graph
from skipscope.shortcuts.finding._kinds import DROPOUT, NORM, REPEATING, WHOLE
from skipscope.shortcuts.finding._merge import Merge

_CARRYING = WHOLE | NORM | DROPOUT


def learned_streams(
    graph: Graph, verdicts: Iterable[tuple[Merge, Candidate | Reason | None]]
) -> dict[int, str]:
    """Find learned streams that merge with the data: value where each begins -> module it comes from."""
    verdicts = list(verdicts)
    forks = {fork for _, verdict in verdicts if isinstance(verdict, Candidate) for fork in verdict.forks}
    sums = {
        c.output: c
        for c, _ in verdicts
        if c.name == "add" and c.output is not None and None not in c.operands
    }
    found = {}
    for call, verdict in verdicts:
        if (
            not isinstance(verdict, Reason)
            or call.name != "add"
            or call.output is None
            or None in call.operands
        ):
            continue
        begins, made = sorted((node for node in call.operands if node is not None), reverse=True)
        is_learned = begins >= graph.activations > made and _is_table(graph, begins)
        if is_learned and _carried(graph, call.output, forks) and _depends(graph, made, begins):
            begins = _root(graph, begins, sums)
            path = graph.producers.get(begins) or (*graph.modules_above(begins), "")[0] or "weights"
            found[graph.values[begins]] = path
    return found


def _root(graph: Graph, at: int, sums: Mapping[int, Merge]) -> int:
    """The node where the stream that ``at`` carries begins, before all sums that depend on no data."""
    while True:
        back = at
        while back not in sums and graph.kind(back) in _CARRYING and graph.parents[back]:
            back = graph.parents[back][0]  # the first parent of a norm is its input
        if back not in sums:
            return at
        one, two = (node for node in sums[back].operands if node is not None)
        one, two = (one, two) if _depends(graph, two, one) else (two, one)
        if not _depends(graph, two, one):
            return at
        at = one


def _is_table(graph: Graph, node: int) -> bool:
    """Whether a node holds tokens with features, possibly in a batch of one, and not a mere vector.

    A single token has shape (batch, 1, features), or is a vector that is repeated for each sample.
    """
    shape = graph.shape(node)
    if sum(size > 1 for size in shape) > 1 or (len(shape) > 2 and shape[-1] > 1):
        return True
    while graph.kind(node) in WHOLE and len(graph.parents[node]) == 1:
        (node,) = graph.parents[node]
    return graph.kind(node) in REPEATING


def _carried(graph: Graph, at: int, forks: set[int]) -> bool:
    """Whether a later shortcut forks at node ``at``, or at a view or norm of it."""
    waiting, seen = [at], {at}
    while waiting:
        at = waiting.pop()
        if at in forks:
            return True
        following = [c for c in graph.children[at] if c not in seen and graph.kind(c) in _CARRYING]
        seen.update(following)
        waiting += following
    return False


def _depends(graph: Graph, at: int, on: int) -> bool:
    """Whether node ``at`` was computed from ``on``, through values that may hold no data."""
    waiting, seen = [at], {at}
    while waiting:
        above = [p for p in graph.parents[waiting.pop()] if p not in seen]
        if on in above:
            return True
        seen.update(above)
        waiting += above
    return False
