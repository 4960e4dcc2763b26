"""Settings of a surface: everything but model, data and loss."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from torch import Tensor

from skipscope._data import Batch
from skipscope._errors import SkipscopeError
from skipscope._option_words import BatchNorm, Engine, Normalization, Precision, Zeroable
from skipscope._validation import is_finite, is_integer
from skipscope.surfaces.evaluation._point_loss import Metric
from skipscope.surfaces.planes._plane import Plane


def _are_directions(value: Any) -> bool:
    if isinstance(value, Plane):
        return True
    return isinstance(value, Sequence) and len(value) in {1, 2} and all(isinstance(d, Mapping) for d in value)


# Checks of options that are not None. Checks that need the model are made where the option is used.
_EXPECTED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "directions": (_are_directions, "one or two dicts from parameter names to tensors, or a plane"),
    "strength": (
        lambda v: isinstance(v, list) and v,
        "at least one shortcut: ss.find_shortcuts(model, inputs)",
    ),
    "metrics": (
        lambda v: isinstance(v, Mapping) and all(map(callable, v.values())),
        "name -> f(output, target)",
    ),
    "parameters": (
        lambda v: (
            isinstance(v, str) or (isinstance(v, list) and v and all(isinstance(name, str) for name in v))
        ),
        'parameter names or patterns: ["layer1.*"]',
    ),
    "samples": (is_integer, "a whole number of samples, 1 or more"),
    "l2": (is_finite, "a finite number"),
    "tolerance": (
        lambda v: is_finite(v) and v > 0,
        "a share of the surface's range above zero: 0.01; or None",
    ),
    "store": (lambda v: isinstance(v, str | os.PathLike), "a folder"),
    "weight": (callable, "f(batch) -> what the batch counts for"),
    "sample_loss": (callable, "f(output, target) -> [samples]"),
}


class Options(TypedDict, total=False):
    """Options of :func:`skipscope.landscape` and :func:`skipscope.paired_landscapes`, for type checkers."""

    grid: int | Sequence[int]
    span: Any
    store: str | os.PathLike[str] | None
    directions: Sequence[Any] | Plane | None
    normalize: Normalization
    zero: Zeroable | Iterable[Zeroable]
    parameters: str | Iterable[str] | None
    orthogonal: bool
    batch_norm: BatchNorm
    samples: int | None
    metrics: Mapping[str, Metric] | None
    l2: float
    tolerance: float | None
    strategy: str
    precision: Precision | None
    engine: Engine
    weight: Callable[[Batch], float] | None
    sample_loss: Callable[[Any, Any], Tensor] | None


class OneModelOptions(Options, total=False):
    """The options of :func:`skipscope.landscape` alone."""

    strength: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Options of :func:`skipscope.landscape` with their defaults."""

    grid: int | Sequence[int] = 51
    span: Any = 1.0
    seed: Any = 0
    store: Any = None
    directions: Any = None
    strength: Any = None
    normalize: Normalization = "filter"
    zero: Zeroable | Iterable[Zeroable] = ("biases", "norms")
    parameters: Any = None
    orthogonal: bool = False
    batch_norm: BatchNorm = "frozen"
    samples: int | None = None
    metrics: Any = None
    l2: float = 0.0
    tolerance: float | None = None
    strategy: str = "auto"
    precision: Precision | None = None
    engine: Engine = "auto"
    weight: Callable[[Batch], float] | None = None
    sample_loss: Callable[[Any, Any], Tensor] | None = None

    @classmethod
    def of(cls, call: str, allowed: type[Options], seed: Any, options: Mapping[str, Any]) -> Settings:
        """Build the settings from a call's options.

        Raises:
            TypeError: ``allowed`` has no such option; the message suggests the closest name.
            SkipscopeError: an option cannot be used.
        """
        for name in options:
            if name not in allowed.__annotations__:
                near = difflib.get_close_matches(name, allowed.__annotations__, 1)
                hint = f". Did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"{call}() got an unexpected keyword argument {name!r}{hint}")
        return cls(seed=seed, **options)

    def __post_init__(self):
        # These are read more than once, so an iterator must become a list.
        for name in ("strength", "parameters"):
            value = getattr(self, name)
            if isinstance(value, Iterable) and not isinstance(value, str):
                object.__setattr__(self, name, list(value))
        for name, (holds, words) in _EXPECTED.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise SkipscopeError(
                    "landscape", f"{name}= cannot be used", expected=words, got=repr(value)[:200]
                )
        if self.parameters is not None and self.directions is not None:
            raise SkipscopeError(
                "landscape",
                "parameters= chooses what a random direction moves, and directions were given",
                expected="one of the two",
                cure="leave the other parameters out of the directions",
            )

    @property
    def own_directions(self) -> Sequence[Any] | None:
        """The user's directions, taken from a plane or as given; None for random ones."""
        return self.directions.directions if isinstance(self.directions, Plane) else self.directions

    @property
    def axis_count(self) -> int | None:
        """Number of axes from directions and strength; None if the grid determines it."""
        own = self.own_directions
        return None if own is None else len(own) + (self.strength is not None)

    @property
    def zeroed(self) -> tuple[Zeroable, ...]:
        """Kinds of parameters that do not move, as a tuple."""
        return (self.zero,) if isinstance(self.zero, str) else tuple(self.zero)


def with_signature(allowed: type[Options]) -> Callable[[Any], Any]:
    """Give a call with ``seed`` and ``**options`` a signature that lists each option, for ``help()``."""

    def decorate(function: Any) -> Any:
        own = inspect.signature(function)
        kept = [p for p in own.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        named = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in fields(Settings)
            if f.name == "seed" or f.name in allowed.__annotations__
        ]
        function.__signature__ = own.replace(parameters=[*kept, *named])
        return function

    return decorate
