"""A shortcut before it has a name: what judging one merge, or several together, has found."""

from __future__ import annotations

from dataclasses import dataclass

from skipscope.shortcuts._mixtures import Mixture
from skipscope.shortcuts._record import Call
from skipscope.shortcuts._results import Place

# Reasons why a merge is no shortcut that are asked for again: another call, or another reading, may make it one.
PARALLEL, NO_WEIGHTS = "parallel branches", "no weights on either side"


@dataclass(frozen=True)
class Verdict:
    """A shortcut before it has a name.

    Attributes:
        call: the merge.
        kind: of the shortcut.
        forks: nodes where each bypassing operand parts from the branch.
        bypassing: operands that carry the shortcut.
        shortcut_operands: these, and what they are multiplied with inside the call.
        region: bit set of the branch's nodes.
        side_region: bit set of the shortcut's own nodes.
        shortcut_at: where the shortcut is edited.
        branch_at: where the branch is edited.
        parts: calls that belong to this shortcut and are no merges of their own.
        both: operands that carry the branch and the shortcut, as t (H - x) in x + t (H - x), or multiply both.
        mixture: how what the call stacks is summed, or None.
    """

    call: Call
    kind: str
    forks: tuple[int, ...]
    bypassing: tuple[int, ...]
    shortcut_operands: tuple[int, ...]
    region: int
    side_region: int
    shortcut_at: tuple[Place, ...]
    branch_at: tuple[Place, ...]
    parts: tuple[Call, ...] = ()
    both: tuple[int, ...] = ()
    mixture: Mixture | None = None

    @property
    def is_summed(self) -> bool:
        """Whether the merge is complete only where what the call stacks has been summed."""
        return self.mixture is not None and self.mixture.alone
