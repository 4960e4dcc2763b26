"""Groups of ranks, and a check that every rank takes part in a collective call.

A collective blocks for ever if a rank does not take part. So collective calls first wait for the other ranks
in the store that torchrun's processes share. That needs no collective, and fails after a timeout with the
missing ranks.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from skipscope._errors import SkipscopeError
from skipscope._torch_private import shared_store

Value = TypeVar("Value")
Shared = TypeVar("Shared")

TIMEOUT_S = 60.0
# Number of completed meetings for each set of ranks.
_meetings: Counter[tuple[int, ...]] = Counter()


def world() -> tuple[int, int]:
    """Rank of this process and number of processes; (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@dataclass(frozen=True)
class RankGroup:
    """Group of ranks that work together; every method is collective.

    Attributes:
        groups: process group for each dimension of the mesh; None: all processes.
        rank: rank of this process in the group.
        size: number of ranks.
    """

    groups: tuple[Any, ...]
    rank: int
    size: int

    @classmethod
    def everyone(cls) -> RankGroup:
        """The group of all processes."""
        return cls((None,), *world())

    @classmethod
    def of(cls, model: nn.Module) -> RankGroup | None:
        """The ranks that hold the shards of ``model``, or None if it is not sharded."""
        mesh = next(
            (m for p in model.parameters() if (m := getattr(p, "device_mesh", None)) is not None), None
        )
        if mesh is None:
            return None
        groups = tuple(mesh.get_group(dimension) for dimension in range(mesh.ndim))
        place = int((mesh.mesh.flatten() == dist.get_rank()).nonzero())
        return cls(groups, place, mesh.mesh.numel())

    def gathered(self, mine: Value) -> list[Value]:
        """Gather a value from every rank, in the order of ranks."""
        found: list[Any] = [mine]
        for group in reversed(self.groups if self.size > 1 else ()):
            every: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(every, found, group=group)
            found = [each for some in every for each in some]
        return found

    def summed(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place, and return it."""
        for group in self.groups if self.size > 1 else ():
            dist.all_reduce(tensor, group=group)
        return tensor

    def broadcast(self, tensor: Tensor) -> None:
        """Copy the first rank's tensor to every rank, in place."""
        for group in reversed(self.groups if self.size > 1 else ()):
            dist.broadcast(tensor, dist.get_process_group_ranks(group)[0], group=group)

    def agreed(self, operation: str, work: Callable[[], Value]) -> Value:
        """Run ``work``, which is not collective, on every rank, and return this rank's result.

        Raises:
            SkipscopeError: on every rank, if it failed on any: the others would wait for it otherwise.
        """
        value, error = None, None
        try:
            value = work()
        except Exception as failed:
            error = failed
        self.end_together(operation, error)
        return value  # type: ignore[return-value]

    def end_together(self, operation: str, error: Exception | None) -> None:
        """Raise this rank's error or that of another rank; return if no rank has an error."""
        self.raise_first(operation, self.gathered(sendable_error(error)), error)

    @staticmethod
    def raise_first(operation: str, errors: Sequence[SkipscopeError | None], mine: Exception | None) -> None:
        """Raise as :meth:`end_together` does, from gathered errors of :func:`sendable_error`."""
        if mine is not None:
            raise mine
        for rank, error in enumerate(errors):
            if error is not None:
                raise SkipscopeError(
                    operation,
                    f"rank {rank} failed: {error.problem}",
                    layer=error.layer,
                    expected=error.expected,
                    got=error.got,
                    cure=error.cure,
                )

    def done_by_first(
        self, operation: str, work: Callable[[], tuple[Value, Shared]]
    ) -> tuple[Value | None, Shared]:
        """Run ``work`` on the first rank only, for example on files.

        Returns:
            The first result of ``work`` on the first rank (None elsewhere), and the second on every rank.

        Raises:
            SkipscopeError: on every rank, if the first rank failed: the others would wait for it otherwise.
        """
        value, shared, error = None, None, None
        if self.rank == 0:
            try:
                value, shared = work()
            except Exception as failed:
                error = failed
        found = self.gathered((shared, sendable_error(error)))
        self.raise_first(operation, [each for _, each in found], error)
        return value, found[0][0]  # type: ignore[return-value]


def sendable_error(error: Exception | None) -> SkipscopeError | None:
    """Convert an error to a form that other ranks can raise."""
    if error is None or isinstance(error, SkipscopeError):
        return error
    return SkipscopeError("", f"{type(error).__name__}: {error}"[:500], cure="see what that rank says")


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error means that another process ended or did not answer; torch has no class for it."""
    text = f"{type(error).__name__} {error}"
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "DistNetworkError")
    return isinstance(error, RuntimeError | OSError) and any(word in text for word in words)


def ranks_of(model: nn.Module) -> tuple[int, ...]:
    """The ranks that must run ``model`` together because its weights are sharded (FSDP, tensor parallel).

    Example:
        >>> ranks_of(nn.Linear(2, 2))
        ()
    """
    if world()[1] == 1:
        return ()
    found: set[int] = set()
    for parameter in model.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None:
            found.update(mesh.mesh.flatten().tolist())
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            found.update(dist.get_process_group_ranks(module.process_group))  # type: ignore[arg-type]
    return tuple(sorted(found)) if len(found) > 1 else ()


def greatest(model: nn.Module, value: float) -> float:
    """Maximum of ``value`` over the ranks of a sharded ``model`` (collective)."""
    meshes = {id(m): m for p in model.parameters() if (m := getattr(p, "device_mesh", None)) is not None}
    for mesh in meshes.values():
        number = torch.tensor(value, dtype=torch.float64, device=mesh.device_type)
        for dimension in range(mesh.ndim):
            dist.all_reduce(number, dist.ReduceOp.MAX, group=mesh.get_group(dimension))
        value = float(number)
    return value


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, spread over ranks."""
    return hasattr(tensor, "placements")


def whole(tensor: Tensor) -> Tensor:
    """Gather the full tensor of a DTensor (collective); any other tensor is returned unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, without a copy; any other tensor is returned unchanged."""
    return tensor.to_local() if is_spread(tensor) else tensor  # type: ignore[operator]


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a full tensor, equal on all ranks, like ``like``, without communication."""
    if not is_spread(like) or is_spread(tensor):
        return tensor
    from torch.distributed.tensor import DTensor

    mesh, part = like.device_mesh, tensor  # type: ignore[attr-defined]
    for place, at, count in zip(like.placements, mesh.get_coordinate(), mesh.shape):  # type: ignore[attr-defined]
        if place.is_shard():
            part = _chunk(part, place.dim, at, count)
    return DTensor.from_local(
        part.clone(),
        mesh,
        like.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=tensor.shape,
        stride=tensor.contiguous().stride(),
    )


def _chunk(tensor: Tensor, dimension: int, at: int, count: int) -> Tensor:
    """Chunk ``at`` of ``count`` as in ``torch.chunk``: the last chunks may be shorter or empty."""
    size = tensor.shape[dimension]
    step = -(-size // count)
    start = min(at * step, size)
    return tensor.narrow(dimension, start, min(step, size - start))


def meet(operation: str, ranks: tuple[int, ...], timeout: float | None = None) -> None:
    """Wait until each of ``ranks``, including this one, has made the same call.

    Raises:
        SkipscopeError: a rank has not made the call within ``timeout`` seconds.
    """
    if len(ranks) < 2:
        return
    seconds = TIMEOUT_S if timeout is None else timeout
    store = shared_store()
    place, n = f"skipscope/{zlib.crc32(repr(ranks).encode())}", _meetings[ranks]
    keys = {rank: f"{place}/{n}/{operation}/{rank}" for rank in ranks}
    mine = keys[dist.get_rank()]
    store.set(mine, "here")
    try:
        store.wait(list(keys.values()), timedelta(seconds=seconds))
    # Each kind of store raises its own type of error.
    except Exception as error:
        missing = [rank for rank, key in keys.items() if not store.check([key])]
        if missing:
            # A later call must not be mistaken for this one.
            store.delete_key(mine)
            raise SkipscopeError(
                operation,
                f"not every rank called it within {seconds:g} s: it is collective",
                expected=f"a call on each of {len(ranks)} ranks",
                got=f"none on rank {', '.join(map(str, missing))}",
                cure=f"call {operation} on every rank, not only on rank 0; only rank 0 prints and writes",
            ) from error
    _meetings[ranks] += 1
