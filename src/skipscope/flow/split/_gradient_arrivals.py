"""Gradient edges that reach a fork, and the side of each.

They are read from autograd's public graph instead of the trace. Only that graph has every consumer of a fork,
including custom functions, scripted code and writes through views, which function modes do not see. Hooks on
the graph do not change the forward pass.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from skipscope.flow._autograd_graph import Edge, edge_of, leaves_above, nodes_above
from skipscope.shortcuts import OperandSide

Arrival = Literal["branch", "shortcut", "other"]
# Called with the gradient of each side, and the total gradient.
Done = Callable[[dict[Arrival, Tensor], Tensor], None]


@dataclass(eq=False)
class MergeEdges:
    """A merge in autograd's graph.

    Attributes:
        output: node of the merge's output.
        branch: edges of the branch operands that require a gradient.
        shortcut: edges of the shortcut operands that require a gradient.
    """

    output: Any
    branch: list[Edge] = field(default_factory=list)
    shortcut: list[Edge] = field(default_factory=list)

    def add(
        self, sides: Sequence[OperandSide], operands: Sequence[Tensor], only: OperandSide | None = None
    ) -> None:
        """Add operands, of both sides or only of side ``only``."""
        for side, operand in zip(sides, operands, strict=True):
            if operand.requires_grad and only in {None, side}:
                (self.branch if side == "branch" else self.shortcut).append(edge_of(operand))


class BackwardGraph:
    """Autograd's nodes upstream of a loss, with the subset that are activations.

    Args:
        loss: scalar with a graph.
        leaves: inputs of the model, and first activations computed from token ids.
        merges: merges whose shortcut operands may be learned streams: without data upstream, but activations.

    Attributes:
        position: topological position of each activation.
        starts: leaves at which activations begin: inputs, embedding tables, weights of learned streams.
        visited: number of nodes visited in all searches for forks.
    """

    def __init__(self, loss: Tensor, leaves: Sequence[Tensor], merges: Iterable[MergeEdges] = ()):
        self.position: dict[Any, int] = {}
        self.visited = 0
        begins = {edge_of(leaf)[0]: [leaf] for leaf in leaves}
        bypassing = {edge[0] for merge in merges for edge in merge.shortcut}
        starts: dict[int, Tensor] = {}
        self._nodes = nodes_above([loss.grad_fn])
        for node in self._nodes:
            parents = [parent for parent, _ in node.next_functions if parent is not None]
            first = begins.get(node, [])
            if node.name().startswith("Embedding"):
                first = leaves_above(parents[:1])
            elif not first and node in bypassing and not any(p in self.position for p in parents):
                first = leaves_above([node])
            starts |= {id(leaf): leaf for leaf in first}
            if first or any(p in self.position for p in parents):
                self.position[node] = len(self.position)
        self.starts = list(starts.values())

    def arrivals(self, merges: Sequence[MergeEdges]) -> list[GradientArrivals | None]:
        """Arrivals at the fork of each merge, or None if its sides have no activation in common."""
        regions = [_Region(self.position, merge) for merge in merges]
        self.visited = sum(len(region.marks) for region in regions)
        consumers = {region.fork: list[tuple[Any, int]]() for region in regions if region.fork is not None}
        for node in self._nodes if consumers else ():
            for i, edge in enumerate(node.next_functions):
                if edge in consumers:
                    consumers[edge].append((node, i))
        return [None if r.fork is None else r.arrivals(consumers[r.fork]) for r in regions]

    def release(self) -> None:
        """Free autograd nodes from the loss to the inputs.

        The other order recurses once per node and overflows the stack. No other reference to the loss may
        exist.
        """
        self.position.clear()
        while self._nodes:
            self._nodes.pop()


_BRANCH, _MERGE, _FIRST_SHORTCUT = 1, 2, 4


@dataclass(eq=False)
class _Entry:
    """Edge on the path of a shortcut operand, up to the point where it meets the branch's path.

    Attributes:
        edge: the edge.
        marks: bits of the shortcut operands whose fork this edge may be.
        node: consumer of the edge on which the branch does not depend, or None if the edge is the operand.
        index: index of the edge among the inputs of that node.
    """

    edge: Edge
    marks: int
    node: Any = None
    index: int = 0


class _Region:
    """Activations between a merge and its fork, each marked with the operands downstream of it.

    The fork is the last activation at which a shortcut operand's path meets the branch's path. If several
    meeting points depend on each other, the fork is the first of them: x, not a gate computed from x. Nodes
    are visited from the last to the first, so the marks of a node are complete when it is visited, and the
    search ends at the fork.

    Args:
        position: topological position of each activation.
        merge: merge whose sides part at the fork.

    Attributes:
        fork: edge of the fork, or None.
        marks: bits of operands downstream of each visited activation.
    """

    def __init__(self, position: dict[Any, int], merge: MergeEdges):
        self.position, self.merge, self.marks = position, merge, dict[Any, int]()
        self._lowest, self._waiting = len(position), list[tuple[int, Any]]()
        self._entries: dict[Any, list[_Entry]] = {}
        # Nodes at which paths meet, each with a mark for the activations upstream of it.
        self._meetings: dict[Any, int] = {}
        self._free = _FIRST_SHORTCUT << len(merge.shortcut)
        self._shortcuts = self._free - _FIRST_SHORTCUT
        self._mark(merge.output, _MERGE)
        for node, _ in merge.branch:
            self._mark(node, _BRANCH)
        for i, edge in enumerate(merge.shortcut):
            self._mark(edge[0], _FIRST_SHORTCUT << i)
            self._enter(_Entry(edge, _FIRST_SHORTCUT << i))
        while self._waiting and -self._waiting[0][0] >= self._lowest:
            self._visit(heapq.heappop(self._waiting)[1])
        forks = [entry.edge for node in self._meetings for entry in self._entries[node] if entry.marks]
        self.fork = max(forks, key=lambda edge: position[edge[0]], default=None)

    def _mark(self, node: Any, marks: int) -> None:
        if node in self.position:
            if node not in self.marks:
                heapq.heappush(self._waiting, (-self.position[node], node))
            self.marks[node] = self.marks.get(node, 0) | marks

    def _enter(self, entry: _Entry) -> None:
        node = entry.edge[0]
        if node in self.position:
            self._entries.setdefault(node, []).append(entry)
            self._lowest = min(self._lowest, self.position[node])

    def _visit(self, node: Any) -> None:
        if self.marks[node] & _BRANCH and node in self._entries:
            self._meet(node)
        marks = self.marks[node]
        shortcuts = 0 if marks & _BRANCH else marks & self._shortcuts
        for i, edge in enumerate(node.next_functions):
            self._mark(edge[0], marks)
            if shortcuts:
                self._enter(_Entry(edge, shortcuts, node, i))

    def _meet(self, node: Any) -> None:
        """Record a meeting of paths; candidates downstream of it are no longer forks of its operands."""
        for later, mark in self._meetings.items():
            for entry in self._entries[later] if self.marks[node] & mark else ():
                for here in self._entries[node]:
                    entry.marks &= ~here.marks
        self._meetings[node] = self._free
        self.marks[node] |= self._free
        self._free <<= 1

    def arrivals(self, consumers: Iterable[tuple[Any, int]]) -> GradientArrivals:
        """Assign the edges into the fork to sides; ``consumers`` are all nodes that take it."""
        fork, entries = self.fork, [e for node in self._meetings for e in self._entries[node]]
        assert fork is not None
        gates = [
            (entry.node, entry.index, entry.edge)
            for entry in entries
            if entry.node is not None
            and entry.edge != fork
            and self.marks[fork[0]] & self._meetings[entry.edge[0]]
        ]
        return GradientArrivals(fork, [(node, i, self._side(node)) for node, i in consumers], gates)

    def _side(self, node: Any) -> Arrival:
        """Side of a node that takes the fork."""
        marks = self.marks.get(node, 0)
        if marks & _BRANCH:
            return "branch"
        # If an operand is the fork itself, its consumers are nodes inside the merge's own call.
        is_operand = self.fork in self.merge.branch or self.fork in self.merge.shortcut
        return "shortcut" if marks & self._shortcuts or (is_operand and marks & _MERGE) else "other"


@dataclass
class GradientArrivals:
    """Edges into a fork, and the gradients that arrive through them.

    A gate t is on both sides, in t H and in (1 - t) x. The gradient that reaches t through the shortcut is
    kept, and propagated to the fork separately, by a backward pass through the layer of the gate.

    Attributes:
        fork: edge of the fork.
        edges: (node that takes the fork, index of that input, side of the node).
        gates: (node on the shortcut side only, index of an input that is on both sides, edge of that input).
    """

    fork: Edge
    edges: list[tuple[Any, int, Arrival]]
    gates: list[tuple[Any, int, Edge]]
    _parts: dict[Arrival, Tensor] = field(default_factory=dict)
    _by_gate: dict[Edge, Tensor] = field(default_factory=dict)
    _total: Tensor | None = None

    def watch(self, done: Done) -> list[Any]:
        """Hook the edges; ``done`` is called when all gradients have arrived, or by :meth:`part_gates`."""

        def complete(grad_outputs: tuple[Tensor | None, ...]) -> None:
            self._total = grad_outputs[self.fork[1]]
            if not self.gates:
                if self._total is not None:
                    done(self._parts, self._total)
                self._parts.clear()

        handles = [node.register_hook(_adder(self._parts, side, i)) for node, i, side in self.edges]
        handles += [node.register_hook(_adder(self._by_gate, edge, i)) for node, i, edge in self.gates]
        return [self.fork[0].register_prehook(complete), *handles]

    def part_gates(self, done: Done) -> None:
        """Move the gradient through the gate's shortcut side from the branch to the shortcut."""
        if self._total is None or not self.gates:
            return
        if self._by_gate:
            edges, given = [GradientEdge(*edge) for edge in self._by_gate], list(self._by_gate.values())
            fork = GradientEdge(*self.fork)
            (more,) = torch.autograd.grad(edges, [fork], given, retain_graph=True, allow_unused=True)
            if more is not None:
                _add(self._parts, "shortcut", more)
                _add(self._parts, "branch", -more)
        done(self._parts, self._total)


def _add(into: dict[Any, Tensor], key: Any, part: Tensor) -> None:
    into[key] = into[key] + part if key in into else part


def _adder(into: dict[Any, Tensor], key: Any, i: int) -> Callable[..., None]:
    """Make a hook that adds up the gradient of a node's input."""

    def hook(grad_inputs: tuple[Tensor | None, ...], grad_outputs: Any) -> None:
        part = grad_inputs[i]
        if part is not None:
            _add(into, key, part)

    return hook
