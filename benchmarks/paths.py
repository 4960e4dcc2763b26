"""The exact path spectrum against plain backward passes: 54 branches, 55 lengths."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

import skipscope as ss

LENGTHS = 55


def figures() -> list[dict]:
    rows = []
    for name, model, batch in _cases():
        spectrum, plain, method = _interleaved(model, batch)
        rows.append({
            "name": f"path spectrum, {name}", "value": spectrum / plain / LENGTHS, "unit": "ratio", "aim": "<= 1",
            "detail": f"{spectrum * 1e3:.0f} ms for all 55 lengths, {method}, finding the shortcuts included; one plain "
            f"backward pass {plain * 1e3:.1f} ms, 55 of them {plain * LENGTHS * 1e3:.0f} ms",
        })  # fmt: skip
    return rows


def _cases():
    torch.manual_seed(0)
    for n in (32, 256):
        model = ss.reference.deep_mlp(54, 64, shortcut="identity")
        yield f"MLP of width 64, batch {n}", model, ss.reference.digits(n)
    yield "ResNet-110, batch 32", ss.reference.resnet110(), ss.reference.digits(32)


def _interleaved(model: nn.Module, batch, repeats: int = 5) -> tuple[float, float, str]:
    loss = nn.functional.cross_entropy
    assert len(ss.find_shortcuts(model, batch[0])) == LENGTHS - 1
    spectra, plains, method = [], [], ""
    for _ in range(repeats):
        start = time.perf_counter()
        method = ss.path_spectrum(model, batch, loss).method
        spectra.append(time.perf_counter() - start)
        for _ in range(5):
            value = loss(model(batch[0]), batch[1])
            start = time.perf_counter()
            value.backward()
            plains.append(time.perf_counter() - start)
            model.zero_grad()
    return statistics.median(spectra), statistics.median(plains), method
