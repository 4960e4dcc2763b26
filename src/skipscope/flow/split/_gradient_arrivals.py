"""Which gradient edges reach a fork, and from which side.

This reads autograd's public graph and not the trace. Only that graph knows every consumer of a fork: custom functions,
scripted code, and writes through views, which no function mode sees. A hook on it leaves the forward pass as it is.
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
        leaves: the model's inputs.
        merges: shortcut operands that no data reaches are learned streams, and activations too.

    Attributes:
        position: each activation's place; what it was computed from comes before it.
        starts: the leaves that activations begin with: inputs, tables of embeddings, weights of learned streams.
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
        found = [_Region(self.position, merge) for merge in merges]
        self.visited = sum(region.visited for region in found)
        consumers = {region.fork: list[tuple[Any, int]]() for region in found if region.fork is not None}
        for node in self._nodes if consumers else ():
            for i, edge in enumerate(node.next_functions):
                if edge in consumers:
                    consumers[edge].append((node, i))
        return [None if r.fork is None else r.arrivals(consumers[r.fork]) for r in found]

    def release(self) -> None:
        """Free autograd nodes from the loss to the inputs; the other order recurses once per node and overflows the
        stack. Nobody else may hold the loss any more.
        """
        self.position.clear()
        while self._nodes:
            self._nodes.pop()


_BRANCH, _MERGE, _FIRST_SHORTCUT = 1, 2, 4


class _Region:
    """The activations between a merge and its fork, each marked with the operands that it leads to.

    The fork is the last activation at which a shortcut operand's path meets the branch's. Of several on one path it is
    the first: of x and a gate computed from x, x. Nodes are visited from the last to the first, so a node's marks are
    complete when it is visited, and the search ends at the fork.

    Args:
        position: of each activation.
        merge: whose sides part at the fork.

    Attributes:
        fork: its edge, or None where there is none.
        sides: by node and number of its input, the side of each edge into the fork that leads to the merge.
        gates: edges by which a node on the shortcut side alone takes what leads to both sides.
        visited: how many nodes were looked at.
    """

    def __init__(self, position: dict[Any, int], merge: MergeEdges):
        self._position, self._lowest = position, len(position)
        self._marks: dict[Any, int] = {}
        self._waiting: list[tuple[int, Any]] = []
        # By node: its edges that a shortcut operand's path leads to, each with the marks of these operands.
        self._candidates: dict[Any, dict[Edge, int]] = {}
        self._on_shortcut: list[tuple[Any, int, Edge]] = []
        # By node: where a path meets the branch's, with the mark that what it was computed from gets.
        self._meetings: dict[Any, int] = {}
        self._free = _FIRST_SHORTCUT << len(merge.shortcut)
        self._shortcuts = self._free - _FIRST_SHORTCUT
        self._mark(merge.output, _MERGE)
        for node, _ in merge.branch:
            self._mark(node, _BRANCH)
        for i, edge in enumerate(merge.shortcut):
            self._mark(edge[0], _FIRST_SHORTCUT << i)
            self._consider(edge, _FIRST_SHORTCUT << i)
        while self._waiting and -self._waiting[0][0] >= self._lowest:
            self._visit(heapq.heappop(self._waiting)[1])
        self.visited = len(self._marks)
        forks = [e for node in self._meetings for e, marks in self._candidates[node].items() if marks]
        self.fork = max(forks, key=lambda edge: position[edge[0]], default=None)
        self.gates = [one for one in self._on_shortcut if self._is_gate(one[2])]
        is_operand = self.fork in {*merge.branch, *merge.shortcut}
        self.sides = dict(self._sided(is_operand))
        del self._marks, self._candidates, self._meetings, self._on_shortcut, self._waiting

    def arrivals(self, consumers: Iterable[tuple[Any, int]]) -> GradientArrivals:
        """The edges into the fork, of which ``consumers`` are all."""
        assert self.fork is not None
        edges: list[tuple[Any, int, Arrival]] = [
            (node, i, self.sides.get((node, i), "other")) for node, i in consumers
        ]
        return GradientArrivals(self.fork, edges, self.gates)

    def _mark(self, node: Any, marks: int) -> None:
        if node in self._position:
            if node not in self._marks:
                heapq.heappush(self._waiting, (-self._position[node], node))
            self._marks[node] = self._marks.get(node, 0) | marks

    def _consider(self, edge: Edge, shortcuts: int) -> None:
        if edge[0] in self._position:
            at = self._candidates.setdefault(edge[0], {})
            at[edge] = at.get(edge, 0) | shortcuts
            self._lowest = min(self._lowest, self._position[edge[0]])

    def _visit(self, node: Any) -> None:
        marks = self._marks[node]
        shortcuts = 0 if marks & _BRANCH else marks & self._shortcuts
        if marks & _BRANCH and node in self._candidates:
            self._meet(node, marks)
        for i, edge in enumerate(node.next_functions):
            self._mark(edge[0], self._marks[node])
            if shortcuts:
                self._consider(edge, shortcuts)
                self._on_shortcut.append((node, i, edge))

    def _meet(self, node: Any, marks: int) -> None:
        """Note that paths of shortcut operands meet the branch's; what was computed from here is no fork of theirs."""
        shortcuts = 0
        for of in self._candidates[node].values():
            shortcuts |= of
        for later, mark in self._meetings.items():
            if marks & mark:
                at = self._candidates[later]
                at |= {edge: of & ~shortcuts for edge, of in at.items()}
        self._meetings[node] = self._free
        self._marks[node] |= self._free
        self._free <<= 1

    def _is_gate(self, edge: Edge) -> bool:
        mark = self._meetings.get(edge[0], 0)
        return self.fork is not None and edge != self.fork and bool(self._marks[self.fork[0]] & mark)

    def _sided(self, is_operand: bool) -> Iterable[tuple[tuple[Any, int], Arrival]]:
        for node, marks in self._marks.items() if self.fork is not None else ():
            # Where an operand is the fork itself, the merge's own call takes it, and what that does first.
            bypasses = marks & self._shortcuts or (is_operand and marks & _MERGE)
            side: Arrival = "branch" if marks & _BRANCH else "shortcut" if bypasses else "other"
            for i, edge in enumerate(node.next_functions):
                if edge == self.fork:
                    yield (node, i), side


@dataclass
class GradientArrivals:
    """The edges into one fork, and the gradients that arrive by them.

    A gate t is on both sides, in t H and in (1 - t) x. What reaches t by the shortcut is kept, and sent on from there
    to the fork once more by itself: a backward pass through the gate's own layer.

    Attributes:
        fork: its edge.
        edges: a node that takes the fork, as which of its inputs, and the side that it is on.
        gates: a node on the shortcut's side alone, which of its inputs is on both sides, and that input's edge.
    """

    fork: Edge
    edges: list[tuple[Any, int, Arrival]]
    gates: list[tuple[Any, int, Edge]]
    parts: dict[Arrival, Tensor] = field(default_factory=dict)
    by_gate: dict[Edge, Tensor] = field(default_factory=dict)
    total: Tensor | None = None
    done: Callable[[dict[Arrival, Tensor], Tensor], None] = lambda parts, total: None

    def watch(self, done: Callable[[dict[Arrival, Tensor], Tensor], None]) -> list[Any]:
        """Hook the edges; ``done`` gets the parts and the whole when all have arrived, or from :meth:`part_gates`."""
        self.done = done
        handles = [self.fork[0].register_prehook(self._complete)]
        handles += [node.register_hook(_adder(self.parts, side, i)) for node, i, side in self.edges]
        return handles + [node.register_hook(_adder(self.by_gate, edge, i)) for node, i, edge in self.gates]

    def _complete(self, grad_outputs: tuple[Tensor | None, ...]) -> None:
        self.total = grad_outputs[self.fork[1]]
        if not self.gates:
            if self.total is not None:
                self.done(self.parts, self.total)
            self.parts.clear()

    def part_gates(self) -> None:
        """Give the shortcut what came by it and through the gate: it was counted with the branch."""
        if self.total is None or not self.gates:
            return
        if self.by_gate:
            edges = [GradientEdge(node, nr) for node, nr in self.by_gate]
            fork, given = GradientEdge(*self.fork), list(self.by_gate.values())
            (more,) = torch.autograd.grad(edges, [fork], given, retain_graph=True, allow_unused=True)
            if more is not None:
                _add(self.parts, "shortcut", more)
                _add(self.parts, "branch", -more)
        self.done(self.parts, self.total)


def _add(into: dict[Any, Tensor], key: Any, part: Tensor) -> None:
    into[key] = into[key] + part if key in into else part


def _adder(into: dict[Any, Tensor], key: Any, i: int) -> Callable[..., None]:
    """A hook that adds the gradient of a node's input."""

    def hook(grad_inputs: tuple[Tensor | None, ...], grad_outputs: Any) -> None:
        part = grad_inputs[i]
        if part is not None:
            _add(into, key, part)

    return hook
