"""Where the flow is read: the first float activation, each merge, and modules outside every branch."""

from __future__ import annotations

from collections.abc import Sequence

from skipscope.shortcuts._results import Boundary, CallKey
from skipscope.shortcuts._trace import Call, Graph


def boundaries_of(graph: Graph, merges: Sequence[tuple[Call, str, int]]) -> tuple[Boundary, ...]:
    """The points of a model in order of execution.

    Args:
        graph: the dataflow.
        merges: each shortcut's merge, its name, and the nodes of its two sides.
    """
    covered = 0
    for _, _, region in merges:
        covered |= region
    points: list[tuple[float, Boundary]] = []
    points += [(call.order + 0.5, Boundary(name, 0, "merge", call.key)) for call, name, _ in merges]
    modules = dict(graph.record.model.named_modules())
    first = _first(graph)
    severed = not first  # nothing of the data reaches the output: then every module that ran is a point
    for path, nth, calls_before, node in graph.record.runs:
        at = graph.position.get(node)
        module = modules[path]
        matrix = any(p is not None and p.ndim >= 2 for p in module._parameters.values())
        nested = any(p.ndim >= 2 for child in module.children() for p in child.parameters())
        embeds = any(owner == path for _, _, owner in graph.record.embeddings)
        outside = at is not None and graph.active >> at & 1 and not covered >> at & 1
        if not matrix or nested or embeds or not (outside or severed):
            continue
        points.append((calls_before, Boundary(path, 0, "module", CallKey(path, "output", nth))))
    points.sort(key=lambda point: point[0])
    ordered = [*(first or _first(graph, reached=False)), *(boundary for _, boundary in points)]
    return tuple(Boundary(b.name, depth, b.kind, b.key) for depth, b in enumerate(ordered))


def _first(graph: Graph, reached: bool = True) -> list[Boundary]:
    """Where activations begin; of those that reach the output, or of all."""
    record = graph.record
    for i, node in enumerate(record.sources):
        if node in graph.position or not reached:
            return [Boundary("input", 0, "input", CallKey("", "input", i))]
    for node, key, owner in record.embeddings:
        if node in graph.position or not reached:
            return [Boundary(owner or "input", 0, "input", key)]
    return []
