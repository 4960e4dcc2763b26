"""What finding shortcuts costs, against one forward and backward pass of the same model, and against TorchLens's trace.

TorchLens is not a dependency: ``python -m pip install torchlens`` (or name the folders that it and what it needs are
in: ``TORCHLENS=...``); without it its rows are left out. It wraps torch's functions for good, so it runs in a process of
its own: this file, called with the model's place in the list. What is timed there is ``trace(model, x)``, and the same
with ``save=None``, which keeps no activations; what both give is the graph, in which shortcuts are still to be looked
for.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from skipscope.shortcuts import find_shortcuts


def models() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]]:
    return {
        "ResNet-18-like, 8 x 3 x 64 x 64": (_ResNet18, lambda: torch.randn(8, 3, 64, 64)),
        "GPT-2-like (12 layers of width 256), 4 x 128 tokens": (
            _gpt2,
            lambda: torch.randint(0, 512, (4, 128)),
        ),
    }


class _Block(nn.Module):
    def __init__(self, i: int, o: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        changes = stride != 1 or i != o
        self.down = (
            nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))
            if changes
            else nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.down(x)
        return self.relu(out)


class _ResNet18(nn.Sequential):
    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512)):
        layers: list[nn.Module] = [
            nn.Conv2d(3, widths[0], 7, 2, 3, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(True),
        ]
        layers.append(nn.MaxPool2d(3, 2, 1))
        before = widths[0]
        for k, width in enumerate(widths):
            layers += [_Block(before, width, 2 if k else 1), _Block(width, width, 1)]
            before = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


class _GPTBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = (p.view(b, t, c // 32, 32).transpose(1, 2) for p in self.qkv(self.ln1(x)).split(c, 2))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(self.ln2(x))


class _GPT(nn.Module):
    def __init__(self, layers: int, width: int):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(512, width), nn.Embedding(1024, width)
        self.h = nn.Sequential(*[_GPTBlock(width) for _ in range(layers)])
        self.head = nn.Linear(width, 512)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.h(self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))))


def _gpt2() -> nn.Module:
    return _GPT(12, 256)


class _Bottleneck(nn.Module):
    def __init__(self, width: int = 64):
        super().__init__()
        sizes = ((width, 16, 1), (16, 16, 3), (16, width, 1))
        self.body = nn.Sequential(
            *[
                m
                for i, o, k in sizes
                for m in (nn.BatchNorm2d(i), nn.ReLU(), nn.Conv2d(i, o, k, 1, k // 2, bias=False))
            ]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class _Recurrence(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.inp, self.rec, self.out = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, states = x[:, 0], []
        for t in range(x.shape[1]):
            h = h + torch.tanh(self.inp(x[:, t]) + self.rec(h))
            states.append(h)
        return self.out(torch.stack(states, 1))


def deep_models() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]]:
    """Graphs of ten to twenty thousand nodes."""
    return {
        "333 bottlenecks (ResNet-1001-like), 4 x 3 x 32 x 32": (
            lambda: nn.Sequential(nn.Conv2d(3, 64, 3), *[_Bottleneck() for _ in range(333)]),
            lambda: torch.randn(4, 3, 32, 32),
        ),
        "a GPT of 200 layers of width 64, 4 x 128 tokens": (
            lambda: _GPT(200, 64),
            lambda: torch.randint(0, 512, (4, 128)),
        ),
        "a residual recurrence of 2,000 steps of width 256, batch 32": (
            lambda: _Recurrence(256),
            lambda: torch.randn(32, 2000, 256),
        ),
    }


def interleaved(runs: dict[str, Callable[[], object]], repeats: int = 9) -> dict[str, float]:
    """Median seconds of each, taken in turn so that a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def trace_seconds(k: int) -> dict[str, float]:
    """Median seconds of TorchLens's traces of the k-th model, in a process of its own; none where it cannot be had."""
    done = subprocess.run(
        [sys.executable, __file__, str(k)], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    if done.returncode:
        print(f"  no rows for TorchLens: {done.stderr.strip().splitlines()[-1][:100]}")
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def _trace_here(k: int, repeats: int = 5) -> dict[str, float]:
    sys.path += os.environ.get("TORCHLENS", "").split(os.pathsep)
    import torchlens  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    make, data = list(models().values())[k]
    model, x = make(), data()
    runs = {
        "as it comes": lambda: torchlens.trace(model, x),
        "keeping nothing": lambda: torchlens.trace(model, x, save=None),
    }
    return interleaved(runs, repeats)


def figures() -> list[dict]:
    rows = []
    for k, (label, (make, data)) in enumerate((models() | deep_models()).items()):
        torch.manual_seed(0)
        model, x = make(), data()

        def step(model=model, x=x):
            model.zero_grad()
            model(x).float().square().mean().backward()

        repeats = 9 if label in models() else 3
        runs = {
            "step": step,
            "forward": lambda model=model, x=x: model(x),
            "find": lambda model=model, x=x: find_shortcuts(model, x),
        }
        times = interleaved(runs, repeats)
        found = len(find_shortcuts(model, x))
        rows.append({
            "name": f"find: {label}", "value": times["find"] / times["step"], "unit": "of one forward + backward",
            "aim": "<= 1.5", "detail": {**times, "shortcuts": found},
        })  # fmt: skip
        for way, trace in trace_seconds(k).items() if label in models() else ():
            beyond = (trace - times["forward"]) / (times["find"] - times["forward"])
            rows.append({
                "name": f"TorchLens's trace, {way}: {label}", "value": trace / times["find"],
                "unit": "times as long as find", "aim": ">= 40" if way == "as it comes" else "",
                "detail": {"trace": trace, **times, "without the forward pass that both run": beyond},
            })  # fmt: skip
    return rows


if __name__ == "__main__":
    print(json.dumps(_trace_here(int(sys.argv[1]))))
