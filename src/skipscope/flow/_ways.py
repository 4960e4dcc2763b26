"""The ways by which gradient arrives at a fork, in autograd's graph under a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from skipscope.shortcuts._bits import Ancestors

Edge = tuple[Any, int]  # a node, and which of its outputs


def edge_of(value: Tensor) -> Edge:
    """The node and output that a tensor is."""
    edge = torch.autograd.graph.get_gradient_edge(value)
    return edge.node, edge.output_nr


class Ways:
    """Autograd's graph under a loss: what was computed from the data, and who depends on whom.

    Attributes:
        starts: the tensors that activations begin with: inputs, the tables of embeddings, and learned streams' weights.
        position: each activation's place; what it was computed from comes before it.
    """

    def __init__(self, loss: Tensor, leaves: list[Tensor], bypassing: Iterable[Any] = ()):
        self.position: dict[Any, int] = {}
        self.consumers: dict[Edge, list[tuple[Any, int]]] = {}
        parents: list[tuple[int, ...]] = []  # of each activation, the activations it was computed from
        begins = {edge_of(leaf)[0]: leaf for leaf in leaves}
        self.starts: list[Tensor] = []
        bypassing = set(
            bypassing
        )  # the nodes of shortcut operands: one that no data reaches is a stream of weights
        self._nodes = _ordered(loss.grad_fn)
        for node in self._nodes:
            above = []
            for e, (parent, nr) in enumerate(node.next_functions):
                if parent is not None:
                    self.consumers.setdefault((parent, nr), []).append((node, e))
                    above += [self.position[parent]] if parent in self.position else []
            embeds = node.name().startswith("Embedding")
            learned = _weights_above(node) if node in bypassing and not above else []
            starts = _weights_above(node.next_functions[0][0]) if embeds else learned
            starts += [begins[node]] if node in begins else []
            self.starts += [s for s in starts if all(s is not other for other in self.starts)]
            if above or embeds or learned or node in begins:
                self.position[node] = len(parents)
                parents.append(tuple(above))
        self.ancestors = Ancestors(parents)

    def release(self) -> None:
        """Let go of the nodes, the loss's first: in any other order one may take all that it was computed from along,
        one inside the other, and a long graph overflows the stack. Nobody else may hold the loss any more.
        """
        self.position.clear()
        self.consumers.clear()
        while self._nodes:
            self._nodes.pop()

    def reach(self, edge: Edge, ends: list[Edge]) -> bool:
        """Whether any of ``ends`` is an activation, or was computed from it."""
        at = self.position.get(edge[0])
        return at is not None and any(
            self.ancestors.reaches(at, self.position[end]) for end, _ in ends if end in self.position
        )

    def past(self, shortcuts: list[Edge], branch: list[Edge]) -> tuple[list[Any], list[Edge]]:
        """The nodes above ``shortcuts`` on which no ``branch`` operand depends, and the edges by which one goes on from
        them to where one does.
        """
        own: dict[Any, None] = {}
        entered: dict[Edge, None] = {}
        stack, seen = list(shortcuts), set[Edge]()
        while stack:
            edge = stack.pop()
            if edge in seen or edge[0] not in self.position:
                continue
            seen.add(edge)
            if self.reach(edge, branch):
                entered[edge] = None
            else:
                own[edge[0]] = None
                stack += [parent for parent in edge[0].next_functions if parent[0] is not None]
        return list(own), list(entered)

    def fork(self, shortcuts: list[Edge], branch: list[Edge]) -> Edge | None:
        """Where the last of the shortcut operands parts from the branch: of x and its gate, x."""
        forks = []
        for shortcut in shortcuts:
            _, entered = self.past([shortcut], branch)
            first = [e for e in entered if not any(f[0] is not e[0] and self.reach(f, [e]) for f in entered)]
            forks += first and [max(first, key=lambda edge: self.position[edge[0]])]
        return max(forks, key=lambda edge: self.position[edge[0]], default=None)

    def arrivals(self, ends: list[tuple[str, Edge]], joined: Any) -> Arrivals:
        """The ways into the fork of the merge of ``ends``."""
        branch = [edge for side, edge in ends if side == "branch"]
        shortcuts = [edge for side, edge in ends if side == "shortcut"]
        fork = self.fork(shortcuts, branch)
        if fork is None:
            return Arrivals(None)
        merged = {edge for _, edge in ends}
        found = Arrivals(fork)
        for node, e in self.consumers.get(fork, []):
            way = (node, 0)
            side = (
                "branch" if self.reach(way, branch) else "shortcut" if self.reach(way, shortcuts) else "other"
            )
            if side == "other" and fork in merged and self.reach(way, [(joined, 0)]):
                # The shortcut operand is the fork itself: its way is the merge's call, and what that does first.
                side = "shortcut"
            found.ways.append((node, e, side))
        for node in self.past(shortcuts, branch)[0]:
            for e, edge in enumerate(node.next_functions):
                on_both = edge[0] is not None and edge != fork and self.reach(edge, branch)
                if on_both and self.reach(fork, [edge]):
                    found.gates.append((node, e, edge))
        return found


def _weights_above(node: Any) -> list[Tensor]:
    """The leaves that a node depends on."""
    if node is None:
        return []
    return [leaf for above in _ordered(node) if (leaf := getattr(above, "variable", None)) is not None]


@dataclass
class Arrivals:
    """The ways into one fork, and what arrives by them.

    Attributes:
        fork: its edge, or None where there is none.
        ways: a node that takes the fork, as which of its inputs, and the side that it is on.
        gates: a node on the shortcut's side alone, which of its inputs is on both sides, and that input's edge.
    """

    fork: Edge | None
    ways: list[tuple[Any, int, str]] = field(default_factory=list)
    gates: list[tuple[Any, int, Edge]] = field(default_factory=list)
    parts: dict[str, Tensor] = field(default_factory=dict)
    by_gate: dict[Edge, Tensor] = field(default_factory=dict)
    total: Tensor | None = None
    done: Callable[[dict[str, Tensor], Tensor], None] = lambda parts, total: None

    def watch(self, done: Callable[[dict[str, Tensor], Tensor], None]) -> list[Any]:
        """Hook the ways; ``done`` gets the parts and the whole when all have arrived, or from :meth:`part_gates`."""
        if self.fork is None:
            return []
        self.done, nr = done, self.fork[1]

        def on_way(into: dict[Any, Tensor], key: Any, e: int) -> Callable[..., None]:
            def hook(grad_inputs: tuple[Tensor | None, ...], grad_outputs: Any) -> None:
                part = grad_inputs[e]
                if part is not None:
                    into[key] = into[key] + part if key in into else part

            return hook

        def on_fork(grad_outputs: tuple[Tensor | None, ...]) -> None:
            self.total = grad_outputs[nr]
            if self.total is not None and not self.gates:
                done(self.parts, self.total)
            if not self.gates:
                self.parts.clear()

        handles = [self.fork[0].register_prehook(on_fork)]
        handles += [node.register_hook(on_way(self.parts, side, e)) for node, e, side in self.ways]
        return handles + [node.register_hook(on_way(self.by_gate, edge, e)) for node, e, edge in self.gates]

    def part_gates(self) -> None:
        """Give the shortcut what came by it and through the gate: it was counted with the branch."""
        if self.fork is None or self.total is None or not self.gates:
            return
        if self.by_gate:
            edges = [GradientEdge(node, nr) for node, nr in self.by_gate]
            (more,) = torch.autograd.grad(
                edges,
                [GradientEdge(*self.fork)],
                list(self.by_gate.values()),
                retain_graph=True,
                allow_unused=True,
            )
            if more is not None:
                for side, part in (("shortcut", more), ("branch", -more)):
                    self.parts[side] = self.parts[side] + part if side in self.parts else part
        self.done(self.parts, self.total)


def _ordered(root: Any) -> list[Any]:
    """Every node above ``root``, what a node was computed from before the node."""
    done: dict[Any, None] = {}
    stack: list[tuple[Any, bool]] = [(root, False)]
    while stack:
        node, ready = stack.pop()
        if node in done:
            continue
        if ready:
            done[node] = None
            continue
        stack.append((node, True))
        stack += [
            (parent, False) for parent, _ in node.next_functions if parent is not None and parent not in done
        ]
    return list(done)
