"""A recommender: pairwise ranking (BPR) with sampled negatives, sparse embeddings, two optimizers, NamedTuple batches."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import skipscope as ss


class Interaction(NamedTuple):
    user: Tensor
    liked: Tensor
    other: Tensor


class TwoTower(nn.Module):
    def __init__(self, n_users, n_items, dim=16):
        super().__init__()
        self.users = nn.Embedding(n_users, dim, sparse=True)
        self.items = nn.Embedding(n_items, dim, sparse=True)
        self.tower = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, dim))

    def embed(self, table, ids):
        e = table(ids)
        return e + self.tower(e)

    def forward(self, user, liked, other):
        u = self.embed(self.users, user)
        return (u * self.embed(self.items, liked)).sum(-1) - (u * self.embed(self.items, other)).sum(-1)


class Sampler:
    """Not a DataLoader: an object with __iter__ that draws negatives as it goes."""

    def __init__(self, pairs, n_items, batch_size, rng):
        self.pairs, self.n_items, self.batch_size, self.rng = pairs, n_items, batch_size, rng

    def __len__(self):
        return len(self.pairs) // self.batch_size

    def __iter__(self):
        order = self.rng.permutation(len(self.pairs))
        for i in range(len(self)):
            rows = self.pairs[order[i * self.batch_size : (i + 1) * self.batch_size]]
            negatives = self.rng.integers(self.n_items, size=self.batch_size)
            yield Interaction(*(torch.from_numpy(a) for a in (rows[:, 0], rows[:, 1], negatives)))


def main():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    n_users, n_items = 40, 60
    pairs = np.stack([rng.integers(n_users, size=256), rng.integers(n_items, size=256)], 1)
    train = Sampler(pairs, n_items, 64, rng)
    model = TwoTower(n_users, n_items)
    dense = torch.optim.Adam(model.tower.parameters(), lr=1e-2)
    sparse = torch.optim.SparseAdam([*model.users.parameters(), *model.items.parameters()], lr=1e-2)

    @ss.objective
    def bpr(model, batch):
        return -nn.functional.logsigmoid(model(*batch)).mean()

    flow = ss.gradient_flow(model, next(iter(train)), bpr)
    with ss.watch(model, [dense, sparse]) as monitor:
        for batch in train:
            loss = bpr(model, batch)
            for o in (dense, sparse):
                o.zero_grad()
            loss.backward()
            for o in (dense, sparse):
                o.step()

    assert flow.verdict.state == "healthy", flow.verdict
    assert set(monitor.history.owners) == {0, 1}
    assert monitor.history.steps.tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    assert monitor.verdict.state == "healthy", monitor.verdict


main()
