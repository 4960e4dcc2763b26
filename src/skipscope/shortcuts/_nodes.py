"""Autograd's nodes: which one made a tensor, seen through what only hands it on, and what a node does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One output of ``unbind`` or ``split``, as a node of its own: autograd has one node for all of them."""

    node: Any
    index: int

    def name(self) -> str:
        """As ``select`` is called, which does the same."""
        return "SelectBackward0"

    @property
    def next_functions(self) -> tuple[tuple[Any, int], ...]:
        """What it was computed from."""
        return ((self.node, 0),)


def node_of(value: Any) -> Any:
    """The autograd node that produced a tensor (for a leaf: the one that accumulates its gradient), or None."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return None
    if value.grad_fn is None:
        return torch.autograd.graph.get_gradient_edge(value).node
    return output_of(value.grad_fn, value.output_nr)


_MANY = frozenset({"UnbindBackward0", "SplitBackward0", "SplitWithSizesBackward0", "UnsafeSplitBackward0"})
# FSDP2 hands a unit's inputs through one function, to learn when its backward ends: input i is output i.
_HANDS_THROUGH = "RegisterPostBackwardFunctionBackward"


_kinds: dict[type, str] = {}
_plain: dict[type, bool] = {}


def kind_of(node: Any) -> str:
    """The operation of a node: autograd's name without ``Backward0``."""
    kind = _kinds.get(type(node))
    if kind is None:
        name = node.name()
        kind = name.partition("Backward")[0]
        if type(node).__name__ == name:  # else the type is one of many operations
            _kinds[type(node)] = kind
    return kind


def shape_of(node: Any) -> tuple[int, ...] | None:
    """Of what a node gives, where that is known."""
    node, index = (node.node, node.index) if isinstance(node, Step) else (node, 0)
    known = getattr(node, "_input_metadata", None)
    return tuple(known[index].shape) if known else None


def _is_plain(node: Any) -> bool:
    """Whether a node is what it is, and neither hands on what another made nor has many outputs."""
    plain = _plain.get(type(node))
    if plain is None:
        name = node.name()
        plain = name not in _MANY and name not in {_HANDS_THROUGH, "AliasBackward0", "SliceBackward0"}
        if type(node).__name__ == name:
            _plain[type(node)] = plain
    return plain


def output_of(node: Any, index: int) -> Any:
    """The node of one output of an autograd node, seen through what only hands it on."""
    while node is not None:
        if _is_plain(node):
            return node
        name = node.name()
        if name == _HANDS_THROUGH:
            node, index = node.next_functions[index]
        elif name == "AliasBackward0" or (name == "SliceBackward0" and _takes_everything(node)):
            node, index = node.next_functions[0]
        else:
            return Step(node, index) if name in _MANY else node
    return None


def _takes_everything(node: Any) -> bool:
    """Whether a slice is all of what it is taken from: torch 2.6 has one in ``x[:, t]``, and in ``x[:]`` for an alias."""
    if node._saved_step != 1:
        return False
    size = node._saved_self_sym_sizes[signed(node._saved_dim)]
    start, end = signed(node._saved_start or 0), node._saved_end
    return (start == 0 or start <= -size) and (end is None or signed(end) >= size)


def signed(saved: int) -> int:
    """A number that autograd may have saved as the unsigned 64 bits of a negative one."""
    return saved - 2**64 if saved >= 2**63 else saved
