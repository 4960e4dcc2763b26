"""
Vision transformer: branch or shortcut?
=======================================

At every shortcut the gradient parts: some goes through the branch, some past it. In a fresh vision transformer
nearly all of it goes past.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope import reference


class Layer(nn.Module):
    """One layer of the encoder: attention and a feed-forward network, each behind a norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.heads = heads

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """Attend from every patch to every patch."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, patches, width]`` to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches of 2 x 2 of an 8 x 8 image, a class token, a few layers."""

    def __init__(self, width: int = 48, layers: int = 6):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.layers = nn.Sequential(*[Layer(width, 4) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, 1, 8, 8]`` to ``[n, 10]``."""
        patches = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.places
        return self.head(self.norm(self.layers(x))[:, 0])


torch.manual_seed(0)
model, data = ViT(), reference.digits(64, image=True)
print(ss.gradient_flow(model, data, F.cross_entropy).verdict)

# %%
# How much gradient the branch brings, and how much the shortcut.
split = ss.gradient_split(model, data, F.cross_entropy)
split.plot()
plt.show()

# %%
# After sixty steps the branches carry more.
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(60):
    optimizer.zero_grad()
    F.cross_entropy(model(data[0]), data[1]).backward()
    optimizer.step()
print(ss.gradient_split(model, data, F.cross_entropy))
