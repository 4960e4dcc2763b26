"""A model copy that moves in place through weight space, w + a d1 + b d2; the user's model never moves.

The moving parameters are views into one flat buffer per dtype, so that a move takes one operation per axis,
however many layers there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skipscope._untouched import private_copy
from skipscope.surfaces.planes._directions import Direction, SeededDirection

# Views start at multiples of so many elements, because matrix kernels want aligned weights.
_ALIGN = 64


@dataclass
class _Flat:
    """Flat buffers of the moving parameters of one dtype: origin, directions, and the current weights."""

    names: list[str]
    origin: Tensor
    axes: list[Tensor]
    row: Tensor
    work: Tensor


class MovingCopy:
    """Deep copy of ``model`` whose weights can be moved to any point of the plane.

    Args:
        model: the user's model, in the mode for evaluation; it is only read.
        directions: one or more directions.
        prepare: changes the copy before it is used.
        channels_last: whether to store convolution weights in channels-last format.

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
        # Seeded directions are used if memory is short; then no flat buffers are held either.
        self._lean = any(isinstance(direction, SeededDirection) for direction in directions)
        self._origin = {name: p.detach() for name, p in model.named_parameters()} if self._lean else {}
        self._directions = directions
        self._flats = [] if self._lean else self._flatten(directions)
        self._at: tuple[float, ...] | None = None
        prepare(self.model)

    def at_work(self) -> AbstractContextManager[None]:
        """Context that does nothing: a private copy need not be restored."""
        return nullcontext()

    @property
    def names(self) -> set[str]:
        """Names of the parameters that move."""
        return {name for direction in self._directions for name in direction}

    @property
    def bytes(self) -> int:
        """Bytes written at every point."""
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
        """Move the weights to ``point`` (one coefficient per direction), and return the copy."""
        point = tuple(float(c) for c in point)
        with torch.no_grad():
            if self._lean:
                self._redraw(point)
            for flat in self._flats:
                # Summing in a fixed order gives a point the same bits, whichever point came before.
                if self._at is None or self._at[:-1] != point[:-1]:
                    flat.row.copy_(flat.origin)
                    for c, axis in zip(point[:-1], flat.axes):
                        if c:
                            flat.row.add_(axis, alpha=c)
                if point[-1]:
                    torch.add(flat.row, flat.axes[-1], alpha=point[-1], out=flat.work)
                else:
                    # w + 0 d is w, also where d is not finite.
                    flat.work.copy_(flat.row)
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
