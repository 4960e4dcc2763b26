"""Store of a monitor: rows for each optimizer, flow and events, in memory and optionally on disk."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skipscope._errors import SkipscopeError
from skipscope._files import write_whole
from skipscope._version import __version__
from skipscope.monitor.history._history import History, LiveVerdict, VerdictEvent
from skipscope.monitor.history._history_reader import (
    ABOUT,
    EVENTS,
    FORMAT,
    WINDOW,
    assemble,
    read_about,
    verdict_of,
)
from skipscope.monitor.history._row_files import Rows, last_row, most_rows, sealed
from skipscope.monitor.recording._flow_reader import FlowRow
from skipscope.monitor.recording._missing_gradients import MissingGradients
from skipscope.monitor.recording._step_row import SCALARS
from skipscope.monitor.recording._tracked_parameters import TrackedParameters, about_columns
from skipscope.monitor.recording._weight_lines import WeightLines


class Store:
    """Rows by optimizer and set of parameters, flow by set of boundaries, and events.

    Args:
        keep: most rows in memory of each kind; None for the default of a history.
        folder: folder from :func:`begin_folder` to which rows are written, or None.
        notes: remarks for the reader.
        before: record of the folder, if its run is resumed.
        first_step: number of steps made before.
    """

    def __init__(
        self,
        keep: int | None,
        folder: Path | None,
        notes: list[str],
        before: Recorded | None,
        first_step: int,
    ):
        self.keep, self.folder, self.notes = keep, folder, notes
        self.events: list[VerdictEvent] = []
        self._gradients: dict[int, list[tuple[TrackedParameters, Rows]]] = {}
        self._flow: list[tuple[tuple[tuple[str, ...], int], Rows]] = []
        self._lines: WeightLines | None = None
        self._before, self._first_step = before, first_step
        if folder is not None and before is None:
            content = {"skipscope": __version__, "format": FORMAT, "kind": "monitor", "notes": notes}
            write_whole(folder / ABOUT, sealed(content), operation="watch")
        elif before is not None:
            self._line({"resumed": first_step})

    def add_gradients(
        self, index: int, tracked: TrackedParameters, row: np.ndarray, chains: Sequence[str]
    ) -> None:
        """Add a row of an optimizer."""
        sets = self._gradients.setdefault(index, [])
        if not sets or sets[-1][0] is not tracked:
            width = len(SCALARS) + 3 * len(tracked.names)
            name, keep = f"gradients-{index}", most_rows(len(tracked.names))
            sets.append((tracked, self._rows(name, width, keep, about_columns(tracked, index, chains))))
        sets[-1][1].append(row)

    def add_flow(self, row: FlowRow) -> None:
        """Add the flow at a step."""
        key = row.names, row.owner
        rows = next((rows for known, rows in self._flow if known == key), None)
        if rows is None:
            about = {
                "names": list(row.names),
                "optimizer": row.owner,
                "hidden": list(row.hidden),
                "lines": list(row.lines),
                "averaging": list(row.averaging),
                "normed": row.normed,
                "recurrent": row.reach.site if row.reach is not None else "",
            }
            rows = self._rows("flow", 4 + 3 * len(row.names), most_rows(2 * len(row.names)), about)
            self._flow.append((key, rows))
        with np.errstate(invalid="ignore", divide="ignore"):
            rms = row.norm / np.sqrt(row.elements)
        reach = (np.nan, np.nan, np.nan)
        if row.reach is not None:
            reach = row.reach.steps or np.nan, row.reach.length, row.reach.growth
        rows.append(np.array([row.step, *rms, *row.norm, *row.relative, *reach], dtype=float))

    def add_event(self, event: VerdictEvent) -> None:
        """Add a change of the state."""
        self.events.append(event)
        self._line(asdict(event))

    def set_lines(self, lines: WeightLines) -> None:
        """Set the towers and the order of execution of the parameters."""
        self._lines = lines
        self._line({"lines": {name: list(place) for name, place in lines.items()}})

    def history(self, verdict: LiveVerdict | None, *, complete: bool) -> History:
        """Assemble the history of all rows in memory."""
        return self._assembled(None, verdict, complete)

    def verdict(
        self,
        was: LiveVerdict,
        found: Mapping[int, MissingGradients],
        *,
        is_early: bool,
        sizes: Mapping[str, float] | None = None,
        is_damped: bool = False,
    ) -> LiveVerdict:
        """Judge the last few rows."""
        now = self._assembled(WINDOW, was, False)
        return verdict_of(
            now, was, found, is_early=is_early, lines=self._lines, sizes=sizes, is_damped=is_damped
        )

    def close(self, verdict: LiveVerdict) -> None:
        """Close the files; on disk, mark the run as closed if all its rows were written."""
        every = [rows for _, rows in [*(r for sets in self._gradients.values() for r in sets), *self._flow]]
        for rows in every:
            rows.close()
        if not any(rows.cut for rows in every):
            self._line({"closed": True, "verdict": asdict(verdict), "notes": self.notes})
        self.folder = None

    def _assembled(self, last: int | None, verdict: LiveVerdict | None, complete: bool) -> History:
        def held(rows: Rows) -> np.ndarray:
            return rows.array() if last is None else rows.last(last)

        sets = [
            (r.about, held(r))
            for group in self._gradients.values()
            for _, r in (group[-1:] if last else group)
        ]
        flow = [(rows.about, held(rows)) for _, rows in self._flow]
        return assemble(sets, flow, self.events, self.notes, verdict=verdict, complete=complete)

    def _rows(self, name: str, width: int, keep: int, what: dict[str, Any]) -> Rows:
        path = None
        if self.folder is not None:
            number = sum(1 for _ in self.folder.glob(f"{name}-*.rows"))
            path = self.folder / f"{name}-{number:03d}.rows"
        if self._before is not None:
            what = {**what, "resumed_at": self._first_step}
        return Rows(width, self.keep or keep, path, what)

    def _line(self, entry: dict[str, Any]) -> None:
        if self.folder is None:
            return
        try:
            with open(self.folder / EVENTS, "a", encoding="utf-8") as file:
                file.write(sealed(entry) + "\n")
        except OSError as error:  # a monitor must not end a training
            warnings.warn(f"skipscope: an event could not be written: {error}", stacklevel=4)


@dataclass(frozen=True)
class Recorded:
    """State of a folder's recorded run: its last step, and the time of that step."""

    step: int
    seconds: float


def begin_folder(folder: Path, *, resume: bool) -> Recorded | None:
    """Create the folder of a run, or find where its recorded run ended.

    Returns:
        The recorded run, or None for a new run.

    Raises:
        SkipscopeError: the folder cannot be created, holds a history although ``resume`` is False, is damaged
            or of a later format.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SkipscopeError(
            "watch",
            f"cannot make the folder {folder}: {error.strerror}",
            cure="choose one that can be written",
        ) from error
    if not (folder / ABOUT).exists():
        return None
    if not resume:
        raise SkipscopeError(
            "watch",
            f"{folder} already holds a history",
            expected="a new or empty folder",
            cure="give each run a folder of its own, or go on with this one: resume=True",
        )
    try:
        about, _ = read_about(folder)
    except (OSError, ValueError) as error:
        raise SkipscopeError(
            "watch",
            f"the history in {folder} cannot be continued: {ABOUT} is damaged ({error})",
            cure="give this run a folder of its own",
        ) from error
    if about.get("format") != FORMAT:  # what is added has the present format
        write_whole(folder / ABOUT, sealed({**about, "format": FORMAT}), operation="watch")
    step, seconds = 0, 0.0
    for file in folder.glob("gradients-*.rows"):
        with contextlib.suppress(ValueError):  # begun, and without a whole row
            if (row := last_row(file)) is not None:
                step = max(step, int(row[SCALARS.index("step")]))
                seconds = max(seconds, float(row[SCALARS.index("seconds")]))
    return Recorded(step, seconds)
