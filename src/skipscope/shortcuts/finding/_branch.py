"""Find the branch that the bypassing operands of a merge skip, or the reason why there is none."""

from __future__ import annotations

from skipscope.shortcuts.finding._bit_sets import bits
from skipscope.shortcuts.finding._candidate import Reason
from skipscope.shortcuts.finding._couplings import Couplings
from skipscope.shortcuts.finding._gates import Gates
from skipscope.shortcuts.finding._graph import Graph
from skipscope.shortcuts.finding._kinds import (
    ELEMENTWISE,
    MATRIX_SUMS,
    POINTWISE,
    REPEATING,
    STRAIGHT_POINTWISE,
    WHOLE,
)
from skipscope.shortcuts.finding._merge import Merge
from skipscope.shortcuts.finding._parts import Part
from skipscope.shortcuts.finding._products import before_map, before_norm, mapped_from
from skipscope.shortcuts.finding._sides import Side, Sides
from skipscope.shortcuts.trace import _operations

_SUMS = frozenset({"add", "sub", "rsub", "addcmul"})
_ADDING = frozenset({"add", "sub", "rsub"})


class Branches:
    """Finds branches in one graph.

    Args:
        graph: the dataflow.
        gates: reader of its gates.
        couplings: reader of its couplings.
    """

    def __init__(self, graph: Graph, gates: Gates, couplings: Couplings):
        self.graph, self.gates, self.couplings = graph, gates, couplings

    def before_parting(
        self, reader: Sides, sides: dict[int, Side]
    ) -> tuple[dict[int, Side], dict[int, Side]]:
        """Move the fork of a side to x if the side and the branch share a linear map of x.

        Such a side is a projection: W x + F(V x), with W and V in one product; y + t (H(x) - y) with y = W x.

        Returns:
            All sides, some with a moved fork; and the sides that are such a map times a gate, as (1 - t) W x
            in t F(V x) + (1 - t) W x.
        """
        found, maps = dict(sides), {}
        for i, side in sides.items():
            fork = side.fork
            if fork is None or side.how not in {"identity", "scaled", "gated"}:
                continue
            others = [j for j in reader.active if j != i and not {i, j} <= set(reader.factors)]
            between = [self._between(reader, side, fork, j) for j in others]
            if all(nodes in {Reason.OTHER_PARTS, Reason.OTHER_STEPS} for nodes in between):
                above = mapped_from(self.graph, fork, self._taken(reader, side, fork))
                if above is None:
                    continue
                x, region = above
                if side.how != "gated":
                    found[i] = Side(x, "projection", side.region | region)
                else:
                    # A side that no gate multiplies is left unchanged: norm(x) * (1 + scale) beside a shift.
                    for carry, product in reader.gatings(i):
                        maps[i] = Side(x, "gated", side.region | region, (product,), carry=carry)
            elif side.how == "identity" and (above := self._before_norm(reader, i, others)) is not None:
                found[i] = Side(above[0], "scaled", side.region | above[1])
            elif (
                side.how != "gated"
                and reader.call.name in _SUMS
                and not any(
                    nodes if isinstance(nodes, Reason) else self.graph.has_weights(nodes) for nodes in between
                )
            ):
                before = before_map(self.graph, fork, reader.position(others[0]))
                if before is not None:
                    found[i] = Side(before[0], "projection", side.region | before[1])
        return found, maps

    def _before_norm(self, reader: Sides, i: int, others: list[int]) -> tuple[int, int] | None:
        """The node x and the norm's nodes in ``n(x) + t (H - n(x))``, where H depends on x; or None."""
        at = reader.position(i)
        if reader.call.name not in _SUMS or len(others) != 1 or not self.gates.inner(others[0], at, reader):
            return None
        return before_norm(self.graph, at, reader.position(others[0]))

    def of(
        self, reader: Sides, sides: dict[int, Side], bypassing: tuple[int, ...], sharing: bool = False
    ) -> tuple[int, tuple[int, ...] | Reason]:
        """The branch's nodes, and the operands that carry it or the reason why there is none.

        With ``sharing`` a bypassing operand of a list may itself depend on the branch (a gate of it).
        """
        graph, call = self.graph, reader.call
        is_list, past = call.name in _operations.LISTS, 0
        for i in bypassing if is_list and not sharing else ():
            past |= graph.ancestors[reader.position(i)]
        region, branches, reason = 0, [], Reason.NO_WEIGHTS
        for j in reader.active:
            if j in bypassing or any(i in reader.factors and j in reader.factors for i in bypassing):
                continue
            nodes = 0
            for i in bypassing:
                passed = self._passed(reader, sides[i], j)
                if isinstance(passed, Reason):
                    reason = passed
                else:
                    nodes |= passed & ~(past | sides[i].region)
            if graph.has_weights(nodes) or (j in reader.factors and call.name in MATRIX_SUMS):
                region |= nodes
                branches.append(j)
        if is_list and not sharing and branches and self._repeats(reader, region, bypassing):
            return region, Reason.RECURRENCE
        if branches and not graph.has_weights(region) and call.output is not None:
            # The branch is inside the call itself: addmm(x, x, W).
            region |= graph.bit(call.output)
        elif branches and self._is_gain(region):
            return region, Reason.BOTH_LINEAR
        if branches and self._is_activation_function(region):
            return region, Reason.ACTIVATION_FUNCTION
        return region, tuple(branches) or reason

    def _passed(self, reader: Sides, side: Side, j: int) -> int | Reason:
        """The nodes between the fork of a bypassing operand and operand j, or why they are not a branch."""
        graph, fork = self.graph, side.fork
        if fork is None:
            return Reason.UNRELATED
        nodes = self._between(reader, side, fork, j)
        while not isinstance(nodes, Reason) and not graph.has_weights(nodes) and graph.kind(fork) in WHOLE:
            # A view cannot be the fork: the branch may start from the tensor before it.
            (fork,) = graph.active_parents(fork)
            nodes = self._between(reader, side, fork, j)
        return nodes

    def _between(self, reader: Sides, side: Side, fork: int, j: int) -> int | Reason:
        graph, end = self.graph, reader.position(j)
        starts = [fork]
        taken = self._taken(reader, side, fork)
        # A side that takes parts of the fork bypasses only nodes computed from the same parts.
        if taken and all(part.limits for part in taken):
            starts = [v for v in graph.leaving(fork, taken) if graph.ancestors.reaches(v, end)]
            if not starts and not self.couplings.puts_back(reader.call, fork):
                is_step = all(len(run) == 1 for part in taken for run in part.limits.values())
                is_sequence = is_step and mapped_from(graph, fork, taken) is None
                return Reason.OTHER_STEPS if is_sequence else Reason.OTHER_PARTS
            starts = starts or [fork]
        nodes = graph.between(starts, end) & ~(1 << fork)
        if (
            reader.call.name in _operations.LISTS
            and nodes
            and not self.gates.reaches_past_gates(starts, end, nodes)
        ):
            return Reason.ONLY_A_GATE
        if side.how == "gated" and nodes and not self.gates.reaches_by_a_weight(starts, end, nodes):
            return Reason.ONLY_A_FACTOR
        return nodes

    def _taken(self, reader: Sides, side: Side, fork: int) -> list[Part]:
        """The parts of the fork that a side takes; empty if it takes the whole.

        A concatenation of parts along the axis along which they were cut counts as the whole, some of which
        went through the branch, unless a part is mixed with itself (rotary positions) or repeated per head.
        """
        graph, call = self.graph, reader.call
        region = side.region
        if not region & graph.children_of(fork):
            return []
        # A gate may be computed from another part than the one that it multiplies.
        if side.how == "gated":
            carried = reader.carried(side)
            region = carried if carried & graph.children_of(fork) else region
        taken = graph.parts_taken(fork, region)
        dim = graph.joined_axis(call) if call.name != "stack" else None
        if dim is None or self._is_mixed(region) or self._is_broadcast(call, dim, region):
            return taken
        return [] if any(part.axis_along(dim) for part in taken) else taken

    def _is_mixed(self, region: int) -> bool:
        """Whether a region repeats values, or adds several activations."""
        added = bits(region & self.graph.of_kinds(_ADDING))
        return bool(region & self.graph.of_kinds(REPEATING)) or any(
            len(self.graph.active_parents(v)) > 1 for v in added
        )

    def _is_broadcast(self, call: Merge, dim: int, region: int) -> bool:
        """Whether a call broadcasts an operand that ends in a region along an axis other than ``dim``."""
        graph, rest = self.graph, []
        for node in (call.output, *call.operands):
            if node is not None and (node == call.output or region >> node & 1):
                shape = graph.shape(node)
                rest.append((*shape[:dim], *shape[dim + 1 :]))
        return any(shape != rest[0] for shape in rest[1:])

    def _is_gain(self, region: int) -> bool:
        """Whether a region only scales each value by weights: x + (m - 1) x is m x."""
        curves = region & ~self.graph.of_kinds(STRAIGHT_POINTWISE)
        return not curves and not self._multiplies_activations(region)

    def _multiplies_activations(self, region: int) -> bool:
        products = bits(region & self.graph.of_kinds(ELEMENTWISE))
        return any(len(self.graph.active_parents(v)) > 1 for v in products)

    def _is_activation_function(self, region: int) -> bool:
        """Whether a region is an elementwise function whose weights are scalars or enter a nonlinearity.

        Snake, x + sin(a x)^2 / a, is an activation function; in x + g tanh(x) with a gain per channel, g tanh
        is a branch.
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
        """Whether every matrix of the branch also enters a bypassing operand, as in a recurrence."""
        graph, ends = self.graph, [reader.position(i) for i in bypassing]
        matrices = list(bits(graph.matrices_in(region)))
        return bool(matrices) and all(
            any(graph.ancestors.reaches(v, end) for v in graph.nodes_of_matrix(m) for end in ends)
            for m in matrices
        )
