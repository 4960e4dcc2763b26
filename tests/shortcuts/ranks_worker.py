"""What each rank checks in test_ranks.py; a failed check ends the process, and with it the test.

torchrun --standalone --nproc-per-node 2 ranks_worker.py KIND
"""

import contextlib
import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from architectures import CASES, Basic, Layer, ResNet, images, seq

import skipscope as ss
from skipscope.shortcuts import boundaries, tap_boundaries

BATCH, RATE = 8, 0.1
EDITS = (
    {}, {"how": "detach"}, {"how": "lesion"}, {"strength": 0.3},
    {"strength": torch.tensor(0.5, dtype=torch.float64)},
)  # fmt: skip


def stack():
    torch.manual_seed(0)
    return seq(nn.Linear(8, 8), Layer(), Layer(form="post"), nn.Linear(8, 3)).double()


def data():
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(BATCH, 6, 8, dtype=torch.float64, generator=generator),
        torch.randn(BATCH, 6, 3, dtype=torch.float64, generator=generator),
    )


def same(one, other, what):
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=lambda text: f"{what}: {text}")


# --- FSDP2 ---


def shard(model, inner, **options):
    """Units inside the model (attention and mlp apart, layers, or none), and the model itself."""
    from torch.distributed.fsdp import fully_shard

    names = {"parts": ("attn", "mlp"), "layers": (), "root": ()}[inner]
    for name, module in list(model.named_modules()):
        last = name.rpartition(".")[2]
        is_layer = isinstance(module, Layer | Basic | nn.ModuleList) and last.isdigit()
        if last in names or (inner == "layers" and is_layer and not isinstance(module, nn.ModuleList)):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def plain_form(found):
    return {key: value for key, value in found.to_dict().items() if key != "version"}


def fsdp_find():
    for name in ("gpt2", "t5", "resnet18", "densenet", "lecture_projected", "highway_lerp", "swin", "vit"):
        make, inputs, _ = CASES[name]
        torch.manual_seed(0)
        model = make()
        expected = ss.find_shortcuts(model, inputs)
        for inner in ("parts", "layers", "root"):
            torch.manual_seed(0)
            sharded = make()
            if name == "gpt2":
                sharded.head.weight = nn.Parameter(
                    sharded.head.weight.detach().clone()
                )  # units tie no weights
            shard(sharded, inner)
            before = [id(p) for p in sharded.parameters()]
            found = ss.find_shortcuts(sharded, inputs)
            assert plain_form(found) == plain_form(expected), f"{name}, {inner}: {found}"
            assert boundaries(sharded, inputs) == boundaries(model, inputs)
            assert before == [id(p) for p in sharded.parameters()], f"{name}, {inner}: not sharded as before"
            assert plain_form(ss.find_shortcuts(sharded, inputs)) == plain_form(expected)


def fsdp_options():
    """Ways to shard: half precision, weights kept after the forward pass, two modules as one unit, frozen weights."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    make, inputs, _ = CASES["t5"]
    expected = plain_form(ss.find_shortcuts(make(), inputs))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    for options in ({"mp_policy": half}, {"reshard_after_forward": False}):
        assert plain_form(ss.find_shortcuts(shard(make(), "layers", **options), inputs)) == expected
    grouped = make()
    fully_shard([grouped.encoder[0][0], grouped.encoder[0][1]])
    fully_shard([*grouped.decoder[1]])
    fully_shard(grouped)
    assert plain_form(ss.find_shortcuts(grouped, inputs)) == expected
    frozen = shard(make().requires_grad_(False), "parts")
    assert plain_form(ss.find_shortcuts(frozen, inputs)) == expected
    assert not any(p.requires_grad for p in frozen.parameters())
    with torch.no_grad():  # whole, as a forward pass leaves the root; found as whole, and left so
        frozen(**inputs)
        held = [id(p) for p in frozen.parameters()]
        assert plain_form(ss.find_shortcuts(frozen, inputs)) == expected
        assert held == [id(p) for p in frozen.parameters()]
        frozen(**inputs)


def tensor_parallel():
    """Weights spread over ranks inside a layer: found and edited like any."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def make():
        torch.manual_seed(0)
        return seq(Layer(), Layer(form="post")).double()

    model, (x, _) = make(), data()
    found = ss.find_shortcuts(model, x)
    sharded, mesh = make(), init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in sharded:
        parallelize_module(layer.mlp, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    assert plain_form(ss.find_shortcuts(sharded, x)) == plain_form(found)
    assert boundaries(sharded, x) == boundaries(model, x)
    for edit in EDITS:
        same(ss.ablate(sharded, found, **edit)(x), ss.ablate(model, found, **edit)(x), str(edit))


class Block(nn.Module):
    """Pre-norm attention and a gated MLP, whose heads may be spread over ranks."""

    def __init__(self):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.w1, self.w2, self.w3 = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 32)

    def attend(self, x):
        q, k, v = (f(x).view(*x.shape[:2], -1, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(
            ((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).transpose(1, 2).reshape(*x.shape[:2], -1)
        )

    def forward(self, x):
        x = x + self.attend(self.n1(x))
        y = self.n2(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.norm, self.out = nn.Embedding(40, 16), nn.LayerNorm(16), nn.Linear(16, 40, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.double()

    def forward(self, ids):
        x = self.emb(ids)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


def sequence_parallel(model, mesh, local):
    """The residual stream is spread over the positions, as local tensors or as DTensors."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    spread, rows = Shard(1), {"output_layouts": Shard(1), "use_local_output": local}
    columns = {"input_layouts": spread}
    parallelize_module(model, mesh, {
        "emb": RowwiseParallel(input_layouts=Replicate(), **rows), "norm": SequenceParallel(),
        "out": ColwiseParallel(**columns, output_layouts=Replicate()),
    })  # fmt: skip
    for block in model.blocks:
        parallelize_module(block, mesh, {
            **dict.fromkeys(("n1", "n2"), SequenceParallel()), **dict.fromkeys("qkv", ColwiseParallel(**columns)),
            "o": RowwiseParallel(**rows), "w1": ColwiseParallel(**columns), "w3": ColwiseParallel(**columns),
            "w2": RowwiseParallel(**rows),
        })  # fmt: skip
    return model


def spread_stream():
    """Sequence parallel: the same shortcuts, boundaries and twins as of the whole model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ids = torch.randint(0, 40, (2, 8), generator=torch.Generator().manual_seed(1))
    found, model = ss.find_shortcuts(Tokens(), ids), Tokens()
    assert [s.kind for s in found] == ["identity"] * 4
    for local in (True, False):
        spread = sequence_parallel(Tokens(), mesh, local)
        assert plain_form(ss.find_shortcuts(spread, ids)) == plain_form(found)
        for edit in EDITS:
            out = ss.ablate(spread, found, **edit)(ids)
            out = out.full_tensor() if isinstance(out, DTensor) else out
            same(out, ss.ablate(model, found, **edit)(ids), f"{local}, {edit}")


class Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def gathered(x):
    out = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(out, x)
    return sum(out)


class Split(nn.Module):
    """A block whose branch is summed over ranks by hand."""

    def __init__(self, reduce):
        super().__init__()
        self.a, self.b, self.reduce = nn.Linear(6, 6), nn.Linear(6, 6), reduce

    def forward(self, x):
        return x + self.reduce(self.b(self.a(x).relu()))


def collectives():
    """Collectives that a model calls itself: linked where torch's calls show what they give, else listed."""
    import torch.distributed._functional_collectives as functional
    import torch.distributed.nn.functional as differentiable

    def in_place(x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    world = dist.group.WORLD
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    for reduce in (
        Reduced.apply, in_place, differentiable.all_reduce, lambda x: sum(differentiable.all_gather(x)),
        lambda x: functional.all_reduce(x, "sum", world),
        lambda x: functional.all_gather_tensor_autograd(x, 0, world).unflatten(0, (-1, 4)).sum(0),
    ):  # fmt: skip
        torch.manual_seed(0)
        model = seq(Split(reduce), Split(reduce))
        found = ss.find_shortcuts(model, x)
        assert [s.kind for s in found] == ["identity"] * 2 and not found.opaque, (reduce, found)
        a, b = model
        expected = reduce(b.b(b.a(reduce(a.b(a.a(x).relu()))).relu()))
        torch.testing.assert_close(ss.ablate(model, found)(x), expected)
    found = ss.find_shortcuts(seq(Split(gathered)), x)
    assert not len(found) and [o.name for o in found.opaque] == ["empty"], found


def gradients_at(model, points, x, y):
    seen = {}

    def touch(i, activation):
        activation = activation if activation.requires_grad else activation.detach().requires_grad_()
        activation.register_hook(lambda g: seen.__setitem__(i, g.clone()))
        return activation

    with tap_boundaries(model, points, touch):
        F.mse_loss(model(x), y).backward()
    return [seen.get(i) for i in range(len(points))]


def fsdp_measure():
    model, (x, y) = stack(), data()
    points = boundaries(model, x)
    assert [p.kind for p in points].count("merge") == 4
    expected = gradients_at(model, points, x, y)
    flow, paths = ss.gradient_flow(model, (x, y), F.mse_loss), ss.path_spectrum(model, (x, y), F.mse_loss)
    split = ss.gradient_split(model, (x, y), F.mse_loss)
    for inner in ("parts", "layers", "root"):
        sharded = shard(stack(), inner)
        for a, b in zip(gradients_at(sharded, boundaries(sharded, x), x, y), expected, strict=True):
            same(a, b, f"gradients at boundaries, {inner}")
        sharded.zero_grad()
        ours = ss.gradient_flow(sharded, (x, y), F.mse_loss)
        assert [b.name for b in ours.boundaries] == [b.name for b in flow.boundaries]
        for a, b in zip(ours.boundaries, flow.boundaries, strict=True):
            assert abs(a.gradient_rms / b.gradient_rms - 1) < 1e-9, (inner, a, b)
        theirs = ss.path_spectrum(sharded, (x, y), F.mse_loss)
        same(torch.tensor(theirs.norms), torch.tensor(paths.norms), f"path lengths, {inner}")
        parts = ss.gradient_split(sharded, (x, y), F.mse_loss)
        for a, b in zip(parts, split, strict=True):
            assert a.name == b.name and abs(a.branch_rms / b.branch_rms - 1) < 1e-9, (inner, a, b)
        assert len(ss.find_shortcuts(sharded, x)) == 4


def fsdp_edit():
    model, (x, y) = stack(), data()
    found = ss.find_shortcuts(model, x)
    sharded = shard(stack(), "layers")
    for refused in (lambda: ss.ablate(sharded, found), lambda: ss.ablate(sharded, found, share=True)):
        try:
            refused()
        except ss.SkipscopeError as error:
            assert "fully_shard the twin that comes out" in str(error), error
        else:
            raise AssertionError("a sharded model was copied")
    for edit in ({}, {"how": "detach"}, {"how": "lesion"}, {"strength": 0.5}):
        alone, twin = ss.ablate(model, found, **edit), shard(ss.ablate(model, found, **edit), "layers")
        train(alone, x, y)
        train(twin, x[mine()], y[mine()])
        for (name, a), b in zip(twin.named_parameters(), alone.parameters(), strict=True):
            same(a.full_tensor(), b, f"{edit}, {name}")


def fsdp_alone():
    sharded, (x, _) = shard(stack(), "layers"), data()
    if dist.get_rank() == 0:
        import skipscope._ranks as ranks

        ranks.TIMEOUT_S = 1.0
        try:
            ss.find_shortcuts(sharded, x)
        except ss.SkipscopeError as error:
            print("REFUSED", error)
    dist.barrier()


# --- DDP ---


def mine():
    return torch.arange(dist.get_rank(), BATCH, dist.get_world_size())


def train(model, x, y, accumulate=1, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        for k, (a, b) in enumerate(zip(x.chunk(accumulate), y.chunk(accumulate), strict=True)):
            waits = k < accumulate - 1 and hasattr(model, "no_sync")
            with model.no_sync() if waits else contextlib.nullcontext():
                (F.mse_loss(model(a), b) / accumulate).backward()
        optimizer.step()


def ddp_short():
    ddp(edits=({},), accumulations=(2,))


def ddp(edits=EDITS, accumulations=(1, 2)):
    model, (x, y) = stack(), data()
    wrapped = nn.parallel.DistributedDataParallel(stack())
    found = ss.find_shortcuts(model, x)
    assert ss.find_shortcuts(wrapped, x) == found
    assert boundaries(wrapped, x) == boundaries(model, x)
    if dist.get_rank() == 0:
        ss.find_shortcuts(wrapped, x)  # local: a rank may call it alone
    for edit in edits:
        for accumulate in accumulations:
            alone = ss.ablate(model, found[::2], **edit)
            twin = nn.parallel.DistributedDataParallel(
                ss.ablate(wrapped, found[::2], **edit), find_unused_parameters=True
            )
            train(alone, x, y)
            train(twin, x[mine()], y[mine()], accumulate)
            for (name, a), b in zip(twin.named_parameters(), alone.parameters(), strict=True):
                same(a, b, f"{edit}, {accumulate}, {name}")


def ddp_batch_norm():
    torch.manual_seed(0)
    model, x = ResNet(Basic, [4, 8], [2, 2]).double(), images(4).double()
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    assert ss.find_shortcuts(wrapped, x) == ss.find_shortcuts(model, x)
    share, plain = x[dist.get_rank() :: dist.get_world_size()], copy.deepcopy(model)
    # Removed projections hold weights that no gradient reaches.
    twin = nn.parallel.DistributedDataParallel(
        ss.ablate(wrapped, inputs=x).eval(), find_unused_parameters=True
    )
    alone = ss.ablate(plain, inputs=x).eval()
    twin(share).square().mean().backward()
    alone(x).square().mean().backward()
    for (name, a), b in zip(twin.named_parameters(), alone.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if b.grad is not None:
            same(a.grad, b.grad, name)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    globals()[sys.argv[1]]()
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a process that ends in the ordinary manner may be aborted by gloo's threads
