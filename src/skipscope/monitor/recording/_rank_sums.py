"""Sums of gradients over ranks, and a check that replicated gradients are equal.

Under DDP every rank holds the full reduced gradient, and nothing needs to be sent. Under FSDP2, and whenever
parameters are DTensors, each rank holds a shard: the sums of all tensors are all-reduced in one call.
"""

from __future__ import annotations

import numpy as np
import torch.distributed as dist
from torch import Tensor

from skipscope._errors import SkipscopeError
from skipscope._ranks import RankGroup


def weight_of(grad: Tensor, size: int) -> float:
    """Weight of this rank's part in the sum over ranks, such that every element counts once."""
    placements = getattr(grad, "placements", None)
    if placements is None:
        return 1.0 / size
    copies = 1
    for place, ranks in zip(placements, grad.device_mesh.shape):  # type: ignore[attr-defined]
        copies *= 1 if place.is_shard() else ranks
    return 1.0 / copies


def whole(grad: Tensor) -> Tensor:
    """Reduce a gradient with partial placements (collective); any other gradient is returned unchanged."""
    placements = getattr(grad, "placements", ())
    return grad.full_tensor() if any(p.is_partial() for p in placements) else grad  # type: ignore[operator]


def check_mesh(name: str, parameter: Tensor, size: int) -> None:
    """Refuse a DTensor on only some of the ranks.

    Raises:
        SkipscopeError: the mesh of the parameter does not have all ranks.
    """
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is not None and mesh.size() != size:
        raise SkipscopeError(
            "watch",
            "a parameter is spread over only some of the ranks, and its norm cannot be made whole",
            layer=name,
            expected=f"a mesh of all {size} ranks",
            got=f"a mesh of {mesh.size()}",
            cure=(
                "shard over one mesh of all ranks (hybrid sharding is such a mesh); pipeline stages, and"
                " layers that a tensor-parallel plan leaves out, are not supported"
            ),
        )


def disagreement(names: tuple[str, ...], norms: np.ndarray) -> str | None:
    """Describe how the ranks' gradients differ, or return None (collective, once at the first step)."""
    every = RankGroup.everyone().gathered((names, norms.tolist()))
    for rank, (other_names, other) in enumerate(every):
        if other_names != every[0][0]:
            return f"rank {rank} trains other parameters than rank 0"
        mine, theirs = np.array(every[0][1]), np.array(other)
        apart = np.abs(theirs - mine) > 1e-3 * np.maximum(np.abs(mine), np.abs(theirs))
        if apart.any():
            i = int(np.argmax(apart))
            return (
                f"rank {rank} holds another gradient than rank 0 ({names[i]}: norm {theirs[i]:.4g} against "
                f"{mine[i]:.4g}): they are not reduced before the step"
            )
    return None


def all_reduced(sums: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place, and return it."""
    dist.all_reduce(sums)
    return sums
