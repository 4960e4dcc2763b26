"""Break random lines of the core, one at a time, in a copy of the tree, and see whether a test of its folder fails.

``make mutate`` runs it. The mutations are those of cosmic-ray. A mutant is killed when a test fails or the run takes
much longer than it did; those that survive are printed as diffs, to be looked at one by one.

    python .ci/mutate.py --count 300 --seed 0 [--only src/skipscope/flow]
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome

CORE = ("flow", "shortcuts", "curvature", "surfaces", "monitor", "comparison", "nn")
# Neither changes what a program does: annotations, and the text of a message.
LEFT_OUT = ("core/VariableReplacer", "core/VariableInserter", "core/ReplaceBinaryOperator_BitOr")


def main() -> None:
    """Draw mutants, try them, print the share that was killed and every survivor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose path begins so")
    parser.add_argument("--jobs", type=int, default=2, help="processes of a test run")
    parser.add_argument("--json", type=Path, help="also write what came of each")
    given = parser.parse_args()
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(
            root, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", ".hypothesis", "*.zarr")
        )
        os.chdir(copy)
        os.environ |= {"PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
        # Nothing is written beside the sources later: a mutant as long as what it replaces is compiled all the same.
        compileall.compile_dir("src", quiet=1)
        report = [_try(item, given.jobs) for item in _drawn(Path(folder), given)]
    killed = sum(one["outcome"] != "survived" for one in report)
    print(f"{killed} of {len(report)} killed ({killed / max(len(report), 1):.0%})")
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(0 if killed >= 0.9 * len(report) else 1)


def _drawn(folder: Path, given: argparse.Namespace) -> list:
    files = [
        p
        for room in CORE
        for p in sorted(Path("src/skipscope", room).rglob("*.py"))
        if p.name != "__init__.py"
    ]
    with use_db(folder / "mutants.sqlite", mode=WorkDB.Mode.create) as mutants:
        init([p for p in files if str(p).startswith(given.only)], mutants, {})
        items = [
            item for item in mutants.work_items if not item.mutations[0].operator_name.startswith(LEFT_OUT)
        ]
    items.sort(
        key=lambda item: (
            str(item.mutations[0].module_path),
            item.mutations[0].operator_name,
            item.mutations[0].occurrence,
        )
    )
    return random.Random(given.seed).sample(items, min(given.count, len(items)))


_seconds: dict[str, float] = {}


def _test_files(module: Path) -> list[str]:
    """The test files of a module's folder, those named like the module first: a mutant is killed sooner."""
    words = set(module.stem.strip("_").split("_"))
    files = sorted(Path("tests", module.parts[2]).glob("test_*.py"))
    return [str(path) for path in sorted(files, key=lambda path: not words & set(path.stem.split("_")))]


def _try(item, jobs: int) -> dict[str, str]:
    (mutation,) = item.mutations
    module = Path(mutation.module_path)
    room = module.parts[2]
    tests = f"{sys.executable} -m pytest -x -q -p no:cacheprovider -n {jobs} {' '.join(_test_files(module))}"
    if room not in _seconds:
        begun = time.monotonic()
        subprocess.run(tests.split(), check=True, capture_output=True)
        _seconds[room] = time.monotonic() - begun
    result = mutate_and_test(item.mutations, tests, 2 * _seconds[room] + 60)
    survived = result.test_outcome is TestOutcome.SURVIVED
    where = f"{mutation.module_path}:{mutation.start_pos[0]} {mutation.operator_name}"
    print(f"{'SURVIVED' if survived else 'killed'}  {where}", flush=True)
    if survived:
        print(result.diff, flush=True)
    return {"where": where, "outcome": "survived" if survived else "killed", "diff": result.diff or ""}


if __name__ == "__main__":
    main()
