"""What curvature holds in memory at its peak, against what it says beforehand: one process a size.

Run ``python -m benchmarks.curvature_memory [millions of parameters ...]``; 125 needs ``--basis 8`` on a machine of 24 GB.
Peak: the resident set's high-water mark, less the resident set before the call (the model and its data are in both).
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import skipscope as ss

PRODUCTS = 40
CALLS = ("extreme_eigenvalues", "spectral_density", "curvature_trace")


def resident(key: str) -> float:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most since :func:`forget_the_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024.0 * int(re.search(rf"{key}:\s+(\d+)", status)[1])  # type: ignore[index]


def forget_the_peak() -> None:
    """Let ``VmHWM`` begin again."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(call: str, millions: float, basis: int | None, products: int) -> dict:
    """One call's peak over what its vectors take, as a figure."""
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
    copies = peak / (8 * size)
    of_basis = f", {copies / count:.2f} of its {count} vectors" if count else ""
    return {
        "name": f"{call}, {size / 1e6:.0f} M parameters: peak", "value": copies, "unit": "float64 copies of them",
        "aim": "", "detail": f"{peak / 2**30:.2f} GiB{of_basis}; said beforehand: at most {gib} GiB",
    }  # fmt: skip


def measured(millions: float, products: int, basis: int | None = None) -> Iterator[dict]:
    """The figures of one size, each from a process of its own; none of a call that is refused."""
    for call in CALLS:
        command = [sys.executable, "-m", "benchmarks.curvature_memory", str(millions), "--call", call]
        command += ["--products", str(products), *(["--basis", str(basis)] if basis else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(
                f"{call}, {millions:g} M parameters: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr
            )
        else:
            yield json.loads(done.stdout)


def figures() -> list[dict]:
    """4 and 20 million parameters."""
    return [figure for millions in (4.0, 20.0) for figure in measured(millions, PRODUCTS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("millions", nargs="*", type=float, default=[4, 20])
    parser.add_argument("--basis", type=int)
    parser.add_argument("--products", type=int, default=PRODUCTS)
    parser.add_argument("--call", choices=CALLS, help="in this process, and for the first size alone")
    arguments = parser.parse_args()
    if arguments.call:
        print(json.dumps(measure(arguments.call, arguments.millions[0], arguments.basis, arguments.products)))
        return
    for millions in arguments.millions:
        for found in measured(millions, arguments.products, arguments.basis):
            print(f"{found['name']} {found['value']:.1f} {found['unit']} ({found['detail']})", flush=True)


if __name__ == "__main__":
    main()
