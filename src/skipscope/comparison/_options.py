"""What trainings are asked for: refused in words, before anything runs, where it cannot be done."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from skipscope._asked import is_finite, is_whole
from skipscope._errors import SkipscopeError


def require_whole(operation: str, least: int = 1, **values: Any) -> None:
    """Refuse what is no whole number from ``least`` on; None stands for a default."""
    for name, value in values.items():
        if value is not None and not is_whole(value, least):
            raise SkipscopeError(
                operation, f"{name} is out of range", expected=f"a whole number, at least {least}", got=repr(value)[:60],
                cure=f"{name}={least}, for the least",
            )  # fmt: skip


def require_size(operation: str, **values: Any) -> None:
    """Refuse what is negative, infinite or no number; None stands for a default."""
    for name, value in values.items():
        if value is not None and not (is_finite(value) and value >= 0):
            raise SkipscopeError(
                operation, f"{name} is out of range", expected="a finite number, not negative", got=repr(value)[:60],
                cure=f"leave {name} out for the default",
            )  # fmt: skip


def seeds_of(operation: str, seeds: int | Sequence[int]) -> tuple[int, ...]:
    """The seeds: so many from 0 on, or those given."""
    if isinstance(seeds, int):
        require_whole(operation, seeds=seeds)
        return tuple(range(seeds))
    chosen = tuple(seeds)
    if not chosen or not all(is_whole(seed, -math.inf) for seed in chosen):
        raise SkipscopeError(
            operation, "seeds are a number of them, or the seeds themselves", expected="3, or [0, 1, 2]",
            got=repr(seeds)[:60], cure="seeds=3",
        )  # fmt: skip
    return chosen


def rates_of(
    operation: str, optimizers: Any, known: Mapping[str, Sequence[float]]
) -> dict[str, tuple[float, ...]]:
    """The rates to try with each optimizer; ``known`` are those there are, with their defaults."""
    if optimizers is None:
        return {name: tuple(values) for name, values in known.items()}
    rates = {name: tuple(values) for name, values in dict(optimizers).items()}
    for name, values in rates.items():
        if name not in known:
            raise SkipscopeError(
                operation, "unknown optimizer", expected=" or ".join(f'"{one}"' for one in known), got=name,
                cure=f'optimizers={{"{next(iter(known))}": [0.1, 0.01]}}',
            )  # fmt: skip
        for rate in values:
            require_size(operation, **{f"a rate of {name}": rate})
    if not rates or not all(rates.values()):
        raise SkipscopeError(
            operation, "there is no rate to train with", expected='e.g. {"SGD": [0.1, 0.01]}', got=repr(optimizers)[:60],
            cure="leave optimizers out for the default",
        )  # fmt: skip
    return rates
