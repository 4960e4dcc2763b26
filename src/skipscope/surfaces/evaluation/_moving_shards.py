"""A model under FSDP2 that moves through weight space: each rank moves its own shards, in place.

A sharded model cannot be copied, and need not fit on one device. So the user's own shards are moved inside
:meth:`MovingShards.at_work` and restored at its end. Each rank holds a second set of its shards, and its part
of each direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from skipscope._ranks import local
from skipscope._sharding import ForwardSteps, units
from skipscope._untouched import untouched
from skipscope.surfaces.planes._directions import Direction


class MovingShards:
    """Move a sharded model to points of the plane.

    Args:
        model: the user's model, in the mode for evaluation.
        directions: one or more directions, sharded like the weights.
        prepare: changes the model, except its weights, inside :meth:`at_work`.

    Attributes:
        model: the user's model.
        steps: steps of its forward pass.
    """

    def __init__(
        self, model: nn.Module, directions: Sequence[Direction], prepare: Callable[[nn.Module], object]
    ):
        self.model, self.prepare, self._working = model, prepare, False
        self.steps = ForwardSteps(model)
        self._reshard()
        self.names = {name for direction in directions for name in direction}
        self._shards = {n: local(p.detach()) for n, p in model.named_parameters() if n in self.names}
        self._origin = {name: shard.clone() for name, shard in self._shards.items()}
        self._axes = [{name: local(tensor) for name, tensor in d.items()} for d in directions]

    @property
    def bytes(self) -> int:
        """Bytes written at every point."""
        return sum(t.numel() * t.element_size() for t in self._origin.values())

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Context inside which the model may be moved; it is restored at the end (collective)."""
        if self._working:
            yield
            return
        with untouched(self.model, operation="landscape"), self.steps.watched():
            self._working = True
            try:
                self.prepare(self.model)
                yield
            finally:
                self._working = False
                self._place(())

    def move(self, point: Sequence[float]) -> nn.Module:
        """Move the weights to ``point`` (one coefficient per direction), and return the model."""
        self._place(tuple(float(c) for c in point))
        return self.model

    def _place(self, point: tuple[float, ...]) -> None:
        with torch.no_grad():
            for name, shard in self._shards.items():
                shard.copy_(self._origin[name])
                for c, axis in zip(point, self._axes):
                    # w + 0 d is w, also where d is not finite.
                    if c and name in axis:
                        shard.add_(axis[name], alpha=c)
        # Weights gathered before the move would be used again.
        self._reshard()

    def _reshard(self) -> None:
        for unit in units(self.model):
            unit.reshard()
