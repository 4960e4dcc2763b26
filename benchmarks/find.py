"""What finding shortcuts costs, against one forward and backward pass of the same model, and against TorchLens's trace.

TorchLens is not a dependency: ``python -m pip install --no-deps torchlens`` (or name the folder it is in:
``TORCHLENS=...``); without it its rows are left out. It wraps torch's functions for good, so it runs in a process of
its own: this file, called with the model's place in the list. What is timed there is ``trace(model, x, save="none")``,
which keeps no activations; what it gives is the graph, in which shortcuts are still to be looked for.
"""

from __future__ import annotations

import importlib.util
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


def _has_torchlens() -> bool:
    folder = os.environ.get("TORCHLENS", "")
    return importlib.util.find_spec("torchlens") is not None or (Path(folder) / "torchlens").is_dir()


def trace_seconds(k: int) -> float:
    """Median seconds of TorchLens's trace of the k-th model, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, str(k)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    return float(done.stdout.splitlines()[-1])


def _trace_here(k: int, repeats: int = 5) -> float:
    sys.path.append(os.environ.get("TORCHLENS", ""))
    import torchlens  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    make, data = list(models().values())[k]
    model, x = make(), data()
    runs = {"trace": lambda: torchlens.trace(model, x, save="none")}
    return interleaved(runs, repeats)["trace"]


def figures() -> list[dict]:
    rows = []
    for k, (label, (make, data)) in enumerate(models().items()):
        torch.manual_seed(0)
        model, x = make(), data()

        def step(model=model, x=x):
            model.zero_grad()
            model(x).float().square().mean().backward()

        times = interleaved({"step": step, "find": lambda model=model, x=x: find_shortcuts(model, x)})
        found = len(find_shortcuts(model, x))
        rows.append({
            "name": f"find: {label}", "value": times["find"] / times["step"], "unit": "of one forward + backward",
            "aim": "<= 1.5", "detail": {**times, "shortcuts": found},
        })  # fmt: skip
        if _has_torchlens():
            trace = trace_seconds(k)
            rows.append({
                "name": f"TorchLens's trace: {label}", "value": trace / times["find"], "unit": "times as long as find",
                "aim": ">= 40", "detail": {"trace": trace, "find": times["find"]},
            })  # fmt: skip
    return rows


if __name__ == "__main__":
    print(_trace_here(int(sys.argv[1])))
