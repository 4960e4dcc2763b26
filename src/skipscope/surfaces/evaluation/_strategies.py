"""Strategies for evaluating points, each giving the plain loop's values to rounding.

No strategy is the fastest everywhere. Convolutions on a CPU run best in channels-last format and small
batches; linear layers with oneDNN's kernel instead of torch's BLAS (twice as fast on some processors); small
networks with one point per core, because several threads mostly wait for each other; and a GPU with its
kernels replayed as one graph. Compiling costs half a minute. Strategies that won by less than 1.2 on every
network of the benchmark are left out (other batch sizes, several points under one vmap, compiling on a CPU).
:mod:`skipscope.surfaces.evaluation._autotune` times them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skipscope._data import Batch, Batches, batch_size, map_tensors, rows
from skipscope._torch_private import compiler_is_loaded
from skipscope.surfaces.evaluation._evaluator import Evaluator, Loop, Point, Strategy
from skipscope.surfaces.evaluation._memory_limits import fits
from skipscope.surfaces.evaluation._onednn_linears import linears, through_one_dnn
from skipscope.surfaces.evaluation._point_loss import PointLoss, Reading, joined
from skipscope.surfaces.evaluation._process_pool import CAN_FORK, Forked, measured_in_a_copy, one_thread
from skipscope.surfaces.evaluation._recorded_forward import Recorded

# Cost of recording a forward pass.
_RECORD_S = 0.3
# Cost of importing torch's compiler, if nothing has loaded it yet (an optimizer does).
_IMPORT_S = 2.0
# Cost of compiling.
COMPILE_S = 40.0
# Samples of a convolution's batch: 32 were as fast and 128 slower.
_BATCH = 64
# Cost of forking a copy of this process.
_FORK_S = 0.03
PER_CORE = ", a point a core"


@dataclass(frozen=True)
class StrategySpec:
    """Strategy with its expected gain and cost.

    Attributes:
        name: name in results, in stores, and for ``strategy=``.
        make: creates the strategy.
        gain: speedup over the plain loop on the benchmark's networks.
        seconds: cost of creating it.
        evaluations: further cost of trying it, in evaluations of a point.
        forks: whether forked copies of the process can use it, each with one thread.
        reads_weights: whether it reads all weights from the moved parameters at every point. Then agreement
            with the plain loop at the origin, whose reading is known already, is enough.
    """

    name: str
    make: Callable[[], Strategy]
    gain: float = 1.0
    seconds: float = 0.0
    evaluations: float = 1.0
    forks: bool = False
    reads_weights: bool = False


# --- the strategies ---


def split_loop(
    evaluator: Evaluator,
    name: str,
    size: int | None = None,
    channels_last: bool = False,
    compiled: bool = False,
    recorded: bool = False,
) -> Loop:
    """The plain loop with smaller batches (``size``), channels-last, or a compiled or recorded model."""
    old = evaluator.plain.at_point
    data = _resplit(old.data, size, channels_last)
    at_point = PointLoss(data, old.loss, old.metrics, once=True)
    loop = Loop(
        evaluator.model,
        evaluator.directions,
        at_point,
        evaluator.mode,
        name=name,
        channels_last=channels_last,
        strength_tensor=evaluator.strength_tensor,
    )
    if compiled:
        faster = torch.compile(loop.moving.model, dynamic=False)
        loop.run = lambda model, batch: _call(faster, batch)
    elif not channels_last and linears(evaluator.model):
        once = None if recorded else lambda: at_point.read(loop.moving.model, loop.run)
        through_one_dnn(loop.moving.model, once)
    if recorded:
        loop.run = Recorded(loop.moving.model, loop.run)
        # Record at the origin: a constant read from a weight then shows as soon as the weights move.
        at_point.read(loop.moving.model, loop.run)
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
            part = rows(batch, slice(start, start + size), n)
            parts.append(tuple(part) if isinstance(batch, tuple) else part)
    return Batches([map_tensors(part, lay_out) for part in parts], single=data.single and len(parts) == 1)


class Replayed(Loop):
    """The loop as a CUDA graph: kernels are recorded once and replayed at each point.

    Args:
        loop: the loop to record.
    """

    def __init__(self, loop: Loop):
        self.name, self.at_point, self.moving = loop.name, loop.at_point, loop.moving
        self.recalibrates, self.draws, self.run, self.strength_tensor, self.caches = (
            False,
            False,
            loop.run,
            None,
            [],
        )
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # cuDNN benchmarks its kernels once, and the recording keeps the fastest.
        searching, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        try:
            # Libraries must initialise before the recording.
            with torch.cuda.stream(stream):
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


class WorkerPool:
    """One point per core: forked copies of this process run the loop, each with one thread.

    One thread gives the same values in a copy and here, so the number of copies does not change the result.
    Without forks this process evaluates all points.

    Args:
        name: name of the strategy in the result.
        loop: the loop to run.
        cores: number of copies.
        point: a grid point to try on.
        seconds: approximate seconds per point in this process.

    Attributes:
        first: seconds that ``point`` took in a single copy, and its reading; None without copies.

    Raises:
        MemoryError: the copies would not fit.
    """

    def __init__(self, name: str, loop: Loop, cores: int, point: Point, seconds: float):
        self.name, self.loop, self.cores = name, loop, cores
        self._copies: Forked[Sequence[Point], Reading] | None = None
        self.first: tuple[float, Reading] | None = None
        if not CAN_FORK or cores < 2:
            return
        patience = 10 + 100 * cores * seconds
        needed, took, reading = measured_in_a_copy(loop, [point], patience)
        needed += loop.moving.bytes
        if not fits(cores * needed):
            raise MemoryError(f"{cores} copies need {cores * needed / 2**30:.1f} GiB")
        self.first = took, reading
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
        """Kill the copies."""
        if self._copies is not None:
            self._copies.close()
            self._copies = None


# --- all of them ---


def candidate_strategies(evaluator: Evaluator) -> Iterator[StrategySpec]:
    """Yield the strategies for this model on its device: the plain loop, then the most promising first."""
    plain = evaluator.plain
    device = next((p.device.type for p in evaluator.model.parameters()), "cpu")
    yield StrategySpec("plain", lambda: plain, forks=device == "cpu")
    if plain.draws or plain.recalibrates or plain.caches or plain.at_point.records:
        return
    # A strength is not a weight, so a recording or a CUDA graph would not see it move.
    strength_tensor = evaluator.strength_tensor is not None
    convolutions = any(isinstance(m, nn.Conv2d) for m in evaluator.model.modules())
    if device == "cpu" and convolutions:
        # With tens of samples a layer's output stays in the cache for the next layer.
        size = _BATCH if evaluator.mode != "batch" and max(plain.at_point.sizes) > _BATCH else None
        name = "channels last" + (f", batches of {size}" if size else "")
        yield StrategySpec(
            name, partial(split_loop, evaluator, name, size, True), 2.5, forks=True, reads_weights=True
        )
    if not convolutions and linears(evaluator.model):
        yield StrategySpec("oneDNN", partial(split_loop, evaluator, "oneDNN"), gain=1.5, forks=True)
        if not strength_tensor:
            make = partial(split_loop, evaluator, "oneDNN, recorded", recorded=True)
            seconds = _RECORD_S + _IMPORT_S * (not compiler_is_loaded())
            yield StrategySpec("oneDNN, recorded", make, 1.2, seconds, forks=True)
    if device == "cuda" and not strength_tensor:
        words = ["channels last"] * convolutions + ["CUDA graph"]
        for compiled in (False, True):
            name = ", ".join(["compiled"] * compiled + words)
            make = partial(split_loop, evaluator, name, None, convolutions, compiled)
            yield StrategySpec(name, partial(_replayed, make), 1.5, COMPILE_S * compiled, evaluations=4)


def _replayed(make: Callable[[], Loop]) -> Strategy:
    return Replayed(make())


def per_core(spec: StrategySpec, point: Point, seconds: float) -> StrategySpec:
    """Variant of a strategy with one point per core.

    Args:
        spec: a strategy that forks.
        point: a grid point to try on.
        seconds: approximate seconds per point.
    """
    name, cores = spec.name + PER_CORE, torch.get_num_threads()

    def make() -> Strategy:
        loop = spec.make()
        assert isinstance(loop, Loop)
        return WorkerPool(name, loop, cores, point, seconds)

    # A trial evaluates one point in one thread, then one point per core in parallel.
    return StrategySpec(name, make, 1 + 0.4 * (cores - 1), (cores + 1) * _FORK_S, cores + 1.0)
