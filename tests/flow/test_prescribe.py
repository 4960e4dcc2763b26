"""Remedies do what they say on networks whose trouble is known, and leave the network alone."""

import copy

import pytest
import torch
from torch import nn

import skipscope as ss

loss = nn.functional.cross_entropy


@pytest.fixture(scope="module")
def vanishing():
    torch.manual_seed(0)
    model = ss.reference.deep_mlp(16, 16)
    before = copy.deepcopy(model.state_dict())
    advice = ss.prescribe(model, ss.reference.digits(32), loss, steps=5)
    return model, before, advice


def test_shortcuts_are_among_what_helps(vanishing):
    _, _, advice = vanishing
    assert advice.before.state == "vanishing" and advice.before.fall_decades > 5
    healthy = {r.name for r in advice.remedies if r.state == "healthy"}
    assert {
        "identity shortcuts",
        "depth-scaled shortcuts",
        "each layer's output scaled to variance 1 (LSUV)",
    } <= healthy
    assert advice.remedies[0].state == "healthy" and advice.remedies[0].reached < advice.before.reached
    assert advice.remedies[0].name in advice.advice
    assert not advice.refused


def test_the_network_is_as_found(vanishing):
    model, before, _ = vanishing
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_same_seed_gives_the_same_advice(vanishing):
    model, _, advice = vanishing
    again = ss.prescribe(model, ss.reference.digits(32), loss, steps=5)
    assert again == advice


def test_growing_branches_are_scaled():
    torch.manual_seed(0)
    model = ss.reference.deep_mlp(40, 16, shortcut="identity", init="he")
    advice = ss.prescribe(model, ss.reference.digits(32), loss, steps=0)
    assert advice.before.state == "exploding" and advice.before.reached is None
    rows = {r.name: r for r in advice.remedies}
    assert (
        rows["branches scaled by 1/sqrt(L)"].state == rows["branches that start at zero"].state == "healthy"
    )


def test_a_healthy_network_is_told_so():
    advice = ss.prescribe(ss.reference.deep_mlp(3, 16, init="he"), ss.reference.digits(16), loss, steps=0)
    assert "check the data, the learning rate and the initialisation" in advice.advice


def test_what_cannot_be_tried_is_said():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.eye(64)[:, :10].clone())

        def forward(self, x):
            return x.flatten(1) @ self.w

    advice = ss.prescribe(Bare(), ss.reference.digits(16), loss, steps=0)
    assert len(advice.refused) >= 3 and all("Not tried" in line for line in advice.refused)


def relus(depth, norm=False):
    torch.manual_seed(0)
    width = lambda i: 20 if i == 0 else 32  # noqa: E731
    norms = [nn.BatchNorm1d(32)] * norm
    layers = [q for i in range(depth) for q in (nn.Linear(width(i), 32), *copy.deepcopy(norms), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(32, 10))


def rows(n=32):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(n, 20, generator=draw), torch.randint(0, 10, (n,), generator=draw)


@pytest.mark.parametrize("image", [False, True])
def test_around_a_layer_with_its_norm_and_activation(image):
    model, data = relus(3, norm=True), rows()
    if image:
        convs = [q for i in range(3) for q in (nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]  # fmt: skip
        model = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        data = torch.randn(8, 3, 8, 8), data[1][:8]
    advice = ss.prescribe(model, data, loss, steps=0)
    assert {"identity shortcuts", "rezero shortcuts", "highway shortcuts"} <= {
        r.name for r in advice.remedies
    }
    assert len(advice.refused) == 1 and "a norm could follow" in advice.refused[0]


def test_frozen_layers_keep_their_weights():
    from skipscope.flow.advice._remedies import candidates

    model = relus(4)
    model[:4].requires_grad_(False)
    for one in candidates(0)[:3]:
        changed = one.apply(copy.deepcopy(model), rows()[0])
        same = [torch.equal(a.weight, b.weight) for a, b in zip(model[::2], changed[::2])]
        assert same == [True, True, False, False, True], one.name
    advice = ss.prescribe(model, rows(), loss, steps=0)
    assert "2 frozen layers keep their weights." in advice.notes
    assert any("what trained layers have learnt is lost" in note for note in advice.notes)


def test_no_recipe_where_the_data_or_the_graph_are_broken():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(20, 32), nn.Linear(32, 10)

        def forward(self, x):
            return self.b(self.a(x).detach())

    x, y = rows()
    bad = x.clone()
    bad[0] = float("nan")
    for model, data, cure in ((relus(2), (bad, y), "not finite"), (Cut(), (x, y), "detach")):
        advice = ss.prescribe(model, data, loss, steps=2)
        assert advice.remedies == () and not any("by hand" in note for note in advice.notes)
        assert advice.advice.startswith("No remedy for the network can help.") and cure in advice.advice


def test_where_all_end_where_they_began_it_is_said():
    x, _ = rows()
    constant = lambda output, target: 1e4 + 1e-9 * output.square().mean()  # noqa: E731
    advice = ss.prescribe(relus(2), (x, torch.zeros(len(x))), constant, steps=2)
    assert advice.advice.startswith("Nothing that was tried brings the loss down")


def test_an_objective_that_differentiates_inside():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    @ss.objective
    def residual(model, batch):
        q = batch[0].detach().requires_grad_()
        u = model(q)
        (du,) = torch.autograd.grad(u.sum(), q, create_graph=True)
        return (du - torch.cos(q)).square().mean() + u[0].square().sum()

    advice = ss.prescribe(model, (torch.linspace(0, 1, 8)[:, None], torch.zeros(8, 1)), residual, steps=2)
    assert advice.before.reached is not None and advice.remedies and not advice.refused


def test_an_embedding_with_sparse_gradients_is_trained_with_the_same_numbers():
    def advice(sparse):
        torch.manual_seed(0)
        layers = [layer for _ in range(3) for layer in (nn.Linear(6, 6), nn.Tanh())]
        model = nn.Sequential(nn.Embedding(10, 6, sparse=sparse), *layers, nn.Linear(6, 3))
        return ss.prescribe(model, (torch.arange(9) % 10, torch.arange(9) % 3), loss, steps=5)

    assert advice(True).before.reached == advice(False).before.reached < 2
