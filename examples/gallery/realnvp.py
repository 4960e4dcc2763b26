"""
RealNVP: shortcuts in a normalising flow
========================================

A coupling layer leaves one half of its input alone and scales and shifts the other: a gated shortcut, put back together
by concatenation. Its loss is a likelihood.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import skipscope as ss


class Coupling(nn.Module):
    """Scale and shift one half by what a network makes of the other."""

    def __init__(self, flip: bool, width: int = 32):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 2))
        self.flip = flip

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[n, 2]`` to ``[n, 2]``, and the log-determinant ``[n]``."""
        kept, moved = x.flip(1).split(1, 1) if self.flip else x.split(1, 1)
        scale, shift = self.net(kept).chunk(2, 1)
        moved = moved * torch.exp(torch.tanh(scale)) + shift
        joined = torch.cat([moved, kept] if self.flip else [kept, moved], 1)
        return joined, torch.tanh(scale).squeeze(1)


class RealNVP(nn.Module):
    """Several couplings in turn."""

    def __init__(self, layers: int = 6):
        super().__init__()
        self.layers = nn.ModuleList(Coupling(flip=bool(k % 2)) for k in range(layers))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Points to their codes, and the log-determinant."""
        total = x.new_zeros(len(x))
        for layer in self.layers:
            x, log_det = layer(x)
            total = total + log_det
        return x, total


@ss.objective
def negative_log_likelihood(model: nn.Module, points: torch.Tensor) -> torch.Tensor:
    """Under a standard normal distribution of the codes."""
    codes, log_det = model(points)
    return (0.5 * codes.square().sum(1) + torch.log(torch.tensor(2 * torch.pi)) - log_det).mean()


torch.manual_seed(0)
angle = torch.pi * torch.rand(512)
points = torch.stack([angle.cos(), angle.sin()], 1) * 2 + 0.1 * torch.randn(512, 2)
model = RealNVP()
found = ss.find_shortcuts(model, points)
found

# %%
print(ss.gradient_flow(model, points, negative_log_likelihood).verdict)

# %%
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
with ss.watch(model, optimizer, every=10) as monitor:
    for step in range(300):
        optimizer.zero_grad()
        loss = negative_log_likelihood(model, points)
        loss.backward()
        optimizer.step()
print(f"loss {loss.item():.2f}; {monitor.verdict}")

# %%
# The data, and where the flow puts them.
figure, axes = plt.subplots(1, 2, figsize=(7, 3.2))
axes[0].scatter(*points.T, s=4)
axes[0].set_title("points")
axes[1].scatter(*model(points)[0].detach().T, s=4)
axes[1].set_title("their codes: nearly normal")
plt.show()
