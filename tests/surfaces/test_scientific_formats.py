"""Surfaces for other people's programs: HDF5 in the layout of Li et al., VTK for ParaView."""

import xml.etree.ElementTree as xml

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope._errors import MissingExtra
from skipscope.surfaces import trajectory_plane

X, Y = torch.randn(20, 4), torch.randn(20, 2)


@pytest.fixture(scope="module")
def surface():
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    plane = trajectory_plane(model, [nn.Linear(4, 2) for _ in range(3)])
    return ss.landscape(model, (X, Y), F.mse_loss, directions=plane, grid=(3, 4), strategy="plain")


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(1)
    twins = {"one": nn.Linear(4, 2), "other <&>": nn.Linear(4, 2)}
    return ss.paired_landscapes(twins, (X, Y), F.mse_loss, grid=(3, 4), strategy="plain")


def test_hdf5_has_the_layout_of_li(surface, pair, tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(surface.save(tmp_path / "a.h5")) as file:
        x, y, loss = (file[name][:] for name in ("xcoordinates", "ycoordinates", "train_loss"))
        assert loss.shape == np.meshgrid(x, y)[0].shape == (4, 3)
        assert np.array_equal(loss, surface.values.T) and np.array_equal(x, surface.alphas)
        assert np.array_equal(file["proj_xcoord"][:], surface.points.coordinates[:, 0])
    with h5py.File(pair.save(tmp_path / "b.h5")) as file:
        assert np.array_equal(file["one/train_loss"][:], pair.surfaces["one"].values.T)
    found = ss.curvature_map(nn.Linear(4, 2), (X, Y), F.mse_loss, grid=(2, 3))
    with h5py.File(found.save(tmp_path / "c.h5")) as file:
        assert np.array_equal(file["max_eig"][:], found.largest.T)


def test_without_h5py_the_cure_is_named(surface, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(MissingExtra, match="pip install h5py"):
        surface.save(tmp_path / "a.h5")
    assert not (tmp_path / "a.h5").exists()


def legacy(text):
    """Points, cells and numbers of a legacy file, read by the rules of the format."""
    lines = text.splitlines()
    assert lines[0].startswith("# vtk DataFile Version") and lines[2:4] == ["ASCII", "DATASET POLYDATA"]
    at = 4
    count = int(lines[at].split()[1])
    points = np.array([line.split() for line in lines[at + 1 : at + 1 + count]], dtype=float)
    at += 1 + count
    kind, number, size = lines[at].split()
    cells = np.array([line.split() for line in lines[at + 1 : at + 1 + int(number)]], dtype=int)
    assert cells.size == int(size)
    at += 1 + int(number)
    assert lines[at] == f"POINT_DATA {count}"
    columns = {}
    for found in (i for i, line in enumerate(lines) if line.startswith("SCALARS")):
        assert lines[found + 1] == "LOOKUP_TABLE default"
        columns[lines[found].split()[1]] = np.array(lines[found + 2 : found + 2 + count], dtype=float)
    return points, kind, cells, columns


def test_legacy_vtk_is_the_surface(surface, tmp_path):
    points, kind, cells, columns = legacy(surface.save(tmp_path / "a.vtk").read_text())
    a, b = np.meshgrid(surface.alphas, surface.betas, indexing="ij")
    assert np.array_equal(points, np.stack([a, b, surface.values], 2).reshape(-1, 3))
    assert kind == "POLYGONS" and cells.shape == (6, 5) and (cells[:, 0] == 4).all()
    corners = points[cells[:, 1:], :2]
    edges = np.roll(corners, -1, 1) - corners
    area = edges[:, 0, 0] * edges[:, 1, 1] - edges[:, 0, 1] * edges[:, 1, 0]
    steps = np.outer(np.diff(surface.alphas), np.diff(surface.betas)).ravel()
    assert np.allclose(np.sort(area), np.sort(steps))  # every square of the grid once, all turning one way
    assert np.array_equal(columns["values"], surface.values.ravel())


def test_a_line_and_what_is_not_finite(tmp_path):
    model = nn.Linear(4, 2)
    loss = ss.objective(lambda m, b: F.mse_loss(m(b[0]), b[1]) / (m.weight[0, 0] - m.weight[0, 0]))
    line = ss.landscape(model, (X, Y), loss, grid=(5,), strategy="plain")
    points, kind, cells, columns = legacy(line.save(tmp_path / "a.vtk").read_text())
    assert kind == "LINES" and cells.tolist() == [[2, i, i + 1] for i in range(4)]
    assert np.isfinite(points).all() and not np.isfinite(columns["values"]).any()


def test_vtk_xml_has_several_surfaces_side_by_side(pair, tmp_path):
    piece = xml.fromstring(pair.save(tmp_path / "a.vtp").read_text()).find("PolyData/Piece")
    arrays = {a.get("Name"): a.text.split() for a in piece.iter("DataArray")}
    assert int(piece.get("NumberOfPoints")) == 24 and int(piece.get("NumberOfPolys")) == 12
    points = np.array(arrays["Points"], dtype=float).reshape(-1, 3)
    first, second = points[:12], points[12:]
    assert first[:, 0].max() < second[:, 0].min()
    values = np.concatenate([s.values.ravel() for s in pair.surfaces.values()])
    assert np.array_equal(points[:, 2], values)
    assert [float(n) for n in arrays["surface"]] == [0.0] * 12 + [1.0] * 12
    assert np.array(arrays["connectivity"], dtype=int).max() == 23
    assert [int(n) for n in arrays["offsets"]] == list(range(4, 52, 4))


def test_paraviews_own_reader_reads_both(pair, tmp_path):
    vtk = pytest.importorskip("vtk")
    for ending, reader in ((".vtk", vtk.vtkPolyDataReader()), (".vtp", vtk.vtkXMLPolyDataReader())):
        reader.SetFileName(str(pair.save(tmp_path / f"a{ending}")))
        if ending == ".vtk":
            reader.ReadAllScalarsOn()
        reader.Update()
        found = reader.GetOutput()
        assert (found.GetNumberOfPoints(), found.GetNumberOfCells()) == (24, 12)
        values = found.GetPointData().GetArray("values")
        expected = np.concatenate([s.values.ravel() for s in pair.surfaces.values()])
        assert np.allclose([values.GetValue(i) for i in range(24)], expected)
