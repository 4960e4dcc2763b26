"""What curvature holds in memory at its peak, against what it says beforehand: one process a size.

Run ``python -m benchmarks.curvature_memory [millions of parameters ...]``; 125 needs ``--basis 8`` on a machine of 24 GB.
Peak: the resident set's high-water mark, less the resident set before the call (the model and its data are in both).
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import skipscope as ss

CALLS = ("extreme_eigenvalues", "spectral_density", "curvature_trace")


def resident(key: str) -> float:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most since :func:`forget_the_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024.0 * int(re.search(rf"{key}:\s+(\d+)", status)[1])  # type: ignore[index]


def forget_the_peak() -> None:
    """Let ``VmHWM`` begin again."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(call: str, millions: float, basis: int | None, products: int) -> str:
    """One call's peak over what its vectors take, as a line of a table."""
    width = int((millions * 1e6 / 2) ** 0.5)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
    data, size = (torch.randn(4, width), torch.randn(4, width)), sum(p.numel() for p in model.parameters())
    options = {
        "extreme_eigenvalues": {"max_products": products, "basis": basis},
        "spectral_density": {"steps": 28 if basis is None else basis, "probes": 2},
        "curvature_trace": {"products": products},
    }[call]
    small = nn.Linear(2, 2)  # what the first call of a process loads is not what a size costs
    getattr(ss, call)(small, (torch.randn(4, 2), torch.randn(4, 2)), nn.functional.mse_loss)
    before, said = resident("VmRSS"), io.StringIO()
    forget_the_peak()
    with ss.progress(file=said):
        getattr(ss, call)(model, data, nn.functional.mse_loss, **options)
    peak = resident("VmHWM") - before
    found = re.search(r"(\d+) vectors, at most ([\d.e+]+) GiB", said.getvalue())
    count, gib = (int(found[1]), float(found[2])) if found else (0, float("nan"))
    rows = peak / (8 * size)
    of_basis = f"{rows / count:.2f} of {count} vectors" if count else ""
    return f"{call:20} {size / 1e6:7.1f} M  peak {peak / 2**30:6.2f} GiB = {rows:5.1f} float64 copies, {of_basis}; said {gib} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("millions", nargs="*", type=float, default=[4, 20])
    parser.add_argument("--basis", type=int)
    parser.add_argument("--products", type=int, default=40)
    parser.add_argument("--call", choices=CALLS, help="in this process, and for the first size alone")
    arguments = parser.parse_args()
    if arguments.call:
        print(measure(arguments.call, arguments.millions[0], arguments.basis, arguments.products))
        return
    for millions in arguments.millions:
        for call in CALLS:
            command = [sys.executable, "-m", "benchmarks.curvature_memory", str(millions), "--call", call]
            command += ["--products", str(arguments.products)]
            command += ["--basis", str(arguments.basis)] if arguments.basis else []
            subprocess.run(command, check=False)


if __name__ == "__main__":
    main()
