"""Curvature maps: a closed form over a whole plane, walks against fresh solves, resuming, twins."""

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope.curvature import _eigensolver
from skipscope.surfaces.evaluation import _process_pool
from skipscope.surfaces.maps import _curvature_map, _row_walk, _row_workers

DOUBLE = torch.float64


def half_squares(output, target):
    return (output - target).square().sum() / 2


def two_weights(a=0.7):
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).to(DOUBLE)
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[1].weight)
    one = torch.ones(1, 1, dtype=DOUBLE)
    return model, (one, a * one), [{"0.weight": one}, {"1.weight": one}]


def small_net(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).to(DOUBLE)
    return model, (torch.randn(30, 4, dtype=DOUBLE), torch.randint(0, 3, (30,)))


def same(a, b):
    arrays = ("smallest", "largest", "residuals", "probability", "converged", "checked")
    return all(np.array_equal(getattr(a, n), getattr(b, n), equal_nan=True) for n in arrays)


def test_two_scalar_weights_over_a_whole_plane():
    """(w2 w1 - a)^2 / 2: lambda = (s +- sqrt((w1^2 - w2^2)^2 + 4 (2 w1 w2 - a)^2)) / 2, s = w1^2 + w2^2."""
    model, data, plane = two_weights()
    found = ss.curvature_map(model, data, half_squares, grid=11, span=1.5, directions=plane)
    w1, w2 = np.meshgrid(found.alphas, found.betas, indexing="ij")
    root = np.sqrt((w1**2 - w2**2) ** 2 + 4 * (2 * w1 * w2 - 0.7) ** 2)
    low, high = (w1**2 + w2**2 - root) / 2, (w1**2 + w2**2 + root) / 2
    assert found.converged.all()
    assert np.abs(found.smallest - low).max() < 1e-10 and np.abs(found.largest - high).max() < 1e-10
    assert np.abs(found.ratio - np.abs(low / high)).max() < 1e-9


def test_the_walk_finds_what_fresh_solves_find_for_less():
    model, data = small_net()
    found = ss.curvature_map(
        model, data, F.cross_entropy, grid=(1, 33), span=((0.2, 0.2), (-1.0, 1.0)), seed=3
    )
    plane = [ss.random_direction(model, seed=3, axis=axis) for axis in (0, 1)]
    products = 0
    for a, alpha in enumerate(found.alphas):
        for b, beta in enumerate(found.betas):
            moved, _ = small_net()
            with torch.no_grad():
                for name, p in moved.named_parameters():
                    p.add_(sum(c * d[name] for c, d in zip((alpha, beta), plane) if name in d))
            ends = ss.extreme_eigenvalues(moved, data, F.cross_entropy, tol=1e-2)
            products += ends.products - 1  # less the trial, which a map makes once
            assert found.smallest[a, b] == pytest.approx(ends.smallest[0], abs=2e-2 * ends.scale)
            assert found.largest[a, b] == pytest.approx(ends.largest[0], abs=2e-2 * ends.scale)
    assert found.converged.all() and found.differed == 0
    assert found.checked.sum() == 3
    assert found.products <= 0.6 * products and found.probability.min() >= 0.9


def test_an_end_that_the_walk_cannot_see_is_found_by_the_checks(monkeypatch):
    """Two losses side by side: the second one's curvature overtakes, in a direction the walk does not know."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.v, self.w, self.move = (nn.Parameter(torch.zeros(1, dtype=DOUBLE)) for _ in range(3))

        def forward(self, x):
            return (1 - self.move) * self.v**2 + (1 + self.move) * self.w**2 + 0 * x.sum()

    monkeypatch.setattr(_eigensolver, "_SHAKE", 1e-14)
    monkeypatch.setattr(_row_walk, "_SMALL", 0)
    monkeypatch.setattr(_row_walk, "SCREENING", (0.0, 0.5))
    model, x = Two(), torch.ones(1, dtype=DOUBLE)
    line = [{"move": torch.ones(1, dtype=DOUBLE)}]
    found = ss.curvature_map(
        model, (x, x), lambda output, target: output.sum(), grid=(17,), directions=line, span=((-0.4, 0.6),)
    )
    assert found.differed >= 1
    assert found.largest == pytest.approx(2 * (1 + np.abs(found.alphas)), rel=1e-9)


def test_a_store_resumes_to_the_same_bits(tmp_path, monkeypatch):
    model, data = small_net()
    options = {"grid": 5, "seed": 1, "span": 0.5}
    whole = ss.curvature_map(model, data, F.cross_entropy, **options)
    rows, call = [], _curvature_map.Walk.__call__

    def dies(self, flat):
        if len(rows) == 2:
            raise KeyboardInterrupt
        rows.append(flat)
        return call(self, flat)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_curvature_map.Walk, "__call__", dies)
        ss.curvature_map(model, data, F.cross_entropy, store=tmp_path / "map", **options)
    rows.clear()
    monkeypatch.setattr(
        _curvature_map.Walk, "__call__", lambda self, flat: rows.append(flat) or call(self, flat)
    )
    resumed = ss.curvature_map(model, data, F.cross_entropy, store=tmp_path / "map", **options)
    assert len(rows) == 3 and same(resumed, whole)
    assert same(ss.load(tmp_path / "map"), whole)
    with pytest.raises(ss.SkipscopeError, match="other settings"):
        ss.curvature_map(model, data, F.cross_entropy, store=tmp_path / "map", **options, tol=1e-3)


def test_it_lives_inside_a_landscapes_store(tmp_path):
    model, data = small_net()
    surface = ss.landscape(model, data, F.cross_entropy, grid=3, store=tmp_path / "s")
    found = ss.curvature_map(model, data, F.cross_entropy, grid=3, store=tmp_path / "s")
    assert (tmp_path / "s" / "curvature").is_dir()
    assert same(ss.curvature_map(model, data, F.cross_entropy, grid=3, store=tmp_path / "s"), found)
    assert np.array_equal(ss.load(tmp_path / "s").values, surface.values)
    assert np.array_equal(found.alphas, surface.alphas)


def with_shortcuts(branch=lambda: nn.Linear(5, 5)):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 5), *(ss.nn.IdentityShortcut(branch()) for _ in range(2)), nn.Linear(5, 3)
    ).to(DOUBLE)


def test_with_and_without_shortcuts_in_one_call(tmp_path):
    model, (_, data) = with_shortcuts(), small_net()
    twins = {"with": model, "without": ss.ablate(model, inputs=data[0])}
    pair = ss.curvature_map(twins, data, F.cross_entropy, grid=3, store=tmp_path / "maps")
    alone = {name: ss.curvature_map(m, data, F.cross_entropy, grid=3) for name, m in twins.items()}
    assert all(same(pair.maps[name], alone[name]) for name in twins) and pair.shared_weights
    assert np.abs(pair.maps["with"].largest - pair.maps["without"].largest).min() > 0
    again = ss.curvature_map(twins, data, F.cross_entropy, grid=3, store=tmp_path / "maps")
    assert all(same(pair.maps[name], again.maps[name]) for name in twins)
    assert same(ss.load(tmp_path / "maps" / "without"), pair.maps["without"])
    loaded = ss.load(pair.save(tmp_path / "pair.json"))
    assert same(loaded.maps["with"], pair.maps["with"])
    assert "with" in str(pair) and "lambda_max" in str(pair)


def test_twins_with_weights_of_their_own_are_said_to_be_so():
    twins, data = {"one": small_net(0)[0], "other": small_net(1)[0]}, small_net()[1]
    pair = ss.curvature_map(twins, data, F.cross_entropy, grid=(3,))
    assert not pair.shared_weights and "other weights than one" in " ".join(pair.notes)
    alone = ss.curvature_map(twins["other"], data, F.cross_entropy, grid=(3,))
    assert same(pair.maps["other"], alone)
    with pytest.raises(ss.SkipscopeError, match="no twins"):
        ss.curvature_map({}, data, F.cross_entropy)


def test_a_removed_twins_stale_batch_norm_statistics_are_measured_anew():
    model = with_shortcuts(lambda: nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)))
    _, data = small_net()
    model(data[0])
    plain = ss.ablate(model, inputs=data[0])
    before = {n: t.clone() for n, t in plain.state_dict().items()}
    pair = ss.curvature_map({"with": model, "without": plain}, data, F.cross_entropy, grid=(3,))
    fresh = ss.recalibrate(ss.ablate(model, inputs=data[0]), data)
    assert same(pair.maps["without"], ss.curvature_map(fresh, data, F.cross_entropy, grid=(3,)))
    assert "measured again" in " ".join(pair.notes)
    assert all(torch.equal(before[n], t) for n, t in plain.state_dict().items())


def test_points_that_are_not_finite_or_not_converged_are_marked():
    model, data, plane = two_weights()

    def walled(output, target):
        return half_squares(output, target) + (0.5 - output.sum()).sqrt()

    found = ss.curvature_map(model, data, walled, grid=5, span=1.0, directions=plane)
    outside = np.multiply.outer(found.alphas, found.betas) >= 0.5
    assert np.array_equal(np.isnan(found.smallest), outside) and not found.converged[outside].any()
    assert "not converged" in str(found)
    net, batch = small_net()
    short = ss.curvature_map(net, batch, F.cross_entropy, grid=3, max_products=3)
    assert not short.converged.any() and np.isfinite(short.largest).all()
    assert math.isfinite(short.probability.max())


def test_the_model_is_left_as_found_and_the_result_prints():
    model, data = small_net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = ss.curvature_map(model, data, F.cross_entropy, grid=(4,))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items()) and model.training
    assert found.smallest.shape == (4,) and "convex" in str(found)
    with pytest.raises(ss.SkipscopeError, match="Ray"):
        ss.curvature_map(model, data, F.cross_entropy, grid=3, engine="ray")


# --- real processes ---

SCRIPT = """
import os, sys, time
import torch, torch.nn.functional as F
sys.path.insert(0, {here!r})
torch.set_num_threads(1)
from test_curvature_map import small_net
import skipscope as ss
def loss(output, target):
    time.sleep({slow})
    return F.cross_entropy(output, target)
loss.__name__ = "slow"
model, data = small_net()
found = ss.curvature_map(model, data, loss, grid=6, seed=1, span=0.5, store={store!r})
numbers = float(found.smallest.sum()).hex(), float(found.largest.sum()).hex(), str(found.products)
os.write(1, (" ".join(["FINISHED", *numbers]) + chr(10)).encode())  # whole: ranks share one pipe
"""


def script(folder, slow):
    path = folder / "run.py"
    path.write_text(SCRIPT.format(here=str(Path(__file__).parent), slow=slow, store=str(folder / "map")))
    return str(path), {**os.environ, "OMP_NUM_THREADS": "1"}


def rows_kept(folder):
    kept = folder / "map" / "sheet" / "c" / "0"
    return [f for f in kept.iterdir() if f.name.isdigit()] if kept.exists() else []


def finished_line(text):
    return next(line for line in text.splitlines() if "FINISHED" in line)


@pytest.mark.slow
def test_kill_9_and_run_again(tmp_path):
    path, environment = script(tmp_path, 0.03)
    process = subprocess.Popen([sys.executable, path], env=environment)
    end = time.monotonic() + 60
    while len(rows_kept(tmp_path)) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    seen = {f: f.stat().st_mtime_ns for f in rows_kept(tmp_path)}
    assert 2 <= len(seen) < 6 and not (tmp_path / "map" / "result.json").exists()
    path, _ = script(tmp_path, 0)
    again = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True)
    (whole := tmp_path / "whole").mkdir()
    at_once = subprocess.run(
        [sys.executable, script(whole, 0)[0]], env=environment, capture_output=True, text=True
    )
    assert finished_line(again.stdout) == finished_line(at_once.stdout)
    assert all(f.stat().st_mtime_ns == t for f, t in seen.items())  # nothing done was done again


@pytest.mark.slow
def test_two_torchrun_ranks(tmp_path):
    path, environment = script(tmp_path, 0)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=0",
        path,
    ]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert found.returncode == 0, found.stderr[-2000:]
    lines = [line for line in found.stdout.splitlines() if "FINISHED" in line]
    (whole := tmp_path / "whole").mkdir()
    alone = subprocess.run(
        [sys.executable, script(whole, 0)[0]], env=environment, capture_output=True, text=True
    )
    assert len(lines) == 2 and set(lines) == {finished_line(alone.stdout)}


# --- a row a core ---


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(not _process_pool.CAN_FORK, reason="copies are made by fork, on Linux")
@pytest.mark.parametrize("case", ["whole", "a copy dies", "no memory", "a line", "twins"])
def test_rows_walked_side_by_side_have_the_bits_of_one_thread(two_threads, monkeypatch, tmp_path, case):
    model, data = small_net()
    made, marker = [], tmp_path / "one"

    class Seen(_process_pool.Forked):
        def __init__(self, compute, *args):
            made.append(self)
            super().__init__(compute, *args)

        def answers(self, questions):
            assert len(questions) == 4
            return super().answers(questions)

    def loss(output, target):
        if (
            case == "a copy dies"
            and multiprocessing.parent_process() is not None
            and made
            and not marker.exists()
        ):
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return F.cross_entropy(output, target)

    def run():
        grid = (9,) if case == "a line" else (4, 5)
        twins = {"a": model, "b": small_net(1)[0]} if case == "twins" else model
        return ss.curvature_map(twins, data, loss, grid=grid)

    torch.set_num_threads(1)
    alone = run()
    torch.set_num_threads(2)
    monkeypatch.setattr(_row_workers, "Forked", Seen)
    if case == "no memory":
        monkeypatch.setattr(_row_workers, "fits", lambda needed: needed < 0)
    found = run()
    assert len(made) == {"no memory": 0, "a line": 0, "twins": 2}.get(case, 1)
    assert marker.exists() == (case == "a copy dies")
    if case == "twins":
        assert all(same(found.maps[name], alone.maps[name]) for name in "ab")
    elif made:
        assert same(found, alone) and found.products == alone.products
    else:
        assert np.allclose(found.largest, alone.largest, rtol=1e-2)
    assert not multiprocessing.active_children()


def test_rows_longer_than_a_segment_are_the_same_with_and_without_a_store(tmp_path):
    model, data, plane = two_weights()
    options = {"grid": (2, 70), "directions": plane}
    one = ss.curvature_map(model, data, half_squares, **options)
    other = ss.curvature_map(model, data, half_squares, store=tmp_path / "s", **options)
    assert same(one, other) and one.converged.all()
