"""Candidates: shortcuts before they have a name, as read from one merge or several together."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from skipscope.shortcuts._shortcut_result import Kind, Place
from skipscope.shortcuts.finding._merge import Merge
from skipscope.shortcuts.finding._mixtures import Mixture


class Reason(enum.Enum):
    """Why a merge is not a shortcut, as shown to the user."""

    ACTIVATION_FUNCTION = "an activation function with weights of its own"
    BENT = "a side without weights that is not linear"
    BOTH_LINEAR = "both sides are linear maps"
    GATE = "a gate: a product, not a sum"
    LOW_RANK = "a low-rank update of the same linear map"
    NOWHERE = "it leads to no output of the model"
    NO_SUM = "it joins its operands by another operation than a sum"
    NO_WEIGHTS = "no weights on either side"
    ONLY_A_FACTOR = "only a factor depends on it"
    ONLY_A_GATE = "only a gate depends on it"
    OTHER_PARTS = "other parts of one tensor"
    OTHER_STEPS = "other steps of one sequence"
    PARALLEL = "parallel branches"
    PART_OF_A_GATE = "part of a gate"
    RECURRENCE = "steps of one recurrence, side by side"
    SCORES = "a sum of attention scores"
    STACKED = "stacked side by side"
    UNRELATED = "no common ancestor (position embedding, or separate inputs)"
    WEIGHT = "an activation and a weight (position embedding or bias)"


@dataclass(frozen=True)
class Candidate:
    """A shortcut before it has a name.

    Attributes:
        call: the merge.
        kind: kind of the shortcut.
        forks: for each bypassing operand, the node where it parts from the branch.
        bypassing: operands that carry the shortcut.
        shortcut_operands: the bypassing operands, and their factors inside the call.
        region: bit set of the branch's nodes.
        side_region: bit set of the shortcut's own nodes.
        shortcut_at: operands where the shortcut is edited.
        branch_at: operands where the branch is edited.
        parts: calls that belong to this shortcut and are not merges of their own.
        both: operands that carry both the branch and the shortcut, as t (H - x) in x + t (H - x), or multiply
            both.
        mixture: the weighted sum over the stack that the call returns, or None.
    """

    call: Merge
    kind: Kind
    forks: tuple[int, ...]
    bypassing: tuple[int, ...]
    shortcut_operands: tuple[int, ...]
    region: int
    side_region: int
    shortcut_at: tuple[Place, ...]
    branch_at: tuple[Place, ...]
    parts: tuple[Merge, ...] = ()
    both: tuple[int, ...] = ()
    mixture: Mixture | None = None

    @property
    def is_summed(self) -> bool:
        """Whether the merge is a stack, complete only where the stack has been summed."""
        return self.mixture is not None and self.mixture.alone
