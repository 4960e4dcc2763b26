"""One progress display, however deep the work is nested.

Work announces itself with :func:`track`; nothing is shown unless someone turned a display on with
:func:`progress` (the command line does). There is never more than one live display: a nested piece of work is a
second row of the first. Without a terminal each piece of work prints a line when it starts and when it ends.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
_display = None


class _Lines:
    """What a log file or a pipe gets: plain lines."""

    def __init__(self, file):
        self.file = file

    def start(self, what, total):
        print(f"{what} ({total} step{'s' * (total != 1)})" if total else what, file=self.file, flush=True)
        return what, time.perf_counter()

    def say(self, text):
        print(text, file=self.file, flush=True)

    def step(self, row, n):
        pass

    def end(self, row):
        what, start = row
        print(f"{what}: {time.perf_counter() - start:.1f} s", file=self.file, flush=True)

    def close(self):
        pass


class _Bars:
    """What a terminal gets: rich's bars, a row for each piece of work under way."""

    def __init__(self, file):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bars = Progress(
            TextColumn("{task.description:<38.38}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=Console(file=file),
            transient=True,
        )
        self.bars.start()

    def start(self, what, total):
        return self.bars.add_task(what, total=total)

    def say(self, text):
        self.bars.console.print(text, markup=False, highlight=False)

    def step(self, row, n):
        self.bars.advance(row, n)

    def end(self, row):
        self.bars.remove_task(row)

    def close(self):
        self.bars.stop()


@contextmanager
def progress(show: bool = True, *, file=None) -> Iterator[None]:
    """Show the progress of everything that runs inside.

    Bars on a terminal, plain lines elsewhere. Nested uses keep the first display. Local.

    Args:
        show: False is a way to say nothing without a second code path.
        file: where to; standard error by default, so that a command's output can be piped.

    Example:
        >>> with progress(show=False):
        ...     total = sum(track(range(3), "adding"))
    """
    global _display
    if not show or _display is not None:
        yield
        return
    file = file or sys.stderr
    _display = (_Bars if file.isatty() else _Lines)(file)
    try:
        yield
    finally:
        display, _display = _display, None
        display.close()


def say(text: str) -> None:
    """One line for whoever watches the progress: an estimate, what comes next."""
    if _display is not None:
        _display.say(text)


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Iterate over ``items``, showing how far it has come if a display is on."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    display = _display
    if display is None:
        yield from items
        return
    row = display.start(what, total)
    try:
        for item in items:
            yield item
            display.step(row, 1)
    finally:
        display.end(row)
