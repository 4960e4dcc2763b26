"""Small surfaces in a cold process, against loss-landscapes 3.0.6: each figure is a process of its own, in turn.

Run ``python -m benchmarks.small_grids [grid ...]``; loss-landscapes is not a dependency (see ``benchmarks.landscape``). Timed is
what a user waits for: the package's import and the call; torch, the network and the data are there before.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from typing import Any

NETWORKS = ("resnet20", "gelu_mlp")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("grids", nargs="*", type=int, default=[3, 5, 7, 11, 25])
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--one", nargs=3, metavar=("TOOL", "NETWORK", "GRID"))
    arguments = parser.parse_args()
    if arguments.one:
        tool, name, grid = arguments.one
        print(seconds(tool, name, int(grid)))
        return
    for grid in arguments.grids:
        tools = ("skipscope", "loss_landscapes")
        times = [[measure(tool, arguments.network, grid) for tool in tools] for _ in range(arguments.rounds)]
        ours, theirs = (statistics.median(column) for column in zip(*times))
        ratios = sorted(b / a for a, b in times)
        print(
            f"{arguments.network} {grid:2} x {grid:2}: {ours:6.2f} s against {theirs:6.2f} s, ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
