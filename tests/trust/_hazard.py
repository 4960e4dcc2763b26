"""A hazard: a way in which a measuring tool can betray its user, how it is tried, and a fault that must turn it red."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

# A generator may return what else there is to say.
Tries = Callable[[int], Iterable[str | None]]


class TimeIsUp(Exception):
    """Thrown into the tries when no more are wanted: what there is to say may be returned."""


@dataclass(frozen=True)
class Hazard:
    """One row of the table.

    Attributes:
        name: of the hazard.
        tried: what one try is, in words.
        tries: called with a number of tries; yields None for each that held, and what went wrong for each that did not.
        fault: a context manager inside which skipscope has this very fault: some tries must fail.
        full: number of tries of the whole run.
        few: number of tries that the fast tests run.
        needs: what it needs and why it is left out where that is missing. Empty: nothing is missing.
    """

    name: str
    tried: str
    tries: Tries
    fault: Callable[[], AbstractContextManager[Any]]
    full: int
    few: int
    needs: str = ""


@dataclass
class Row:
    """What came of one hazard: all counted in the run.

    Attributes:
        hazard: the name.
        tried: what one try is.
        count: number of tries.
        failures: what went wrong, one text a failed try.
        seconds: how long it took.
        skipped: why it was left out, or "".
        said: what else there is to say, or "".
    """

    hazard: str
    tried: str
    count: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    skipped: str = ""
    said: str = ""


def run(hazard: Hazard, count: int, seconds: float = float("inf")) -> Row:
    """Try a hazard ``count`` times, or as often as ``seconds`` allow.

    A try that raises has failed: nothing but what it expects may come.
    """
    row, begun = Row(hazard.name, hazard.tried, skipped=hazard.needs), time.monotonic()
    if hazard.needs:
        return row
    tries = iter(hazard.tries(count))
    while row.count < count and time.monotonic() - begun < seconds:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # what the functions themselves print
                failure = next(tries)
        except StopIteration as end:
            row.said = end.value or ""
            break
        except Exception as error:  # the generator has ended with it, and with it the row
            row.count += 1
            row.failures.append(f"raised {type(error).__name__}: {error}"[:300])
            break
        row.count += 1
        if failure is not None:
            row.failures.append(failure[:300])
    else:
        if isinstance(tries, Generator):
            with contextlib.suppress(TimeIsUp):
                try:
                    tries.throw(TimeIsUp)
                except StopIteration as end:
                    row.said = end.value or ""
    row.seconds = time.monotonic() - begun
    return row


@contextlib.contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Replace attributes or items of dictionaries inside, as a planted fault."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(
                mock.patch.dict(owner, {name: value})
                if isinstance(owner, dict)
                else mock.patch.object(owner, name, value)
            )
        yield


def attempt(call: Callable[[], Any], *expected: type[BaseException]) -> tuple[Any, BaseException | None]:
    """What a call returns, and what it raised of the kinds that are expected."""
    try:
        return call(), None
    except expected as error:
        return None, error
