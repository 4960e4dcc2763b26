"""``gradient_split``: how much gradient arrives at each fork through the branch, and how much through the shortcut.

Autograd's nodes are hooked: the gradient of each edge into a fork is seen as it arrives, the edges are sorted by the
side they lead to, and they sum to the fork's gradient. One backward pass for all, and no gradient of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from skipscope._data import Batch, Objective, map_tensors
from skipscope.flow._flow import mode_of
from skipscope.flow._measure import shares_of
from skipscope.flow._readings import norm_of
from skipscope.flow._results import GradientSplit, SplitAt
from skipscope.flow._running import asked, places, running
from skipscope.flow._seed import no_gradient, re_entrant, wants_backward
from skipscope.shortcuts import meaning, tap_merges

SIDES = ("branch", "shortcut", "other")


def gradient_split(
    model: nn.Module,
    data: Any,
    loss: Any = None,
    *,
    found: Any = None,
    seed: int = 0,
    weight: Callable[[Batch], float] | None = None,
) -> GradientSplit:
    """Split the gradient at each fork into what the branch and what the shortcut brings.

    For y = x + f(x) with no other consumer of x they are grad(x) - grad(y) and grad(y). Local.

    Args:
        model: any eager module; as found afterwards. It runs in the modes its modules are in.
        data: a batch ``(inputs, target)``, a Mapping, or a re-iterable of batches.
        loss: ``loss(output, target)``; left out when the output carries ``.loss``.
        found: the shortcuts to look at; all that are found by default.
        seed: of the random numbers drawn inside (dropout).
        weight: what a batch counts for in the mean over batches.

    Raises:
        SkipscopeError: data or loss cannot be read, the loss has no gradient, or re-entrant checkpointing hides the graph.

    Example:
        >>> import skipscope as ss
        >>> model = ss.reference.deep_mlp(depth=4, width=16, inputs=16, classes=16, shortcut="identity")
        >>> split = ss.gradient_split(model, (torch.randn(8, 16), torch.zeros(8, 16)), nn.functional.mse_loss)
        >>> len(split), split[0].shortcut_rms > 0
        (4, True)
    """
    model, batches, objective = asked(model, data, loss, "gradient_split", weight)
    found, _ = places(model, batches, "gradient_split", found)
    forks = [_Fork() for _ in found]
    value = 0.0
    with running(model, seed, "gradient_split"):
        mode = mode_of(model)
        for batch, share in shares_of(batches, objective, "gradient_split"):
            value += share * _one_batch(model, batch, objective, found, forks, share)
    rows = tuple(fork.row(one) for one, fork in zip(found, forks))
    lost = [row.name for row, fork in zip(rows, forks) if not fork.elements]
    notes = (f"No gradient was seen at the fork of: {', '.join(lost)}.",) if lost else ()
    return GradientSplit(rows, value, mode, meaning(model), notes)


@dataclass
class _Fork:
    """What one fork has seen over all batches."""

    norms: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*SIDES, "total", "off"), 0.0))
    product: float = 0.0
    elements: int = 0
    others: bool = False

    def add(self, parts: dict[str, Tensor], total: Tensor, share: float) -> None:
        """Take in what arrived in one batch."""
        for side, part in parts.items():
            self.norms[side] = math.hypot(self.norms[side], share * norm_of(part))
        self.others = self.others or "other" in parts
        if "branch" in parts and "shortcut" in parts:
            self.product += share**2 * float((parts["branch"].double() * parts["shortcut"].double()).sum())
        self.norms["total"] = math.hypot(self.norms["total"], share * norm_of(total))
        off = total.double() - sum(part.double() for part in parts.values())
        self.norms["off"] = math.hypot(self.norms["off"], share * norm_of(off))
        self.elements += total.numel()

    def row(self, one: Any) -> SplitAt:
        """As a row of the result."""
        rms = {
            name: norm / math.sqrt(self.elements) if self.elements else 0.0
            for name, norm in self.norms.items()
        }
        branch, shortcut = self.norms["branch"], self.norms["shortcut"]
        return SplitAt(
            one.name, one.kind, one.fork, rms["branch"], rms["shortcut"],
            self.product / (branch * shortcut) if branch * shortcut else None, rms["total"],
            rms["other"] if self.others else None, shortcut / (shortcut + branch) if shortcut + branch else None,
            self.norms["off"] / self.norms["total"] if self.norms["total"] else None,
        )  # fmt: skip


def _one_batch(
    model: nn.Module, batch: Batch, loss: Objective, found: Any, forks: list[_Fork], share: float
) -> float:
    for parameter in model.parameters():  # so that a frozen table of embeddings does not hide the graph
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    leaves: list[Tensor] = []
    merges: dict[int, tuple[list[tuple[str, Edge]], Any]] = {}

    def touch(k: int, merge: Any) -> Tensor:
        ends = [(side, edge_of(o)) for side, o in zip(merge.sides, merge.operands) if o.requires_grad]
        merges[k] = (ends, merge.output.grad_fn)
        return merge.output

    with tap_merges(model, found, touch):
        value = loss(model, _with_leaves(batch, leaves))
        if not value.requires_grad:
            raise no_gradient("gradient_split", model)
        graph = _Graph(value, leaves)
        handles = []
        try:
            for k, (ends, joined) in merges.items():
                handles += graph.watch(
                    ends, joined, lambda parts, total, k=k: forks[k].add(parts, total, share)
                )
            if graph.starts:
                torch.autograd.grad(value, graph.starts, allow_unused=True)
        except RuntimeError as error:
            if wants_backward(error):
                raise re_entrant("gradient_split") from error
            raise
        finally:
            for handle in handles:
                handle.remove()
    return float(value.detach())


def _with_leaves(batch: Batch, leaves: list[Tensor]) -> Batch:
    """The batch with inputs that require gradients, so that activations can be told from weights in the graph."""

    def leaf(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[-1].clone()  # a leaf could not be changed in place by what follows

    if isinstance(batch, list | tuple) and len(batch) == 2:
        return (map_tensors(batch[0], leaf), batch[1])
    return map_tensors(batch, leaf)


# --- the graph ------------------------------------------------------------------------------------------------

Edge = tuple[Any, int]  # a node, and which of its outputs


def edge_of(value: Tensor) -> Edge:
    """The node and output that a tensor is."""
    edge = torch.autograd.graph.get_gradient_edge(value)
    return edge.node, edge.output_nr


class _Graph:
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

    def fork(self, shortcut: list[Edge], branch: int) -> Edge | None:
        """The nearest activation above the shortcut operands on which the branch depends."""
        entered: list[Edge] = []
        stack, seen = list(shortcut), set[Edge]()
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
        return max(entered, key=lambda edge: self.position[edge[0]], default=None)

    def watch(
        self, ends: list[tuple[str, Edge]], joined: Any, done: Callable[[dict[str, Tensor], Tensor], None]
    ) -> list[Any]:
        """Hook the edges into the fork of the merge of ``ends``; ``done`` is called when all have passed."""
        branch = self.above([edge for side, edge in ends if side == "branch"])
        shortcuts = [edge for side, edge in ends if side == "shortcut"]
        fork = self.fork(shortcuts, branch)
        if fork is None:
            return []
        parts: dict[str, Tensor] = {}
        bypass = self.above(shortcuts)
        merged = {edge for _, edge in ends}

        def on_edge(side: str, e: int):
            def hook(grad_inputs: tuple[Tensor | None, ...], grad_outputs: Any) -> None:
                part = grad_inputs[e]
                if part is not None:
                    parts[side] = parts[side] + part if side in parts else part

            return hook

        def on_fork(grad_outputs: tuple[Tensor | None, ...]) -> None:
            total = grad_outputs[fork[1]]
            if total is not None:
                done(parts, total)
            parts.clear()

        handles = [fork[0].register_prehook(on_fork)]
        for node, e in self.consumers.get(fork, []):
            at = self.position[node]
            side = "branch" if branch >> at & 1 else "shortcut" if bypass >> at & 1 else "other"
            if side == "other" and fork in merged and (node is joined or merged <= set(node.next_functions)):
                side = "shortcut"  # the shortcut operand is the fork itself
            handles.append(node.register_hook(on_edge(side, e)))
        return handles


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
