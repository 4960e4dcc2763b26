"""Run the Python of a page and show what it prints, as a notebook would.

Every fenced block marked ``python`` of a page runs, in order and in one namespace. What it prints, and the value of its
last line, are shown below it. Two comments steer this and are not shown:

- ``<!-- python`` to ``-->`` holds code that runs without being shown: preparation, and assertions on what was shown.
- ``<!-- needs: lightning -->`` names packages without which the page is shown and not run.

Blocks marked ``shell`` run as well and show what they print; those marked ``bash`` are run by the tests alone (minutes).
In a hidden block ``__previous__`` is the code of the block before it.

The tests run the same blocks with :func:`run_page`, so a page cannot go stale.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import linecache
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BLOCK = re.compile(
    r"^(?P<fence>```+)(?P<language>[a-z]+)\n(?P<code>.*?)^(?P=fence)\n|^<!-- python\n(?P<hidden>.*?)^-->\n",
    re.MULTILINE | re.DOTALL,
)
_NEEDS = re.compile(r"^<!-- needs: (.*) -->$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page.

    Attributes:
        language: what the fence says: ``python``, ``bash``, ...
        code: the text between the fences.
        line: the line of the page on which the code starts.
        end: where the block ends in the page's text.
        hidden: whether the block stands in a comment.
    """

    language: str
    code: str
    line: int
    end: int
    hidden: bool


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found = []
    for match in _BLOCK.finditer(text):
        hidden = match["hidden"] is not None
        code = match["hidden"] if hidden else match["code"]
        start = match.start("hidden" if hidden else "code")
        language = "python" if hidden else match["language"]
        found.append(Block(language, code, text.count("\n", 0, start) + 1, match.end(), hidden))
    return found


def missing_packages(text: str) -> list[str]:
    """The packages that a page needs and that are not installed."""
    names = [name.strip() for line in _NEEDS.findall(text) for name in line.split(",")]
    return [name for name in names if importlib.util.find_spec(name) is None]


def run_page(text: str, path: str, *, slow: bool = False) -> Iterator[tuple[Block, str, Any]]:
    """Run a page in a folder of its own.

    Args:
        text: the page.
        path: its name, for tracebacks.
        slow: whether to run ``bash`` blocks as well.

    Yields:
        Each block with what it printed and the value of its last line (None if that is a statement).

    Raises:
        RuntimeError: a block failed; it names the page and the line.
    """
    import torch

    namespace: dict[str, Any] = {"__name__": "__page__"}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks(text):
            try:
                if block.language == "python":
                    yield block, *_run_python(block, path, namespace)
                elif block.language == "shell" or (slow and block.language == "bash"):
                    yield block, _run_shell(block.code), None
            except Exception as error:
                raise RuntimeError(f"{path}:{block.line}: {type(error).__name__}: {error}") from error
            namespace["__previous__"] = block.code


def _run_python(block: Block, path: str, namespace: dict[str, Any]) -> tuple[str, Any]:
    # Classes that are defined on a page have a source, as in a notebook.
    name = f"{Path(path).stem}.py"
    if not block.hidden:
        namespace["__lines__"] = lines = namespace.get("__lines__", "") + block.code
        linecache.cache[name] = (len(lines), None, lines.splitlines(keepends=True), name)
    start = namespace.get("__lines__", "").count("\n") - block.code.count("\n")
    tree = ast.parse("\n" * max(start, 0) + block.code, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), namespace)
        value = eval(compile(ast.Expression(last.value), name, "eval"), namespace) if last else None
    return printed.getvalue(), value


def _run_shell(code: str) -> str:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    # The command is run by this Python, also where its script is not installed beside it.
    script = f'skipscope() {{ "{sys.executable}" -m skipscope "$@"; }}\nset -e\n{code}'
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=environment, timeout=600
    )
    if done.returncode:
        raise RuntimeError(f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


# --- in Sphinx ---


def _shown(printed: str, value: Any) -> str:
    """What stands under a block, as MyST."""
    parts = []
    printed = "\n".join(_wrapped(line) for line in printed.split("\n"))
    if printed.strip():
        parts.append(f"``````{{code-block}} text\n:class: output\n{printed.rstrip()}\n``````\n")
    if hasattr(value, "_repr_html_"):
        html = value._repr_html_()
        parts.append(f'``````{{raw}} html\n<div class="cell-output">{html}</div>\n``````\n')
    elif value is not None:
        parts.append(f"``````{{code-block}} text\n:class: output\n{value!r}\n``````\n")
    return "".join(f"\n{part}" for part in parts)


def _wrapped(line: str) -> str:
    """A sentence in lines that fit the page; tables are narrower."""
    return line if len(line) <= 92 else textwrap.fill(line, 88, break_long_words=False)


def _insert_outputs(app: Any, name: str, content: list[str]) -> None:
    text = content[0]
    path = Path(app.env.doc2path(name))
    if path.suffix != ".md" or not app.config.snippets_run or missing_packages(text):
        return
    if not any(block.language in {"python", "shell"} for block in blocks(text)):
        return
    pieces, at = [], 0
    for block, printed, value in run_page(text, str(path)):
        pieces.append(text[at : block.end])
        if not block.hidden:
            pieces.append(_shown(printed, value))
        at = block.end
    content[0] = "".join([*pieces, text[at:]])


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    os.environ.setdefault("COLUMNS", "88")
    app.add_config_value("snippets_run", True, "env")
    app.connect("source-read", _insert_outputs)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
