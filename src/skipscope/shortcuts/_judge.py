"""The verdict on one merge: a shortcut of some kind, or the reason why it is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import permutations

from skipscope.shortcuts import _calls
from skipscope.shortcuts._bits import bits
from skipscope.shortcuts._graph import PART, Graph
from skipscope.shortcuts._results import Place
from skipscope.shortcuts._sides import (
    BENT,
    ELEMENTWISE,
    LINEAR,
    MATRIX_SUMS,
    MAX_POOLS,
    POINTWISE,
    PRODUCT,
    SHAPE,
    WHOLE,
    Side,
    Sides,
)
from skipscope.shortcuts._trace import Call

PARALLEL, NO_WEIGHTS = "parallel branches", "no weights on either side"
FREE, SCALED, GATED, NORMED, PROJECTED = range(5)  # of several ways past a branch, the first is the shortcut


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
        part: a call that belongs to this shortcut and is no merge of its own, or None.
        both: operands that carry the branch and the shortcut, as t (H - x) in x + t (H - x), or multiply both.
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
    part: Call | None
    both: tuple[int, ...]


class Judge:
    """Judges the merges of one graph."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.made = {id(call.output): call for call in graph.record.calls if call.output is not None}

    def verdict(self, call: Call) -> Verdict | str | None:
        """A shortcut, a reason why not, or None for what is no merge of activations at all."""
        reader = Sides(self.graph, call)
        if len(reader.active) < 2:
            is_addition = call.name == "add" and reader.active and None not in reader.at
            return "an activation and a weight (position embedding or bias)" if is_addition else None
        sides = reader.read()
        if call.name in _calls.PRODUCTS:
            return self._gate(sides)
        if all(side.fork is None for side in sides.values()):
            return "no common ancestor (position embedding, or separate inputs)"
        if call.name == "stack":
            return "stacked side by side"
        if call.name not in _calls.LISTS and (crossed := self._crossed(reader)) is not None:
            return crossed
        bypassing = (0,) if call.name.startswith("marked ") else self._bypassing(call, sides)
        if isinstance(bypassing, str):
            return bypassing
        region, branches = self._branch(reader, sides, bypassing)
        if branches == NO_WEIGHTS and call.name in _calls.LISTS:
            # Several may come from one branch, and share its weights: x is what comes from none of the others.
            bypassing = tuple(i for i in self._the_first(sides, bypassing) if not sides[i].is_sum)
            region, branches = self._branch(reader, sides, bypassing, sharing=True)
        if isinstance(branches, str):
            return branches
        return self._shortcut(reader, sides, bypassing, branches, region)

    def _gate(self, sides: dict[int, Side]) -> str | None:
        free = [s for s in sides.values() if s.how == "identity" and s.fork is not None]
        held = [
            s
            for s in sides.values()
            if s.how in {"branch", "projection"} and self.graph.has_weights(s.region)
        ]
        return "a gate: a product, not a sum" if free and held else None

    def with_addend(self, call: Call, sum_at: Callable[[int], Verdict | None]) -> tuple[int, Verdict] | None:
        """In (x + a) + b, with b made from x too: the shortcut of the inner sum, with b in its branch.

        Args:
            call: a merge that is no shortcut of its own.
            sum_at: the shortcut whose sum a node is, or None.

        Returns:
            The node of the inner sum, and its verdict.
        """
        graph, reader = self.graph, Sides(self.graph, call)
        for i, j in permutations(reader.active, 2) if call.name == "add" else ():
            at, end = reader.position(i), reader.position(j)
            while sum_at(at) is None and graph.kind(at) in WHOLE:
                (at,) = graph.active_parents(at)
            inner = sum_at(at)
            if inner is None or inner.call.name != "add" or graph.ancestors.reaches(at, end):
                continue
            fork = inner.forks[0]
            region = graph.between([fork], end) & ~(1 << fork) if graph.ancestors.reaches(fork, end) else 0
            if graph.has_weights(region):
                branch_at = (*inner.branch_at, Place(call.key, j))
                return at, replace(inner, region=inner.region | region, branch_at=branch_at)
        return None

    def multiplied_out(
        self, verdict: Verdict, sum_at: Callable[[int], Verdict | None]
    ) -> tuple[int, Verdict] | None:
        """In (x - t x) + t H: one gate of two sums, each of them a shortcut to itself.

        Args:
            verdict: the later sum.
            sum_at: the shortcut whose sum a node is, or None.

        Returns:
            The node of the earlier sum, and the verdict on the gate.
        """
        places, gates = verdict.shortcut_at, verdict.kind == "gated" and not verdict.both
        if not gates or len(verdict.bypassing) != 1 or places[0].call == verdict.call.key:
            return None
        node = Sides(self.graph, verdict.call).position(verdict.bypassing[0])
        inner = sum_at(node)
        if (
            inner is None
            or inner.kind != "identity"
            or inner.forks != verdict.forks
            or len(inner.branch_at) != 1
        ):
            return None
        product = self.made.get(id(inner.call.operands[inner.branch_at[0].operand]))
        if product is None or product.key != places[0].call:
            return None
        region = verdict.region | inner.region
        return node, replace(verdict, shortcut_at=(*inner.shortcut_at, *places), region=region)

    # --- which operands bypass ---

    def _bypassing(self, call: Call, sides: dict[int, Side]) -> tuple[int, ...] | str:
        """The operands that skip: those without weights; else scaled; else gated; else normed; else projected."""
        rank = {i: r for i, side in sides.items() if (r := self._rank(side)) is not None}
        if call.name in _calls.LISTS:
            straight = (i for i, r in rank.items() if r <= GATED and not self._takes_largest(sides[i]))
            return tuple(straight) or PARALLEL
        if not rank:
            bent = any(side.how == "bent" for side in sides.values())
            return "a side without weights that is not linear" if bent else PARALLEL
        best = min(rank.values())
        chosen = tuple(i for i, r in rank.items() if r == best)
        rest = [side for i, side in sides.items() if i not in chosen]
        if best == NORMED and not any(self.graph.matrices_in(side.region, enough=1) for side in rest):
            return PARALLEL
        if best == PROJECTED:
            if not any(self._is_deeper(side) for side in rest):
                return PARALLEL
            if any(self._is_low_rank(side, sides[chosen[0]]) for side in rest):
                return "a low-rank update of the same linear map"
            if self._is_score(self.graph.position[call.output if call.whole is None else call.written]):
                return "a sum of attention scores"
        return self._the_first(sides, chosen)

    def _the_first(self, sides: dict[int, Side], chosen: tuple[int, ...]) -> tuple[int, ...]:
        """Of operands that could all bypass those that come from none of the others: x, not its gate, nor F(x)."""

        def is_later(i: int) -> bool:
            at = sides[i].fork or 0
            others = {sides[j].fork or 0 for j in chosen} - {at}
            return any(self.graph.ancestors.reaches(other, at) for other in others)

        return tuple(i for i in chosen if not is_later(i))

    def _rank(self, side: Side) -> int | None:
        if side.fork is None or side.how in {"branch", "bent"}:
            return None
        if side.how == "projection":
            return PROJECTED
        if not self.graph.has_weights(side.region):
            return FREE
        return NORMED if not side.products else GATED if side.how == "gated" else SCALED

    def _is_deeper(self, side: Side) -> bool:
        """Whether a side does more than one linear map: two, one after the other, or one and something bent."""
        graph, region = self.graph, side.region
        matrices = graph.matrices_in(region, enough=2).bit_count() if side.how == "branch" else 0
        if matrices and self._bends(region):
            return True
        passed: set[int] = set()  # what comes after a matrix
        for v in bits(region) if matrices > 1 else ():
            is_after = any(p in passed for p in graph.parents[v])
            if graph.matrices[v] and is_after:
                return True
            if graph.matrices[v] or is_after:
                passed.add(v)
        return False

    def _takes_largest(self, side: Side) -> bool:
        """Whether only the largest values come through: one more of Inception's parallel branches."""
        return any(self.graph.kind(v) in MAX_POOLS for v in bits(side.region))

    def _is_score(self, at: int) -> bool:
        """Whether a softmax makes of it, shifted and scaled at most, one factor of a matrix product."""
        softmaxes = self.graph.onward([at], _PASSING, frozenset({"Softmax"}))
        return bool(self.graph.onward(softmaxes, _PASSING, frozenset({"Bmm", "Mm"})))

    def _bends(self, region: int) -> bool:
        return any(self.graph.kind(v) in BENT for v in bits(region))

    def _is_low_rank(self, side: Side, projection: Side) -> bool:
        """As in LoRA: a linear side whose inner width is less than what the map beside it could pass."""
        if not all(self.graph.kind(v) in _LINEAR for v in bits(side.region)):
            return False
        inner = min((min(shape) for shape in self.graph.matrix_shapes(side.region)), default=0)
        outer = min((min(shape) for shape in self.graph.matrix_shapes(projection.region)), default=0)
        return inner < outer

    # --- what they bypass ---

    def _branch(
        self, reader: Sides, sides: dict[int, Side], bypassing: tuple[int, ...], sharing: bool = False
    ) -> tuple[int, tuple[int, ...] | str]:
        """The branch's nodes and the operands it comes in by, or why there is none.

        With ``sharing`` a bypassing operand of a list may itself depend on the branch (a gate of it).
        """
        graph, call = self.graph, reader.call
        is_list, past = call.name in _calls.LISTS, 0
        for i in bypassing if is_list and not sharing else ():
            past |= graph.ancestors[reader.position(i)]
        region, branches, reason = 0, [], NO_WEIGHTS
        for j in reader.active:
            if j in bypassing or any(i in reader.factors and j in reader.factors for i in bypassing):
                continue
            nodes = 0
            for i in bypassing:
                passed = self._passed(reader, sides[i], j)
                if isinstance(passed, str):
                    reason = passed
                else:
                    nodes |= passed & ~past
            if graph.has_weights(nodes) or (j in reader.factors and call.name in MATRIX_SUMS):
                region |= nodes
                branches.append(j)
        if is_list and not sharing and branches and self._repeats(reader, region, bypassing):
            return region, "steps of one recurrence, side by side"
        if branches and self._is_activation_function(region):
            return region, "an activation function with weights of its own"
        return region, tuple(branches) or reason

    def _passed(self, reader: Sides, side: Side, j: int) -> int | str:
        """The nodes between the fork of a bypassing operand and operand j, or why they do not count."""
        graph, fork = self.graph, side.fork
        if fork is None:
            return "no common ancestor (position embedding, or separate inputs)"
        nodes = self._between(reader, side, fork, j)
        while not isinstance(nodes, str) and not graph.has_weights(nodes) and graph.kind(fork) in WHOLE:
            # A mere view is no place to part: the branch may have left before it.
            (fork,) = graph.active_parents(fork)
            nodes = self._between(reader, side, fork, j)
        return nodes

    def _between(self, reader: Sides, side: Side, fork: int, j: int) -> int | str:
        graph, end = self.graph, reader.position(j)
        starts = [fork]
        taken = {graph.step(v) for v in bits(side.region & graph.children_of(fork))}
        if reader.call.name in _calls.LISTS:
            taken = {None if step is not None and step[0] == PART else step for step in taken}
        if taken and None not in taken:  # steps of a sequence, parts of a tensor: only the same are bypassed
            starts = [v for v in graph.leaving(fork, taken) if graph.ancestors.reaches(v, end)]
            if not starts:
                parts = {step[0] for step in taken if step is not None} == {PART}
                return f"other {'parts of one tensor' if parts else 'steps of one sequence'}"
        nodes = graph.between(starts, end) & ~(1 << fork)
        if reader.call.name in _calls.LISTS and nodes and not self._reaches_past_gates(starts, end, nodes):
            return "only a gate depends on it"
        if side.how == "gated" and nodes and not self._reaches_by_a_weight(starts, end, nodes):
            return "only a factor depends on it"
        return nodes

    def _is_activation_function(self, region: int) -> bool:
        """Whether all its weights are single numbers, and each value goes through by itself."""
        graph = self.graph
        return graph.has_only_scalars(region) and all(graph.kind(v) in POINTWISE for v in bits(region))

    def _reaches_past_gates(self, starts: list[int], end: int, nodes: int) -> bool:
        """Whether ``end`` depends on ``starts`` other than by a sigmoid that multiplies what does not."""
        graph, reached = self.graph, set(starts)
        for v in bits(nodes):
            parents = [p for p in graph.parents[v] if p in reached]
            free = [p for p in graph.active_parents(v) if not nodes >> p & 1 and p not in starts]
            gates = all(graph.kind(p) in {"Sigmoid", "Hardsigmoid"} for p in parents)
            if parents and not (graph.kind(v) == "Mul" and free and gates):
                reached.add(v)
        return end in reached

    def _reaches_by_a_weight(self, starts: list[int], end: int, nodes: int) -> bool:
        """Whether ``end`` depends on ``starts`` other than by a weightless factor of what does not: a router's output
        that multiplies each expert's is no input of the experts.
        """
        graph, reached = (
            self.graph,
            dict.fromkeys(starts, False),
        )  # node -> whether a weight has entered on the way
        for v in bits(nodes):
            parents = [p for p in graph.parents[v] if p in reached]
            free = [p for p in graph.active_parents(v) if not nodes >> p & 1 and p not in starts]
            touched = bool(graph.weights[v]) or any(reached[p] for p in parents)
            if parents and not (graph.kind(v) == "Mul" and free and not touched):
                reached[v] = touched
        return end in reached

    def _repeats(self, reader: Sides, region: int, bypassing: tuple[int, ...]) -> bool:
        """Whether the branch's matrices have all made a bypassing operand before: one module, step after step."""
        graph, ends = self.graph, [reader.position(i) for i in bypassing]
        matrices = list(bits(graph.matrices_in(region)))
        return bool(matrices) and all(
            any(graph.ancestors.reaches(v, end) for v in graph.nodes_of_matrix(m) for end in ends)
            for m in matrices
        )

    # --- the shortcut ---

    def _shortcut(
        self,
        reader: Sides,
        sides: dict[int, Side],
        bypassing: tuple[int, ...],
        branches: tuple[int, ...],
        region: int,
    ) -> Verdict:
        call = reader.call
        side_region = 0
        for i in bypassing:
            side_region |= sides[i].region
        shortcut_at = tuple(self._place(call, i, sides[i]) for i in bypassing)
        branch_at = tuple(Place(call.key, j) for j in self._lesioned(reader, branches))
        if call.whole is not None:
            shortcut_at = self._widened(reader, shortcut_at, sides[bypassing[0]].fork)
            branch_at = self._widened(reader, branch_at, None)
        kind = "concat" if call.name in _calls.LISTS else sides[bypassing[0]].how
        part, both = None, ()
        if call.name == "lerp":
            kind, both = "gated", (2,) if call.tensors[2] else ()
        elif kind in {"branch", "bent"}:  # declared by its author, whatever leads to it
            kind = "identity"
        elif kind == "identity" and (difference := self._difference(reader, bypassing[0], branches)):
            part, x, both, kind = difference
            shortcut_at += (Place(part.key, x),)
            branch_at = (Place(part.key, 1 - x),)
        elif kind == "gated" and set(bypassing) & set(reader.factors):
            both = reader.factors
        multiplied = reader.factors if set(bypassing) & set(reader.factors) else ()
        forks = tuple(f for i in bypassing if (f := sides[i].fork) is not None)
        operands = tuple(sorted({*bypassing, *multiplied}))
        return Verdict(
            call, kind, forks, bypassing, operands, region, side_region, shortcut_at, branch_at, part, both
        )

    def _lesioned(self, reader: Sides, branches: tuple[int, ...]) -> tuple[int, ...]:
        """Of operands that the call multiplies one is enough; a gate inside ``lerp`` stays."""
        if reader.call.name == "lerp":
            return tuple(j for j in branches if j < 2)
        multiplied = [j for j in branches if j in reader.factors]
        return tuple(j for j in branches if j not in multiplied[1:])

    def _place(self, call: Call, i: int, side: Side) -> Place:
        """Where x is met before its factor: the factor stays as built, and its gradient live."""
        for product in side.products:
            made = self.made.get(id(self.graph.nodes[product]))
            if made is not None:
                for k, node in enumerate(made.operands):
                    if node is not None and self._comes_straight(node, side):
                        return Place(made.key, k)
        return Place(call.key, i)

    def _widened(self, reader: Sides, places: tuple[Place, ...], fork: int | None) -> tuple[Place, ...]:
        """An addition into a slice of x is x + F, where F is zero outside the slice: all of x is the operand."""
        first = Place(reader.call.key, 0)
        if first not in places or not reader.carries_whole(fork):
            return places
        return tuple(Place(reader.call.key, _calls.WHOLE) if p == first else p for p in places)

    def _comes_straight(self, node: object, side: Side) -> bool:
        """Whether ``node`` comes from the fork without weights and gates."""
        at, graph = self.graph.position[node], self.graph
        while at != side.fork:
            parents = graph.active_parents(at)
            if graph.weights[at] or len(parents) != 1 or not side.region >> at & 1:
                return False
            at = parents[0]
        return True

    # --- gates with a difference inside ---

    def _difference(
        self, reader: Sides, i: int, branches: tuple[int, ...]
    ) -> tuple[Call, int, tuple[int, ...], str] | None:
        """In x + t (H - x): the call of H - x, which of its operands is x, the operands that carry both sides, and the
        kind: scaled where t does not depend on the data.
        """
        x, signs = reader.position(i), _signs(reader)
        for j in branches:
            inner = self._inner(reader.position(j), x)
            if inner is not None and not self._holds_weights(inner[0].operands[1 - inner[1]], x):
                continue  # x + s (pool(x) - x), as in EfficientFormer: the scale is all that the branch holds
            if inner is not None and inner[2] * signs[j] == -signs[i]:
                both = tuple(reader.factors) if j in reader.factors else (j,)
                is_gate = inner[3] or (
                    all(f in reader.active for f in reader.factors) and bool(reader.factors)
                )
                return *inner[:2], both, "gated" if is_gate else "scaled"
        return None

    def _crossed(self, reader: Sides) -> Verdict | None:
        """H + c (x - H), as recurrent cells have it: here the operand that stands alone is the branch."""
        graph, call, signs = self.graph, reader.call, _signs(reader)
        for i, j in permutations(reader.active, 2):
            end = reader.position(i)
            inner = self._inner(reader.position(j), end)
            if inner is None or inner[2] * signs[j] != -signs[i]:
                continue
            part, h, _, is_gate = inner
            x = graph.position[part.operands[1 - h]]
            region = graph.between([x], end) & ~(1 << x) if graph.ancestors.reaches(x, end) else 0
            if not graph.has_weights(region):
                continue
            region |= graph.between([x], reader.position(j)) & ~(1 << x)
            both = reader.factors if j in reader.factors else (j,)
            at = Place(part.key, 1 - h), Place(call.key, i), Place(part.key, h)
            kind = (
                "gated"
                if is_gate or (reader.factors and all(f in reader.active for f in reader.factors))
                else "scaled"
            )
            return Verdict(call, kind, (x,), (j,), both, region, 0, at[:1], at[1:], part, both)
        return None

    def _holds_weights(self, node: object, x: int) -> bool:
        """Whether a weight enters between node ``x`` and ``node``, or ``node`` does not come from there."""
        at, graph = self.graph.position[node], self.graph
        return not graph.ancestors.reaches(x, at) or graph.has_weights(graph.between([x], at) & ~(1 << x))

    def _inner(self, at: int, x: int) -> tuple[Call, int, int, bool] | None:
        """Back through gates and views to a difference with node ``x``: its call, which operand is x, x's sign, and
        whether a gate was passed that depends on the data.
        """
        graph, waiting, is_gate = self.graph, [(at, 1)], False
        for _ in range(12):
            if not waiting:
                return None
            at, sign = waiting.pop(0)
            call = self.made.get(id(graph.nodes[at]))
            if call is not None and call.name in {"sub", "rsub"} and None not in call.operands:
                for k, node in enumerate(call.operands):
                    if graph.position[node] == x:
                        return call, k, sign if (k == 0) == (call.name == "sub") else -sign, is_gate
            kind = graph.kind(at)
            if kind in ELEMENTWISE or (kind in PRODUCT | SHAPE - _SUMS and not graph.weights[at]):
                parents = graph.active_parents(at)
                is_gate = is_gate or (kind in PRODUCT and len(parents) > 1)
                sign = -sign if kind == "Neg" else sign
                negative = {
                    p for p in parents if len(parents) > 1 and graph.kind(p) == "Neg"
                }  # x + (-t) (x - H)
                waiting += [(p, -sign if negative - {p} else sign) for p in parents]
        return None


_LINEAR = SHAPE | PRODUCT | LINEAR
_PASSING = SHAPE | frozenset({"Mul", "Div", "NativeDropout"})
_SUMS = frozenset({"Add", "Sub", "Rsub"})


def _signs(reader: Sides) -> tuple[int, ...]:
    """The sign that each operand of a merge comes out with."""
    node, name = reader.call.output, reader.call.name
    scale = next(
        (v for a in ("_saved_alpha", "_saved_value") if (v := getattr(node, a, None)) is not None), 1
    )
    sign = 1 if not isinstance(scale, int | float) or scale >= 0 else -1
    if name == "rsub":
        return -sign, 1
    return 1, *[-sign if name == "sub" else sign] * 2
