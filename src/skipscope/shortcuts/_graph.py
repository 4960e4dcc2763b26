"""The dataflow of a trace: autograd's graph, seen as sets of ancestors and descendants.

The graph has a node for every ``grad_fn``. An *activation* is what is reachable from a float input or from an
embedding of the data's integers; what is not is computed from weights alone. Sets of nodes are Python integers used
as bit sets, so that ancestors and descendants of every node cost one pass each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from skipscope import _data
from skipscope.shortcuts._trace import Step, Trace, node_of, output_of


class Graph:
    """Autograd's graph of a trace, with bit sets of ancestors and descendants.

    Attributes:
        nodes: autograd nodes in an order where parents (what a node was computed from) come first.
        position: node -> its index in ``nodes``, the bit that stands for it.
        parents: for each node the indices of the nodes it was computed from.
        active: bit set of activations.
        modules: module paths that own weights; bit i of a weight set stands for ``modules[i]``.
        weights: for each activation the set of modules whose weights enter there.
        matrices: the same, only where a weight of two or more dimensions enters.
    """

    def __init__(self, record: Trace):
        self.record = record
        starts = [node_of(t) for t in _data.tensors_in(record.output)]
        for call in record.calls:
            starts += [*call.operands, call.output]
        self.nodes, self.position, self.parents = _ordered([s for s in starts if s is not None])
        self._mark_weights()
        self.ancestors = self._closure()
        self.descendants = self._closure_back()
        self.weighted = sum(1 << i for i, w in enumerate(self.weights) if w)

    def _mark_weights(self) -> None:
        self.modules = [path for path, _ in self.record.model.named_modules()]
        owners = {}
        self.weighted_modules: list[str] = []
        self._shapes: dict[int, list[tuple[int, ...]]] = {}
        for i, module in enumerate(self.record.model.modules()):
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners.setdefault(id(parameter), (1 << i, parameter.ndim >= 2))
                    if parameter.ndim >= 2:
                        self._shapes.setdefault(i, []).append(tuple(parameter.shape))
            if any(p is not None for p in module._parameters.values()):
                self.weighted_modules.append(self.modules[i])
        self.active, self.weights, self.matrices = 0, [], []
        embedded = {id(node) for node, _, _ in self.record.embeddings}
        dead = {call.output for call in self.record.calls if call.dead}
        pure: list[
            tuple[int, int]
        ] = []  # for nodes computed from weights alone: the modules, and those with matrices
        for i, node in enumerate(self.nodes):
            parents = self.parents[i]
            starts = node in self.record.sources or id(node) in embedded
            all_weights = matrices = 0
            for parent in parents:
                if not self.active >> parent & 1:
                    all_weights |= pure[parent][0]
                    matrices |= pure[parent][1]
            if (variable := getattr(node, "variable", None)) is not None:
                owner, is_matrix = owners.get(id(variable), (0, False))
                all_weights, matrices = owner, owner if is_matrix else 0
            if starts or (any(self.active >> parent & 1 for parent in parents) and node not in dead):
                self.active |= 1 << i
                pure.append((0, 0))
                self.weights.append(0 if starts else all_weights)
                self.matrices.append(0 if starts else matrices)
            else:
                pure.append((all_weights, matrices))
                self.weights.append(0)
                self.matrices.append(0)

    def _closure(self) -> list[int]:
        ancestors: list[int] = []
        for i, parents in enumerate(self.parents):
            mask = 1 << i if self.active >> i & 1 else 0
            if mask:
                for parent in parents:
                    mask |= ancestors[parent]
            ancestors.append(mask)
        return ancestors

    def _closure_back(self) -> list[int]:
        descendants = [1 << i for i in range(len(self.nodes))]
        for i in range(len(self.nodes) - 1, -1, -1):
            if self.active >> i & 1:
                for parent in self.parents[i]:
                    descendants[parent] |= descendants[i]
        return descendants

    def modules_in(self, region: int) -> list[str]:
        """Paths of the modules whose weights enter in a set of nodes, in order of execution."""
        found: dict[str, None] = {}
        for i in bits(region & self.weighted):
            for m in bits(self.weights[i]):
                found[self.modules[m]] = None
        return list(found)

    def has_weights(self, region: int) -> bool:
        """Whether a weight enters anywhere in a set of nodes."""
        return bool(region & self.weighted)

    def matrices_in(self, region: int) -> int:
        """The set of modules whose matrices enter in a set of nodes."""
        mask = 0
        for i in bits(region & self.weighted):
            mask |= self.matrices[i]
        return mask

    def has_matrix(self, path: str) -> bool:
        """Whether a module owns a weight of two or more dimensions."""
        return self.modules.index(path) in self._shapes

    def matrix_shapes(self, region: int) -> list[tuple[int, ...]]:
        """Shapes of the matrices that enter in a set of nodes."""
        return [shape for m in bits(self.matrices_in(region)) for shape in self._shapes.get(m, [])]

    def bit(self, node: Any) -> int:
        """The set of one node; empty where the graph has no such node."""
        at = self.position.get(node)
        return 0 if at is None else 1 << at

    def step(self, i: int) -> tuple[int, int] | None:
        """Dimension and index where node ``i`` takes one step out of a sequence, else None."""
        node = self.nodes[i]
        if isinstance(node, Step):
            return (-1, node.index)
        if self.kind(i) != "Select":
            return None
        dim, index = node._saved_dim, node._saved_index
        size = node._saved_self_sym_sizes[dim if dim < 2**63 else dim - 2**64]
        return (dim, index - 2**64 + size if index >= 2**63 else index + size if index < 0 else index)

    def opaque(self) -> list[tuple[str, str, str]]:
        """Name, reason and source of what joins activations where no one can look: foreign autograd functions."""
        found, declared = {}, {call.output for call in self.record.calls}
        for i, node in enumerate(self.nodes):
            if node in declared:
                continue
            inputs = sum(self.active >> p & 1 for p in self.parents[i])
            if inputs > 1 and isinstance(node, torch.autograd.function.BackwardCFunction):
                name = str(node.name()).removesuffix("Backward")  # pyright: ignore[reportAttributeAccessIssue]
                where = self.record.producers.get(node, "")
                found[name, where] = (
                    name,
                    "an autograd.Function: what it joins cannot be seen",
                    where or "forward",
                )
        return list(found.values())

    def kind(self, i: int) -> str:
        """The operation of node ``i``: autograd's name without ``Backward0``."""
        return self.nodes[i].name().partition("Backward")[0]


def bits(mask: int) -> Iterator[int]:
    """The positions of the ones, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _ordered(starts: list[Any]) -> tuple[list[Any], dict[Any, int], list[tuple[int, ...]]]:
    """Every node reachable from ``starts``, parents first."""
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
    return nodes, position, parents
