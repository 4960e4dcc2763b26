"""What each rank checks in test_sharded.py; a failed check ends the process, and with it the test.

torchrun --standalone --nproc-per-node 2 sharded_worker.py KIND [FOLDER]
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

import skipscope as ss


class Attention(nn.Module):
    """A block of a transformer, with tied q, k and v, and no dimension that ranks divide."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)
        self.mlp, self.head = nn.Sequential(nn.Linear(6, 13), nn.GELU(), nn.Linear(13, 6)), nn.Linear(6, 5)

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        return self.head((x + self.mlp(x)).mean(1))


class Residual(nn.Module):
    """A convolutional block around which the activation is added."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.norm(self.conv(x)))


class Labelled(nn.Module):
    """As Hugging Face's: its output carries the loss."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def mlp():
    return nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.Linear(9, 5), nn.GELU(), nn.Linear(5, 5))


def conv():
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), Residual(5), Residual(5), nn.Flatten(), nn.Linear(80, 5)
    )


INPUTS = {
    mlp: lambda n, g: torch.randn(n, 7, generator=g, dtype=torch.float64),
    conv: lambda n, g: torch.randn(n, 2, 6, 6, generator=g, dtype=torch.float64),
    Attention: lambda n, g: torch.randint(11, (n, 4), generator=g),
}
NETS = tuple(INPUTS)
OPTIONS = (
    {}, {"orthogonal": True, "normalize": "layer", "zero": ()}, {"l2": 0.1, "normalize": "tensor"},
    {"samples": 17, "metrics": {"accuracy": lambda output, y: (output.argmax(-1) == y).double().mean()}},
)  # fmt: skip


def build(make):
    torch.manual_seed(0)
    model = make().double()
    for buffer in (b for name, b in model.named_buffers() if "running" in name):
        buffer.copy_(torch.rand(buffer.shape, dtype=torch.float64) + 0.5)
    return model.train()


def shard(model, inner=True, **options):
    if inner:
        for module in list(model.modules()):
            if isinstance(module, nn.Linear | Residual | nn.Conv2d) and not _inside(model, module):
                fully_shard(module, **options)
    return fully_shard(model, **options)


def _inside(model, module):
    return any(isinstance(m, Residual) and module in set(m.modules()) - {m} for m in model.modules())


def batches_of(make, sizes, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [(INPUTS[make](n, g), torch.randint(5, (n,), generator=g)) for n in sizes]


def state(model):
    """Everything that must be as it was: shards, gradients, buffers, modes, identities."""
    tensors = [(n, id(p), p.requires_grad, p.grad is None) for n, p in model.named_parameters()]
    shards = [p.to_local().clone() if hasattr(p, "to_local") else p.clone() for p in model.parameters()]
    buffers = [b.clone() for b in model.buffers()]
    flags = [(n, m.training, m._buffers.keys(), getattr(m, "momentum", 0)) for n, m in model.named_modules()]
    return tensors, shards, buffers, flags


def assert_as_found(model, before):
    after = state(model)
    assert after[0] == before[0] and after[3] == before[3]
    for a, b in zip(after[1] + after[2], before[1] + before[2], strict=True):
        assert torch.equal(a, b)


def assert_same(ours, expected, what):
    close = {"rtol": 1e-11, "atol": 1e-13}
    for name in ("values", "stderr", "centre_stderr", "computed"):
        a, b = (torch.as_tensor(getattr(surface, name)) for surface in (ours, expected))
        torch.testing.assert_close(a, b, **close, msg=lambda text: f"{what}, {name}: {text}")
    for name, metric in expected.metrics.items():
        torch.testing.assert_close(torch.as_tensor(ours.metrics[name]), torch.as_tensor(metric), **close)
    assert ours.checks.passed, (what, ours.checks)
    assert ours.checks.samples == expected.checks.samples and ours.label == expected.label
    assert ours.name == expected.name and ours.provenance.data_hash
    assert ours.provenance.weights_hash == expected.provenance.weights_hash
    assert abs(ours.scores.roughness - expected.scores.roughness) < 1e-8, what


def same_on_all_ranks(surface):
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, (surface.values.tobytes(), surface.to_dict()["scores"]))
    assert len(set(map(repr, every))) == 1


def short():
    """What runs in CI: a share of the batches each, and the same data on both."""
    data = batches_of(mlp, (12, 7, 11))
    expected = ss.landscape(build(mlp), ss.batches(data), F.cross_entropy, grid=3, strategy="plain")
    model, mine = shard(build(mlp)), data[:1] if dist.get_rank() == 0 else data[1:]
    model(data[0][0]).sum().backward()
    before, grads = state(model), [(p.grad, p.grad.to_local().clone()) for p in model.parameters()]
    for given in (mine, data):
        assert_same(ss.landscape(model, ss.batches(given), F.cross_entropy, grid=3), expected, len(given))
    assert_as_found(model, before)
    for p, (grad, held) in zip(model.parameters(), grads, strict=True):
        assert p.grad is grad and torch.equal(grad.to_local(), held)


def same_data():
    """The same batches on every rank count once: what one process measures, to rounding."""
    for make in NETS:
        for sizes in ((30,), (12, 7, 11)):
            data = ss.batches(batches_of(make, sizes)) if len(sizes) > 1 else batches_of(make, sizes)[0]
            for options in OPTIONS if len(sizes) > 1 else OPTIONS[:1]:
                expected = ss.landscape(
                    build(make), data, F.cross_entropy, grid=(3, 2), strategy="plain", **options
                )
                model = shard(build(make), inner=len(sizes) > 1)
                before = state(model)
                ours = ss.landscape(model, data, F.cross_entropy, grid=(3, 2), **options)
                assert_same(ours, expected, f"{make.__name__}, {sizes}, {options}")
                assert ours.provenance.data_hash == expected.provenance.data_hash
                assert_as_found(model, before)
                same_on_all_ranks(ours)


def directions():
    """Bit for bit those of the whole model, uneven shards and all, one filter and empty shards too."""
    for make in NETS:
        for options in (
            {},
            {"normalize": "layer"},
            {"normalize": "tensor", "zero": ()},
            {"normalize": "none"},
        ):
            plain, model = build(make), shard(build(make))
            first, ours = ss.random_direction(plain, **options), ss.random_direction(model, **options)
            second = ss.random_direction(plain, axis=1, like=first, **options)
            theirs = ss.random_direction(model, axis=1, like=ours, keep=False, **options)
            assert list(first) == list(ours) and list(second) == list(theirs)
            for name in first:
                assert torch.equal(ours[name].full_tensor(), first[name]), (make, options, name)
                assert torch.equal(theirs[name].full_tensor(), second[name]), (make, options, name)
    own = ss.landscape(model, batches_of(make, (20,))[0], F.cross_entropy, grid=3, directions=[first, second])
    as_shards = ss.landscape(
        model, batches_of(make, (20,))[0], F.cross_entropy, grid=3, directions=[ours, theirs]
    )
    assert (own.values == as_shards.values).all()


def own_shares():
    """Each rank's own batches, another number of them on each, together are the data."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for make in NETS:
        every = [batches_of(make, [9 + r] * (1 + r % 2) + [3], seed=r) for r in range(world)]
        together = ss.batches([batch for own in every for batch in own])
        for options in OPTIONS:
            expected = ss.landscape(
                build(make), together, F.cross_entropy, grid=(3, 2), strategy="plain", **options
            )
            model = shard(build(make))
            ours = ss.landscape(model, ss.batches(every[rank]), F.cross_entropy, grid=(3, 2), **options)
            assert_same(ours, expected, f"{make.__name__}, {options}")
    alone = [batches_of(mlp, (12,), seed=r)[0] for r in range(world)]  # one batch a rank: several together
    expected = ss.landscape(build(mlp), ss.batches(alone), F.cross_entropy, grid=3, strategy="plain")
    assert_same(
        ss.landscape(shard(build(mlp)), alone[rank], F.cross_entropy, grid=3), expected, "a batch a rank"
    )


def batch_norm():
    data = ss.batches(batches_of(conv, (12, 7, 11)))
    for mode in ("recalibrate", "batch", "as found"):
        expected = ss.landscape(build(conv), data, F.cross_entropy, grid=3, batch_norm=mode, strategy="plain")
        model = shard(build(conv))
        before = state(model)
        ours = ss.landscape(model, data, F.cross_entropy, grid=3, batch_norm=mode)
        assert_same(ours, expected, mode)
        assert ours.provenance.batch_norm == expected.provenance.batch_norm
        assert_as_found(model, before)


def paired(folder):
    """Twins that share weights, and twins that do not; of batch norms the removed twin's are measured again."""
    data = ss.batches(batches_of(conv, (12, 7, 11)))
    plain = {"with": build(conv), "without": ss.ablate(build(conv), inputs=data.first()[0])}
    options = {"grid": 5, "tolerance": 0.05}
    expected = ss.paired_landscapes(plain, data, F.cross_entropy, strategy="plain", **options)
    twins = {name: shard(model) for name, model in plain.items()}
    before = {name: state(model) for name, model in twins.items()}
    ours = ss.paired_landscapes(twins, data, F.cross_entropy, store=folder, **options)
    for name in plain:
        assert_same(ours.surfaces[name], expected.surfaces[name], name)
        assert_as_found(twins[name], before[name])
    assert "recalibration" in ours.surfaces["without"].provenance.batch_norm
    assert ours.notes == expected.notes
    for name in ("values", "stderr", "low", "high"):
        a, b = (torch.as_tensor(getattr(pair.differences["without"], name)) for pair in (ours, expected))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    other = build(conv)
    nn.init.normal_(other[0].weight)
    apart = ss.paired_landscapes(
        {"one": shard(build(conv)), "other": shard(other)}, data, F.cross_entropy, grid=3, seed=[0, 1]
    )
    assert not apart.pairs["0"].differences
    dist.barrier()
    assert ss.load(folder).surfaces["with"].checks.weights_restored


def found_whole():
    """A root that a forward pass left whole is found as whole, and left so."""
    data = batches_of(mlp, (20,))[0]
    expected = ss.landscape(build(mlp), data, F.cross_entropy, grid=3, strategy="plain")
    for inner in (True, False):
        model = shard(build(mlp), inner)
        with torch.no_grad():
            model(data[0])
        held = [id(p) for p in model.parameters()]
        assert (ss.landscape(model, data, F.cross_entropy, grid=3).values == expected.values).all()
        assert held == [id(p) for p in model.parameters()]


def losses():
    """An objective, a loss that differentiates the network, a Mapping, a sum, and several meshes of replicas."""

    @ss.objective
    def own(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1]) + model(batch[0][:1]).square().mean()

    @ss.objective
    def penalised(model, batch):
        x = batch[0].detach().requires_grad_()
        slope = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)[0]
        return slope.square().mean()

    data = ss.batches(batches_of(mlp, (12, 7, 11)))
    for loss, extra in (
        (own, {"weight": lambda batch: len(batch[0])}), (penalised, {"weight": lambda batch: len(batch[0])}), (nn.CrossEntropyLoss(reduction="sum"), {}),
    ):  # fmt: skip
        expected = ss.landscape(build(mlp), data, loss, grid=3, strategy="plain", **extra)
        ours = ss.landscape(shard(build(mlp)), data, loss, grid=3, **extra)
        torch.testing.assert_close(
            torch.as_tensor(ours.values), torch.as_tensor(expected.values), rtol=1e-11, atol=0
        )
        assert ours.checks.passed
    named = [{"x": x, "labels": y} for x, y in data]
    expected = ss.landscape(build(Labelled), ss.batches(named), grid=3, strategy="plain")
    mine = named[dist.get_rank() :: dist.get_world_size()] or named[:1]
    for given in (named, mine) if dist.get_world_size() < 4 else (named,):
        ours = ss.landscape(shard(build(Labelled)), ss.batches(given), grid=3)
        torch.testing.assert_close(
            torch.as_tensor(ours.values), torch.as_tensor(expected.values), rtol=1e-11, atol=0
        )
        assert ours.checks.passed and ours.label == expected.label
    if dist.get_world_size() == 4:
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        expected = ss.landscape(build(mlp), data, F.cross_entropy, grid=3, strategy="plain")
        assert_same(
            ss.landscape(shard(build(mlp), mesh=mesh), data, F.cross_entropy, grid=3), expected, "hybrid"
        )


def eigenvalues():
    """Both ends, equal to those of one process: the same batches on each rank, or shares of them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    cases = (
        (mlp, {}), (mlp, {"k": 2, "block": 2, "parameters": "4.*", "seed": 3}), (conv, {"matrix": "gauss_newton"}),
        (conv, {"training": True, "parameters": ["0.*", "2.*"]}), (Attention, {"parameters": "mlp.*"}),
        (mlp, {"mode": "finite differences", "parameters": "4.*", "tol": 1e-2}),
    )  # fmt: skip
    for make, options in cases:
        data = batches_of(make, [6 + i for i in range(2 * world)] if world < 4 else [9, 6, 8, 7, 5])
        shares = [data[i * len(data) // world : (i + 1) * len(data) // world] for i in range(world)]
        expected = ss.extreme_eigenvalues(build(make), ss.batches(data), F.cross_entropy, **options)
        for given in (data, shares[rank]):
            model = shard(build(make))
            before = state(model)
            ours = ss.extreme_eigenvalues(model, ss.batches(given), F.cross_entropy, vectors=True, **options)
            assert_as_found(model, before)
            assert ours.converged and ours.method.startswith(expected.method.partition(",")[0])
            for name in ("smallest", "largest"):
                a, b = (torch.as_tensor(getattr(e, name)) for e in (ours, expected))
                loose = options.get("mode") is not None
                torch.testing.assert_close(a, b, rtol=1e-6 if loose else 1e-9, atol=1e-7 if loose else 1e-11)
    alone = batches_of(mlp, (20,))[0]
    expected = ss.extreme_eigenvalues(build(mlp), alone, F.cross_entropy)
    model = shard(build(mlp), inner=False)
    ours = ss.extreme_eigenvalues(model, alone, F.cross_entropy, vectors=True)
    assert abs(ours.largest - expected.largest).max() < 1e-10
    along = ss.landscape(
        model, alone, F.cross_entropy, grid=(3,), directions=[ours.direction("largest")], span=1e-3
    )
    bend = float((along.values[0] - 2 * along.values[1] + along.values[2]) / 1e-6)
    assert abs(bend - ours.largest[0]) < 1e-4 * ours.largest[0]
    _eigenvalues_refused(model, rank)


def _eigenvalues_refused(model, rank):
    calls, before = [], state(model)

    def fails_on_one(output, y):
        calls.append(y)
        if rank == 1 and len(y) == 8:
            raise ArithmeticError("no logarithm of that")
        return F.cross_entropy(output, y)

    data = ss.batches(batches_of(mlp, [9, 7, 8, 6], seed=rank))
    try:
        ss.extreme_eigenvalues(model, data, fails_on_one, mode="finite differences", tol=1e-9)
    except (ArithmeticError, ss.SkipscopeError) as error:
        assert "no logarithm of that" in str(error) and (rank == 1 or "rank 1 failed" in str(error)), error
    else:
        raise AssertionError("the loss's error was lost")
    refused(lambda: ss.extreme_eigenvalues(model, data, F.cross_entropy, k=0), "k is out of range")
    refused(lambda: ss.extreme_eigenvalues(model, data, F.cross_entropy, mode="none"), "unknown mode")
    refused(lambda: ss.spectral_density(model, data, F.cross_entropy), "spread over ranks")
    assert_as_found(model, before)


def eigenvalues_killed(folder):
    calls = []

    def loss(output, y):
        calls.append(y)
        if dist.get_rank() == 1 and len(calls) > 60:
            os.kill(os.getpid(), signal.SIGKILL)
        return F.cross_entropy(output, y)

    data = ss.batches(batches_of(mlp, [9, 7, 8, 6]))
    try:
        ss.extreme_eigenvalues(shard(build(mlp)), data, loss, mode="finite differences", tol=1e-9)
    except ss.SkipscopeError as error:
        Path(folder, f"told-{dist.get_rank()}.txt").write_text(str(error))
        os._exit(1)


class Tied(nn.Module):
    """A language model whose embedding is also its head, with a frozen weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.body.bias.requires_grad_(False)

    def forward(self, ids):
        return self.head(F.gelu(self.body(self.embed(ids)))).mean(1)


INPUTS[Tied] = INPUTS[Attention]


def narrow():
    return nn.Sequential(nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 5))


INPUTS[narrow] = INPUTS[mlp]


def sharding_options():
    """Options of fully_shard: tied and frozen weights, empty shards, kept weights, two modules as one unit, by columns."""
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.tensor import Shard

    def grouped(model):
        fully_shard([model[0], model[2]])
        return fully_shard(model)

    def inner_only(model):
        fully_shard(model[2])  # the rest is whole on every rank
        return model

    def by_columns(p):
        return Shard(1) if p.ndim > 1 and p.shape[1] % dist.get_world_size() == 0 else None

    single = MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=torch.float64)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    for make, sharded, close in (
        (Tied, fully_shard, 1e-12), (narrow, shard, 1e-12), (mlp, grouped, 1e-12), (mlp, inner_only, 1e-12),
        (mlp, lambda m: shard(m, reshard_after_forward=False), 1e-12),
        (Attention, lambda m: shard(m, shard_placement_fn=by_columns), 1e-12),
        (mlp, lambda m: shard(m, mp_policy=single), 1e-5), (mlp, lambda m: shard(m, mp_policy=half), 3e-2),
    ):  # fmt: skip
        data = ss.batches(batches_of(make, (12, 7, 11)))
        expected = ss.landscape(build(make), data, F.cross_entropy, grid=3, strategy="plain")
        model = sharded(build(make))
        before = state(model)
        ours = ss.landscape(model, data, F.cross_entropy, grid=3)
        torch.testing.assert_close(
            torch.as_tensor(ours.values), torch.as_tensor(expected.values), rtol=close, atol=close
        )
        assert ours.checks.passed
        ends = ss.extreme_eigenvalues(model, data, F.cross_entropy)
        alone = ss.extreme_eigenvalues(build(make), data, F.cross_entropy)
        assert abs(ends.largest - alone.largest).max() < 1e-9 and ends.parameters == alone.parameters
        assert_as_found(model, before)
        model(data.first()[0]).sum().backward()  # it can still be trained
    refused(
        lambda: ss.paired_landscapes({"a": model, "b": build(mlp)}, data, F.cross_entropy, grid=3),
        "1 of 2", "fully_shard the others",
    )  # fmt: skip


def refused(call, *words):
    try:
        call()
    except ss.SkipscopeError as error:
        text = str(error)
        assert all(word in text for word in words), text
    else:
        raise AssertionError(f"not refused: {words}")


def errors(folder):
    """What is wrong on one rank ends the call on all, in words, and nothing of the model has changed."""
    model, data, rank = shard(build(conv)), batches_of(conv, (12, 7, 11)), dist.get_rank()
    before = state(model)

    def landscape(data, loss=F.cross_entropy, **options):
        return ss.landscape(model, data, loss, grid=3, **options)

    class Broken:
        def __iter__(self):
            yield data[0]
            if rank == 1:
                raise OSError("the file is gone")

    def fails_on_one(output, y):
        calls.append(y)
        if rank == 1 and len(calls) > 6:
            raise ArithmeticError("no logarithm of that")
        return F.cross_entropy(output, y)

    calls = []
    last = [] if rank else data
    try:
        landscape(Broken())
    except (OSError, ss.SkipscopeError) as error:
        assert "the file is gone" in str(error), error
    else:
        raise AssertionError("the loader's error was lost")
    try:
        landscape(ss.batches(data), fails_on_one)
    except (ArithmeticError, ss.SkipscopeError) as error:
        assert "no logarithm of that" in str(error) and (rank == 1 or "rank 1 failed" in str(error)), error
    else:
        raise AssertionError("the loss's error was lost")
    assert_as_found(model, before)
    try:  # on every rank
        landscape((torch.randn(4, 3, 6, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.long)))
    except (RuntimeError, ss.SkipscopeError) as error:
        assert "channels" in str(error), error
    assert_as_found(model, before)
    _a_forward_pass_fails(rank)
    refused(lambda: landscape(_Iterable(last)), "the data is empty")
    refused(lambda: landscape(data[0], engine="ray"), "not on Ray")
    refused(lambda: landscape(data[0], strength=ss.find_shortcuts(model, data[0][0])), "fully_shard")
    path = Path(folder) / "file"
    if rank == 0:
        path.write_text("no folder")
    refused(lambda: landscape(data[0], store=path / "store"), "cannot make the store")
    buffer = model[1].running_mean
    kept = buffer.clone()
    buffer.add_(rank)
    refused(lambda: landscape(data[0]), "1.running_mean", "SyncBatchNorm")
    buffer.copy_(kept)
    assert_as_found(model, before)
    expected = ss.landscape(build(conv), data[0], F.cross_entropy, grid=3, strategy="plain")
    assert_same(landscape(data[0]), expected, "after all these")


def _a_forward_pass_fails(rank):
    """Inside the model, between two units: the other ranks are in the middle of the same pass."""
    for late in (0, 5):
        model = shard(build(Attention))
        before = state(model)
        good = batches_of(Attention, (9, 9), seed=rank)
        if rank == 1:
            good[late and 1][0][3, 2] = 11  # no such row of the embedding
        try:
            ss.landscape(model, ss.batches(good), F.cross_entropy, grid=3)
        except (IndexError, ss.SkipscopeError) as error:
            assert "index out of range" in str(error) and (rank == 1 or "rank 1 failed" in str(error)), error
        else:
            raise AssertionError("the model's error was lost")
        assert_as_found(model, before)
        model(batches_of(Attention, (4,))[0][0]).sum().backward()
        data = batches_of(Attention, (9,))[0]
        expected = ss.landscape(build(Attention), data, F.cross_entropy, grid=3, strategy="plain")
        assert_same(ss.landscape(model, data, F.cross_entropy, grid=3), expected, "afterwards")


class _Iterable:
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def alone():
    import skipscope._ranks as ranks

    model = shard(build(mlp))
    if dist.get_rank() == 0:
        ranks.TIMEOUT_S = 1.0
        try:
            ss.landscape(model, batches_of(mlp, (8,))[0], F.cross_entropy, grid=3)
        except ss.SkipscopeError as error:
            print("REFUSED", error)
    dist.barrier()


def run(folder, kill_after=None):
    """A stored surface of 9 x 9; with ``kill_after`` the last rank is killed after so many evaluations."""
    calls = []

    def loss(output, y):
        calls.append(y)
        if len(calls) == kill_after and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return F.cross_entropy(output, y)

    import skipscope.surfaces._surface_run as straight

    straight._UNIT_S = 0.0  # a unit is a point
    data = ss.batches(batches_of(conv, (12, 7, 11)))
    expected = ss.landscape(build(conv), data, loss, grid=9, strategy="plain") if kill_after is None else None
    try:
        ours = ss.landscape(shard(build(conv)), data, loss, grid=9, store=Path(folder) / "surface.zarr")
    except ss.SkipscopeError as error:
        Path(folder, f"told-{dist.get_rank()}.txt").write_text(str(error))
        os._exit(1)
    torch.testing.assert_close(
        torch.as_tensor(ours.values), torch.as_tensor(expected.values), rtol=1e-11, atol=0
    )
    Path(folder, f"calls-{dist.get_rank()}.txt").write_text(str(len(calls)))


def killed(folder):
    run(folder, kill_after=70)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a process that ends in the ordinary manner may be aborted by gloo's threads
