"""
Diffusion U-Net: does the gradient reach every block?
=====================================================

A denoiser has both kinds of shortcut: sums inside its residual blocks, and concatenations across the U. Its loss is no
``loss(output, target)``, so the training loop's own line becomes an objective.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope import reference


class ResBlock(nn.Module):
    """A residual block that knows the time."""

    def __init__(self, inputs: int, outputs: int, time: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """``[n, inputs, s, s]`` to ``[n, outputs, s, s]``."""
        hidden = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[..., None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(hidden)))


class Denoiser(nn.Module):
    """A U-Net of residual blocks."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 32))
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.down, self.low = ResBlock(width, width, 32), ResBlock(width, 2 * width, 32)
        self.middle, self.up = ResBlock(2 * width, 2 * width, 32), ResBlock(3 * width, width, 32)
        self.head = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The noise in ``x`` at the times ``t``."""
        time = self.embed(t[:, None])
        high = self.down(self.first(x), time)
        low = self.middle(self.low(F.avg_pool2d(high, 2), time), time)
        return self.head(self.up(torch.cat([high, F.interpolate(low, scale_factor=2.0)], 1), time))


@ss.objective
def noise_error(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Mean square error of the predicted noise."""
    t, noise = torch.rand(len(images)), torch.randn_like(images)
    alpha = torch.cos(t * torch.pi / 2)[:, None, None, None]
    return F.mse_loss(model(alpha * images + (1 - alpha**2).sqrt() * noise, t), noise)


torch.manual_seed(0)
model, images = Denoiser(), reference.digits(64, image=True)[0]
found = ss.find_shortcuts(model, (images, torch.rand(len(images))))
found

# %%
flow = ss.gradient_flow(model, images, noise_error)
print(flow.verdict)
flow.plot()
plt.show()

# %%
# Watch it learn: the objective is the loop's own line.
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
with ss.watch(model, optimizer, flow_every=20) as monitor:
    for step in range(100):
        optimizer.zero_grad()
        loss = noise_error(model, images)
        loss.backward()
        optimizer.step()
print(f"loss {loss.item():.3f}; {monitor.verdict}")
