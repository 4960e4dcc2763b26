"""Which way of evaluating points is fastest here: each is tried on the first points, against the plain loop.

A way is taken only if it gives the plain loop's numbers (to rounding) and is clearly faster, so that timing noise
does not change the choice; and the choice is remembered, so that a second call in a process gives the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from skipscope._errors import SkipscopeError
from skipscope.surfaces._evaluate import Evaluator, Point, Strategy
from skipscope.surfaces._strategies import (
    A_CORE,
    CAN_FORK,
    COMPILE_S,
    SideBySide,
    Stacked,
    Way,
    side_by_side,
    ways,
)

_CLEARLY = 1.08  # how many times faster than the way before it a way must be to be taken
_SHORT_S = 0.2  # a race shorter than this is run three times as long
_SHARE = 0.1  # of the whole estimated time may be spent on trying (compiling must save twice what it costs)
_MANY = 8  # points a core to time a point a core on
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.complex128: 1e-9, torch.complex64: 1e-3}

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
    evaluator.use(evaluator.plain)  # an earlier choice may stand: another process's store has another
    seconds = _time(evaluator.plain, points[:1])
    if seconds < 1:
        seconds = min(seconds, _time(evaluator.plain, points[:2]))
    plain = Choice("plain", "the reference; asked for", 0.0, seconds)
    if wanted == "plain":
        return plain
    key = _key(evaluator)
    name = wanted if wanted != "auto" else _chosen.get(key)
    if name is None:
        choice = _Trial(evaluator, points, left, plain).run()
        _chosen[key] = choice.name
        return choice
    way = _named(evaluator, name, points[0], seconds)
    if way is None and asked:
        known = ", ".join(way.name for way in ways(evaluator))
        raise SkipscopeError(
            "landscape", "unknown strategy", expected=f"auto, {known}; all but those at once or compiled also with {A_CORE!r}",
            got=repr(name),
        )  # fmt: skip
    if way is None or name == "plain":
        return replace(plain, why="as measured before")
    return _take(evaluator, points, way, plain)


def _key(evaluator: Evaluator) -> tuple[Any, ...]:
    shapes = tuple((tuple(p.shape), str(p.dtype), str(p.device)) for p in evaluator.model.parameters())
    kinds = tuple(type(m).__name__ for m in evaluator.model.modules())
    names = tuple(way.name for way in ways(evaluator))
    return (
        kinds,
        shapes,
        tuple(evaluator.plain.at_point.sizes),
        evaluator.mode,
        torch.get_num_threads(),
        names,
    )


def _named(evaluator: Evaluator, name: str, point: Point, seconds: float) -> Way | None:
    way = next((way for way in ways(evaluator) if way.name == name.removesuffix(A_CORE)), None)
    if way is None or not name.endswith(A_CORE):
        return way
    return side_by_side(way, point, seconds) if way.forks else None


def _take(evaluator: Evaluator, points: Sequence[Point], way: Way, plain: Choice) -> Choice:
    try:
        strategy = way.make()
    except Exception as refused:  # any way but the plain one may fail on a model; then it is not a way
        return replace(plain, why=f"{way.name} is no way for this model ({_brief(refused)})")
    try:
        error = _disagreement(evaluator, strategy, points[:2])
        if error <= _allowed(evaluator):
            choice = Choice(way.name, "as chosen before", error, _time(strategy, _enough(strategy, points)))
            evaluator.use(strategy)
            return choice
        why = f"{way.name} differs from the plain loop by {error:.1e} here"
    except Exception as refused:
        why = f"{way.name} is no way for this model ({_brief(refused)})"
    finally:
        if evaluator.strategy is not strategy:  # also when Ctrl-C ends it all
            strategy.close()
    return replace(plain, why=why)


class _Trial:
    """Ways against the best so far, in turn, as long as the time for trying lasts.

    Args:
        evaluator: is left with the best.
        points: to try on.
        left: how many points there are to do.
        plain: the first to beat.
    """

    def __init__(self, evaluator: Evaluator, points: Sequence[Point], left: int, plain: Choice):
        self.evaluator, self.points, self.left = evaluator, points, left
        self.best, self.told = plain, [f"plain {_ms(plain.point_seconds)}"]
        self.budget = _SHARE * plain.point_seconds * left

    def run(self) -> Choice:
        """The choice."""
        best, *others = ways(self.evaluator)
        compiled = [way for way in others if way.seconds >= COMPILE_S]
        quick = [way for way in others if way.seconds < COMPILE_S]
        # Where there are several cores a point a core gains the most: its trial is kept free before all others.
        many = best.forks and CAN_FORK and torch.get_num_threads() > 1
        for way in quick:
            if way.forks and self._enter(way, many):
                best = way
        if many:
            self._enter(self._side_by_side(best))
        for way in quick:
            if not way.forks:
                self._enter(way)
        # Half of what compiling saves at the most would pay for it; and it is tried on the best batch size alone.
        alike = [way for way in compiled if way.size == best.size] or compiled[:1]
        for way in alike:
            if self.best.point_seconds * self.left > 4 * COMPILE_S:
                self._enter(replace(way, seconds=0.0))
        why = (
            "per point: " + ", ".join(self.told)
            if len(self.told) > 1
            else "too little work to try other ways"
        )
        return replace(self.best, why=why)

    def _side_by_side(self, way: Way) -> Way:
        return side_by_side(way, self.points[0], self.best.point_seconds)

    def _enter(self, way: Way, many: bool = False) -> bool:
        """Try one, if time is left for it (and, if there are ``many`` cores, for the same a point a core); did it win?"""
        cost = way.seconds + 4 * self.best.point_seconds
        if many:
            cost += self._side_by_side(way).seconds + 4 * self.best.point_seconds * _MANY
        if cost > self.budget:
            return False
        began = time.perf_counter()
        won = self._race(way)
        self.budget -= time.perf_counter() - began
        return won

    def _race(self, way: Way) -> bool:
        try:
            strategy = way.make()
        except Exception as refused:
            self.told.append(f"{way.name} refused ({_brief(refused)})")
            return False
        try:
            error = _disagreement(self.evaluator, strategy, self.points[:2])
            if error <= _allowed(self.evaluator):
                seconds, incumbent = _race(strategy, self.evaluator.strategy, self.points)
                self.told.append(f"{way.name} {_ms(seconds)} against {_ms(incumbent)}")
                if seconds * _CLEARLY < incumbent:
                    self.best = Choice(way.name, "", error, seconds)
                    self.evaluator.use(strategy)
                    return True
            else:
                self.told.append(f"{way.name} differs by {error:.1e}")
        except Exception as refused:
            self.told.append(f"{way.name} refused ({_brief(refused)})")
        finally:
            if self.evaluator.strategy is not strategy:
                strategy.close()
        return False


def _race(way: Strategy, incumbent: Strategy, points: Sequence[Point]) -> tuple[float, float]:
    """Seconds a point of both, run in turn: on a busy machine only what runs side by side can be compared."""
    many, few = _enough(way, points), _enough(incumbent, points)
    times = [(_time(way, many), _time(incumbent, few)) for _ in range(2)]
    if sum(map(sum, times)) < _SHORT_S:  # too short to tell from what else the machine does
        times += [(_time(way, many), _time(incumbent, few)) for _ in range(4)]
    return min(t for t, _ in times), min(t for _, t in times)


def _enough(way: Strategy, points: Sequence[Point]) -> Sequence[Point]:
    """As many points as it takes to time a way."""
    if isinstance(way, SideBySide):
        return points[: _MANY * torch.get_num_threads()]
    return points if isinstance(way, Stacked) else points[:2]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:100]}"


def _time(strategy: Strategy, points: Sequence[Point]) -> float:
    began = time.perf_counter()
    strategy(points)
    return (time.perf_counter() - began) / len(points)


def _allowed(evaluator: Evaluator) -> float:
    dtypes = {p.dtype for p in evaluator.model.parameters()}
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        dtypes.add(torch.bfloat16)
    return max((_TOLERANCE.get(dtype, 3e-2) for dtype in dtypes), default=1e-3)


def _disagreement(evaluator: Evaluator, strategy: Strategy, points: Sequence[Point]) -> float:
    """Largest relative difference to the plain loop, over values and samples' shares; also at the origin."""
    at = [evaluator.origin_point, *points]
    ours, reference = strategy(at), evaluator.plain(at)
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
