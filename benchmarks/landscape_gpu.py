"""The paper's own figure on one GPU: 51 x 51 points, ResNet-56, 50,000 images 32 x 32 (Li et al.: an hour on four GPUs).

A stand-alone script (it needs an accelerator, so it is no part of ``python -m benchmarks``)::

    PYTHONPATH=src python benchmarks/landscape_gpu.py [--quick] [--limit SECONDS]
    PYTHONPATH=src python benchmarks/landscape_gpu.py --only full --strategy "compiled, channels last, CUDA graph" --store FOLDER

It prints JSON, and writes it to ``$OUT/landscape_gpu.json`` (or here) after each step. Random images: the time does
not depend on what they show. Correctness: nine points against the CPU in float64, for each precision.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import skipscope as ss
from skipscope import reference

GRID = 51
BEGAN = time.perf_counter()


def network(images: torch.Tensor, layers: int) -> torch.nn.Module:
    """Random weights, which do for timing, with the batch-norm statistics of the images."""
    torch.manual_seed(0)
    model = {20: reference.resnet20, 56: reference.resnet56}[layers](in_channels=3).to(images.device)
    model.train()
    with torch.no_grad():
        for part in images[:2000].split(500):
            model(part)
    return model.eval()


def timed(call, *args, **options):
    """The result, and the seconds of the whole call (trying strategies and compiling counted in)."""
    began = time.perf_counter()
    result = call(*args, F.cross_entropy, **options)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - began


def correctness(model, images, labels) -> dict:
    """Largest relative difference of nine points to the CPU in float64, by precision and strategy."""
    truth_model, data = copy.deepcopy(model).cpu().double(), (images[:256], labels[:256])
    truth = ss.landscape(
        truth_model, (data[0].cpu().double(), data[1].cpu()), F.cross_entropy, grid=3, strategy="plain"
    )
    found = {}
    for precision in ("fp32", "tf32", "bf16"):
        for strategy in ("plain", "channels last, CUDA graph") if images.is_cuda else ("plain",):
            surface = ss.landscape(
                model, data, F.cross_entropy, grid=3, precision=precision, strategy=strategy
            )
            error = float((np.abs(surface.values - truth.values) / np.abs(truth.values)).max())
            found[f"{precision}, {surface.provenance.strategy}"] = {
                "error": error,
                "checks": surface.checks.passed,
            }
    return found


def paired(model, images, labels, part: int) -> dict:
    """With and without shortcuts on a random subset, with the difference's interval."""
    twins = {"with": model, "without": ss.ablate(model, inputs=images[:8])}
    pair, seconds = timed(
        ss.paired_landscapes, twins, (images, labels), grid=GRID, precision="bf16", samples=part
    )
    return {
        "images": part,
        "seconds": seconds,
        "shared_weights": pair.shared_weights,
        "strategy": pair.surfaces["without"].provenance.strategy,
        "tried": pair.surfaces["with"].provenance.why,
        "median_stderr_of_value": float(np.nanmedian(pair.surfaces["with"].stderr)),
        "median_stderr_of_difference": float(np.nanmedian(pair.differences["without"].stderr)),
        "checks": {name: check.passed for name, check in pair.checks.items()},
    }


def adaptive(model, images, labels) -> dict:
    """All images, coarse first; the way of evaluating is tried and chosen here, and kept for the full grid."""
    surface, seconds = timed(
        ss.landscape, model, (images, labels), grid=GRID, precision="bf16", tolerance=0.01
    )
    return {
        "seconds": seconds,
        "points": int(surface.computed.sum()),
        "error_on_held_out_over_range": (surface.interpolation_error or 0.0) / float(np.ptp(surface.values)),
        "strategy": surface.provenance.strategy,
        "tried": surface.provenance.why,
        "peak_memory_GiB": torch.cuda.max_memory_allocated() / 2**30 if images.is_cuda else None,
    }


def full(model, images, labels, left: float, strategy: str | None, store: str | None) -> dict:
    """The whole grid on all images; a smaller one, and said so, when the whole is not expected to fit the time."""
    data, found, grid = (images, labels), {}, GRID
    options: dict = {"precision": "bf16", "strategy": strategy or "auto", "store": store}
    if strategy is None:  # another step has chosen it: what will the whole take?
        _, short = timed(ss.landscape, model, data, grid=5, precision="bf16")
        _, longer = timed(ss.landscape, model, data, grid=9, precision="bf16")
        expected = max(longer - short, 1e-6) / (81 - 25) * GRID**2
        found["expected_seconds_of_51x51"] = expected
        grid = GRID if 1.1 * expected < left - short - longer else 15
    surface, seconds = timed(ss.landscape, model, data, grid=grid, **options)
    return found | {
        "grid": grid,
        "seconds": seconds,
        "images_per_second": len(images) * grid**2 / seconds,
        "strategy": surface.provenance.strategy,
        "strategy_error": surface.checks.strategy_error,
        "precision": surface.provenance.dtype,
        "checks": surface.checks.passed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="ResNet-20 and 2,000 images: does it run at all?"
    )
    parser.add_argument("--limit", type=float, default=560.0, help="seconds the whole script may take")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--only", nargs="*", default=None, help="steps: correctness, paired_subset, adaptive, full"
    )
    parser.add_argument(
        "--strategy", default=None, help='of the full grid, e.g. "compiled, channels last, CUDA graph"'
    )
    parser.add_argument(
        "--store", default=None, help="a folder the full grid is kept in, to go on in a second run"
    )
    options = parser.parse_args()
    global GRID
    layers, count, part = (20, 2000, 200) if options.quick else (56, 50_000, 1000)
    if options.device == "cpu":  # to see that the script itself is sound
        GRID, count, part = 7, 300, 64
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 32, 32, generator=generator).to(options.device)
    labels = torch.randint(10, (count,), generator=generator).to(options.device)
    model = network(images, layers)
    out: dict = {
        "device": torch.cuda.get_device_name() if images.is_cuda else "cpu",
        "torch": torch.__version__,
        "network": f"ResNet-{layers}",
        "images": count,
    }
    steps = {
        "correctness": lambda: correctness(model, images, labels),
        "paired_subset": lambda: paired(model, images, labels, part),
        "adaptive": lambda: adaptive(model, images, labels),
        "full": lambda: full(
            model,
            images,
            labels,
            options.limit - (time.perf_counter() - BEGAN),
            options.strategy,
            options.store,
        ),
    }
    if options.only:
        steps = {name: step for name, step in steps.items() if name in options.only}
    for name, step in steps.items():
        try:
            out[name] = step()
        except Exception:  # one step's failure must not cost the others
            out[name] = {"failed": traceback.format_exc()[-3000:]}
        out["seconds_so_far"] = time.perf_counter() - BEGAN
        print(name, json.dumps(out[name], indent=1), flush=True)
        (Path(os.environ.get("OUT", ".")) / "landscape_gpu.json").write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
