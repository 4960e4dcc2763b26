"""Ways of evaluating points, each giving the plain loop's numbers to rounding.

No way is the fastest everywhere: convolutions on a CPU want channels-last and small batches, linear layers may want
oneDNN's kernel instead of the BLAS that torch came with (twice as fast on some processors), tiny networks want many
points at once (their time is dispatch), small ones a point a core (on several threads they wait for threads), a GPU
wants its kernels replayed as one graph; compiling costs its own half minute. :mod:`skipscope.surfaces._choice` times them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from skipscope._data import Batch, Batches, batch_size, map_tensors
from skipscope.surfaces._evaluate import Evaluator, Loop, Point, Strategy
from skipscope.surfaces._forked import CAN_FORK, Forked, memory_of, one_thread
from skipscope.surfaces._memory import fits
from skipscope.surfaces._moving import MovingCopy
from skipscope.surfaces._one_dnn import linears, through_one_dnn
from skipscope.surfaces._points import PointLoss, Reading, gather, joined, take
from skipscope.surfaces._recorded import Recorded

_RECORD_S = 0.3  # what recording a forward pass may cost
_IMPORT_S = 2.0  # and the first time, when torch has not loaded its compiler yet (an optimizer does, too)
COMPILE_S = 40.0  # what compiling may cost
_FORK_S = 0.03  # what a copy of this process may cost
A_CORE = ", a point a core"


@dataclass(frozen=True)
class Way:
    """A way that can be made.

    Attributes:
        name: in results, in stores, and for ``strategy=``.
        make: makes it.
        seconds: what making it may cost.
        size: of the batches; None as they came.
        forks: copies of the process can go this way, each with a thread.
    """

    name: str
    make: Callable[[], Strategy]
    seconds: float = 0.0
    size: int | None = None
    forks: bool = False


# --- the ways ------------------------------------------------------------------------------------------------------


class Stacked:
    """Several points in one call: ``vmap`` over stacked weights.

    Args:
        evaluator: whose model, data and directions to use.
        size: points a call.
    """

    def __init__(self, evaluator: Evaluator, size: int):
        self.name, self.size = f"{size} points at once", size
        self.at_point = evaluator.plain.at_point
        self.moving = MovingCopy(evaluator.model, evaluator.directions)

    def __call__(self, points: Sequence[Point]) -> Reading:
        read: list[dict[str, Any]] = []
        for start in range(0, len(points), self.size):
            part = list(points[start : start + self.size])
            # A fixed size keeps the kernels, and so the bits, the same for a last part that is not full.
            weights = self.moving.stacked(part + part[-1:] * (self.size - len(part)))
            out = vmap(self._one, randomness="error")(weights)
            read += [_pick(out, i) for i in range(len(part))]
        return gather(read)

    def close(self) -> None:
        """Nothing is held."""

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
    name: str,
    size: int | None = None,
    channels_last: bool = False,
    compiled: bool = False,
    recorded: bool = False,
) -> Loop:
    """The plain loop on smaller batches (``size``), with channels-last layout, or with a compiled or recorded model."""
    old = evaluator.plain.at_point
    data = _resplit(old.data, size, channels_last)
    at_point = PointLoss(data, old.loss, old.metrics, once=True)
    loop = Loop(
        evaluator.model, evaluator.directions, at_point, evaluator.mode, name=name, channels_last=channels_last,
        knob=evaluator.knob,
    )  # fmt: skip
    if compiled:
        faster = torch.compile(loop.moving.model, dynamic=False)
        loop.run = lambda model, batch: _call(faster, batch)
    elif linears(evaluator.model):
        once = None if recorded else lambda: at_point.read(loop.moving.model, loop.run)
        through_one_dnn(loop.moving.model, once)
    if recorded:
        loop.run = Recorded(loop.moving.model, loop.run)
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
        self.name, self.at_point, self.moving = loop.name, loop.at_point, loop.moving
        self.recalibrates, self.draws, self.run, self.knob, self.caches = False, False, loop.run, None, []
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


class SideBySide:
    """A point a core: copies of this process go through the loop, each with one thread.

    One thread's numbers are the same in a copy and here, so that how many copies there are changes no bit; where there
    can be none, this process does it all.

    Args:
        name: for the result.
        loop: the loop.
        cores: how many copies.
        point: of the grid, to try on.
        seconds: what a point takes here, about.

    Raises:
        MemoryError: the copies would not fit.
    """

    def __init__(self, name: str, loop: Loop, cores: int, point: Point, seconds: float):
        self.name, self.loop, self.cores = name, loop, cores
        self._copies: Forked[Sequence[Point], Reading] | None = None
        if not CAN_FORK or cores < 2:
            return
        patience = 10 + 100 * cores * seconds
        needed = memory_of(loop, [point], patience) + loop.moving.bytes
        if not fits(cores * needed):
            raise MemoryError(f"{cores} copies need {cores * needed / 2**30:.1f} GiB")
        self._copies = Forked(loop, cores, patience)

    def __call__(self, points: Sequence[Point]) -> Reading:
        if self._copies is None:
            with one_thread():
                return self.loop(points)
        size = max(1, len(points) // (8 * self.cores))
        parts = [points[start : start + size] for start in range(0, len(points), size)]
        found = dict(self._copies.surely(parts))
        return joined([found[i] for i in range(len(parts))])

    def close(self) -> None:
        """End the copies."""
        if self._copies is not None:
            self._copies.close()
            self._copies = None


# --- all of them ---------------------------------------------------------------------------------------------------


def ways(evaluator: Evaluator) -> Iterator[Way]:
    """The ways this model can go on its device, the plain one first, then the likeliest."""
    plain = evaluator.plain
    device = next((p.device.type for p in evaluator.model.parameters()), "cpu")
    yield Way("plain", lambda: plain, forks=device == "cpu")
    if plain.draws or plain.recalibrates or plain.caches or plain.at_point.records:
        return
    knob = evaluator.knob is not None  # a strength is read from outside the weights: only loops see it move
    convolutions = any(isinstance(m, nn.Conv2d) for m in evaluator.model.modules())
    sizes = [None] if evaluator.mode == "batch" else _sizes(plain.at_point.sizes, device)
    if not convolutions and linears(evaluator.model):
        yield Way("oneDNN", partial(split_loop, evaluator, "oneDNN"), forks=True)
        if not knob:
            make = partial(split_loop, evaluator, "oneDNN, recorded", recorded=True)
            seconds = _RECORD_S + _IMPORT_S * ("torch._dynamo" not in sys.modules)
            yield Way("oneDNN, recorded", make, seconds, forks=True)
    for size in sizes:
        if name := _words(size, convolutions):
            make = partial(split_loop, evaluator, name, size, convolutions)
            yield Way(name, make, size=size, forks=device == "cpu")
    if evaluator.mode in {"frozen", "as found"} and not convolutions and not knob:
        for points in (8, 32):
            yield Way(f"{points} points at once", partial(Stacked, evaluator, points))
    if knob:
        return
    for compiled in (False, True):
        for size in sizes:
            if compiled or device == "cuda":
                name = _words(size, convolutions, compiled, device == "cuda")
                make = partial(split_loop, evaluator, name, size, convolutions, compiled)
                replayed = partial(_replayed, make)
                yield Way(name, replayed if device == "cuda" else make, COMPILE_S * compiled, size)


def _replayed(make: Callable[[], Loop]) -> Strategy:
    return Replayed(make())


def _words(size: int | None, channels_last: bool, compiled: bool = False, graph: bool = False) -> str:
    words = ["compiled"] * compiled + ["channels last"] * channels_last
    return ", ".join([*words, *([f"batches of {size}"] if size else []), *["CUDA graph"] * graph])


def side_by_side(way: Way, point: Point, seconds: float) -> Way:
    """The same, a point a core.

    Args:
        way: one that forks.
        point: of the grid, to try on.
        seconds: what a point takes, about.
    """
    name, cores = way.name + A_CORE, torch.get_num_threads()

    def make() -> Strategy:
        loop = way.make()
        assert isinstance(loop, Loop)
        return SideBySide(name, loop, cores, point, seconds)

    return Way(name, make, (cores + 1) * _FORK_S, way.size)


def _sizes(batches: list[int], device: str) -> list[int | None]:
    # What a layer leaves should stay in the cache for the next one: tens of samples on a CPU, hundreds on a GPU.
    usual = (64, 32, 128, 256) if device == "cpu" else (5000, 1000, 500)
    smaller = [size for size in usual if size < max(batches)]
    return [*smaller] if device == "cpu" and smaller else [None, *smaller]
