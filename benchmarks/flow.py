"""What a measurement of the flow costs, against one forward and backward pass of the same model."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

import skipscope as ss


def figures() -> list[dict]:
    rows = []
    for name, model, batch in _cases():
        plain, flow, split, taken = _interleaved(model, batch)
        rows += [
            {
                "name": f"gradient_flow, {name}", "value": flow / plain, "unit": "ratio", "aim": "",
                "detail": f"{flow * 1e3:.0f} ms with the shortcuts known; one forward + backward {plain * 1e3:.0f} ms",
            },
            {
                "name": f"gradient_flow that finds the shortcuts too, {name}", "value": taken / plain, "unit": "ratio",
                "aim": "", "detail": f"{taken * 1e3:.0f} ms",
            },
            {
                "name": f"gradient_split, {name}", "value": split / plain, "unit": "ratio", "aim": "",
                "detail": f"{split * 1e3:.0f} ms with the shortcuts known: one backward pass for all merges",
            },
        ]  # fmt: skip
    return rows


def _cases():
    torch.manual_seed(0)
    yield (
        "MLP of 30 layers, width 64, batch 256",
        ss.reference.deep_mlp(30, shortcut="identity"),
        ss.reference.digits(256),
    )
    yield "ResNet-20, batch 32 of 8 x 8", ss.reference.resnet20(), ss.reference.digits(32)
    images = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    yield "ResNet-20, batch 64 of 32 x 32", ss.reference.resnet20(in_channels=3), images
    yield "GPT, batch 16", ss.reference.gpt(), ss.reference.english(16)


def _interleaved(model: nn.Module, batch, repeats: int = 5) -> tuple[float, ...]:
    loss, times = nn.functional.cross_entropy, {"plain": [], "flow": [], "split": [], "all": []}
    found = ss.find_shortcuts(model, batch[0])

    def plain():
        loss(model(batch[0]), batch[1]).backward()
        model.zero_grad()

    work = {
        "plain": plain,
        "flow": lambda: ss.gradient_flow(model, batch, loss, found=found),
        "split": lambda: ss.gradient_split(model, batch, loss, found=found),
        "all": lambda: ss.gradient_flow(model, batch, loss),
    }
    for _ in range(repeats):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return tuple(statistics.median(times[name]) for name in work)
