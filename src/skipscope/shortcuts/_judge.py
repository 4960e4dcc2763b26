"""The verdict on one merge: a shortcut of some kind, or the reason why it is none."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from operator import or_

from skipscope.shortcuts import _calls
from skipscope.shortcuts._branch import Branches
from skipscope.shortcuts._bypass import PROJECTED, Bypass
from skipscope.shortcuts._couplings import Couplings
from skipscope.shortcuts._expanded import Expanded
from skipscope.shortcuts._gates import Gates
from skipscope.shortcuts._graph import Graph
from skipscope.shortcuts._mixtures import Mixtures
from skipscope.shortcuts._record import Call
from skipscope.shortcuts._results import Place
from skipscope.shortcuts._sides import Side, Sides
from skipscope.shortcuts._verdict import NO_WEIGHTS, PARALLEL, Verdict

_BY_WEIGHT = ("identity", "scaled", "gated")


class Judge:
    """Judges the merges of one graph.

    Attributes:
        gates: what judges several calls together.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.made = {id(call.output): call for call in graph.record.calls if call.output is not None}
        self.gates, self.expanded = Gates(graph, self.made), Expanded(graph, self.made)
        self.mixtures, self.bypass = Mixtures(graph, self.made), Bypass(graph)
        self.branches = Branches(graph, self.gates, Couplings(graph, self.made))

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
        bypassing = (0,) if call.name.startswith("marked ") else self.bypass.operands(call, sides)
        if isinstance(bypassing, str):
            return bypassing
        region, branches = self.branches.of(reader, sides, bypassing)
        if branches == NO_WEIGHTS and call.name in _calls.LISTS:
            # Several may come from one branch, and share its weights: x is what comes from none of the others.
            bypassing = tuple(i for i in self.bypass.the_first(sides, bypassing) if not sides[i].is_sum)
            region, branches = self.branches.of(reader, sides, bypassing, sharing=True)
        if isinstance(branches, str):
            return branches
        is_projection = (
            not call.name.startswith("marked ") and self.bypass.rank(sides[bypassing[0]]) == PROJECTED
        )
        if is_projection and not self.bypass.is_deeper(
            region
        ):  # g(c) h(x) + b(c): two linear maps of c, side by side
            return PARALLEL
        return self._shortcut(reader, sides, bypassing, branches, region)

    def _shortcut(
        self,
        reader: Sides,
        sides: dict[int, Side],
        bypassing: tuple[int, ...],
        branches: tuple[int, ...],
        region: int,
    ) -> Verdict:
        call = reader.call
        shortcut_at = tuple(self._place(call, i, sides[i]) for i in bypassing)
        branch_at = tuple(Place(call.key, j) for j in self._lesioned(reader, branches))
        if call.whole is not None:
            shortcut_at = self._widened(reader, shortcut_at, sides[bypassing[0]].fork)
            branch_at = self._widened(reader, branch_at, None)
        plain = Verdict(
            call=call,
            kind="concat" if call.name in _calls.LISTS else sides[bypassing[0]].how,
            forks=tuple(f for i in bypassing if (f := sides[i].fork) is not None),
            bypassing=bypassing,
            shortcut_operands=tuple(sorted({*bypassing, *self._multiplied(reader, bypassing)})),
            region=region,
            side_region=reduce(or_, (sides[i].region for i in bypassing)),
            shortcut_at=shortcut_at,
            branch_at=branch_at,
        )
        return self._as_written(reader, sides, branches, plain)

    def _as_written(
        self, reader: Sides, sides: dict[int, Side], branches: tuple[int, ...], plain: Verdict
    ) -> Verdict:
        """The verdict, where the way in which the merge is written says more than that it adds its operands."""
        call, bypassing = reader.call, plain.bypassing
        if call.name == "where":
            return replace(plain, kind="gated")
        if call.name == "lerp":
            kind = "gated" if 2 in reader.active else "scaled"
            return replace(plain, kind=kind, both=(2,) if call.tensors[2] else ())
        if call.name in _calls.LISTS and (mixture := self.mixtures.of(call)) is not None:
            kind = max(mixture.kind, *(sides[i].how for i in bypassing), key=_BY_WEIGHT.index)
            both = tuple(i for i, is_tensor in enumerate(call.tensors) if is_tensor and mixture.alone)
            return replace(plain, kind=kind, both=both, mixture=mixture)
        if plain.kind in {"branch", "bent"}:  # declared by its author, whatever leads to it
            return replace(plain, kind="identity")
        if plain.kind == "identity" and (found := self.gates.difference(reader, bypassing[0], branches)):
            part, x, both, kind = found
            at = (*plain.shortcut_at, Place(part.key, x))
            return replace(
                plain,
                kind=kind,
                shortcut_at=at,
                branch_at=(Place(part.key, 1 - x),),
                parts=(part,),
                both=both,
            )
        return replace(plain, both=self._multiplied(reader, bypassing)) if plain.kind == "gated" else plain

    def _multiplied(self, reader: Sides, bypassing: tuple[int, ...]) -> tuple[int, ...]:
        """What the call multiplies with a bypassing operand, and that itself."""
        return reader.factors if set(bypassing) & set(reader.factors) else ()

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
