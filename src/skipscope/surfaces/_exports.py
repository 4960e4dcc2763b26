"""Surfaces for other programs: ``.npz`` for NumPy, ``.csv`` with one line a point, ``.tex`` with a table of scores."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from skipscope._files import write_whole
from skipscope.surfaces._results import PairedSurfaces, Scores, Surface


def save(result: Surface | PairedSurfaces, path: Path) -> Path | None:
    """Write ``result`` if the ending is one of this room's; None when it is not."""
    writers = {".npz": _npz, ".csv": _csv, ".tex": _tex}
    writer = writers.get(path.suffix.lower())
    return write_whole(path, writer(_surfaces(result), result)) if writer else None


def _surfaces(result: Surface | PairedSurfaces) -> dict[str, Surface]:
    return {result.name: result} if isinstance(result, Surface) else result.surfaces


def _columns(surface: Surface) -> dict[str, np.ndarray]:
    columns = {"values": surface.values, "computed": surface.computed, **surface.metrics}
    if surface.stderr is not None:
        columns["stderr"] = surface.stderr
    return columns


def _npz(surfaces: dict[str, Surface], result: Surface | PairedSurfaces) -> bytes:
    one = isinstance(result, Surface)
    first = next(iter(surfaces.values()))
    arrays = {"alphas": first.alphas, "betas": first.betas}
    for name, surface in surfaces.items():
        arrays |= {key if one else f"{name}/{key}": column for key, column in _columns(surface).items()}
    if not one:
        arrays |= {f"difference/{name}": difference.values for name, difference in result.differences.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _csv(surfaces: dict[str, Surface], result: Surface | PairedSurfaces) -> str:
    lines = io.StringIO()
    writer = csv.writer(lines)
    heads = list(dict.fromkeys(key for surface in surfaces.values() for key in _columns(surface)))
    writer.writerow(["surface", "alpha", "beta", *heads])
    for name, surface in surfaces.items():
        columns = _columns(surface)
        for place in map(tuple, np.ndindex(*surface.values.shape)):
            alpha, *more = place
            beta = repr(float(surface.betas[more[0]])) if more else ""
            cells = [_cell(columns[key][place]) if key in columns else "" for key in heads]
            writer.writerow([name, repr(float(surface.alphas[alpha])), beta, *cells])
    return lines.getvalue()


def _cell(value: Any) -> str:
    return str(int(value)) if isinstance(value, np.bool_) else repr(float(value))


def _tex(surfaces: dict[str, Surface], result: Surface | PairedSurfaces) -> str:
    rows = [
        " & ".join(
            [_escaped(name), *(_number(surface.scores, key) for key in _SCORES), _escaped(surface.label)]
        )
        for name, surface in surfaces.items()
    ]
    heads = ["Surface", "Centre", "Convexity", "Roughness", "Barrier", "Width", "Label"]
    level = next(iter(surfaces.values())).scores.level
    return "\n".join([
        f"% scores of loss surfaces; width read at loss {level:.6g}; +- standard error over samples (jackknife)",
        r"\begin{tabular}{lrrrrrl}", r"\hline", " & ".join(heads) + r" \\", r"\hline",
        *(row + r" \\" for row in rows), r"\hline", r"\end{tabular}", "",
    ])  # fmt: skip


_SCORES = ("centre", "convexity_share", "roughness", "barrier", "width")


def _number(scores: Scores, name: str) -> str:
    value, error = getattr(scores, name), scores.errors.get(name)
    bound = r"\geq " if name == "width" and scores.width_is_bound else ""
    text = f"{value:.3g}" if np.isfinite(value) else r"\mathrm{" + str(value) + "}"
    return f"${bound}{text}" + (rf" \pm {error:.2g}" if error is not None else "") + "$"


def _escaped(text: str) -> str:
    special = {c: "\\" + c for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\~{}", "^": r"\^{}"}
    return "".join(special.get(c, c) for c in text)
