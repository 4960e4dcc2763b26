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
