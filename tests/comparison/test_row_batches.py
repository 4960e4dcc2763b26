"""One large batch is cut into random batches only where its rows are samples by themselves."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss

N = 150


@dataclass
class Graph:
    x: torch.Tensor
    edges: torch.Tensor
    y: torch.Tensor

    def to(self, device):
        return self

    def __iter__(self):
        return iter((self.x, self.edges, self.y))


class OverEdges(nn.Module):
    """A graph network: each node reads the mean of its neighbours."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, edges):
        source, target = edges
        messages = torch.zeros(len(x), 8).index_add(0, target, self.first(x)[source])
        return self.second(torch.tanh(messages))


class Dense(OverEdges):
    """The same with a full matrix of edges."""

    def forward(self, x, matrix):
        return self.second(torch.tanh(matrix @ self.first(x)))


class InContext(nn.Module):
    """Rows attend to each other."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.softmax(x @ self.mix(x).T, -1) @ x)


class TimeFirst(nn.Module):
    """[time, batch, features], as recurrent layers of torch take it."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0]).flatten(0, 1)


def numbers(*sizes):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0))


X, Y = numbers(N, 6), torch.arange(N) % 3
EDGES = torch.randint(N, (2, 400), generator=torch.Generator().manual_seed(1))


@ss.objective
def of_graph(model, graph):
    return F.cross_entropy(model(graph.x, graph.edges), graph.y)


def of_steps(output, target):
    return F.cross_entropy(output, target.flatten())


WHOLE = {
    "a graph among ss.batches": (OverEdges, ss.batches([Graph(X, EDGES, Y)]), of_graph),
    "a graph by itself": (OverEdges, Graph(X, EDGES, Y), of_graph),
    "a graph of plain tensors": (OverEdges, ((X, EDGES), Y), F.cross_entropy),
    "a matrix of edges": (Dense, ((X, torch.eye(N).roll(1, 0)), Y), F.cross_entropy),
    "rows that attend to each other": (InContext, (X, Y), F.cross_entropy),
    "time steps": (TimeFirst, (numbers(N, 2, 6), torch.arange(2 * N).view(N, 2) % 3), of_steps),
    "plain rows among ss.batches": (lambda: nn.Linear(6, 3), ss.batches([(X, Y)]), F.cross_entropy),
}


def trained(make, data, loss, **options):
    return ss.train_twins({"m": make}, data, loss, seeds=1, steps=4, optimizers={"SGD": 0.1}, **options)


@pytest.mark.parametrize("batch_size", [None, 32])
@pytest.mark.parametrize("name", WHOLE)
def test_rows_that_are_no_samples_stay_together(name, batch_size):
    make, data, loss = WHOLE[name]
    batch = data if not isinstance(data, ss._data.Batches) else next(iter(data))
    objective = (
        loss if isinstance(loss, ss._data.Objective) else lambda model, b: loss(call(model, b[0]), b[1])
    )
    torch.manual_seed(0)
    model, expected = make(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        value = objective(model, batch)
        value.backward()
        optimizer.step()
        expected.append(value.item())
    runs = trained(make, data, loss, batch_size=batch_size)
    np.testing.assert_allclose(runs.curves["m"]["SGD"].losses[0], expected, rtol=1e-5)
    if not isinstance(batch, Graph):
        assert runs.batch_size == N and "the whole batch of 150" in str(runs).replace("\n", " ")


def call(model, inputs):
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


class Draws(nn.Linear):
    """Draws noise in evaluation mode too: two of its outputs are never the same."""

    def forward(self, x):
        return super().forward(x + torch.randn_like(x))


class HookedActivation(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        y.register_hook(lambda gradient: gradient)
        return y


CUT = {
    "linear": lambda: nn.Linear(6, 3),
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)),
    "dropout": lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.Linear(6, 3)),
    "noise": lambda: Draws(6, 3),
    "a hook on an activation": lambda: HookedActivation(6, 3),
}


@pytest.mark.parametrize("name", CUT)
def test_rows_that_are_samples_are_cut(name):
    runs = trained(CUT[name], (X, Y), F.cross_entropy, batch_size=32)
    assert runs.batch_size == 32 and not runs.notes


def test_a_contrastive_loss_of_independent_rows_is_cut():
    @ss.objective
    def contrastive(model, batch):
        embedded = F.normalize(model(batch[0]), dim=-1)
        return F.cross_entropy(
            embedded @ F.normalize(model(batch[0] + 0.1), dim=-1).T, torch.arange(len(embedded))
        )

    assert trained(CUT["linear"], (X, Y), contrastive, batch_size=32).batch_size == 32


@pytest.mark.parametrize(
    "name", ["a graph among ss.batches", "a graph of plain tensors", "a matrix of edges"]
)
def test_compare_takes_a_whole_graph(name):
    """More nodes than compare takes samples of a batch: none is cut away."""
    make, _, loss = WHOLE[name]
    n = 300
    x, y, edges = numbers(n, 6), torch.arange(n) % 3, torch.randint(n, (2, 900))

    class Residual(make):
        def forward(self, x, edges):
            return super().forward(x + torch.tanh(self.mix(x)), edges)

        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(6, 6)

    data = {
        "a graph among ss.batches": ss.batches([Graph(x, edges, y)]),
        "a graph of plain tensors": ((x, edges), y),
        "a matrix of edges": ((x, torch.eye(n).roll(1, 0)), y),
    }[name]
    result = ss.compare(Residual, data, loss, quick=True, steps=3, grid=3, batch_size=16)
    assert result.training is not None and not any("could not be measured" in note for note in result.notes)
