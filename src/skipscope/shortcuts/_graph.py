"""The dataflow of a trace: autograd's graph, and which of its nodes depend on which.

The graph has a node for every ``grad_fn``. An *activation* is what is reachable from a float input or from an
embedding of the data's integers; what is not is computed from weights alone. Activations come first in the numbering,
so that a set of them is a Python integer without gaps, used as a bit set.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from skipscope import _data
from skipscope.shortcuts._bits import Ancestors, as_bits, bits, chosen
from skipscope.shortcuts._nodes import Step, kind_of, node_of, output_of, shape_of
from skipscope.shortcuts._parts import SPLITS, Cuts, Part, part_after, whole
from skipscope.shortcuts._record import Trace


class Graph:
    """Autograd's graph of a trace.

    Attributes:
        nodes: autograd nodes: activations first; among them, what a node was computed from comes before it.
        position: node -> its index in ``nodes``; of an activation, the bit that stands for it.
        parents: for each node the indices of the nodes it was computed from.
        activations: how many activations there are: index i is one where ``i < activations``.
        modules: module paths that own weights; bit i of a weight set stands for ``modules[i]``.
        weights: for each activation the set of modules whose weights enter there.
        matrices: the same, only where a weight of two or more dimensions enters.
        ancestors: for each activation the bit set of those it was computed from, itself among them.
    """

    def __init__(self, record: Trace):
        self.record = record
        starts = [node_of(t) for t in _data.tensors_in(record.output)]
        for call in record.calls:
            starts += [*call.operands, call.output, call.written]
        nodes, parents = _ordered([s for s in starts if s is not None])
        self._name_modules()
        is_active, weights, matrices = self._weigh(nodes, parents)
        order = sorted(range(len(nodes)), key=lambda i: not is_active[i])  # stable
        place = [0] * len(nodes)
        for new, old in enumerate(order):
            place[old] = new
        self.activations = sum(is_active)
        self.nodes = [nodes[i] for i in order]
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self._kinds = [kind_of(node) for node in self.nodes]
        self._masks: dict[frozenset[str], int] = {}
        self._used: dict[int, dict[int, int]] = {}
        self.parents = [tuple(place[p] for p in parents[i]) for i in order]
        self.weights, self.matrices = [weights[i] for i in order], [matrices[i] for i in order]
        n = self.activations
        self._active_parents = [[p for p in above if p < n] for above in self.parents]
        self.ancestors = Ancestors(self.parents[:n])
        self.weighted = as_bits(self.weights[: self.activations])
        self._count_uses()
        self._sets: dict[int, int] = {}
        self._known_cuts: dict[int, Cuts] = {}

    def release(self) -> None:
        """Let go of autograd's nodes, the last first: the first first, each would take all that follow it along, one
        inside the other, and a long graph overflows the stack. Nothing of the trace can be read any more.
        """
        record = self.record
        record.output = None
        for call in record.calls:  # whoever still holds one, an exception's frame say, holds no node by it
            call.operands, call.output, call.whole, call.written = (), None, None, None
        for held in (
            record.calls,
            record.sources,
            record.producers,
            record.embeddings,
            record.streams,
            record.runs,
            self.position,
        ):
            held.clear()
        while self.nodes:
            self.nodes.pop()

    # --- which weights enter where ---

    def _name_modules(self) -> None:
        self.modules = list(self.record.modules)
        self._index = {path: i for i, path in enumerate(self.modules)}
        self._shapes: dict[int, list[tuple[int, ...]]] = {}
        self._below: dict[str, set[str]] = {}
        self._scalar = 0
        for i, (path, module) in enumerate(self.record.modules.items()):
            own = [p for p in module._parameters.values() if p is not None]
            if all(p.numel() == 1 for p in own):
                self._scalar |= 1 << i
            if any(p.ndim >= 2 for p in own):
                self._shapes[i] = [tuple(p.shape) for p in own if p.ndim >= 2]
            parent = path
            while own:
                self._below.setdefault(parent, set()).add(path)
                if not parent:
                    break
                parent = parent.rpartition(".")[0]

    def _weigh(
        self, nodes: list[Any], parents: list[tuple[int, ...]]
    ) -> tuple[list[bool], list[int], list[int]]:
        """Which nodes are activations, and the modules whose weights, and matrices, enter at each of them."""
        record = self.record
        owners = {key: (1 << i, weight.ndim >= 2) for key, (i, weight) in record.weights.items()}
        embedded = {id(node) for node, _, _ in record.embeddings}
        dead = {call.output for call in record.calls if call.dead}
        is_active: list[bool] = []
        every: list[
            int
        ] = []  # of an activation what enters there; of any other node what it is computed from
        matrices: list[int] = []
        for node, above in zip(nodes, parents, strict=True):
            starts = node in record.sources or id(node) in embedded or node in record.streams
            all_weights = only_matrices = 0
            for parent in above:
                if not is_active[parent]:
                    all_weights |= every[parent]
                    only_matrices |= matrices[parent]
            if not above and (variable := getattr(node, "variable", None)) is not None:
                all_weights, is_matrix = owners.get(id(variable), (0, False))
                only_matrices = all_weights if is_matrix else 0
            is_active.append(starts or (node not in dead and any(is_active[parent] for parent in above)))
            every.append(0 if starts else all_weights)
            matrices.append(0 if starts else only_matrices)
        return is_active, every, matrices

    def _count_uses(self) -> None:
        self._uses: Counter[int] = Counter()
        self._where: dict[int, list[int]] = {}
        for i in bits(self.weighted):
            self._uses.update(bits(self.weights[i]))
            for m in bits(self.matrices[i]):
                self._where.setdefault(m, []).append(i)

    def modules_in(self, region: int) -> list[str]:
        """Paths of the modules whose weights enter in a set of nodes, in order of execution."""
        return [self.modules[m] for m in self._used_in(region)]

    def modules_above(self, i: int) -> list[str]:
        """Paths of the modules whose weights a node is computed from that depends on no data."""
        return [self.modules[m] for m in bits(self.weights[i])]

    def modules_only_in(self, region: int) -> set[str]:
        """Of these, the modules whose weights enter nowhere else."""
        return {self.modules[m] for m, times in self._used_in(region).items() if times == self._uses[m]}

    def _used_in(self, region: int) -> dict[int, int]:
        found = self._used.get(region)
        if found is None:
            found = self._used[region] = {}
            for i in bits(region & self.weighted):
                for m in bits(self.weights[i]):
                    found[m] = found.get(m, 0) + 1
        return found

    def modules_below(self, path: str) -> set[str]:
        """Paths of the modules with weights of their own that are ``path`` or inside it."""
        return self._below.get(path, set())

    def has_weights(self, region: int) -> bool:
        """Whether a weight enters anywhere in a set of nodes."""
        return bool(region & self.weighted)

    def matrices_in(self, region: int, enough: int | None = None) -> int:
        """The set of modules whose matrices enter in a set of nodes, or the first ``enough`` of them."""
        mask = 0
        for i in bits(region & self.weighted):
            mask |= self.matrices[i]
            if enough is not None and mask.bit_count() >= enough:
                break
        return mask

    def has_matrix(self, path: str) -> bool:
        """Whether a module owns a weight of two or more dimensions."""
        return self._index[path] in self._shapes

    def has_only_scalars(self, region: int) -> bool:
        """Whether every weight that enters in a set of nodes is of a module that holds single numbers only."""
        return all(not self.weights[i] & ~self._scalar for i in bits(region & self.weighted))

    def matrix_shapes(self, region: int) -> list[tuple[int, ...]]:
        """Shapes of the matrices that enter in a set of nodes."""
        return [shape for m in bits(self.matrices_in(region)) for shape in self._shapes.get(m, [])]

    def nodes_of_matrix(self, m: int) -> list[int]:
        """Activations where a matrix of module ``m`` enters."""
        return self._where.get(m, [])

    # --- what depends on what ---

    def active_parents(self, i: int) -> list[int]:
        """The activations that node ``i`` was computed from."""
        return self._active_parents[i]

    @functools.cached_property
    def children(self) -> list[list[int]]:
        """For each activation those computed from it, in order."""
        found: list[list[int]] = [[] for _ in range(self.activations)]
        for child in range(self.activations):
            for parent in dict.fromkeys(self._active_parents[child]):
                found[parent].append(child)
        return found

    def children_of(self, i: int) -> int:
        """The set of activations computed from node ``i``."""
        if i not in self._sets:
            first = self.children[i][0] if self.children[i] else 0
            self._sets[i] = sum(1 << child - first for child in self.children[i]) << first
        return self._sets[i]

    def entries(self, region: int, common: int) -> set[int]:
        """Nodes of ``common`` from which some node of ``region`` was computed; the smaller set is gone through."""
        if region.bit_count() < common.bit_count():
            return {p for v in bits(region) for p in self.active_parents(v) if common >> p & 1}
        return {p for p in bits(common) if any(region >> v & 1 for v in self.children[p])}

    def leaving(self, fork: int, parts: list[Part]) -> list[int]:
        """What was computed from ``fork``, but for what takes other parts of it than these."""
        return self._cuts(fork).overlapping(parts)

    def parts_taken(self, fork: int, region: int) -> list[Part]:
        """The parts of ``fork`` from which the nodes of a set were computed; at its end, the part that it is."""
        cuts, found = self._cuts(fork), []
        for v in bits(region):
            if v in cuts.parts:
                found += [] if region & self.children_of(v) else [cuts.parts[v]]
            else:
                found += [cuts.parts[p] for p in self._active_parents[v] if p in cuts.parts]
        return found

    def parts_of(self, fork: int) -> Mapping[int, Part]:
        """Of each node that is a part of ``fork``, which; the fork itself among them."""
        return self._cuts(fork).parts

    def _cuts(self, fork: int) -> Cuts:
        """What is cut out of a node, and computed from that. Cutting out and turning about are no computing."""
        known = self._known_cuts.get(fork)
        if known is not None:
            return known
        cuts = self._known_cuts[fork] = Cuts()
        # A split's own shape is that of its first part.
        shape = shape_of(self.nodes[self.parents[fork][0] if self.kind(fork) in SPLITS else fork])
        waiting = [] if shape is None else [(fork, whole(shape))]
        while waiting:
            at, part = waiting.pop()
            cuts.parts[at] = part
            for child in self.children[at]:
                is_view = len(self._active_parents[child]) == 1 and not self.weights[child]
                after = part_after(self.nodes[child], part) if is_view else None
                if after is None:
                    cuts.add(child, part)
                else:
                    waiting.append((child, after))
        return cuts

    def between(self, starts: list[int], end: int) -> int:
        """The set of nodes on the ways from any of ``starts`` to ``end``, these among them."""
        first, reaches = min(starts), self.ancestors.reaches
        window = self.ancestors[end] >> first
        if len(starts) == 1:
            inside = [reaches(first, first + v) for v in bits(window)]
        else:
            inside = [any(reaches(s, first + v) for s in starts) for v in bits(window)]
        return chosen(window, inside) << first

    def on_the_way(self, start: int, end: int) -> int:
        """The set of nodes on the ways from ``start``, without it, to ``end``; empty where none leads there."""
        return self.between([start], end) & ~(1 << start) if self.ancestors.reaches(start, end) else 0

    def onward(self, starts: Iterable[int], through: frozenset[str], ends: frozenset[str]) -> list[int]:
        """The nodes of kinds ``ends`` that are computed from ``starts`` by nodes of kinds ``through``."""
        waiting, seen, found = list(starts), set(), []
        while waiting:
            for child in self.children[waiting.pop()]:
                if child not in seen:
                    seen.add(child)
                    kind = self.kind(child)
                    found += [child] if kind in ends else []
                    waiting += [child] if kind in through else []
        return found

    def bit(self, node: Any) -> int:
        """The set of one activation; empty where the graph has no such node."""
        at = self.position.get(node)
        return 0 if at is None or at >= self.activations else 1 << at

    # --- what a node does ---

    def opaque(self) -> list[tuple[str, str, str]]:
        """Name, reason and source of what joins activations where no one can look: foreign autograd functions, and
        functions that are transformed.
        """
        found, declared = {}, {call.output for call in self.record.calls}
        for i, node in enumerate(self.nodes[: self.activations]):
            joins = (
                isinstance(node, torch.autograd.function.BackwardCFunction)
                and len(self.active_parents(i)) > 1
            )
            if joins and node not in declared:
                name, where = self.kind(i), self.record.producers.get(node, "")
                reason = "an autograd.Function: what it joins cannot be seen"
                found[name, where] = (name, reason, where or "forward")
        reason = "a function under torch.vmap or torch.func: what it joins cannot be tapped"
        return [
            *found.values(),
            *(("torch.func", reason, source) for source in sorted(self.record.transformed)),
        ]

    def kind(self, i: int) -> str:
        """The operation of node ``i``: autograd's name without ``Backward0``."""
        return self._kinds[i]

    def of_kinds(self, kinds: frozenset[str]) -> int:
        """The set of activations that are of certain kinds."""
        if kinds not in self._masks:
            self._masks[kinds] = as_bits([kind in kinds for kind in self._kinds[: self.activations]])
        return self._masks[kinds]


def _ordered(starts: list[Any]) -> tuple[list[Any], list[tuple[int, ...]]]:
    """Every node reachable from ``starts`` and what each was computed from, parents first."""
    nodes: list[Any] = []
    position: dict[Any, int] = {}
    parents: list[tuple[int, ...]] = []
    for start in starts:
        stack: list[tuple[Any, list[Any] | None]] = [(start, None)]
        while stack:
            node, before = stack.pop()
            if node in position:
                continue
            if before is None:
                edges = [edge for edge in node.next_functions if edge[0] is not None]
                before = [node.node] if isinstance(node, Step) else [output_of(*edge) for edge in edges]
                waiting = [n for n in before if n not in position]
                if waiting:
                    stack.append((node, before))
                    stack.extend((n, None) for n in waiting)
                    continue
            position[node] = len(nodes)
            nodes.append(node)
            parents.append(tuple(position[n] for n in before))
    return nodes, parents
