"""Results kept as they come: a zarr 3 array whose every chunk is one unit of work, written whole or not at all.

Row 0 of the array says which points are done, so that the mask and the numbers of a unit are one file and cannot
disagree, however the process ends. The folder also holds what the numbers belong to: weights, data, settings. A
folder made by others is refused, never mixed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skipscope import _result
from skipscope._errors import MissingExtra, SkipscopeError
from skipscope._files import write_whole
from skipscope.surfaces._grid import Sheet

AWAY = "away from the origin"
PLAN, _RESULT = "skipscope.json", "result.json"


@dataclass(frozen=True)
class Plan:
    """What a store's numbers are.

    Attributes:
        identity: weights, data, settings: must be the same to resume.
        probes: numbers by what they are, measured at the origin and away from it: another loss or metric of the same name
            gives others. At the origin they must agree to a relative 1e-4, elsewhere (``AWAY`` in the name) to 1e-2, for
            far out a network may carry another machine's rounding further.
        names: the numbers at each point.
        points: how many points the grid has.
        unit: points a chunk.
        strategy: the way of evaluating that was chosen first; all later ones use it, for the same bits.
    """

    identity: dict[str, Any]
    probes: dict[str, float]
    names: list[str]
    points: int
    unit: int
    strategy: str


def read_plan(folder: str | os.PathLike[str]) -> Plan | None:
    """The plan of an existing store; None when the folder does not exist or is empty.

    Raises:
        SkipscopeError: the folder holds something else.
    """
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        return Plan(**json.loads((folder / PLAN).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise SkipscopeError(
            "landscape", f"{folder} is not a landscape's store", expected="a new or empty folder, or an earlier store",
            cure="choose another folder",
        ) from error  # fmt: skip


def check_plan(found: Plan, wanted: Plan, folder: str | os.PathLike[str]) -> None:
    """Refuse a store that belongs to other weights, data or settings.

    Raises:
        SkipscopeError: naming what differs.
    """
    ours = json.loads(json.dumps(wanted.identity))
    differs = [key for key in {**ours, **found.identity} if ours.get(key) != found.identity.get(key)]
    if not differs and (found.names != wanted.names or found.probes.keys() != wanted.probes.keys()):
        differs = ["what is measured"]
    if not differs:
        differs = _differing(found, wanted)
    if differs:
        first = differs[0]
        raise SkipscopeError(
            "landscape", f"the store {folder} was made with other {', '.join(sorted(differs))}",
            expected=_brief(found.identity.get(first)) if first in found.identity else None,
            got=_brief(ours.get(first)) if first in ours else None,
            cure="choose another folder, or the same weights, data and settings",
        )  # fmt: skip


def _differing(found: Plan, wanted: Plan) -> list[str]:
    """What has another value: a function of the same name that computes something else; a metric alone if it is one."""
    wrong = [
        name
        for name, value in wanted.probes.items()
        if not np.isclose(
            found.probes[name], value, rtol=1e-2 if AWAY in name else 1e-4, atol=1e-12, equal_nan=True
        )
    ]
    return [name for name in wrong if name.startswith("metric ")] or wrong[:1]


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 100 else text[:97] + "..."


class Store:
    """An open store.

    Args:
        folder: where it is.
        plan: what it holds.
    """

    def __init__(self, folder: str | os.PathLike[str], plan: Plan):
        self.folder, self.plan = Path(folder), plan
        self._array = _zarr().open_array(str(self.folder / "sheet"), mode="r+")

    @classmethod
    def create(cls, folder: str | os.PathLike[str], plan: Plan) -> Store:
        """A new store; of several processes that try at once the first wins, and the others open its store.

        Raises:
            SkipscopeError: the folder cannot be made.
        """
        folder = Path(folder)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        except OSError as error:
            raise SkipscopeError(
                "landscape", f"cannot make the store {folder}: {error.strerror or error}",
                cure="choose a folder that can be written",
            ) from error  # fmt: skip
        try:
            _zarr().create_array(
                str(building / "sheet"), shape=(1 + len(plan.names), plan.points), dtype="float64",
                chunks=(1 + len(plan.names), plan.unit), fill_value=np.nan,
            )  # fmt: skip
            write_whole(building / PLAN, json.dumps(plan.__dict__, indent=1))
            os.chmod(building, 0o755)
            with contextlib.suppress(OSError):  # another process was first
                os.rename(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        found = read_plan(folder)
        assert found is not None
        check_plan(found, plan, folder)
        return cls(folder, found)

    def units(self, points: np.ndarray) -> list[np.ndarray]:
        """The units that hold these points, each whole."""
        size = self.plan.unit
        return [np.arange(u * size, min((u + 1) * size, self.plan.points)) for u in np.unique(points // size)]

    def write(self, unit: np.ndarray, numbers: np.ndarray) -> None:
        """Keep one unit: one file, by rename.

        Raises:
            SkipscopeError: it cannot be written (a full disk); what was kept before can still be read.
        """
        try:
            self._array[:, unit[0] : unit[-1] + 1] = np.vstack([np.ones((1, len(unit))), numbers])
        except OSError as error:
            raise SkipscopeError(
                "landscape", f"cannot write to the store {self.folder}: {error.strerror or error}",
                cure="make room and run the same call again: it resumes from what is there",
            ) from error  # fmt: skip

    def read_into(self, sheet: Sheet) -> None:
        """Put everything that is done into ``sheet``."""
        kept = np.asarray(self._array[:])
        done = kept[0] == 1
        sheet.data[:, done] = kept[1:, done]
        sheet.done[done] = True

    def finish(self, result: _result.Result) -> None:
        """Keep the finished result beside the numbers, for ``skipscope.load``."""
        write_whole(self.folder / _RESULT, _result.dumps(result))


def _zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise MissingExtra("landscape", "zarr") from error
    return zarr


def read_store(path: Path) -> _result.Result | None:
    """What ``skipscope.load`` gives for a landscape's folder; None when it is not one.

    Raises:
        SkipscopeError: the run that fills the store has not finished.
    """
    if not (path.is_dir() and (path / PLAN).exists() and (path / "sheet").exists()):
        inside = sorted(plan.parent for plan in path.glob(f"*/{PLAN}")) if path.is_dir() else []
        if inside:  # several seeds, or twins' maps
            raise SkipscopeError(
                "load", f"{path} holds several stores", expected="one of " + ", ".join(p.name for p in inside),
                cure=f"ss.load({str(inside[0])!r})",
            )  # fmt: skip
        return None
    if not (path / _RESULT).exists():
        raise SkipscopeError(
            "load",
            f"the landscape in {path} is not finished",
            cure="run the same call again; it resumes where it ended",
        )
    return _result.loads((path / _RESULT).read_text(), str(path))
