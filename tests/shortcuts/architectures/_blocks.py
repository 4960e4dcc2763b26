"""Parts of several networks."""

from __future__ import annotations

import math

import torch
from torch import nn

from ._cases import seq


def rotate(x):
    angles = torch.arange(x.shape[-2])[:, None] / 10 ** torch.arange(x.shape[-1])[None, :]
    angles = angles.to(x.dtype)
    a, b = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()


class Attention(nn.Module):
    def __init__(self, width=8, heads=2, rope=False):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in "qkvo")
        self.heads, self.rope = heads, rope

    def split(self, x):
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, x, memory=None, bias=None, value=None, return_value=False):
        memory = x if memory is None else memory
        q, k, v = self.split(self.q(x)), self.split(self.k(memory)), self.split(self.v(memory))
        if value is not None:
            v = v + value
        if self.rope:
            q, k = rotate(q), rotate(k)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if bias is not None:
            scores = scores + bias
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
        return (self.out(y), v) if return_value else self.out(y)


def mlp(width=8):
    return seq(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
