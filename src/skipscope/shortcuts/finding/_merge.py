"""Merges as the finding rules see them: calls that join activations, with operands as graph nodes."""

from __future__ import annotations

from dataclasses import dataclass

from skipscope.shortcuts._shortcut_result import CallKey, Place
from skipscope.shortcuts.trace import TracedCall


@dataclass(frozen=True, slots=True)
class Put:
    """A write of one tensor into a part of another, read as a concatenation of that part and the rest.

    Attributes:
        axis: axis of that concatenation. None if the part is limited along several axes, or unknown.
        is_step: whether it writes one step of an otherwise empty tensor, which so becomes a stack.
        is_chosen: whether the part is selected by a mask or by the data.
    """

    axis: int | None
    is_step: bool
    is_chosen: bool


@dataclass(eq=False, slots=True)
class Merge:
    """One call that joins tensors.

    Attributes:
        traced: the call in the trace.
        name: the operation.
        operands: for each operand its node, or None if it is a constant or not a tensor.
        tensors: for each operand, whether it is a tensor.
        output: node of its result, or None if the result is not a node of the graph.
        whole: for a call that updates a part of a tensor, the node of the whole tensor before it; else None.
        written: for such a call, the node of the whole tensor after it; else None.
        part: number of the operand that is the part.
        assigned_at: place where another call writes the updated part back, as in x[a:b] = x[a:b] + F.
        put: for a call that writes its second operand into a part of the first, that part; else None.
    """

    traced: TracedCall
    name: str
    operands: tuple[int | None, ...]
    tensors: tuple[bool, ...]
    output: int | None
    whole: int | None = None
    written: int | None = None
    part: int = 0
    assigned_at: Place | None = None
    put: Put | None = None

    @property
    def key(self) -> CallKey:
        """Identifier of the call site."""
        assert self.traced.key is not None
        return self.traced.key

    @property
    def owner(self) -> str:
        """Path of the module whose code makes the call."""
        return self.traced.owner

    @property
    def source(self) -> str:
        """The source location of the call, as ``file.py:line``."""
        return self.traced.source

    @property
    def order(self) -> int:
        """Position among all calls."""
        return self.traced.index
