"""Memory that a run needs, checked before it starts.

Directions that do not fit are drawn again at each point. Anything else that does not fit is refused.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from skipscope._errors import SkipscopeError
from skipscope._free_memory import SHARE, free_bytes


def _bytes(tensors: Iterable[Tensor]) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def fits(needed: float) -> bool:
    """Whether so many bytes fit into the usable share of the host's free memory."""
    return needed <= SHARE * free_bytes(torch.device("cpu"))


def directions_fit(models: Iterable[nn.Module], moved: Iterable[Tensor], axes: int) -> bool:
    """Whether the directions fit in memory beside each twin's copy; if not, they are drawn at each point.

    Each twin holds a copy; the moving weights at the origin, the current point and the start of a row; and
    the directions (twice while they are created). A strategy on trial holds the same again.

    Raises:
        SkipscopeError: not even the copies fit.
    """
    models, steps = list(models), _bytes(moved) * len(list(models))
    copies = sum(_bytes([*m.parameters(), *m.buffers()]) for m in models)
    device = next((p.device for m in models for p in m.parameters()), torch.device("cpu"))
    free = SHARE * free_bytes(device)
    if copies + 2 * max((_bytes(m.parameters()) for m in models), default=0) > free:
        raise SkipscopeError(
            "landscape",
            "the model does not fit into memory a second time, and its own weights are never moved",
            expected=f"{copies / 2**30:.2f} GiB for the copies",
            got=f"{free / 2**30:.2f} GiB on {device}",
            cure="a device with more memory, fewer twins at once, or a lower precision: model.bfloat16()",
        )
    return 2 * (copies + (3 + axes) * steps) + 2 * axes * steps <= free


def shards_fit(shards: Iterable[Tensor], axes: int) -> None:
    """Refuse a sharded model if this rank cannot hold a second set of its shards and of each direction.

    Raises:
        SkipscopeError: they do not fit; the error names the memory needed.
    """
    shards = list(shards)
    device = next((t.device for t in shards), torch.device("cpu"))
    needed, free = (1 + 2 * axes) * _bytes(shards), SHARE * free_bytes(device)
    if needed > free:
        raise SkipscopeError(
            "landscape",
            "this rank's shards of the weights and of the directions do not fit into memory",
            expected=f"{needed / 2**30:.2f} GiB, {1 + 2 * axes} times its shards",
            got=f"{free / 2**30:.2f} GiB on {device}",
            cure="shard over more ranks, or fewer twins at once",
        )


def check_grid(points: int, numbers: int, usual: int = 0) -> None:
    """Refuse a grid whose values do not fit into memory.

    Args:
        points: number of grid points.
        numbers: minimal number of values at each point.
        usual: typical number of values, for the grid size that the error suggests.

    Raises:
        SkipscopeError: the grid does not fit; the error names the largest square grid that does.
    """
    free = SHARE * free_bytes(torch.device("cpu"))
    # Bytes per value: the grid, the kept values, and two copies for results.
    each = 4 * 8
    if points * each * numbers > free:
        numbers = max(numbers, usual)
        raise SkipscopeError(
            "landscape",
            "the grid's numbers do not fit into memory",
            expected=f"at most {int((free / each / numbers) ** 0.5):,} points an axis of a plane, "
            f"{int(free / each / numbers):,} on a line",
            got=f"{points:,} points of {numbers} numbers, {points * each * numbers / 2**30:.1f} GiB",
            cure="a smaller grid",
        )
