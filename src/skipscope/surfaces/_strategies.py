"""Which way of evaluating points is fastest here: each is tried on the first points, against the plain loop.

No way wins everywhere: convolutions on a CPU want channels-last and small batches, linear layers may want oneDNN's
kernel instead of the BLAS that torch came with (twice as fast on some processors), tiny networks want many points at
once (their time is dispatch), a GPU wants its kernels replayed as one graph; compiling costs its own half minute.
A way is taken only if it gives the plain loop's numbers (to rounding) and is clearly faster, so that timing noise
does not change the choice; and the choice is remembered, so that a second call in a process gives the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from skipscope._data import Batch, Batches, batch_size, map_tensors
from skipscope._errors import SkipscopeError
from skipscope.surfaces._evaluate import Evaluator, Loop, Point, Strategy
from skipscope.surfaces._moving import MovingCopy
from skipscope.surfaces._one_dnn import linears, through_one_dnn
from skipscope.surfaces._points import PointLoss, gather, take
from skipscope.surfaces._recorded import Recorded

_CLEARLY = 1.08  # how many times faster than the way before it a way must be to be taken
_SHORT_S = 0.2  # a race shorter than this is run three times as long
_SHARE = 0.1  # of the whole estimated time may be spent on trying
_RECORD_S = 1.0  # what recording a forward pass may cost; it is tried only where the time for trying holds it
_COMPILE_S = 40.0  # what compiling may cost; it must save twice that
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}

_chosen: dict[tuple[Any, ...], str] = {}


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        name: the strategy's.
        why: in words, with the times.
        error: largest relative difference to the plain loop at the points it was tried on.
        point_seconds: what one point takes.
    """

    name: str
    why: str
    error: float
    point_seconds: float


# --- the ways ------------------------------------------------------------------------------------------------------


class Stacked:
    """Several points in one call: ``vmap`` over stacked weights.

    Args:
        evaluator: whose model, data and directions to use.
        size: points a call.
    """

    def __init__(self, evaluator: Evaluator, size: int):
        self.name, self.size = f"{size} points at once (vmap)", size
        self.at_point = evaluator.plain.at_point
        self.moving = MovingCopy(evaluator.model, evaluator.directions)

    def __call__(self, points: Sequence[Point]) -> list[dict[str, Any]]:
        read: list[dict[str, Any]] = []
        for start in range(0, len(points), self.size):
            part = list(points[start : start + self.size])
            # A fixed size keeps the kernels, and so the bits, the same for a last part that is not full.
            weights = self.moving.stacked(part + part[-1:] * (self.size - len(part)))
            out = vmap(self._one, randomness="error")(weights)
            read += [_pick(out, i) for i in range(len(part))]
        return read

    def _one(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        def run(model: nn.Module, batch: Batch) -> Any:
            inputs = batch[0] if isinstance(batch, tuple | list) else batch
            if isinstance(inputs, tuple | list):
                return functional_call(model, weights, tuple(inputs))
            if isinstance(inputs, dict):
                return functional_call(model, weights, (), dict(inputs))
            return functional_call(model, weights, (inputs,))

        found = self.at_point.read(self.moving.model, run)
        return {key: value for key, value in found.items() if value is not None}


def _pick(out: dict[str, Any], i: int) -> dict[str, Any]:
    return {
        "value": out["value"][i],
        "numerators": out["numerators"][i] if "numerators" in out else None,
        "denominators": out["denominators"][i] if "denominators" in out else None,
        "metrics": {name: value[i] for name, value in out["metrics"].items()},
    }


def split_loop(
    evaluator: Evaluator,
    size: int | None,
    channels_last: bool,
    compiled: bool = False,
    recorded: bool = False,
) -> Loop:
    """The plain loop on smaller batches (``size``), with channels-last layout, or with a compiled or recorded model."""
    old = evaluator.plain.at_point
    data = _resplit(old.data, size, channels_last)
    at_point = PointLoss(data, old.loss, old.metrics, once=True)
    loop = Loop(
        evaluator.model, evaluator.directions, at_point, evaluator.mode, channels_last=channels_last, knob=evaluator.knob
    )  # fmt: skip
    words = ["compiled"] if compiled else []
    if compiled:
        faster = torch.compile(loop.moving.model, dynamic=False)
        loop.run = lambda model, batch: _call(faster, batch)
    elif linears(evaluator.model):
        once = None if recorded else lambda: at_point.read(loop.moving.model, loop.run)
        through_one_dnn(loop.moving.model, once)
        words += ["oneDNN"]
    if recorded:
        loop.run = Recorded(loop.moving.model, loop.run)
        words += ["recorded"]
    words += ["channels last"] if channels_last else []
    loop.name = ", ".join([*words, *([f"batches of {size}"] if size else [])]) or "plain loop"
    return loop


def _call(model: Callable[..., Any], batch: Batch) -> Any:
    inputs = batch[0] if isinstance(batch, tuple | list) else batch
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def _resplit(data: Batches, size: int | None, channels_last: bool) -> Batches:
    def lay_out(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last) if channels_last and t.ndim == 4 else t

    parts: list[Batch] = []
    for batch in data:
        n = batch_size(batch)
        if size is None or n <= size:
            parts.append(batch)
            continue
        for start in range(0, n, size):
            part = take(batch, slice(start, start + size), n)
            parts.append(tuple(part) if isinstance(batch, tuple) else part)
    return Batches([map_tensors(part, lay_out) for part in parts], single=data.single and len(parts) == 1)


class Replayed(Loop):
    """The loop as one CUDA graph: kernels are recorded once on the copy's fixed addresses, and replayed at each point.

    Args:
        loop: the loop to record.
    """

    def __init__(self, loop: Loop):
        self.name, self.at_point, self.moving = f"{loop.name}, CUDA graph", loop.at_point, loop.moving
        self.recalibrates, self.draws, self.run, self.knob = False, False, loop.run, None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # The fastest kernels are looked for once; the recording then holds them to the end.
        searching, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        try:
            with torch.cuda.stream(stream):  # libraries set themselves up outside the recording
                for _ in range(2):
                    loop.at_point.read(loop.moving.model, loop.run)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.static = loop.at_point.read(loop.moving.model, loop.run)
        finally:
            torch.backends.cudnn.benchmark = searching

    def _one(self, point: Point) -> dict[str, Any]:
        self.moving.move(point)
        self.graph.replay()
        return map_tensors(self.static, torch.clone)


# --- the choice ----------------------------------------------------------------------------------------------------


def _ways(evaluator: Evaluator) -> Iterator[tuple[str, Callable[[], Strategy], float]]:
    """Name, maker and what making it costs in seconds, the likeliest first."""
    plain = evaluator.plain
    if plain.draws or plain.recalibrates:
        return
    knob = evaluator.knob is not None  # a strength is read from outside the weights: only loops see it move
    device = next((p.device.type for p in evaluator.model.parameters()), "cpu")
    convolutions = any(isinstance(m, nn.Conv2d) for m in evaluator.model.modules())
    sizes = [None] if evaluator.mode == "batch" else _sizes(plain.at_point.sizes, device)
    if not convolutions and linears(evaluator.model):
        yield "oneDNN", lambda: split_loop(evaluator, None, False), 0.0
        if not knob:
            yield "oneDNN, recorded", lambda: split_loop(evaluator, None, False, recorded=True), _RECORD_S
    for size in sizes:
        if convolutions:
            yield f"channels last {size}", lambda size=size: split_loop(evaluator, size, True), 0.0
        elif size is not None:
            yield f"split {size}", lambda size=size: split_loop(evaluator, size, False), 0.0
    if evaluator.mode in {"frozen", "as found"} and not convolutions and not knob:
        for points in (8, 32):
            yield f"stacked {points}", lambda points=points: Stacked(evaluator, points), 0.0
    if knob:
        return
    if device == "cuda":
        for size in sizes:
            yield (
                f"replayed {size}",
                lambda size=size: Replayed(split_loop(evaluator, size, convolutions)),
                1.0,
            )
        for size in sizes:
            make = lambda size=size: Replayed(split_loop(evaluator, size, convolutions, True))  # noqa: E731
            yield f"compiled, replayed {size}", make, _COMPILE_S
    else:
        for size in sizes:
            make = lambda size=size: split_loop(evaluator, size, convolutions, True)  # noqa: E731
            yield f"compiled {size}", make, _COMPILE_S


def _sizes(batches: list[int], device: str) -> list[int | None]:
    # What a layer leaves should stay in the cache for the next one: tens of samples on a CPU, hundreds on a GPU.
    usual = (64, 32, 128, 256) if device == "cpu" else (5000, 1000, 500)
    smaller = [size for size in usual if size < max(batches)]
    return [*smaller] if device == "cpu" and smaller else [None, *smaller]


def choose(
    evaluator: Evaluator, points: Sequence[Point], left: int, wanted: str = "auto", *, asked: bool = True
) -> Choice:
    """Try the ways on the first points and leave ``evaluator`` with the one to use.

    Args:
        evaluator: of the first twin.
        points: points of the grid to try on, at least one.
        left: how many points there are to do.
        wanted: "auto"; "plain"; or a name of a way, from an earlier choice.
        asked: the user wants this way; else it is another twin's, and the plain loop will do where there is no such way.

    Raises:
        SkipscopeError: the wanted way is unknown. One that fails on this model, or gives other numbers than the plain
            loop, is not taken.
    """
    evaluator.strategy = evaluator.plain  # an earlier choice may stand: another process's store has another
    seconds = _time(evaluator.plain, points[:1])
    if seconds < 1:
        seconds = min(seconds, _time(evaluator.plain, points[:2]))
    plain = Choice("plain", "the reference; asked for", 0.0, seconds)
    if wanted == "plain":
        return plain
    key = _key(evaluator)
    name = wanted if wanted != "auto" else _chosen.get(key)
    if name is not None:
        if name == "plain" or not (asked or name in {way for way, *_ in _ways(evaluator)}):
            return _reason(plain, "as measured before")
        return _take(evaluator, points, name, plain)
    choice = _measured(evaluator, points, left, plain)
    _chosen[key] = choice.name
    return choice


def _key(evaluator: Evaluator) -> tuple[Any, ...]:
    shapes = tuple((tuple(p.shape), str(p.dtype), str(p.device)) for p in evaluator.model.parameters())
    kinds = tuple(type(m).__name__ for m in evaluator.model.modules())
    ways = tuple(way for way, *_ in _ways(evaluator))
    return kinds, shapes, tuple(evaluator.plain.at_point.sizes), evaluator.mode, torch.get_num_threads(), ways


def _reason(choice: Choice, why: str) -> Choice:
    return Choice(choice.name, why, choice.error, choice.point_seconds)


def _take(evaluator: Evaluator, points: Sequence[Point], name: str, plain: Choice) -> Choice:
    makers = {way: make for way, make, _ in _ways(evaluator)}
    if name not in makers:
        raise SkipscopeError(
            "landscape", "unknown strategy", expected=f"auto, plain, {', '.join(makers)}", got=repr(name)
        )
    try:
        strategy = makers[name]()
        error = _disagreement(evaluator, strategy, points[:2])
    except Exception as refused:  # as in _measured
        return _reason(
            plain, f"{name} is no way for this model ({type(refused).__name__}: {str(refused)[:100]})"
        )
    if error > _allowed(evaluator):
        return _reason(plain, f"{name} differs from the plain loop by {error:.1e} here")
    evaluator.strategy = strategy
    return Choice(name, "as chosen before", error, _time(strategy, points[:1]))


def _measured(evaluator: Evaluator, points: Sequence[Point], left: int, plain: Choice) -> Choice:
    budget = _SHARE * plain.point_seconds * left
    best, spent, tried = plain, 0.0, [f"plain {_ms(plain.point_seconds)}"]
    for name, make, cost in _ways(evaluator):
        upfront = cost if cost == _RECORD_S and name.endswith("recorded") else 0.0
        if spent + upfront + 4 * best.point_seconds > budget:
            continue
        if cost >= _COMPILE_S and not _pays(name, best, left):
            continue
        began = time.perf_counter()
        try:
            strategy = make()
            error = _disagreement(evaluator, strategy, points[:2])
            holds = error <= _allowed(evaluator)
            seconds, incumbent = _race(strategy, evaluator.strategy, points) if holds else (0.0, 0.0)
            tried.append(
                f"{name} {_ms(seconds)} (to {_ms(incumbent)})" if holds else f"{name} differs by {error:.1e}"
            )
            if holds and seconds * _CLEARLY < incumbent:
                best, evaluator.strategy = Choice(name, "", error, seconds), strategy
        except Exception as refused:  # any way but the plain one may fail on a model; then it is not a way
            tried.append(f"{name} refused ({type(refused).__name__})")
        spent += time.perf_counter() - began
    why = "per point: " + ", ".join(tried) if len(tried) > 1 else "too little work to try other ways"
    return _reason(best, why)


def _race(way: Strategy, incumbent: Strategy, points: Sequence[Point]) -> tuple[float, float]:
    """Seconds a point of both, run in turn: on a busy machine only what runs side by side can be compared."""
    many = list(points) if isinstance(way, Stacked) else list(points[:2])
    few = list(points) if isinstance(incumbent, Stacked) else list(points[:2])
    times = [(_time(way, many), _time(incumbent, few)) for _ in range(2)]
    if sum(map(sum, times)) < _SHORT_S:  # too short to tell from what else the machine does
        times += [(_time(way, many), _time(incumbent, few)) for _ in range(4)]
    return min(t for t, _ in times), min(t for _, t in times)


def _pays(name: str, best: Choice, left: int) -> bool:
    """Compiling is tried on the best batch size alone, and only when half of what is left would pay for it twice."""
    return best.point_seconds * left > 4 * _COMPILE_S and (
        best.name in {"plain", "oneDNN"} or best.name.split()[-1] == name.split()[-1]
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _time(strategy: Strategy, points: Sequence[Point]) -> float:
    began = time.perf_counter()
    gather(strategy(points))
    return (time.perf_counter() - began) / len(points)


def _allowed(evaluator: Evaluator) -> float:
    dtypes = {p.dtype for p in evaluator.model.parameters()}
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        dtypes.add(torch.bfloat16)
    return max((_TOLERANCE.get(dtype, 3e-2) for dtype in dtypes), default=1e-3)


def _disagreement(evaluator: Evaluator, strategy: Strategy, points: Sequence[Point]) -> float:
    """Largest relative difference to the plain loop, over values and samples' shares; also at the origin."""
    at = [evaluator.origin_point, *points]
    ours, reference = gather(strategy(at)), gather(evaluator.plain(at))
    pairs = [(ours.values, reference.values)]
    if (ours.numerators is None) != (reference.numerators is None):
        return float("inf")
    if ours.numerators is not None and reference.numerators is not None:
        pairs.append((ours.numerators.sum(1), reference.numerators.sum(1)))
    worst = 0.0
    for a, b in pairs:
        for x, y in zip(a, b):
            if x == y or (x != x and y != y):
                continue
            worst = max(worst, abs(x - y) / max(abs(y), 1e-30) if x == x and y == y else float("inf"))
    return float(worst)
