"""Results on a grid for other programs: every number comes back as it was."""

import csv
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope._result import Table
from skipscope.surfaces import trajectory_plane

X, Y = torch.randn(30, 4), torch.randn(30, 2)


def make(kind):
    """One result of each kind the room has, and the numbers it must export: name of the layer -> column -> array."""
    one, other = nn.Linear(4, 2), nn.Linear(4, 2)
    metrics = {"mae": F.l1_loss, "values": F.l1_loss}
    options = {"grid": (3, 4), "strategy": "plain"}
    if kind == "surface":
        plane = trajectory_plane(one, [nn.Linear(4, 2) for _ in range(3)])
        return ss.landscape(one, (X, Y), F.mse_loss, directions=plane, metrics=metrics, **options)
    if kind == "line":
        return ss.landscape(one, (X, Y), F.mse_loss, grid=(5,), strategy="plain")
    if kind == "without samples":
        return ss.landscape(one, (X, Y), lambda out, y: (out - y).abs().max(), grid=3, strategy="plain")
    if kind == "pair":
        return ss.paired_landscapes({"a_1": one, "same": one, "b": other}, (X, Y), F.mse_loss, **options)
    if kind == "band":
        return ss.landscape(one, (X, Y), F.mse_loss, seed=[0, 1], **options)
    if kind == "paired band":
        return ss.paired_landscapes({"a_1": one, "b": other}, (X, Y), F.mse_loss, seed=[0, 1], **options)
    return ss.curvature_map(
        one if kind == "map" else {"a_1": one, "b": other}, (X, Y), F.mse_loss, grid=(3, 4)
    )


def surface_columns(surface):
    found = {"values": surface.values, "computed": surface.computed, "mae": surface.metrics.get("mae")}
    found |= {"metric/values": surface.metrics.get("values")}
    found |= {"stderr": surface.stderr, "centre_stderr": surface.centre_stderr}
    return {name: column for name, column in found.items() if column is not None}


def map_columns(found):
    names = ("smallest", "largest", "ratio", "residuals", "probability", "converged", "checked")
    return {name: getattr(found, name) for name in names}


def pair_columns(pair, lead=""):
    out = {}
    for name, surface in pair.surfaces.items():
        out[lead + name] = surface_columns(surface)
        if name in pair.differences:
            d = pair.differences[name]
            out[lead + name] |= {"difference": d.values, "difference_stderr": d.stderr,
                                 "difference_low": d.low, "difference_high": d.high}  # fmt: skip
    return out


def expected(kind, result):
    if kind in {"surface", "line", "without samples"}:
        return {"": surface_columns(result)}
    if kind == "pair":
        return pair_columns(result)
    if kind == "band":
        over = {"median": result.median, "low": result.low, "high": result.high}
        return {"": over} | {f"seed {s}": surface_columns(found) for s, found in result.surfaces.items()}
    if kind == "paired band":
        return {k: v for s, pair in result.pairs.items() for k, v in pair_columns(pair, f"seed {s}/").items()}
    return {"": map_columns(result)} if kind == "map" else {n: map_columns(m) for n, m in result.maps.items()}


KINDS = ["surface", "line", "without samples", "pair", "band", "paired band", "map", "paired maps"]


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    torch.manual_seed(0)
    return request.param, make(request.param)


def test_npz(case, tmp_path):
    kind, result = case
    wanted = {
        f"{layer}/{name}".lstrip("/"): column
        for layer, columns in expected(kind, result).items()
        for name, column in columns.items()
    }
    with np.load(result.save(tmp_path / "r.npz"), allow_pickle=False) as file:
        if kind == "surface":
            points = {"names": np.array(result.points.names), "coordinates": result.points.coordinates,
                      "distances": result.points.distances, "losses": result.points.losses}  # fmt: skip
            wanted |= {f"points/{name}": known for name, known in points.items()}
        assert set(file) == {"alphas", "betas", *wanted}
        for name, column in wanted.items():
            assert np.array_equal(file[name], column, equal_nan=column.dtype.kind == "f"), name
            assert file[name].dtype == column.dtype


def test_csv(case, tmp_path):
    kind, result = case
    with open(result.save(tmp_path / "r.csv")) as file:
        lines = list(csv.DictReader(file))
    for layer, columns in expected(kind, result).items():
        name = layer or ("over seeds" if kind == "band" else result.name)
        own = [line for line in lines if line["surface"] == name]
        for head, column in columns.items():
            assert np.array_equal([float(line[head]) for line in own], column.ravel(), equal_nan=True), head
    assert len(lines) == sum(next(iter(c.values())).size for c in expected(kind, result).values())
    assert {float(line["alpha"]) for line in lines} == set(np.linspace(-1, 1, 5 if kind == "line" else 3))
    assert kind != "line" or {line["beta"] for line in lines} == {""}


def test_tex(case, tmp_path):
    """A tabular with as many cells in each line as columns, numbers in maths, all else escaped."""
    kind, result = case
    text = result.save(tmp_path / "r.tex").read_text()
    body = [line for line in text.splitlines() if not line.startswith("%")]
    sides = re.fullmatch(r"\\begin\{tabular\}\{([lr]+)\}", body[0])
    lines = [line for line in body if line.endswith(r" \\")]
    assert sides and body[-1] == r"\end{tabular}" and len(lines) >= 2
    for line in lines:
        assert len(re.split(r"(?<!\\)&", line)) == len(sides[1])
        outside = re.sub(r"\$[^$]*\$", "", line.replace(r"\$", "")).removesuffix(r" \\")
        assert not re.search(r"(?<!\\)[&%#_^|<>]", outside.replace(" & ", "")), line
    if kind in {"pair", "paired band", "paired maps"}:
        assert r"a\_1" in text
    if kind in {"surface", "pair"}:
        assert r"\pm" in text and "convexity" in text


@pytest.mark.parametrize("ending", ["json", "png", "svg", "pdf", "html"])
def test_pictures_and_files_of_every_kind(case, tmp_path, ending):
    _, result = case
    path = result.save(tmp_path / f"r.{ending}")
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml", "html": b"<!", "json": b"{"}[ending]
    assert path.read_bytes().startswith(start)
    if ending in {"json", "html"}:
        assert str(ss.load(path)) == str(result)


def test_cells_of_a_latex_table():
    cells = ["0.5 +- 0.03", ">= 1.2", "1.23e-07", 1234, "nan", "97 %", "a_b & 3 | 4", "-inf", "-", True, None]
    line = Table("t", ["what"] * len(cells), [cells]).latex().splitlines()[5]
    assert line.removesuffix(r" \\").split(" & ")[:6] == [
        r"$0.5 \pm 0.03$", r"$\geq 1.2$", r"$1.23 \times 10^{-7}$", "$1{,}234$", r"$\mathrm{nan}$", r"$97\ \%$"
    ]  # fmt: skip
    assert r"a\_b \& 3 $|$ 4 & $-\infty$ & - & True & -" in line


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(ss.SkipscopeError, match="cannot write"):
        make("line").save(tmp_path / "nowhere" / "line.csv")


def test_twins_over_a_trajectory_become_one_animation(tmp_path):
    from PIL import Image, ImageSequence

    end = nn.Linear(4, 2)
    plane = trajectory_plane(end, [nn.Linear(4, 2) for _ in range(3)])
    options = {"grid": 5, "strategy": "plain", "directions": plane, "span": plane.span()}
    one = ss.landscape(end, (X, Y), F.mse_loss, **options)
    two = ss.paired_landscapes({"as it is": end, "again": end}, (X, Y), F.mse_loss, **options)
    frames = []
    for i, result in enumerate((one, two)):
        with Image.open(result.save(tmp_path / f"{i}.gif", dpi=30)) as picture:
            frames.append((sum(1 for _ in ImageSequence.Iterator(picture)), picture.width))
    assert frames[0][0] == frames[1][0] == 3 and frames[1][1] == 2 * frames[0][1]
    with pytest.raises(ss.SkipscopeError, match="known weights"):
        make("pair").save(tmp_path / "none.gif")


@pytest.mark.parametrize("grid", [1, (5, 1), (1, 5), (1,), 2], ids=str)
def test_the_smallest_grids_are_drawn_and_exported(tmp_path, grid):
    surface = ss.landscape(nn.Linear(4, 2), (X, Y), F.mse_loss, grid=grid, strategy="plain")
    for ending in ("png", "html", "csv", "npz", "tex", "json"):
        assert surface.save(tmp_path / f"s.{ending}").stat().st_size
