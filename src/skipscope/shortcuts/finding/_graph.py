"""Dataflow graph of a trace: which activation depends on which other activations and on which weights.

A node is a value of the trace. Activations are numbered first, so that a Python integer can serve as a dense
bit set of them; values computed from weights alone follow. Constants, token ids and masks are not nodes.
Values that do not lead to an output of the model are left out, unless another execution of the same line of
code does (the last step of a loop).
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from skipscope.shortcuts._shortcut_result import Place
from skipscope.shortcuts.finding._bit_sets import Ancestors, as_bits, bits, chosen
from skipscope.shortcuts.finding._kinds import INVERSES, LENGTHS, NORM, REPEATING, WHOLE
from skipscope.shortcuts.finding._merge import Merge, Put
from skipscope.shortcuts.finding._parts import Cuts, Part, part_after, part_put, takes_everything, whole
from skipscope.shortcuts.trace import Operand, Origin, Trace, TracedCall, Value, _operations

_AXES = {"hstack": 1, "column_stack": 1, "vstack": 0, "dstack": 2}
_WRITES = {"write", "write_all", "slice_scatter", "select_scatter", "diagonal_scatter", "index_copy"}
_SCALING = WHOLE | {"sub", "mul", "div"}
_OF_TWO = {"min": "minimum", "max": "maximum"}


class Graph:
    """The dataflow of a trace.

    Args:
        trace: the record of one forward pass.
        model: the model that was traced.
        streams: values that begin in weights but count as activations -> path of the module they come from.

    Attributes:
        values: for each node its value in the trace. Activations come first, in topological order.
        node: value of the trace -> its node.
        parents: for each node, the nodes it was computed from.
        activations: number of activations; node i is an activation if ``i < activations``.
        merges: the calls that join tensors, in order.
        modules: paths of all modules; bit i of a weight set stands for ``modules[i]``.
        weights: for each node, the set of modules whose weights enter there.
        matrices: as ``weights``, for weights of two or more dimensions only.
        ancestors: for each activation, the bit set of the activations it was computed from and itself.
        producers: node -> path of the innermost module that returned it.
        sources: node where activations begin -> ``"input"``, or the path of the module that looks up ids.
        runs: runs of modules with weights of their own, in the order in which they ended.
    """

    def __init__(self, trace: Trace, model: nn.Module, streams: Mapping[int, str] | None = None):
        self.trace, self.streams = trace, dict(streams or {})
        self._name_modules(model)
        self._same = self._seen_through()
        active, weights, matrices = self._classify_values()
        kept = self._leading_out(active, weights)
        order = [v for v in kept if active[v]] + [v for v in kept if not active[v]]
        self.values = order
        self.node = {value: i for i, value in enumerate(order)}
        self.activations = n = sum(active[v] for v in kept)
        self._kinds = [self._kind(trace.values[v]) for v in order]
        self._masks: dict[frozenset[str], int] = {}
        self._used: dict[int, dict[int, int]] = {}
        self.parents = [tuple(self.node[p] for p in self._operands(v, active, weights)) for v in order]
        self.weights, self.matrices = [weights[v] for v in order], [matrices[v] for v in order]
        self._active_parents = [[p for p in above if p < n] for above in self.parents]
        self.ancestors = Ancestors(self.parents[:n])
        self.weighted = as_bits(self.weights[:n])
        self._count_uses()
        self._sets: dict[int, int] = {}
        self._known_cuts: dict[int, Cuts] = {}
        self.producers = self._returned()
        self.sources = self._starts()
        self.merges = self._merges()
        own = {path for path, module in model.named_modules() if module._parameters}
        own |= {v.name.rpartition(".")[0] for v in trace.values if v.origin is Origin.PARAMETER}
        runs = trace.runs
        self.runs = [runs[i] for i in self._ended() if runs[i].path in own]

    # --- from the trace ---

    def node_of(self, value: int | None) -> int | None:
        """The node of a value. None if it is a constant, or does not lead to an output."""
        return None if value is None else self.node.get(self._same[value])

    def call_at(self, node: int) -> TracedCall | None:
        """The call that computed a node, or None."""
        call = self.trace.values[self.values[node]].call
        return None if call is None else self.trace.calls[call]

    def shape(self, node: int) -> tuple[int, ...]:
        """The shape of a node's tensor."""
        return self.trace.values[self.values[node]].shape

    def _kind(self, value: Value) -> str:
        call = None if value.call is None else self.trace.calls[value.call]
        if call is None:
            return ""
        # torch.min(x, y) is an elementwise minimum, torch.min(x) a reduction.
        of_two = call.function in _OF_TWO and isinstance(call.argument(1, "other"), Operand)
        return _OF_TWO[call.function] if of_two else call.function

    def _seen_through(self) -> list[int]:
        """For each value the tensor of which it is a full alias: x[:] and x.detach() are x."""
        same = list(range(len(self.trace.values)))
        for call in self.trace.calls:
            if call.is_view and call.results and takes_everything(call, self.trace):
                same[call.results[0]] = same[call.operands[0]]
        return same

    def _starts_at(self, value: Value) -> bool:
        return value.starts or value.index in self.streams

    def _classify_values(self) -> tuple[list[bool], list[int], list[int]]:
        """For each value: whether it is an activation, the modules with weights there, and with matrices."""
        values, calls, same = self.trace.values, self.trace.calls, self._same
        active, every, matrices = [], [], []
        for value in values:
            starts = self._starts_at(value)
            call = None if value.call is None else calls[value.call]
            all_weights = only_matrices = 0
            is_active = starts
            if value.origin is Origin.PARAMETER:
                all_weights = self._owner(value.name)
                only_matrices = all_weights if len(value.shape) >= 2 else 0
            elif call is not None:
                dead = call.zeroed
                for operand in call.operands:
                    above = same[operand]
                    if active[above]:
                        is_active = is_active or (value.is_float and not dead)
                    else:
                        all_weights |= every[above]
                        only_matrices |= matrices[above]
            active.append(is_active)
            every.append(0 if starts else all_weights)
            matrices.append(0 if starts else only_matrices)
        return active, every, matrices

    def _operands(self, value: int, active: list[bool], weights: list[int]) -> list[int]:
        """The activations and weights that a value was computed from. [] where activations start."""
        if self._starts_at(self.trace.values[value]):
            return []
        above = [self._same[v] for v in self.trace.operands_of(value)]
        return [v for v in above if active[v] or weights[v]]

    def _leading_out(self, active: list[bool], weights: list[int]) -> list[int]:
        """The values that lead to an output of the model, in order."""
        calls, same = self.trace.calls, self._same
        reached = [False] * len(active)

        def reach(ends: Iterable[int]) -> None:
            waiting = [v for v in map(same.__getitem__, ends) if not reached[v]]
            while waiting:
                at = waiting.pop()
                if not reached[at]:
                    reached[at] = True
                    # This follows token ids of lookups too.
                    above = (same[v] for v in self.trace.operands_of(at))
                    waiting += [v for v in above if self.trace.values[v].from_data or active[v] or weights[v]]

        ends = self.trace.outputs or tuple(
            v.index for v in self.trace.values if not self.trace.consumers(v.index)
        )
        reach(ends)
        sites = {c.site for c in calls if c.joins and any(reached[same[r]] for r in c.results)}
        reach(r for c in calls if c.joins and c.site in sites for r in c.results)
        return [v for v, is_reached in enumerate(reached) if is_reached and (active[v] or weights[v])]

    def _ended(self) -> list[int]:
        """Indices of the module runs in the order in which they ended."""
        runs = self.trace.runs
        return sorted(range(len(runs)), key=lambda i: (runs[i].ends, -i))

    def _returned(self) -> dict[int, str]:
        """For each node that a module returned, the path of the innermost such module."""
        found: dict[int, str] = {}
        for i in self._ended():
            for value in self.trace.runs[i].outputs:
                if (node := self.node_of(value)) is not None:
                    found.setdefault(node, self.trace.runs[i].path)
        return found

    def _starts(self) -> dict[int, str]:
        found = {}
        for value in self.trace.values:
            if value.starts and (node := self.node.get(value.index)) is not None:
                call = self.call_at(node)
                found[node] = "input" if call is None else call.owner or call.module or "input"
        return found | {self.node[v]: path for v, path in self.streams.items() if v in self.node}

    def _merges(self) -> list[Merge]:
        """The calls that join tensors; for updates of a part of a tensor, with the whole tensor."""
        found, made = [], {}
        for call in self.trace.calls:
            if call.joins in _operations.PUTTING and not _accumulates(call):
                merge = None if self._assigned(call, made) else self._put(call)
                if merge is not None:
                    found.append(merge)
            elif call.joins:
                nodes = tuple(map(self.node_of, call.joined))
                output = self.node_of(call.results[0]) if call.results else None
                merge = Merge(call, call.joins, nodes, tuple(v is not None for v in call.joined), output)
                merge.whole, merge.written = self.node_of(call.whole), self.node_of(call.written)
                found.append(merge)
                made |= dict.fromkeys(call.results, merge)
        return found

    def _put(self, call: TracedCall) -> Merge | None:
        """Read a write into a part of a tensor as a concatenation with the rest. None if there is no rest."""
        before, after = call.joined[0] if call.whole is None else call.whole, call.written or call.results[0]
        value, chosen_by = call.joined[1], [self.trace.values[v] for v in call.operands]
        if before is None or value is None:
            return None
        by_data = any(v.dtype == torch.bool or (v.is_code and not v.is_float) for v in chosen_by)
        part = part_put(self.trace, call)
        if part is None and not (by_data or call.function in {"index_copy", "index_put", "setitem"}):
            return None
        if part is None and not by_data and not any(not v.is_float for v in chosen_by):
            return None  # the write replaces the whole tensor
        axes = [] if part is None else [axis for axis in part.limits if isinstance(axis, int)]
        if part is None and call.function == "index_copy":
            axes = [call.argument(1, "dim") % len(self.trace.values[before].shape)]
        is_step = part is not None and len(part.shape) < len(self.trace.values[before].shape)
        base = self._root(before)
        merge = Merge(
            call, "cat", (self.node_of(before), self.node_of(value)), (True, True), self.node_of(after)
        )
        merge.put = Put(axes[0] if len(axes) == 1 else None, is_step and self.node_of(base) is None, by_data)
        return merge

    def _assigned(self, call: TracedCall, made: Mapping[int, Merge]) -> bool:
        """Whether a call writes an updated part back into its tensor: ``x[a:b] = x[a:b] + F``."""
        target, value = call.joined[0], call.joined[1]
        merge = None if value is None else made.get(self._same[value])
        if merge is None or call.key is None or target is None or call.function == "copy":
            return False
        root = self._root(target)
        for i, operand in enumerate(merge.traced.joined):
            if operand is not None and self._taken_from(operand) == root:
                if merge.whole is None:
                    merge.whole = self.node_of(target if call.whole is None else call.whole)
                    merge.part, merge.assigned_at = i, Place(call.key, _operations.WHOLE)
                merge.written = self.node_of(call.results[0] if call.written is None else call.written)
                return True
        return False

    def _root(self, value: int) -> int:
        """The value before all views and writes that led to ``value``."""
        values, calls = self.trace.values, self.trace.calls
        while (at := values[value].call) is not None:
            call = calls[at]
            if not (call.is_view or call.in_place or call.function in _WRITES):
                break
            value = call.operands[0]
        return value

    def _taken_from(self, value: int) -> int | None:
        """The tensor of which a value is a slice, or a copy of a part. None for any other value."""
        at = self.trace.values[value].call
        call = None if at is None else self.trace.calls[at]
        if call is None or not (call.is_view or call.function in {"getitem", "index_select"}):
            return None
        return self._root(call.operands[0])

    # --- which weights enter where ---

    def _name_modules(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        self.modules = list(modules)
        self._index = {path: i for i, path in enumerate(self.modules)}
        self._shapes: dict[int, list[tuple[int, ...]]] = {}
        self._below: dict[str, set[str]] = {}
        self._scalar = 0
        for i, (path, module) in enumerate(modules.items()):
            own = [p for p in module._parameters.values() if p is not None]
            if own and all(p.numel() == 1 for p in own):
                self._scalar |= 1 << i
            if any(p.ndim >= 2 for p in own):
                self._shapes[i] = [tuple(p.shape) for p in own if p.ndim >= 2]
            parent = path
            while own:
                self._below.setdefault(parent, set()).add(path)
                if not parent:
                    break
                parent = parent.rpartition(".")[0]

    def _owner(self, parameter: str) -> int:
        """The module that holds a parameter, as a set of one member."""
        return 1 << self._index[parameter.rpartition(".")[0]]

    def _count_uses(self) -> None:
        self._uses: Counter[int] = Counter()
        self._where: dict[int, list[int]] = {}
        for i in bits(self.weighted):
            self._uses.update(bits(self.weights[i]))
            for m in bits(self.matrices[i]):
                self._where.setdefault(m, []).append(i)

    def modules_in(self, region: int) -> list[str]:
        """Paths of the modules whose weights enter in a set of nodes, in order of execution."""
        return [self.modules[m] for m in self._used_in(region)]

    def modules_above(self, i: int) -> list[str]:
        """Paths of the modules whose weights enter at a node, or at its inputs if it depends on no data."""
        return [self.modules[m] for m in bits(self.weights[i])]

    def modules_only_in(self, region: int) -> set[str]:
        """Paths of the modules whose weights enter in a set of nodes and nowhere else."""
        return {self.modules[m] for m, times in self._used_in(region).items() if times == self._uses[m]}

    def _used_in(self, region: int) -> dict[int, int]:
        found = self._used.get(region)
        if found is None:
            found = self._used[region] = {}
            for i in bits(region & self.weighted):
                for m in bits(self.weights[i]):
                    found[m] = found.get(m, 0) + 1
        return found

    def modules_below(self, path: str) -> set[str]:
        """Paths of the modules with weights of their own at ``path`` or below it."""
        return self._below.get(path, set())

    def has_weights(self, region: int) -> bool:
        """Whether a weight enters anywhere in a set of nodes."""
        return bool(region & self.weighted)

    def matrices_in(self, region: int, enough: int | None = None) -> int:
        """The set of modules whose matrices enter in a set of nodes; the search stops at ``enough``."""
        mask = 0
        for i in bits(region & self.weighted):
            mask |= self.matrices[i]
            if enough is not None and mask.bit_count() >= enough:
                break
        return mask

    def depth(self, region: int) -> int:
        """The largest number of matrices in sequence on a path within a set of nodes."""
        depths: dict[int, int] = {}
        for v in bits(region):
            above = [depths[p] for p in self._active_parents[v] if p in depths]
            depths[v] = max(above, default=0) + bool(self.matrices[v])
        return max(depths.values(), default=0)

    def has_matrix(self, path: str) -> bool:
        """Whether a module owns a weight of two or more dimensions."""
        return self._index[path] in self._shapes

    def has_only_scalars(self, region: int) -> bool:
        """Whether all weights that enter in a set of nodes belong to modules with scalar weights only."""
        return all(not self.weights[i] & ~self._scalar for i in bits(region & self.weighted))

    def matrix_shapes(self, region: int) -> list[tuple[int, ...]]:
        """Shapes of the matrices that enter in a set of nodes."""
        return [shape for m in bits(self.matrices_in(region)) for shape in self._shapes.get(m, [])]

    def nodes_of_matrix(self, m: int) -> list[int]:
        """Activations where a matrix of module ``m`` enters."""
        return self._where.get(m, [])

    # --- what depends on what ---

    def active_parents(self, i: int) -> list[int]:
        """The activations that node ``i`` was computed from."""
        return self._active_parents[i]

    @functools.cached_property
    def children(self) -> list[list[int]]:
        """For each activation, the activations computed from it, in order."""
        found: list[list[int]] = [[] for _ in range(self.activations)]
        for child in range(self.activations):
            for parent in dict.fromkeys(self._active_parents[child]):
                found[parent].append(child)
        return found

    def children_of(self, i: int) -> int:
        """The set of activations computed from node ``i``."""
        if i not in self._sets:
            first = self.children[i][0] if self.children[i] else 0
            self._sets[i] = sum(1 << child - first for child in self.children[i]) << first
        return self._sets[i]

    def entries(self, region: int, common: int) -> set[int]:
        """Nodes of ``common`` that are inputs of a node of ``region``."""
        # Iterate over the smaller set.
        if region.bit_count() < common.bit_count():
            return {p for v in bits(region) for p in self.active_parents(v) if common >> p & 1}
        return {p for p in bits(common) if any(region >> v & 1 for v in self.children[p])}

    def leaving(self, fork: int, parts: list[Part]) -> list[int]:
        """The nodes computed from ``fork``, except those computed only from parts other than ``parts``."""
        return self._cuts(fork).overlapping(parts)

    def parts_taken(self, fork: int, region: int) -> list[Part]:
        """The parts of ``fork`` that a set of nodes reads, and the parts in which the set ends."""
        cuts, found = self._cuts(fork), []
        for v in bits(region):
            if v in cuts.parts:
                found += [] if region & self.children_of(v) else [cuts.parts[v]]
            else:
                found += [cuts.parts[p] for p in self._active_parents[v] if p in cuts.parts]
        return found

    def parts_of(self, fork: int) -> Mapping[int, Part]:
        """Map from each node that is a part of ``fork`` to that part, including the fork itself."""
        return self._cuts(fork).parts

    def _cuts(self, fork: int) -> Cuts:
        """The parts cut out of a node, and the nodes computed from these.

        Slicing and transposing are not counted as computing.
        """
        known = self._known_cuts.get(fork)
        if known is not None:
            return known
        cuts = self._known_cuts[fork] = Cuts()
        waiting = [(fork, whole(self.shape(fork)))]
        while waiting:
            at, part = waiting.pop()
            cuts.parts[at] = part
            for child in self.children[at]:
                is_view = len(self._active_parents[child]) == 1 and not self.weights[child]
                after = part_after(self.trace, self.values[child], part) if is_view else None
                if after is None:
                    cuts.add(child, part)
                else:
                    waiting.append((child, after))
        return cuts

    def normed_at(self, v: int) -> int | None:
        """The node x if ``v`` is x normalised without weights, or None.

        Normalised means divided by a norm of x, or of the tensor from which x was scaled or centred:
        ``normalize(x)``, ``x / x.norm()``, ``x * rsqrt(mean(x^2))`` or ``(x - mean(x)) / std(x)``.
        """
        call, parents = self.call_at(v), self._active_parents[v]
        if call is None or self.weights[v]:
            return None
        if call.function in NORM:
            return parents[0] if len(parents) == 1 else None
        if call.function not in {"div", "mul"} or len(parents) != 2:
            return None
        x, by = parents
        if call.function == "mul":
            x, by = (x, by) if self._is_inverse(by) else (by, x)
        else:
            divisor = call.argument(1, "other")
            x, by = (x, by) if isinstance(divisor, Operand) and self.node_of(divisor.value) == by else (by, x)
        is_quotient = call.function == "div" or self._is_inverse(by)
        return x if is_quotient and any(self._is_length(by, of) for of in self._scaled_from(x)) else None

    def centred_at(self, v: int) -> int | None:
        """The node x if ``v`` is x minus its mean, or another smaller function of x alone; or None."""
        parents = self._active_parents[v]
        if self.kind(v) != "sub" or len(parents) != 2 or self.weights[v]:
            return None
        x, mean = parents
        return x if self._is_smaller(mean, x) and self.is_function(mean, x) else None

    def _scaled_from(self, x: int) -> list[int]:
        """A node, and the operands of the products and differences that led to it."""
        found = [x]
        for at in found:
            if self.kind(at) in _SCALING and len(found) < 8:
                found += self._active_parents[at]
        return found

    def _is_inverse(self, v: int) -> bool:
        """Whether a node is a reciprocal, seen through views and broadcasts."""
        while self.kind(v) in WHOLE | REPEATING and len(self._active_parents[v]) == 1:
            (v,) = self._active_parents[v]
        return self.kind(v) in INVERSES

    def _is_length(self, v: int, x: int) -> bool:
        """Whether a node is a norm of ``x``: a smaller tensor from squares or absolute values of x alone."""
        if not self._is_smaller(v, x):
            return False
        region = self.inside_of(x, v)
        squares = region & self.of_kinds(LENGTHS) or any(self._is_square(at) for at in bits(region))
        return bool(squares) and self.is_function(v, x)

    def _is_smaller(self, v: int, x: int) -> bool:
        """Whether a node depends on ``x`` and has fewer elements."""
        return math.prod(self.shape(v)) < math.prod(self.shape(x)) and self.ancestors.reaches(x, v)

    def _is_square(self, v: int) -> bool:
        """Whether a node is a product of a tensor with itself."""
        call = self.call_at(v)
        return call is not None and call.function == "mul" and len({*call.operands}) < len(call.operands)

    def is_function(self, v: int, x: int) -> bool:
        """Whether a node is a function of all of ``x`` alone."""
        region = self.inside_of(x, v)
        if any(part.limits for part in self.parts_taken(x, region)):
            return False
        above = (p for at in bits(region) for p in self.parents[at])
        return all(p == x or (p < self.activations and region >> p & 1) for p in above)

    def between(self, starts: list[int], end: int) -> int:
        """The set of nodes between any of ``starts`` and ``end``, both included."""
        first, reaches = min(starts), self.ancestors.reaches
        window = self.ancestors[end] >> first
        if len(starts) == 1:
            inside = [reaches(first, first + v) for v in bits(window)]
        else:
            inside = [any(reaches(s, first + v) for s in starts) for v in bits(window)]
        return chosen(window, inside) << first

    def inside_of(self, start: int, end: int) -> int:
        """The set of nodes after ``start`` up to and including ``end``; empty if no path connects them."""
        return self.between([start], end) & ~(1 << start) if self.ancestors.reaches(start, end) else 0

    def joined_axis(self, merge: Merge) -> int | None:
        """The axis along which a call concatenates. None if it is unknown, or for any other call."""
        if merge.output is None or merge.name not in _operations.LISTS:
            return None
        ndim = len(self.shape(merge.output))
        if merge.name in _AXES:
            return min(_AXES[merge.name], ndim - 1)
        if merge.put is not None:
            return merge.put.axis
        call = merge.traced
        dim = call.argument(1, "dim", call.keywords.get("axis", 0))
        return dim % ndim if isinstance(dim, int) and ndim else None

    def onward(self, starts: Iterable[int], through: frozenset[str], ends: frozenset[str]) -> list[int]:
        """The nodes of kinds ``ends`` that are reached from ``starts`` through nodes of kinds ``through``."""
        waiting, seen, found = list(starts), set(), []
        while waiting:
            for child in self.children[waiting.pop()]:
                if child not in seen:
                    seen.add(child)
                    kind = self.kind(child)
                    found += [child] if kind in ends else []
                    waiting += [child] if kind in through else []
        return found

    def bit(self, node: int | None) -> int:
        """The set that holds only this activation; empty for any other node."""
        return 0 if node is None or node >= self.activations else 1 << node

    def can_be_tapped(self, node: int | None) -> bool:
        """Whether a node is an activation of the pass itself, not in a transformation (``torch.vmap``)."""
        if node is None or node >= self.activations:
            return False
        call = self.call_at(node)
        return call is None or not call.transformed

    # --- operations of nodes ---

    def kind(self, i: int) -> str:
        """The operation of node ``i``."""
        return self._kinds[i]

    def of_kinds(self, kinds: frozenset[str]) -> int:
        """The set of activations whose operation is in ``kinds``."""
        if kinds not in self._masks:
            self._masks[kinds] = as_bits([kind in kinds for kind in self._kinds[: self.activations]])
        return self._masks[kinds]


def _accumulates(call: TracedCall) -> bool:
    """Whether a write adds to the old values instead of replacing them."""
    if call.function == "index_put":
        return bool(call.argument(3, "accumulate", False))
    return call.function == "scatter" and call.argument(4, "reduce") is not None
