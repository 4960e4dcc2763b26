"""Run benchmarks: ``python -m benchmarks [NAME ...]``; each prints its figures and keeps them as JSON.

A benchmark is a module of this folder with ``figures() -> list[dict]``; a figure has ``name``, ``value``, ``unit``,
``aim`` and ``detail``. Ratios are taken in one run, the things compared in turn, and medians are quoted.
"""

import argparse
import importlib
import json
import os
import pkgutil
import platform
import time
from pathlib import Path

import torch

import benchmarks
import skipscope

RESULTS = Path(__file__).parent / "results"


def machine() -> dict:
    cpu = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "skipscope": skipscope.__version__, "system": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": os.getloadavg()[0],
    }  # fmt: skip


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def runnable() -> list[str]:
    """The benchmarks for this machine. Other modules of the folder are run by themselves: they say how."""
    names = [m.name for m in pkgutil.iter_modules(benchmarks.__path__) if not m.name.endswith("_gpu")]
    return [n for n in names if "\ndef figures(" in (Path(__file__).parent / f"{n}.py").read_text()]


def main() -> None:
    names = runnable()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *names], help=", ".join(names), metavar="NAME")
    chosen = parser.parse_args().names or names
    for name in chosen:
        before, start = machine(), time.perf_counter()
        figures = importlib.import_module(f"benchmarks.{name}").figures()
        print(f"\n{name} ({time.perf_counter() - start:.0f} s)")
        for f in figures:
            value = f"{f['value']:.3g}" if isinstance(f["value"], float) else str(f["value"])
            aim = f"  (aim: {f['aim']})" if f.get("aim") else ""
            print(f"  {f['name']:<58} {value:>9} {f.get('unit', '')}{aim}")
        RESULTS.mkdir(exist_ok=True)
        content = {
            "benchmark": name,
            "date": time.strftime("%Y-%m-%d"),
            "machine": before,
            "figures": figures,
        }
        (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
