"""A store kept by rank 0, for ranks that evaluate each point together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from skipscope._ranks import RankGroup, Shared
from skipscope.surfaces.grids._grid import Sheet
from skipscope.surfaces.grids._surface_store import Plan, Store, units_of
from skipscope.surfaces.results._grid_exports import Exported


class RankStore:
    """:class:`Store` whose calls are collective: rank 0 reads and writes, and its errors reach all ranks.

    Args:
        group: the ranks.
        open_store: opens the store, on rank 0.
    """

    def __init__(self, group: RankGroup, open_store: Callable[[], Store]):
        def opened() -> tuple[Store, Plan]:
            store = open_store()
            return store, store.plan

        self.group = group
        self._store, self.plan = group.done_by_first("landscape", opened)

    def units(self, points: np.ndarray) -> list[np.ndarray]:
        """The whole units that contain these points."""
        return units_of(self.plan, points)

    def write(self, unit: np.ndarray, numbers: np.ndarray) -> None:
        """Keep one unit."""
        self._by_first(lambda store: store.write(unit, numbers))

    def read_into(self, sheet: Sheet) -> None:
        """Copy all stored points into ``sheet``."""

        def read(store: Store) -> tuple[np.ndarray, np.ndarray]:
            store.read_into(sheet)
            return sheet.data, sheet.done

        data, done = self._by_first(read)
        sheet.data[:], sheet.done[:] = data, done

    def finish(self, result: Exported) -> None:
        """Save the finished result beside the values."""
        self._by_first(lambda store: store.finish(result))

    def _by_first(self, work: Callable[[Store], Shared]) -> Shared:
        def on_store() -> tuple[None, Shared]:
            assert self._store is not None
            return None, work(self._store)

        return self.group.done_by_first("landscape", on_store)[1]
