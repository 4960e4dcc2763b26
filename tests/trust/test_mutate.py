"""Which tests a mutant is tried against, and what counts as killed."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("mutate", Path(__file__).parents[2] / ".ci" / "mutate.py")
mutate = importlib.util.module_from_spec(_spec)
sys.modules["mutate"] = mutate  # dataclasses look there
_spec.loader.exec_module(mutate)

SOURCE = """\
LIMIT = 3


@cache
def first(x):
    if x > (
        LIMIT
    ):
        return [
            x,
            1,
        ]
    return x
"""


@pytest.mark.parametrize(
    ("line", "lines"),
    [(1, [1]), (4, range(4, 14)), (5, range(4, 14)), (7, [6, 7, 8]), (11, [9, 10, 11, 12]), (13, [13])],
)
def test_the_statement_around_a_line(line, lines):
    assert list(mutate.statement(SOURCE, line)) == list(lines)


def executed(failed=()):
    seconds = {"tests/f/t.py::x": 1.0, "tests/f/t.py::y": 2.0, "tests/f/t.py::z": 3.0}
    return mutate.Executed(
        seconds, list(failed), {"src/a.py": {"1": "0x0", "6": "0x3", "9": "0x2", "11": "0x4"}}
    )


def test_a_mutant_meets_the_tests_that_execute_its_statement():
    assert executed().tests_of("src/a.py", 10, SOURCE) == ["tests/f/t.py::y", "tests/f/t.py::z"]
    assert executed().tests_of("src/a.py", 7, SOURCE) == ["tests/f/t.py::x", "tests/f/t.py::y"]
    assert executed(["tests/f/t.py::x"]).tests_of("src/a.py", 7, SOURCE) == ["tests/f/t.py::y"]


def test_what_an_import_executes_is_tried_against_every_test_of_the_module():
    assert executed().tests_of("src/a.py", 1, SOURCE) == list(executed().seconds)
    assert executed().tests_of("src/b.py", 1, SOURCE) == []


def test_each_statement_notes_its_line_and_does_what_it_did():
    source = (
        '"""Text."""\nfrom __future__ import annotations\n\ndef f(x):\n    """Text."""\n    if x:\n        return 1\n'
        "    elif x is None:\n        y = 2\n    else:\n        y = 3\n    return y\n"
    )
    notes = bytearray(20)
    scope = {"notes": notes}
    exec(compile(mutate.with_notes(source, "notes"), "source", "exec"), scope)
    assert [at for at, hit in enumerate(notes) if hit] == [4]
    for x, value, lines in ((1, 1, [6, 7]), (None, 2, [6, 8, 9, 12]), (0, 3, [6, 8, 11, 12])):
        notes[:] = bytes(20)
        assert scope["f"](x) == value
        assert [at for at, hit in enumerate(notes) if hit] == lines
    assert scope["__doc__"] == scope["f"].__doc__ == "Text."


def test_own_files_come_first_and_the_fastest_of_each_file_before_the_rest():
    seconds = {
        "tests/nn/test_a.py::far": 0.1,
        "tests/flow/test_b.py::slow": 3.0,
        "tests/flow/test_b.py::slower": 4.0,
        "tests/flow/test_b.py::fast": 0.5,
        "tests/flow/test_split.py::named": 1.0,
    }
    file = "src/skipscope/flow/split/_gradient_split.py"
    ordered = ["split.py::named", "b.py::fast", "b.py::slow", "b.py::slower"]
    ordered = [f"tests/flow/test_{name}" for name in ordered]
    ordered.insert(3, "tests/nn/test_a.py::far")
    assert mutate.in_order(seconds, seconds, file, 100) == ordered
    assert mutate.in_order(seconds, seconds, file, 4.6) == [*ordered[:3], ordered[3]]
    assert mutate.in_order(seconds, seconds, file, 0.1) == ordered[:1]


def test_a_fork_returns_is_killed_in_time_or_is_said_to_have_ended():
    assert mutate._forked(lambda: {"a": 1}, 20) == {"a": 1}
    begun = time.monotonic()
    assert "not done" in mutate._forked(lambda: time.sleep(60), 0.3)
    assert time.monotonic() - begun < 20
    assert mutate._forked(lambda: os._exit(3), 20) == "the process ended"


MAPPED = """\
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("mutate", sys.argv[1])
mutate = sys.modules["mutate"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutate)
sys.path.insert(0, "src")
print("MAP " + json.dumps(mutate._map("room")["lines"]))
"""


def test_a_module_whose_name_ends_as_a_test_s_does_is_in_the_map(tmp_path):
    files = {
        "src/skipscope/__init__.py": "",
        "src/skipscope/cli/__init__.py": "",
        "src/skipscope/cli/_commands.py": "",
        "src/skipscope/_one_test.py": "def one():\n    return 1\n",
        "tests/room/test_one.py": "from skipscope._one_test import one\ndef test_one():\n    assert one() == 1\n",
        "pyproject.toml": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-c", MAPPED, str(Path(mutate.__file__))]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "PYTEST"))}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    lines = json.loads(done.stdout.partition("MAP ")[2])
    assert lines["src/skipscope/_one_test.py"] == {"1": "0x1", "2": "0x1"}
