"""Weights that are spread over ranks are refused by all that moves whole weights, in words, before anything runs."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope import surfaces

DATA = torch.randn(8, 4), torch.randint(3, (8,))
CALLS = {
    "landscape": lambda model: ss.landscape(model, DATA, F.cross_entropy, grid=3),
    "paired_landscapes": lambda model: ss.paired_landscapes({"a": model, "b": model}, DATA, F.cross_entropy, grid=3),
    "curvature_map": lambda model: ss.curvature_map(model, DATA, F.cross_entropy, grid=3),
    "extreme_eigenvalues": lambda model: ss.extreme_eigenvalues(model, DATA, F.cross_entropy),
    "spectral_density": lambda model: ss.spectral_density(model, DATA, F.cross_entropy),
    "random_direction": surfaces.random_direction,
    "solutions_plane": lambda model: surfaces.solutions_plane(model, nn.Linear(4, 3)),
    "trajectory_plane": lambda model: surfaces.trajectory_plane(model, [nn.Linear(4, 3)] * 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


# What takes FSDP2's shards: see test_sharded.py.
TAKES_SHARDS = {"landscape", "paired_landscapes", "random_direction", "extreme_eigenvalues"}


@pytest.mark.parametrize(
    ("call", "how"),
    [
        *((call, "tensor parallel") for call in CALLS),
        *((call, "FSDP2") for call in sorted(CALLS.keys() - TAKES_SHARDS)),
    ],
)
def test_spread_weights_are_refused(one_rank, call, how):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (1,))
    model = nn.Linear(4, 3)
    model = (
        fully_shard(model, mesh=mesh)
        if how == "FSDP2"
        else parallelize_module(model, mesh, ColwiseParallel())
    )
    with pytest.raises(ss.SkipscopeError, match="spread over ranks") as refused:
        CALLS[call](model)
    assert refused.value.layer == "weight" and "get_model_state_dict" in refused.value.cure
