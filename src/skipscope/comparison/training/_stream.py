"""Training batches, in the same order for every twin of a seed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn

from skipscope._data import Batches, Objective, batch_size, rows
from skipscope._random import drawn_apart
from skipscope.comparison.training._row_batches import can_be_cut

# A data set with more batches is not held in memory. It is read in its own order, epoch after epoch.
HELD = 512


class Stream:
    """Infinite stream of training batches drawn from ``data``.

    A single large batch is cut into random batches of ``size`` if its rows are independent samples; several
    batches are shuffled whole.

    Attributes:
        size: samples per batch.
        samples: total number of samples, or None if the data is too long to be counted.
        cut: whether a single batch is cut.
    """

    def __init__(self, data: Batches, model: nn.Module, objective: Objective, size: int | None = None):
        self.data = data
        held = list(islice(data, HELD + 1))
        self.held = held if len(held) <= HELD else None
        self.samples = sum(map(batch_size, held)) if self.held else None
        self.cut = can_be_cut(model, data, objective, size or 64)
        self.size = (size or 64) if self.cut else batch_size(held[0])

    @property
    def count(self) -> int | None:
        """Number of batches per epoch, or None if the data is too long to be counted."""
        if self.held is None:
            return None
        return max(1, batch_size(self.held[0]) // self.size) if self.cut else len(self.held)

    def batches(self, seed: int) -> Iterator[Any]:
        """Iterate over the batches of a seed; the global random state is neither read nor changed."""
        generator = torch.Generator().manual_seed(seed)
        if self.held is None:
            epoch = 0
            while True:
                yield from drawn_apart(self.data.items, seed * 1_000_003 + epoch)
                epoch += 1
        while True:
            if self.cut:
                order = torch.randperm(batch_size(self.held[0]), generator=generator)
                for part in order.split(self.size)[: max(1, len(order) // self.size)]:
                    yield rows(self.held[0], part)
            else:
                for i in torch.randperm(len(self.held), generator=generator).tolist():
                    yield self.held[i]
