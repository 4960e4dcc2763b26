"""Base class of results: frozen data with printing, plotting, saving and loading.

A result does not import any drawing code. ``plot``, ``save("x.html")`` and the notebook view call the drawer
that the package root registers (see ``skipscope/__init__.py``), so that no lower package imports a higher
package.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import importlib
import json
import math
import os
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any, ClassVar, Self

from skipscope._errors import MissingExtra, SkipscopeError
from skipscope._files import refuse_devices, write_whole
from skipscope._printable import printable
from skipscope._table import Table as Table
from skipscope._version import __version__

_kinds: dict[str, type[Result]] = {}
_readers: list[str] = []
_drawer: str | None = None
_DRAWN = (".html", ".png", ".svg", ".pdf", ".gif")
_TABLE_FORMATS = {".csv": Table.csv, ".tex": Table.latex, ".md": Table.markdown, ".npz": Table.npz}


class Result:
    """Base class of every result.

    A subclass is a frozen dataclass whose fields are numbers, strings, ``numpy`` arrays, other results, or
    tuples, lists and dicts of these; it implements :meth:`table`.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = ss.reference.deep_mlp(4, width=16, shortcut="identity"), ss.reference.digits(32)
        >>> loss = torch.nn.functional.cross_entropy
        >>> flow = ss.gradient_flow(model, data, loss)
        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = flow.save(os.path.join(folder, "flow.json"))
        ...     again = ss.load(path)
        >>> again.verdict == flow.verdict, type(again).__name__, again.to_dict() == flow.to_dict()
        (True, 'GradientFlow', True)
    """

    # Format number that `save` writes and `load` checks.
    FORMAT: ClassVar[int] = 1
    # Fields renamed since earlier versions of the file format: old name -> new name.
    RENAMED: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        _kinds[cls.__name__] = cls

    def table(self) -> Table:
        """The result as a table of plain data."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.table().text()

    def to_dict(self) -> dict[str, Any]:
        """Convert the result to dicts, lists, strings, numbers and None. Arrays become nested lists."""
        return _plain(self)

    def to_dataframe(self) -> Any:
        """The result's table as a ``pandas.DataFrame``.

        Raises:
            MissingExtra: pandas is not installed.
        """
        return self.table().dataframe()

    def plot(self, ax: Any = None, **options: Any) -> Any:
        """Draw the result with matplotlib.

        Args:
            ax: axes to draw into, for a surface also 3-D axes; several results in the same axes get different
                styles. For several surfaces a sequence of axes.
            **options: by keyword, as follows.

        Options:
            chart: index of the chart, as on the page; by default the first chart, or the summary picture of a
                comparison.
            figsize: width and height of a new figure, in inches.
            title: title above the axes, instead of a surface's own; "" for none.
            notes: False leaves out the sentences beside the axes.
            legend: False leaves out the legend or the colour bar.
            limits: ``(low, high)`` of the colour scale, or of a line's y axis. Or other results with a
                surface, for a common scale across several axes.
            label: label of a line in the legend.
            kind: "contour" or "3d" for a surface; by default the projection of ``ax``.
            most: maximum number of bars.

        Returns:
            The axes, or an array of several axes. ``skipscope.style("paper")`` sets sizes for a paper.

        Raises:
            SkipscopeError: the result has no such chart, the chart has no such option, or the axes do not
                fit it.
        """
        return call_drawer("plot", self, ax=ax, **options)

    def save(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """Write the result to a file atomically, in the format of the file extension.

        ``.json`` holds everything and is read back by ``skipscope.load``. ``.html`` is a self-contained page
        that includes the data, and can be loaded too. ``.png``, ``.svg`` and ``.pdf`` are pictures; ``.csv``,
        ``.tex``, ``.md`` and ``.npz`` hold the table.

        Raises:
            SkipscopeError: an unknown extension, or a path that cannot be written.
        """
        path = Path(path)
        ending = path.suffix.lower()
        if ending == ".json":
            return write_whole(path, dumps(self))
        if ending in _TABLE_FORMATS and not options:
            return write_whole(path, _TABLE_FORMATS[ending](self.table()))
        if ending in _DRAWN:
            return call_drawer("save", self, path, **options)
        raise SkipscopeError(
            "save",
            f"unknown kind of file {path.name}",
            expected=", ".join([".json", *_DRAWN, *_TABLE_FORMATS]),
            got=ending or "no ending",
        )

    def _repr_html_(self) -> str:
        return call_drawer("fragment", self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build a result from the data of :meth:`to_dict`."""
        return _converter().structure(data, cls)


def register_drawer(module: str) -> None:
    """Register the drawing module: ``plot(result, ax)``, ``save(result, path)``, ``fragment(result)``."""
    global _drawer
    _drawer = module


def register_reader(function: str) -> None:
    """Register a function ``module:name`` that reads files unknown to ``load``, or returns None."""
    _readers.append(function)


def call_drawer(what: str, *args: Any, **options: Any) -> Any:
    assert _drawer is not None, "skipscope/__init__.py registers a drawer"
    return getattr(importlib.import_module(_drawer), what)(*args, **options)


def dumps(result: Result) -> str:
    """Serialise a result as strict JSON: numbers that are not finite are written as strings."""
    data = finite(result.to_dict())
    content = {
        "skipscope": __version__,
        "format": Result.FORMAT,
        "result": type(result).__name__,
        "sha256": _checksum(data),
        "data": data,
    }
    return json.dumps(content, allow_nan=False)


def _checksum(data: Any) -> str:
    """SHA-256 of plain data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def loads(text: str, source: str = "text") -> Result:
    """Parse a result from text of :func:`dumps`. Builds results of skipscope only; no code in a file is run.

    Warns:
        UserWarning: the data does not match its checksum: the file was damaged or edited.

    Raises:
        SkipscopeError: the text is not a saved result, is truncated, or has a later format.
    """
    try:
        content = json.loads(text)
        refuse_later_format(content, Result.FORMAT, source)
        if content.get("sha256", _checksum(content["data"])) != _checksum(content["data"]):
            warnings.warn(
                f"{printable(source)} has changed since it was saved: its checksum is not that of its data",
                stacklevel=3,
            )
        kind = _kinds[content["result"]] if content["result"] in _kinds else _import_kind(content["result"])
        data = {kind.RENAMED.get(name, name): value for name, value in content["data"].items()}
        result = _converter().structure(data, kind)
        # A value of a wrong type may fit its field and fail only when it is used.
        str(result)
        return result
    except SkipscopeError:
        raise
    except ModuleNotFoundError as error:
        if error.name == "cattrs":
            raise MissingExtra("load", "cattrs") from error
        raise
    # Any malformed file must end in this error.
    except Exception as error:
        raise SkipscopeError(
            "load",
            f"{source} is not a saved result, or was cut short ({type(error).__name__}: {str(error)[:200]})",
            expected="a file written by result.save(...)",
        ) from error


def refuse_later_format(content: dict[str, Any], known: int, source: str) -> None:
    """Refuse content in a format later than this version knows.

    Raises:
        SkipscopeError: ``content["format"]`` is greater than ``known``.
    """
    if (written := content.get("format", known)) > known:
        raise SkipscopeError(
            "load",
            f"{source} was written by a later skipscope ({content.get('skipscope')})",
            expected=f"format {known} or earlier",
            got=f"format {written}",
            cure="update skipscope",
        )


def load(path: str | os.PathLike[str]) -> Result:
    """Load a result saved as ``.json`` or ``.html``, or the folder of a monitor or a landscape.

    Local.

    Raises:
        SkipscopeError: the file does not exist, or is not a saved result.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = ss.reference.deep_mlp(4, width=16, shortcut="identity"), ss.reference.digits(32)
        >>> loss = torch.nn.functional.cross_entropy
        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = ss.path_spectrum(model, data, loss).save(os.path.join(folder, "paths.json"))
        ...     len(ss.load(path).norms)
        4
    """
    path = Path(path)
    expected = "a file written by result.save(...), or the folder of a monitor or of a landscape"
    refuse_devices(path, operation="load", expected=expected)
    for reader in _readers:
        module, _, name = reader.partition(":")
        result = getattr(importlib.import_module(module), name)(path)
        if result is not None:
            return result
    if path.is_dir():
        raise SkipscopeError(
            "load", f"{path} is a folder without a monitor's history or a landscape", expected=expected
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SkipscopeError(
            "load", f"cannot read {path}: {error}", cure="give a file written by result.save(...)"
        ) from error
    if path.suffix.lower() in {".html", ".htm"}:
        text = _text_of_page(text, path)
    return loads(text, str(path))


# Largest size of a page's data after decompression: a page of a few bytes can claim any size.
_UNPACKED_BYTES = 1 << 30


def packed(text: str) -> str:
    """Compress text for embedding in a page (zlib and base64), to about a third of its size.

    Example:
        >>> len(packed("{}" * 100)) < 100
        True
    """
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _text_of_page(page: str, path: Path) -> str:
    """Extract the JSON text of the result in a page.

    Raises:
        SkipscopeError: the page has none, or is truncated.
    """
    # Earlier pages hold uncompressed JSON, with every "<" escaped.
    _, plain, rest = page.partition('<script type="application/json" id="skipscope-data">')
    if plain:
        return rest.partition("</script>")[0]
    _, found, rest = page.partition('<script type="application/zlib" id="skipscope-data">')
    if not found:
        raise SkipscopeError(
            "load", f"{path} carries no saved result", expected="a page written by result.save(...)"
        )
    try:
        reader = zlib.decompressobj()
        data = base64.b64decode(rest.partition("</script>")[0], validate=True)
        text = reader.decompress(data, _UNPACKED_BYTES)
        if not reader.eof:
            raise ValueError("incomplete data")
        return text.decode()
    except (ValueError, zlib.error) as error:
        raise SkipscopeError(
            "load",
            f"{path} is not a saved result, or was cut short ({type(error).__name__}: {error})",
            expected="a file written by result.save(...)",
        ) from error


def _import_kind(name: Any) -> type[Result]:
    package = sys.modules[__name__.partition(".")[0]]
    for public in dir(package):  # importing the rooms registers their results
        getattr(package, public)
    if name not in _kinds:
        raise SkipscopeError(
            "load", f"unknown result {name!r:.60}", expected="one of " + ", ".join(sorted(_kinds))
        )
    return _kinds[name]


def _plain(value: Any) -> Any:
    # Arrays and scalars of NumPy have tolist; importing NumPy would be slow.
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
    """Replace numbers that are not finite by strings ("nan", "inf"), for strict JSON."""
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
