"""The role of each operand of a merge: whether it bypasses the others, from which fork, through which nodes.

For operand i, the *common* nodes are its ancestors on which the other operands depend too; its other
ancestors are *its own region*. Through its own region a bypassing operand reaches the common nodes without
weights, or with a single linear map. The fork is where its path enters the common nodes: the nearest ancestor
on which the branch depends.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import reduce
from itertools import accumulate, permutations
from math import prod
from operator import or_
from typing import Any, Literal, NamedTuple

from skipscope.shortcuts.finding._bit_sets import bits
from skipscope.shortcuts.finding._graph import Graph
from skipscope.shortcuts.finding._kinds import (
    COMPARISONS,
    CONVOLUTION,
    ELEMENTWISE,
    GATES,
    LINEAR,
    MATRIX_PRODUCTS,
    MATRIX_SUMS,
    MAX_POOLS,
    NORM,
    PRODUCT,
    SHAPE,
    TRANSFORMS,
    WHOLE,
)
from skipscope.shortcuts.finding._merge import Merge
from skipscope.shortcuts.finding._products import before_map
from skipscope.shortcuts.trace import Operand

_STRAIGHT, _PAIRING = SHAPE | PRODUCT | NORM | LINEAR | TRANSFORMS, PRODUCT | LINEAR
# Operations that select one of several values: an addend still carries x, a factor is nonlinear ("bent").
_SELECTING = MAX_POOLS | {"max", "min", "amax", "amin"}
_FACTORS = {**dict.fromkeys(MATRIX_SUMS, (1, 2)), "addcmul": (1, 2), "addcdiv": (1, 2)}


def factors_of(call: Merge) -> tuple[int, ...]:
    """The operands that a call multiplies with each other before it adds."""
    return _FACTORS.get(call.name, ())


def signs_of(call: Merge) -> tuple[int, ...]:
    """The sign of each operand in a sum."""
    scale = call.traced.keywords.get("alpha", call.traced.keywords.get("value", 1))
    sign = 1 if not isinstance(scale, int | float) or scale >= 0 else -1
    if call.name == "rsub":
        return -sign, 1
    return 1, *[-sign if call.name == "sub" else sign] * 2


def is_scaled(call: Merge, i: int) -> bool:
    """Whether the call itself multiplies an operand by a number: ``add(F, x, alpha=0.5)``."""
    name = "alpha" if (call.name, i) in _SCALED else "beta" if call.name in MATRIX_SUMS and i == 0 else None
    return name is not None and call.traced.keywords.get(name, 1) not in {1, -1}


_SCALED = {("add", 1), ("sub", 1), ("rsub", 0)}


# The role of an operand in its merge: a kind of shortcut, several linear maps, a branch, or bent (nonlinear,
# without weights).
Role = Literal["identity", "scaled", "projection", "gated", "linear maps", "branch", "bent"]


class Side(NamedTuple):
    """One operand of a merge, and its role there.

    Attributes:
        fork: node of the fork, or None if the operand has no common ancestor with the others.
        how: ``identity``, ``scaled``, ``projection`` or ``gated``; ``linear maps``: several in sequence,
            without a nonlinearity between them; ``branch``; or ``bent``: nonlinear, without weights.
        region: bit set of the operand's own nodes.
        products: the products in between, the nearest to the fork first.
        is_sum: whether it also comes from other common nodes that depend on the fork, as in x + F(x).
        carry: for a linear map times a gate, the node that the gate multiplies.
    """

    fork: int | None
    how: Role
    region: int
    products: tuple[int, ...] = ()
    is_sum: bool = False
    carry: int | None = None


class Sides:
    """Reads the operands of one merge in a graph.

    Attributes:
        active: numbers of the operands that are activations.
        factors: numbers of the operands that the call multiplies with each other before it adds.
    """

    def __init__(self, graph: Graph, call: Merge):
        self.graph, self.call = graph, call
        self.at = call.operands
        self.active = [i for i, at in enumerate(self.at) if at is not None and at < graph.activations]
        self.factors = factors_of(call)

    def read(self) -> dict[int, Side]:
        """The side of each operand that is an activation."""
        return {
            i: self._multiplied(i, self._side(i, common))
            for i, common in zip(self.active, self._common(), strict=True)
        }

    def gated_maps(self) -> dict[int, Side]:
        """Find operands that are a linear map times a gate, t H + (1 - t) W x, with the fork at x."""
        found = {}
        for i, common in zip(self.active, self._common(), strict=True):
            for carry, product in self.gatings(i):
                own = self.graph.ancestors[carry] & ~common
                # All of carry is common: the gate, or the operand on the other side, depends on it.
                if not own:
                    before = self._before_map(carry, i)
                    if before is not None:
                        region = before[1] | self.graph.ancestors[self.position(i)] & ~common
                        found[i] = Side(before[0], "gated", region, (product,), carry=carry)
                    continue
                entries = self.graph.entries(own, common)
                if len(entries) == 1 and self.graph.matrices_in(own, enough=1):
                    (fork,) = entries
                    if self._is_linear(fork, own):
                        region = self.graph.ancestors[self.position(i)] & ~common
                        found[i] = Side(fork, "gated", region, (product,), carry=carry)
        return found

    def _before_map(self, carry: int, i: int) -> tuple[int, int] | None:
        """The operand and the nodes of the map that computes ``carry``, if another operand uses it too."""
        ends = (self.position(j) for j in self.active if self._are_added(i, j))
        return next(filter(None, (before_map(self.graph, carry, end) for end in ends)), None)

    def gatings(self, i: int) -> list[tuple[int, int]]:
        """The pairs (node that a gate multiplies, product) at operand i; [] if it is not gated."""
        graph, at = self.graph, self.position(i)
        if i in self.factors:
            rest = [self.position(j) for j in self.factors if j in self.active and j != i]
            return [(at, at)] if any(map(self._is_gate, rest)) else []
        while graph.kind(at) in WHOLE and len(graph.active_parents(at)) == 1:
            (at,) = graph.active_parents(at)
        both = graph.active_parents(at) if graph.kind(at) == "mul" else []
        return [(a, at) for a, b in permutations(both) if self._is_gate(b)] if len(both) == 2 else []

    def carried(self, side: Side) -> int:
        """The set of a gated side's own nodes that lead to the node its gate multiplies; may be empty."""
        for product in side.products:
            both = self.graph.active_parents(product)
            for carry, gate in permutations(both) if len(both) == 2 else ():
                if self._is_gate(gate) and not self._is_gate(carry):
                    return self.graph.ancestors[carry] & side.region
        return 0

    def _is_gate(self, gate: int) -> bool:
        """Whether a node is a sigmoid or softmax, possibly scaled, subtracted from 1 or sliced."""
        graph = self.graph
        while graph.kind(gate) not in GATES:
            above = graph.active_parents(gate)
            if graph.kind(gate) not in SHAPE | ELEMENTWISE or len(above) != 1:
                return False
            (gate,) = above
        return True

    def carries_whole(self, fork: int | None) -> bool:
        """Whether the whole tensor, of which the call updates a part, leads back to ``fork`` without weights.

        With None: whether one operation computed it, and not a series of writes to slices.
        """
        graph, at = self.graph, self.call.whole
        if at is None or at >= graph.activations:
            return False
        if fork is None:
            return graph.kind(at) not in {"write", "setitem"}
        others = [j for j in self.active if j != self.call.part]
        common = reduce(or_, (graph.ancestors[self.position(j)] for j in others), 0)
        walk = _Walk(graph, common)
        return walk.weightless(at) == {fork} and not walk.mixed

    def position(self, i: int) -> int:
        """The node of an operand that is an activation."""
        at = self.at[i]
        assert at is not None
        return at

    def _multiplied(self, i: int, side: Side) -> Side:
        """The side after the products inside the call: x in ``addcmul(y, x, t)`` is gated by t.

        A denominator and the weight of ``lerp`` count as bent.
        """
        is_weight = self.call.name == "lerp" and i == 2
        if not (i in self.factors or is_weight) or side.how in {"branch", "bent"}:
            return side
        if is_weight or (self.call.name == "addcdiv" and i == 2):
            return Side(side.fork, "bent", side.region)
        if side.region & self.graph.of_kinds(_SELECTING):
            return Side(side.fork, "bent", side.region)
        if self.call.name in MATRIX_SUMS:
            return Side(
                side.fork, "projection" if side.how in {"identity", "scaled"} else "branch", side.region
            )
        partner_is_active = any(j != i and j in self.active for j in self.factors)
        how = "gated" if partner_is_active or side.how == "gated" else "scaled"
        return Side(side.fork, how, side.region, side.products)

    def _common(self) -> list[int]:
        """For each operand, the ancestors of the other operands, except its factors inside the call."""
        every = [self.graph.ancestors[self.position(i)] for i in self.active]
        if len(every) == 2 and not self.factors:
            return every[::-1]
        if self.factors:
            return [
                reduce(or_, (a for j, a in zip(self.active, every, strict=True) if self._are_added(i, j)), 0)
                for i in self.active
            ]
        before = list(accumulate(every, or_, initial=0))
        after = list(accumulate(reversed(every), or_, initial=0))[::-1]
        return [a | b for a, b in zip(before[:-1], after[1:], strict=True)]

    def _are_added(self, i: int, j: int) -> bool:
        return i != j and not (i in self.factors and j in self.factors)

    def _side(self, i: int, common: int) -> Side:
        graph, at = self.graph, self.position(i)
        if common >> at & 1:
            return Side(at, "identity", 0)
        every = graph.ancestors[at]
        own = every & ~common
        if own == every:
            return Side(None, "branch", own)
        walk = _Walk(graph, common)
        reached = walk.weightless(at)
        if walk.has_rivals:
            reached = self._carried(walk.first(reached), i)
        fork = walk.nearest(reached)
        if fork is not None and walk.mixed:
            return Side(fork, "projection", own)
        if fork is not None:
            if walk.is_bent(at):
                return Side(fork, "branch" if graph.matrices_in(own, enough=1) else "bent", own)
            if own & graph.of_kinds(TRANSFORMS) and graph.has_weights(own):
                return Side(fork, "branch", own)  # a product of spectra with weights is a convolution
            how = "gated" if walk.gate else "scaled" if walk.products or walk.normed else "identity"
            return Side(fork, how, own, tuple(walk.products), len(reached) > 1)
        fork = walk.nearest(graph.entries(own, common))
        if fork is not None and self._is_linear(fork, own):
            count = min(graph.matrices_in(own, enough=2).bit_count(), 2)
            if count < 2 or graph.entries(own, common) == {fork}:
                return Side(fork, ("scaled", "projection", "linear maps")[count], own)
        return Side(fork, "branch", own)

    def _carried(self, rivals: list[int], i: int) -> frozenset[int]:
        """Among separate inputs that are multiplied (a mask and x), find the input of the branch's weights.

        If the weights apply to both, take the larger. Empty for parts of one activation that multiply each
        other, which are not a gate and x.
        """
        graph, ends = self.graph, [self.position(j) for j in self.active if self._are_added(i, j)]
        above = [graph.ancestors[c] for c in rivals]
        if any(a & b for k, a in enumerate(above) for b in above[:k]):
            return frozenset()
        carried = [c for c in rivals if any(self._enters_weights(c, end) for end in ends)]
        sizes = [prod(graph.shape(c)) for c in carried]
        largest = [c for c, size in zip(carried, sizes, strict=True) if size == max(sizes)]
        return frozenset(largest if len(largest) == 1 else ())

    def _enters_weights(self, c: int, end: int) -> bool:
        """Whether a weight is between ``c`` and ``end``."""
        graph = self.graph
        if not graph.ancestors.reaches(c, end):
            return False
        touched: dict[int, bool] = {c: False}
        for v in bits(graph.between([c], end) & ~(1 << c)):
            on_way = [touched[p] for p in graph.active_parents(v) if p in touched]
            touched[v] = any(on_way) or bool(graph.weights[v])
        return touched[end]

    def _is_linear(self, fork: int, own: int) -> bool:
        """Whether there is no nonlinearity and no product of activations between fork and operand."""
        graph, reaches = self.graph, self.graph.ancestors.reaches
        if any(reaches(fork, v) for v in bits(own & ~graph.of_kinds(_STRAIGHT))):
            return False
        pairing = bits(own & graph.of_kinds(_PAIRING))
        return not any(reaches(fork, v) and len(graph.active_parents(v)) > 1 for v in pairing)


# A step of a walk yields earlier nodes, is sent the common nodes that these reach, and returns those that its
# own node reaches.
_Steps = Generator[int, Any, frozenset[int]]


class _Walk:
    """A backward walk from an operand to the common nodes that stops at weights."""

    def __init__(self, graph: Graph, common: int):
        self.graph, self.common = graph, common
        self.products: list[int] = []
        self.gate = self.mixed = self.has_rivals = self.normed = False
        self._seen: dict[int, frozenset[int]] = {}
        self._bent: set[int] = set()
        # Nodes that depend on only the largest or smallest values of x. A selection is not a linear map.
        self._selected: set[int] = set()

    def is_bent(self, v: int) -> bool:
        """Whether the walk from ``v``, which must be finished, passed a nonlinear operation."""
        return v in self._bent

    def weightless(self, v: int) -> frozenset[int]:
        """The common nodes that ``v`` depends on without weights; empty if a weight enters on the way."""
        if self.graph.weights[v] and not self.common >> v & 1 and self.graph.kind(v) not in PRODUCT:
            return frozenset()
        # An explicit stack instead of recursion: a walk may have thousands of steps.
        waiting = [(v, self._step(v))]
        answer: frozenset[int] | None = None
        while waiting:
            at, step = waiting[-1]
            try:
                asked = step.send(answer)
            except StopIteration as done:
                answer = self._seen[at] = done.value
                waiting.pop()
            else:
                answer = self._seen.get(asked)
                if answer is None:
                    waiting.append((asked, self._step(asked)))
        return self._seen[v]

    def _step(self, v: int) -> _Steps:
        graph = self.graph
        if self.common >> v & 1:
            return frozenset([v])
        kind, parents = graph.kind(v), graph.active_parents(v)
        if (x := graph.normed_at(v)) is not None:
            kind, parents = "normalize", [x]
        if kind in PRODUCT:
            return (yield from self._through_product(v, kind, parents))
        if graph.weights[v] or not parents:
            return frozenset()
        reached = []
        for parent in parents:
            reached.append((yield parent))
            if not reached[-1]:
                return frozenset()
        # A convolution with a constant kernel (a blur) is linear. A norm counts as a scaling.
        is_linear = kind in SHAPE | TRANSFORMS or (kind in CONVOLUTION | NORM and len(parents) == 1)
        self.normed = self.normed or kind in NORM
        if not is_linear or self._chooses_by_sign(v, kind) or any(parent in self._bent for parent in parents):
            self._bent.add(v)
        if kind in _SELECTING or any(parent in self._selected for parent in parents):
            self._selected.add(v)
        return frozenset().union(*reached)

    def _through_product(self, v: int, kind: str, parents: list[int]) -> _Steps:
        graph = self.graph
        if graph.matrices[v] and kind not in {"mul", "div"}:
            return frozenset()
        reached = {}
        for parent in parents:
            reached[parent] = yield parent
        entered = frozenset().union(*reached.values())
        if not entered:
            return frozenset()
        if len(parents) > 1:
            # One factor carries x, the other is a gate, linear or not. If both lead to the common nodes, the
            # gate depends on the other factor. If neither depends on the other, as in attention scores, the
            # product is not gated.
            self.gate = True
            first = self.first(entered)
            if kind in MATRIX_PRODUCTS and sum(map(bool, reached.values())) == 1:
                # x times a matrix computed from the data by weights, as in dynamic hyper-connections.
                self.mixed = True
                return frozenset(first) if len(first) == 1 else frozenset()
            if kind not in ELEMENTWISE:
                return frozenset()
            self.has_rivals = self.has_rivals or len(first) > 1
            entered = frozenset(first)
        # A gate may be nonlinear. But a nonlinear function that multiplies only a branch, std(x) F(x), does
        # not carry x. Neither does x times a weightless function of x, nor a denominator.
        carrying = [parent for parent in parents if reached[parent] & entered]
        bending = self._bent | self._selected if len(parents) > 1 else self._bent
        if all(p in bending or p == self._denominator(v, kind) for p in carrying) or (
            len(carrying) > 1 and len(entered) == 1 and self._is_function(v, carrying, *entered)
        ):
            self._bent.add(v)
        if any(parent in self._selected for parent in carrying):
            self._selected.add(v)
        self.products.append(v)
        return entered

    def _chooses_by_sign(self, v: int, kind: str) -> bool:
        """Whether a comparison selects elements one by one, as in a ReLU: ``where(x > 0, x, 0)``."""
        call = self.graph.call_at(v) if kind in {"where", "masked_fill"} else None
        masks = [self.graph.trace.values[o] for o in call.operands] if call is not None else []
        for mask in masks:
            made = None if mask.is_float or mask.call is None else self.graph.trace.calls[mask.call]
            if made is not None and made.function in COMPARISONS and mask.shape == self.graph.shape(v):
                return any(self.graph.bit(self.graph.node_of(o)) for o in made.operands)
        return False

    def _denominator(self, v: int, kind: str) -> int | None:
        """The node of a division's denominator, or None if that is not a node."""
        call = self.graph.call_at(v)
        other = None if call is None or kind != "div" else call.argument(1, "other")
        return self.graph.node_of(other.value) if isinstance(other, Operand) else None

    def _is_function(self, v: int, factors: list[int], x: int) -> bool:
        """Whether a product multiplies ``x`` by a nonlinear function of all of it, or two functions of it."""
        alone = [p for p in factors if self.graph.is_function(p, x)]
        bending = self._bent | self._selected | {self._denominator(v, "div")}
        return len(set(factors)) < len(factors) or len(alone) == len(factors) or bool(bending & set(alone))

    def first(self, candidates: frozenset[int] | set[int]) -> list[int]:
        """The candidates that depend on none of the others."""
        reaches = self.graph.ancestors.reaches
        return [c for c in candidates if not any(d != c and reaches(d, c) for d in candidates)]

    def nearest(self, candidates: frozenset[int] | set[int]) -> int | None:
        """The candidate that the others depend on; of several unrelated candidates the last in order."""
        first = self.first(candidates)
        return max(first) if first else None
