"""Time how many threads a network should use, and whether several networks train faster side by side."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from skipscope._data import Objective
from skipscope._random import random_state_kept

# Copies of this process are made where they save at least this share of the time, and so many seconds.
_SAVED_SHARE, _SAVED_S = 0.2, 1.0


@dataclass(frozen=True)
class StepSeconds:
    """What one forward and backward pass takes.

    Attributes:
        alone: with one thread.
        together: with as many threads as there are.
    """

    alone: float
    together: float


@dataclass(frozen=True)
class Plan:
    """How several trainings share the processor.

    Attributes:
        copies: of this process, each with one thread; 1: everything is trained here.
        one_thread: whether one thread is enough here.
        patience: seconds without any answer after which copies are given up.
    """

    copies: int
    one_thread: bool
    patience: float

    @classmethod
    def fastest(cls, seconds: Sequence[StepSeconds], steps: int, at_a_time: int, workers: int) -> Plan:
        """Copies where they save enough time; else the threads that take less.

        Args:
            seconds: a step of each network; empty: not timed, nothing changes.
            steps: of each network, in all its runs.
            at_a_time: how many pieces of work do not wait for each other.
            workers: how many copies there may be.
        """
        alone = steps * sum(one.alone for one in seconds)
        together = steps * sum(one.together for one in seconds)
        one_thread = bool(seconds) and alone <= 1.1 * together
        here, copies = alone if one_thread else together, min(workers, at_a_time)
        saved = here - alone / max(copies, 1)
        if saved < max(_SAVED_S, _SAVED_SHARE * here):
            copies = 1
        return cls(copies, one_thread or copies > 1, 300.0 + 20 * alone)

    @contextmanager
    def threads(self) -> Iterator[None]:
        """The threads for what is trained here."""
        threads = torch.get_num_threads()
        if self.one_thread:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@contextmanager
def fitting_threads(model: nn.Module, loss: Objective, batch: Any) -> Iterator[None]:
    """One thread inside, if one forward and backward pass takes no longer with one than with all.

    The operations of small networks are over before a second thread has woken up; and when other work shares
    the machine, waiting for that thread costs many times the work itself (seen: 50 times).
    """
    with Plan.fastest([step_seconds(model, loss, batch)], 1, 1, 1).threads():
        yield


def step_seconds(model: nn.Module, loss: Objective, batch: Any) -> StepSeconds:
    """Time a forward and backward pass with all threads and with one."""
    threads = torch.get_num_threads()
    together = _seconds(model, loss, batch)
    if threads == 1:
        return StepSeconds(together, together)
    try:
        torch.set_num_threads(1)
        return StepSeconds(_seconds(model, loss, batch), together)
    finally:
        torch.set_num_threads(threads)


def _seconds(model: nn.Module, loss: Objective, batch: Any) -> float:
    """The least of three; the first pass pays for what happens only once."""
    times = []
    with random_state_kept(0):  # dropout draws
        for _ in range(4):
            start = time.perf_counter()
            loss(model, batch).backward()
            times.append(time.perf_counter() - start)
    model.zero_grad()
    return min(times[1:])
