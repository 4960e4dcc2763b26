"""Small surfaces in a cold process, against loss-landscapes 3.0.6: each figure is a process of its own, in turn.

Run ``python -m benchmarks.small_grids [grid ...]`` for other grids; loss-landscapes is not a dependency (see ``benchmarks.landscape``). Timed is
what a user waits for: the package's import and the call; torch, the network and the data are there before.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

NETWORKS, TOOLS = ("resnet20", "gelu_mlp"), ("skipscope", "loss_landscapes")
AIMS = {
    ("resnet20", 3): 1.0, ("resnet20", 5): 1.5, ("resnet20", 7): 2.0, ("resnet20", 11): 3.0, ("resnet20", 25): 4.0,
    ("gelu_mlp", 11): 1.2,
}  # fmt: skip
ROUNDS = 3


def network(name: str) -> tuple[Any, Any]:
    """A network and a batch, by torch alone: nothing of skipscope is loaded when the clock starts."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    if name == "gelu_mlp":
        # That of benchmarks.landscape.
        layers = [module for n in (64, *[256] * 4) for module in (nn.Linear(n, 256), nn.GELU())]
        return nn.Sequential(*layers, nn.Linear(256, 10)).eval(), (
            torch.rand(1797, 64),
            torch.randint(10, (1797,)),
        )

    class Block(nn.Module):
        def __init__(self, i: int, o: int, stride: int):
            super().__init__()
            self.a, self.b = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.Conv2d(o, o, 3, 1, 1, bias=False)
            self.n, self.m = nn.BatchNorm2d(o), nn.BatchNorm2d(o)
            self.short = nn.Identity() if i == o else nn.Conv2d(i, o, 1, stride, bias=False)

        def forward(self, x: Any) -> Any:
            return torch.relu(self.short(x) + self.m(self.b(torch.relu(self.n(self.a(x))))))

    blocks, width = [], 16
    for o in (16, 32, 64):
        for k in range(3):
            blocks.append(Block(width, o, 2 if k == 0 and o != 16 else 1))
            width = o
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    model = nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    data = torch.randn(512, 3, 32, 32), torch.randint(10, (512,))
    with torch.no_grad():
        model.train()(data[0])
    return model.eval(), data


def seconds(tool: str, name: str, grid: int) -> float:
    """One cold call, in this process."""
    import torch
    from torch import nn

    model, (x, y) = network(name)
    with torch.no_grad():  # loss-landscapes divides by the norm of every filter, zero biases too
        for p in model.parameters():
            if p.ndim < 2 and not p.any():
                p.normal_(std=1e-3)
    began = time.perf_counter()
    if tool == "skipscope":
        import skipscope as ss

        ss.landscape(model, (x, y), nn.functional.cross_entropy, grid=grid)
    else:
        import loss_landscapes
        from loss_landscapes.metrics import Loss

        with torch.no_grad():
            metric = Loss(nn.CrossEntropyLoss(), x, y)
            loss_landscapes.random_plane(model, metric, 1.0, grid, "filter", deepcopy_model=True)
    return time.perf_counter() - began


def measure(tool: str, name: str, grid: int) -> float:
    command = [sys.executable, "-m", "benchmarks.small_grids", "--one", tool, name, str(grid)]
    path = os.pathsep.join(p for p in (os.environ.get("PYTHONPATH"), os.environ.get("LOSS_LANDSCAPES")) if p)
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    if run.returncode:
        raise SystemExit(run.stderr)
    return float(run.stdout)


@contextlib.contextmanager
def busy(is_busy: bool) -> Iterator[None]:
    """Inside, another process keeps one core busy, where that is asked for."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if is_busy else None
    try:
        yield
    finally:
        if other is not None:
            other.kill()
            other.wait()


def compared(name: str, grid: int, rounds: int, is_busy: bool = False) -> dict:
    """One figure: how many times faster than loss-landscapes, both in turn."""
    with busy(is_busy):
        times = [[measure(tool, name, grid) for tool in TOOLS] for _ in range(rounds)]
    ours, theirs = (statistics.median(column) for column in zip(*times))
    ratios = sorted(b / a for a, b in times)
    words = f"{name}, {grid} x {grid}, cold" + ", one core busy" * is_busy
    aim = f">= {AIMS[name, grid]}" if (name, grid) in AIMS else ""
    detail = f"{ours:.2f} s against {theirs:.2f} s; {rounds} rounds, {ratios[0]:.2f} to {ratios[-1]:.2f}"
    return {"name": words, "value": statistics.median(ratios), "unit": "ratio", "aim": aim, "detail": detail}


def figures() -> list[dict]:
    """Without the two largest grids, whose points alone take many minutes: name them on the command line."""
    found = []
    for is_busy in (False, True):
        found += [compared("resnet20", grid, ROUNDS, is_busy) for grid in (3, 5, 7)]
        found.append(compared("gelu_mlp", 11, ROUNDS, is_busy))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("grids", nargs="*", type=int, default=[3, 5, 7, 11, 25])
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--busy", action="store_true", help="another process keeps one core busy")
    parser.add_argument("--one", nargs=3, metavar=("TOOL", "NETWORK", "GRID"))
    arguments = parser.parse_args()
    if arguments.one:
        tool, name, grid = arguments.one
        print(seconds(tool, name, int(grid)))
        return
    for grid in arguments.grids:
        found = compared(arguments.network, grid, arguments.rounds, arguments.busy)
        print(f"{found['name']}: {found['value']:.2f} ({found['detail']})", flush=True)


if __name__ == "__main__":
    main()
