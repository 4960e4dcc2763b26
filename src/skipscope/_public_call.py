"""Decorator of public calls: one thread at a time, and no interrupt while state is being restored.

``torch.no_grad``, hooks, random states and a model's own state are global to a process. Concurrent
measurements would see each other's changes, and a Ctrl-C during a restore would leave the state changed. So
threads take turns, and a SIGINT inside an ``__enter__`` or ``__exit__`` is held until that has returned.
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
from skipscope._torch_private import seen_by_modes, set_seen_by_modes

P = ParamSpec("P")
R = TypeVar("R")

# Lock held during every public call: a copy made during a measurement would carry its hooks and modes.
turn = threading.RLock()

# Seconds between checks for a Ctrl-C while a call waits for the lock, and before a held Ctrl-C is sent again.
_POLL_S = 0.05
_RESEND_S = 0.002
_HELD_IN = {"__enter__", "__exit__"}


def public_call(operation: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function as a public call; errors raised inside name ``operation``."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def enter_call(*given: P.args, **options: P.kwargs) -> R:
            with _Entry(operation):
                return function(*given, **options)

        return enter_call

    return decorate


class _Entry:
    """Context manager around a public call.

    It is a class because SIGINT is held in frames named ``__enter__`` and ``__exit__``.
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
            self.gradients, self.seen = torch.is_grad_enabled(), seen_by_modes()
            self.random = generator_states() if _interrupts.is_outermost() else None
        except BaseException:
            turn.release()
            _interrupts.end(deliver=False)
            raise

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            if error is not None:
                # A context manager that was interrupted on entry may not have been exited.
                torch.set_grad_enabled(self.gradients)
                set_seen_by_modes(self.seen)
                if self.random is not None:
                    set_generator_states(self.random)
            if isinstance(error, SkipscopeError):
                error.rename(self.operation)
        finally:
            turn.release()
            _interrupts.end(deliver=not isinstance(error, KeyboardInterrupt))


class _Interrupts:
    """SIGINT during public calls of the main thread: passed to the previous handler, or held briefly."""

    def __init__(self) -> None:
        self.depth, self.pending, self.closing = 0, False, False
        self.before: Any = None
        self.timer: threading.Timer | None = None

    def begin(self) -> None:
        """Enter a public call; the outermost call of the main thread installs the handler.

        The depth is increased last: a Ctrl-C before the handler is installed raises here, and must leave no
        state behind.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        if self.depth == 0:
            self.pending = self.closing = False
            before = signal.getsignal(signal.SIGINT)
            # A signal that is ignored, or handled outside of Python, is left alone.
            self.before = before if callable(before) else None
            if self.before is not None:
                signal.signal(signal.SIGINT, self._handle)
        self.depth += 1

    def is_outermost(self) -> bool:
        """Whether the current public call is not nested in another call of this thread."""
        return threading.current_thread() is not threading.main_thread() or self.depth == 1

    def end(self, deliver: bool) -> None:
        """Leave a public call; after the outermost call a held signal is delivered if ``deliver``."""
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
            # From here on a Ctrl-C may raise, even in this function.
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
            self.timer = threading.Timer(_RESEND_S, self._send_again)
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
    """Whether ``frame`` is in the entry of a public call, or enters or exits a context manager inside it."""
    if frame is not None and frame.f_code.co_name == _ENTRY:
        return True
    while frame is not None and frame.f_code.co_name != _ENTRY:
        if frame.f_code.co_name in _HELD_IN:
            return True
        frame = frame.f_back
    return False
