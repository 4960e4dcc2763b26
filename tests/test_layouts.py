"""Models and inputs that hold sparse, nested or oneDNN's own tensors: every call takes them, and leaves them as found."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope._batches import hash_of
from skipscope._tensor_layouts import is_strided, strided_parts

DENSE = torch.eye(6) + 0.1 * torch.triu(torch.ones(6, 6))
NESTED = [torch.randn(2, 4), torch.randn(3, 4)]
LAYOUTS = {
    "coo": lambda: DENSE.to_sparse(),
    "csr": lambda: DENSE.to_sparse_csr(),
    "csc": lambda: DENSE.to_sparse_csc(),
    "bsr": lambda: DENSE.to_sparse_bsr((2, 2)),
    "oneDNN": lambda: DENSE.to_mkldnn(),
    "nested, jagged": lambda: torch.nested.nested_tensor(NESTED, layout=torch.jagged),
    "nested, strided": lambda: torch.nested.nested_tensor(NESTED),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*beta state", "ignore:.*prototype stage")


class Graph(nn.Module):
    """Blocks over an adjacency of any layout; where it can multiply it does."""

    def __init__(self, adjacency):
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 2)
        self.register_buffer("adjacency", adjacency)

    def forward(self, x):
        for layer in self.layers:
            y = torch.relu(layer(x))
            x = x + (
                self.adjacency @ y if self.adjacency.layout in {torch.sparse_coo, torch.sparse_csr} else y
            )
        return self.head(x)


X, Y = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 1, 0])
CALLS = {
    "gradient_flow": lambda m, d: ss.gradient_flow(m, d, F.cross_entropy),
    "importance": lambda m, d: ss.importance(m, d, F.cross_entropy),
    "landscape": lambda m, d: ss.landscape(m, d, F.cross_entropy, grid=3),
    "extreme_eigenvalues": lambda m, d: ss.extreme_eigenvalues(m, d, F.cross_entropy, tol=0.5),
    "train_twins": lambda m, d: ss.train_twins(
        {"m": m}, d, F.cross_entropy, steps=2, seeds=1, optimizers="SGD"
    ),
    "rewire": lambda m, d: ss.rewire(m, ss.find_shortcuts(m, X), kind="rezero")(X),
    "compare": lambda m, d: ss.compare(m, d, F.cross_entropy, train=False, grid=3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shortcuts_of_a_model_with_such_a_buffer_are_found_and_edited(layout):
    model = Graph(LAYOUTS[layout]())
    found = ss.find_shortcuts(model, X)
    assert [s.kind for s in found] == ["identity"] * 3
    twin, y = ss.ablate(model, found), X
    for layer in model.layers:
        y = torch.relu(layer(y))
        y = model.adjacency @ y if layout in {"coo", "csr"} else y
    torch.testing.assert_close(twin(X), model.head(y))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_call_takes_such_a_buffer(layout, call):
    assert CALLS[call](Graph(LAYOUTS[layout]()), ss.batches([(X, Y)])) is not None


class Writes(Graph):
    """Changes the numbers of its adjacency at every pass."""

    def forward(self, x):
        with torch.no_grad():
            a = self.adjacency
            (a._values() if a.layout == torch.sparse_coo else a.values()).mul_(2.0)
        return super().forward(x)


@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "bsr", "nested, jagged"])
def test_numbers_that_a_pass_changed_are_as_found(layout):
    model = Writes(LAYOUTS[layout]())
    kept = [part.clone() for part in strided_parts(model.adjacency)]
    ss.find_shortcuts(model, X)
    assert all(map(torch.equal, strided_parts(model.adjacency), kept))
    model(X)
    assert not all(map(torch.equal, strided_parts(model.adjacency), kept)), "the model does write"


@pytest.mark.parametrize("layout", ["nested, jagged", "nested, strided"])
def test_nested_inputs(layout):
    class Block(nn.Linear):
        def forward(self, x):
            return x + super().forward(x)

    x, model = LAYOUTS[layout](), Block(4, 4)
    found = ss.find_shortcuts(model, x)
    assert [s.kind for s in found] == ["identity"]
    twin = ss.ablate(model, found)
    for one, given in zip(twin(x).unbind(), x.unbind()):
        torch.testing.assert_close(one, F.linear(given, model.weight, model.bias))


@pytest.mark.parametrize("call", ["gradient_flow", "importance", "landscape", "train_twins"])
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_inputs(layout, call):
    class Embeds(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.layer, self.head = (
                nn.Parameter(torch.randn(6, 4)),
                nn.Linear(4, 4),
                nn.Linear(4, 2),
            )

        def forward(self, x):
            y = torch.sparse.mm(x, self.weight)
            return self.head(y + torch.tanh(self.layer(y)))

    model, x = Embeds(), LAYOUTS[layout]()
    result = CALLS[call](model, ss.batches([(x, Y)]))
    if call == "gradient_flow":
        F.cross_entropy(model(x), Y).backward()
        rms = {layer.name: layer.weight_grad_rms for layer in result.layers}
        assert rms["weight"] == pytest.approx(float(model.weight.grad.square().mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_hash_sees_every_number(layout):
    tensor = LAYOUTS[layout]()
    assert not is_strided(tensor) and hash_of([tensor]) == hash_of([tensor.clone()])
    assert hash_of([tensor]) != hash_of([2 * tensor if layout != "oneDNN" else (2 * DENSE).to_mkldnn()])


def test_torch_itself_copies_few_of_them():
    """Else our own copies of these layouts could go."""
    with pytest.raises(NotImplementedError):
        copy.deepcopy(LAYOUTS["csr"]())
