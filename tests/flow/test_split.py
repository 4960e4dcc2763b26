"""The split at each fork against the chain rule by hand; the edges sum to the fork's gradient."""

import numpy as np
import pytest
import torch
from torch import nn

import skipscope as ss
from flow import oracles
from skipscope.flow.split._gradient_arrivals import BackwardGraph, MergeEdges
from skipscope.shortcuts import tap_merges

mse = nn.functional.mse_loss


def rms(value):
    return float(value.double().square().mean().sqrt())


def test_a_chain_is_the_difference_of_neighbours():
    """For y = x + f(x): the branch brings grad(x) - grad(y), the shortcut grad(y)."""
    model, x = oracles.chain(5), torch.randn(4, 6, dtype=torch.float64)
    split = ss.gradient_split(model, (x, x[:, :3]), mse)
    kept = [x.clone().requires_grad_()]
    for block in list(model.parts)[:-1]:
        kept.append(block(kept[-1]))
        kept[-1].retain_grad()
    mse(model.parts[-1](kept[-1]), x[:, :3]).backward()
    grads = [k.grad for k in kept]
    assert len(split) == 5
    for row, here, after in zip(split, grads, grads[1:]):
        branch = here - after
        assert row.branch_rms == pytest.approx(rms(branch), rel=1e-10)
        assert row.shortcut_rms == pytest.approx(rms(after), rel=1e-10)
        assert row.fork_rms == pytest.approx(rms(here), rel=1e-10)
        cosine = float((branch * after).sum() / branch.norm() / after.norm())
        assert row.cosine == pytest.approx(cosine, abs=1e-10)
        assert row.share == pytest.approx(rms(after) / (rms(after) + rms(branch)))
        assert row.other_rms is None and row.residual < 1e-15


def test_a_scaled_shortcut_brings_its_scale():
    model, x = oracles.chain(3, scale=0.25), torch.randn(4, 6, dtype=torch.float64)
    split = ss.gradient_split(model, (x, x[:, :3]), mse)
    for row, after in zip(split, list(split)[1:]):
        assert row.shortcut_rms == pytest.approx(0.25 * after.fork_rms, rel=1e-10)


def test_other_consumers_of_a_fork_are_told_apart():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.late = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            hidden = self.a(x).tanh()
            return torch.cat([hidden + self.b(hidden).tanh(), self.late(hidden)], 1)

    model, x = Dense().double(), torch.randn(3, 4, dtype=torch.float64)
    (row,) = [r for r in ss.gradient_split(model, (x, torch.zeros(3, 8).double()), mse) if r.name == "b"]
    assert row.other_rms > 0 and row.residual < 1e-15


def test_two_merges_of_the_same_operands_are_told_apart():
    """y = [2 (x + f), 3 (x + f)], each sum made by itself: each fork gets its own sum's part, the rest is other."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

        def forward(self, x):
            f = self.f(x)
            return 2 * (x + f), 3 * (x + f)

    model, x = Both().double(), torch.randn(3, 4, dtype=torch.float64)
    split = ss.gradient_split(model, (x, torch.zeros(1)), lambda y, _: (y[0] + y[1]).square().sum())
    g = 2 * 5 * (x + model.f(x)).detach()
    assert [row.shortcut_rms for row in split] == pytest.approx([rms(2 * g), rms(3 * g)])
    assert [row.other_rms for row in split] == pytest.approx([rms(3 * g), rms(2 * g)])


def test_a_merge_that_reshapes_its_operands_first():
    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

        def forward(self, x):
            return torch.dstack([x, self.f(x)])

    model, x = Stacked().double(), torch.randn(3, 4, dtype=torch.float64)
    (row,) = ss.gradient_split(model, (x, torch.zeros(1)), lambda y, _: y.square().sum())
    assert row.shortcut_rms == pytest.approx(rms(2 * x)) and row.other_rms is None and row.branch_rms > 0


@pytest.mark.parametrize("make", [oracles.PostActivation, oracles.Overwritten, lambda inner: oracles.Dense(4, inner),
                                  lambda inner: oracles.Gated(inner, 4), lambda inner: oracles.Projected(4, inner)])  # fmt: skip
def test_every_kind_sums_to_the_fork(make):
    torch.manual_seed(0)
    inner = [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(3)]
    model = nn.Sequential(nn.Linear(4, 4), *[make(i) for i in inner]).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    split = ss.gradient_split(model, (x, x), mse)
    assert len(split) == 3
    assert all(row.residual < 1e-14 and row.branch_rms > 0 and row.shortcut_rms > 0 for row in split)


def test_two_batches_are_one():
    model, x = oracles.chain(3), torch.randn(9, 6, dtype=torch.float64)
    whole = ss.gradient_split(model, (x, x[:, :3]), mse)
    parts = ss.gradient_split(model, ss.batches([(x[:4], x[:4, :3]), (x[4:], x[4:, :3])]), mse)
    for name in ("branch_rms", "shortcut_rms", "cosine", "fork_rms"):
        np.testing.assert_allclose(
            [getattr(r, name) for r in parts], [getattr(r, name) for r in whole], rtol=1e-10
        )


def test_some_of_the_shortcuts_in_a_plain_list():
    model, x = oracles.chain(3), torch.randn(4, 6, dtype=torch.float64)
    chosen = list(ss.find_shortcuts(model, x))[1:]
    split = ss.gradient_split(model, (x, x[:, :3]), mse, found=chosen)
    assert list(split) == list(ss.gradient_split(model, (x, x[:, :3]), mse))[1:]


def test_under_autocast_and_frozen():
    model = nn.Sequential(*[oracles.Residual(oracles.layer(8)) for _ in range(3)])
    model.requires_grad_(False)
    model[2].requires_grad_(True)
    x = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        split = ss.gradient_split(model, (x, x), mse)
        paths = ss.path_spectrum(model, (x, x), mse)
    assert len(split) == 3 and all(row.residual < 0.02 for row in split)
    assert paths.residual < 0.05
    assert not any(p.requires_grad for p in model[0].parameters())


def test_the_result_keeps(tmp_path):
    model, x = oracles.chain(2), torch.randn(4, 6, dtype=torch.float64)
    split = ss.gradient_split(model, (x, x[:, :3]), mse)
    split.save(tmp_path / "split.json")
    assert ss.load(tmp_path / "split.json") == split


READ = {
    "embedding": nn.functional.embedding,
    "index": lambda ids, table: table[ids],
    "select": lambda ids, table: table.index_select(0, ids.flatten()).view(*ids.shape, -1),
    "one-hot": lambda ids, table: nn.functional.one_hot(ids, len(table)).to(table) @ table,
}


class Tokens(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.table, self.f = (
            nn.Parameter(torch.randn(7, 4)),
            nn.ModuleList(oracles.layer(4) for _ in range(2)),
        )
        self.read = read

    def forward(self, ids):
        x = READ[self.read](ids, self.table)
        for f in self.f:
            x = 0.5 * x + f(x)
        return x


@pytest.mark.parametrize("read", READ)
def test_the_first_fork_of_tokens_however_they_are_read(read):
    torch.manual_seed(0)
    model, ids = Tokens(read).double(), torch.randint(0, 7, (3, 5))
    x = READ[read](ids, model.table).detach().requires_grad_()
    y = 0.5 * x + model.f[0](x)
    (0.5 * y + model.f[1](y)).square().mean().backward(inputs=[x, y.retain_grad() or y])
    split = ss.gradient_split(model, (ids, torch.zeros(1)), lambda output, _: output.square().mean())
    assert split[0].shortcut_rms == pytest.approx(0.5 * rms(y.grad), rel=1e-10)
    assert split[0].fork_rms == pytest.approx(rms(x.grad), rel=1e-10) and split[0].residual < 1e-14


class Recurrent(nn.Module):
    """h + F(h), the same F at every step: a chain as long as is asked for."""

    def __init__(self, steps):
        super().__init__()
        self.f, self.steps = nn.Linear(2, 2), steps

    def forward(self, h):
        for _ in range(self.steps):
            h = h + torch.tanh(self.f(h)) / self.steps
        return h


def test_the_search_for_forks_grows_with_the_length_of_a_network():
    """4 times the length, 4 times as many nodes looked at, and not 16."""

    def visited(steps):
        leaf = torch.ones(1, 2, requires_grad=True)
        model, merges = Recurrent(steps), []

        def touch(k, merge):
            merges.append(MergeEdges(merge.output.grad_fn))
            merges[-1].add(merge.sides, merge.operands)
            return merge.output

        with tap_merges(model, ss.find_shortcuts(model, leaf), touch):
            graph = BackwardGraph(model(leaf).sum(), [leaf], merges)
        found = graph.arrivals(merges)
        assert len(found) == steps and all(arrivals is not None for arrivals in found)
        return graph.visited

    assert visited(200) <= 4.1 * visited(50)


def test_a_long_network_says_the_same_as_a_chain_rule_by_hand():
    model, x = Recurrent(400).double(), torch.randn(3, 2, dtype=torch.float64)
    split = ss.gradient_split(model, (x, x), mse)
    h, kept = x, []
    for _ in range(model.steps):
        h = h.detach().requires_grad_() if not kept else h
        kept.append(h)
        if len(kept) > 1:
            h.retain_grad()
        h = h + torch.tanh(model.f(h)) / model.steps
    mse(h, x).backward()
    assert len(split) == 400
    for row, here, after in list(zip(split, kept, kept[1:]))[::40]:
        assert row.shortcut_rms == pytest.approx(rms(after.grad), rel=1e-10)
        assert row.branch_rms == pytest.approx(rms(here.grad - after.grad), rel=1e-8)


@pytest.mark.slow
def test_ten_thousand_steps_are_let_go_of():
    """Freed in any order but the loss's node first, autograd's graph overflows the stack and ends the process."""
    x = torch.ones(2, 2)
    split = ss.gradient_split(Recurrent(10_000), (x, torch.zeros_like(x)), nn.functional.mse_loss)
    assert len(split) == 10_000 and split[0].residual < 1e-5
