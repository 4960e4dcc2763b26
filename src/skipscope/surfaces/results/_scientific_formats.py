"""Values on a grid as HDF5, in the layout of the code of Li et al., and as VTK polygons for ParaView.

The layout (github.com/tomgoldstein/loss-landscape): ``xcoordinates``, ``ycoordinates``, ``train_loss`` with a
row for each y, ``min_eig`` and ``max_eig`` of a curvature map, and ``proj_xcoord``, ``proj_ycoord`` of a
trajectory on the plane.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from skipscope._errors import MissingExtra

_NAMES_OF_LI = {"values": "train_loss", "smallest": "min_eig", "largest": "max_eig"}


@dataclass(frozen=True)
class Layer:
    """Values on one grid.

    Attributes:
        name: name of the surface in a ``.csv``.
        alphas: the first axis, [a].
        betas: the second axis, [b]; empty for a line.
        columns: name -> values, [a, b] or [a].
        prefix: prefix of the names in an ``.npz``; "" for a single surface.
        more: further arrays that are not on the grid, for the ``.npz``.
    """

    name: str
    alphas: np.ndarray
    betas: np.ndarray
    columns: dict[str, np.ndarray]
    prefix: str = ""
    more: dict[str, np.ndarray] = field(default_factory=dict)


def hdf5(layers: list[Layer]) -> bytes:
    """Encode as HDF5 in the layout of Li et al., with one group per surface if there are several.

    Raises:
        MissingExtra: h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise MissingExtra("save", "h5py") from error
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for layer in layers:
            group = file if len(layers) == 1 else file.create_group(re.sub("/", "_", layer.name))
            group["dir_file"] = layer.name
            group["xcoordinates"] = layer.alphas
            if layer.betas.size:
                group["ycoordinates"] = layer.betas
            for name, column in layer.columns.items():
                group[_NAMES_OF_LI.get(name, name)] = np.asarray(column, dtype=float).T
            places = layer.more.get("points/coordinates")
            if places is not None and places.ndim == 2 and places.shape[1] == 2:
                group["proj_xcoord"], group["proj_ycoord"] = places.T
    return buffer.getvalue()


@dataclass(frozen=True)
class _Mesh:
    """Surfaces as points and cells, side by side along the first axis.

    Attributes:
        points: coordinates ``[points, 3]``; the height is the layer's first column.
        cells: indices of the cells' points ``[cells, 4]``, or ``[cells, 2]`` for lines.
        columns: name -> values ``[points]``.
    """

    points: np.ndarray
    cells: np.ndarray
    columns: dict[str, np.ndarray]


def _mesh(layers: list[Layer]) -> _Mesh:
    names = list(dict.fromkeys(name for layer in layers for name in layer.columns))
    points, cells = [], []
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ["surface", *names]}
    start, shift = 0, 0.0
    for number, layer in enumerate(layers):
        a, b = np.meshgrid(layer.alphas, layer.betas if layer.betas.size else [0.0], indexing="ij")
        height = np.asarray(next(iter(layer.columns.values())), dtype=float).reshape(a.shape)
        finite = height[np.isfinite(height)]
        top = finite.max() if finite.size else 0.0
        # A mesh point needs a finite height; its column keeps the value as it is.
        height = np.where(np.isfinite(height), height, top)
        points.append(np.stack([a + shift, b, height], axis=2).reshape(-1, 3))
        index = start + np.arange(a.size).reshape(a.shape)
        corners = [index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]]
        cells.append(
            np.stack(corners if layer.betas.size else [index[:-1], index[1:]], axis=-1).reshape(
                -1, len(corners) if layer.betas.size else 2
            )
        )
        for name in names:
            column = layer.columns.get(name)
            columns[name].append(
                np.full(a.size, np.nan) if column is None else np.asarray(column, dtype=float).ravel()
            )
        columns["surface"].append(np.full(a.size, float(number)))
        start += a.size
        shift += 1.1 * float(np.ptp(layer.alphas) or 1.0)
    return _Mesh(
        np.concatenate(points),
        np.concatenate(cells),
        {name: np.concatenate(c) for name, c in columns.items()},
    )


def legacy_vtk(layers: list[Layer]) -> str:
    """Encode as a legacy VTK file of polygons, or of lines, with every column as point data."""
    mesh = _mesh(layers)
    count, corners = mesh.cells.shape
    lines = [
        "# vtk DataFile Version 3.0", "skipscope", "ASCII", "DATASET POLYDATA",
        f"POINTS {len(mesh.points)} double", *_rows(mesh.points),
        f"{'POLYGONS' if corners == 4 else 'LINES'} {count} {count * (corners + 1)}",
        *(f"{corners} {' '.join(map(str, cell))}" for cell in mesh.cells),
        f"POINT_DATA {len(mesh.points)}",
    ]  # fmt: skip
    for name, column in mesh.columns.items():
        lines += [
            f"SCALARS {re.sub(r'[^A-Za-z0-9_.-]', '_', name)} double 1",
            "LOOKUP_TABLE default",
            *map(repr, column.tolist()),
        ]
    return "\n".join(lines) + "\n"


def vtk_xml(layers: list[Layer]) -> str:
    """Encode the mesh as VTK's XML (``.vtp``)."""
    mesh = _mesh(layers)
    count, corners = mesh.cells.shape
    kind, other = ("Polys", "Lines") if corners == 4 else ("Lines", "Polys")
    data = "".join(_array(name, "Float64", map(repr, c.tolist())) for name, c in mesh.columns.items())
    cells = _array("connectivity", "Int64", map(str, mesh.cells.ravel()))
    cells += _array("offsets", "Int64", map(str, corners * np.arange(1, count + 1)))
    return (
        '<?xml version="1.0"?>\n<VTKFile type="PolyData" version="0.1"'
        ' byte_order="LittleEndian">\n<PolyData>\n'
        f'<Piece NumberOfPoints="{len(mesh.points)}" NumberOfVerts="0" NumberOfStrips="0"'
        f' NumberOf{kind}="{count}" '
        f'NumberOf{other}="0">\n<PointData Scalars="{_escaped(list(mesh.columns)[1])}">\n{data}</PointData>\n'
        f"<Points>\n{_array('Points', 'Float64', _rows(mesh.points), 3)}</Points>\n"
        f"<{kind}>\n{cells}</{kind}>\n"
        "</Piece>\n</PolyData>\n</VTKFile>\n"
    )


def _rows(points: np.ndarray) -> Iterable[str]:
    return (" ".join(map(repr, point)) for point in points.tolist())


def _array(name: str, kind: str, numbers: Iterable[str], components: int = 1) -> str:
    text = "\n".join(numbers)
    head = (
        f'<DataArray type="{kind}" Name="{_escaped(name)}" NumberOfComponents="{components}" format="ascii">'
    )
    return f"{head}\n{text}\n</DataArray>\n"


def _escaped(name: str) -> str:
    return name.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
