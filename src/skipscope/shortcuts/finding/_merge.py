"""What a rule of finding looks at: one call that joins activations, by the nodes of the dataflow."""

from __future__ import annotations

from dataclasses import dataclass

from skipscope.shortcuts._shortcut_result import CallKey, Place
from skipscope.shortcuts.trace import TracedCall


@dataclass(frozen=True, slots=True)
class Put:
    """How a call puts one tensor into a part of another: side by side, as a concatenation has them.

    Attributes:
        axis: along which the part is beside the rest; None where it is a part along several, or unknown.
        is_step: it is one step of a tensor that holds nothing else, as a stack is made.
        is_chosen: its place depends on a mask, or on the data.
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
        operands: for each operand its node, or None where it is a constant or no tensor.
        tensors: which operands are tensors.
        output: node of its result, or None where the result does not come from the data.
        whole: for a call that updates a part of a tensor, the node of all of it before; else None.
        written: the same after it.
        part: the operand that is the part.
        assigned_at: where the updated part is put back, if another call does that: x[a:b] = x[a:b] + F.
        put: for a call that puts its second operand into a part of the first, how; else None.
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
        """``file.py:line``."""
        return self.traced.source

    @property
    def order(self) -> int:
        """Position among all calls."""
        return self.traced.index
