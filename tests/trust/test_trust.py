"""A few tries of every hazard hold, and a fault planted in each turns its row red."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from trust import HAZARDS, run
from trust._hazard import Hazard, TimeIsUp

NAMES = [hazard.name for hazard in HAZARDS]
# Each try of these starts a process.
SLOW = {"Outputs that cannot take everything"}
# With its fault, an interrupt leaves locks and counters of the process as they should never be: other tests would
# wait for ever.
APART = {"A model changed by Ctrl-C"}
SEEN = 7
SEEN_APART = """
import sys
from trust import HAZARDS, run
from trust._hazard import Hazard, TimeIsUp

hazard = next(h for h in HAZARDS if h.name == {name!r})
with hazard.fault():
    try:
        seen = any(run(hazard, hazard.few).failures for _ in range(20))
    except KeyboardInterrupt:  # it came after the call that should have taken it
        seen = True
sys.exit(7 if seen else 0)
"""
PARAMETERS = [
    pytest.param(hazard, id=hazard.name, marks=pytest.mark.slow if hazard.name in SLOW else ())
    for hazard in HAZARDS
]


@pytest.mark.parametrize("hazard", PARAMETERS)
def test_a_few_tries_hold(hazard):
    row = run(hazard, hazard.few)
    if row.skipped:
        pytest.skip(row.skipped)
    assert row.count >= hazard.few and not row.failures


@pytest.mark.parametrize("hazard", PARAMETERS)
def test_a_planted_fault_turns_it_red(hazard):
    if hazard.needs:
        pytest.skip(hazard.needs)
    if hazard.name in APART:
        code = SEEN_APART.format(name=hazard.name)
        assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == SEEN
        return
    with hazard.fault():
        # Threads may miss each other for a while.
        assert any(run(hazard, hazard.few).failures for _ in range(20))


def test_each_hazard_has_a_row_of_its_own():
    assert len(set(NAMES)) == len(NAMES) and all(hazard.full >= hazard.few > 0 for hazard in HAZARDS)


def test_what_there_is_to_say_is_said_also_where_the_time_is_up():
    def tries(count):
        done = 0
        with contextlib.suppress(TimeIsUp):
            for _ in range(count):
                done += 1
                yield None
        return f"{done} of {count}"

    hazard = Hazard("x", "y", tries, contextlib.nullcontext, 5, 1)
    row = run(hazard, 5, seconds=0)
    assert (row.count, row.said) == (0, "")
    row = run(hazard, 10**9, seconds=0.01)
    assert 0 < row.count < 10**9 and row.said == f"{row.count} of {10**9}" and not row.failures
    assert run(hazard, 5).said == "5 of 5"
