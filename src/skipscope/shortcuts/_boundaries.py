"""Where the flow is read: the first float activation, each merge, and modules outside every branch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from skipscope.shortcuts._graph import Graph
from skipscope.shortcuts._results import Boundary, CallKey
from skipscope.shortcuts._verdict import Verdict


def boundaries_of(graph: Graph, found: Sequence[tuple[Verdict, str, str]]) -> tuple[Boundary, ...]:
    """The points of a model in order of execution.

    Args:
        graph: the dataflow.
        found: each shortcut, its name, and the module that is its branch.
    """
    first = _first(graph)
    # nothing of the data reaches the output: then every module that ran is a point
    severed = not first and not graph.record.as_numbers
    points = [
        (item.call.order + 0.5, Boundary(name, 0, "merge", item.call.key, item.is_summed))
        for item, name, _ in found
    ]
    modules = graph.record.modules
    embedding = {owner for _, _, owner in graph.record.embeddings}
    cover = _Cover(graph, found)
    for run in graph.record.runs:
        if run.path in embedding or not _is_layer(modules[run.path]):
            continue
        if severed or (graph.bit(run.node) and not cover.holds(run.path, run.node)):
            points.append(
                (
                    run.calls_before,
                    Boundary(run.path or "output", 0, "module", CallKey(run.path, "output", run.nth)),
                )
            )
    points.sort(key=lambda point: point[0])
    ordered = [*(first or _first(graph, reached=False)), *(boundary for _, boundary in points)]
    return tuple(Boundary(b.name, depth, b.kind, b.key, b.summed) for depth, b in enumerate(ordered))


def _is_layer(module: nn.Module) -> bool:
    """Whether it holds a matrix of its own, and nothing below it does."""
    own = any(p is not None and p.ndim >= 2 for p in module._parameters.values())
    return own and not any(p.ndim >= 2 for child in module.children() for p in child.parameters())


class _Cover:
    """What lies inside some branch or shortcut, or feeds one from the side (cross-attention)."""

    def __init__(self, graph: Graph, found: Sequence[tuple[Verdict, str, str]]):
        self.graph, self.region = graph, 0
        self.homes: dict[str, list[Verdict]] = {}
        for item, _, home in found:
            self.region |= item.region | item.side_region
            self.homes.setdefault(home, []).append(item)

    def holds(self, path: str, node: object) -> bool:
        """Whether a module's output, an activation, is there."""
        if self.region & self.graph.bit(node):
            return True
        at, reaches = self.graph.position[node], self.graph.ancestors.reaches
        while path:
            for item in self.homes.get(path, ()):
                if not any(reaches(at, fork) for fork in item.forks):
                    return True
            path = path.rpartition(".")[0]
        return False


def _first(graph: Graph, reached: bool = True) -> list[Boundary]:
    """Where activations begin; of those that reach the output, or of all."""
    record = graph.record
    for i, node in enumerate(() if record.as_numbers else record.sources):
        if node in graph.position or not reached:
            return [Boundary("input", 0, "input", CallKey("", "input", i))]
    for node, key, owner in record.embeddings:
        if node in graph.position or not reached:
            return [Boundary(owner or "input", 0, "input", key)]
    return []
