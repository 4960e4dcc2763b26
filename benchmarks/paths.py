"""The path analyses against plain backward passes: the spectrum for L branches and batches, the split, importance."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

import skipscope as ss

LOSS = nn.functional.cross_entropy
WIDTH, WIDE = 64, 256


def figures() -> list[dict]:
    return [*_spectra(), *_memory(), *_splits()]


def _spectra() -> list[dict]:
    rows = []
    for name, model, batch in _cases():
        found = ss.find_shortcuts(model, batch[0])
        method = ss.path_spectrum(model, batch, LOSS, found=found).method
        spectrum, plain = _interleaved(
            model,
            batch,
            lambda model=model, batch=batch, found=found: ss.path_spectrum(model, batch, LOSS, found=found),
        )
        lengths = len(found) + 1
        rows.append({
            "name": f"path spectrum, {name}", "value": spectrum / plain / lengths, "unit": "ratio", "aim": "<= 1",
            "detail": f"{spectrum * 1e3:.0f} ms for all {lengths} lengths, {method}, with the plain gradient that they are checked "
            f"against; one plain backward pass {plain * 1e3:.2f} ms, {lengths} of them {plain * lengths * 1e3:.0f} ms",
        })  # fmt: skip
    return rows


def _cases():
    torch.manual_seed(0)
    for depth in (8, 20, 54, 110):
        for n in (32, 256):
            model = ss.reference.deep_mlp(depth, WIDTH, shortcut="identity")
            yield f"MLP, L = {depth}, batch {n}", model, ss.reference.digits(n)
    yield "ResNet-20, batch 32", ss.reference.resnet20(), ss.reference.digits(32)
    yield "ResNet-110, batch 32", ss.reference.resnet110(), ss.reference.digits(32)


def _interleaved(
    model: nn.Module, batch, call: Callable[[], object], repeats: int = 5
) -> tuple[float, float]:
    """Median seconds of a call, and of one plain backward pass."""
    calls, plains = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        calls.append(time.perf_counter() - start)
        for _ in range(5):
            value = LOSS(model(batch[0]), batch[1])
            start = time.perf_counter()
            value.backward()
            plains.append(time.perf_counter() - start)
            model.zero_grad()
    return statistics.median(calls), statistics.median(plains)


# --- memory, each in a process of its own ---


def _memory() -> list[dict]:
    rows = []
    for depth in (20, 54, 110):
        plain, spectrum = _peak("plain", depth), _peak("spectrum", depth)
        one = 512 * WIDE * 4 / 2**20
        rows.append({
            "name": f"path spectrum, peak memory above a plain backward, L = {depth}", "value": spectrum - plain, "unit": "MB",
            "detail": f"MLP of width {WIDE}, batch 512: the gradients of {depth + 1} lengths at two cuts are "
            f"{2 * (depth + 1) * one:.0f} MB, and at most 64 MB pass a segment at once; the whole process: {spectrum:.0f} MB, with "
            f"a plain backward pass {plain:.0f} MB",
        })  # fmt: skip
    return rows


def _peak(what: str, depth: int) -> float:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.paths", what, str(depth)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(run.stdout)


def _measure(what: str, depth: int) -> float:
    """This process's greatest size in MB after one spectrum, or one plain backward pass."""
    torch.set_num_threads(1)
    model = ss.reference.deep_mlp(depth, WIDE, inputs=WIDE, classes=10, shortcut="identity")
    batch = torch.randn(512, WIDE), torch.randint(10, (512,))
    found = ss.find_shortcuts(model, batch[0][:2])
    if what == "plain":
        LOSS(model(batch[0].requires_grad_()), batch[1]).backward()
    else:
        ss.path_spectrum(model, batch, LOSS, found=found, max_bytes=2**26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- the split and importance ---


def _splits() -> list[dict]:
    rows = []
    for name, model, batch in (
        (
            "MLP, L = 54, batch 256",
            ss.reference.deep_mlp(54, WIDTH, shortcut="identity"),
            ss.reference.digits(256),
        ),
        ("ResNet-20, batch 32", ss.reference.resnet20(), ss.reference.digits(32)),
    ):
        found = ss.find_shortcuts(model, batch[0])
        whole = _forward_and_backward(model, batch)
        split, _ = _interleaved(
            model,
            batch,
            lambda model=model, batch=batch, found=found: ss.gradient_split(model, batch, LOSS, found=found),
        )
        start = time.perf_counter()
        ss.importance(model, batch, LOSS, found=found)
        edits, spent = 2 * len(found), time.perf_counter() - start
        rows += [
            {"name": f"gradient split, {name}", "value": split / whole, "unit": "ratio",
             "detail": f"{split * 1e3:.1f} ms for {len(found)} forks; one forward and backward pass {whole * 1e3:.1f} ms"},
            {"name": f"importance, {name}", "value": spent / edits / whole, "unit": "ratio",
             "detail": f"{spent:.1f} s for {edits} edits, each against one forward and backward pass of {whole * 1e3:.1f} ms"},
        ]  # fmt: skip
    return rows


def _forward_and_backward(model: nn.Module, batch) -> float:
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        LOSS(model(batch[0]), batch[1]).backward()
        seconds.append(time.perf_counter() - start)
        model.zero_grad()
    return statistics.median(seconds)


if __name__ == "__main__":
    print(_measure(sys.argv[1], int(sys.argv[2])))
