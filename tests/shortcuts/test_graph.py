"""Which node depends on which: against plain sets, and at a size where sets of all ancestors would not do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shortcuts.architectures import CASES
from skipscope.shortcuts import find_shortcuts, record
from skipscope.shortcuts.finding._bit_sets import Ancestors, bits
from skipscope.shortcuts.finding._graph import Graph
from skipscope.shortcuts.finding._shortcut_finder import traced

graphs = st.integers(1, 60).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, max(v - 1, 0)), max_size=3) for v in range(n)])
)


def plain(parents):
    """For each node the set of its ancestors and itself."""
    sets = []
    for v, above in enumerate(parents):
        sets.append({v}.union(*(sets[p] for p in above if p < v)))
    return sets


@settings(max_examples=300, deadline=None)
@given(graphs)
def test_ancestors_equal_plain_sets(drawn):
    parents = [tuple(p for p in above if p < v) for v, above in enumerate(drawn)]
    expected, ancestors = plain(parents), Ancestors(parents)
    for v in range(len(parents)):
        assert set(bits(ancestors[v])) == expected[v]
        assert {u for u in range(len(parents)) if ancestors.reaches(u, v)} == expected[v]


@pytest.mark.parametrize("name", ["t5", "unet", "densenet", "gru", "value_residual", "torch_transformer"])
def test_a_graph_equals_plain_sets(name):
    make, inputs, _ = CASES[name]
    model = make()
    graph = Graph(traced(model, inputs), model)
    n = graph.activations
    expected = plain([graph.active_parents(i) for i in range(n)])
    assert [set(bits(graph.ancestors[i])) for i in range(n)] == expected
    for start in range(0, n, 7):
        for end in range(0, n, 5):
            between = {v for v in expected[end] if start in expected[v]}
            assert set(bits(graph.between([start], end))) == between
    region, common = graph.ancestors[n - 1], graph.ancestors[n // 2]
    for one, other in ((region & ~common, common), (common, region & ~common)):
        naive = {p for v in bits(one) for p in graph.active_parents(v) if other >> p & 1}
        assert graph.entries(one, other) == naive
    assert graph.ancestors[n] == 0 and not graph.ancestors.reaches(0, n)


@given(st.integers(0, 1 << 5000))
def test_bits(mask):
    assert sum(1 << i for i in bits(mask)) == mask
    assert list(bits(mask)) == sorted(bits(mask))


def test_memory_grows_with_a_networks_length_and_not_with_its_square():
    n = 30_000  # blocks of one branch: x -> (a, b), and their sum
    parents = [()] + [
        ((v - 1,), (v - 1,) if v % 3 == 1 else (v - 2,), (v - 1, v - 2))[v % 3] for v in range(1, n)
    ]
    ancestors = Ancestors(parents)
    assert sum(mask.bit_length() for _, mask in ancestors._missing) < 4 * n
    assert ancestors[n - 1].bit_length() == n


class Recurrence(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.rec, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h, states = x[:, 0], []
        for t in range(x.shape[1]):
            h = h + torch.tanh(self.inp(x[:, t]) + self.rec(h))
            states.append(h)
        return self.out(torch.stack(states, 1))


@pytest.mark.parametrize("steps", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_long_recurrence(steps):
    """Ten thousand steps are 80,000 nodes: freed front to back they overflow the stack."""
    found = find_shortcuts(Recurrence(), torch.linspace(-1, 1, 4 * steps).reshape(1, steps, 4))
    assert len(found.select(kind="identity")) == len(found) == steps
    assert {r.reason for r in found.rejected} <= {
        "other steps of one sequence",
        "stacked side by side",
        "parallel branches",
    }


ENDS = [-(2**62), -4, -3, -2, -1, 0, 1, 2, 3, 4, 2**62, 2**63 - 1]


SLICES = {
    "from end to end": lambda x, dim, start, end: torch.ops.aten.slice(x, dim, start, end, 1),
    "every second": lambda x, dim, start, end: torch.ops.aten.slice(x, dim, start, end, 2),
    "by brackets": lambda x, dim, start, end: x[:, start:end] if dim == 1 else x[:, start:end, :],
}


@pytest.mark.parametrize("dim", [1, -2])
@pytest.mark.parametrize("form", SLICES)
def test_a_slice_of_everything_is_what_it_is_taken_from(form, dim):
    class Slicing(nn.Module):
        def forward(self, x):
            return [SLICES[form](x.tanh(), dim, *cut) for cut in cuts]

    cuts = [(start, end) for start in [None, *ENDS] for end in [None, *ENDS]]
    model, x = Slicing(), torch.randn(2, 3, 4)
    trace = record(model, lambda: model(x))
    graph = Graph(trace, model)
    for value in trace.outputs:
        is_all = trace.values[value].shape == (2, 3, 4)
        assert (graph.kind(graph.node_of(value)) == "tanh") == is_all


class Recurrent(nn.Module):
    """A recurrence that takes each of its steps from what ``view`` gives of the whole sequence."""

    def __init__(self, view):
        super().__init__()
        self.cell, self.view = nn.Linear(16, 8), view

    def forward(self, x):
        h = x[:, 0]
        for t in range(1, x.shape[1]):
            h = h + self.cell(torch.cat([self.view(x)[:, t], h], -1)).tanh()
        return h


VIEWS = {
    "colons": lambda x: x[:, :],
    "far end": lambda x: torch.ops.aten.slice(x, 1, 0, 2**62),
    "far start": lambda x: torch.ops.aten.slice(x, 1, -(2**62)),
    "dimension from the back": lambda x: torch.ops.aten.slice(x, -3, 0, 2),
    "its own size": lambda x: x[:, :, -8:8],
}


@pytest.mark.parametrize("view", VIEWS)
def test_steps_of_a_whole_slice_are_steps_of_the_sequence(view):
    def seen(model):
        found = find_shortcuts(model, torch.linspace(-9, 9, 80).reshape(2, 5, 8).sin())
        kinds = [(s.name, s.kind, s.fork, s.merge, s.branch) for s in found]
        return kinds, [(r.name, r.reason) for r in found.rejected], found.boundaries

    plain = seen(Recurrent(lambda x: x))
    assert "other steps of one sequence" in {reason for _, reason in plain[1]}
    assert {kind for _, kind, *_ in plain[0]} == {"identity"}
    assert seen(Recurrent(VIEWS[view])) == plain
