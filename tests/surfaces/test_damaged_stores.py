"""Stores that were damaged, lie in unusual places, or are read by other programs."""

import importlib.util
import os
import shutil
import subprocess
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss


def surface(store=None, loss=F.cross_entropy, **options):
    torch.manual_seed(0)
    model, data = nn.Linear(4, 3), (torch.randn(40, 4), torch.randint(0, 3, (40,)))
    return ss.landscape(model, data, loss, **{"grid": (5, 6), "store": store, "strategy": "plain", **options})


def finished(tmp_path):
    return surface(tmp_path / "whole"), tmp_path / "whole"


DAMAGE = {
    "empty": lambda raw: b"", "cut": lambda raw: raw[: len(raw) // 2], "zeros": lambda raw: bytes(len(raw)),
    "one byte more": lambda raw: raw + b"\0",
    **{f"flip {k}": (lambda raw, k=k: raw[:k] + bytes([raw[k] ^ 64]) + raw[k + 1 :]) for k in range(0, 100, 11)},
}  # fmt: skip


def test_damaged_chunks_are_known_and_computed_again(tmp_path):
    whole, folder = finished(tmp_path)
    chunk = sorted(path for path in (folder / "sheet" / "c").rglob("*") if path.is_file())[-1]
    raw = chunk.read_bytes()
    for name, damage in DAMAGE.items():
        store = tmp_path / name
        shutil.copytree(folder, store)
        (store / chunk.relative_to(folder)).write_bytes(damage(raw))
        (store / "result.json").unlink()
        with pytest.warns(UserWarning, match="damaged part.*checksum") as told:
            found = surface(store)
        assert len([w for w in told if "checksum" in str(w.message)]) == 1
        np.testing.assert_array_equal(found.values, whole.values, err_msg=name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            surface(store)  # it was written again


@pytest.mark.parametrize("name", ["skipscope.json", "sheet/zarr.json", "result.json", "zarr.json"])
@pytest.mark.parametrize("content", [b"", b'{"identity": {"wei', None], ids=["empty", "cut", "missing"])
def test_damaged_metadata_are_made_again(tmp_path, name, content):
    calls = []

    def loss(output, target):
        calls.append(1)
        return F.cross_entropy(output, target)

    whole = surface(tmp_path / "s", loss)
    path = tmp_path / "s" / name
    path.unlink() if content is None else path.write_bytes(content)
    before, calls[:] = len(calls), []
    np.testing.assert_array_equal(surface(tmp_path / "s", loss).values, whole.values)
    assert len(calls) < before / 2
    np.testing.assert_array_equal(ss.load(tmp_path / "s").values, whole.values)


def test_a_symlink_a_dangling_one_and_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "here").mkdir()
    os.symlink(tmp_path / "scratch", tmp_path / "link")
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling")
    monkeypatch.chdir(tmp_path / "here")
    for store in (tmp_path / "link", tmp_path / "dangling", "."):
        assert surface(store).complete
        assert ss.load(store).complete
    assert (tmp_path / "link").is_symlink() and (tmp_path / "scratch" / "skipscope.json").exists()


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("only root can mount a disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_an_empty_mount_point_and_a_disk_that_is_only_read(disk):
    whole = surface(disk)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    np.testing.assert_array_equal(surface(disk).values, whole.values)
    assert ss.load(disk).complete
    with pytest.raises(ss.SkipscopeError, match="cannot make the store"):
        surface(disk / "new")


def test_a_disk_that_is_full_from_the_start(disk):
    room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    (disk / "ballast").write_bytes(bytes(room))
    with pytest.raises(ss.SkipscopeError, match=r"No space left on device[^$]*has room"):
        surface(disk / "s")


def test_what_killed_processes_left_is_swept(tmp_path):
    _, folder = finished(tmp_path)
    (folder / ".building-dead" / "sheet").mkdir(parents=True)
    (folder / ".result.json.x1").write_text("{")
    part = folder / "sheet" / "c" / "0" / "0.0123.partial"
    part.write_bytes(b"half")
    alive = folder / ".building-alive"
    alive.mkdir()
    for dead in (folder / ".building-dead", folder / ".result.json.x1", part):
        os.utime(dead, (time.time() - 100,) * 2)
    surface(folder)
    left = {path.name for path in folder.rglob("*") if path.name.startswith(".") or path.suffix == ".partial"}
    assert left == {".building-alive"}


@pytest.mark.skipif(not importlib.util.find_spec("xarray"), reason="needs xarray")
def test_xarray_opens_a_store(tmp_path):
    import xarray

    whole, folder = finished(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = xarray.open_zarr(folder)
    assert found["values"].dims == ("alpha", "beta")
    np.testing.assert_array_equal(found["values"], whole.values)
    np.testing.assert_array_equal(found["alpha"], whole.alphas)
    np.testing.assert_array_equal(found["values"].sel(beta=1.0), whole.values[:, -1])


def test_the_arrays_of_a_pair(tmp_path):
    import zarr

    torch.manual_seed(0)
    model, data = nn.Linear(4, 3), (torch.randn(40, 4), torch.randint(0, 3, (40,)))
    pair = ss.paired_landscapes({"a": model, "b": model}, data, F.cross_entropy, grid=3, store=tmp_path / "s")
    group = zarr.open_group(tmp_path / "s", mode="r")
    np.testing.assert_array_equal(group["b.difference"][:], pair.difference)
    assert Path(tmp_path / "s" / "a.values").is_dir()
