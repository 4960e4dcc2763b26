"""What a result is: frozen data that prints, becomes plain data, draws itself, saves and loads.

A result knows nothing of how it is drawn. ``plot``, ``save("x.html")`` and the notebook view ask the drawer that the
package root registers (see ``skipscope/__init__.py``): the one way upward in the house.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import os
from pathlib import Path
from typing import Any, ClassVar, Self

from skipscope._errors import SkipscopeError
from skipscope._files import write_whole
from skipscope._numbers import short
from skipscope._version import __version__

_kinds: dict[str, type[Result]] = {}
_readers: list[str] = []
_drawer: str | None = None
# In less than so many columns words and numbers are cut into pieces: a narrower terminal had better wrap the lines.
_NARROWEST = 60


@dataclasses.dataclass(frozen=True)
class Table:
    """A table as plain data: what every result prints, and what stands beside every chart.

    Attributes:
        title: one line above.
        columns: the headings.
        rows: one list of cells a row; numbers stay numbers, so that each reader formats them its own way.
        notes: sentences below.
    """

    title: str
    columns: list[str]
    rows: list[list[Any]]
    notes: list[str] = dataclasses.field(default_factory=list)

    def text(self, width: int | None = None) -> str:
        """The table as text that fits ``width`` columns (default: the terminal's; at least 60, to be legible)."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=SIMPLE_HEAD, pad_edge=False)
        for i, column in enumerate(self.columns):
            numeric = any(isinstance(row[i], int | float) for row in self.rows) and not any(
                isinstance(row[i], str) for row in self.rows
            )
            table.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(cell if isinstance(cell, str) else short(cell)) for cell in row))
        console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.width = max(console.width, _NARROWEST)
        with console.file:
            console.print(
                Text(self.title, style="bold")
            )  # not the table's own: that is folded at the table's width
            if self.columns:
                console.print(table)
            for note in self.notes:
                console.print(Text(note))
        return "\n".join(line.rstrip() for line in console.export_text().splitlines()).strip("\n")


class Result:
    """The base of every frozen result.

    A subclass is a frozen dataclass whose fields are numbers, strings, ``numpy`` arrays, other results, or tuples,
    lists and dicts of these; it implements :meth:`table`.
    """

    # What `save` writes first, so that a file says what it is before it is read.
    FORMAT: ClassVar[int] = 1

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        _kinds[cls.__name__] = cls

    def table(self) -> Table:
        """The result as a table of plain data."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.table().text()

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data: dicts, lists, strings, numbers, None. Arrays become nested lists."""
        return _plain(self)

    def plot(self, ax: Any = None, **options: Any) -> Any:
        """Draw the result with matplotlib, into ``ax`` if one is given; returns the axes."""
        return _draw("plot", self, ax=ax, **options)

    def save(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """Write the result to a file, whole or not at all; the ending says how.

        ``.json`` holds everything and is read back by ``skipscope.load``. ``.html`` is one self-contained page (it
        carries the data too, and loads as well); ``.png``, ``.svg`` and ``.pdf`` are pictures.

        Raises:
            SkipscopeError: an unknown ending, or a place that cannot be written.
        """
        path = Path(path)
        ending = path.suffix.lower()
        if ending == ".json":
            return write_whole(path, dumps(self))
        if ending in {".html", ".png", ".svg", ".pdf", ".csv", ".npz", ".tex", ".gif"}:
            return _draw("save", self, path, **options)
        raise SkipscopeError(
            "save",
            f"unknown kind of file {path.name}",
            expected=".json, .html, .png, .svg or .pdf",
            got=ending or "no ending",
        )

    def _repr_html_(self) -> str:
        return _draw("fragment", self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`."""
        return _converter().structure(data, cls)


def register_drawer(module: str) -> None:
    """Name the module that draws: it has ``plot(result, ax)``, ``save(result, path)`` and ``fragment(result)``."""
    global _drawer
    _drawer = module


def register_reader(function: str) -> None:
    """Name a function ``module:name`` that ``load`` asks for files it does not know itself; it may return None."""
    _readers.append(function)


def _draw(what: str, *args: Any, **options: Any) -> Any:
    assert _drawer is not None, "skipscope/__init__.py registers a drawer"
    return getattr(importlib.import_module(_drawer), what)(*args, **options)


def dumps(result: Result) -> str:
    """A result as JSON text that any strict reader accepts: what is not finite is written as a string."""
    content = {
        "skipscope": __version__,
        "format": Result.FORMAT,
        "result": type(result).__name__,
        "data": finite(result.to_dict()),
    }
    return json.dumps(content, allow_nan=False)


def loads(text: str, source: str = "text") -> Result:
    """The inverse of :func:`dumps`. Only results of skipscope are built; nothing in a file is ever run."""
    try:
        content = json.loads(text)
        kind = _kinds[content["result"]] if content["result"] in _kinds else _import_kind(content["result"])
        return _converter().structure(content["data"], kind)
    except SkipscopeError:
        raise
    except Exception as error:  # any malformed file must end here, whatever it holds
        raise SkipscopeError(
            "load",
            f"{source} is not a saved result, or was cut short ({type(error).__name__}: {str(error)[:200]})",
            expected="a file written by result.save(...)",
        ) from error


def load(path: str | os.PathLike[str]) -> Result:
    """Read what ``result.save(path)`` wrote: ``.json``, ``.html``, or a monitor's or a landscape's folder.

    Local.

    Raises:
        SkipscopeError: no such file, or not one of ours.
    """
    path = Path(path)
    for reader in _readers:
        module, _, name = reader.partition(":")
        result = getattr(importlib.import_module(module), name)(path)
        if result is not None:
            return result
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SkipscopeError(
            "load", f"cannot read {path}: {error}", cure="give a file written by result.save(...)"
        ) from error
    if path.suffix.lower() in {".html", ".htm"}:
        _, found, rest = text.partition('<script type="application/json" id="skipscope-data">')
        if not found:
            raise SkipscopeError(
                "load", f"{path} carries no saved result", expected="a page written by result.save(...)"
            )
        text = rest.partition("</script>")[0]  # every "<" in it is written as JSON's own escape
    return loads(text, str(path))


def _import_kind(name: Any) -> type[Result]:
    import skipscope

    for public in dir(skipscope):  # importing the rooms registers their results
        getattr(skipscope, public)
    if name not in _kinds:
        raise SkipscopeError(
            "load", f"unknown result {name!r:.60}", expected="one of " + ", ".join(sorted(_kinds))
        )
    return _kinds[name]


def _plain(value: Any) -> Any:
    # NumPy's arrays and scalars have tolist; NumPy itself is slow to import and not needed here.
    if (tolist := getattr(value, "tolist", None)) is not None:
        return tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def finite(value: Any) -> Any:
    """Plain data with what is not finite as strings ("nan", "inf"), for strict readers of JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


@functools.cache
def _converter():
    import numpy as np
    from cattrs import Converter

    converter = Converter()
    converter.register_structure_hook(np.ndarray, lambda value, _: np.array(value, dtype=float))
    converter.register_structure_hook(float, lambda value, _: float(value))
    converter.register_structure_hook(Any, lambda value, _: value)
    return converter
