"""Results on a grid for other programs: ``.npz`` for NumPy, ``.csv`` with one line a point, ``.tex`` with the table.

An ``.npz`` has ``alphas``, ``betas`` (empty for a line) and every number under its name; where there are several
surfaces, each one's as ``surface/number``. Numbers come back bit for bit from both.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from skipscope._files import write_whole
from skipscope._result import Result
from skipscope._table import Table, plain_text


@dataclass(frozen=True)
class Layer:
    """Numbers on one grid.

    Attributes:
        name: of the surface, as a ``.csv`` names it.
        alphas: the first axis, [a].
        betas: the second axis, [b]; empty for a line.
        columns: name -> numbers, [a, b] or [a].
        prefix: before the numbers' names in an ``.npz``; "" where there is one surface alone.
        more: what lies on no grid, for the ``.npz``.
    """

    name: str
    alphas: np.ndarray
    betas: np.ndarray
    columns: dict[str, np.ndarray]
    prefix: str = ""
    more: dict[str, np.ndarray] = field(default_factory=dict)


class Exported(Result):
    """A result that other programs can read."""

    def layers(self) -> Iterator[Layer]:
        """The result's numbers, grid by grid."""
        yield from ()

    def paper_table(self) -> Table:
        """What a ``.tex`` holds."""
        return self.table()

    def save(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """As :meth:`Result.save`, and ``.npz``, ``.csv`` (one line a point) and ``.tex`` (a table of the scores)."""
        path, ending = Path(path), Path(path).suffix.lower()
        if ending == ".tex":
            return write_whole(path, self.paper_table().latex())
        layers = list(self.layers()) if ending in {".npz", ".csv"} else []
        if layers:
            return write_whole(path, _npz(layers) if ending == ".npz" else _csv(layers))
        return super().save(path, **options)


def _npz(layers: list[Layer]) -> bytes:
    arrays = {"alphas": layers[0].alphas, "betas": layers[0].betas}
    for layer in layers:
        lead = layer.prefix + "/" if layer.prefix else ""
        arrays |= {lead + name: column for name, column in {**layer.columns, **layer.more}.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _csv(layers: list[Layer]) -> str:
    lines = io.StringIO()
    writer = csv.writer(lines)
    heads = list(dict.fromkeys(name for layer in layers for name in layer.columns))
    writer.writerow(["surface", "alpha", "beta", *heads])
    for layer in layers:
        for i, j in np.ndindex(len(layer.alphas), max(1, len(layer.betas))):
            place = (i, j) if layer.betas.size else (i,)
            at = [repr(float(layer.alphas[i])), repr(float(layer.betas[j])) if layer.betas.size else ""]
            cells = [_cell(layer.columns[n][place]) if n in layer.columns else "" for n in heads]
            writer.writerow([plain_text(layer.name), *at, *cells])
    return lines.getvalue()


def _cell(value: Any) -> str:
    return str(int(value)) if isinstance(value, np.bool_) else repr(float(value))
