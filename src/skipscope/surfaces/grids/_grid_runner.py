"""Engines that compute the units of a grid: this process, torchrun's ranks, or a Ray cluster.

There are no collectives, unless the ranks of a sharded model evaluate each point together. Under torchrun
each rank takes every WORLD_SIZE-th unit, writes it to the store, and then waits for the other ranks' units. A
rank that writes nothing for a while counts as lost, and the others compute its units. Two ranks may then
write the same unit, which is harmless: its values are the same bit for bit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import get_args

import numpy as np

from skipscope._errors import SkipscopeError
from skipscope._option_words import Engine
from skipscope._progress import track
from skipscope._ranks import RankGroup, is_lost_rank
from skipscope._validation import require_option
from skipscope.surfaces.grids._grid import Sheet
from skipscope.surfaces.grids._rank_store import RankStore
from skipscope.surfaces.grids._surface_store import Store

ENGINES = get_args(Engine)
Remote = Callable[[Sequence[np.ndarray]], Iterator[tuple[np.ndarray, np.ndarray]]]
_POLL_S = 0.02
# Without a new unit for so long, and for five units' time, a rank counts as lost.
_PATIENCE_S = 10.0


def engine_for(engine: Engine, stored: bool) -> Engine:
    """Resolve the engine: "auto" is torchrun if there are several ranks and a store, else this process.

    Raises:
        SkipscopeError: the engine is unknown, or "torchrun" without a store.
    """
    if engine == "auto":
        return "torchrun" if stored and int(os.environ.get("WORLD_SIZE", "1")) > 1 else "local"
    require_option("landscape", "engine", engine, ENGINES)
    if engine == "torchrun" and not stored:
        raise SkipscopeError(
            "landscape",
            "ranks meet in a store, and none was given",
            cure='store="surface.zarr", a folder all ranks see',
        )
    return engine


class Runner:
    """Compute points into a sheet, and into the store, if any.

    Args:
        sheet: the grid to fill.
        work: flat indices -> values [names, points].
        store: keeps each unit as it is computed, or None.
        engine: "local", "torchrun" or "ray".
        what: text of the progress display.
        at_once: points computed together without a store.
        remote: computes units elsewhere and yields (unit, values) as they arrive.
        in_flight: points that a killed process may lose; up to so many points of a store's units are
            computed together.
        group: ranks that evaluate each point together, each making the same calls.
    """

    def __init__(
        self,
        sheet: Sheet,
        work: Callable[[np.ndarray], np.ndarray],
        store: Store | RankStore | None,
        engine: Engine,
        what: str,
        at_once: int = 64,
        remote: Remote | None = None,
        in_flight: int = 1,
        group: RankGroup | None = None,
    ):
        self.sheet, self.work, self.store, self.what = sheet, work, store, what
        self.at_once, self.remote, self.in_flight, self.group = at_once, remote, in_flight, group
        self.rank = int(os.environ.get("RANK", "0")) if engine == "torchrun" else 0
        self.world = int(os.environ.get("WORLD_SIZE", "1")) if engine == "torchrun" else 1
        # Stored points enter the sheet only when they are requested, so that a resumed adaptive run makes the
        # same decisions as the first.
        self.kept = Sheet(sheet.names, sheet.shape)

    def compute(self, points: np.ndarray) -> None:
        """Compute those of ``points`` that are not done."""
        points = np.unique(points)
        points = points[~self.sheet.done[points]]
        if self.store is not None and not self.kept.done[points].all():
            self.store.read_into(self.kept)
        units = self.store.units(points) if self.store is not None else _chunks(points, self.at_once)
        try:
            self._compute(units)
        except (RuntimeError, OSError) as error:
            if self.group is None or not is_lost_rank(error):
                raise
            raise lost_rank(self.store is not None, self.kept.done) from error
        self.sheet.put(points, self.kept.data[:, points])

    def _compute(self, units: list[np.ndarray]) -> None:
        # Units are assigned before those done are dropped: ranks that start at different times see different
        # units done, and must still agree on the assignment.
        mine = self._missing(units[self.rank :: self.world])
        longest, last = 0.0, time.perf_counter()
        computed = (self.remote or self._compute_here)(mine)
        if self.group is None or self.group.rank == 0:
            computed = track(computed, self.what, len(mine))
        for unit, numbers in computed:
            self._keep(unit, numbers)
            longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
        if self.world > 1:
            self._wait(units, max(_PATIENCE_S, 5 * longest))

    def _compute_here(self, units: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for group in _groups(units, self.in_flight):
            numbers = self.work(np.concatenate(group))
            ends = np.cumsum([len(unit) for unit in group])
            yield from zip(group, np.split(numbers, ends[:-1], axis=1))

    def _missing(self, units: list[np.ndarray]) -> list[np.ndarray]:
        return [unit for unit in units if not self.kept.done[unit].all()]

    def _keep(self, unit: np.ndarray, numbers: np.ndarray) -> None:
        self.kept.put(unit, numbers)
        if self.store is not None:
            self.store.write(unit, numbers)

    def _wait(self, units: list[np.ndarray], patience: float) -> None:
        """Wait for the other ranks' units; after ``patience`` seconds without any, compute missing ones."""
        assert self.store is not None
        done, since = -1, time.monotonic()
        while True:
            began = time.monotonic()
            self.store.read_into(self.kept)
            missing = self._missing(units)
            if not missing:
                return
            if int(self.kept.done.sum()) != done:
                done, since = int(self.kept.done.sum()), time.monotonic()
            elif time.monotonic() - since > patience:
                unit = missing[self.rank % len(missing)]
                self._keep(unit, self.work(unit))
                # This rank's own unit is no sign of life of another rank.
                done += len(unit)
            else:
                # Frequent reading would slow the other ranks.
                time.sleep(min(1.0, max(_POLL_S, 4 * (time.monotonic() - began))))


def lost_rank(stored: bool, done: np.ndarray | None = None) -> SkipscopeError:
    """Error for the remaining ranks.

    Args:
        stored: whether there is a store.
        done: which points it has; None if it is not open yet.
    """
    cure = 'start again with store="surface.zarr": what is done is then kept'
    if stored:
        cure = "start again with the same store: it resumes"
        cure += "" if done is None else f"; {int(done.sum())} of {done.size} points are kept"
    return SkipscopeError(
        "landscape",
        "another rank was lost, or did not answer: the ranks evaluate each point together",
        expected="every rank until the end",
        cure=cure,
    )


def _groups(units: Sequence[np.ndarray], most: int) -> list[list[np.ndarray]]:
    """Group units into groups of up to ``most`` points, each with at least one unit."""
    groups: list[list[np.ndarray]] = []
    points = 0
    for unit in units:
        points += len(unit)
        if not groups or points > most:
            groups.append([])
            points = len(unit)
        groups[-1].append(unit)
    return groups


def _chunks(points: np.ndarray, size: int) -> list[np.ndarray]:
    return [points[i : i + size] for i in range(0, len(points), size)]
