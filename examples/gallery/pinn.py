"""
PINN: a loss that differentiates the network
============================================

A physics-informed network learns u'' = -pi^2 sin(pi x) with u = 0 at both ends. Its loss holds second derivatives of
the network itself; it is an objective like any other.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import skipscope as ss


class Residual(nn.Module):
    """x + tanh(W x)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, width]`` to the same."""
        return x + torch.tanh(self.linear(x))


@ss.objective
def physics(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The equation's residual, and the values at both ends."""
    x = x.detach().requires_grad_()
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    ends = model(torch.tensor([[0.0], [1.0]]))
    return (bend + torch.pi**2 * torch.sin(torch.pi * x)).square().mean() + 10 * ends.square().mean()


torch.manual_seed(0)
# A limit of today's verdict: u itself enters this loss only by its derivatives, and is reported as unconnected.
x = torch.linspace(0, 1, 64)[:, None]
model = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), *[Residual(24) for _ in range(4)], nn.Linear(24, 1))
print(ss.gradient_flow(model, x, physics).verdict)

# %%
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for step in range(400):
    optimizer.zero_grad()
    loss = physics(model, x)
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.3f}")

figure, ax = plt.subplots()
ax.plot(x, torch.sin(torch.pi * x), label="sin(pi x)")
ax.plot(x, model(x).detach(), "--", label="learnt")
ax.legend()
plt.show()

# %%
# The loss around what it learnt.
surface = ss.landscape(model, ss.batches([x]), physics, grid=15, span=0.5)
surface.plot()
plt.show()

# %%
# How sharp is it? Both ends of the Hessian's spectrum, with bounds.
print(ss.extreme_eigenvalues(model, ss.batches([x]), physics, tol=1e-2))
