"""Autotuning of the evaluation strategy: each candidate is timed on grid points against the fastest so far.

A strategy is chosen only if it reproduces the plain loop's values (to rounding) and is clearly faster, so
that timing noise does not change the choice. Points evaluated by the chosen strategy are not computed again.
Measurements are remembered for the process: a second call on the same kind of model reuses them, and a call
of the same size gives the same result bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from skipscope._errors import SkipscopeError
from skipscope._rank_batches import RankBatches
from skipscope.surfaces.evaluation._evaluator import Evaluator, Point, Strategy
from skipscope.surfaces.evaluation._point_loss import Reading
from skipscope.surfaces.evaluation._strategies import (
    CAN_FORK,
    COMPILE_S,
    PER_CORE,
    StrategySpec,
    WorkerPool,
    candidate_strategies,
    per_core,
)

# Speedup over the fastest strategy so far that a candidate needs.
MIN_SPEEDUP = 1.08
# Timings that differ by this factor or more are not repeated.
_CLEAR = 1.5
# Times shorter than this are measured several times.
_SHORT_S = 0.2
# Share of the whole estimated time that may be spent on trying.
_SHARE = 0.2
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.complex128: 1e-9, torch.complex64: 1e-3}


@dataclass
class _Knowledge:
    """Measurements of this process on models of one kind.

    Attributes:
        seconds: strategy -> seconds per point, for strategies that gave right values.
        errors: strategy -> largest relative difference to the plain loop.
        refused: strategy -> reason, for strategies that failed or gave other values.
        choices: number of grid points -> the strategy chosen for it.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    choices: dict[int, str] = field(default_factory=dict)


_known: dict[tuple[Any, ...], _Knowledge] = {}


@dataclass(frozen=True)
class Choice:
    """Chosen strategy.

    Attributes:
        name: name of the strategy.
        why: reason for the choice, with the timings.
        error: largest relative difference to the plain loop at the points it was tried on.
        point_seconds: seconds per point.
    """

    name: str
    why: str
    error: float
    point_seconds: float


def choose(
    evaluator: Evaluator, points: Sequence[Point], left: int, wanted: str = "auto", *, asked: bool = True
) -> Choice:
    """Try strategies on points of the grid and leave ``evaluator`` with the one to use.

    Args:
        evaluator: evaluator of a twin.
        points: points of the grid to try on, at least one; the first is compared with the plain loop.
        left: number of points to compute.
        wanted: "auto"; "plain"; or a strategy's name, from an earlier choice. A strategy that fails on this
            model, or gives other values than the plain loop, is not used.
        asked: whether the user named this strategy, so that an unknown name is an error; if another twin uses
            it, the plain loop replaces an unknown strategy.

    Raises:
        SkipscopeError: the user's strategy is unknown.
    """
    # Drop an earlier choice: a store opened by another process first may require another strategy.
    evaluator.use(evaluator.plain)
    plain = Choice("plain", "the reference; asked for", 0.0, evaluator.origin_seconds)
    if wanted == "plain":
        return plain
    if isinstance(evaluator.plain.at_point.data, RankBatches):
        return replace(plain, why="weights are spread over ranks: each moves its shards in place")
    knowledge = _known.setdefault(_key(evaluator), _Knowledge())
    if wanted == "auto" and left not in knowledge.choices:
        choice = _Autotune(evaluator, points, left, knowledge).run()
        knowledge.choices[left] = choice.name
        return choice
    name = knowledge.choices[left] if wanted == "auto" else wanted
    spec = _named(evaluator, name, points[0])
    if spec is None and asked:
        known = ", ".join(spec.name for spec in candidate_strategies(evaluator))
        raise SkipscopeError(
            "landscape",
            "unknown strategy",
            expected=f"auto, {known}; all but the compiled ones also with {PER_CORE!r}",
            got=repr(name),
        )
    if spec is None or name == "plain":
        return replace(plain, why="as measured before")
    return _take(evaluator, points[0], spec, plain)


def _key(evaluator: Evaluator) -> tuple[Any, ...]:
    shapes = tuple((tuple(p.shape), str(p.dtype), str(p.device)) for p in evaluator.model.parameters())
    kinds = tuple(type(m).__name__ for m in evaluator.model.modules())
    names = tuple(spec.name for spec in candidate_strategies(evaluator))
    sizes = tuple(evaluator.plain.at_point.sizes)
    return kinds, shapes, sizes, evaluator.mode, torch.get_num_threads(), names


def _named(evaluator: Evaluator, name: str, point: Point) -> StrategySpec | None:
    specs = candidate_strategies(evaluator)
    spec = next((spec for spec in specs if spec.name == name.removesuffix(PER_CORE)), None)
    if spec is None or not name.endswith(PER_CORE):
        return spec
    return per_core(spec, point, evaluator.origin_seconds) if spec.forks else None


def _take(evaluator: Evaluator, point: Point, spec: StrategySpec, plain: Choice) -> Choice:
    strategy, found = None, plain
    try:
        strategy = spec.make()
        seconds, reading = _timed(strategy, [point])
        error = _disagreement(reading, evaluator.plain([point]))
        if error <= _allowed(evaluator):
            evaluator.use(strategy)
            evaluator.keep([point], reading)
            return Choice(spec.name, "as chosen before", error, seconds)
        found = replace(plain, why=f"{spec.name} differs from the plain loop by {error:.1e} here")
    except Exception as refused:
        found = replace(plain, why=f"{spec.name} does not run this model ({_brief(refused)})")
    finally:
        # Also after Ctrl-C.
        if strategy is not None and evaluator.strategy is not strategy:
            strategy.close()
    return found


class _Autotune:
    """Time candidates against the fastest strategy so far, within a time budget.

    A candidate's price is the time to create it and to evaluate one point. It is tried if half of its
    expected gain on the remaining points pays for that; otherwise only this candidate is skipped.

    Args:
        evaluator: ends up using the fastest strategy.
        points: points to try on.
        left: number of points to compute.
        knowledge: measurements of earlier calls, updated by this one.
    """

    def __init__(self, evaluator: Evaluator, points: Sequence[Point], left: int, knowledge: _Knowledge):
        self.evaluator, self.points, self.left, self.knowledge = evaluator, list(points), left, knowledge
        self._known_reference: Reading | None = None
        self.seconds = evaluator.origin_seconds
        # A short first pass mostly measures warm-up.
        if self.seconds < _SHORT_S:
            self.seconds, self._known_reference = _timed(evaluator.plain, self.points[:1])
            evaluator.keep(self.points[:1], self._known_reference)
        if self.seconds < _SHORT_S:
            self.seconds = min(self.seconds, *(_timed(evaluator.plain, self.points[:1])[0] for _ in range(2)))
        self.best = Choice("plain", "", 0.0, self.seconds)
        self.timings = [f"plain {_ms(self.seconds)}"]
        self.budget = _SHARE * self.seconds * left

    def run(self) -> Choice:
        """Try the candidates and return the choice."""
        plain, *others = candidate_strategies(self.evaluator)
        fastest = plain
        for spec in others:
            if spec.seconds < COMPILE_S and self._try(spec) and spec.forks:
                fastest = spec
        if fastest.forks and CAN_FORK and torch.get_num_threads() > 1 and self.best.name == fastest.name:
            self._try(per_core(fastest, self.points[0], self.best.point_seconds))
        for spec in others:
            if spec.seconds >= COMPILE_S:
                self._try(spec)
        tried = len(self.timings) > 1
        return replace(
            self.best,
            why="per point: " + ", ".join(self.timings) if tried else "too little work to try others",
        )

    @property
    def reference(self) -> Reading:
        """Reading at the first point by the fastest strategy so far; it agrees with the plain loop."""
        if self._known_reference is None:
            self._known_reference = self.evaluator.strategy(self.points[:1])
            self.evaluator.keep(self.points[:1], self._known_reference)
        return self._known_reference

    def _worth(self, spec: StrategySpec) -> bool:
        price = spec.seconds + spec.evaluations * self.best.point_seconds
        gain = self.left * self.best.point_seconds * (1 - 1 / spec.gain)
        return price <= min(gain / 2, self.budget)

    def _try(self, spec: StrategySpec) -> bool:
        """Try a candidate if that is worth its time. Returns whether it is now the fastest."""
        before = self.knowledge
        if spec.name in before.refused:
            self.timings.append(f"{spec.name} {before.refused[spec.name]}")
            return False
        if spec.name in before.seconds and before.seconds[spec.name] * MIN_SPEEDUP >= self.best.point_seconds:
            self.timings.append(f"{spec.name} {_ms(before.seconds[spec.name])} before")
            return False
        if not self._worth(spec):
            return False
        began, strategy = time.perf_counter(), None
        try:
            strategy = spec.make()
            return self._benchmark(spec, strategy)
        except Exception as refused:
            self._refuse(spec.name, f"refused ({_brief(refused)})")
            return False
        finally:
            self.budget -= time.perf_counter() - began
            if strategy is not None and self.evaluator.strategy is not strategy:
                strategy.close()

    def _benchmark(self, spec: StrategySpec, strategy: Strategy) -> bool:
        name, reference = spec.name, None
        first = strategy.first if isinstance(strategy, WorkerPool) else None
        # One thread's time is known; the copies together are at best this many times faster.
        if first is not None:
            seconds, reading, points = first[0] / strategy.cores, first[1], self.points[:1]  # type: ignore[union-attr]
        else:
            points = self.points[:1]
            if spec.reads_weights and self._known_reference is None:
                points, reference = [self.evaluator.origin_point], self.evaluator.plain_origin
            seconds, reading = _timed(strategy, points)
        error = _disagreement(reading, self.reference if reference is None else reference)
        if error > _allowed(self.evaluator):
            self._refuse(name, f"differs by {error:.1e}")
            return False
        kept = [(points, reading)]
        incumbent = self.best.point_seconds
        if first is not None:
            if seconds * MIN_SPEEDUP > incumbent:
                return self._measured(name, seconds, incumbent, error)
            points = self.points[1 : 1 + strategy.cores] or self.points[:1]  # type: ignore[union-attr]
            seconds, reading = _timed(strategy, points)
            kept.append((points, reading))
        if (seconds < _CLEAR * incumbent and incumbent < _CLEAR * seconds) or seconds * len(
            points
        ) < _SHORT_S:
            seconds, incumbent = self._again(strategy, points, seconds)
        won = self._measured(name, seconds, incumbent, error)
        if won:
            self._known_reference = None
            self.best = Choice(name, "", error, seconds)
            self.evaluator.use(strategy)
            for points, reading in kept:
                self.evaluator.keep(points, reading)
        return won

    def _again(self, strategy: Strategy, points: Sequence[Point], seconds: float) -> tuple[float, float]:
        """Seconds per point of candidate and incumbent, timed alternately: a busy machine slows both."""
        incumbent, few = self.evaluator.strategy, self.points[:1]
        if isinstance(incumbent, WorkerPool):
            few = self.points[: incumbent.cores]
        ours, theirs = [seconds], []
        for _ in range(5 if seconds * len(points) < _SHORT_S else 1):
            theirs.append(_timed(incumbent, few)[0])
            ours.append(_timed(strategy, points)[0])
        return min(ours), min(theirs)

    def _measured(self, name: str, seconds: float, incumbent: float, error: float) -> bool:
        self.timings.append(f"{name} {_ms(seconds)} against {_ms(incumbent)}")
        self.knowledge.seconds[name], self.knowledge.errors[name] = seconds, error
        return seconds * MIN_SPEEDUP < incumbent

    def _refuse(self, name: str, why: str) -> None:
        self.timings.append(f"{name} {why}")
        self.knowledge.refused[name] = why


def _timed(strategy: Strategy, points: Sequence[Point]) -> tuple[float, Reading]:
    """Seconds per point, and the reading."""
    began = time.perf_counter()
    reading = strategy(points)
    return (time.perf_counter() - began) / len(points), reading


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:100]}"


def _allowed(evaluator: Evaluator) -> float:
    dtypes = {p.dtype for p in evaluator.model.parameters()}
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        dtypes.add(torch.bfloat16)
    return max((_TOLERANCE.get(dtype, 3e-2) for dtype in dtypes), default=1e-3)


def _disagreement(ours: Reading, reference: Reading) -> float:
    """Largest relative difference over the points of ``reference``, of values and of samples' shares."""
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
