"""Rules that decide which operands of a merge bypass the others, and reject false shortcuts."""

from __future__ import annotations

from collections.abc import Sequence

from skipscope.shortcuts.finding._bit_sets import bits
from skipscope.shortcuts.finding._candidate import Reason
from skipscope.shortcuts.finding._graph import Graph
from skipscope.shortcuts.finding._kinds import (
    BENT,
    DROPOUT,
    GATES,
    LINEAR,
    MAX_POOLS,
    POINTWISE,
    PRODUCT,
    SHAPE,
    STRAIGHT_POINTWISE,
)
from skipscope.shortcuts.finding._merge import Merge
from skipscope.shortcuts.finding._sides import Side
from skipscope.shortcuts.trace import _operations

# If several operands could bypass a branch, the operand of lowest rank is the shortcut.
FREE, SCALED, GATED, NORMED, PROJECTED, CHAINED = range(6)
_LINEAR = SHAPE | PRODUCT | LINEAR
_CURVED = POINTWISE - STRAIGHT_POINTWISE - GATES - {"where", "masked_fill"}
_PASSING = SHAPE | DROPOUT | {"mul", "div"}
_MATRIX_PRODUCTS = frozenset({"bmm", "mm", "matmul", "einsum", "mv", "dot", "tensordot"})


def _unbent(sides: Sequence[Side]) -> Reason:
    """The reason why the other sides of a merge with a linear map are not a branch."""
    linear = sides and all(side.how in {"projection", "linear maps"} for side in sides)
    return Reason.BOTH_LINEAR if linear else Reason.PARALLEL


class Bypass:
    """Decides which operands bypass the others, for the merges of one graph.

    Args:
        graph: the dataflow.
    """

    def __init__(self, graph: Graph):
        self.graph = graph

    def operands(
        self, call: Merge, sides: dict[int, Side], is_summed: bool = False
    ) -> tuple[int, ...] | Reason:
        """Select the operands that bypass: those without weights, else scaled, gated, normed or projected.

        Args:
            call: the merge.
            sides: its operands' sides.
            is_summed: whether the call is a stack that is later summed.
        """
        rank = {i: r for i, side in sides.items() if (r := self.rank(side)) is not None}
        if call.name in _operations.LISTS:
            straight = (i for i, r in rank.items() if r <= GATED and not self._takes_largest(sides[i]))
            found = tuple(straight)
            if found or not is_summed:
                return found or Reason.PARALLEL
        if not rank:
            bent = any(side.how == "bent" for side in sides.values())
            return Reason.BENT if bent else Reason.PARALLEL
        best = min(rank.values())
        chosen = tuple(i for i, r in rank.items() if r == best)
        rest = [side for i, side in sides.items() if i not in chosen]
        if call.name == "where" and best > GATED:
            return Reason.PARALLEL
        if best == NORMED and not any(self.graph.matrices_in(side.region, enough=1) for side in rest):
            return Reason.PARALLEL
        if best == PROJECTED:
            if any(self._is_low_rank(side, sides[chosen[0]]) for side in rest):
                return Reason.LOW_RANK
            if not any(side.how == "branch" and self.is_deeper(side.region) for side in rest):
                return _unbent(rest)
            if self._is_score(call.output if call.whole is None else call.written):
                return Reason.SCORES
        if best == CHAINED and not any(side.how == "branch" and self._bends(side.region) for side in rest):
            return _unbent(rest)
        return self.the_first(sides, chosen)

    def the_first(self, sides: dict[int, Side], chosen: tuple[int, ...]) -> tuple[int, ...]:
        """Keep the operands that depend on no other operand in ``chosen``: x, but not its gate or F(x)."""

        def is_later(i: int) -> bool:
            at = sides[i].fork or 0
            others = {sides[j].fork or 0 for j in chosen} - {at}
            return any(self.graph.ancestors.reaches(other, at) for other in others)

        return tuple(i for i in chosen if not is_later(i))

    def rank(self, side: Side) -> int | None:
        """The rank of a side among bypassing sides. None if it does not bypass."""
        if side.fork is None or side.how in {"branch", "bent"}:
            return None
        if side.how in {"projection", "linear maps"}:
            return PROJECTED if side.how == "projection" else CHAINED
        if not self.graph.has_weights(side.region):
            return FREE
        return NORMED if not side.products else GATED if side.how == "gated" else SCALED

    def is_deeper(self, region: int) -> bool:
        """Whether a set of nodes is more than one linear map: two in sequence, or one and a nonlinearity."""
        graph = self.graph
        matrices = graph.matrices_in(region, enough=2).bit_count()
        # A nonlinear function of one matrix is usually a gate or a scale (exp of a log-variance), but of
        # several matrices it is a branch.
        if matrices and (self._bends(region) or (matrices > 1 and region & graph.of_kinds(_CURVED))):
            return True
        passed: set[int] = set()  # nodes at or after a matrix
        for v in bits(region) if matrices > 1 else ():
            is_after = any(p in passed for p in graph.parents[v])
            # A bias of several dimensions is not a linear map.
            is_map = graph.matrices[v] and graph.kind(v) not in {"add", "sub"}
            if is_map and is_after:
                return True
            if is_map or is_after:
                passed.add(v)
        return False

    def _takes_largest(self, side: Side) -> bool:
        """Whether a side has a max pool, as one of the parallel branches of Inception has."""
        return bool(side.region & self.graph.of_kinds(MAX_POOLS))

    def _is_score(self, at: int | None) -> bool:
        """Whether a sum is an attention score, which enters a matrix product after a softmax.

        In between it may be shifted and scaled. In additive attention the softmax is that of v . tanh(sum),
        and its product may also be elementwise.
        """
        if at is None:
            return False
        softmaxes, ends = self.graph.onward([at], _PASSING, frozenset({"softmax"})), _MATRIX_PRODUCTS
        if not softmaxes:
            softmaxes, ends = self._additive_scores(at), _MATRIX_PRODUCTS | {"mul"}
        return bool(self.graph.onward(softmaxes, _PASSING, ends))

    def _additive_scores(self, at: int) -> list[int]:
        """The softmax of v . tanh(sum), if nothing else uses the sum; else []."""
        passed = ""
        while len(children := self.graph.children[at]) == 1:
            (at,) = children
            kind = self.graph.kind(at)
            if kind == "softmax" and passed == "tanh, v":
                return [at]
            passed = (
                "tanh" if kind == "tanh" else "tanh, v" if kind in LINEAR and passed == "tanh" else passed
            )
            if kind not in SHAPE | LINEAR | {"tanh"}:
                break
        return []

    def _bends(self, region: int) -> bool:
        return bool(region & self.graph.of_kinds(BENT))

    def _is_low_rank(self, side: Side, projection: Side) -> bool:
        """Whether a side is linear with a lower rank than the projection beside it, as in LoRA."""
        if side.region & ~self.graph.of_kinds(_LINEAR):
            return False
        inner = min((min(shape) for shape in self.graph.matrix_shapes(side.region)), default=0)
        outer = min((min(shape) for shape in self.graph.matrix_shapes(projection.region)), default=0)
        return inner < outer
