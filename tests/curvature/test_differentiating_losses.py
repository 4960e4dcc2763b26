"""Losses that differentiate the network themselves: gradient penalties, Laplacians, forces; and modes asked for by name."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss

ACTIVATIONS = {
    "gelu": nn.GELU(), "gelu tanh": nn.GELU("tanh"), "silu": nn.SiLU(), "mish": nn.Mish(), "logsigmoid": nn.LogSigmoid(),
    "softplus": nn.Softplus(), "tanh": nn.Tanh(),
}  # fmt: skip


def network(activation, dtype=torch.float64):
    torch.manual_seed(0)
    layers = nn.Linear(2, 6), activation, nn.Linear(6, 5), activation, nn.Linear(5, 1)
    return nn.Sequential(*layers).to(dtype), 2 * torch.randn(12, 2).to(dtype)


@ss.objective
def penalty(model, x):
    x = x.clone().requires_grad_(True)
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return (u - 1).square().mean() + slope.square().sum(1).mean()


@ss.objective
def laplacian(model, x):
    x = x.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    second = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
    return (second[0] + second[1] - 1).square().mean()


@ss.objective
def by_transform(model, x):
    return torch.func.vmap(torch.func.grad(lambda p: model(p).sum()))(x).square().mean()


class Force(nn.Module):
    """A forward pass that differentiates."""

    def __init__(self, energy):
        super().__init__()
        self.energy = energy

    def forward(self, x):
        x = x.clone().requires_grad_(True)
        return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


def hessian(loss, parameters):
    """One row after the other, by torch alone."""

    def flat(found):
        found = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters)]
        return torch.cat([g.flatten() for g in found])

    gradient = flat(torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True))
    rows = [
        torch.autograd.grad(g, parameters, retain_graph=True, allow_unused=True)
        if g.requires_grad
        else [None] * len(parameters)
        for g in gradient
    ]
    return torch.stack([flat(row) for row in rows]).detach().numpy()


def matrix_of(operator):
    return operator.matmat(np.eye(operator.shape[0]))


@pytest.mark.parametrize("loss", [penalty, laplacian, by_transform], ids=lambda loss: loss.name)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_hessian_of_a_loss_that_differentiates(name, loss):
    model, x = network(ACTIVATIONS[name])
    slow = hessian(loss(model, x), list(model.parameters()))
    found = ss.curvature_operator(model, x, loss, mode="reverse over reverse")
    assert np.abs(matrix_of(found) - slow).max() <= 1e-12 * np.abs(slow).max()


def test_the_hessian_of_a_forward_pass_that_differentiates():
    energy, x = network(nn.SiLU())
    model, y = Force(energy), torch.ones(12, 2).double()
    slow = hessian(F.mse_loss(model(x), y), list(model.parameters()))
    found = ss.curvature_operator(model, (x, y), F.mse_loss)
    assert np.abs(matrix_of(found) - slow).max() <= 1e-12 * np.abs(slow).max()


def test_trace_and_density_of_a_gradient_penalty():
    model, x = network(nn.GELU())
    slow = hessian(penalty(model, x), list(model.parameters()))
    size = len(slow)
    assert ss.curvature_trace(model, x, penalty, products=3 * size).value == pytest.approx(
        slow.trace(), rel=1e-9
    )
    # With as many steps as there are parameters a rule is exact, and its ends are the matrix's.
    density = ss.spectral_density(model, x, penalty, probes=2, steps=size)
    assert np.nanmax(density.nodes) == pytest.approx(np.linalg.eigvalsh(slow)[-1], rel=1e-9)


class _Bent(torch.autograd.Function):
    """x^2 / 2, whose second derivative is off by half a per cent."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square() / 2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * _Slope.apply(x)


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.005 * grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_mode_asked_for_by_name_is_checked(dtype):
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).to(dtype), torch.randn(20, 3).to(dtype)
    loss = ss.objective(lambda model, x: _Bent.apply(model(x)).mean())
    with pytest.raises(ss.SkipscopeError, match=r"second derivative is wrong[^$]*leave mode= out"):
        ss.curvature_operator(model, x, loss, mode="reverse over reverse")
    assert ss.curvature_operator(model, x, loss).method == "finite differences"
