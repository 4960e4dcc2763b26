"""
U-Net: what do the long skips bring?
====================================

A U-Net hands early feature maps to late layers by concatenation. Two twins learn to outline discs: one as built, one
whose skips hand over zeros.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss


def double(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions, each with a norm."""
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Two levels down and up."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.down1, self.down2 = double(1, width), double(width, 2 * width)
        self.middle = double(2 * width, 4 * width)
        self.up2, self.up1 = double(6 * width, 2 * width), double(3 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, 1, s, s]`` to logits of the same shape."""
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.middle(F.max_pool2d(b, 2))
        b = self.up2(torch.cat([b, F.interpolate(c, scale_factor=2.0)], 1))
        return self.head(self.up1(torch.cat([a, F.interpolate(b, scale_factor=2.0)], 1)))


def discs(n: int, size: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy pictures of a disc, and its pixels."""
    place = torch.arange(size).float()
    centre, radius = 6 + 12 * torch.rand(n, 2, 1, 1), 3 + 3 * torch.rand(n, 1, 1)
    inside = (place[:, None] - centre[:, 0]) ** 2 + (place - centre[:, 1]) ** 2 < radius**2
    mask = inside.float()[:, None]
    return mask + 0.4 * torch.randn_like(mask), mask


torch.manual_seed(0)
model, data = UNet(), discs(48)
found = ss.find_shortcuts(model, data[0])
found

# %%
# Both learn from the same batches, each at its best rate.
runs = ss.train_twins(
    {"with": model, "without": ss.ablate(model, found)}, data, F.binary_cross_entropy_with_logits,
    seeds=1, steps=40, batch_size=16, optimizers=["Adam"],
)  # fmt: skip
runs.plot()
plt.show()

# %%
print(runs)
