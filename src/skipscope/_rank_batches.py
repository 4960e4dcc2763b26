"""Data of a sharded model: the batches of each rank, and the combination of the ranks' sums.

The data is the union of all ranks' batches. If every rank was given the same batches, they count once and are
divided among the ranks. A sharded model runs on all ranks or on none, so in every pass each rank runs as many
batches as the rank with most: a rank with fewer repeats a filler batch, which is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass, replace
from typing import Any, TypeVar

import torch

from skipscope._batches import Batch, Batches, batch_size, map_tensors, tensors_in
from skipscope._ranks import RankGroup, sendable_error

Part = TypeVar("Part")


class RankBatches(Batches):
    """This rank's part of the data, held in memory.

    Args:
        own: this rank's batches; there may be none.
        filler: batch to run, uncounted, while other ranks have more batches.
        group: the ranks.
        single: whether all ranks together have one batch.
        hash: hash of all ranks' data.
        device: device of the batches.
    """

    def __init__(
        self,
        own: Sequence[Batch],
        filler: Batch,
        group: RankGroup,
        *,
        single: bool,
        hash: str,
        device: torch.device,
    ):
        super().__init__(list(own), single=single)
        self.group, self._hash, self._filler, self._device = group, hash, filler, device
        self._counts = group.gathered(len(own))
        self.start = sum(self._counts[: group.rank])
        self._seen: list[Batch] | None = None

    def hash(self) -> str:
        """Hash of all ranks' data."""
        return self._hash

    def turns(self) -> Iterator[tuple[Batch, bool]]:
        """This rank's batches, then uncounted filler batches that keep the ranks in step."""
        own = list(self)
        yield from ((batch, True) for batch in own)
        yield from ((self._filler, False) for _ in range(max(self._counts) - len(own)))

    def together(self, part: Part, error: Exception | None = None) -> list[Part]:
        """Gather the results of all ranks, in the order of their data.

        Raises:
            SkipscopeError: on every rank, if a rank has an error; that rank raises its own.
        """
        found = self.group.gathered((_to_send(part), sendable_error(error)))
        self.group.raise_first(self.operation, [failed for _, failed in found], error)
        return [each for each, _ in found]

    def defer(self, error: Exception) -> Exception:
        """Keep an error until the end of the pass: otherwise the other ranks would wait for ever."""
        return error

    def peek(self, count: int) -> list[Batch]:
        """The first batches of the first rank with any batches, the same on every rank."""
        if self._seen is None or len(self._seen) < count:
            giver = next(rank for rank, own in enumerate(self._counts) if own)
            given = None
            if giver == self.group.rank:
                given = [map_tensors(batch, torch.Tensor.cpu) for batch in super().peek(count)]
            held = self.group.gathered(given)[giver] or []
            self._seen = [map_tensors(batch, lambda t: t.to(self._device)) for batch in held]
        return self._seen[:count]

    def first(self) -> Batch:
        """The first batch of :meth:`peek`."""
        return self.peek(1)[0]


def _to_send(part: Part) -> Part:
    """Move a result to the CPU and detach it: a rank cannot use the device of another rank."""
    if is_dataclass(part) and not isinstance(part, type):
        return replace(part, **_to_send(vars(part)))
    return map_tensors(part, lambda tensor: tensor.detach().cpu())


def spread_batches(
    group: RankGroup,
    read: Callable[[], Batches],
    device: torch.device,
    subset: Callable[[list[Batch], int, int], list[Batch]] | None = None,
) -> RankBatches:
    """Read every rank's data, and assign batches to ranks.

    Args:
        group: the ranks.
        read: function that reads this rank's data into memory.
        device: device of the batches.
        subset: function ``(batches, first, total)`` that selects samples of this rank, whose samples are
            numbered from ``first`` among all ``total`` samples.

    Raises:
        SkipscopeError: on every rank, if a rank cannot read its data or has none.
    """
    held, own_hash, size = group.agreed("data", lambda: _summary(read))
    every: list[Any] = group.gathered((own_hash, size))
    sizes, filler = [n for _, n in every], next(iter(held))
    choose = subset or (lambda batches, first, total: batches)
    if group.size == 1 or (own_hash is not None and all(h == own_hash for h, _ in every)):
        chosen = choose(list(held), 0, size)
        start, end = (len(chosen) * rank // group.size for rank in (group.rank, group.rank + 1))
        return RankBatches(
            chosen[start:end],
            filler,
            group,
            single=held.single,
            hash=Batches(chosen).hash(),
            device=device,
        )
    own = choose(list(held), sum(sizes[: group.rank]), sum(sizes))
    hashes = " ".join(group.gathered(Batches(own).hash()))
    return RankBatches(own, filler, group, single=False, hash=hashes, device=device)


def _summary(read: Callable[[], Batches]) -> tuple[Batches, str | None, int]:
    """This rank's batches, their hash (None if they hold no tensor), and their number of samples."""
    held = read()
    comparable = any(tensors_in(batch) for batch in held)
    return held, held.hash() if comparable else None, sum(batch_size(batch) for batch in held)
