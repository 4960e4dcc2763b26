"""Forked copies of this process that compute in parallel, one thread each, like a DataLoader's workers.

A fork inherits models, data and losses that need not be picklable; only questions and answers go through a
pipe. It needs Linux and tensors in host memory. A copy dies with the process that forked it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

# Questions per copy: the current one and the next, so that it need not wait.
_AHEAD = 2
CAN_FORK = sys.platform == "linux"

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Lost(Exception):
    """The copies cannot answer: all are dead, none answers in time, or a question raised an error."""


class Forked(Generic[Question, Answer]):
    """Pool of forked copies of this process that answer questions.

    Args:
        compute: question -> answer, called in a copy; both are pickled.
        count: number of copies.
        patience: timeout in seconds; after two timeouts without any answer the copies are given up.
    """

    def __init__(self, compute: Callable[[Question], Answer], count: int, patience: float):
        self.compute, self.patience, self._copies = compute, patience, {}
        context = multiprocessing.get_context("fork")
        # Only this process stops a copy: the copy inherits the blocked SIGINT.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(compute, theirs, [ours, *self._copies]), daemon=True
                )
                with theirs, warnings.catch_warnings():
                    # Python 3.12 warns about forking beside threads; `patience` handles copies that hang.
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process.start()
                self._copies[ours] = process
        except BaseException:
            self.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)

    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer the questions, in order.

        Raises:
            Lost: as :meth:`answers`.
        """
        found = dict(self.answers(questions))
        return [found[i] for i in range(len(questions))]

    def surely(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Like :meth:`answers`, but compute here what the copies cannot answer.

        One thread is used, for the same result bit for bit.

        Raises:
            Exception: what ``compute`` raises.
        """
        left = dict(enumerate(questions))
        try:
            for i, answer in self.answers(questions):
                del left[i]
                yield i, answer
        # If ``compute`` itself failed, it raises its error here.
        except Lost:
            for i, question in left.items():
                with one_thread():
                    answer = self.compute(question)
                yield i, answer

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Yield (question number, answer) as they arrive; questions of a copy that dies go to the others.

        Raises:
            Lost: no more answers will come; the copies are closed.
        """
        left, missing = deque(range(len(questions))), len(questions)
        asked: dict[Any, deque[int]] = {pipe: deque() for pipe in self._copies}
        try:
            while missing:
                # Every copy gets a first question before any copy gets a second.
                for ahead in range(1, _AHEAD + 1):
                    for pipe in list(asked):
                        if not _ask(pipe, asked[pipe], ahead, left, questions):
                            self._drop_copy(pipe, asked, left)
                if not asked:
                    raise Lost("no copy is left")
                busy = [pipe for pipe, own in asked.items() if own]
                # The last questions belonged to a copy that has just died.
                if not busy:
                    continue
                # Wait twice: when a stopped process (Ctrl-Z) resumes, its first wait has timed out.
                ready = wait(busy, self.patience) or wait(busy, self.patience)
                if not ready:
                    raise Lost("the copies are silent")
                for pipe in ready:
                    try:
                        holds, answer = pipe.recv()  # type: ignore[union-attr]
                    except (EOFError, OSError):
                        self._drop_copy(pipe, asked, left)
                        continue
                    if not holds:
                        raise Lost(answer)
                    missing -= 1
                    yield asked[pipe].popleft(), answer
        except BaseException:
            # The pipes may hold answers that nobody will read.
            self.close()
            raise

    def _drop_copy(self, pipe: Any, asked: dict[Any, deque[int]], left: deque[int]) -> None:
        left.extendleft(reversed(asked.pop(pipe)))
        self._end(pipe)

    def _end(self, pipe: Any) -> None:
        process = self._copies.pop(pipe)
        # A copy holds nothing that needs an orderly shutdown.
        process.kill()
        process.join()
        pipe.close()

    def close(self) -> None:
        """Kill the copies."""
        for pipe in list(self._copies):
            self._end(pipe)


def _ask(pipe: Any, own: deque[int], ahead: int, left: deque[int], questions: Sequence[Any]) -> bool:
    """Send a copy questions until it has ``ahead`` of them. Returns False if it is dead."""
    while left and len(own) < ahead:
        own.append(left.popleft())
        try:
            pipe.send(questions[own[-1]])
        except OSError:
            return False
    return True


def _serve(compute: Callable[[Any], Any], pipe: Any, inherited: list[Any]) -> None:
    # A parent's end of a pipe that stayed open here would hide the parent's death.
    for other in inherited:
        other.close()
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):
        while True:
            question = pipe.recv()
            try:
                answer = True, compute(question)
            except Exception as error:
                answer = False, f"{type(error).__name__}: {error}"
            pipe.send(answer)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Context with one torch thread, as in a copy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measured_in_a_copy(
    compute: Callable[[Question], Answer], question: Question, patience: float
) -> tuple[int, float, Answer]:
    """Answer one question in a copy. Returns the peak of allocated bytes, the seconds and the answer.

    Raises:
        Lost: the copy cannot answer.
    """

    def measured(question: Question) -> tuple[int, float, Answer]:
        before, began = _address_space("VmSize"), time.perf_counter()
        answer = compute(question)
        seconds = time.perf_counter() - began
        return _address_space("VmPeak") - before, seconds, answer

    alone: Forked[Question, tuple[int, float, Answer]] = Forked(measured, 1, patience)
    try:
        return alone([question])[0]
    finally:
        alone.close()


def _address_space(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
