"""The verdict on one merge: a shortcut of some kind, or the reason why it is none."""

from __future__ import annotations

from skipscope.shortcuts import _calls
from skipscope.shortcuts._bits import bits
from skipscope.shortcuts._couplings import Couplings
from skipscope.shortcuts._expanded import Expanded
from skipscope.shortcuts._gates import Gates
from skipscope.shortcuts._graph import Graph
from skipscope.shortcuts._mixtures import Mixture, Mixtures
from skipscope.shortcuts._parts import Part
from skipscope.shortcuts._record import Call
from skipscope.shortcuts._results import Place
from skipscope.shortcuts._sides import (
    BENT,
    LINEAR,
    MATRIX_SUMS,
    MAX_POOLS,
    POINTWISE,
    PRODUCT,
    SHAPE,
    STRAIGHT_POINTWISE,
    WHOLE,
    Side,
    Sides,
)
from skipscope.shortcuts._verdict import Verdict

PARALLEL, NO_WEIGHTS = "parallel branches", "no weights on either side"
FREE, SCALED, GATED, NORMED, PROJECTED = range(5)  # of several ways past a branch, the first is the shortcut
_BY_WEIGHT = ("identity", "scaled", "gated")
_LINEAR = SHAPE | PRODUCT | LINEAR
_PASSING = SHAPE | frozenset({"Mul", "Div", "NativeDropout"})


class Judge:
    """Judges the merges of one graph.

    Attributes:
        gates: what judges several calls together.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.made = {id(call.output): call for call in graph.record.calls if call.output is not None}
        self.gates, self.expanded = Gates(graph, self.made), Expanded(graph, self.made)
        self.mixtures, self.couplings = Mixtures(graph, self.made), Couplings(graph, self.made)

    def verdict(self, call: Call) -> Verdict | str | None:
        """A shortcut, a reason why not, or None for what is no merge of activations at all."""
        reader = Sides(self.graph, call)
        if len(reader.active) < 2:
            is_addition = call.name == "add" and reader.active and None not in reader.at
            return "an activation and a weight (position embedding or bias)" if is_addition else None
        if (gate := self.expanded.gate(call)) is not None:
            return gate
        if call.name == "stack" and self.mixtures.of(call) is None:
            return "stacked side by side"
        sides = reader.read()
        if call.name in _calls.PRODUCTS:
            return self.gates.product(sides)
        if all(side.fork is None for side in sides.values()):
            return "no common ancestor (position embedding, or separate inputs)"
        if call.name not in _calls.LISTS | {"where"} and (crossed := self.gates.crossed(reader)) is not None:
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
        is_projection = not call.name.startswith("marked ") and self._rank(sides[bypassing[0]]) == PROJECTED
        if is_projection and not self._is_deeper(region):  # g(c) h(x) + b(c): two linear maps of c, side by side
            return PARALLEL
        return self._shortcut(reader, sides, bypassing, branches, region)

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
        if call.name == "where" and best > GATED:
            return PARALLEL
        if best == NORMED and not any(self.graph.matrices_in(side.region, enough=1) for side in rest):
            return PARALLEL
        if best == PROJECTED:
            if not any(side.how == "branch" and self._is_deeper(side.region) for side in rest):
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

    def _is_deeper(self, region: int) -> bool:
        """Whether a set of nodes does more than one linear map: two, one after the other, or one and something bent."""
        graph = self.graph
        matrices = graph.matrices_in(region, enough=2).bit_count()
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
        return bool(side.region & self.graph.of_kinds(MAX_POOLS))

    def _is_score(self, at: int) -> bool:
        """Whether a softmax makes of it, shifted and scaled at most, one factor of a matrix product; or of v . tanh of it,
        as in additive attention, one factor of a product.
        """
        softmaxes, ends = self.graph.onward([at], _PASSING, frozenset({"Softmax"})), {"Bmm", "Mm"}
        if not softmaxes:
            softmaxes, ends = self._additive_scores(at), {"Bmm", "Mm", "Mul"}
        return bool(self.graph.onward(softmaxes, _PASSING, frozenset(ends)))

    def _additive_scores(self, at: int) -> list[int]:
        """The softmax of v . tanh(sum), where that is all the sum is for."""
        passed = ""
        while len(children := self.graph.children[at]) == 1:
            (at,) = children
            kind = self.graph.kind(at)
            if kind == "Softmax" and passed == "tanh, v":
                return [at]
            passed = (
                "tanh" if kind == "Tanh" else "tanh, v" if kind in LINEAR and passed == "tanh" else passed
            )
            if kind not in SHAPE | LINEAR | {"Tanh"}:
                break
        return []

    def _bends(self, region: int) -> bool:
        return bool(region & self.graph.of_kinds(BENT))

    def _is_low_rank(self, side: Side, projection: Side) -> bool:
        """As in LoRA: a linear side whose inner width is less than what the map beside it could pass."""
        if side.region & ~self.graph.of_kinds(_LINEAR):
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
        taken = self._taken(reader, side, fork)
        if taken and all(part.limits for part in taken):  # then only the same parts are bypassed
            starts = [v for v in graph.leaving(fork, taken) if graph.ancestors.reaches(v, end)]
            if not starts and all(len(run) == 1 for part in taken for run in part.limits.values()):
                return "other steps of one sequence"
            if not starts and not self.couplings.puts_back(reader.call, fork):
                return "other parts of one tensor"
            starts = starts or [fork]
        nodes = graph.between(starts, end) & ~(1 << fork)
        if (
            reader.call.name in _calls.LISTS
            and nodes
            and not self.gates.reaches_past_gates(starts, end, nodes)
        ):
            return "only a gate depends on it"
        if side.how == "gated" and nodes and not self.gates.reaches_by_a_weight(starts, end, nodes):
            return "only a factor depends on it"
        return nodes

    def _taken(self, reader: Sides, side: Side, fork: int) -> list[Part]:
        """The parts of the fork that a side takes. In a list part beside part, along the axis that they are parts of, is
        the whole with some of it gone through the branch.
        """
        graph, call = self.graph, reader.call
        if not side.region & graph.children_of(fork):
            return []
        taken = graph.parts_taken(fork, side.region)
        dim = getattr(call.output, "_saved_dim", None) if call.name in _calls.LISTS - {"stack"} else None
        return [] if dim is not None and any(part.axis_along(dim) for part in taken) else taken

    def _is_activation_function(self, region: int) -> bool:
        """Whether each value goes through by itself, and what it meets are single numbers, or shape how it is bent.

        Snake, x + sin(a x)^2 / a, is one; x + g tanh(x) with a gain for each channel is a branch that holds gains.
        """
        graph = self.graph
        if region & ~graph.of_kinds(POINTWISE):
            return False
        if graph.has_only_scalars(region):
            return True
        curves = list(bits(region & ~graph.of_kinds(STRAIGHT_POINTWISE)))
        weighted = [v for v in bits(region) if graph.has_weights(1 << v)]
        return any(graph.ancestors.reaches(v, curve) for v in weighted for curve in curves)

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
        parts: tuple[Call, ...] = ()
        both: tuple[int, ...] = ()
        mixture: Mixture | None = None
        if call.name == "where":
            kind = "gated"
        elif call.name == "lerp":
            kind, both = "gated" if 2 in reader.active else "scaled", (2,) if call.tensors[2] else ()
        elif call.name in _calls.LISTS and (mixture := self.mixtures.of(call)) is not None:
            kind = max(mixture.kind, *(sides[i].how for i in bypassing), key=_BY_WEIGHT.index)
            both = tuple(i for i, is_tensor in enumerate(call.tensors) if is_tensor and mixture.alone)
        elif kind in {"branch", "bent"}:  # declared by its author, whatever leads to it
            kind = "identity"
        elif kind == "identity" and (difference := self.gates.difference(reader, bypassing[0], branches)):
            part, x, both, kind = difference
            parts = (part,)
            shortcut_at += (Place(part.key, x),)
            branch_at = (Place(part.key, 1 - x),)
        elif kind == "gated" and set(bypassing) & set(reader.factors):
            both = reader.factors
        multiplied = reader.factors if set(bypassing) & set(reader.factors) else ()
        forks = tuple(f for i in bypassing if (f := sides[i].fork) is not None)
        operands = tuple(sorted({*bypassing, *multiplied}))
        return Verdict(
            call,
            kind,
            forks,
            bypassing,
            operands,
            region,
            side_region,
            shortcut_at,
            branch_at,
            parts,
            both,
            mixture,
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
        """An addition to a part of x is x + F, where F is zero outside the part: all of x is the operand."""
        call = reader.call
        part = Place(call.key, call.part)
        if part not in places or not reader.carries_whole(fork):
            return places
        if call.assigned_at is not None:
            return (*places, call.assigned_at)
        return tuple(Place(call.key, _calls.WHOLE) if p == part else p for p in places)

    def _comes_straight(self, node: object, side: Side) -> bool:
        """Whether ``node`` comes from the fork without weights and gates."""
        at, graph = self.graph.position[node], self.graph
        while at != side.fork:
            parents = graph.active_parents(at)
            if graph.weights[at] or len(parents) != 1 or not side.region >> at & 1:
                return False
            at = parents[0]
        return True
