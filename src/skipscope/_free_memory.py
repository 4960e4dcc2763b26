"""Free memory of a device, and the share of it that may be used."""

from __future__ import annotations

from pathlib import Path

import torch

# Share of the free memory that may be used.
SHARE = 0.8


def free_bytes(device: torch.device) -> float:
    """Free memory on a device in bytes; infinite if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")
