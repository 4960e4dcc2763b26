"""Loss surfaces: points per second against loss-landscapes 3.0.6 and a plain functional_call loop, in one run.

loss-landscapes is not a dependency: ``python -m pip install --no-deps loss-landscapes==3.0.6`` (or name the folder it
is in: ``LOSS_LANDSCAPES=...``); without it its ratios are left out. All are timed in turn on the same network and
samples; seconds a point are those of a larger grid less those of a smaller one, so that nobody's preparation counts,
except in the figure that says "end to end".
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import skipscope as ss
from skipscope import reference
from skipscope._data import read
from skipscope._untouched import untouched
from skipscope.surfaces import random_direction
from skipscope.surfaces._landscape_settings import Settings
from skipscope.surfaces.evaluation._autotune import choose
from skipscope.surfaces.evaluation._twins_on_plane import Work, make_twins
from skipscope.surfaces.grids._grid import axes

ROUNDS = 3
FULL = 51 * 51


def trained(model: nn.Module, data: tuple, steps: int) -> nn.Module:
    """A few steps of Adam: what is looked at has usually been trained, in the same process."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


def resnet() -> tuple[nn.Module, tuple, Callable, float]:
    torch.manual_seed(0)
    model = reference.resnet20(in_channels=3)
    data = torch.randn(512, 3, 32, 32), torch.randint(10, (512,))
    model.train()
    with torch.no_grad():
        model(data[0])
    return model.eval(), data, F.cross_entropy, 512 * 2 * 40.8e6


def mlp() -> tuple[nn.Module, tuple, Callable, float]:
    torch.manual_seed(0)
    sizes = [64, 256, 256, 256, 256, 256]
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.GELU())]
    inputs, target = reference.digits(1797)
    work = 2 * 1797 * (64 * 256 + 4 * 256**2 + 2560)
    data = inputs.flatten(1), target
    return trained(nn.Sequential(*layers, nn.Linear(256, 10)), data, 10), data, F.cross_entropy, work


def gpt() -> tuple[nn.Module, tuple, Callable, float]:
    torch.manual_seed(0)
    data = reference.english(16)
    model = trained(reference.gpt(), data, 10)
    tokens = data[0].numel()
    return model, data, F.cross_entropy, 2 * tokens * sum(p.numel() for p in model.parameters())


# --- the three ways ---


def by_loss_landscapes(model: nn.Module, data: tuple, loss: Callable) -> Callable[[int], object] | None:
    sys.path.append(os.environ.get("LOSS_LANDSCAPES", ""))
    try:
        import loss_landscapes
        from loss_landscapes.metrics import Loss
    except ImportError:
        return None

    def run(steps: int) -> object:
        with torch.no_grad():
            return loss_landscapes.random_plane(
                model,
                Loss(loss, *data),
                distance=0.1,
                steps=steps,
                normalization="filter",
                deepcopy_model=True,
            )

    with torch.no_grad():  # it divides by the norm of every filter, zero biases too
        for p in model.parameters():
            if p.ndim < 2 and not p.any():
                p.normal_(std=1e-3)
    return run


def by_functional_call(model: nn.Module, data: tuple, loss: Callable) -> Callable[[int], object]:
    weights = {n: p.detach() for n, p in model.named_parameters()}
    one, two = (random_direction(model, axis=k) for k in (0, 1))

    def run(points: int) -> object:
        with torch.no_grad():
            for a in np.linspace(-1, 1, points):
                moved = {n: w + a * one[n] - a * two[n] if n in one else w for n, w in weights.items()}
                float(loss(functional_call(model, moved, (data[0],)), data[1]))

    return run


class Ours:
    """The room's own straight line up to the point where the grid is filled, standard errors included."""

    def __init__(self, model: nn.Module, data: tuple, loss: Callable):
        batches, objective = read(model, data, loss, "benchmark")
        self.model, settings = model, Settings(grid=51)
        self.at = axes(51, 1.0, None)
        self.twins = make_twins({"net": model}, batches, objective, settings, 2)
        self.work = Work(self.twins, self.at)
        some = self.work.points(np.r_[0:4, FULL // 2 : FULL // 2 + 28])
        self.choice = choose(self.twins[0].evaluator, some, FULL)

    def __call__(self, points: int) -> object:
        """The numbers of that many points of one row."""
        with untouched(self.model, training=False):
            return self.work(np.arange(points) + 51 * 20)


def seconds_a_point(
    ways: dict[str, tuple[Callable[[int], object], int, int]], rounds: int
) -> dict[str, float]:
    """Median over rounds; of each way the larger run less the smaller."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (run, small, large) in ways.items():
            times = []
            for points in (small, large):
                began = time.perf_counter()
                if points:
                    run(points)
                times.append(time.perf_counter() - began)
            count = large**2 - small**2 if name == "theirs" else large - small
            found[name].append((times[1] - times[0]) / count)
    return {name: statistics.median(times) for name, times in found.items()}


def sgemm_peaks(n: int = 2048) -> dict[str, float]:
    """FLOP/s of torch's matrix product, and of oneDNN's: on some processors the BLAS in torch is half as fast."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    ways: dict[str, Callable[[], Tensor]] = {"torch's": lambda: a @ b}
    if torch.backends.mkldnn.is_available():
        ways["oneDNN's"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    found = {}
    for name, way in ways.items():
        times = []
        for _ in range(6):
            began = time.perf_counter()
            way()
            times.append(time.perf_counter() - began)
        found[name] = 2 * n**3 / min(times)
    return found


# --- the figures ---


def figures() -> list[dict]:
    warnings.filterwarnings("ignore")
    out = []
    cases = [
        ("GELU MLP 64-256x5-10, 1,797 digits", mlp, 64, (2, 8), "1.3x"),
        ("small GPT, 16 x 64 tokens", gpt, 64, (2, 8), "2x"),
        # Last: once something has been compiled, all that runs in the process later is slower.
        ("ResNet-20, 512 images 32 x 32", resnet, 4, (1, 3), "4x"),
    ]
    theirs_on_resnet = None
    for name, make, points, steps, aim in cases:
        model, data, loss, work = make()
        theirs = by_loss_landscapes(model, data, loss)
        ours = Ours(model, data, loss)
        ways = {
            "ours": (ours, 0, points),
            "functional": (by_functional_call(model, data, loss), 0, max(points // 2, 2)),
        }
        ways |= {"theirs": (theirs, *steps)} if theirs else {}
        before = sgemm_peaks()
        times = seconds_a_point(ways, ROUNDS if make is resnet else 5 * ROUNDS)  # small ones are soon over
        ours.twins[0].evaluator.strategy.close()
        peaks = {name: max(peak, before[name]) for name, peak in sgemm_peaks().items()}
        detail = f"{times['ours'] * 1e3:.3g} ms a point; {ours.choice.name}; {ours.choice.why}"
        against = [("theirs", "loss-landscapes", aim)] * ("theirs" in times) + [
            ("functional", "functional_call", "")
        ]
        for way, words, wanted in against:
            ratio = times[way] / times["ours"]
            out.append(
                {
                    "name": f"{name}: against {words}",
                    "value": ratio,
                    "unit": "ratio",
                    "aim": wanted,
                    "detail": detail,
                }
            )
        if make is resnet:
            theirs_on_resnet = times.get("theirs")
            out += [
                {"name": f"{name}: share of {whose} sgemm peak", "value": work / times["ours"] / peak, "unit": "ratio",
                 "aim": "0.7", "detail": f"peak {peak / 1e9:.0f} GFLOP/s at 2048, measured before and after"}
                for whose, peak in peaks.items()
            ]  # fmt: skip
    out += adaptive(theirs_on_resnet)
    out.append(scaling())
    return out


def adaptive(theirs: float | None) -> list[dict]:
    """End to end: our whole call, preparation and trying included, against the full grid's points alone."""
    model, data, loss, _ = resnet()
    began = time.perf_counter()
    surface = ss.landscape(model, data, loss, grid=51, tolerance=0.01)
    seconds = time.perf_counter() - began
    # The truth at every third point of each axis, nearly all of them points that were interpolated.
    i, j = np.arange(1, 51, 3), np.arange(2, 51, 3)
    span = tuple((float(at[k[0]]), float(at[k[-1]])) for at, k in ((surface.alphas, i), (surface.betas, j)))
    truth = ss.landscape(model, data, loss, grid=(len(i), len(j)), span=span)
    off = np.abs(truth.values - surface.values[np.ix_(i, j)]) / float(np.ptp(surface.values))
    points = int(surface.computed.sum())
    detail = (
        f"{points} points in {seconds:.1f} s; error said {surface.interpolation_error_share or 0:.2%} of the range, standard "
        f"error {float(np.nanmedian(surface.stderr)) / float(np.ptp(surface.values)):.2%} (median)"
    )
    name = f"adaptive ResNet: largest error over range, {truth.values.size} other points"
    out = [{"name": name, "value": float(off.max()), "unit": "ratio", "aim": "0.01",
            "detail": f"median {float(np.median(off)):.2%}; {detail}"}]  # fmt: skip
    if theirs:
        out.append({"name": "adaptive ResNet, end to end: against their 51 x 51", "value": theirs * FULL / seconds,
                    "unit": "ratio", "aim": "40x", "detail": f"theirs {theirs:.3g} s a point; {detail}"})  # fmt: skip
    return out


SCALING = """
import os, sys, time, torch, torch.nn.functional as F, zarr, skipscope as ss
from skipscope import reference
torch.set_num_threads(1)
torch.manual_seed(0)
model, data = reference.deep_mlp(depth=20, shortcut="identity"), reference.digits(1000)
ss.landscape(model, data, F.cross_entropy, grid=3, strategy="plain", engine="local")
torch.distributed.init_process_group("gloo")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
began = time.perf_counter()
ss.landscape(model, data, F.cross_entropy, grid=35, strategy="plain", store=sys.argv[1])
os.write(1, f"SECONDS {time.perf_counter() - began}\\n".encode())  # whole: ranks share one pipe
"""


def scaling() -> dict:
    """One process against two under torchrun, a thread each; the slower rank's time from the call to the whole sheet.

    Imports come before, and the ranks begin together: what a start costs is the same on a grid of any size.
    """
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for ranks in times:
            with tempfile.TemporaryDirectory() as folder:
                script = Path(folder) / "run.py"
                script.write_text(SCALING)
                command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone",
                           str(script), str(Path(folder) / "store")]  # fmt: skip
                found = subprocess.run(
                    command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
                )
                lines = [line for line in found.stdout.splitlines() if "SECONDS" in line]
                times[ranks].append(max(float(line.split()[-1]) for line in lines))
    one, two = (statistics.median(times[k]) for k in (1, 2))
    return {"name": "two processes on two cores, a thread each", "value": one / two, "unit": "ratio", "aim": "1.8x",
            "detail": f"{one:.2f} s with one, {two:.2f} s with two"}  # fmt: skip
