"""Names of shortcuts, merges and forks, built from module paths and the same from run to run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from skipscope.shortcuts.finding._candidate import Candidate
from skipscope.shortcuts.finding._graph import Graph
from skipscope.shortcuts.finding._merge import Merge


def home_of(graph: Graph, item: Candidate) -> str:
    """Path of the branch's module: the smallest that holds its matrices, or an ancestor that adds no weights.

    It is not above the module that merges. For a branch without matrices its vectors decide, for a branch
    without a common module its first module.
    """
    every = set(graph.modules_in(item.region))
    matrices = [m for m in graph.modules_in(item.region) if graph.has_matrix(m)] or list(every)
    if not matrices:
        return item.call.owner
    # A module shared by all layers (a position bias) does not identify any of them.
    only_here = graph.modules_only_in(item.region)
    path = common_path([m for m in matrices if m in only_here] or matrices)
    if not path:
        return matrices[0] if item.call.owner == "" else item.call.owner
    while path and path != item.call.owner:
        parent = path.rpartition(".")[0]
        if not parent or not is_inside(parent, item.call.owner) or not graph.modules_below(parent) <= every:
            break
        path = parent
    return path


def unique_names(graph: Graph, found: Sequence[Candidate], homes: Sequence[str]) -> list[str]:
    """Unique names in order. A duplicate gets the merging module's path or a running number."""
    names = [home or item.call.name for item, home in zip(found, homes, strict=True)]
    count, taken = Counter(names), set(names)
    owners = Counter(item.call.owner for item in found)
    for i, item in enumerate(found):
        owner = item.call.owner
        if count[names[i]] > 1 and owner and owners[owner] == 1 and owner not in taken:
            names[i] = owner
    seen: Counter[str] = Counter()
    for i, name in enumerate(names):
        seen[name] += 1
        names[i] = name if seen[name] == 1 else f"{name}#{seen[name]}"
    return names


def merge_name(call: Merge) -> str:
    """Path of the module that merges, and the operation."""
    name = call.name.split()[1].rpartition(".")[2] if call.name.startswith("marked ") else call.name
    return f"{call.owner} {name}" if call.owner else name


def fork_name(graph: Graph, fork: int, merges: Mapping[int | None, str]) -> str:
    """The module that produced the fork, the shortcut that merged there, or ``"input"``.

    Args:
        graph: the dataflow.
        fork: node of the fork.
        merges: node of a merge -> name of its shortcut.
    """
    while True:
        if graph.sources.get(fork) == "input" or graph.values[fork] in graph.streams:
            return graph.sources[fork]
        if graph.producers.get(fork):
            return graph.producers[fork]
        if fork in merges:
            return f"{merges[fork]} (merged)"
        parents = graph.active_parents(fork)
        if not parents:
            return graph.sources.get(fork, "input")
        fork = max(parents)


def is_inside(path: str, parent: str) -> bool:
    """Whether a module path is ``parent`` or below it."""
    return not parent or path == parent or path.startswith(parent + ".")


def common_path(paths: Sequence[str]) -> str:
    """Path of the smallest module that holds all of ``paths``."""
    common = []
    for level in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)
