"""Boundaries of a model: the first float activation, each merge, and modules outside every branch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from skipscope.shortcuts._shortcut_result import Boundary, CallKey
from skipscope.shortcuts.finding._candidate import Candidate
from skipscope.shortcuts.finding._graph import Graph
from skipscope.shortcuts.finding._kinds import SHAPE
from skipscope.shortcuts.trace import ModuleRun


def boundaries_of(
    graph: Graph, model: nn.Module, found: Sequence[tuple[Candidate, str, str]]
) -> tuple[Boundary, ...]:
    """The boundaries of a model in order of execution.

    Args:
        graph: the dataflow.
        model: the model.
        found: each shortcut, its name, and the path of its branch's module.
    """
    first, begins = _first(graph)
    # If no activation reaches the output, every layer that ran is a boundary.
    severed = not graph.activations
    points = [
        (item.call.order + 0.5, Boundary(name, 0, "merge", item.call.key, item.is_summed))
        for item, name, _ in found
    ]
    modules = dict(model.named_modules())
    cover = _Cover(graph, found)
    for run in graph.runs:
        node = graph.node_of(run.outputs[0]) if run.outputs else None
        if (run.path, run.nth) == begins or _looks_up(graph, run) or not _is_layer(modules[run.path]):
            continue
        if severed or (graph.can_be_tapped(node) and not cover.holds(run.path, node)):
            key = CallKey(run.path, "output", run.nth)
            points.append((run.ends, Boundary(run.path or "output", 0, "module", key)))
    points.sort(key=lambda point: point[0])
    ordered = [*first, *(boundary for _, boundary in points)]
    return tuple(Boundary(b.name, depth, b.kind, b.key, b.summed) for depth, b in enumerate(ordered))


def _looks_up(graph: Graph, run: ModuleRun) -> bool:
    """Whether a module's output is an embedding of token ids, where activations begin."""
    node = graph.node_of(run.outputs[0]) if run.outputs else None
    if node is None or node >= graph.activations:
        return False
    # If the table is sharded over processes, collectives combine the rows that were looked up.
    above, waiting = {node}, [node]
    while waiting:
        at = waiting.pop()
        if at in graph.sources:
            continue
        if graph.weights[at] or graph.kind(at) not in SHAPE:
            return False
        fresh = set(graph.active_parents(at)) - above
        above |= fresh
        waiting += fresh
    begins = above & graph.sources.keys()
    return all(graph.sources[v] != "input" and graph.kind(v) in _LOOKUPS for v in begins)


_LOOKUPS = frozenset({"embedding", "embedding_bag"})


def _is_layer(module: nn.Module) -> bool:
    """Whether a module holds a matrix of its own, and none of its submodules does."""
    own = any(p is not None and p.ndim >= 2 for p in module._parameters.values())
    return own and not any(p.ndim >= 2 for child in module.children() for p in child.parameters())


class _Cover:
    """The nodes inside a branch or shortcut, or feeding one from outside (cross-attention)."""

    def __init__(self, graph: Graph, found: Sequence[tuple[Candidate, str, str]]):
        self.graph, self.region = graph, 0
        self.homes: dict[str, list[Candidate]] = {}
        for item, _, home in found:
            self.region |= item.region | item.side_region
            self.homes.setdefault(home, []).append(item)

    def holds(self, path: str, node: int | None) -> bool:
        """Whether the activation ``node``, the output of module ``path``, is covered."""
        if self.region & self.graph.bit(node):
            return True
        assert node is not None
        at, reaches = node, self.graph.ancestors.reaches
        while path:
            for item in self.homes.get(path, ()):
                if not any(reaches(at, fork) for fork in item.forks):
                    return True
            path = path.rpartition(".")[0]
        return False


def _first(graph: Graph) -> tuple[list[Boundary], tuple[str, int] | None]:
    """Find the first boundary: a float input, or else the result of the first lookup of token ids.

    Returns:
        The boundary in a list, which is empty if there is none; and the path and the number of the module run
        that outputs it, or None.
    """
    values = graph.trace.values
    floats = [v for v in graph.trace.inputs if values[v].is_float]
    reached = [i for i, v in enumerate(floats) if v in graph.node] or (
        [] if graph.sources else list(range(len(floats)))
    )
    if reached:
        return [Boundary("input", 0, "input", CallKey("", "input", reached[0]))], None
    for value in values:
        if not value.starts or value.call is None or (graph.sources and value.index not in graph.node):
            continue
        call = graph.trace.calls[value.call]
        run = next((r for r in graph.runs if r.outputs[:1] == (value.index,)), None)
        if run is not None and call.function not in _LOOKUPS:
            key = CallKey(run.path, "output", run.nth)
            return [Boundary(run.path or "input", 0, "input", key)], (run.path, run.nth)
        if call.key is not None:
            return [Boundary(call.owner or "input", 0, "input", call.key)], None
    return [], None
