"""How much memory is free on a device, and which part of it may be used."""

from __future__ import annotations

from pathlib import Path

import torch

SHARE = 0.8  # of what is free may be used


def free_bytes(device: torch.device) -> float:
    """Free memory on a device; infinite where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")
