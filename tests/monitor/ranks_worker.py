"""What one rank does in test_ranks.py: train a few steps under watch, and save the history.

torchrun --standalone --nproc-per-node 2 ranks_worker.py KIND FOLDER
"""

import contextlib
import os
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


def wrap(kind: str, model: nn.Module) -> nn.Module:
    """The model as this kind of training has it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    size = dist.get_world_size()
    if kind.startswith("ddp"):
        return nn.parallel.DistributedDataParallel(model)
    if kind.startswith("old-fsdp"):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    if kind.startswith("tensor"):
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
        maps = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        planned = maps[-1:] if "part" in kind else maps  # a layer left out lies on the data ranks only
        parallelize_module(
            model, mesh["tensor"], {n: RowwiseParallel(input_layouts=Replicate()) for n in planned}
        )
        return fully_shard(model, mesh=mesh["data"])
    if kind.startswith("fsdp"):
        shape = (2, size // 2) if "hybrid" in kind else (size,)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")[-len(shape) :])
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return model


def say(text: str) -> None:
    """One line, in one write: the ranks share standard output."""
    sys.stdout.write(text.replace("\n", " | ") + "\n")
    sys.stdout.flush()


def alone(ss, model, optimizer) -> None:
    """Rank 0 calls what is collective, and nobody else does; afterwards everyone does."""
    from skipscope import _ranks

    _ranks.TIMEOUT_S = 2.0
    x, y = batches()[0]
    calls = {
        "watch": lambda: ss.watch(model, optimizer, timeout=2.0),
        "find_shortcuts": lambda: ss.find_shortcuts(model, x),
        "gradient_flow": lambda: ss.gradient_flow(model, (x, y), F.mse_loss),
        "gradient_split": lambda: ss.gradient_split(model, (x, y), F.mse_loss),
        "path_spectrum": lambda: ss.path_spectrum(model, (x, y), F.mse_loss),
        "importance": lambda: ss.importance(model, (x, y), F.mse_loss),
        "gradient_correlation": lambda: ss.gradient_correlation(model, (x, y), F.mse_loss),
        "prescribe": lambda: ss.prescribe(model, (x, y), F.mse_loss, steps=1),
        "ablate": lambda: ss.ablate(model, inputs=x),
        "add_shortcuts": lambda: ss.add_shortcuts(model, x),
        "landscape": lambda: ss.landscape(model, (x, y), F.mse_loss, grid=3),
        "paired_landscapes": lambda: ss.paired_landscapes(
            {"a": model, "b": model}, (x, y), F.mse_loss, grid=3
        ),
        "extreme_eigenvalues": lambda: ss.extreme_eigenvalues(model, (x, y), F.mse_loss),
        "spectral_density": lambda: ss.spectral_density(model, (x, y), F.mse_loss),
        "curvature_trace": lambda: ss.curvature_trace(model, (x, y), F.mse_loss),
        "curvature_map": lambda: ss.curvature_map(model, (x, y), F.mse_loss, grid=3),
        "train_twins": lambda: ss.train_twins({"a": model}, (x, y), F.mse_loss, seeds=1),
        "compare": lambda: ss.compare(model, (x, y), F.mse_loss),
    }
    if not any(hasattr(p, "placements") for p in model.parameters()):
        calls = {
            name: calls[name] for name in ("watch", "gradient_flow")
        }  # the others are as local as this one
    if dist.get_rank() == 0:
        for name, call in calls.items():
            try:
                call()
                say(f"WENT {name}")
            except ss.SkipscopeError as error:
                say(f"REFUSED {name}: {error}")
    dist.barrier()
    flow_of_each_ranks_data(ss, model, x, y)


def flow_of_each_ranks_data(ss, model, x, y) -> None:
    """Under FSDP2 boundaries are of this rank's data, weights of all ranks'; under DDP both are of this rank's."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = x[rank::size], y[rank::size]
    flow, plain, alone = (
        ss.gradient_flow(model, mine, F.mse_loss),
        make(),
        ss.gradient_flow(make(), mine, F.mse_loss),
    )
    assert [b.name for b in flow.boundaries] == [b.name for b in alone.boundaries]
    for found, right in zip(flow.boundaries, alone.boundaries):
        assert abs(found.gradient_rms - right.gradient_rms) < 1e-12
    whole = any(hasattr(p, "placements") for p in model.parameters())
    F.mse_loss(plain(x if whole else mine[0]), y if whole else mine[1]).backward()
    expected = {name: float(p.grad.square().mean().sqrt()) for name, p in plain.named_parameters()}
    for layer in flow.layers:
        assert abs(layer.weight_grad_rms / expected[layer.name] - 1) < 1e-9, layer
    say(f"TOGETHER {flow.verdict.state}")


def leave() -> None:
    """End this process once all have come here."""
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a process that ends in the ordinary manner may be aborted by gloo's threads


def main(kind: str, folder: str) -> None:
    import skipscope as ss

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    wrapped = wrap(kind, make())
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    if "refused" in kind:
        given = {"folder": {"folder": f"{folder}/taken"}, "sink": {"sinks": ["no such sink"]}}
        try:
            ss.watch(wrapped, optimizer, **given.get(kind.rpartition("-")[2], {}))
        except ss.SkipscopeError as error:
            say(f"REFUSED rank {rank}: {error}")
    if "alone" in kind:
        alone(ss, wrapped, optimizer)
    if "refused" in kind or "alone" in kind:
        leave()
    options = {"accumulate": 2 if "accumulate" in kind else 1, "clip": 0.1 if "clip" in kind else None}
    flow = {"flow_every": 2} if "flow" in kind else {}
    with ss.watch(wrapped, optimizer, sinks=["terminal"], folder=f"{folder}/run", **flow) as monitor:
        pairs = 2 if "tensor" in kind else 1  # ranks that share a weight's columns see the same data
        train(wrapped, optimizer, rank // pairs, size // pairs, **options)
    monitor.history.save(f"{folder}/rank{rank}.json")
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
