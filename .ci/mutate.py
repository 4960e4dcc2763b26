"""Break random lines of the core, one at a time, in a copy of the tree, and see whether a test fails.

``make mutate`` runs it. The mutations are those of cosmic-ray. First every fast test of the core's folders runs once
and says which lines it executes; then each mutant is tried against the tests that execute its line, the fastest first,
in a fork of a process that has imported torch already. A mutant is killed when a test fails, takes much longer than it
did, or the process ends; those that survive are printed as diffs, to be looked at one by one.

    python .ci/mutate.py --count 300 --seed 0 --work FOLDER [--only src/skipscope/flow] [--rooms flow nn]

The folder keeps the copy, the map and what came of each mutant: the same command again resumes.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import compileall
import contextlib
import ctypes
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CORE = ("nn", "flow", "comparison", "monitor", "curvature", "surfaces", "shortcuts")
# Neither changes what a program does: annotations, and the text of a message.
LEFT_OUT = ("core/VariableReplacer", "core/VariableInserter", "core/ReplaceBinaryOperator_BitOr")
IMPORTED_ONCE = ("numpy", "torch", "scipy.sparse.linalg", "pytest", "hypothesis", "cattrs", "jinja2", "rich")
# A test that takes longer is left out of the map; seconds of one file's tests that are tried before another file's.
LONGEST, A_FILE_FIRST = 20, 2.0
MEMORY = 12 * 2**30


@dataclass(frozen=True)
class Executed:
    """What each test of a folder executes.

    Attributes:
        seconds: how long each test takes, by its id.
        failed: tests that fail though nothing is broken: none of these is tried.
        lines: by file and line, the tests that execute it: bit i is the i-th of ``seconds``, as a hexadecimal number.
    """

    seconds: dict[str, float]
    failed: list[str]
    lines: dict[str, dict[str, str]]

    def tests_of(self, file: str, line: int, source: str) -> list[str]:
        """The tests that execute the statement of a line; the module's, where it runs in an import or elsewhere."""
        lines = self.lines.get(file, {})
        found = self._tests(lines.get(str(at), "0") for at in statement(source, line))
        return found or self._tests(lines.values())

    def _tests(self, masks: Iterable[str]) -> list[str]:
        together = 0
        for mask in masks:
            together |= int(mask, 16)
        tests = (test for i, test in enumerate(self.seconds) if together >> i & 1)
        return [test for test in tests if test not in set(self.failed)]


def statement(source: str, line: int) -> range:
    """The lines of the smallest statement around a line: of a definition's head all, of another's head the head."""
    around = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.stmt) and _first(node) <= line <= (node.end_lineno or 0)
    ]
    if not around:
        return range(line, line + 1)
    node = min(around, key=lambda node: (node.end_lineno or 0) - _first(node))
    end = node.end_lineno or line
    body = getattr(node, "body", None)
    if body and not isinstance(node, ast.FunctionDef | ast.ClassDef):
        end = max(line, _first(body[0]) - 1)
    return range(_first(node), end + 1)


def _first(node: ast.stmt) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])


def in_order(tests: Iterable[str], seconds: dict[str, float], file: str, budget: float) -> list[str]:
    """Order the tests of a module and cut them to ``budget`` seconds in all.

    Those of the module's own folder come first, then those of files that are named like it. A first round takes
    the fastest test of each file, a second round takes the rest.
    """
    words = set(Path(file).stem.strip("_").split("_"))

    def rank(path: str) -> tuple[bool, bool, str]:
        return Path(path).parts[1] != Path(file).parts[2], not words & set(Path(path).stem.split("_")), path

    by_file: dict[str, list[str]] = defaultdict(list)
    for test in sorted(tests, key=lambda test: (seconds[test], test)):
        by_file[test.partition("::")[0]].append(test)
    rounds: tuple[list[str], list[str]] = [], []
    for path in sorted(by_file, key=rank):
        spent = 0.0
        for test in by_file[path]:
            rounds[bool(spent > A_FILE_FIRST)].append(test)
            spent += seconds[test]
    chosen, spent = [], 0.0
    for test in [*rounds[0], *rounds[1]]:
        if not chosen or spent + seconds[test] <= budget:
            chosen.append(test)
            spent += seconds[test]
    return chosen


def main() -> None:
    """Draw mutants, try them, print the share that was killed and every survivor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose path begins so")
    parser.add_argument(
        "--rooms", nargs="+", choices=CORE, default=CORE, help="of the mutants drawn, those of these folders"
    )
    parser.add_argument("--budget", type=float, default=45.0, help="seconds of tests for a mutant")
    parser.add_argument(
        "--work",
        type=Path,
        help="where the copy of the tree, the map and the outcomes are kept; default: a new folder",
    )
    given = parser.parse_args()
    work = (given.work or Path(tempfile.mkdtemp(prefix="mutate-"))).absolute()
    print(f"To resume: --work {work}", flush=True)
    _enter_copy(work / "tree")
    mutants = _drawn(work, given)
    log = work / f"outcomes-{given.seed}.jsonl"
    report = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {one["mutant"] for one in report}
    rooms: list[Executed] = []
    for room in given.rooms:
        rooms.append(
            Executed(**_kept(work / f"map-{room}.json", lambda room=room: _forked(lambda: _map(room), 3600)))
        )
        print(
            f"{room}: {len(rooms[-1].seconds)} tests, {sum(rooms[-1].seconds.values()):.0f} s, {len(rooms[-1].failed)} fail",
            flush=True,
        )
        own = [m for m in mutants if Path(m["file"]).parts[2] == room and _name(m) not in done]
        for mutant in own:
            report.append(_try(mutant, rooms, given.budget))
            with log.open("a") as file:
                file.write(json.dumps(report[-1]) + "\n")
    wanted = {_name(mutant) for mutant in mutants}
    report = [one for one in report if one["mutant"] in wanted]
    tried = [one for one in report if one["outcome"] != "no program"]
    killed = sum(one["outcome"] == "killed" for one in tried)
    print(
        f"{killed} of {len(tried)} killed ({killed / max(len(tried), 1):.0%}); "
        f"{len(report) - len(tried)} more do not compile"
    )
    sys.exit(0 if killed >= 0.9 * len(tried) else 1)


def _enter_copy(tree: Path) -> None:
    """Work in a copy of the source tree, with the packages that change nothing imported once."""
    whole = tree.with_name("whole")
    if not whole.exists():
        root = Path(__file__).resolve().parents[1]
        left_out = shutil.ignore_patterns(".git", "__pycache__", ".hypothesis", "*.zarr", "_build")
        shutil.copytree(root, tree, ignore=left_out)
        # Nothing is written beside the sources later: a mutant as long as what it replaces is compiled all the same.
        compileall.compile_dir(tree / "src", quiet=1)
        shutil.copytree(tree / "src", whole)
    shutil.copytree(whole, tree / "src", dirs_exist_ok=True)  # the last run may have left a mutant
    os.chdir(tree)
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [str(tree / "src"), *(p for p in others if p and not p.rstrip("/").endswith("/src"))]
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    sys.path[:] = path + [p for p in sys.path if not p.rstrip("/").endswith("/src")]
    sys.dont_write_bytecode = True
    for name in IMPORTED_ONCE:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)


def _kept(path: Path, make: Callable[[], Any]) -> Any:
    if not path.exists():
        made = make()
        if isinstance(made, str):
            raise RuntimeError(f"{path.stem}: {made}")
        path.write_text(json.dumps(made))
    return json.loads(path.read_text())


# --- mutants ---


def _drawn(work: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    every = _kept(work / "mutants.json", lambda: _forked(lambda: _mutants(work), 3600))
    every = [mutant for mutant in every if mutant["file"].startswith(given.only)]
    drawn = random.Random(given.seed).sample(every, min(given.count, len(every)))
    return [mutant for mutant in drawn if Path(mutant["file"]).parts[2] in given.rooms]


def _mutants(work: Path) -> list[dict[str, Any]]:
    from cosmic_ray.commands import init
    from cosmic_ray.work_db import WorkDB, use_db

    rooms = [Path("src/skipscope", room).rglob("*.py") for room in CORE]
    files = sorted(p for paths in rooms for p in paths if p.name != "__init__.py")
    with use_db(work / "mutants.sqlite", mode=WorkDB.Mode.create) as database:
        init(files, database, {})
        mutations = [item.mutations[0] for item in database.work_items]
    return sorted(
        (
            {
                "file": str(m.module_path),
                "operator": m.operator_name,
                "arguments": dict(m.operator_args or {}),
                "occurrence": m.occurrence,
                "line": m.start_pos[0],
            }
            for m in mutations
            if not m.operator_name.startswith(LEFT_OUT)
        ),
        key=lambda m: (m["file"], m["operator"], m["occurrence"]),
    )


def _name(mutant: dict[str, Any]) -> str:
    return "{file}:{line} {operator} {occurrence}".format(**mutant)


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _try(mutant: dict[str, Any], rooms: list[Executed], budget: float) -> dict[str, Any]:
    """Break the line, run its tests in a fork, put the line back."""
    from cosmic_ray.mutating import _make_diff, mutate_code
    from cosmic_ray.plugins import get_operator

    path, begun = Path(mutant["file"]), time.monotonic()
    seconds = {test: taken for room in rooms for test, taken in room.seconds.items()}
    source = path.read_text(encoding="utf-8")
    broken = mutate_code(
        source, get_operator(mutant["operator"])(**mutant["arguments"]), mutant["occurrence"]
    )
    diff = "\n".join(_make_diff(source, broken, mutant["file"]))
    found = [test for room in rooms for test in room.tests_of(mutant["file"], mutant["line"], source)]
    tests = in_order(found, seconds, mutant["file"], budget)
    times = path.stat()
    try:
        path.write_text(broken, encoding="utf-8")
        limit = 30 + 3 * sum(seconds[test] for test in tests)
        by = _forked(lambda: _first_failure(tests, seconds), limit) if tests and _compiles(broken) else ""
    finally:
        path.write_text(source, encoding="utf-8")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # its compiled form is valid again
    outcome = "killed" if by else "survived" if _compiles(broken) else "no program"
    taken = time.monotonic() - begun
    print(
        f"{outcome:10}  {_name(mutant)}  {len(tests)} of {len(found)} tests, {taken:.1f} s  {by or ''}",
        flush=True,
    )
    if outcome == "survived":
        print(diff, flush=True)
    return {"mutant": _name(mutant), "outcome": outcome, "by": by, "tests": len(tests), "of": len(found),
            "seconds": taken, "diff": diff}  # fmt: skip


# --- in a fork ---


def _forked(function: Callable[[], Any], limit: float) -> Any:
    """What a function returns in a fork of this process; a text if it ended otherwise, or not in time."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        child = os.fork()
        if not child:
            os.setsid()
            _end_with_parent()
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            silent = os.open(Path(folder) / "output", os.O_WRONLY | os.O_CREAT)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            try:
                answer.write_text(json.dumps(function()))
                os._exit(0)
            finally:
                os._exit(1)
        end = time.monotonic() + limit
        ended = 0
        while not ended and time.monotonic() < end:
            ended = os.waitpid(child, os.WNOHANG)[0]
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):  # what it started may go on
            os.killpg(child, signal.SIGKILL)
        if not ended:
            os.waitpid(child, 0)
            return f"not done after {limit:.0f} s"
        return json.loads(answer.read_text()) if answer.exists() else "the process ended"


def _end_with_parent() -> None:
    """A session of its own does not get the parent's signals: Linux sends one when the parent ends."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _pytest(arguments: Iterable[str], plugin: object) -> None:
    import pytest

    # A module whose name ends in _test would be read by pytest's own loader, which notes no line.
    own = ["-o", "python_files=test_*.py"]
    pytest.main(["-n0", "-p", "no:cacheprovider", "--tb=no", *own, *arguments], plugins=[plugin])


def _first_failure(tests: list[str], seconds: dict[str, float]) -> str:
    """The first of some tests that fails, or the file that cannot be imported; "" if all pass."""
    import pytest

    place = {test: i for i, test in enumerate(tests)}

    class Chosen:
        failed = ""

        @pytest.hookimpl(trylast=True)
        def pytest_collection_modifyitems(self, items: list[Any]) -> None:
            items[:] = sorted((i for i in items if i.nodeid in place), key=lambda item: place[item.nodeid])
            for item in items:
                item.add_marker(pytest.mark.timeout(10 + 5 * seconds[item.nodeid]), append=False)

        def pytest_runtest_logreport(self, report: Any) -> None:
            self._note(report)

        def pytest_collectreport(self, report: Any) -> None:
            self._note(report)

        def _note(self, report: Any) -> None:
            if report.failed and not self.failed:
                self.failed = report.nodeid or "collection"

    chosen = Chosen()
    _pytest(["-x", *dict.fromkeys(test.partition("::")[0] for test in tests)], chosen)
    return chosen.failed


def _map(room: str) -> dict[str, Any]:
    """What each fast test of a folder executes, and for how long."""
    import pytest

    hits = _count_statements()
    seconds: dict[str, float] = {}
    failed: set[str] = set()
    executed: dict[str, dict[str, bytearray]] = defaultdict(dict)

    def note(context: str) -> None:
        """What was executed since the last note belongs to a test, or to all tests of a file."""
        for file, seen in hits.items():
            if any(seen):
                kept = executed[context].setdefault(file, bytearray(len(seen)))
                both = int.from_bytes(kept, "big") | int.from_bytes(seen, "big")
                kept[:] = both.to_bytes(len(seen), "big")
                seen[:] = bytes(len(seen))

    running = [""]

    class Mapper:
        @pytest.hookimpl(wrapper=True)
        def pytest_make_collect_report(self, collector: Any):
            # What a test file computes as it is read, and a fixture for all its tests, counts for all of them.
            report = yield
            if isinstance(collector, pytest.Module):
                note(collector.nodeid)
            return report

        @pytest.hookimpl(wrapper=True)
        def pytest_fixture_setup(self, fixturedef: Any, request: Any):
            if fixturedef.scope == "function":
                return (yield)
            note(running[0])
            try:
                return (yield)
            finally:
                note(request.node.nodeid.partition("::")[0])

        @pytest.hookimpl(trylast=True)
        def pytest_collection_modifyitems(self, items: list[Any]) -> None:
            for item in items:
                item.add_marker(pytest.mark.timeout(LONGEST), append=False)

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(self, item: Any):
            begun = time.monotonic()
            running[0] = item.nodeid
            try:
                return (yield)
            finally:
                seconds[item.nodeid] = time.monotonic() - begun
                note(item.nodeid)

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                failed.add(report.nodeid)

    importlib.import_module("skipscope.cli._commands")
    note("")
    _pytest([f"tests/{room}"], Mapper())
    lines: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for i, test in enumerate(seconds):
        for context in (test, test.partition("::")[0]):
            for file, seen in executed.get(context, {}).items():
                for line in (at for at, hit in enumerate(seen) if hit):
                    lines[file][str(line)] |= 1 << i
    return {
        "seconds": seconds,
        "failed": sorted(failed),
        "lines": {file: {line: hex(mask) for line, mask in of.items()} for file, of in lines.items()},
    }


def _count_statements() -> dict[str, bytearray]:
    """From here on each module of the package notes the lines of the statements that it executes."""
    from importlib.machinery import SourceFileLoader

    hits: dict[str, bytearray] = {}
    original = SourceFileLoader.get_code
    package = Path("src/skipscope").absolute()

    def get_code(self: SourceFileLoader, fullname: str) -> Any:
        path = Path(self.path)
        if not path.is_relative_to(package):
            return original(self, fullname)
        source = path.read_text(encoding="utf-8")
        file = str(path.relative_to(Path.cwd()))
        name = f"__executed_{len(hits)}__"
        hits[file] = bytearray(source.count("\n") + 2)
        setattr(builtins, name, hits[file])
        return compile(with_notes(source, name), self.path, "exec")

    SourceFileLoader.get_code = get_code
    return hits


def with_notes(source: str, name: str) -> ast.Module:
    """A module in which every statement is preceded by ``name[line] = 1``."""
    tree = ast.parse(source)
    for node in list(ast.walk(tree)):
        for part in ("body", "orelse", "finalbody"):
            statements = getattr(node, part, None)
            if isinstance(statements, list):
                setattr(node, part, [s for one in statements for s in (*_note(one, name), one)])
    return ast.fix_missing_locations(tree)


def _note(statement: ast.stmt, name: str) -> list[ast.stmt]:
    is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    if is_text or (isinstance(statement, ast.ImportFrom) and statement.module == "__future__"):
        return []  # these have to come first
    note = ast.parse(f"{name}[{statement.lineno}] = 1").body[0]
    for node in ast.walk(note):
        ast.copy_location(node, statement)
    return [note]


if __name__ == "__main__":
    main()
