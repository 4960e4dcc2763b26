"""Multi-head latent attention: no part of a query or key that is rotated, or shared by the heads, is a shortcut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss


def halves(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def halves_side_by_side(x, cos, sin):
    a, b = x.chunk(2, -1)
    c, s = cos[..., : a.shape[-1]], sin[..., : a.shape[-1]]
    return torch.cat((a * c - b * s, b * c + a * s), -1)


def interleaved(x, cos, sin):
    return halves(x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), cos, sin)


def as_complex(x, cos, sin):
    turned = torch.polar(torch.ones(2), torch.tensor([0.3, 0.1]))
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turned).flatten(-2)


def unrotated(x, cos, sin):
    return x


def concatenated(a, b):
    return torch.cat((a, b.expand(*a.shape[:-1], b.shape[-1])), -1)


def copied(a, b):
    out = a.new_empty(*a.shape[:-1], a.shape[-1] + b.shape[-1])
    out[..., : a.shape[-1]].copy_(a)
    out[..., a.shape[-1] :].copy_(b.expand(*a.shape[:-1], b.shape[-1]))
    return out


def assigned(a, b):
    out = a.new_empty(*a.shape[:-1], a.shape[-1] + b.shape[-1])
    out[..., : a.shape[-1]], out[..., a.shape[-1] :] = a, b
    return out


class Attention(nn.Module):
    """As DeepSeek writes it: low-rank queries and keys, of which a part is rotated; two heads of 4 + 4."""

    def __init__(self, join, rotate, low_rank, fused):
        super().__init__()
        self.join, self.rotate = join, rotate
        self.down = nn.Sequential(nn.Linear(16, 8), nn.RMSNorm(8)) if low_rank else nn.Identity()
        self.q = nn.Linear(8 if low_rank else 16, 16)
        self.fused, self.kv, self.norm = fused, nn.Linear(16, 12 if fused else 8), nn.RMSNorm(8)
        self.rotated = None if fused else nn.Linear(16, 4)
        self.up, self.out = nn.Linear(8, 16), nn.Linear(8, 16)

    def forward(self, x):
        b, t, _ = x.shape
        plain, turned = self.q(self.down(x)).view(b, t, 2, 8).transpose(1, 2).split([4, 4], -1)
        latent, key = self.kv(x).split([8, 4], -1) if self.fused else (self.kv(x), self.rotated(x))
        up = self.up(self.norm(latent)).view(b, t, 2, 8).transpose(1, 2)
        angles = torch.arange(t)[:, None] * torch.linspace(1, 0.1, 4)
        cos, sin = angles.cos(), angles.sin()
        q = self.join(plain, self.rotate(turned, cos, sin))
        k = self.join(up[..., :4], self.rotate(key.view(b, 1, t, 4), cos, sin))
        out = F.scaled_dot_product_attention(q, k, up[..., 4:], is_causal=True)
        return self.out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, *options):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.before, self.attention = nn.Embedding(20, 16), nn.RMSNorm(16), Attention(*options)
        self.after, self.mlp, self.head = nn.RMSNorm(16), nn.Linear(16, 16), nn.Linear(16, 20)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.attention(self.before(x))
        return self.head(x + self.mlp(self.after(x)).relu())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize(
    "rotate", [halves, halves_side_by_side, interleaved, as_complex, unrotated], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("join", [concatenated, copied, assigned], ids=lambda f: f.__name__)
def test_only_the_two_residual_sums_are_found(join, rotate, low_rank, fused):
    found = ss.find_shortcuts(Block(join, rotate, low_rank, fused), torch.arange(12).view(2, 6))
    assert [s.kind for s in found] == ["identity", "identity"], [(s.kind, s.source) for s in found]


class Halves(nn.Module):
    """Half of the channels passes, as it is, beside what a block makes of the other."""

    def __init__(self, carry):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block, self.last = nn.Linear(6, 8), nn.Linear(4, 4), nn.Linear(8, 3)
        self.carry = carry

    def forward(self, x):
        a, b = self.first(x).chunk(2, -1)
        return self.last(torch.cat([self.carry(a), self.block(b).relu()], -1))


@pytest.mark.parametrize(
    "carry", [lambda a: a, lambda a: a.clone(), lambda a: 0.5 * a, lambda a: a.view(-1, 4)]
)
def test_a_part_that_passes_as_it_is_stays_a_shortcut(carry):
    assert [s.kind for s in ss.find_shortcuts(Halves(carry), torch.randn(5, 6))] == ["concat"]
