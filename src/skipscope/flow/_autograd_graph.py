"""Traversal of autograd's public graph: nodes, their inputs and leaves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# A node and the index of one of its outputs.
Edge = tuple[Any, int]


def edge_of(tensor: Tensor) -> Edge:
    """The autograd node of a tensor, and its output index."""
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def nodes_above(roots: Iterable[Any]) -> list[Any]:
    """Every node upstream of ``roots`` and ``roots`` themselves, in topological order from the leaves."""
    done: dict[Any, None] = {}
    stack = [(root, False) for root in roots]
    while stack:
        node, is_ready = stack.pop()
        if node in done:
            continue
        if is_ready:
            done[node] = None
            continue
        stack.append((node, True))
        stack += [(p, False) for p, _ in node.next_functions if p is not None and p not in done]
    return list(done)


def leaves_above(roots: Iterable[Any]) -> list[Tensor]:
    """The leaf tensors upstream of ``roots``, in any order."""
    stack = list(roots)
    seen, leaves = set(stack), []
    while stack:
        node = stack.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves.append(leaf)
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return leaves
