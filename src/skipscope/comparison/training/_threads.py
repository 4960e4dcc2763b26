"""Choose, by timing, the number of threads of a network and whether networks train faster side by side."""

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

# Worker processes are used if they save at least this share of the time and at least this many seconds.
_SAVED_SHARE, _SAVED_S = 0.2, 1.0


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of one forward and backward pass.

    Attributes:
        alone: seconds with one thread.
        together: seconds with all threads.
    """

    alone: float
    together: float


@dataclass(frozen=True)
class Plan:
    """Worker processes and threads of several trainings.

    Attributes:
        copies: number of worker processes, each with one thread; 1: this process trains everything.
        one_thread: whether this process should use one thread.
        patience: seconds without any answer after which workers are abandoned.
    """

    copies: int
    one_thread: bool
    patience: float

    @classmethod
    def fastest(cls, seconds: Sequence[StepSeconds], steps: int, at_a_time: int, workers: int) -> Plan:
        """Choose worker processes if they save enough time, otherwise the faster number of threads.

        Args:
            seconds: time of a step of each network; empty if not timed: nothing changes.
            steps: steps of each network over all its runs.
            at_a_time: number of tasks that can run at the same time.
            workers: most worker processes.
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
        """Set the number of threads for training in this process; restored on exit."""
        threads = torch.get_num_threads()
        if self.one_thread:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@contextmanager
def fitting_threads(model: nn.Module, loss: Objective, batch: Any) -> Iterator[None]:
    """Use one thread inside if a forward and backward pass is about as fast with one as with all.

    The operations of small networks end before a second thread has woken up. If other work shares the
    machine, waiting for that thread costs many times the work itself (50 times in one measurement).
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
    """Fastest of three passes, after a warm-up."""
    times = []
    # Dropout draws random numbers.
    with random_state_kept(0):
        for _ in range(4):
            start = time.perf_counter()
            loss(model, batch).backward()
            times.append(time.perf_counter() - start)
    model.zero_grad()
    return min(times[1:])
