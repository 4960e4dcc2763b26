"""The entry of every public call: one thread at a time, an interrupt never while something is restored.

``torch.no_grad``, hooks, random states and a model's own state are global to a process. Two measurements at a
time would read each other's; a Ctrl-C that comes while they are put back would leave them changed. So calls
of several threads take turns, and a SIGINT that comes inside an ``__enter__`` or ``__exit__`` is held until
that is over.
"""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import torch

from skipscope._errors import SkipscopeError
from skipscope._random import generator_states, set_generator_states

P = ParamSpec("P")
R = TypeVar("R")

# Held for the whole of a public call: a copy of a model under measurement would carry that call's hooks and
# modes.
turn = threading.RLock()

_POLL_S = 0.05  # how often a call that waits for its turn looks for a Ctrl-C
_AGAIN_S = 0.002  # after which a held Ctrl-C is tried again
_HELD_IN = {"__enter__", "__exit__"}


def public_call(operation: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function the entry of a public call; errors inside carry its name."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def enter_call(*given: P.args, **options: P.kwargs) -> R:
            with _Entry(operation):
                return function(*given, **options)

        return enter_call

    return decorate


class _Entry:
    """What surrounds one public call.

    A class: the frames of ``__enter__`` and ``__exit__`` are where SIGINT is held.
    """

    def __init__(self, operation: str):
        self.operation = operation

    def __enter__(self) -> None:
        _interrupts.begin()
        try:
            while not turn.acquire(timeout=_POLL_S):
                if _interrupts.pending:
                    raise KeyboardInterrupt
        except BaseException:
            _interrupts.end(deliver=False)
            raise
        try:
            self.gradients = torch.is_grad_enabled()
            self.random = generator_states() if _interrupts.is_outermost() else None
        except BaseException:
            turn.release()
            _interrupts.end(deliver=False)
            raise

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            if error is not None:
                # A context manager that was interrupted as it began may not have been left.
                torch.set_grad_enabled(self.gradients)
                if self.random is not None:
                    set_generator_states(self.random)
            if isinstance(error, SkipscopeError):
                error.rename(self.operation)
        finally:
            turn.release()
            _interrupts.end(deliver=not isinstance(error, KeyboardInterrupt))


class _Interrupts:
    """SIGINT during public calls of the main thread: passed on to the previous handler, or held briefly."""

    def __init__(self) -> None:
        self.depth, self.pending, self.closing = 0, False, False
        self.before: Any = None
        self.timer: threading.Timer | None = None

    def begin(self) -> None:
        """A public call begins; the outermost one of the main thread takes the signal over.

        Counted only afterwards: a Ctrl-C that comes before the handler is ours raises here, and must leave
        nothing behind.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        if self.depth == 0:
            self.pending = self.closing = False
            before = signal.getsignal(signal.SIGINT)
            self.before = before if callable(before) else None  # ignored, or not Python's: left alone
            if self.before is not None:
                signal.signal(signal.SIGINT, self._handle)
        self.depth += 1

    def is_outermost(self) -> bool:
        """Whether no public call of this thread is around."""
        return threading.current_thread() is not threading.main_thread() or self.depth == 1

    def end(self, deliver: bool) -> None:
        """A public call has ended; after the outermost one a signal that is still held is delivered."""
        if threading.current_thread() is not threading.main_thread():
            return
        self.depth -= 1
        if self.depth:
            return
        self.closing = True
        if self.timer is not None:
            self.timer.cancel()
            self.timer.join()
            self.timer = None
        if self.before is not None:
            # From here on a Ctrl-C may raise, also in this function.
            signal.signal(signal.SIGINT, self.before)
        if self.pending:
            self.pending = False
            if deliver:
                signal.raise_signal(signal.SIGINT)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.closing:
            self.pending = True
        elif _is_restoring(frame):
            self.pending = True
            self.timer = threading.Timer(_AGAIN_S, self._send_again)
            self.timer.daemon = True
            self.timer.start()
        else:
            self.pending = False
            self.before(number, frame)

    def _send_again(self) -> None:
        if self.pending and not self.closing:
            signal.raise_signal(signal.SIGINT)


_interrupts = _Interrupts()
_ENTRY = "enter_call"


def _is_restoring(frame: FrameType | None) -> bool:
    """Whether ``frame`` runs a public call's entry, or enters or exits a context manager in that call."""
    if frame is not None and frame.f_code.co_name == _ENTRY:
        return True
    while frame is not None and frame.f_code.co_name != _ENTRY:
        if frame.f_code.co_name in _HELD_IN:
            return True
        frame = frame.f_back
    return False
