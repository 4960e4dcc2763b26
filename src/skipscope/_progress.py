"""A single progress display for all nested work.

Loops report progress with :func:`track`. At a terminal and in IPython a display appears automatically once a
call takes longer than two seconds; in a pipe or a log file nothing is shown. :func:`progress` turns a display
on or off explicitly. There is at most one live display: nested work adds a row to it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

from skipscope._printable import printable

Item = TypeVar("Item")
# Seconds before a display appears automatically.
_PATIENCE = 2.0
_display: Any = None
_silent = False


class _Lines:
    """Display for a log file or a pipe: plain lines."""

    def __init__(self, file: TextIO):
        self.file = file

    def start(self, what: str, total: int | None) -> Any:
        print(f"{what} ({total} step{'s' * (total != 1)})" if total else what, file=self.file, flush=True)
        return what, time.perf_counter()

    def say(self, text: str) -> None:
        print(text, file=self.file, flush=True)

    def step(self, row: Any, n: int) -> None:
        pass

    def end(self, row: Any) -> None:
        what, start = row
        print(f"{what}: {time.perf_counter() - start:.1f} s", file=self.file, flush=True)

    def close(self) -> None:
        pass


class _OneLine:
    """Display for a notebook: a single line, rewritten, with the progress of the innermost loop."""

    def __init__(self, file: TextIO):
        self.file = file
        self.rows: list[list[Any]] = []

    def start(self, what: str, total: int | None) -> Any:
        self.rows.append([what, total, 0])
        self._write()
        return self.rows[-1]

    def say(self, text: str) -> None:
        self.file.write(f"\r{text:<79.79}")
        self.file.flush()

    def step(self, row: Any, n: int) -> None:
        row[2] += n
        self._write()

    def end(self, row: Any) -> None:
        self.rows.remove(row)
        self._write()

    def close(self) -> None:
        self.say("")
        self.file.write("\r")

    def _write(self) -> None:
        if self.rows:
            what, total, done = self.rows[-1]
            self.say(f"{what}: {done} of {total}" if total else what)


class _Bars:
    """Display for a terminal: rich progress bars, a row for each active loop."""

    def __init__(self, file: TextIO):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bars = Progress(
            TextColumn("{task.description:<38.38}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=Console(file=file, force_jupyter=False),
            transient=True,
        )
        self.bars.start()

    def start(self, what: str, total: int | None) -> Any:
        return self.bars.add_task(what, total=total)

    def say(self, text: str) -> None:
        self.bars.console.print(text, markup=False, highlight=False)

    def step(self, row: Any, n: int) -> None:
        self.bars.advance(row, n)

    def end(self, row: Any) -> None:
        self.bars.remove_task(row)

    def close(self) -> None:
        self.bars.stop()


@contextmanager
def progress(show: bool = True, *, file: TextIO | None = None) -> Iterator[None]:
    """Show the progress of everything that runs inside, or with ``show=False`` nothing at all.

    Bars at a terminal, one rewritten line in a notebook, plain lines elsewhere. Nested uses keep the first
    display. Local.

    Args:
        show: False silences everything inside, even at a terminal.
        file: output stream; standard error by default, so that a command's output can be piped.

    Example:
        >>> with progress(show=False):
        ...     total = sum(track(range(3), "adding"))
    """
    global _display, _silent
    if not show:
        before, _silent = _silent, True
        try:
            yield
        finally:
            _silent = before
        return
    if _display is not None:
        yield
        return
    stream: Any = file or sys.stderr
    _display = _live(stream) or _Lines(stream)
    try:
        yield
    finally:
        display, _display = _display, None
        display.close()


def _live(file: TextIO) -> Any:
    """Make a display that rewrites itself. Returns None if ``file`` is a pipe or a log."""
    if file.isatty():
        return _Bars(file)
    return _OneLine(file) if _in_notebook() else None


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and hasattr(shell, "kernel")


def say(text: str) -> None:
    """Show a line of text in the progress display, if there is one."""
    if _display is not None and not _silent:
        _display.say(printable(text))


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Iterate over ``items`` and report progress to the display, which may appear automatically."""
    global _display
    # The text may hold a user's name.
    what = printable(what)
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    if _silent:
        yield from items
        return
    begun = time.perf_counter()
    own: Any = None
    row: Any = None
    if _display is not None:
        row = _display.start(what, total)
    try:
        for done, item in enumerate(items, 1):
            yield item
            if row is None and _display is None and time.perf_counter() - begun > _PATIENCE:
                if (own := _live(sys.stderr)) is None:
                    begun = float("inf")
                    continue
                _display = own
                row = own.start(what, total)
                own.step(row, done - 1)
            if row is not None and _display is not None:
                _display.step(row, 1)
    finally:
        if row is not None and _display is not None:
            _display.end(row)
        if own is not None:
            _display = None
            own.close()
