"""Validation of training arguments, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from skipscope._errors import SkipscopeError
from skipscope._validation import is_finite, is_integer


def require_whole(operation: str, least: int = 1, **values: Any) -> None:
    """Require integers of at least ``least``; None stands for a default."""
    for name, value in values.items():
        if value is not None and not is_integer(value, least):
            raise SkipscopeError(
                operation,
                f"{name} is out of range",
                expected=f"a whole number, at least {least}",
                got=repr(value)[:60],
                cure=f"{name}={least}, for the least",
            )


def require_size(operation: str, **values: Any) -> None:
    """Require finite, non-negative numbers; None stands for a default."""
    for name, value in values.items():
        if value is not None and not (is_finite(value) and value >= 0):
            raise SkipscopeError(
                operation,
                f"{name} is out of range",
                expected="a finite number, not negative",
                got=repr(value)[:60],
                cure=f"leave {name} out for the default",
            )


def seeds_of(operation: str, seeds: int | Sequence[int]) -> tuple[int, ...]:
    """The seeds given, or ``range(seeds)`` for a number."""
    if isinstance(seeds, int):
        require_whole(operation, seeds=seeds)
        return tuple(range(seeds))
    chosen = tuple(seeds)
    if not chosen or not all(is_integer(seed, -math.inf) for seed in chosen):
        raise SkipscopeError(
            operation,
            "seeds are a number of them, or the seeds themselves",
            expected="3, or [0, 1, 2]",
            got=repr(seeds)[:60],
            cure="seeds=3",
        )
    return chosen
