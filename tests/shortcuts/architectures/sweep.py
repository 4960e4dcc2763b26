"""From a sweep over other people's models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ._blocks import Attention, mlp
from ._cases import case, features, images, seq, sequences
from .convolutional import conv


class XIELU(nn.Module):
    """2411.13010: an activation function with two learned numbers is no branch."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor([0.8])) for _ in "ab")

    def forward(self, x):
        a, b = F.softplus(self.a), 0.5 + F.softplus(self.b)
        low = (torch.expm1(torch.clamp(x, max=0)) - x) * b + 0.5 * x
        return torch.where(x > 0, a * x * x + 0.5 * x, low)


case(sequences(), "xielu", identity=1)(lambda: Around(seq(nn.Linear(8, 12), XIELU(), nn.Linear(12, 8))))


class Around(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return x + self.branch(x)


class RelativeAttention(nn.Module):
    """As in Transformer-XL, Funnel and ProphetNet: scores are content + position, both from the same query."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in "qkv")
        self.position, self.u = nn.Linear(8, 8, bias=False), nn.Parameter(torch.full((8,), 0.1))

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        table = self.position(torch.eye(6, 8, dtype=x.dtype))
        scores = (q + self.u) @ k.transpose(1, 2) + q @ table.transpose(0, 1)
        return (scores / 3).softmax(-1) @ v


case(sequences(), "relative_attention", identity=1)(lambda: Around(RelativeAttention()))


class ManifoldHyperConnections(nn.Module):
    """2512.24880: n streams, mixed by a matrix that depends on them and is made doubly stochastic."""

    def __init__(self, layers=2, n=2, rounds=3):
        super().__init__()
        self.f = nn.ModuleList([seq(nn.LayerNorm(8), mlp()) for _ in range(layers)])
        self.pre, self.post = (nn.ModuleList([nn.Linear(8 * n, n) for _ in range(layers)]) for _ in "pq")
        self.res = nn.ModuleList([nn.Linear(8 * n, n * n) for _ in range(layers)])
        self.n, self.rounds = n, rounds

    def forward(self, x):
        streams = x.unsqueeze(2).expand(-1, -1, self.n, -1)
        for f, pre, post, res in zip(self.f, self.pre, self.post, self.res):
            flat = F.rms_norm(streams.flatten(2), (8 * self.n,))
            mix = torch.exp(res(flat).view(*flat.shape[:2], self.n, self.n))
            for _ in range(self.rounds):
                mix = mix / mix.sum(-1, keepdim=True)
                mix = mix / mix.sum(-2, keepdim=True)
            y = f((torch.sigmoid(pre(flat)).unsqueeze(-1) * streams).sum(2))
            streams = (2 * torch.sigmoid(post(flat))).unsqueeze(-1) * y.unsqueeze(2) + mix @ streams
        return streams.sum(2)


case(sequences(), "manifold_hyper_connections", projection=2)(ManifoldHyperConnections)


class PooledProjection(nn.Module):
    """As in Hiera and MViT: where the width changes the shortcut is projected, then pooled by its largest values."""

    def __init__(self):
        super().__init__()
        self.norm, self.proj, self.attn, self.out = (
            nn.LayerNorm(8),
            nn.Linear(8, 12),
            Attention(),
            nn.Linear(8, 12),
        )

    def forward(self, x):
        y = self.norm(x)
        skip = self.proj(y).view(x.shape[0], 2, -1, 12).amax(1)
        return skip + self.out(self.attn(y).view(x.shape[0], 2, -1, 8).amax(1))


case(sequences(), "pooled_projection", projection=1)(PooledProjection)


class SharedExperts(nn.Module):
    """Routed and shared experts are parallel; the router only weighs both."""

    def __init__(self, experts=3):
        super().__init__()
        self.router, self.experts = (
            nn.Linear(8, experts + 1),
            nn.ModuleList([mlp() for _ in range(experts + 1)]),
        )

    def forward(self, x):
        gates = self.router(x).sigmoid()
        gates = gates / gates.sum(-1, keepdim=True)
        routed = sum(gates[..., i : i + 1] * e(x) for i, e in enumerate(self.experts[:-1]))
        return routed + gates[..., -1:] * self.experts[-1](x)


case(sequences(), "shared_experts", identity=1)(lambda: Around(SharedExperts()))


class MobileOne(nn.Module):
    """Any number of linear maps side by side, normalised: parallel, and not one deeper than another."""

    def __init__(self, c=4, n=3):
        super().__init__()
        self.maps = nn.ModuleList([seq(conv(c, c), nn.BatchNorm2d(c)) for _ in range(n)])
        self.scale = seq(conv(c, c, 1), nn.BatchNorm2d(c))

    def forward(self, x):
        y = self.scale(x)
        for one in self.maps:
            y = y + one(x)
        return F.relu(y)


case(images(), "mobileone")(lambda: seq(conv(3, 4), MobileOne(), MobileOne()))


class DualPath(nn.Module):
    """1707.01629: of one branch's channels some are added, some concatenated."""

    def __init__(self, i, added=4, dense=3):
        super().__init__()
        self.body, self.added = seq(conv(i, 4, 1), nn.ReLU(), conv(4, added + dense)), added

    def forward(self, x):
        y, k = self.body(x), self.added
        return torch.cat([x[:, :k] + y[:, :k], x[:, k:], y[:, k:]], 1)


case(images(), "dual_path", identity=3, concat=3)(
    lambda: seq(conv(3, 6), *[DualPath(6 + 3 * n) for n in range(3)])
)


class DecomposedPositions(nn.Module):
    """As in MViTv2: scores of positions are added into a slice, in place; the queries are added to what comes out."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in "qkvo")
        self.table = nn.Parameter(torch.linspace(-1, 1, 5 * 8).reshape(5, 8))

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        scores = q @ k.transpose(1, 2)
        scores[:, 1:, 1:] += q[:, 1:] @ self.table.transpose(0, 1)
        return self.out(scores.softmax(-1) @ v + q)


case(sequences(), "decomposed_positions", identity=2)(lambda: Around(DecomposedPositions()))


class Moved(nn.Module):
    """x + a (F - x) with a learned number: (1 - a) x + a F."""

    def __init__(self):
        super().__init__()
        self.body, self.a = (
            seq(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)),
            nn.Parameter(torch.tensor([0.3])),
        )

    def forward(self, x):
        return x + torch.sigmoid(self.a).view(1, 1) * (self.body(x) - x)


case(features(), "moved_towards", scaled=2)(lambda: seq(Moved(), Moved()))


class Reduction(nn.Module):
    """Where Inception halves the size, the largest values are one more parallel branch; ShuffleNet's mean is a shortcut."""

    def __init__(self, c, pool):
        super().__init__()
        self.a, self.b, self.pool = (
            seq(conv(c, 4, 3, 2), nn.ReLU()),
            seq(conv(c, 4, 1), nn.ReLU(), conv(4, 4, 3, 2)),
            pool,
        )

    def forward(self, x):
        return torch.cat([self.pool(x), self.a(x), self.b(x)], 1)


case(images(), "inception_reduction")(lambda: seq(conv(3, 4), Reduction(4, nn.MaxPool2d(3, 2, 1))))
case(images(), "shufflenet_v1_reduction", concat=1)(
    lambda: seq(conv(3, 4), Reduction(4, nn.AvgPool2d(3, 2, 1)))
)
