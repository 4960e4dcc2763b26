"""The global random states of Python, NumPy and torch: kept, seeded, and lent to what draws from them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")
State = tuple[Any, ...]


@contextmanager
def random_state_kept(seed: int | None = None) -> Iterator[None]:
    """Give Python's, NumPy's and torch's global generators back as they were; seed them first if asked."""
    before = _state()
    try:
        if seed is not None:
            _seed(seed)
        yield
    finally:
        _set(before)


def drawn_apart(items: Iterable[T], seed: int | None = None) -> Iterator[T]:
    """Iterate; what the items draw (a DataLoader its order, an augmentation) leaves the global states as they are.

    The items draw from a state of their own that goes on from each to the next. It begins at ``seed``, or where the
    global states are.
    """
    if isinstance(items, list | tuple):  # draws nothing
        yield from items
        return
    theirs: State | None = None
    iterator: Iterator[T] | None = None
    while True:
        ours = _state()
        try:
            if theirs is not None:
                _set(theirs)
            elif seed is not None:
                _seed(seed)
            iterator = iter(items) if iterator is None else iterator
            item = next(iterator)
            theirs = _state()
        except StopIteration:
            return
        finally:
            _set(ours)
        yield item


def _has_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _state() -> State:
    devices = torch.cuda.get_rng_state_all() if _has_cuda() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), devices


def _set(state: State) -> None:
    python, numpy, cpu, devices = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if devices is not None:
        torch.cuda.set_rng_state_all(devices)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed: without CUDA it costs milliseconds and keeps a stack trace of every call for good.
    torch.default_generator.manual_seed(seed)
    if _has_cuda():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
