"""Several processes: who is there, and whether all of them take part in what needs all of them.

A collective that a rank stays away from waits for ever. So whoever needs the others meets them first, in the
store that torchrun's processes share: that costs no collective, and fails after a time with the names of
those who did not come.
"""

from __future__ import annotations

import zlib
from collections import Counter
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from skipscope._errors import SkipscopeError
from skipscope._torch_internals import shared_store

TIMEOUT_S = 60.0
_held: Counter[tuple[int, ...]] = Counter()  # meetings that took place, by who took part


def world() -> tuple[int, int]:
    """(this rank, how many)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def ranks_of(model: nn.Module) -> tuple[int, ...]:
    """The ranks without which ``model`` cannot run, because its weights are spread over them (FSDP, tensor
    parallel).

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
    """The greatest of the values of the ranks that ``model`` is spread over (collective)."""
    meshes = {id(m): m for p in model.parameters() if (m := getattr(p, "device_mesh", None)) is not None}
    for mesh in meshes.values():
        number = torch.tensor(value, dtype=torch.float64, device=mesh.device_type)
        for dimension in range(mesh.ndim):
            dist.all_reduce(number, dist.ReduceOp.MAX, group=mesh.get_group(dimension))
        value = float(number)
    return value


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; put together from its shards where it is spread over ranks (collective)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def meet(operation: str, ranks: tuple[int, ...], timeout: float | None = None) -> None:
    """Wait until each of ``ranks``, this one among them, has come to the same call.

    Raises:
        SkipscopeError: one of them has not come within ``timeout`` seconds.
    """
    if len(ranks) < 2:
        return
    seconds = TIMEOUT_S if timeout is None else timeout
    store = shared_store()
    place, n = f"skipscope/{zlib.crc32(repr(ranks).encode())}", _held[ranks]
    keys = {rank: f"{place}/{n}/{operation}/{rank}" for rank in ranks}
    mine = keys[dist.get_rank()]
    store.set(mine, "here")
    try:
        store.wait(list(keys.values()), timedelta(seconds=seconds))
    except Exception as error:  # the stores raise different kinds
        missing = [rank for rank, key in keys.items() if not store.check([key])]
        if missing:
            store.delete_key(mine)  # a later call must not be taken for this one
            raise SkipscopeError(
                operation,
                f"not every rank called it within {seconds:g} s: it is collective",
                expected=f"a call on each of {len(ranks)} ranks",
                got=f"none on rank {', '.join(map(str, missing))}",
                cure=f"call {operation} on every rank, not only on rank 0; only rank 0 prints and writes",
            ) from error
    _held[ranks] += 1
