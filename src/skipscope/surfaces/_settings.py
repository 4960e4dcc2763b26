"""What decides the numbers of a surface besides model, data and loss."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from skipscope._asked import is_finite, is_whole
from skipscope._data import Batch
from skipscope._errors import SkipscopeError
from skipscope.surfaces._planes import Plane
from skipscope.surfaces._points import Metric


def _are_directions(value: Any) -> bool:
    if isinstance(value, Plane):
        return True
    return isinstance(value, Sequence) and len(value) in {1, 2} and all(isinstance(d, Mapping) for d in value)


# What an option other than None must be; what needs the model to be judged is judged where it is used.
_EXPECTED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "directions": (_are_directions, "one or two dicts from parameter names to tensors, or a plane"),
    "strength": (lambda v: isinstance(v, list) and v, "at least one shortcut: ss.find_shortcuts(model, inputs)"),
    "metrics": (
        lambda v: isinstance(v, Mapping) and all(map(callable, v.values())), "name -> f(output, target)",
    ),
    "samples": (is_whole, "a whole number of samples, 1 or more"),
    "l2": (is_finite, "a finite number"),
    "tolerance": (lambda v: is_finite(v) and v > 0, "a share of the surface's range above zero: 0.01; or None"),
    "store": (lambda v: isinstance(v, str | os.PathLike), "a folder"),
    "weight": (callable, "f(batch) -> what the batch counts for"),
    "sample_loss": (callable, "f(output, target) -> [samples]"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The options of :func:`skipscope.landscape`, by the names and meanings they have there."""

    grid: int | Sequence[int] = 51
    span: Any = 1.0
    seed: Any = 0
    store: Any = None
    directions: Any = None
    strength: Any = None
    normalize: str = "filter"
    zero: Iterable[str] = ("biases", "norms")
    orthogonal: bool = False
    batch_norm: str = "frozen"
    samples: int | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    l2: float = 0.0
    tolerance: float | None = None
    strategy: str = "auto"
    precision: str | None = None
    engine: str = "auto"
    weight: Callable[[Batch], float] | None = None
    sample_loss: Callable[[Any, Any], Tensor] | None = None

    def __post_init__(self):
        if isinstance(self.strength, Iterable) and not isinstance(self.strength, str):
            object.__setattr__(self, "strength", list(self.strength))  # it is read more than once
        for name, (holds, words) in _EXPECTED.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise SkipscopeError(
                    "landscape", f"{name}= cannot be used", expected=words, got=repr(value)[:200]
                )

    @property
    def own_directions(self) -> Sequence[Any] | None:
        """The directions that were given, out of a plane or as they are."""
        return self.directions.directions if isinstance(self.directions, Plane) else self.directions

    @property
    def axis_count(self) -> int | None:
        """How many axes directions and strength make; None when the grid must say it."""
        own = self.own_directions
        return None if own is None else len(own) + (self.strength is not None)

    @property
    def zeroed(self) -> tuple[str, ...]:
        """What does not move, as a tuple."""
        return (self.zero,) if isinstance(self.zero, str) else tuple(self.zero)
