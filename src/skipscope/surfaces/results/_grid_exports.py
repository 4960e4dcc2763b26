"""Exports of results on a grid: ``.npz``, ``.csv`` with a line per point, ``.tex`` with the table.

``.h5`` has the layout of the code of Li et al.; ``.vtk`` and ``.vtp`` are for ParaView: see
``_scientific_formats``.

An ``.npz`` has ``alphas``, ``betas`` (empty for a line) and every array under its name, or as
``surface/name`` if there are several surfaces. Values from ``.npz`` and ``.csv`` are exact.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from skipscope._files import write_whole
from skipscope._result import Result
from skipscope._table import Table, plain_text
from skipscope.surfaces.results._scientific_formats import Layer as Layer
from skipscope.surfaces.results._scientific_formats import hdf5, legacy_vtk, vtk_xml


class Exported(Result):
    """Result that can be exported for other programs."""

    def layers(self) -> Iterator[Layer]:
        """Yield the result's values, grid by grid."""
        yield from ()

    def paper_table(self) -> Table:
        """Table for a ``.tex`` file."""
        return self.table()

    def save(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """Save as :meth:`Result.save`, or in a format of other programs.

        Further formats: ``.npz``, ``.csv`` (one line per point) and ``.tex`` (a table of the scores). ``.h5``
        can be read by the scripts of Li et al. (``xcoordinates``, ``ycoordinates``, ``train_loss``; one group
        per surface if there are several) and needs h5py. ``.vtk`` and ``.vtp`` are surfaces with the loss as
        height, for ParaView, side by side if there are several.
        """
        path, ending = Path(path), Path(path).suffix.lower()
        if ending == ".tex":
            return write_whole(path, self.paper_table().latex())
        writer = _WRITERS.get(ending)
        layers = list(self.layers()) if writer else []
        if writer and layers:
            return write_whole(path, writer(layers))
        return super().save(path, **options)


def _npz(layers: list[Layer]) -> bytes:
    arrays = {"alphas": layers[0].alphas, "betas": layers[0].betas}
    for layer in layers:
        lead = layer.prefix + "/" if layer.prefix else ""
        arrays |= {lead + name: column for name, column in {**layer.columns, **layer.more}.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
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


_WRITERS: dict[str, Callable[[list[Layer]], str | bytes]] = {
    ".npz": _npz, ".csv": _csv, ".h5": hdf5, ".hdf5": hdf5, ".vtk": legacy_vtk, ".vtp": vtk_xml,
}  # fmt: skip
