"""A model copy that moves in place through weight space, w + a d1 + b d2; the user's model never moves.

The parameters that move are views into one flat buffer a dtype, so that going to a point costs one operation
along an axis, however many layers there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skipscope._untouched import private_copy
from skipscope.surfaces.planes._directions import Direction, SeededDirection

_ALIGN = 64  # elements; matrix kernels want aligned weights, and a view in the middle of a buffer need not be


@dataclass
class _Flat:
    """Moving parameters of one dtype: origin, directions, and the flat buffer of which they are views."""

    names: list[str]
    origin: Tensor
    axes: list[Tensor]
    row: Tensor
    work: Tensor


class MovingCopy:
    """A deep copy of ``model`` whose weights are at any point of the plane that is asked for.

    Args:
        model: the user's model, in the mode in which it is to be evaluated; it is only read.
        directions: one or more directions.
        prepare: changes the copy before it is used.
        channels_last: lay convolution weights out for channels-last inputs.

    Attributes:
        model: the copy.
    """

    def __init__(
        self,
        model: nn.Module,
        directions: Sequence[Direction],
        prepare: Callable[[nn.Module], object],
        *,
        channels_last: bool = False,
    ):
        self.model = private_copy(model, "landscape").requires_grad_(False)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Directions that are drawn again at every point did not fit; then nothing else is held either.
        self._lean = any(isinstance(direction, SeededDirection) for direction in directions)
        self._origin = {name: p.detach() for name, p in model.named_parameters()} if self._lean else {}
        self._directions = directions
        self._flats = [] if self._lean else self._flatten(directions)
        self._at: tuple[float, ...] | None = None
        prepare(self.model)

    def at_work(self) -> AbstractContextManager[None]:
        """The copy is ours: nothing is put back."""
        return nullcontext()

    @property
    def names(self) -> set[str]:
        """The parameters that move."""
        return {name for direction in self._directions for name in direction}

    @property
    def bytes(self) -> int:
        """What is written at every point."""
        if self._lean:
            return sum(p.numel() * p.element_size() for p in self._origin.values())
        return sum(2 * flat.work.numel() * flat.work.element_size() for flat in self._flats)

    def _flatten(self, directions: Sequence[Direction]) -> list[_Flat]:
        moved = self.names
        groups: dict[tuple[torch.dtype, torch.device], list[str]] = {}
        parameters = dict(self.model.named_parameters())
        for name, p in parameters.items():
            if name in moved:
                groups.setdefault((p.dtype, p.device), []).append(name)
        flats = []
        for (dtype, device), names in groups.items():
            starts, size = [], 0
            for name in names:
                starts.append(size)
                size += -(-parameters[name].numel() // _ALIGN) * _ALIGN
            origin, work, *axes = (
                torch.zeros(size, dtype=dtype, device=device) for _ in range(2 + len(directions))
            )
            for name, start in zip(names, starts):
                p = parameters[name]
                with torch.no_grad():
                    _view(origin, start, p).copy_(p)
                    for axis, direction in zip(axes, directions):
                        if name in direction:
                            _view(axis, start, p).copy_(direction[name])
                    p.data = _view(work, start, p)
            work.copy_(origin)
            flats.append(_Flat(names, origin, axes, origin.clone(), work))
        return flats

    def move(self, point: Sequence[float]) -> nn.Module:
        """Put the weights at ``point`` (one coefficient a direction), and return the copy."""
        point = tuple(float(c) for c in point)
        with torch.no_grad():
            if self._lean:
                self._redraw(point)
            for flat in self._flats:
                # The sum is built axis by axis in a fixed order, so that a point has the same bits on every
                # way to it.
                if self._at is None or self._at[:-1] != point[:-1]:
                    flat.row.copy_(flat.origin)
                    for c, axis in zip(point[:-1], flat.axes):
                        if c:
                            flat.row.add_(axis, alpha=c)
                if point[-1]:
                    torch.add(flat.row, flat.axes[-1], alpha=point[-1], out=flat.work)
                else:
                    flat.work.copy_(flat.row)  # w + 0 d is w, also where d is not finite
        self._at = point
        return self.model

    def _redraw(self, point: tuple[float, ...]) -> None:
        moved = dict.fromkeys(name for direction in self._directions for name in direction)
        parameters = dict(self.model.named_parameters())
        for name in moved:
            parameters[name].copy_(self._origin[name])
            for c, direction in zip(point, self._directions):
                if c and name in direction:
                    parameters[name].add_(direction[name], alpha=c)


def _view(flat: Tensor, start: int, like: Tensor) -> Tensor:
    piece = flat[start : start + like.numel()]
    if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous():
        o, i, h, w = like.shape
        return piece.view(o, h, w, i).permute(0, 3, 1, 2)
    return piece.view(like.shape)
