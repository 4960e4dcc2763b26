"""Stores of results: a zarr 3 array in which each chunk is a unit of work, written atomically.

Row 0 of the array marks the points that are done, so that the mask and the values of a unit are in one file
and cannot disagree, however the process ends; a checksum detects a damaged file. The folder also identifies
the weights, data and settings that the values belong to. A folder with others is refused, never mixed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skipscope import _result
from skipscope._errors import MissingExtra, SkipscopeError
from skipscope._files import write_whole
from skipscope.surfaces.grids._grid import Sheet
from skipscope.surfaces.results._grid_exports import Exported

AWAY = "away from the origin"
_NUMBERS, _METADATA, _BUILDING = "sheet", "zarr.json", ".building-"
# A temporary file lives for milliseconds; an older one was left by a killed process.
_DEAD_S = 10.0
PLAN, _RESULT = "skipscope.json", "result.json"


@dataclass(frozen=True)
class Plan:
    """Identity and layout of a store's values.

    Attributes:
        identity: weights, data and settings, which must be the same to resume.
        probes: loss and metrics at the origin and away from it, to detect another loss or metric of the same
            name. At the origin they must agree to a relative 1e-4; elsewhere (``AWAY`` in the name) to 1e-2,
            because far out a network may amplify another machine's rounding.
        names: names of the values at each point.
        points: number of grid points.
        unit: points per chunk.
        strategy: strategy chosen by the first run; later runs use it too, for the same result bit for bit.
    """

    identity: dict[str, Any]
    probes: dict[str, float]
    names: list[str]
    points: int
    unit: int
    strategy: str


def read_plan(folder: str | os.PathLike[str]) -> Plan | None:
    """Read the plan of an existing store. Returns None if the folder does not exist or is empty.

    The plan is in its own file and among the array's attributes; if one is damaged, the other is read.

    Raises:
        SkipscopeError: the folder holds something else.
    """
    folder = Path(folder)
    try:
        if not folder.exists() or not any(not _is_temporary(entry) for entry in folder.iterdir()):
            return None
    except OSError as error:
        raise _unusable(folder, error) from error
    for file, keys in ((folder / PLAN, ()), (folder / _NUMBERS / _METADATA, ("attributes", "plan"))):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            found = json.loads(file.read_text())
            for key in keys:
                found = found[key]
            return Plan(**found)
    raise SkipscopeError(
        "landscape",
        f"{folder} is not a landscape's store",
        expected="a new or empty folder, or an earlier store",
        cure="choose another folder",
    )


def check_plan(found: Plan, wanted: Plan, folder: str | os.PathLike[str]) -> None:
    """Refuse a store that belongs to other weights, data or settings.

    Raises:
        SkipscopeError: the store does not match; the error names what differs.
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
            "landscape",
            f"the store {folder} was made with other {', '.join(sorted(differs))}",
            expected=_brief(found.identity.get(first)) if first in found.identity else None,
            got=_brief(ours.get(first)) if first in ours else None,
            cure="choose another folder, or the same weights, data and settings",
        )


def _differing(found: Plan, wanted: Plan) -> list[str]:
    """Name the probes with other values: all differing metrics, or else the first of the rest.

    A function of the same name may compute something else.
    """
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


def units_of(plan: Plan, points: np.ndarray) -> list[np.ndarray]:
    """The whole units of a plan that contain these points."""
    size = plan.unit
    return [np.arange(u * size, min((u + 1) * size, plan.points)) for u in np.unique(points // size)]


class Store:
    """An open store.

    Args:
        folder: folder of the store.
        plan: its plan.

    Attributes:
        wrote: whether a unit was written since it was opened.
    """

    def __init__(self, folder: str | os.PathLike[str], plan: Plan):
        self.folder, self.plan, self.wrote = Path(folder), plan, False
        self._array, self._warned = self._opened(), False
        self._remove_stale_files()

    @classmethod
    def opened(cls, folder: str | os.PathLike[str], plan: Plan) -> Store:
        """Open the store in the folder, or create one.

        Raises:
            SkipscopeError: the store belongs to other weights, data or settings, or cannot be created.
        """
        found = read_plan(folder)
        if found is None:
            return cls.create(folder, plan)
        check_plan(found, plan, folder)
        return cls(folder, found)

    @classmethod
    def create(cls, folder: str | os.PathLike[str], plan: Plan) -> Store:
        """Create a store; if several processes try at once, the first wins and the others open its store.

        Raises:
            SkipscopeError: the folder cannot be created.
        """
        # A symlink is followed. A mount point or the working directory cannot be renamed, so the files
        # inside it are.
        folder = Path(os.path.realpath(folder))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            building = Path(tempfile.mkdtemp(dir=folder, prefix=_BUILDING))
            try:
                _make_array(building / _NUMBERS, plan)
                # Fails if another process was first.
                with contextlib.suppress(FileExistsError, OSError):
                    os.rename(building / _NUMBERS, folder / _NUMBERS)
            finally:
                shutil.rmtree(building, ignore_errors=True)
            if not (folder / _NUMBERS).is_dir():
                raise OSError("the array could not be put in its place")
        except OSError as error:
            raise _unusable(folder, error) from error
        found = read_plan(folder)
        assert found is not None
        check_plan(found, plan, folder)
        return cls(folder, found)

    def _opened(self) -> Any:
        """Open the array, after rewriting a damaged plan file or damaged metadata from the plan."""
        path = self.folder / _NUMBERS
        if not (self.folder / PLAN).exists() or _unreadable_json(self.folder / PLAN):
            write_whole(self.folder / PLAN, json.dumps(self.plan.__dict__, indent=1))
        try:
            array = _zarr().open_array(str(path), mode="r+")
            if array.shape == (1 + len(self.plan.names), self.plan.points):
                return array
        except Exception:
            # zarr raises many kinds of errors for damaged metadata.
            pass
        building = Path(tempfile.mkdtemp(dir=self.folder, prefix=_BUILDING))
        try:
            _make_array(building / _NUMBERS, self.plan)
            path.mkdir(exist_ok=True)
            os.replace(building / _NUMBERS / _METADATA, path / _METADATA)
        except OSError as error:
            raise _unusable(self.folder, error) from error
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return _zarr().open_array(str(path), mode="r+")

    def _remove_stale_files(self) -> None:
        """Remove files left half written by killed processes."""
        now = time.time()
        # The folder may be read-only.
        with contextlib.suppress(OSError):
            for entry in [*self.folder.iterdir(), *(self.folder / _NUMBERS).rglob("*.partial")]:
                with contextlib.suppress(OSError):
                    if _is_temporary(entry) and now - entry.stat().st_mtime > _DEAD_S:
                        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def units(self, points: np.ndarray) -> list[np.ndarray]:
        """The whole units that contain these points."""
        return units_of(self.plan, points)

    def write(self, unit: np.ndarray, numbers: np.ndarray) -> None:
        """Write one unit, as one file, by an atomic rename.

        Raises:
            SkipscopeError: it cannot be written (a full disk); earlier units can still be read.
        """
        try:
            self._array[:, unit[0] : unit[-1] + 1] = np.vstack([np.ones((1, len(unit))), numbers])
        except OSError as error:
            raise SkipscopeError(
                "landscape",
                f"cannot write to the store {self.folder}: {error.strerror or error}",
                cure="make room and run the same call again: it resumes from what is there",
            ) from error
        self.wrote = True

    def read_into(self, sheet: Sheet) -> None:
        """Copy all stored points into ``sheet``. A unit with a wrong checksum counts as not done."""
        try:
            kept = np.asarray(self._array[:])
        except Exception:
            # Each kind of damaged chunk (cut, emptied, flipped bits) raises another error.
            kept = self._read_by_unit()
        done = kept[0] == 1
        sheet.data[:, done] = kept[1:, done]
        sheet.done[done] = True

    def _read_by_unit(self) -> np.ndarray:
        kept, bad = np.full(self._array.shape, np.nan), 0
        for unit in self.units(np.arange(self.plan.points)):
            part = slice(unit[0], unit[-1] + 1)
            try:
                kept[:, part] = self._array[:, part]
            except Exception:
                bad += 1
        if bad and not self._warned:
            self._warned = True
            warnings.warn(
                f"skipscope: {bad} damaged {'part' if bad == 1 else 'parts'} of the store {self.folder} (a"
                " checksum does not hold): computed again",
                stacklevel=2,
            )
        return kept

    def finish(self, result: Exported) -> None:
        """Save the finished result for ``skipscope.load``, and its arrays for ``xarray.open_zarr``."""
        arrays: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
        for layer in result.layers():
            names = ("alpha", "beta") if layer.betas.size else ("alpha",)
            arrays |= {name: ((name,), axis) for name, axis in zip(names, (layer.alphas, layer.betas))}
            lead = f"{layer.prefix}." if layer.prefix else ""
            arrays |= {
                (lead + name).replace("/", "."): (names, column.astype(np.float64))
                for name, column in layer.columns.items()
            }
        try:
            self._write_arrays(arrays)
            write_whole(self.folder / _RESULT, _result.dumps(result))
        except (OSError, SkipscopeError) as error:
            # A finished store on a read-only disk needs no new result.
            if not self.wrote and not _unreadable_json(self.folder / _RESULT):
                return
            reason = getattr(error, "strerror", None) or getattr(error, "problem", error)
            raise SkipscopeError(
                "landscape",
                f"cannot write the result to the store {self.folder}: {reason}",
                cure="make room and run the same call again: all its numbers are there",
            ) from error
        self._remove_stale_files()

    def _write_arrays(self, arrays: dict[str, tuple[tuple[str, ...], np.ndarray]]) -> None:
        zarr, metadata = _zarr(), self.folder / _METADATA
        if _unreadable_json(metadata):
            metadata.unlink(missing_ok=True)
        group = zarr.open_group(str(self.folder), mode="a", use_consolidated=False)
        for name, (dimensions, values) in arrays.items():
            made = group.create_array(
                name,
                shape=values.shape,
                dtype="float64",
                chunks=values.shape,
                fill_value=np.nan,
                dimension_names=dimensions,
                overwrite=True,
            )
            made[...] = values
        # Without consolidated metadata a reader warns about the store's other files.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            zarr.consolidate_metadata(str(self.folder))


def _make_array(path: Path, plan: Plan) -> None:
    from zarr.codecs import Crc32cCodec, ZstdCodec

    rows = 1 + len(plan.names)
    _zarr().create_array(
        str(path),
        shape=(rows, plan.points),
        dtype="float64",
        chunks=(rows, plan.unit),
        fill_value=np.nan,
        compressors=[ZstdCodec(), Crc32cCodec()],
        attributes={"plan": plan.__dict__},
        dimension_names=("number", "point"),
    )


def _is_temporary(entry: Path) -> bool:
    return entry.name.startswith((_BUILDING, f".{PLAN}.", f".{_RESULT}.")) or entry.suffix == ".partial"


def _unreadable_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return True
    return False


def _unusable(folder: Path, error: OSError) -> SkipscopeError:
    return SkipscopeError(
        "landscape",
        f"cannot make the store {folder}: {error.strerror or error}",
        cure="choose a folder that can be written and has room",
    )


def _zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise MissingExtra("landscape", "zarr") from error
    return zarr


def read_store(path: Path) -> _result.Result | None:
    """Load the result from a landscape's folder. Returns None if the folder is no store.

    Raises:
        SkipscopeError: the run is not finished, or the folder holds several stores.
    """
    if not (path.is_dir() and (path / _NUMBERS).exists()):
        inside = sorted(plan.parent for plan in path.glob(f"*/{PLAN}")) if path.is_dir() else []
        # Several seeds or several twins' maps have a store each.
        if inside:
            raise SkipscopeError(
                "load",
                f"{path} holds several stores",
                expected="one of " + ", ".join(p.name for p in inside),
                cure=f"ss.load({str(inside[0])!r})",
            )
        return None
    if _unreadable_json(path / _RESULT):
        raise SkipscopeError(
            "load",
            f"the landscape in {path} is not finished",
            cure="run the same call again; it resumes where it ended",
        )
    return _result.loads((path / _RESULT).read_text(), str(path))
