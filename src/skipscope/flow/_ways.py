"""The ways by which gradient arrives at a fork, in autograd's graph under a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from skipscope.shortcuts import bits

Edge = tuple[Any, int]  # a node, and which of its outputs


def edge_of(value: Tensor) -> Edge:
    """The node and output that a tensor is."""
    edge = torch.autograd.graph.get_gradient_edge(value)
    return edge.node, edge.output_nr


class Ways:
    """Autograd's graph under a loss: what was computed from the data, and who depends on whom.

    Attributes:
        starts: the tensors that activations begin with: inputs, and the tables of embeddings.
    """

    def __init__(self, loss: Tensor, leaves: list[Tensor]):
        self.nodes = _ordered(loss.grad_fn)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.consumers: dict[Edge, list[tuple[Any, int]]] = {}
        self.ancestors: list[
            int
        ] = []  # of each node, as a set of bits: only activations, the node itself included
        begins = {edge_of(leaf)[0] for leaf in leaves}
        self.starts = [leaf for leaf in leaves if edge_of(leaf)[0] in self.position]
        for i, node in enumerate(self.nodes):
            mask = 0
            for e, (parent, nr) in enumerate(node.next_functions):
                if parent is not None:
                    mask |= self.ancestors[self.position[parent]]
                    self.consumers.setdefault((parent, nr), []).append((node, e))
            embeds = node.name().startswith("Embedding")
            if embeds:
                table = getattr(node.next_functions[0][0], "variable", None)
                self.starts += (
                    [table] if table is not None and all(table is not s for s in self.starts) else []
                )
            self.ancestors.append(mask | 1 << i if mask or embeds or node in begins else 0)

    def above(self, edges: list[Edge]) -> int:
        """The activations that any of ``edges`` depends on."""
        mask = 0
        for node, _ in edges:
            mask |= self.ancestors[self.position[node]] if node in self.position else 0
        return mask

    def fork(self, shortcuts: list[Edge], branch: int) -> Edge | None:
        """Where the last of the shortcut operands parts from the branch."""
        forks = [fork for edge in shortcuts if (fork := self._fork_of(edge, branch)) is not None]
        return max(forks, key=lambda edge: self.position[edge[0]], default=None)

    def _fork_of(self, shortcut: Edge, branch: int) -> Edge | None:
        """The nearest activation above an operand on which the branch depends; of x and its gate, x."""
        entered: list[Edge] = []
        stack, seen = [shortcut], set[Edge]()
        while stack:
            edge = stack.pop()
            at = self.position.get(edge[0])
            if at is None or edge in seen or not self.ancestors[at]:
                continue
            seen.add(edge)
            if branch >> at & 1:
                entered.append(edge)
            else:
                stack += [parent for parent in edge[0].next_functions if parent[0] is not None]
        first = [e for e in entered if not any(f[0] is not e[0] and self.depends(e, f) for f in entered)]
        return max(first, key=lambda edge: self.position[edge[0]], default=None)

    def depends(self, edge: Edge, on: Edge) -> bool:
        """Whether an activation was computed from another."""
        return bool(self.ancestors[self.position[edge[0]]] >> self.position[on[0]] & 1)

    def arrivals(self, ends: list[tuple[str, Edge]], joined: Any) -> Arrivals:
        """The ways into the fork of the merge of ``ends``."""
        branch = self.above([edge for side, edge in ends if side == "branch"])
        shortcuts = [edge for side, edge in ends if side == "shortcut"]
        fork = self.fork(shortcuts, branch)
        if fork is None:
            return Arrivals(None)
        bypass, merged = self.above(shortcuts), {edge for _, edge in ends}
        inside = self.above([(joined, 0)])  # of the merge's call, with what it does to its operands first
        found = Arrivals(fork)
        for node, e in self.consumers.get(fork, []):
            at = self.position[node]
            side = "branch" if branch >> at & 1 else "shortcut" if bypass >> at & 1 else "other"
            if side == "other" and fork in merged and inside >> at & 1:
                side = "shortcut"  # the shortcut operand is the fork itself
            found.ways.append((node, e, side))
        for at in bits(bypass & ~branch):
            for e, edge in enumerate(self.nodes[at].next_functions):
                above = self.position.get(edge[0])
                on_both = above is not None and edge != fork and branch >> above & 1
                if on_both and self.depends(edge, fork):
                    found.gates.append((self.nodes[at], e, edge))
        return found


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
