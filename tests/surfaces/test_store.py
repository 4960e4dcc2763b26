"""Results kept as they come: killed at any moment, run again, the same bits; strangers refused; ranks without collectives."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope.surfaces.grids import _grid_runner
from skipscope.surfaces.grids._grid import Sheet

HERE = Path(__file__).parent


def _model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def _data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(50, 6, generator=generator), torch.randint(4, (50,), generator=generator)


def _surface(store=None, **options):
    return ss.landscape(
        options.pop("model", None) or _model(), options.pop("data", None) or _data(),
        options.pop("loss", F.cross_entropy), store=store, **{"grid": (9, 7), "strategy": "plain", **options},
    )  # fmt: skip


def test_a_store_resumes_without_computing_anything_again(tmp_path):
    calls = []

    def loss(output, target):
        calls.append(1)
        return F.cross_entropy(output, target)

    one = _surface(tmp_path / "s", loss=loss)
    first, calls[:] = len(calls), []
    two = _surface(tmp_path / "s", loss=loss)
    assert np.array_equal(one.values, two.values) and len(calls) < first / 5
    assert np.array_equal(one.values, _surface(loss=loss).values)


@pytest.mark.parametrize("tolerance", [None, 0.02])
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, tolerance):
    whole = _surface(grid=17, tolerance=tolerance)
    count = 0

    def loss(output, target):
        nonlocal count
        count += 1
        if count == stop:
            raise KeyboardInterrupt
        return F.cross_entropy(output, target)

    stop, rounds = 40, 0
    while True:
        try:
            result = _surface(tmp_path / "s", grid=17, loss=loss, tolerance=tolerance)
            break
        except KeyboardInterrupt:
            count, rounds, stop = 0, rounds + 1, 60 + 40 * rounds
    assert (
        rounds >= 1
        and np.array_equal(result.values, whole.values)
        and np.array_equal(result.computed, whole.computed)
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": _model(1)}, "weights"),
        ({"data": (_data()[0] + 1, _data()[1])}, "data"),
        ({"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, "loss"),
        ({"loss": lambda o, t: 2 * F.cross_entropy(o, t)}, "loss"),
        ({"grid": (9, 8)}, "grid"),
        ({"span": 0.5}, "grid"),
        ({"seed": 1}, "directions, settings"),
        ({"normalize": "tensor"}, "directions"),
        ({"l2": 0.1}, "settings"),
        ({"metrics": {"error": lambda o, t: 1.0}}, "measured"),
    ],
)
def test_a_store_of_others_is_refused_and_left_alone(tmp_path, change, named):
    before = _surface(tmp_path / "s", loss=F.cross_entropy)
    with pytest.raises(ss.SkipscopeError, match="made with other .*" + named):
        _surface(tmp_path / "s", **change)
    assert np.array_equal(_surface(tmp_path / "s").values, before.values)


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "diary.txt").write_text("dear diary")
    with pytest.raises(ss.SkipscopeError, match="not a landscape's store"):
        _surface(tmp_path)
    assert (tmp_path / "diary.txt").read_text() == "dear diary"


def test_an_empty_folder_will_do(tmp_path):
    assert _surface(tmp_path).complete


def test_pairs_and_the_chosen_way_are_kept(tmp_path):
    twins = {"one": _model(), "other": _model(1)}
    one, two = (
        ss.paired_landscapes(twins, _data(), F.cross_entropy, grid=7, store=tmp_path / "s") for _ in range(2)
    )
    for name in twins:
        assert np.array_equal(one.surfaces[name].values, two.surfaces[name].values)
    loaded = ss.load(tmp_path / "s")
    assert np.array_equal(loaded.surfaces["other"].values, one.surfaces["other"].values)


def test_load_of_an_unfinished_store_says_how_to_finish(tmp_path):
    _surface(tmp_path / "s")
    (tmp_path / "s" / "result.json").unlink()
    with pytest.raises(ss.SkipscopeError, match="not finished"):
        ss.load(tmp_path / "s")


def test_a_full_disk_loses_nothing_that_was_kept(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can make a small disk")
    try:
        with pytest.raises(ss.SkipscopeError, match="make room and run the same call again"):
            _surface(tmp_path / "s", grid=21)
        with pytest.raises(ss.SkipscopeError, match="not finished"):
            ss.load(tmp_path / "s")
        assert _units(tmp_path / "s") > 1
        subprocess.run(["mount", "-o", "remount,size=4m", str(tmp_path)], check=True)
        assert np.array_equal(_surface(tmp_path / "s", grid=21).values, _surface(grid=21).values)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_folder_of_several_stores_says_which(tmp_path):
    band = _surface(tmp_path / "s", seed=[0, 1])
    with pytest.raises(ss.SkipscopeError, match="seed-0, seed-1"):
        ss.load(tmp_path / "s")
    assert np.array_equal(ss.load(tmp_path / "s" / "seed-1").values, band.surfaces["1"].values)
    with pytest.raises(ss.SkipscopeError, match="not seeds"):
        _surface(seed=[])


# --- real processes ---

SCRIPT = """
import os, sys, time
import numpy as np, torch, torch.nn.functional as F
sys.path.insert(0, {here!r})
torch.set_num_threads(1)
from test_store import _data, _model
import skipscope as ss
def loss(output, target):
    time.sleep({slow})
    return F.cross_entropy(output, target)
loss.__name__ = "slow"
surface = ss.landscape(_model(), _data(), loss, grid=(9, 7), strategy="plain", store={store!r})
line = " ".join(["FINISHED", str(surface.computed.all()), float(np.nansum(surface.values)).hex()])
os.write(1, (line + chr(10)).encode())  # whole: ranks share one pipe
"""


def _script(tmp_path, slow):
    path = tmp_path / "run.py"
    path.write_text(SCRIPT.format(here=str(HERE), slow=slow, store=str(tmp_path / "s")))
    return str(path)


def _units(store):
    folder = Path(store) / "sheet" / "c" / "0"
    return len([f for f in folder.iterdir() if f.name.isdigit()]) if folder.exists() else 0


def _environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_kill_9_and_run_again(tmp_path):
    script = _script(tmp_path, 0.04)
    process = subprocess.Popen([sys.executable, script], env=_environment())
    end = time.monotonic() + 60
    while _units(tmp_path / "s") < 2 and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = _units(tmp_path / "s")
    assert 2 <= kept < 9 and not (tmp_path / "s" / "result.json").exists()
    seen = {f: f.stat().st_mtime_ns for f in (tmp_path / "s" / "sheet" / "c" / "0").iterdir()}

    def loss(output, target):
        return F.cross_entropy(output, target)

    loss.__name__ = "slow"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        resumed, whole = _surface(tmp_path / "s", loss=loss), _surface(loss=loss)
    finally:
        torch.set_num_threads(threads)
    assert resumed.computed.all() and np.array_equal(resumed.values, whole.values)
    assert all(
        f.stat().st_mtime_ns == t for f, t in seen.items() if f.name.isdigit()
    )  # nothing done was done again


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_torchrun_ranks(tmp_path, ranks):
    script = _script(tmp_path, 0.002)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={ranks}",
        "--master-port=0",
        script,
    ]
    found = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=200)
    lines = [line for line in found.stdout.splitlines() if "FINISHED" in line]
    assert found.returncode == 0, found.stderr[-2000:]
    assert len(lines) == ranks and len(set(lines)) == 1 and "True" in lines[0]


def test_a_lost_rank_costs_its_units_and_no_more(tmp_path, monkeypatch):
    """Rank 1 of 2 never comes: rank 0 does its own share, waits, and takes the rest over."""
    monkeypatch.setattr(_grid_runner, "_PATIENCE_S", 0.5)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    began = time.monotonic()
    alone = _surface(tmp_path / "s")
    assert alone.computed.all() and time.monotonic() - began >= 0.5
    monkeypatch.delenv("WORLD_SIZE")
    assert np.array_equal(alone.values, _surface().values)


def test_another_rank_than_the_first_takes_over_too(tmp_path, monkeypatch):
    """Rank 0 of 2 never comes: rank 1 takes its units over, each once."""
    monkeypatch.setattr(_grid_runner, "_PATIENCE_S", 0.2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    alone = _surface(tmp_path / "s")
    monkeypatch.delenv("WORLD_SIZE")
    assert alone.computed.all() and np.array_equal(alone.values, _surface().values)


@pytest.mark.parametrize("there", [[], [1], [1, 3], [0, 1, 2], [5]])
def test_a_rank_that_begins_late_takes_its_own_share(monkeypatch, there):
    """Whatever others have finished when a rank looks, every unit is some rank's: nobody waits for one in vain."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    shared = {}  # stands for the folder: point -> number, seen by whoever reads

    class Folder:
        def units(self, points):
            return [points[k : k + 2] for k in range(0, len(points), 2)]

        def read_into(self, sheet):
            for k, value in shared.items():
                sheet.data[0, k], sheet.done[k] = value, True

        def write(self, unit, numbers):
            shared.update(zip(unit.tolist(), numbers[0].tolist(), strict=True))

    computed = {}
    for rank in (1, 0):  # rank 1 is ahead; rank 0 finds some units done
        monkeypatch.setenv("RANK", str(rank))
        runner = _grid_runner.Runner(
            Sheet(["v"], (12,)), lambda unit: unit[None] * 1.0, Folder(), "torchrun", "test"
        )
        monkeypatch.setattr(runner, "_wait", lambda units, patience: None)
        if rank == 0:
            shared = {k: float(k) for k in range(12) if k // 2 in there}
        before = dict(shared)
        runner.compute(np.arange(12))
        computed[rank] = {k // 2 for k in shared if k not in before}
    assert computed[1] == {1, 3, 5} and computed[0] == {0, 2, 4} - set(there)


def test_ranks_without_a_store_are_refused():
    with pytest.raises(ss.SkipscopeError, match="ranks meet in a store"):
        _surface(engine="torchrun")
    with pytest.raises(ss.SkipscopeError, match="unknown engine"):
        _surface(engine="slurm")


def test_a_metric_of_the_same_name_that_computes_something_else_is_refused(tmp_path):
    torch.manual_seed(0)
    model, data = nn.Linear(4, 3), (torch.randn(20, 4), torch.randint(3, (20,)))
    options = {"grid": 3, "store": tmp_path / "s", "strategy": "plain"}
    ss.landscape(model, data, F.cross_entropy, metrics={"m": lambda out, _: out.abs().mean()}, **options)
    ss.landscape(model, data, F.cross_entropy, metrics={"m": lambda out, _: out.abs().mean()}, **options)
    with pytest.raises(ss.SkipscopeError, match="other metric m"):
        ss.landscape(
            model, data, F.cross_entropy, metrics={"m": lambda out, _: out.square().mean()}, **options
        )


def test_a_loss_of_the_same_name_that_is_cut_off_away_from_the_origin_is_refused(tmp_path):
    def cut_at(highest):
        def loss(output, target):
            return F.cross_entropy(output, target).clamp(max=highest)

        return loss

    _surface(tmp_path / "s", loss=cut_at(100.0), span=3.0)
    _surface(tmp_path / "s", loss=cut_at(100.0), span=3.0)
    assert _surface(loss=cut_at(1.8), span=3.0).scores.centre < 1.8  # the same at the origin
    with pytest.raises(ss.SkipscopeError, match="other loss away from the origin"):
        _surface(tmp_path / "s", loss=cut_at(1.8), span=3.0)


def test_the_strength_of_other_shortcuts_is_refused(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            x = x + self.a(x).tanh()
            return self.head(x + self.b(x).tanh())

    torch.manual_seed(0)
    model = Twice()
    found = ss.find_shortcuts(model, _data()[0])
    _surface(tmp_path / "s", model=model, strength=found[:1])
    _surface(tmp_path / "s", model=model, strength=list(found[:1]))
    with pytest.raises(ss.SkipscopeError, match="made with other settings"):
        _surface(tmp_path / "s", model=model, strength=found[1:])


@pytest.mark.parametrize("twins", [False, True])
def test_a_stopped_adaptive_run_has_a_surface_after_every_level(tmp_path, twins):
    """Usable at any time: whole, its error seen on points that the fit had not seen, each value marked."""
    calls, stop = [], 0

    def loss(output, target):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return F.cross_entropy(output, target)

    def run(store) -> Any:
        calls.clear()
        options: Any = {"grid": 17, "tolerance": 1e-3, "span": 3.0, "store": store, "strategy": "plain"}
        if not twins:
            return _surface(loss=loss, **options)
        pair = ss.paired_landscapes({"a": _model(0), "b": _model(1)}, _data(), loss, **options)
        return pair.surfaces["b"]

    def kept(store) -> Any:
        found: Any = ss.load(store)
        return found.surfaces["b"] if twins else found

    alone = run(None)
    whole = _surface(model=_model(1 if twins else 0), grid=17, span=3.0)
    counts, errors = [], []
    for stop in range(len(calls) // 3, len(calls), len(calls) // 5):
        store = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            run(store)
        part = kept(store)
        assert part.complete and np.isfinite(part.values).all() and part.held_out > 0 and part.beyond is None
        assert np.array_equal(part.values[part.computed], whole.values[part.computed])
        assert "surface after a level" in " ".join(str(part).split())
        counts.append(int(part.computed.sum()))
        errors.append(np.abs(part.values - whole.values).max())
        assert part.interpolation_error > 0.1 * errors[-1]  # of the size of the true one
    assert len(set(counts)) > 1 and counts == sorted(counts) and errors[-1] < errors[0]
    stop = 0
    ended = run(store)
    assert np.array_equal(ended.values, alone.values) and np.array_equal(ended.computed, alone.computed)
    assert kept(store).beyond == ended.beyond and np.array_equal(kept(store).values, ended.values)
