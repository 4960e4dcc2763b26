"""Global random states of Python, NumPy and torch: saving, restoring and seeding."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch

from skipscope._errors import SkipscopeError

T = TypeVar("T")
State = tuple[Any, ...]


@contextmanager
def random_state_kept(seed: int | None = None) -> Iterator[None]:
    """Restore the global generators of Python, NumPy and torch on exit; with ``seed``, seed them first."""
    before = generator_states()
    try:
        if seed is not None:
            seed_generators(seed)
        yield
    finally:
        set_generator_states(before)


def drawn_apart(items: Iterable[T], seed: int | None = None) -> Iterator[T]:
    """Iterate with a separate random state, so that the global states do not change.

    Draws of the items (a DataLoader's order, an augmentation) continue from item to item. The separate state
    begins at ``seed``, or as a copy of the global states.
    """
    # Iterating over a list or tuple draws nothing.
    if isinstance(items, list | tuple):
        yield from items
        return
    theirs: State | None = None
    iterator: Iterator[T] | None = None
    while True:
        ours = generator_states()
        try:
            if theirs is not None:
                set_generator_states(theirs)
            elif seed is not None:
                seed_generators(seed)
            iterator = iter(items) if iterator is None else iterator
            item = next(iterator)
            theirs = generator_states()
        except StopIteration:
            return
        finally:
            set_generator_states(ours)
        yield item


def generators_moved(before: State) -> bool:
    """Whether a global generator has changed since :func:`generator_states` returned ``before``."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, tuple | list):
            return len(a) == len(b) and all(map(same, a, b))
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(np.all(a == b))

    return not same(before, generator_states())


# Relative tolerance between two passes over the same data.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}


def refuse_noise(operation: str, first: float, second: float, dtype: torch.dtype) -> None:
    """Refuse a loss that differs between two passes with the same weights, data and random states.

    Raises:
        SkipscopeError: the values differ by more than rounding in ``dtype``.
    """
    if first == second or not abs(first - second) > _ROUNDING.get(dtype, 2e-2) * max(abs(first), abs(second)):
        return
    raise SkipscopeError(
        operation,
        "the loss has two values at the same weights and data",
        expected=(
            "the same value in every pass: the global generators of torch, NumPy and Python are seeded before"
            " each"
        ),
        got=(
            f"{first:.9g}, then {second:.9g}: the model or the loss draws from a generator of its own, or"
            " keeps a state"
        ),
        cure=(
            "draw from a global generator, seed your own one in forward() or in the loss, or switch the"
            " noise off"
        ),
    )


def _has_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def generator_states() -> State:
    """The states of the global generators of Python, NumPy and torch."""
    devices = torch.cuda.get_rng_state_all() if _has_cuda() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), devices


def set_generator_states(state: State) -> None:
    """Set the global generators to states from :func:`generator_states`."""
    python, numpy, cpu, devices = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if devices is not None:
        torch.cuda.set_rng_state_all(devices)


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed costs milliseconds without CUDA, and keeps a stack trace of each call.
    torch.default_generator.manual_seed(seed)
    if _has_cuda():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
