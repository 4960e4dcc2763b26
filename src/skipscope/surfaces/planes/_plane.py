"""Planes through two or three solutions, and the plane closest to a training trajectory.

A trajectory w_0 .. w_n seen from its end is the matrix M with rows w_t - w_n (arXiv 1712.09913, section 7).
Its plane passes through w_n and is spanned by M's first two right singular vectors; *explained* is the share
of each in sum_t |w_t - w_n|^2, and each checkpoint has a distance to the plane. Without both numbers, a
trajectory may lie far from the surface it is drawn on, and nobody sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skipscope._errors import SkipscopeError
from skipscope._public_call import public_call
from skipscope._sharding import refuse_spread
from skipscope._untouched import require_numbers
from skipscope.surfaces.planes._directions import Direction, as_real, inner

# Largest number of values read at once.
_PART = 2**22


@dataclass(frozen=True, eq=False)
class Plane:
    """Directions with the coordinates of known weights; pass it as ``directions=``.

    Attributes:
        directions: one or two directions from the model's weights.
        axis_names: names of the axes.
        coordinates: coordinates of each known point, [points, axes]; the model itself is the origin.
        distances: distance of each point from the plane, as a share of its distance from the model, [points].
        explained: each direction's share of the squared distances from the model.
        weights: the known weights (and buffers) as given, to compute their own loss.
        names: names of the points.

    Example:
        >>> import torch, skipscope as ss
        >>> model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        >>> plane = ss.solutions_plane(model, other)
        >>> len(plane.directions), list(plane.directions[0])
        (1, ['weight', 'bias'])
    """

    directions: list[Direction]
    axis_names: tuple[str, ...]
    coordinates: np.ndarray
    distances: np.ndarray
    explained: tuple[float, ...]
    weights: list[dict[str, Tensor]] = field(repr=False)
    names: tuple[str, ...]

    def span(self, margin: float = 0.25) -> tuple[tuple[float, float], ...]:
        """(low, high) per axis that contains all points and the model, for ``span=``."""
        known = np.vstack([self.coordinates, np.zeros(len(self.directions))])
        low, high = known.min(0), known.max(0)
        room = margin * np.maximum(high - low, 1e-12)
        return tuple((float(a), float(b)) for a, b in zip(low - room, high + room))


@public_call("solutions_plane")
def solutions_plane(model: nn.Module, *others: Any) -> Plane:
    """The line through two solutions, or the plane through three.

    The first direction goes from ``model`` to the first of ``others``, which is at (1,) or (1, 0). The second
    is the orthogonal part of the difference to the other solution, scaled to the first one's length, so that
    angles and lengths in the picture are those of weight space. Local.

    Args:
        model: the origin.
        others: one or two more solutions, as modules or state dicts.

    Raises:
        SkipscopeError: the number of others is wrong, parameters differ, or all points lie on one line.

    Example:
        >>> a, b = nn.Linear(3, 1), nn.Linear(3, 1)
        >>> plane = solutions_plane(a, b)
        >>> plane.coordinates.tolist()
        [[1.0]]
    """
    if len(others) not in {1, 2}:
        raise SkipscopeError(
            "solutions_plane",
            "the number of solutions is wrong",
            expected="one or two other solutions",
            got=len(others),
        )
    differences = _WeightDifferences(model, others, "solutions_plane")
    steps = differences.mixed(np.eye(len(others)))
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
            "solutions_plane",
            "the solutions do not span a plane" if length else "two solutions are the same",
            expected="solutions that differ, not all on one line",
        )
    names = ("from solution 1 to 2", "towards solution 3")[: len(directions)]
    square = np.array([inner(d, d) for d in directions])
    coordinates = np.array([[inner(step, d) for d in directions] for step in steps]) / square
    lengths = np.array([inner(step, step) for step in steps])
    explained = tuple(float(x) for x in (coordinates**2 * square).sum(0) / lengths.sum())
    distances = _distances(coordinates, square, lengths)
    points = tuple(f"solution {i + 2}" for i in range(len(steps)))
    return Plane(directions, names, coordinates, distances, explained, differences.others, points)


@public_call("trajectory_plane")
def trajectory_plane(model: nn.Module, checkpoints: Sequence[Any]) -> Plane:
    """The plane through ``model`` closest to its training trajectory, with each checkpoint's distance.

    Checkpoints are read a few columns at a time. Besides them this needs two directions and some tens of MiB,
    however many there are; checkpoints loaded by ``torch.load(path, mmap=True)`` stay on disk. Local.

    Args:
        model: the end of training, which becomes the origin.
        checkpoints: modules or state dicts, in order; they are kept, for their own losses.

    Raises:
        SkipscopeError: fewer than two checkpoints differ from the model, parameters differ, or a weight is
            not finite.

    Example:
        >>> end = nn.Linear(3, 1)
        >>> checkpoints = [nn.Linear(3, 1) for _ in range(4)]
        >>> plane = trajectory_plane(end, checkpoints)
        >>> len(plane.explained), plane.coordinates.shape
        (2, (4, 2))
    """
    from scipy.linalg import eigh

    differences = _WeightDifferences(model, checkpoints, "trajectory_plane")
    count, gram = len(differences.others), differences.gram()
    lengths = np.diagonal(gram)
    if not np.isfinite(gram).all():
        raise SkipscopeError(
            "trajectory_plane",
            "a checkpoint's weights are not finite",
            expected="finite weights",
            got=f"checkpoint {int(np.argmin(np.isfinite(lengths)))}",
            cure="leave it out",
        )
    sizes, vectors = eigh(gram, subset_by_index=[count - 2, count - 1]) if count > 1 else (np.zeros(2),) * 2
    if sizes[0] <= 1e-12 * max(sizes[1], 1e-300):
        raise SkipscopeError(
            "trajectory_plane",
            "the checkpoints do not span a plane",
            expected="two checkpoints or more, apart from the model",
            got=f"{count} checkpoints",
        )
    mixes = (vectors / np.sqrt(sizes)).T[::-1]
    # The sign of a singular vector is arbitrary; this choice gives the first checkpoint positive coordinates.
    mixes = mixes * np.where(mixes @ gram[:, :1] < 0, -1, 1)
    # M v = G c for v = M^T c, and v has length 1.
    coordinates, square = gram @ mixes.T, np.ones(2)
    explained = tuple(float(size / lengths.sum()) for size in sizes[::-1])
    names = tuple(f"PCA {i + 1} ({share:.0%} of the way)" for i, share in enumerate(explained))
    points = tuple(f"checkpoint {i}" for i in range(count))
    distances = _distances(coordinates, square, lengths)
    return Plane(
        differences.mixed(mixes), names, coordinates, distances, explained, differences.others, points
    )


class _WeightDifferences:
    """Matrix M of weight differences to the model, one row per set of weights, read in blocks of columns.

    Args:
        model: the origin.
        others: modules or state dicts.
        operation: public call named in errors.

    Attributes:
        others: each row's tensors by name, as given.
    """

    def __init__(self, model: nn.Module, others: Sequence[Any], operation: str):
        refuse_spread(model, operation)
        require_numbers(model, operation)
        own = {name: p.detach() for name, p in model.named_parameters()}
        self.complex = {name for name, p in own.items() if p.is_complex()}
        self.others = [_checked(other, own, operation) for other in others]
        self.base = {name: as_real(p) for name, p in own.items()}

    def _parts(self) -> Iterator[tuple[str, int, int, Tensor]]:
        """Yield (name, dimension, start, a block of M's columns in float64 [others, *shape])."""
        for name, p in self.base.items():
            if not p.numel():
                continue
            p = p.reshape(1) if p.ndim == 0 else p
            longest = max(range(p.ndim), key=lambda k: p.shape[k])
            size = max(1, _PART // (max(1, len(self.others)) * p.numel() // p.shape[longest]))
            for start in range(0, p.shape[longest], size):
                length = min(size, p.shape[longest] - start)
                base = p.narrow(longest, start, length).double()
                rows = (as_real(o[name]).reshape(p.shape).narrow(longest, start, length) for o in self.others)
                yield name, longest, start, torch.stack([r.to(p.device, torch.float64) - base for r in rows])

    def gram(self) -> np.ndarray:
        """Compute M M^T, [others, others]."""
        total = torch.zeros(len(self.others), len(self.others), dtype=torch.float64)
        for *_, part in self._parts():
            part = part.flatten(1)
            total += (part @ part.T).cpu()
        return total.numpy()

    def mixed(self, mixes: np.ndarray) -> list[Direction]:
        """Compute ``mixes`` [directions, others] times M, each direction as tensors by name."""
        out: list[dict[str, Tensor]] = [
            {n: torch.zeros(p.shape, dtype=torch.float64, device=p.device) for n, p in self.base.items()}
            for _ in mixes
        ]
        for name, dimension, start, part in self._parts():
            mix = torch.from_numpy(np.array(mixes)).to(part.device)
            found = torch.tensordot(mix, part, 1)
            for direction, piece in zip(out, found):
                whole = direction[name].reshape(-1) if direction[name].ndim == 0 else direction[name]
                whole.narrow(dimension, start, piece.shape[dimension]).copy_(piece)
        return [
            {n: torch.view_as_complex(t) if n in self.complex else t for n, t in direction.items()}
            for direction in out
        ]


def _checked(other: Any, own: Mapping[str, Tensor], operation: str) -> dict[str, Tensor]:
    if isinstance(other, nn.Module):
        other = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    if not isinstance(other, Mapping) or any(
        n not in other or other[n].shape != p.shape or other[n].is_complex() != p.is_complex()
        for n, p in own.items()
    ):
        raise SkipscopeError(
            operation,
            "these weights are not the model's",
            expected="a module of the same architecture, or its state dict",
            got=type(other).__name__,
        )
    return {n: t.detach() for n, t in other.items() if isinstance(t, Tensor)}


def _distances(coordinates: np.ndarray, square: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Distance of each point from the plane, as a share of its distance from the origin, [points].

    The directions are orthogonal.
    """
    inside = (coordinates**2 * square).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(lengths > 0, np.sqrt(np.clip(1 - inside / lengths, 0, None)), 0.0)
