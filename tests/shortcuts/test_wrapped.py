"""Models as users hold them: with a cache, wrapped, compiled, checkpointed or without memory."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import skipscope as ss

IDS = torch.arange(12).view(2, 6)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x, cache=None, layer=0):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        return x + self.mlp(x)


class Language(nn.Module):
    def __init__(self, run=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.run = nn.Embedding(20, 8), nn.Linear(8, 20), run
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids, cache=None):
        x = self.embed(ids)
        for layer, block in enumerate(self.blocks):
            x = block(x, cache, layer) if self.run is None else self.run(block, x)
        return self.head(x)


def loss(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


class Growing:
    """A cache that gets longer with each call."""

    def __init__(self):
        self.k, self.v, self.filled = [], [], {}

    def update(self, layer, k, v):
        if len(self.k) <= layer:
            self.k.append(k)
            self.v.append(v)
        else:
            self.k[layer] = torch.cat([self.k[layer], k], 1)
            self.v[layer] = torch.cat([self.v[layer], v], 1)
        return self.k[layer], self.v[layer]


class Fixed:
    """A cache of a fixed size, written in place."""

    __slots__ = ("filled", "k", "v")

    def __init__(self):
        self.k, self.v, self.filled = torch.zeros(2, 2, 16, 8), torch.zeros(2, 2, 16, 8), {0: 0, 1: 0}

    def update(self, layer, k, v):
        start, end = self.filled[layer], self.filled[layer] + k.shape[1]
        self.k[layer, :, start:end], self.v[layer, :, start:end] = k, v
        self.filled[layer] = end
        return self.k[layer, :, :end].clone(), self.v[layer, :, :end].clone()


@pytest.mark.parametrize("kind", [Growing, Fixed])
def test_a_cache_is_left_as_found_and_each_pass_sees_the_same(kind):
    model, cache = Language(), kind()
    with torch.no_grad():
        model(IDS, cache)
    before, batch = copy.deepcopy((cache.k, cache.v, cache.filled)), ((IDS, cache), IDS)
    found = ss.find_shortcuts(model, (IDS, cache))
    assert [s.kind for s in found] == ["identity"] * 4
    twice = [ss.gradient_flow(model, batch, loss) for _ in range(2)]
    numbers = [[b.gradient_rms for b in flow.boundaries] for flow in twice]
    assert len(numbers[0]) == 6 and numbers[0] == numbers[1]
    assert len(ss.gradient_split(model, batch, loss)) == len(ss.importance(model, batch, loss)) == 4
    assert ss.path_spectrum(model, batch, loss).residual < 1e-6
    twin = ss.ablate(model, found, "detach")
    assert torch.equal(twin(IDS, copy.deepcopy(cache)), model(IDS, copy.deepcopy(cache)))
    for kept, now in zip(before[:2], (cache.k, cache.v)):
        assert len(kept) == len(now) and all(torch.equal(a, b) for a, b in zip(kept, now))
        assert not any(tensor.requires_grad for tensor in now)
    assert before[2] == cache.filled


def compiled(model):
    model.compile(backend="eager")
    return model


def warm(model):
    model = torch.compile(model, backend="eager")
    model(IDS)
    return model


def compiled_blocks(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")
    return model


def distributed(model):
    return DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=True)


def distributed_static(model):
    model = DistributedDataParallel(model, static_graph=True)
    model(IDS).sum().backward()
    model.zero_grad()
    return model


def checkpointed(model):
    model.run = lambda block, x: checkpoint(block, x, use_reentrant=False)
    return model


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'ranks'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    "wrap",
    [compiled, warm, compiled_blocks, distributed, distributed_static, checkpointed],
    ids=lambda f: f.__name__,
)
def test_what_is_wrapped_is_as_right_as_the_model_inside(wrap):
    torch._dynamo.reset()
    model, plain = wrap(Language()), Language()
    found, expected = ss.find_shortcuts(model, IDS), ss.find_shortcuts(plain, IDS)
    assert [s.kind for s in found] == [s.kind for s in expected] == ["identity"] * 4
    for how in ("remove", "detach", "lesion"):
        twin, right = ss.ablate(model, found, how), ss.ablate(plain, expected, how)
        torch.testing.assert_close(twin(IDS), right(IDS))
    flows = [ss.gradient_flow(m, (IDS, IDS), loss) for m in (model, plain)]
    one, other = ([b.gradient_rms for b in flow.boundaries] for flow in flows)
    assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_merges_that_are_checkpointed_outside_of_a_module_are_refused(reentrant):
    def run(block, x):
        return checkpoint(lambda x: x + block.mlp(x), x, use_reentrant=reentrant)

    model = Language(run)
    found = ss.find_shortcuts(model, IDS)
    assert [s.kind for s in found] == ["identity", "identity"]
    with pytest.raises(ss.SkipscopeError, match="checkpoint whole modules instead"):
        ss.ablate(model, found)


def test_a_twin_of_a_model_without_memory_takes_the_weights_of_the_real_one():
    with torch.device("meta"):
        model = Language()
    found = ss.find_shortcuts(model, torch.zeros(2, 6, dtype=torch.long, device="meta"))
    twin, real = ss.ablate(model, found), Language()
    assert all(p.is_meta for p in model.parameters())
    twin.to_empty(device="cpu")
    twin.load_state_dict(real.state_dict())
    removed = ss.ablate(real, ss.find_shortcuts(real, IDS))
    assert torch.equal(twin(IDS), removed(IDS))
