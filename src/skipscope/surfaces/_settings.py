"""What decides the numbers of a surface besides model, data and loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from skipscope._data import Batch
from skipscope.surfaces._planes import Plane
from skipscope.surfaces._points import Metric


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The options of :func:`skipscope.landscape`, by the names and meanings they have there."""

    grid: int | Sequence[int] = 51
    span: Any = 1.0
    seed: Any = 0
    subset_seed: int | None = None
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

    @property
    def drawn_by(self) -> int:
        """The seed that draws the subset of the data."""
        return self.seed if self.subset_seed is None else self.subset_seed

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
