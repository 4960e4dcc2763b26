"""What one rank does in test_ranks.py: train a few steps under watch, and save the history.

torchrun --standalone --nproc-per-node 2 ranks_worker.py KIND FOLDER
"""

import contextlib
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

STEPS, BATCH, WIDTH = 4, 8, 10


class Net(nn.Module):
    """Widths that no number of ranks divides, so that shards are uneven, and one that is empty on some ranks."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, 7)
        self.blocks = nn.ModuleList(nn.Linear(7, 7) for _ in range(3))
        self.head = nn.Linear(7, 1)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def make(dtype=torch.float64):
    torch.manual_seed(0)
    return Net().to(dtype)


def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(BATCH, WIDTH, dtype=torch.float64, generator=generator),
         torch.randn(BATCH, 1, dtype=torch.float64, generator=generator))
        for _ in range(STEPS)
    ]  # fmt: skip


def train(model, optimizer, rank=0, size=1, accumulate=1, clip=None):
    """Each rank takes its share of each batch; the mean over ranks is the mean over the batch."""
    for x, y in batches():
        optimizer.zero_grad()
        mine = torch.arange(rank, BATCH, size)
        for k, part in enumerate(mine.chunk(accumulate)):
            last = k == accumulate - 1
            wait = contextlib.nullcontext()
            if not last and hasattr(model, "no_sync"):
                wait = model.no_sync()
            elif hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(last)
            with wait:
                (F.mse_loss(model(x[part]), y[part]) * len(part) / len(mine)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def main(kind: str, folder: str) -> None:
    import skipscope as ss

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    model = make()
    wrapped: nn.Module = model
    if kind.startswith("ddp"):
        wrapped = nn.parallel.DistributedDataParallel(model)
    elif kind.startswith("fsdp"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        shape = (2, size // 2) if "hybrid" in kind else (size,)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")[-len(shape) :])
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    if kind == "one-rank":
        if rank == 0:
            try:
                ss.watch(wrapped, optimizer, timeout=2.0)
            except ss.SkipscopeError as error:
                print("REFUSED", error)
        dist.barrier()
        dist.destroy_process_group()
        return
    options = {"accumulate": 2 if "accumulate" in kind else 1, "clip": 0.1 if "clip" in kind else None}
    flow = {"flow_every": 2} if "flow" in kind else {}
    with ss.watch(wrapped, optimizer, sinks=["terminal"], folder=f"{folder}/run", **flow) as monitor:
        train(wrapped, optimizer, rank, size, **options)
    monitor.history.save(f"{folder}/rank{rank}.json")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
