"""Planes with a meaning: through two or three solutions, and the one a training trajectory lies in best.

A trajectory w_0 .. w_n seen from its end is the matrix M with rows w_t - w_n (arXiv 1712.09913, section 7). Its plane
passes through w_n and is spanned by M's first two right singular vectors; *explained* is each one's share of
sum_t |w_t - w_n|^2, and each checkpoint has a distance to the plane. A trajectory drawn on a contour without these two
may lie far from the surface it is drawn on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skipscope._errors import SkipscopeError
from skipscope._sharding import refuse_spread
from skipscope._untouched import require_numbers
from skipscope.surfaces._directions import Direction, inner


@dataclass(frozen=True, eq=False)
class Plane:
    """Directions with the places of known weights on them; goes where ``directions=`` is asked for.

    Attributes:
        directions: one or two, from the model's weights.
        axis_names: what they are.
        coordinates: of each known set of weights, [points, axes]; the model itself is the origin.
        distances: of each from the plane, as a share of its distance from the model, [points].
        explained: each direction's share of the squared distances from the model (see the module's head).
        weights: the known sets of weights, so that their own loss can be read.
        names: of the points.
    """

    directions: list[Direction]
    axis_names: tuple[str, ...]
    coordinates: np.ndarray
    distances: np.ndarray
    explained: tuple[float, ...]
    weights: list[dict[str, Tensor]] = field(repr=False)
    names: tuple[str, ...]

    def span(self, margin: float = 0.25) -> tuple[tuple[float, float], ...]:
        """A (low, high) for each axis that holds all points and the model, for ``span=``."""
        known = np.vstack([self.coordinates, np.zeros(len(self.directions))])
        low, high = known.min(0), known.max(0)
        room = margin * np.maximum(high - low, 1e-12)
        return tuple((float(a), float(b)) for a, b in zip(low - room, high + room))


def solutions_plane(model: nn.Module, *others: Any) -> Plane:
    """The line through two solutions, or the plane through three.

    The first direction goes from ``model`` to the first of ``others``, which lies at (1,) or (1, 0). The second is
    the part of the way to the other one that is orthogonal to the first, as long as the first, so that the picture's
    angles and lengths are those of weight space. Local.

    Args:
        model: the origin.
        others: one or two more: modules, or state dicts.

    Raises:
        SkipscopeError: no or too many others, other parameters, or points that lie on one line.

    Example:
        >>> a, b = nn.Linear(3, 1), nn.Linear(3, 1)
        >>> plane = solutions_plane(a, b)
        >>> plane.coordinates.tolist()
        [[1.0]]
    """
    refuse_spread(model, "solutions_plane")
    if len(others) not in {1, 2}:
        raise SkipscopeError(
            "solutions_plane", "a line or a plane", expected="one or two other solutions", got=len(others)
        )
    steps = [_step(model, other, "solutions_plane") for other in others]
    directions = [steps[0]]
    length = inner(steps[0], steps[0]) ** 0.5
    if len(steps) == 2 and length:
        along = inner(steps[1], steps[0]) / length**2
        rest = {name: steps[1][name] - along * steps[0][name] for name in steps[1]}
        height = inner(rest, rest) ** 0.5
        if height > 1e-9 * length:
            directions.append({name: t * (length / height) for name, t in rest.items()})
    if not length or len(directions) < len(steps):
        raise SkipscopeError(
            "solutions_plane", "the solutions do not span a plane" if length else "two solutions are the same",
            expected="solutions that differ, not all on one line",
        )  # fmt: skip
    names = ("from solution 1 to 2", "towards solution 3")[: len(directions)]
    return _placed(model, directions, steps, names, tuple(f"solution {i + 2}" for i in range(len(steps))))


def trajectory_plane(model: nn.Module, checkpoints: Sequence[Any]) -> Plane:
    """The plane through ``model`` in which its training trajectory lies best, with what it leaves out.

    Local.

    Args:
        model: the end of training: the origin.
        checkpoints: modules or state dicts, in order.

    Raises:
        SkipscopeError: fewer than two checkpoints that differ from the model, or other parameters.

    Example:
        >>> end = nn.Linear(3, 1)
        >>> way = [nn.Linear(3, 1) for _ in range(4)]
        >>> plane = trajectory_plane(end, way)
        >>> len(plane.explained), plane.coordinates.shape
        (2, (4, 2))
    """
    refuse_spread(model, "trajectory_plane")
    steps = [_step(model, checkpoint, "trajectory_plane") for checkpoint in checkpoints]
    gram = np.array([[inner(a, b) for b in steps] for a in steps]).reshape(len(steps), len(steps))
    sizes, vectors = np.linalg.eigh(gram) if len(steps) else (np.zeros(0), np.zeros((0, 0)))
    if len(steps) < 2 or sizes[-2] <= 1e-12 * max(sizes[-1], 1e-300):
        raise SkipscopeError(
            "trajectory_plane", "the checkpoints do not span a plane", expected="two checkpoints or more, apart from the model",
            got=f"{len(steps)} checkpoints",
        )  # fmt: skip
    directions = []
    for k in (-1, -2):
        mix = vectors[:, k] / np.sqrt(sizes[k])
        # The sign of a singular vector is arbitrary: the first checkpoint gets positive coordinates.
        mix = -mix if mix @ gram[:, 0] < 0 else mix
        directions.append(
            {n: torch.stack([float(c) * s[n] for c, s in zip(mix, steps)]).sum(0) for n in steps[0]}
        )
    explained = tuple(float(sizes[k] / sizes.sum()) for k in (-1, -2))
    names = tuple(f"PCA {i + 1} ({share:.0%} of the way)" for i, share in enumerate(explained))
    points = tuple(f"checkpoint {i}" for i in range(len(steps)))
    return _placed(model, directions, steps, names, points, explained)


def _step(model: nn.Module, other: Any, operation: str) -> Direction:
    """Other weights less the model's, in float64."""
    require_numbers(model, operation)
    here = {name: p.detach() for name, p in model.named_parameters()}
    there = dict(other.named_parameters()) if isinstance(other, nn.Module) else other
    if not isinstance(there, Mapping) or any(
        n not in there or there[n].shape != p.shape for n, p in here.items()
    ):
        raise SkipscopeError(
            operation, "these weights are not the model's", expected="a module of the same architecture, or its state dict",
            got=type(other).__name__,
        )  # fmt: skip
    return {name: there[name].detach().to(p.device, torch.float64) - p.double() for name, p in here.items()}


def _placed(
    model: nn.Module,
    directions: list[Direction],
    steps: list[Direction],
    axis_names: tuple[str, ...],
    names: tuple[str, ...],
    explained: tuple[float, ...] | None = None,
) -> Plane:
    square = np.array([inner(d, d) for d in directions])
    coordinates = (
        np.array([[inner(step, d) for d in directions] for step in steps]) / square
    )  # orthogonal directions
    lengths = np.array([inner(step, step) for step in steps])
    inside = (coordinates**2 * square).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        distances = np.where(lengths > 0, np.sqrt(np.clip(1 - inside / lengths, 0, None)), 0.0)
    if explained is None:
        explained = tuple(float(x) for x in (coordinates**2 * square).sum(0) / lengths.sum())
    here = {name: p.detach() for name, p in model.named_parameters()}
    weights = [{n: (here[n].double() + step[n]).to(here[n].dtype) for n in here} for step in steps]
    return Plane(directions, axis_names, coordinates, distances, explained, weights, names)
