"""Find the shortcuts of any eager model by one forward pass: no symbolic tracing, no hooks left, no declarations."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from skipscope._untouched import untouched
from skipscope.shortcuts import _calls
from skipscope.shortcuts._boundaries import boundaries_of
from skipscope.shortcuts._results import Layer, Place, Rejected, Shortcut, Shortcuts
from skipscope.shortcuts._sides import BENT, PRODUCT, Side, Sides
from skipscope.shortcuts._trace import Call, Graph, Trace, bits, trace


def find_shortcuts(model: nn.Module, inputs: Any) -> Shortcuts:
    """Find and name every shortcut in one forward pass.

    Args:
        model: any eager module; it is left as found.
        inputs: what it is called with: a tensor, a tuple (positional) or a Mapping (keywords).

    Returns:
        The shortcuts in order of execution; ``.rejected`` has every other merge with its reason.

    Example:
        >>> import torch
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.lin = nn.Linear(3, 3)
        ...     def forward(self, x):
        ...         return x + self.lin(x).relu()
        >>> found = find_shortcuts(nn.Sequential(Block(), Block()), torch.ones(2, 3))
        >>> [(s.name, s.kind, s.fork) for s in found]
        [('0', 'identity', 'input'), ('1', 'identity', '0')]
    """
    with untouched(model, seed=0, operation="find_shortcuts"):
        return read(trace(model, inputs))


def read(record: Trace) -> Shortcuts:
    """The shortcuts in a trace."""
    graph = Graph(record)
    reader = _Reader(graph)
    found: list[_Found] = []
    rejected: list[Rejected] = []
    for call in record.calls:
        verdict = reader.judge(call)
        if isinstance(verdict, str):
            rejected.append(Rejected(_merge_name(call), verdict, call.source))
        elif verdict is not None:
            found.append(verdict)
    names = _unique_names(found)
    layers = _layers(record)
    entries = tuple(_entry(graph, item, name, names, found) for item, name in zip(found, names, strict=True))
    points = boundaries_of(
        graph, [(f.call, n, f.region | f.side_region) for f, n in zip(found, names, strict=True)]
    )
    return Shortcuts(entries, tuple(rejected), points, layers, model=type(record.model).__name__)


@dataclass(frozen=True)
class _Found:
    """A shortcut before it has a name."""

    call: Call
    kind: str
    forks: tuple[int, ...]
    bypassing: tuple[int, ...]
    branches: tuple[int, ...]
    region: int
    side_region: int
    shortcut_at: tuple[Place, ...]
    branch_at: tuple[Place, ...]
    name: str


class _Reader:
    """Judges merges: a shortcut, a reason why not, or None for what is no merge of activations at all."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.outputs = {id(c.output): c for c in graph.record.calls if c.output is not None}

    def judge(self, call: Call) -> _Found | str | None:
        reader = Sides(self.graph, call)
        if len(reader.active) < 2:
            is_addition = call.name == "add" and all(at is not None for at in reader.at) and reader.active
            return "an activation and a weight (position embedding or bias)" if is_addition else None
        sides = reader.read()
        if call.name in _calls.PRODUCTS:
            return self._gate(sides)
        if all(side.fork is None for side in sides.values()):
            return "no common ancestor (position embedding, or separate inputs)"
        bypassing = self._bypassing(call, sides)
        if isinstance(bypassing, str):
            return bypassing
        forks = tuple(f for i in bypassing if (f := sides[i].fork) is not None)
        region, branches = self._branch(call, reader, sides, bypassing, forks)
        if not branches:
            return "no weights on either side"
        if call.name == "stack":
            return "stacked side by side"
        return self._found(call, reader, sides, bypassing, branches, forks, region)

    def _gate(self, sides: dict[int, Side]) -> str | None:
        free = [s for s in sides.values() if s.how == "identity" and s.fork is not None]
        weighted = [
            s
            for s in sides.values()
            if s.how not in {"identity", "scaled"} and self.graph.modules_in(s.region)
        ]
        return "a gate: a product, not a sum" if free and weighted else None

    def _bypassing(self, call: Call, sides: dict[int, Side]) -> tuple[int, ...] | str:
        """The operands that skip, by rank: without weights, scaled by weights, normed, projected."""
        rank = {i: r for i, side in sides.items() if (r := self._rank(side)) is not None}
        if call.name in _calls.LISTS:
            rank = {i: r for i, r in rank.items() if r <= 1}
            if rank:
                return tuple(rank)
        if not rank:
            if any(side.how == "bent" for side in sides.values()):
                return "a side without weights that is not linear"
            return "parallel branches"
        best = min(rank.values())
        chosen = tuple(i for i, r in rank.items() if r == best)
        rest = [side for i, side in sides.items() if i not in chosen]
        if best == 2 and not any(self.graph.matrices_in(side.region) for side in rest):
            return "parallel branches"
        if best == 3 and not any(self._is_deeper(side) for side in rest):
            return "parallel branches"
        return chosen

    def _rank(self, side: Side) -> int | None:
        if side.fork is None or side.how in {"branch", "bent"}:
            return None
        if side.how == "projection":
            return 3
        if not self.graph.region_has_weights(side.region):
            return 0
        return 1 if side.through is not None else 2

    def _is_deeper(self, side: Side) -> bool:
        if side.how == "projection":
            return False
        matrices = self.graph.matrices_in(side.region).bit_count()
        return matrices > 1 or (matrices == 1 and any(self.graph.kind(v) in BENT for v in bits(side.region)))

    def _branch(
        self,
        call: Call,
        reader: Sides,
        sides: dict[int, Side],
        bypassing: tuple[int, ...],
        forks: tuple[int, ...],
    ) -> tuple[int, tuple[int, ...]]:
        """The nodes of the branch, and the operands they come in by."""
        graph = self.graph
        below = 0
        for fork in forks:
            below |= graph.descendants[fork] & ~(1 << fork)
        is_list = call.name in _calls.LISTS
        region, branches = 0, []
        for j in reader.active:
            if j in bypassing:
                continue
            nodes = below & (sides[j].region if is_list else graph.ancestors[reader.position(j)])
            if graph.region_has_weights(nodes):
                region |= nodes
                branches.append(j)
        return region, tuple(branches)

    def _found(
        self,
        call: Call,
        reader: Sides,
        sides: dict[int, Side],
        bypassing: tuple[int, ...],
        branches: tuple[int, ...],
        forks: tuple[int, ...],
        region: int,
    ) -> _Found:
        side_region = 0
        for i in bypassing:
            side_region |= sides[i].region
        shortcut_at = tuple(self._shortcut_place(call, i, sides[i]) for i in bypassing)
        branch_at = tuple(Place(call.key, j) for j in branches)
        kind = "concat" if call.name in _calls.LISTS else sides[bypassing[0]].how
        if call.name == "lerp":
            kind, branch_at = "gated", tuple(p for p in branch_at if p.operand < 2)
        elif kind == "identity" and (difference := self._difference(call, reader, bypassing[0], branches[0])):
            kind = "gated"
            shortcut_at += (Place(difference[0].key, difference[1]),)
            branch_at = (Place(difference[0].key, 1 - difference[1]),)
        if call.name in {"addcdiv", "addcmul", "addmm", "baddbmm", "addbmm", "addmv", "addr"}:
            branch_at = branch_at[:1]
        name = self._name(call, region)
        return _Found(
            call, kind, forks, bypassing, branches, region, side_region, shortcut_at, branch_at, name
        )

    def _shortcut_place(self, call: Call, i: int, side: Side) -> Place:
        """Where x is met before its factor: the factor itself stays as built, and its gradient live."""
        if side.through is not None:
            product = self.outputs.get(id(self.graph.nodes[side.through]))
            if product is not None:
                walk_ends = [
                    k for k, n in enumerate(product.operands) if n is not None and self._reaches(n, side)
                ]
                if walk_ends:
                    return Place(product.key, walk_ends[0])
        return Place(call.key, i)

    def _reaches(self, node: Any, side: Side) -> bool:
        """Whether ``node`` comes from the fork by shape operations alone."""
        at, graph = self.graph.position[node], self.graph
        while at != side.fork:
            parents = [p for p in graph.parents[at] if graph.active >> p & 1]
            if graph.weights[at] or len(parents) != 1 or not side.region >> at & 1:
                return False
            at = parents[0]
        return True

    def _difference(self, call: Call, reader: Sides, i: int, j: int) -> tuple[Call, int] | None:
        """In x + t (H - x): the call of H - x and which of its operands is x."""
        graph, x = self.graph, reader.position(i)
        sign = -1 if call.name in {"sub", "rsub"} else 1
        at, waiting = reader.position(j), []
        for _ in range(8):
            inner = self.outputs.get(id(graph.nodes[at]))
            if inner is not None and inner.name in {"sub", "rsub"}:
                for k, node in enumerate(inner.operands):
                    negative = (k == 1) == (inner.name == "sub")
                    if node is not None and graph.position[node] == x and negative == (sign > 0):
                        return inner, k
            if graph.kind(at) in PRODUCT or len(graph.parents[at]) == 1:
                waiting += [p for p in graph.parents[at] if graph.active >> p & 1 and not graph.weights[at]]
            if not waiting:
                return None
            at = waiting.pop(0)
        return None

    def _name(self, call: Call, region: int) -> str:
        """The module that is the branch: the smallest that holds its matrices, lifted while nothing is added."""
        graph = self.graph
        every = set(graph.modules_in(region))
        matrices = [graph.modules[m] for m in bits(graph.matrices_in(region))] or sorted(every)
        path = _common_path(matrices)
        while path != call.owner and path:
            parent = path.rpartition(".")[0]
            inside = {m for m in graph.weighted_modules if _is_inside(m, parent)}
            if not _is_inside(parent, call.owner) or not inside <= every:
                break
            path = parent
        return path


def _is_inside(path: str, parent: str) -> bool:
    return not parent or path == parent or path.startswith(parent + ".")


def _common_path(paths: list[str]) -> str:
    parts = [path.split(".") for path in paths]
    common = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def _unique_names(found: list[_Found]) -> list[str]:
    """Names in order; where one is taken twice the owner's path, or a running number."""
    names = [item.name or type_name(item) for item in found]
    count = Counter(names)
    owners = Counter(item.call.owner for item in found)
    taken = set(names)
    for i, item in enumerate(found):
        owner = item.call.owner
        if count[names[i]] > 1 and owner and owners[owner] == 1 and owner not in taken:
            names[i] = owner
    seen: Counter[str] = Counter()
    for i, name in enumerate(names):
        seen[name] += 1
        names[i] = name if seen[name] == 1 else f"{name}#{seen[name]}"
    return names


def type_name(item: _Found) -> str:
    """What a shortcut is called whose branch is the whole model."""
    return item.call.owner or item.call.name


def _merge_name(call: Call) -> str:
    return f"{call.owner} {call.name}" if call.owner else call.name


def _layers(record: Trace) -> tuple[Layer, ...]:
    modules = dict(record.model.named_modules())
    return tuple(
        Layer(
            path,
            type(modules[path]).__name__,
            sum(p.numel() for p in modules[path]._parameters.values() if p is not None),
        )
        for path, *_ in record.runs
    )


def _entry(graph: Graph, item: _Found, name: str, names: list[str], found: list[_Found]) -> Shortcut:
    runs = [
        i
        for i, run in enumerate(graph.record.runs)
        if run[3] is not None and _at(graph, run[3]) & item.region
    ]
    branch = graph.modules_in(item.region)
    if not runs:
        runs = [i for i, run in enumerate(graph.record.runs) if run[0] in branch] or [0]
    merges = {id(f.call.output): n for f, n in zip(found, names, strict=True)}
    sides = tuple(
        "shortcut" if i in item.bypassing else "branch"
        for i, is_tensor in enumerate(item.call.tensors)
        if is_tensor
    )
    return Shortcut(
        name=name, kind=item.kind, fork=_fork_name(graph, item.forks[0], merges), merge=_merge_name(item.call),
        branch=tuple(branch), shortcut=tuple(graph.modules_in(item.side_region)), source=item.call.source,
        span=(runs[0], runs[-1]), sides=sides, key=item.call.key,
        shortcut_at=item.shortcut_at, branch_at=item.branch_at, blocked=_blocked(item),
    )  # fmt: skip


def _blocked(item: _Found) -> str | None:
    if item.call.checkpointed:
        return "checkpointing runs its code again outside of any module's forward: checkpoint whole modules instead"
    return None


def _at(graph: Graph, node: Any) -> int:
    return 1 << graph.position[node] if node in graph.position else 0


def _fork_name(graph: Graph, fork: int, merges: dict[int, str]) -> str:
    """The module that produced the fork, the shortcut that merged there, or the input."""
    record = graph.record
    while True:
        node = graph.nodes[fork]
        if node in record.sources:
            return record.sources[node]
        if node in record.producers:
            return record.producers[node] or "output"
        if id(node) in merges:
            return f"{merges[id(node)]} (merged)"
        parents = [p for p in graph.parents[fork] if graph.active >> p & 1]
        if not parents:
            embedded = [owner for other, _, owner in record.embeddings if other is node]
            return embedded[0] if embedded else "input"
        fork = max(parents)
