"""Evidence of a verdict: lines of hidden boundaries, the head, starved weights, reach through time.

With g the L2 norm of the gradient over the whole batch, a *line* consists of the boundaries computed from one
input of the model, from the first with trained weights to the last hidden one. If all of a line's gradient
passes an average over N positions, the norm that it loses there is added back.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from skipscope.flow._flow_result import Head, Worst
from skipscope.flow.passes._gradient_readings import Readings
from skipscope.flow.passes._gradient_sites import LOOKUPS, CallGraph, PoolReading, SiteReader, SiteReading
from skipscope.flow.passes._tensor_norms import dense
from skipscope.flow.verdict._flow_rules import Point
from skipscope.shortcuts import Boundary, tap_boundaries
from skipscope.shortcuts.trace import NeedsGradients, recording

# Share of the gradient that is left at the reach, and the number of reaches beyond which a sequence vanishes
# through time.
LEFT, REACHES = 1e-3, 3
# Decades below the chain's median of |dL/dW| / |W| at which a weight is starved.
STARVED = 4.0
# Decades below the maximum, if the median itself is starved. 93 of 94 stock models have at most 6; the other
# has q and k that attend to a single position.
STARVED_MOST = 9.0
# A weight below this share of its usual size counts as 0.
NEARLY_ZERO = 1e-3
# Fewest consecutive opaque calls that are judged by the gradients between them.
HIDDEN_CALLS = 3
# A step is taken out of the input by one call, after those by which it is read: a mask is made by more.
_TAKING = 3
# One step of a recurrent layer.
_CELLS = frozenset({"lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"})
# Norms this far apart are compared; anything smaller than this share of the greatest is 0 in float32.
_TINY = 1e-300


@dataclass(frozen=True)
class Reach:
    """Reach of the gradient back in time.

    Attributes:
        site: name of the recurrent layer.
        steps: time steps until a thousandth of the gradient is left; None if more is left at the first step.
        length: length of the sequence up to the last step that is read.
        growth: decades that the gradient gains towards the first step, beyond what summing a term for each
            step can give; 0 without growth.
    """

    site: str
    steps: int | None
    length: int
    growth: float = 0.0


@dataclass(frozen=True)
class Starved:
    """Weights with a tiny gradient compared with others of their chain.

    Attributes:
        names: names of the weights, the most starved first.
        share: share of the weighted calls whose weights are all starved.
        decades: decades of the most starved weight below the reference.
        zero: whether all of them have a gradient of exactly 0.
        than: reference of the comparison: the median, or the maximum if most weights are starved.
    """

    names: tuple[str, ...] = ()
    share: float = 0.0
    decades: float = 0.0
    zero: bool = False
    than: str = "median"


@dataclass(frozen=True)
class Evidence:
    """Numbers from which a verdict follows.

    Attributes:
        lines: points of each line, each with its norm and whether it is hidden.
        head: head between the last hidden boundary and the output, or None.
        worst: site with the smallest gradient, or None.
        reach: reach of the recurrent layer with the shortest reach for its length, or None.
        growing: reach of the recurrent layer or loop through which the gradient grows most, or None.
        starved: weights with a tiny gradient.
        unconnected: trained weighted calls that the loss depends on, but that get no gradient.
        cut: call that lets no gradient through, or "".
        opaque: opaque call with most of the weights, or "".
        last_weights: part of the head's gain due to its weights, or None if not known.
        last_names: weights of the calls that no other weighted call follows.
        single: weights of queries and keys that attend to a single position: their gradient is 0 up to
            rounding.
    """

    lines: tuple[tuple[Point, ...], ...]
    head: Head | None = None
    worst: Worst | None = None
    reach: Reach | None = None
    starved: Starved = Starved()
    unconnected: tuple[str, ...] = ()
    cut: str = ""
    opaque: str = ""
    last_weights: float | None = None
    last_names: frozenset[str] = frozenset()
    single: tuple[str, ...] = ()
    growing: Reach | None = None


def evidence_of(
    points: Sequence[Point],
    places: Sequence[Any],
    kept: Sequence[int],
    readings: Readings,
    settled: Readings,
    sizes: dict[str, float],
) -> Evidence:
    """Derive the evidence from readings.

    Args:
        points: state and log10 of the flow of each boundary that the pass reached.
        places: all boundaries.
        kept: index of the boundary of each point.
        readings: readings of all batches.
        settled: readings after tensors that start at zero by design have moved, to find starved weights.
        sizes: norm of each weight (for an embedding, of the rows used).
    """
    graph, unit = readings.graph, readings.output_gradient or 1.0
    if graph is None:
        return Evidence((tuple(points),))
    reached = graph.reached() if graph.results else None
    orders = {k: readings.calls.get(k, (0, 0)) for k in kept}
    averages = _averages(graph, readings.sites, readings.pools) if graph.results else []
    later = _followed(graph, readings.sites, [orders[k][0] for k in kept])
    normed = []
    for point, k, followed in zip(points, kept, later):
        order = orders[k][0]
        put_back = sum(decades for at, decades in averages if at > order)
        gradient = readings.gradients[k]
        norm = gradient.norm / unit
        log = math.log10(norm) + put_back if point.log_flow is not None and norm > _TINY else point.log_flow
        normed.append(
            replace(
                point,
                log_flow=log,
                hidden=followed and places[k].key.site != "input",
                given=places[k].key.site == "input",
                samples=tuple(gradient.samples),
                log_relative=None
                if gradient.relative <= _TINY
                else math.log10(gradient.relative / unit) + put_back,
            )
        )
    lines = _lines(normed, places, kept, orders, readings)
    between = _between_hidden(readings, averages, unit)
    sites = [s for s in readings.sites if reached is None or s.order in reached]
    head = _head(lines, averages, orders, kept, normed)
    if between:
        lines += (between,)
        head = Head(0.0, 10.0 ** (between[-1].log_flow or 0.0), None)
    followed = _followed(graph, sites, [site.order for site in sites])
    ends = [site for site, is_followed in zip(sites, followed) if not is_followed and site.seen]
    single = _single(settled)
    return Evidence(
        lines,
        head,
        _worst(sites, unit),
        _reach(sites),
        _starved(settled, {name: size for name, size in sizes.items() if name not in single}),
        *_unconnected(readings, sites, reached),
        "" if between else _opaque(readings),
        _last_weights(head, ends, averages, unit),
        frozenset(name for site in ends for name in site.weights),
        single,
        _growing(sites, graph),
    )


def _averages(
    graph: CallGraph, sites: Sequence[SiteReading], pools: Sequence[PoolReading]
) -> list[tuple[int, float]]:
    """The pools that all gradient before them passes: index of the call, and decades lost in it."""
    found, reached = [], graph.reached()
    for pool in pools:
        before = [site.order for site in sites if 0 <= site.order < pool.order]
        if before and pool.order in reached and not graph.reached(without=pool.order).intersection(before):
            found.append((pool.order, pool.decades))
    return found


def _followed(graph: CallGraph, sites: Sequence[SiteReading], orders: Sequence[int]) -> list[bool]:
    """Whether a weighted call follows each boundary; otherwise it is an output."""
    reached = graph.reached()
    calls = [site.order for site in sites if site.order in reached]
    after = graph.ancestors(parent for call in calls for parent in graph.parents[call])
    return [order in after for order in orders]


@dataclass(frozen=True)
class Layout:
    """Layout of a model's boundaries, from a forward pass without gradients.

    Attributes:
        hidden: by boundary, whether trained weights come before it and any after it, and it is on a line.
        lines: by boundary, the lines that it is on, as bits.
        averaging: by boundary, decades that the norm of its gradient loses by averages between it and the
            output.
        normed: whether there are norms over the data between the weights.
    """

    hidden: tuple[bool, ...]
    lines: tuple[int, ...]
    averaging: tuple[float, ...]
    normed: bool


def layout_of(model: nn.Module, call: Callable[[], Any], points: Sequence[Boundary]) -> Layout:
    """Find the layout of a model's boundaries in a run of ``call``; use it inside ``untouched``."""
    try:
        return _layout(model, call, tuple(points), gradients=False)
    except NeedsGradients:
        return _layout(model, call, tuple(points), gradients=True)


def _layout(
    model: nn.Module, call: Callable[[], Any], points: tuple[Boundary, ...], gradients: bool
) -> Layout:
    sites, values = SiteReader(model, measured=False), dict[int, int]()
    with recording(model, sites, gradients=gradients) as recorder:
        sites.recorder = recorder

        def touch(i: int, activation: Tensor) -> Tensor:
            values.setdefault(i, recorder.value_of(activation))
            return activation

        with tap_boundaries(model, points, touch):
            results = recorder.values_in(call())
    trace = recorder.trace
    graph = CallGraph.of(trace, results)
    calls = {i: graph.place_of(trace, value) for i, value in values.items()}
    orders = [calls[i][0] if i in calls else -1 for i in range(len(points))]
    averages = _averages(graph, sites.sites, sites.pools)
    followed = _followed(graph, sites.sites, orders)
    lines = [0] * len(points)
    for bit, line in enumerate(_lines_of(sorted(calls), points, calls, sites.sites, graph)):
        for i in line:
            lines[i] |= 1 << bit
    hidden = [f and on > 0 and p.key.site != "input" for f, on, p in zip(followed, lines, points)]
    lost = [sum(d for at, d in averages if at > order) for order in orders]
    return Layout(tuple(hidden), tuple(lines), tuple(lost), sites.is_normed(trace))


def _lines_of(
    met: Sequence[int],
    places: Sequence[Any],
    calls: Mapping[int, tuple[int, int]],
    sites: Sequence[SiteReading],
    graph: CallGraph,
) -> list[list[int]]:
    """The numbers of the boundaries on each line, in order: one line for each input of the model.

    Args:
        met: numbers of the boundaries that the pass came by, in order.
        places: the boundaries.
        calls: by boundary, the call that gave it, and the inputs that it was computed from.
        sites: the weighted calls.
        graph: of the calls.
    """
    trained = [site for site in sites if site.trained and site.order >= 0]
    inputs = 0
    for k in met:
        inputs |= calls[k][1]
    found: list[list[int]] = []
    for bit in [1 << i for i in range(inputs.bit_length()) if inputs >> i & 1] or [0]:
        # An input of another tower is no part of this line: around each of its layers it reaches the loss.
        on = [
            k
            for k in met
            if not bit or calls[k][1] & bit or (places[k].key.site == "input" and not calls[k][1])
        ]
        # Frozen ones before the first trained one count: an update beside a frozen layer is beside the line.
        on = _through(on, places, calls, graph)
        start = min((s.order for s in trained if not bit or graph.inputs[s.order] & bit), default=0)
        line = [k for k in on if calls[k][0] >= start or places[k].key.site == "input"]
        if line and line not in found:
            found.append(line)
    return found


def _lines(
    points: Sequence[Point],
    places: Sequence[Any],
    kept: Sequence[int],
    orders: dict[int, tuple[int, int]],
    readings: Readings,
) -> tuple[tuple[Point, ...], ...]:
    """The points of each line, in order; of a module that runs several times the run that gets most."""
    assert readings.graph is not None
    found: dict[tuple[str, ...], tuple[Point, ...]] = {}
    at = {k: j for j, k in enumerate(kept)}
    for on in _lines_of(kept, places, orders, readings.sites, readings.graph):
        groups: dict[Any, list[int]] = defaultdict(list)
        for k in on:
            key = places[k].key
            # Merges in a loop over layers share their line of code, and are several.
            again = key.nth if places[k].kind == "merge" else 0
            groups[key.host, key.site, again].append(at[k])
        line = sorted(
            max(group, key=lambda j: (points[j].log_flow is not None, points[j].log_flow or 0.0, j))
            for group in groups.values()
        )
        chosen = tuple(points[j] for j in line)
        found.setdefault(tuple(p.name for p in chosen), chosen)
    return tuple(found.values()) or (tuple(points),)


def _through(
    on: Sequence[int], places: Sequence[Any], calls: Mapping[int, tuple[int, int]], graph: CallGraph
) -> list[int]:
    """Leave out modules beside the line, around which an earlier boundary still reaches the loss.

    Args:
        on: indices of boundaries, in order.
        places: all boundaries.
        calls: boundary -> index of the call that produced it (-1 for an input), and its inputs, as bits.
        graph: graph of the calls.
    """
    times = Counter((places[k].key.host, places[k].key.site) for k in on)
    found: list[int] = []
    for k in on:
        place, (order, _) = places[k], calls[k]
        if place.kind == "module" and times[place.key.host, place.key.site] == 1 and found:
            around = graph.reached(without=order)
            if any(_is_around(graph, calls[i], order, around) for i in found[-2:]):
                continue
        found.append(k)
    return found


def _is_around(graph: CallGraph, place: tuple[int, int], order: int, around: set[int]) -> bool:
    """Whether a boundary reaches the loss by calls ``around`` the call ``order``."""
    call, inputs = place
    if call >= 0:
        return call in around
    return any(graph.inputs[c] & inputs for c in around - graph.descendants(order))


def _head(
    lines: Sequence[Sequence[Point]],
    averages: Sequence[tuple[int, float]],
    orders: dict[int, tuple[int, int]],
    kept: Sequence[int],
    points: Sequence[Point],
) -> Head | None:
    hidden = [p for p in max(lines, key=len) if p.hidden and p.log_flow is not None]
    if not hidden:
        return None
    last = hidden[-1]
    k = next(k for k, p in zip(kept, points) if p.name == last.name)
    assert last.log_flow is not None
    return Head(sum(d for at, d in averages if at > orders[k][0]), 10.0**last.log_flow, None)


def _last_weights(
    head: Head | None, ends: Sequence[SiteReading], averages: Sequence[tuple[int, float]], unit: float
) -> float | None:
    """Norm at the last hidden boundary over the norm at the outputs of the last weighted calls, or None."""
    norms = [s.norm / unit * 10.0 ** sum(d for at, d in averages if at > s.order) for s in ends]
    total = math.hypot(*norms)
    return head.gain / total if head is not None and total > 0 and math.isfinite(total) else None


def _worst(sites: Sequence[SiteReading], unit: float) -> Worst | None:
    seen = [s for s in sites if s.seen and s.squares > 0 and s.finite]
    if len(seen) < 2:
        return None
    least, last = min(seen, key=lambda s: s.squares), max(seen, key=lambda s: s.squares)
    return Worst(least.name, least.step, math.log10(last.norm / least.norm))


def _reach(sites: Sequence[SiteReading]) -> Reach | None:
    found = _fused(sites) + [reach_of(g[0].name, [s.norm for s in g]) for g in _shared(sites)]
    reaches = (reach for reach in found if reach is not None)
    return max(reaches, key=lambda r: r.length / (r.steps or math.inf), default=None)


def _shared(sites: Sequence[SiteReading]) -> list[list[SiteReading]]:
    """Calls of the same weights, where there are several."""
    calls: dict[tuple[str, ...], list[SiteReading]] = defaultdict(list)
    for site in sites:
        calls[site.weights].append(site)
    return [group for group in calls.values() if len(group) > 3 and group[0].function not in LOOKUPS]


def _growing(sites: Sequence[SiteReading], graph: CallGraph) -> Reach | None:
    """Of fused layers, and of loops over the steps of a sequence."""
    found = _fused(sites)
    for group in _shared(sites):
        reach = reach_of(group[0].name, [site.norm for site in group])
        if reach is not None and reach.growth > 0 and _is_through_time(group, sites, graph):
            found.append(reach)
    return max((reach for reach in found if reach is not None), key=lambda r: r.growth, default=None)


def _is_through_time(group: Sequence[SiteReading], sites: Sequence[SiteReading], graph: CallGraph) -> bool:
    """Whether calls follow each other, and more of the input comes in between any two: a loop over steps.

    Calls that share a weight may also stand beside each other, or be the layers of one network.
    """
    if any(site.order < 0 for site in group):
        return False
    weighted = {site.order for site in sites}
    for one, after in pairwise(group):
        later = graph.ancestors([after.order])
        if one.order not in later:
            return False
        fresh = later - graph.ancestors([one.order])
        comes_in = (
            one.order not in (above := graph.ancestors([c])) and (c in weighted or len(above) <= _TAKING)
            for c in fresh
            if graph.inputs[c]
        )
        if after.function not in _CELLS and not any(comes_in):
            return False
    return True


def _fused(sites: Sequence[SiteReading]) -> list[Reach | None]:
    return [reach_of(s.name, [math.sqrt(q) for q in s.steps]) for s in sites if len(s.steps) > 3]


def reach_of(name: str, profile: Sequence[float]) -> Reach | None:
    """Reach of a gradient with norm ``profile`` at each time step, or None.

    Example:
        >>> reach_of("rnn", [10.0 ** (t - 9) for t in range(10)]).steps
        3
    """
    if not all(map(math.isfinite, profile)) or not max(profile) > 0:
        return None
    greatest = max(profile)
    end = max(t for t, g in enumerate(profile) if g >= 0.1 * greatest)
    growth = 0.0
    if profile[-1] > 0 and end < len(profile) // 2:
        growth = max(0.0, math.log10(greatest / profile[-1]) - math.log10(len(profile)))
    # The margin is for rounding: if exactly a thousandth is left, the gradient has ended.
    far = [t for t in range(end + 1) if profile[t] > LEFT * greatest * (1 + 1e-9)]
    steps = None if far[0] == 0 else end - far[0] + 1
    return Reach(name, steps, end + 1, growth)


def _starved(readings: Readings, sizes: dict[str, float]) -> Starved:
    graph = readings.graph
    reached = graph.reached() if graph is not None and graph.results else None
    calls = [s for s in readings.sites if s.trained and s.seen and (reached is None or s.order in reached)]
    weights = [site.weights for site in calls]
    # Inside an opaque call each weight is counted separately.
    called = {name for site in readings.sites for name in site.weights}
    weights += [(name,) for name in readings.weights if readings.hidden and name not in called]
    ratio = {}
    for name in dict.fromkeys(name for names in weights for name in names):
        weight = readings.weights.get(name)
        if weight is not None and weight.trainable and weight.total is not None and sizes.get(name, 0.0) > 0:
            norm = weight.norm(dense(weight.total)) * weight.unit
            if math.isfinite(norm):
                ratio[name] = norm / sizes[name]
    return starved_of(ratio, weights)


def _single(readings: Readings) -> tuple[str, ...]:
    """Weights of queries and keys without a gradient, because they attend to a single position.

    Their gradient is exactly 0, or rounding errors (in the fused attention of torch 2.14).
    """
    graph = readings.graph
    if graph is None or not readings.single:
        return ()
    before = graph.ancestors(readings.single)
    names = dict.fromkeys(name for site in readings.sites if site.order in before for name in site.weights)
    largest = max((max(w.rms) for w in readings.weights.values() if w.rms), default=0.0)
    found = []
    for name in names:
        weight = readings.weights.get(name)
        if weight is not None and weight.trainable and weight.total is not None:
            # In half precision the gradients of earlier layers may be as small as its rounding errors.
            eps = min(torch.finfo(weight.total.dtype).eps, torch.finfo(torch.float32).eps)
            found += [name] * all(rms <= 4 * eps * largest for rms in weight.rms)
    return tuple(found)


def size_of(weight: Tensor, norm: float) -> float:
    """Reference norm for a weight's gradient: the weight's own, or its usual initial norm if nearly zero."""
    usual = math.sqrt(weight.numel() / max(1, weight[0].numel() if len(weight) else 1))
    return norm if norm > NEARLY_ZERO * usual else usual


def starved_of(ratio: dict[str, float], calls: Sequence[tuple[str, ...]]) -> Starved:
    """Find starved weights by |dL/dW| / |W|.

    Args:
        ratio: |dL/dW| / |W| of each weight.
        calls: weights of each weighted call.

    Example:
        >>> starved_of({"a": 1.0, "b": 1.0, "c": 1e-7}, [("a",), ("b",), ("c",)])
        Starved(names=('c',), share=0.3333333333333333, decades=7.0, zero=False, than='median')
    """
    if len(ratio) < 3:
        return Starved()
    ordered = sorted(ratio.values())
    median = ordered[len(ordered) // 2]
    # If most weights are starved, so is the median.
    is_usual = median >= ordered[-1] * 10**-STARVED_MOST
    usual, limit = (median, STARVED) if is_usual else (ordered[-1], STARVED_MOST)
    low = sorted((r, name) for name, r in ratio.items() if r < usual * 10**-limit)
    if not low or not usual > 0:
        return Starved()
    names = tuple(name for _, name in low)
    judged = [mine for weights in dict.fromkeys(calls) if (mine := [w for w in weights if w in ratio])]
    share = sum(all(w in names for w in mine) for mine in judged) / max(1, len(judged))
    least = next((r for r, _ in low if r > 0), 0.0)
    decades = math.log10(usual / least) if least else math.inf
    return Starved(names, share, decades, all(r == 0 for r, _ in low), "median" if is_usual else "greatest")


def _between_hidden(
    readings: Readings, averages: Sequence[tuple[int, float]], unit: float
) -> tuple[Point, ...]:
    """The chain of opaque calls' outputs, if each follows the last and holds few of the weights; else ().

    Gradients inside an opaque call are not seen, so there must be several calls.
    """
    graph = readings.graph
    found = [site for site in readings.hidden if site.seen and site.norm > _TINY and site.finite]
    assert graph is not None
    if len(found) < HIDDEN_CALLS or any(
        before.order not in graph.ancestors([after.order]) for before, after in pairwise(found)
    ):
        return ()
    logs = (math.log10(s.norm / unit) + sum(d for at, d in averages if at > s.order) for s in found)
    return tuple(Point(site.name, "ok", log) for site, log in zip(found, logs))


def _opaque(readings: Readings) -> str:
    """Name of an opaque call if more than half of the weights are inside such calls, otherwise ""."""
    called = {name for site in readings.sites for name in site.weights}
    got = [name for name, weight in readings.weights.items() if weight.total is not None]
    inside = [name for name in got if name not in called]
    return readings.opaque[0] if readings.opaque and 2 * len(inside) > len(got) else ""


def _unconnected(
    readings: Readings, sites: Sequence[SiteReading], reached: set[int] | None
) -> tuple[tuple[str, ...], str]:
    """Trained calls that the loss depends on without a gradient, and the call that cuts the gradient."""
    graph = readings.graph
    assert graph is not None
    # An output may get no gradient although its weights do, in a loss with a derivative inside.
    got = {name for name, weight in readings.weights.items() if weight.total is not None}
    lost = [s for s in sites if s.trained and not s.seen and not set(s.weights) & got]
    if not lost or reached is None:
        return (), ""
    last = max(s.order for s in lost)
    cut = next(
        (
            name
            for order, name in readings.cuts
            if order >= last and last in graph.ancestors([order]) and order in reached
        ),
        "",
    )
    return tuple(dict.fromkeys(s.name for s in lost)), cut
