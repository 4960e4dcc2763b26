"""Print the table of hazards: what was tried, how often, how many failed.

``python -m trust`` in ``tests/``; one row alone, and for long, by ``python -m trust --only memory --minutes 60``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from skipscope._printable import printable
from skipscope._table import Table
from skipscope._version import __version__
from trust import HAZARDS, Row, run

HEAD = """# Trust

What `make trust` tried at its last run, and how often it failed. Each row has a planted fault that must turn it red.

"""


def main() -> int:
    """Try every hazard in a process of its own, print each row as it ends, and write the table where it was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=12.0, help="a hazard is left after so many minutes")
    parser.add_argument("--only", default="", help="hazards whose name holds this text")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--json", type=Path, help="also write the rows as JSON")
    parser.add_argument("--markdown", type=Path, help="also write the table as Markdown")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.row is not None:
        row = run(HAZARDS[given.row], HAZARDS[given.row].full, seconds=given.minutes * 60)
        given.json.write_text(json.dumps(asdict(row)))
        return 0
    chosen = [i for i, hazard in enumerate(HAZARDS) if given.only.lower() in hazard.name.lower()]
    with ThreadPoolExecutor(given.jobs) as pool:
        rows = list(pool.map(lambda i: _in_a_process(i, given.minutes), chosen))
    print(f"\n{_table(rows).text()}")
    if given.json:
        content = {
            "skipscope": __version__,
            "torch": torch.__version__,
            "date": _today(),
            "rows": [asdict(row) for row in rows],
        }
        given.json.write_text(json.dumps(content, indent=1) + "\n")
    if given.markdown:
        left = f"\nA row was left after {60 * given.minutes:.0f} seconds where its tries were not all made.\n"
        given.markdown.write_text(HEAD + _table(rows).markdown() + left)
    return 1 if any(row.failures for row in rows) else 0


def _in_a_process(index: int, minutes: float) -> Row:
    """Run one hazard in a process of its own, which may be interrupted and may fill its memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        command = [
            sys.executable,
            "-m",
            "trust",
            "--row",
            str(index),
            "--minutes",
            str(minutes),
            "--json",
            str(path),
        ]
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        if path.exists():
            row = Row(**json.loads(path.read_text()))
        else:
            hazard = HAZARDS[index]
            row = Row(
                hazard.name,
                hazard.tried,
                1,
                [f"the process ended with {done.returncode}: {done.stderr[-200:]}"],
            )
    said = row.skipped or f"{row.count} tried, {len(row.failures)} failed, {row.seconds:.0f} s"
    lines = [f"{row.hazard}: {said}", *filter(None, [row.said]), *map(printable, row.failures[:5])]
    print("\n    ".join(lines), flush=True)
    return row


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _table(rows: list[Row]) -> Table:
    cells = [[row.hazard, row.tried, row.count, row.skipped or len(row.failures)] for row in rows]
    tried, failed = sum(row.count for row in rows), sum(len(row.failures) for row in rows)
    notes = [
        f"{tried} tries, {failed} failed; {_today()}, torch {torch.__version__}, Python {platform.python_version()}.",
        *(f"{row.hazard}: {row.said}." for row in rows if row.said),
    ]
    return Table("What was tried", ["hazard", "one try", "tried", "failed"], cells, notes)


if __name__ == "__main__":
    sys.exit(main())
