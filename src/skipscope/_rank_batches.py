"""The data of a model that is sharded: what each rank runs, and how the ranks' sums are combined.

The batches of all ranks together are the data. Where every rank was given the same batches they count once,
and each rank runs some of them. A sharded model runs on all ranks or on none, so in every pass each rank runs
as many batches as the one that has most: the rest are one batch run again, which counts for nothing.
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
        filler: a batch to run where the other ranks run one of theirs.
        group: the ranks.
        single: all ranks together have one batch.
        hash: of all ranks' data.
        device: where batches belong.
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
        """A hash of all ranks' data."""
        return self._hash

    def turns(self) -> Iterator[tuple[Batch, bool]]:
        """This rank's batches, and then others that only keep the ranks in step."""
        own = list(self)
        yield from ((batch, True) for batch in own)
        yield from ((self._filler, False) for _ in range(max(self._counts) - len(own)))

    def together(self, part: Part, error: Exception | None = None) -> list[Part]:
        """The parts of all ranks, in the order of their data.

        Raises:
            SkipscopeError: on every rank, where one of them has an error; it has its own.
        """
        found = self.group.gathered((_to_send(part), sendable_error(error)))
        self.group.raise_first(self.operation, [failed for _, failed in found], error)
        return [each for each, _ in found]

    def defer(self, error: Exception) -> Exception:
        """Keep an error until the pass is over: the other ranks would wait in theirs for ever."""
        return error

    def peek(self, count: int) -> list[Batch]:
        """The first batches of the first rank that has some, the same on every rank."""
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
    """The same on the CPU and without history: a rank cannot use another one's device."""
    if is_dataclass(part) and not isinstance(part, type):
        return replace(part, **_to_send(vars(part)))
    return map_tensors(part, lambda tensor: tensor.detach().cpu())


def spread_batches(
    group: RankGroup,
    read: Callable[[], Batches],
    device: torch.device,
    subset: Callable[[list[Batch], int, int], list[Batch]] | None = None,
) -> RankBatches:
    """Read every rank's data, and find what each runs.

    Args:
        group: the ranks.
        read: reads this rank's own into memory.
        device: where batches belong.
        subset: ``(batches, first, total)``: of this rank's samples, which are number ``first`` and the
            following of ``total``, those that are chosen.

    Raises:
        SkipscopeError: on every rank, where one cannot read its data, or has none.
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
    """This rank's batches, their hash (None where they hold no tensor to compare), and their samples."""
    held = read()
    comparable = any(tensors_in(batch) for batch in held)
    return held, held.hash() if comparable else None, sum(batch_size(batch) for batch in held)
