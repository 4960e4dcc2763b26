"""Which gradient edges reach a fork, and from which side.

This reads autograd's public graph and not the trace. Only that graph knows every consumer of a fork: custom
functions, scripted code, and writes through views, which no function mode sees. A hook on it leaves the
forward pass as it is.
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
# Called with the gradient of each side, and the whole.
Done = Callable[[dict[Arrival, Tensor], Tensor], None]


@dataclass(eq=False)
class MergeEdges:
    """One merge in autograd's graph.

    Attributes:
        output: the node of what comes out.
        branch: edges of the branch operands that require a gradient.
        shortcut: the same of the shortcut operands.
    """

    output: Any
    branch: list[Edge] = field(default_factory=list)
    shortcut: list[Edge] = field(default_factory=list)

    def add(
        self, sides: Sequence[OperandSide], operands: Sequence[Tensor], only: OperandSide | None = None
    ) -> None:
        """Add operands, or those on one side."""
        for side, operand in zip(sides, operands, strict=True):
            if operand.requires_grad and only in {None, side}:
                (self.branch if side == "branch" else self.shortcut).append(edge_of(operand))


class BackwardGraph:
    """Autograd's nodes under a loss, and which of them are activations.

    Args:
        loss: a scalar with a graph.
        leaves: the model's inputs, and what it makes first of token ids.
        merges: shortcut operands that no data reaches are learned streams, and activations too.

    Attributes:
        position: each activation's place; what it was computed from comes before it.
        starts: the leaves that activations begin with: inputs, tables of embeddings, weights of learned
            streams.
        visited: how many nodes all searches for forks have looked at.
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
        """What reaches the fork of each merge; None where its sides have no activation in common."""
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
    """An edge that the path of a shortcut operand takes, up to where it meets the branch's.

    Attributes:
        edge: what is taken.
        marks: of the shortcut operands for which the fork may be here.
        node: a node that the branch does not depend on, and takes it; None where it is the operand itself.
        index: as which of its inputs.
    """

    edge: Edge
    marks: int
    node: Any = None
    index: int = 0


class _Region:
    """The activations between a merge and its fork, each marked with the operands that it leads to.

    The fork is the last activation at which a shortcut operand's path meets the branch's. Of several on one
    path it is the first: of x and a gate computed from x, x. Nodes are visited from the last to the first, so
    a node's marks are complete when it is visited, and the search ends at the fork.

    Args:
        position: of each activation.
        merge: whose sides part at the fork.

    Attributes:
        fork: its edge, or None where there is none.
        marks: of each activation that was looked at.
    """

    def __init__(self, position: dict[Any, int], merge: MergeEdges):
        self.position, self.merge, self.marks = position, merge, dict[Any, int]()
        self._lowest, self._waiting = len(position), list[tuple[int, Any]]()
        self._entries: dict[Any, list[_Entry]] = {}
        # Nodes where paths meet, each with a mark for what it was computed from.
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
        """Paths of shortcut operands meet the branch's; what was computed from here is no fork of theirs."""
        for later, mark in self._meetings.items():
            for entry in self._entries[later] if self.marks[node] & mark else ():
                for here in self._entries[node]:
                    entry.marks &= ~here.marks
        self._meetings[node] = self._free
        self.marks[node] |= self._free
        self._free <<= 1

    def arrivals(self, consumers: Iterable[tuple[Any, int]]) -> GradientArrivals:
        """The edges into the fork, of which ``consumers`` are all."""
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
        """The side of a node that takes the fork."""
        marks = self.marks.get(node, 0)
        if marks & _BRANCH:
            return "branch"
        # Where an operand is the fork itself, the merge's own call takes it, and what that does first.
        is_operand = self.fork in self.merge.branch or self.fork in self.merge.shortcut
        return "shortcut" if marks & self._shortcuts or (is_operand and marks & _MERGE) else "other"


@dataclass
class GradientArrivals:
    """The edges into one fork, and the gradients that arrive by them.

    A gate t is on both sides, in t H and in (1 - t) x. What reaches t by the shortcut is kept, and sent on
    from there to the fork once more by itself: a backward pass through the gate's own layer.

    Attributes:
        fork: its edge.
        edges: a node that takes the fork, as which of its inputs, and the side that it is on.
        gates: a node on the shortcut's side alone, which of its inputs is on both sides, and that input's
            edge.
    """

    fork: Edge
    edges: list[tuple[Any, int, Arrival]]
    gates: list[tuple[Any, int, Edge]]
    _parts: dict[Arrival, Tensor] = field(default_factory=dict)
    _by_gate: dict[Edge, Tensor] = field(default_factory=dict)
    _total: Tensor | None = None

    def watch(self, done: Done) -> list[Any]:
        """Hook the edges; ``done`` is called when all have arrived, or by :meth:`part_gates`."""

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
        """Give the shortcut what came by it and through the gate: it was counted with the branch."""
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
    """A hook that adds the gradient of a node's input."""

    def hook(grad_inputs: tuple[Tensor | None, ...], grad_outputs: Any) -> None:
        part = grad_inputs[i]
        if part is not None:
            _add(into, key, part)

    return hook
