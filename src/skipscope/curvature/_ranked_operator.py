"""The curvature of a model under FSDP2: each rank multiplies on its own batches, and the products are summed.

FSDP2 gathers and frees weights during a backward pass, which does not support second derivatives. So each
rank holds a plain copy of the whole model, and only its own part of the data. Rank 0 holds the basis and
solves; the other ranks multiply on request.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from skipscope._batches import Batches
from skipscope._data import Objective, as_batches
from skipscope._errors import SkipscopeError
from skipscope._free_memory import SHARE, free_bytes
from skipscope._random import random_state_kept
from skipscope._rank_batches import RankBatches, spread_batches
from skipscope._ranks import RankGroup, is_lost_rank, sendable_error
from skipscope._sharding import refuse_unmovable
from skipscope.curvature._curvature_operator import CurvatureOperator, How, open_operator
from skipscope.curvature._private_model import PrivateModel
from skipscope.curvature._product_modes import Matrix

Result = TypeVar("Result")


class RankedOperator(CurvatureOperator):
    """:class:`CurvatureOperator` over the batches of all ranks; only rank 0 calls :meth:`apply`."""

    def __init__(self, model: PrivateModel, data: RankBatches, matrix: Matrix, **options: Any):
        open_it = functools.partial(super().__init__, model, data, matrix, **options)
        data.group.agreed(model.operation, open_it)

    @property
    def group(self) -> RankGroup:
        """The ranks that share the batches."""
        assert isinstance(self.data, RankBatches)
        return self.data.group

    def _multiplied(self, vectors: Tensor) -> Tensor:
        self.group.gathered(tuple(vectors.shape))
        return self._together(vectors)

    def _together(self, vectors: Tensor) -> Tensor:
        total, error = vectors, None
        self.group.broadcast(vectors)
        try:
            total = super()._multiplied(vectors)
        except Exception as failed:
            error = failed
        self.group.end_together(self.model.operation, error)
        return self.group.summed(total)

    def solved_by_first(self, solve: Callable[[], Result]) -> Result:
        """Run ``solve`` on rank 0 while the other ranks multiply. Returns its result on every rank.

        Raises:
            SkipscopeError: ``solve`` failed; raised on every rank.
        """
        result, error = None, None
        try:
            result = solve() if self.group.rank == 0 else self._serve()
        except Exception as failed:
            if is_lost_rank(failed):
                raise
            error = failed
        if self.group.rank == 0:
            # Ends the loop of _serve on the other ranks.
            self.group.gathered(None)
        found = self.group.gathered((result, sendable_error(error)))
        self.group.raise_first(self.model.operation, [failed for _, failed in found], error)
        return found[0][0]  # type: ignore[return-value]

    def _serve(self) -> None:
        error: Exception | None = None
        while (shape := self.group.gathered(None)[0]) is not None:
            try:
                self._together(torch.empty(shape, dtype=torch.float64, device=self.basis_device))
            except Exception as failed:
                if is_lost_rank(failed):
                    raise
                error = failed
        if error is not None:
            raise error


def open_ranked(
    operation: str, model: nn.Module, data: Any, loss: Any, how: How, group: RankGroup
) -> RankedOperator:
    """Open an operator for a sharded model, on every rank.

    Raises:
        SkipscopeError: as :func:`open_operator`; or a rank cannot hold the whole model.
    """
    refuse_unmovable(model, operation)
    group.agreed(operation, lambda: _require_whole(model, operation))

    def read() -> Batches:
        source = as_batches(data, operation, any_shape=isinstance(loss, Objective))
        # A shuffling loader gives every rank the same batches.
        with random_state_kept(how.seed):
            return Batches(list(source), single=source.single)

    place = next(model.parameters()).device
    held = spread_batches(group, read, place)
    found = open_operator(operation, model, held, loss, how, RankedOperator)
    assert isinstance(found, RankedOperator)
    return found


def _require_whole(model: nn.Module, operation: str) -> None:
    parameters = list(model.parameters())
    needed = 3.0 * sum(p.numel() * p.element_size() for p in parameters)
    free = SHARE * free_bytes(parameters[0].device)
    if needed > free:
        raise SkipscopeError(
            operation,
            "the whole model does not fit on one rank, and its second derivative needs it there",
            expected=f"{needed / 2**30:.2f} GiB: the weights, their gradient and a product",
            got=f"{free / 2**30:.2f} GiB that may be used on {parameters[0].device}",
            cure="a device with more memory; landscape needs a shard of the weights alone",
        )
