"""Classify a merge: a shortcut of some kind, or the reason why it is not a shortcut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_

from skipscope.shortcuts._shortcut_result import KINDS, Kind, Place
from skipscope.shortcuts.finding._branch import Branches
from skipscope.shortcuts.finding._bypass import CHAINED, PROJECTED, Bypass
from skipscope.shortcuts.finding._candidate import Candidate, Reason
from skipscope.shortcuts.finding._couplings import Couplings
from skipscope.shortcuts.finding._expanded import Expanded
from skipscope.shortcuts.finding._gates import Gates
from skipscope.shortcuts.finding._graph import Graph
from skipscope.shortcuts.finding._kinds import ENLARGING
from skipscope.shortcuts.finding._merge import Merge
from skipscope.shortcuts.finding._mixtures import Mixtures
from skipscope.shortcuts.finding._routes import Routes
from skipscope.shortcuts.finding._sides import Role, Side, Sides, is_scaled
from skipscope.shortcuts.trace import _operations

_BY_ROLE: dict[Role, Kind] = {"linear maps": "projection", "branch": "identity", "bent": "identity"}


@dataclass(eq=False)
class _Case:
    """One merge, and the findings of the rules applied so far.

    Attributes:
        reader: reader of its operands.
        sides: for each operand that is an activation, its side.
        maps: for each operand that is a part of a linear map times a gate, that side.
        bypassing: the operands that skip the branch.
        branches: the operands that carry the branch.
        region: bit set of the branch's nodes.
    """

    reader: Sides
    sides: dict[int, Side] = field(default_factory=dict)
    maps: dict[int, Side] = field(default_factory=dict)
    bypassing: tuple[int, ...] = ()
    branches: tuple[int, ...] = ()
    region: int = 0

    @property
    def call(self) -> Merge:
        """The merge."""
        return self.reader.call

    @property
    def is_list(self) -> bool:
        """Whether it concatenates or stacks its operands."""
        return self.call.name in _operations.LISTS

    @property
    def is_declared(self) -> bool:
        """Whether its author declared the two sides by ``mark_shortcut``."""
        return self.call.name.startswith("marked ")


class Judge:
    """Classifies the merges of one graph, by the rules in ``RULES``, one after the other.

    Attributes:
        gates: reader of shortcuts that span several calls.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.made = {call.output: call for call in graph.merges if call.output is not None}
        self.gates, self.expanded = Gates(graph, self.made), Expanded(graph, self.made)
        self.mixtures, self.bypass = Mixtures(graph, self.made), Bypass(graph)
        self.routes = Routes(graph, self.made)
        self.branches = Branches(graph, self.gates, Couplings(graph, self.made))

    def verdict(self, call: Merge) -> Candidate | Reason | None:
        """Classify one merge.

        Returns:
            The result of the first rule that decides: a candidate, or the reason why it is not a shortcut.
            None if fewer than two operands are activations, or for a product that is not a gate.
        """
        case = _Case(Sides(self.graph, call))
        if len(case.reader.active) < 2:
            is_addition = call.name == "add" and case.reader.active and None not in call.operands
            return Reason.WEIGHT if is_addition else None
        for rule in RULES:
            if (decided := rule(self, case)) is not None:
                return decided
        return None

    # --- the rules, in order ---

    def leads_out(self, case: _Case) -> Reason | None:
        """Reject a merge whose result does not reach an output (a log, a stopping test)."""
        return Reason.NOWHERE if case.call.output is None else None

    def multiplied_out_gate(self, case: _Case) -> Candidate | None:
        """Accept x - t x + t H, spread over several sums."""
        return self.expanded.gate(case.call)

    def stacked(self, case: _Case) -> Reason | None:
        """Reject a stack that is not summed."""
        if case.call.put is not None:
            return Reason.STACKED if case.call.put.is_step else None
        return Reason.STACKED if case.call.name == "stack" and not self._is_summed(case.call) else None

    def _is_summed(self, call: Merge) -> bool:
        """Whether a call is a concatenation or stack that is later summed."""
        return call.put is None and self.mixtures.of(call) is not None

    def related(self, case: _Case) -> Reason | None:
        """Reject a product that is a gate, and operands that share no ancestor."""
        case.sides, case.maps = case.reader.read(), {}
        if not case.is_list or self._is_summed(case.call):
            case.sides, case.maps = self.branches.before_parting(case.reader, case.sides)
        if case.call.name in _operations.PRODUCTS:
            return self.gates.product(case.sides)
        return Reason.UNRELATED if all(side.fork is None for side in case.sides.values()) else None

    def crossed_gate(self, case: _Case) -> Candidate | None:
        """Accept H + c (x - H), where the operand without a gate is the branch."""
        if case.call.name in _operations.LISTS | _operations.PRODUCTS | {"where"}:
            return None
        return self.gates.crossed(case.reader)

    def gated_projection(self, case: _Case) -> Reason | None:
        """Let a gated linear map bypass if no operand bypasses without weights: t H + (1 - t) W x."""
        reader, sides = case.reader, case.sides
        if case.call.name not in {"add", "addcmul"} or case.is_declared:
            return None
        maps = {**reader.gated_maps(), **case.maps}
        for i, side in maps.items():
            others = [j for j in reader.active if j != i and not {i, j} <= set(reader.factors)]
            # The other side is a branch, or only its gate can be traced back without weights.
            beside = all(
                sides[j].how == "branch" or (sides[j].how == "gated" and sides[j].fork != side.fork)
                for j in others
            )
            if (
                beside
                and not maps.keys() & set(others)
                and any(self._is_deep(reader, side, j) for j in others)
            ):
                case.sides, case.bypassing = {**sides, i: side}, (i,)
                return None
        return None

    def _is_deep(self, reader: Sides, side: Side, j: int) -> bool:
        """Whether operand j, without its gate, is more than a linear map of the fork of a side."""
        ends = [carry for carry, _ in reader.gatings(j)] or [reader.position(j)]
        fork = side.fork
        return fork is not None and any(
            self.bypass.is_deeper(self.graph.inside_of(fork, end)) for end in ends
        )

    def bypassed(self, case: _Case) -> Reason | None:
        """Reject a merge without a bypassing operand."""
        if case.call.name in _operations.PRODUCTS or case.bypassing:
            return None
        is_summed = case.is_list and self._is_summed(case.call)
        found = (0,) if case.is_declared else self.bypass.operands(case.call, case.sides, is_summed)
        if isinstance(found, Reason):
            return found
        case.bypassing = found
        return None

    def routed(self, case: _Case) -> Reason | None:
        """Reject masked routes: a mask selects one block and its complement another, so no token skips."""
        are_parallel = any(self.routes.are_parallel(case.call, i) for i in case.bypassing)
        return Reason.PARALLEL if are_parallel else None

    def branch(self, case: _Case) -> Reason | None:
        """Reject a merge whose bypassed nodes hold no weights."""
        if not case.bypassing:
            return None
        case.region, branches = self.branches.of(case.reader, case.sides, case.bypassing)
        if branches is Reason.NO_WEIGHTS and case.call.name in _operations.LISTS:
            # Several operands may come from one branch and share its weights. Keep only the operand that
            # depends on no other, x.
            first = self.bypass.the_first(case.sides, case.bypassing)
            case.bypassing = tuple(i for i in first if not case.sides[i].is_sum)
            case.region, branches = self.branches.of(case.reader, case.sides, case.bypassing, sharing=True)
        if isinstance(branches, Reason):
            return branches
        case.branches = branches
        return None

    def deeper_than_a_projection(self, case: _Case) -> Reason | None:
        """Reject a projection beside a branch that is only linear: g(c) h(x) + b(c) is two maps of c."""
        if not case.bypassing or case.is_declared:
            return None
        is_projection = self.bypass.rank(case.sides[case.bypassing[0]]) in {PROJECTED, CHAINED}
        return Reason.PARALLEL if is_projection and not self.bypass.is_deeper(case.region) else None

    def shortcut(self, case: _Case) -> Candidate | None:
        """Accept any merge that no earlier rule has rejected."""
        if not case.bypassing:
            return None
        return self._shortcut(case.reader, case.sides, case.bypassing, case.branches, case.region)

    # --- helpers, not rules ---

    def passed(self, call: Merge) -> Candidate | None:
        """Find a decoder's concatenation whose skip passes a block with weights (UNETR, DeepLabV3+).

        The deeper side contains an upsampling, and the skip passes fewer weights in sequence. None for any
        other merge.
        """
        reader = Sides(self.graph, call)
        if call.name not in _operations.LISTS - {"stack"} or len(reader.active) != 2 or call.output is None:
            return None
        sides = reader.read()
        depths = {i: self.graph.depth(side.region) for i, side in sides.items()}
        skip, deep = sorted(reader.active, key=depths.__getitem__)
        fork, end = sides[skip].fork, reader.position(deep)
        if fork is None or not 0 < depths[skip] < depths[deep] or not self.graph.ancestors.reaches(fork, end):
            return None
        region = self.graph.inside_of(fork, end)
        if not region & self.graph.of_kinds(ENLARGING):
            return None
        at, branch = Place(call.key, skip), Place(call.key, deep)
        return Candidate(
            call, "concat", (fork,), (skip,), (skip,), region, sides[skip].region, (at,), (branch,)
        )

    def _shortcut(
        self,
        reader: Sides,
        sides: dict[int, Side],
        bypassing: tuple[int, ...],
        branches: tuple[int, ...],
        region: int,
    ) -> Candidate:
        call = reader.call
        shortcut_at = tuple(self._place(call, i, sides[i]) for i in bypassing)
        branch_at = tuple(self._branch_place(call, j) for j in self._lesioned(reader, branches))
        if call.whole is not None:
            shortcut_at = self._widened(reader, shortcut_at, sides[bypassing[0]].fork)
            branch_at = self._widened(reader, branch_at, None)
        plain = Candidate(
            call=call,
            kind=_kind(call, sides[bypassing[0]].how, bypassing[0]),
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
        self, reader: Sides, sides: dict[int, Side], branches: tuple[int, ...], plain: Candidate
    ) -> Candidate:
        """Refine a candidate whose merge is more than a plain sum: a gate, a ``lerp``, a mixture."""
        call, bypassing = reader.call, plain.bypassing
        if call.name == "where":
            return replace(plain, kind="gated")
        if call.name == "lerp":
            kind = "gated" if 2 in reader.active else "scaled"
            return replace(plain, kind=kind, both=(2,) if call.tensors[2] else ())
        if call.put is None and call.name in _operations.LISTS and (mixture := self.mixtures.of(call)):
            kind = max(
                mixture.kind,
                *(_BY_ROLE.get(sides[i].how, sides[i].how) for i in bypassing),
                key=KINDS.index,
            )
            both = tuple(i for i, is_tensor in enumerate(call.tensors) if is_tensor and mixture.alone)
            return replace(plain, kind=kind, both=both, mixture=mixture)
        side = sides[bypassing[0]]
        if side.how in {"branch", "bent"}:
            return plain
        is_normed = side.how == "scaled" and not side.products
        if (plain.kind in {"identity", "projection"} or is_normed) and (
            found := self.gates.difference(reader, bypassing[0], branches)
        ):
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
        """The operands that the call multiplies, if a bypassing operand is among them; else ()."""
        return reader.factors if set(bypassing) & set(reader.factors) else ()

    def _lesioned(self, reader: Sides, branches: tuple[int, ...]) -> tuple[int, ...]:
        """The operands to edit in a lesion: one factor of a product is enough; ``lerp``'s weight stays."""
        if reader.call.name == "lerp":
            return tuple(j for j in branches if j < 2)
        multiplied = [j for j in branches if j in reader.factors]
        return tuple(j for j in branches if j not in multiplied[1:])

    def _place(self, call: Merge, i: int, side: Side) -> Place:
        """The place where x can be edited before its factor; the factor and its gradient stay as built."""
        if call.put is not None and i == 0 and call.traced.whole is not None:
            return Place(call.key, _operations.WHOLE)
        for product in () if side.is_sum else side.products:
            made = self.made.get(product)
            if made is not None:
                for k, node in enumerate(made.operands):
                    if node is not None and (node == side.carry or self._comes_straight(node, side)):
                        return Place(made.key, k)
        return Place(call.key, i)

    def _branch_place(self, call: Merge, j: int) -> Place:
        """The place where a branch is edited; for a write into a part, the whole tensor."""
        is_whole = call.put is not None and j == 0 and call.traced.whole is not None
        return Place(call.key, _operations.WHOLE if is_whole else j)

    def _widened(self, reader: Sides, places: tuple[Place, ...], fork: int | None) -> tuple[Place, ...]:
        """Replace an edit of a part of x by an edit of all of x: the addition is x + F, F zero elsewhere."""
        call = reader.call
        part = Place(call.key, call.part)
        if part not in places or not reader.carries_whole(fork):
            return places
        if call.assigned_at is not None:
            return (*places, call.assigned_at)
        return tuple(Place(call.key, _operations.WHOLE) if p == part else p for p in places)

    def _comes_straight(self, at: int, side: Side) -> bool:
        """Whether a node was computed from the fork without weights and gates."""
        graph = self.graph
        while at != side.fork:
            parents = graph.active_parents(at)
            if graph.weights[at] or len(parents) != 1 or not side.region >> at & 1:
                return False
            at = parents[0]
        return True


def _kind(call: Merge, role: Role, bypassing: int) -> Kind:
    """The kind of a shortcut by the role of its operand."""
    if call.name in _operations.LISTS:
        return "gated" if call.put is not None and call.put.is_chosen else "concat"
    # A side with such a role bypasses only because the author declared it by mark_shortcut.
    if role in ("branch", "bent"):
        return "identity"
    if role == "linear maps":
        return "projection"
    return "scaled" if role == "identity" and is_scaled(call, bypassing) else role


# Each rule returns a candidate, a reason for rejection, or None if it does not decide.
RULES: tuple[Callable[[Judge, _Case], Candidate | Reason | None], ...] = (
    Judge.leads_out,
    Judge.multiplied_out_gate,
    Judge.stacked,
    Judge.related,
    Judge.crossed_gate,
    Judge.gated_projection,
    Judge.bypassed,
    Judge.routed,
    Judge.branch,
    Judge.deeper_than_a_projection,
    Judge.shortcut,
)
