"""What a monitor keeps: rows for each optimizer, flow, events; in memory and, with a folder, on disk."""

from __future__ import annotations

import contextlib
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from skipscope._errors import SkipscopeError
from skipscope._files import write_whole
from skipscope._version import __version__
from skipscope.monitor._history import History, LiveVerdict, VerdictEvent
from skipscope.monitor._history_reader import ABOUT, EVENTS, WINDOW, assemble, verdict_of
from skipscope.monitor._row_files import Rows, most_rows
from skipscope.monitor._step_row import SCALARS
from skipscope.monitor._tracked_parameters import TrackedParameters, about


class Store:
    """Rows by optimizer and set of parameters, flow by set of boundaries, and events.

    Args:
        keep: most rows in memory of each kind; None for what a history should hold.
        folder: where to write them as they come; None for nowhere. It must not hold a history already.
        notes: what a reader should know.
    """

    def __init__(self, keep: int | None, folder: Path | None, notes: list[str]):
        self.keep, self.folder, self.notes = keep, folder, notes
        self.events: list[VerdictEvent] = []
        self._gradients: dict[int, list[tuple[TrackedParameters, Rows]]] = {}
        self._flow: list[tuple[tuple[str, ...], Rows]] = []
        if folder is not None:
            _begin(folder, notes)

    def add_gradients(self, index: int, tracked: TrackedParameters, row: np.ndarray) -> None:
        """A row of one optimizer."""
        sets = self._gradients.setdefault(index, [])
        if not sets or sets[-1][0] is not tracked:
            width = len(SCALARS) + 3 * len(tracked.names)
            name, keep = f"gradients-{index}-{len(sets):03d}", most_rows(len(tracked.names))
            sets.append((tracked, self._rows(name, width, keep, about(tracked, index))))
        sets[-1][1].append(row)

    def add_flow(self, names: tuple[str, ...], step: int, rms: np.ndarray) -> None:
        """The flow at the boundaries ``names``."""
        if not self._flow or self._flow[-1][0] != names:
            name, keep = f"flow-{len(self._flow):03d}", most_rows(len(names))
            rows = self._rows(name, 1 + len(names), keep, {"names": list(names)})
            self._flow.append((names, rows))
        self._flow[-1][1].append(np.array([step, *rms], dtype=float))

    def add_event(self, event: VerdictEvent) -> None:
        """The state changed."""
        self.events.append(event)
        self._line(asdict(event))

    def history(self, verdict: LiveVerdict | None, *, complete: bool) -> History:
        """Everything in memory."""
        return self._assembled(None, verdict, complete)

    def verdict(self, was: str) -> LiveVerdict:
        """The verdict on the last few rows."""
        return verdict_of(self._assembled(WINDOW, LiveVerdict(was, "", 0, ""), False), was)

    def close(self) -> None:
        """Say on disk that the run is over, where all of it is there, and let go of the files."""
        every = [rows for _, rows in [*(r for sets in self._gradients.values() for r in sets), *self._flow]]
        for rows in every:
            rows.close()
        if not any(rows.cut for rows in every):
            self._line({"closed": True})
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
        path = None if self.folder is None else self.folder / f"{name}.rows"
        return Rows(width, self.keep or keep, path, what)

    def _line(self, entry: dict[str, Any]) -> None:
        if self.folder is None:
            return
        try:
            with open(self.folder / EVENTS, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:  # a monitor must not end a training
            warnings.warn(f"skipscope: an event could not be written: {error}", stacklevel=4)


def _begin(folder: Path, notes: list[str]) -> None:
    with contextlib.suppress(FileExistsError):
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            raise
        except OSError as error:
            raise SkipscopeError(
                "watch",
                f"cannot make the folder {folder}: {error.strerror}",
                cure="choose one that can be written",
            ) from error
    if (folder / ABOUT).exists():
        raise SkipscopeError(
            "watch", f"{folder} already holds a history", expected="a new or empty folder",
            cure="give each run a folder of its own",
        )  # fmt: skip
    content = {"skipscope": __version__, "format": 1, "kind": "monitor", "notes": notes}
    write_whole(folder / ABOUT, json.dumps(content), operation="watch")
