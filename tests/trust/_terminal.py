"""The terminal and the command line: nothing hostile is shown, nothing is lost, every error is in words."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import skipscope as ss
from report import samples
from skipscope import _table, cli
from trust._hazard import Hazard, replaced
from trust._model import network

# --- what is shown ---

SLY = [
    "\x1b[2J", "\x1b]0;title\x07", "\x1b]8;;http://example.invalid\x1b\\", "\x9b31m", "\x07", "\b\b\b", "\r", "\x00", "\x7f", "\x85",
    "\u202eabc", "\u2066x\u2069", "\u2028", "\n\\input{/etc/passwd}\n", "=1+1", "=cmd|' /C calc'!A0", "+1", "-1+cmd", "@SUM(1)", "\t=1",
    "\\write18{id}", "%\n\\input{x}", "$x$", "{", "}", "#", "&", "~", "^", "_", "\\",
]  # fmt: skip


def shown(count: int) -> Iterator[str | None]:
    """A name of a layer in a result, as text, CSV and LaTeX: no control character, formula or command gets through."""
    for i in range(count):
        sly = SLY[i % len(SLY)]
        table = samples.flow(depth=4, text=lambda text, sly=sly: sly + text).table()
        text, latex = table.text(width=200), table.latex()
        cells = [cell for row in csv.reader(io.StringIO(table.csv())) for cell in row]
        raw = [c for c in text if _is_control(c) and c != "\n"] + [
            c for c in latex if _is_control(c) and c not in "\n\t"
        ]
        formulas = [c for c in cells if c[:1] in {"=", "+", "-", "@", "\t", "\r"} and not _is_number(c)]
        commands = [
            c
            for c in ("\\input{", "\\write18")
            if c in "\n".join(line for line in latex.splitlines() if not line.lstrip().startswith("%"))
        ]
        yield f"{sly!r}: {raw[:3]} {formulas[:2]} {commands}" if raw or formulas or commands else None


def _is_control(character: str) -> bool:
    code = ord(character)
    return code < 32 or 127 <= code < 160 or character in "\u2028\u2029\u202e\u2066\u2069"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shows_everything():
    return replaced(
        (_table, "printable", lambda text: text), (_table, "_FORMULA", ("\N{REPLACEMENT CHARACTER}",))
    )


# --- the command line ---

WORDS = (
    "find", "flow", "paths", "landscape", "show", "compare", "book", "play", "resnet20", "mlp", "gpt", "nothing", "os:path", "a.b:c", "--json", "--out",
    "--save", "--seed", "--input", "--loss", "--data", "--weights", "--device", "--grid", "--help", "--version", "--list", "--wrt", "--span", "-1", "0",
    "1e999", "99999999999999999999", "nan", "", " ", "\x00"[:0] + "x.json", "x.svg", "/dev/null/x", "1x3x8x8", "3x3", "cross_entropy", "cuda:9", "--", "-h", "é", "--no-train", "--steps",
)  # fmt: skip
DOCUMENTED = {0, 1, 2, 130}


def _command_lines(draw: random.Random) -> Iterator[list[str]]:
    """Command lines that end soon: those that would do minutes of work are left to other tests."""
    while True:
        words = [draw.choice(WORDS) for _ in range(draw.randint(0, 5))]
        if draw.random() < 0.8:  # else a word that is no command
            words.insert(0, draw.choice(("find", "flow", "paths", "show")))
        line = " ".join(words)
        long = (
            any(word in line for word in ("compare", "book", "landscape", "play")) and "--help" not in words
        )
        if not long or "nothing" in words or "os:path" in words:
            yield words


def command_lines(count: int) -> Iterator[str | None]:
    """A random command line: a documented exit status, and never a traceback."""
    draw = random.Random(0)
    here = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="skipscope-trust-") as folder:
        os.chdir(folder)
        try:
            for _, words in zip(range(count), _command_lines(draw)):
                status, said = _run_here(words)
                yield (
                    None
                    if status in DOCUMENTED and "Traceback" not in said
                    else f"skipscope {words} ended with {status}: {said[-200:]}"
                )
        finally:
            os.chdir(here)


def _run_here(words: list[str]) -> tuple[Any, str]:
    out, paths = io.StringIO(), list(sys.path)
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
        replaced((sys, "argv", ["skipscope", *words])),
    ):
        try:
            cli.main()
            status: Any = 0
        except SystemExit as error:
            status = 0 if error.code is None else error.code
        except BaseException as error:
            status = repr(error)
        finally:
            sys.path[:] = paths
    return status, out.getvalue()


def _stumbles():
    def stumble(*_: Any, **__: Any) -> None:
        raise SystemExit(99)  # a status that is documented nowhere

    return replaced((cli, "_run", stumble))


# --- where output goes ---

PREFIX = {"code": ""}
SURROUNDINGS: dict[str, tuple[str, dict[str, str], set[int]]] = {
    "to a full device": ("{} >/dev/full", {}, {1}),
    "to head": ("{} | head -1 >/dev/null; exit ${{PIPESTATUS[0]}}", {}, {0}),
    "to a closed output": ("{} >&-", {}, {0, 1}),
    "to a closed error output": ("{} >/dev/null 2>&-", {}, {0, 1}),
    "to a full error output": ("{} >/dev/null 2>/dev/full", {}, {0}),
    "from a closed input": ("{} <&-", {}, {0}),
    "in cp1252": ("{} >out.txt", {"PYTHONIOENCODING": "cp1252"}, {0}),
    "in ASCII": ("{} >out.txt", {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}, {0}),
    "in 40 columns": ("{} >out.txt", {"COLUMNS": "40"}, {0}),
    "in 400 columns": ("{} >out.txt", {"COLUMNS": "400"}, {0}),
    "without a home": ("env -u HOME {} >out.txt", {}, {0}),
    "with an odd rank": ("{} >out.txt", {"RANK": "x"}, {0, 1}),
    "with a huge seed": ("{} --seed 99999999999999999999999 >out.txt", {}, {2}),
    "into a folder that cannot be made": ("{}/../../../../proc/x >out.txt", {}, {1}),
}


def places(count: int) -> Iterator[str | None]:
    """A command whose output goes somewhere awkward: the right exit status, no traceback, and the work is saved."""
    code = "from skipscope.cli import main; main()"
    for i in range(count):
        name = list(SURROUNDINGS)[i % len(SURROUNDINGS)]
        shell, environment, right = SURROUNDINGS[name]
        with tempfile.TemporaryDirectory(prefix="skipscope-trust-") as folder:
            command = f"{sys.executable} -c {PREFIX['code'] + code!r} find resnet20 --out results"
            done = subprocess.run(
                ["bash", "-c", shell.format(command)], cwd=folder, env=os.environ | environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=120,
            )  # fmt: skip
            saved = (Path(folder) / "results" / "find.json").exists()
            said = (done.stdout + done.stderr).decode(errors="replace")
            if done.returncode not in right or "Traceback" in said:
                yield f"{name}: exit {done.returncode}, {said[-200:]}"
            else:
                refused = name.startswith(("with a huge", "into a folder"))
                yield None if saved or refused else f"{name}: nothing was saved"


def _prints_before_it_saves():
    code = (
        "import sys; import skipscope.cli._commands as c; save = c._deliver;"
        "c._deliver = lambda r, *a, **k: (print(r, flush=True), save(r, *a, **k)); "
    )
    return replaced((PREFIX, "code", code))


assert ss is not None and network is not None

TERMINAL = (
    Hazard("Names that move a terminal, a sheet or LaTeX", "one name in text, CSV and LaTeX", shown, _shows_everything, 31, 15),
    Hazard("Command lines", "one random command line", command_lines, _stumbles, 1000, 40),
    Hazard("Outputs that cannot take everything", "one command with an awkward output", places, _prints_before_it_saves, 24, 1),
)  # fmt: skip
