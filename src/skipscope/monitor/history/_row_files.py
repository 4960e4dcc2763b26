"""Rows of numbers: bounded in memory, and appended to a file.

A file has a line of JSON that describes the columns, then rows of float64, each followed by its checksum
(files of earlier versions have none). A row is written by a single call, so a run killed at any moment leaves
complete rows and at most one incomplete row. Readers skip incomplete and damaged rows, and may read during
the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Most gradients (rows x parameters) in a history: about 2 MB of memory, and a page small enough to mail.
_ROOM = 60_000


def most_rows(parameters: int) -> int:
    """Default number of rows in a history of this many parameters: 64 to 1,000.

    Example:
        >>> most_rows(8), most_rows(148), most_rows(10_000)
        (1000, 405, 64)
    """
    return max(64, min(1000, _ROOM // max(1, parameters)))


def sealed(content: dict[str, Any]) -> str:
    """Serialise plain data as a line of JSON with a checksum.

    Example:
        >>> sealed({"step": 3})
        '{"crc32": 145879999, "step": 3}'
        >>> unsealed(sealed({"step": 3}))
        {'step': 3}
    """
    return json.dumps({"crc32": _crc32(content), **content})


def unsealed(line: str | bytes) -> dict[str, Any]:
    """Parse a line of :func:`sealed`, or a line without a checksum from an earlier version.

    Raises:
        ValueError: the line does not match its checksum, or is not a JSON object.
    """
    content = json.loads(line)
    if not isinstance(content, dict):
        raise ValueError(f"a line holds {type(content).__name__}, not names and values")
    if content.pop("crc32", None) not in (None, _crc32(content)):
        raise ValueError("a line has changed since it was written: its checksum is not that of its data")
    return content


def _crc32(content: dict[str, Any]) -> int:
    return zlib.crc32(
        json.dumps({name: value for name, value in content.items() if name != "crc32"}).encode()
    )


class Rows:
    """Rows of equal width, at most ``keep`` in memory: when full, every second row is dropped.

    Args:
        width: numbers per row.
        keep: most rows in memory.
        path: file to which rows are appended, or None.
        about: description of the columns, for the first line of the file.
    """

    def __init__(self, width: int, keep: int, path: Path | None = None, about: dict[str, Any] | None = None):
        self.about = about or {}
        self._data = np.empty((min(64, keep), width))
        self._keep, self._stride, self._count, self._held = keep, 1, 0, 0
        self._last: np.ndarray | None = None
        self._file = None
        self.cut = False  # the file has fewer rows than came
        if path is not None:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            self._write(sealed({**self.about, "width": width, "checked": True}).encode() + b"\n")

    def append(self, row: np.ndarray) -> None:
        """Add a row (float64, contiguous; it is copied or kept)."""
        if self._file is not None:
            data = row.tobytes()
            self._write(data + zlib.crc32(data).to_bytes(8, "little"))
        self._last = row
        if self._count % self._stride == 0:
            if self._held == self._keep:
                kept = self._data[: self._keep : 2].copy()
                self._data[: len(kept)] = kept
                self._held, self._stride = len(kept), self._stride * 2
            if self._count % self._stride == 0:
                self._push(row)
        self._count += 1

    def _push(self, row: np.ndarray) -> None:
        if self._held == len(self._data):
            grown = np.empty((min(2 * len(self._data), self._keep), self._data.shape[1]))
            grown[: self._held] = self._data
            self._data = grown
        self._data[self._held] = row
        self._held += 1

    def array(self) -> np.ndarray:
        """The rows in memory, ``[rows, width]``, always including the last row."""
        held = self._data[: self._held]
        if self._last is not None and (self._count - 1) % self._stride:
            return np.vstack([held, self._last])
        return held.copy()

    def last(self, n: int) -> np.ndarray:
        """The latest rows in memory, at most ``n``."""
        return (
            self.array()[-n:] if self._stride > 1 else self._data[max(0, self._held - n) : self._held].copy()
        )

    def _write(self, data: bytes) -> None:
        try:
            written = os.write(self._file, data)  # type: ignore[arg-type]
            if written < len(data):
                raise OSError("the disk is full")
        except OSError as error:  # a monitor must not end a training
            warnings.warn(
                f"skipscope: the history is no longer written ({error}); it continues in memory", stacklevel=4
            )
            self.cut = True
            self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None


class RowFile(NamedTuple):
    """Rows read from a file.

    Attributes:
        about: description of the columns.
        rows: ``[rows, width]``, without an incomplete last row and without damaged rows.
        whole: number of complete rows in the file.
        changed: number of damaged rows among those read.
    """

    about: dict[str, Any]
    rows: np.ndarray
    whole: int
    changed: int


def read_rows(path: Path, keep: int | None = None) -> RowFile:
    """Read a file of rows.

    Args:
        path: the file.
        keep: most rows to read: of more rows every second, fourth, ... and the last are read; None: all.

    Raises:
        ValueError: the file has another format, or its first line is damaged.
    """
    about, every, is_checked = _mapped(path)
    whole, stride = len(every), 1
    while keep is not None and whole > keep * stride:
        stride *= 2
    at = list(range(0, whole, stride))
    read = np.array(every[[*at, *([whole - 1] if at and at[-1] != whole - 1 else [])]])
    if not is_checked:
        return RowFile(about, read, whole, 0)
    held = [_is_as_written(row) for row in read]
    return RowFile(about, read[held, :-1], whole, held.count(False))


def last_row(path: Path) -> np.ndarray | None:
    """The last complete and undamaged row of a file, or None if there is none.

    Raises:
        ValueError: the file has another format, or its first line is damaged.
    """
    _, every, is_checked = _mapped(path)
    for row in every[::-1]:
        if not is_checked:
            return np.array(row)
        if _is_as_written(row):
            return np.array(row[:-1])
    return None


def _is_as_written(row: np.ndarray) -> bool:
    data = row.tobytes()
    return zlib.crc32(data[:-8]) == int.from_bytes(data[-8:], "little")


def _mapped(path: Path) -> tuple[dict[str, Any], np.ndarray, bool]:
    """Map a file. Returns the description of its columns, its rows, and whether each has a checksum."""
    with open(path, "rb") as file:
        first = file.readline()
    if (about := columns_of(first, path.name)) is None:
        raise ValueError(f"{path.name} has no first line yet")
    width = about.get("width")
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"{path.name} does not say how wide its rows are")
    is_checked = about.pop("checked", False) is True
    width += is_checked
    whole = (path.stat().st_size - len(first)) // (8 * width)
    if whole == 0:
        return about, np.empty((0, width)), is_checked
    every = np.memmap(path, dtype="<f8", mode="r", offset=len(first), shape=(whole, width))
    return about, every, is_checked


def columns_of(first: bytes, name: str) -> dict[str, Any] | None:
    """Parse the first line of a file, which describes its columns, or return None if it is incomplete.

    Raises:
        ValueError: the line is damaged.
    """
    # Rows, which are not plain text, only follow a complete line.
    if not first.endswith(b"\n") and all(32 <= byte < 127 for byte in first):
        return None
    try:
        return unsealed(first)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
