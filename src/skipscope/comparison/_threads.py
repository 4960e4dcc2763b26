"""How many threads a small network should have: timed, not guessed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from skipscope._data import Objective


@contextmanager
def fitting_threads(model: nn.Module, loss: Objective, batch: Any) -> Iterator[None]:
    """One thread inside, if one forward and backward pass takes no longer with one than with all.

    The operations of small networks are over before a second thread has woken up; and when other work shares
    the machine, waiting for that thread costs many times the work itself (seen: 50 times).
    """
    threads = torch.get_num_threads()
    try:
        if threads > 1:
            everyone = _seconds(model, loss, batch)
            torch.set_num_threads(1)
            if _seconds(model, loss, batch) > 1.1 * everyone:
                torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(threads)


def _seconds(model: nn.Module, loss: Objective, batch: Any) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        loss(model, batch).backward()
        times.append(time.perf_counter() - start)
    model.zero_grad()
    return statistics.median(times[1:])
