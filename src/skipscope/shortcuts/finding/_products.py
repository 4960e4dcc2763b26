"""Parts of the result of one linear map: every chunk of ``linear(x)`` along the features depends on all of x.

This holds for axes that come from the weight: the features of ``linear``, the channels of a convolution.
Along any other axis, as the steps of a sequence, a part of the result depends on the same part of x.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations

from skipscope.shortcuts.finding._graph import Graph
from skipscope.shortcuts.finding._kinds import CONVOLUTION, LINEAR, MATRIX_PRODUCTS, NORM, SPLITS, WHOLE
from skipscope.shortcuts.finding._parts import Axis, Part, part_after, whole
from skipscope.shortcuts.trace import TracedCall

# Operations other than splits that take a part of a tensor.
_CUTS = frozenset({"getitem", "select", "slice", "narrow", "index_select"})
# The position of a convolution's number of groups among its arguments.
_GROUPS = {"convolution": 8, "_convolution": 8}
# The axis of a matrix product's result that comes from its second factor, and that from its first.
_FROM_SECOND, _FROM_FIRST = -1, -2


_MAPS = LINEAR | NORM | WHOLE
_NORM_STEPS = NORM | WHOLE | {"mul", "div"}


def mapped_from(graph: Graph, node: int, parts: Sequence[Part]) -> tuple[int, int] | None:
    """Find the operand x of a linear map whose result is cut into parts that each depend on all of x.

    Args:
        graph: the dataflow.
        node: the node that is cut: a linear map of x, seen through views and norms.
        parts: parts of the node.

    Returns:
        The node x, and the set of the map's own nodes. None if it is not such a map, or a part depends on a
        part of x only.
    """
    region, after, at = 1 << node, [], node
    while (x := _operand(graph, at)) is None:
        above = graph.active_parents(at)
        if graph.kind(at) not in WHOLE | NORM or len(above) != 1 or graph.matrices[at]:
            return None
        after.append(at)
        (at,) = above
        region |= 1 << at
    seen = whole(graph.shape(at))
    for v in reversed(after):
        shown = part_after(graph.trace, graph.values[v], seen) if graph.kind(v) in WHOLE else seen
        if shown is None:
            return None
        seen = shown
    made = set(_axes_from_weights(graph, at, x))
    axes = {i for i, axis in enumerate(seen.axes) if axis is not None and _roots(axis[0]) & made}
    is_whole = all(_roots(axis) <= axes for part in parts for axis in part.limits)
    return (x, region) if is_whole else None


def before_map(graph: Graph, node: int, end: int) -> tuple[int, int] | None:
    """The operand of the linear map that computes ``node``, if ``end`` also depends on it by another path.

    Returns:
        That operand, and the set of the map's nodes. None if ``node`` is neither such a linear map nor a part
        of one.
    """
    at, region, has_matrix = node, 0, False
    while graph.kind(at) in _MAPS and len(graph.active_parents(at)) == 1:
        region |= 1 << at
        has_matrix = has_matrix or bool(graph.matrices[at])
        (above,) = graph.active_parents(at)
        if any(c != at and graph.ancestors.reaches(c, end) for c in graph.children[above]):
            return (above, region) if has_matrix else _before_parting(graph, node, above, end)
        at = above
    return _before_parting(graph, node, at, end)


def before_norm(graph: Graph, node: int, end: int) -> tuple[int, int] | None:
    """The input x of the norm that ends at ``node``, if a branch from x to ``end`` holds weights.

    Returns:
        The node x, and the set of the norm's nodes. None if ``node`` is not a norm, or no such branch begins
        at x.
    """
    at, region, is_norm = node, 0, False
    while (above := graph.normed_at(at)) is not None or (above := _before_step(graph, at)) is not None:
        is_norm = is_norm or graph.kind(at) not in WHOLE
        region |= graph.inside_of(above, at)
        at = above
        others = [c for c in graph.children[at] if not region >> c & 1 and graph.ancestors.reaches(c, end)]
        if is_norm and others and graph.has_weights(graph.between(others, end) & ~region):
            return at, region
    return None


def _before_step(graph: Graph, at: int) -> int | None:
    """The input of a norm with weights, constant factor, view or centring that computes a node, or None."""
    parents = graph.active_parents(at)
    is_step = graph.kind(at) in _NORM_STEPS and len(parents) == 1
    return parents[0] if is_step else graph.centred_at(at)


def _before_parting(graph: Graph, node: int, at: int, end: int) -> tuple[int, int] | None:
    """As ``before_map``, for a ``node`` that is a part of the map's result; ``end`` takes other parts."""
    while graph.kind(at) in WHOLE | SPLITS | _CUTS and len(graph.active_parents(at)) == 1:
        (at,) = graph.active_parents(at)
    parts = graph.parts_of(at)
    part = parts.get(node)
    if part is None or not part.limits or (found := mapped_from(graph, at, [part])) is None:
        return None
    x, region = found
    others = [v for v, other in parts.items() if not part.overlaps(other)]
    others += [c for c in graph.children[x] if not region >> c & 1]
    if not any(graph.ancestors.reaches(v, end) for v in others):
        return None
    return x, region | graph.inside_of(at, node)


def _operand(graph: Graph, node: int) -> int | None:
    """The operand x of a linear map by weights, or by a matrix that is computed from x. None otherwise."""
    above = graph.active_parents(node)
    if len(above) == 1 and graph.kind(node) in LINEAR and graph.weights[node]:
        return above[0]
    if graph.kind(node) in MATRIX_PRODUCTS and len(above) == 2:
        for x, matrix in permutations(above):
            if graph.ancestors.reaches(x, matrix) and graph.has_weights(graph.inside_of(x, matrix)):
                return x
    return None


def _axes_from_weights(graph: Graph, node: int, x: int) -> Iterator[int]:
    """The axes of a linear map's result that come from its weight."""
    call, ndim = graph.call_at(node), len(graph.shape(node))
    if call is None:
        return
    name = call.function
    if name in CONVOLUTION:
        if call.argument(_GROUPS.get(name, 6), "groups", 1) == 1:
            yield 2 if name == "conv_tbc" else ndim - int(name[-2]) - 1 if name[-1] == "d" else 1
    elif name == "einsum":
        yield from _labelled(graph, call, x, ndim)
    elif name in {"linear", "bilinear", "inner", "tensordot"}:
        yield ndim - 1
    elif ndim:
        factors = [graph.node_of(v) for v in call.operands][-2:]
        yield (_FROM_SECOND if factors[0] == x or ndim == 1 else _FROM_FIRST) % ndim


def _labelled(graph: Graph, call: TracedCall, x: int, ndim: int) -> Iterator[int]:
    """The axes of an ``einsum``'s result whose labels are not among those of x."""
    equation = call.arguments[0]
    if not isinstance(equation, str):
        return
    given, _, result = equation.replace(" ", "").replace("...", ".").partition("->")
    labels = given.split(",")[[graph.node_of(v) for v in call.operands].index(x)]
    if not result:
        result = "".join(sorted(c for c in set(given) - {",", "."} if given.count(c) == 1))
    dots = result.find(".")
    for i, label in enumerate(result):
        if label != "." and label not in labels:
            yield i if dots < 0 or i < dots else ndim - len(result) + i


def _roots(axis: Axis) -> set[int]:
    """The axes of a tensor from which an axis of a view was regrouped."""
    if isinstance(axis, int):
        return {axis}
    return set().union(*map(_roots, axis[0])) if isinstance(axis, tuple) else set()
