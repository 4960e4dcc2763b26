"""The paper's own figure on one GPU: 51 x 51 points, ResNet-56, 50,000 images of 32 x 32 (Li et al.: an hour on four GPUs).

A stand-alone script (it needs an accelerator, so it is no part of ``python -m benchmarks``)::

    PYTHONPATH=src python benchmarks/landscape_gpu.py [--quick] [--limit SECONDS]

It prints JSON, and writes it to ``$OUT/landscape_gpu.json`` (or here). Random images: the time does not depend on what
they show. Correctness: nine points against the CPU in float64, for each precision.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import skipscope as ss
from skipscope import reference

GRID = 51


def trained_like(images: torch.Tensor, layers: int) -> torch.nn.Module:
    """A network with real batch-norm statistics and moderate outputs; random weights do for timing."""
    torch.manual_seed(0)
    model = {20: reference.resnet20, 56: reference.resnet56}[layers](in_channels=3).to(images.device)
    model.train()
    with torch.no_grad():
        for part in images[:2000].split(500):
            model(part)
    return model.eval()


def correctness(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Largest relative difference of nine points to the CPU in float64, by precision."""
    truth_model = copy.deepcopy(model).cpu().double()
    truth = ss.landscape(
        truth_model, (images.cpu().double(), labels.cpu()), F.cross_entropy, grid=3, strategy="plain"
    )
    found = {}
    for precision in ("fp32", "tf32", "bf16"):
        for strategy in ("plain", "replayed None"):
            surface = ss.landscape(
                model, (images, labels), F.cross_entropy, grid=3, precision=precision, strategy=strategy
            )
            error = np.abs(surface.values - truth.values) / np.abs(truth.values)
            found[f"{precision}, {surface.provenance.strategy}"] = float(error.max())
            assert surface.checks.passed, surface.checks
    return found


def timed(call, *args, **options):
    torch.cuda.synchronize()
    began = time.perf_counter()
    result = call(*args, **options)
    torch.cuda.synchronize()
    return result, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--quick", action="store_true", help="ResNet-20 and 4,000 images: does it run at all?"
    )
    parser.add_argument(
        "--limit", type=float, default=430.0, help="seconds the full grid may be expected to take"
    )
    options = parser.parse_args()
    layers, count, part = (20, 4000, 1000) if options.quick else (56, 50_000, 5000)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 32, 32, generator=generator).cuda()
    labels = torch.randint(10, (count,), generator=generator).cuda()
    model = trained_like(images, layers)
    out: dict = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "network": f"ResNet-{layers}",
        "images": count,
        "correctness": correctness(model, images[:256], labels[:256]),
    }
    keep(out)

    out["full"] = full(model, images, labels, options.limit)
    keep(out)
    out["paired_subset"] = paired(model, images, labels, part)
    keep(out)
    print(json.dumps(out, indent=1))


def full(model, images, labels, limit: float) -> dict:
    """The whole grid on all images, in bf16; the way is chosen on a small grid first."""
    data = (images, labels)
    small, seconds = timed(ss.landscape, model, data, F.cross_entropy, grid=21, precision="bf16")
    print(f"21 x 21: {seconds:.1f} s; {small.provenance.strategy}\n  {small.provenance.why}", flush=True)
    _, pure = timed(ss.landscape, model, data, F.cross_entropy, grid=7, precision="bf16")
    found = {
        "strategy": small.provenance.strategy,
        "tried": small.provenance.why,
        "seconds_21x21_with_the_choice": seconds,
        "seconds_7x7_after_it": pure,
    }
    point = max((seconds - pure) / (21**2 - 7**2), 1e-6)
    found["expected_seconds_51x51"] = point * GRID**2
    grid = GRID if found["expected_seconds_51x51"] <= limit else 21
    surface, seconds = timed(ss.landscape, model, data, F.cross_entropy, grid=grid, precision="bf16")
    adaptive, adaptive_seconds = timed(
        ss.landscape, model, data, F.cross_entropy, grid=GRID, precision="bf16", tolerance=0.01
    )
    return found | {
        "grid": grid,
        "seconds": seconds,
        "images_per_second": len(images) * grid**2 / seconds,
        "checks_passed": surface.checks.passed,
        "strategy_error": surface.checks.strategy_error,
        "precision": surface.provenance.dtype,
        "adaptive_seconds": adaptive_seconds,
        "adaptive_points": int(adaptive.computed.sum()),
        "adaptive_error_on_held_out_over_range": (adaptive.interpolation_error or 0.0)
        / float(np.ptp(adaptive.values)),
    }


def paired(model, images, labels, part: int) -> dict:
    """With and without shortcuts on a random subset, with the difference's interval."""
    plain = ss.ablate(model, inputs=images[:8])
    twins = {"with": model, "without": plain}
    pair, seconds = timed(
        ss.paired_landscapes,
        twins,
        (images, labels),
        F.cross_entropy,
        grid=GRID,
        precision="bf16",
        samples=part,
    )
    difference = pair.differences["without"]
    return {
        "images": part,
        "seconds": seconds,
        "shared_weights": pair.shared_weights,
        "strategy": pair.surfaces["without"].provenance.strategy,
        "tried": pair.surfaces["with"].provenance.why,
        "median_stderr_of_value": float(np.nanmedian(pair.surfaces["with"].stderr)),
        "median_stderr_of_difference": float(np.nanmedian(difference.stderr)),
        "checks_passed": all(check.passed for check in pair.checks.values()),
    }


def keep(out: dict) -> None:
    """Written after each step, so that a run that is cut short leaves what it had."""
    (Path(os.environ.get("OUT", ".")) / "landscape_gpu.json").write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
