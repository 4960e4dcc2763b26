"""What an edited twin costs, against the unedited model: one forward and backward pass, eager and compiled."""

from __future__ import annotations

import torch

from benchmarks.find import interleaved, models
from skipscope.shortcuts import ablate, find_shortcuts

EDITS = {"remove": {}, "detach": {"how": "detach"}, "strength 0.5": {"strength": 0.5}}


def figures() -> list[dict]:
    rows = []
    for label, (make, data) in models().items():
        torch.manual_seed(0)
        model, x = make(), data()
        found = find_shortcuts(model, x)
        twins = {"as built": model} | {name: ablate(model, found, **edit) for name, edit in EDITS.items()}
        for way in ("eager", "compiled"):
            ready = {
                name: torch.compile(twin, fullgraph=True) if way == "compiled" else twin
                for name, twin in twins.items()
            }

            def runner(twin, x=x):
                def run():
                    twin.zero_grad()
                    twin(x).float().square().mean().backward()

                return run

            times = interleaved({name: runner(twin) for name, twin in ready.items()}, repeats=9)
            for name in EDITS:
                rows.append({
                    "name": f"{way}, {name}: {label}", "value": times[name] / times["as built"],
                    "unit": "of the unedited model", "aim": "<= 1.05", "detail": times,
                })  # fmt: skip
            torch._dynamo.reset()
    return rows
