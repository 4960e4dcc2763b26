"""More of the literature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ._blocks import Attention, mlp
from ._cases import case, features, images, seq, sequences
from .convolutional import conv, double
from .sweep import Around
from .transformers import Layer

case(images(), "convmixer", identity=2)(
    lambda: seq(
        conv(3, 4),
        *[
            seq(Around(seq(conv(4, 4, 3, 1, 4), nn.GELU(), nn.BatchNorm2d(4))), conv(4, 4, 1), nn.GELU())
            for _ in range(2)
        ],
    )
)


class Res2Block(nn.Module):
    """1904.01169: three of four channel groups go through convolutions, each with the sum of its own and the last's."""

    def __init__(self, c=8):
        super().__init__()
        self.first, self.last = seq(conv(c, c, 1), nn.ReLU()), conv(c, c, 1)
        self.convs = nn.ModuleList([seq(conv(c // 4, c // 4), nn.ReLU()) for _ in range(3)])

    def forward(self, x):
        groups = self.first(x).chunk(4, 1)
        out = [groups[0]]
        for one, group in zip(self.convs, groups[1:]):
            out.append(one(group if len(out) == 1 else group + out[-1]))
        return F.relu(self.last(torch.cat(out, 1)) + x)


# Around the block, and the group that goes past all convolutions; what is added between groups bypasses nothing.
case(images(), "res2net", identity=1, concat=1)(lambda: seq(conv(3, 8), Res2Block()))


class NormFree(nn.Module):
    """2102.06171: x + alpha F(x / beta), with a learned gain that starts at zero."""

    def __init__(self, c=4):
        super().__init__()
        self.a, self.b, self.gain = conv(c, c), conv(c, c), nn.Parameter(torch.full((), 0.1))

    def forward(self, x):
        y = F.gelu(x / 1.1) * 1.7
        return x + 0.2 * self.gain * self.b(F.gelu(self.a(y)))


case(images(), "nfnet", identity=2)(lambda: seq(conv(3, 4), NormFree(), NormFree()))


class SelectiveKernel(nn.Module):
    """1903.06586: two kernels weighed by attention are parallel."""

    def __init__(self, c=4):
        super().__init__()
        self.three, self.five = seq(conv(c, c), nn.ReLU()), seq(conv(c, c, 5), nn.ReLU())
        self.squeeze, self.choose = nn.Linear(c, 3), nn.Linear(3, 2 * c)

    def forward(self, x):
        a, b = self.three(x), self.five(x)
        w = self.choose(F.relu(self.squeeze((a + b).mean((2, 3))))).view(-1, 2, x.shape[1], 1, 1).softmax(1)
        return w[:, 0] * a + w[:, 1] * b


case(images(), "sknet", identity=1)(lambda: seq(conv(3, 4), Around(SelectiveKernel())))


class Ghost(nn.Module):
    """1911.11907: cheap maps beside those that they are computed from."""

    def __init__(self, i=4, o=4):
        super().__init__()
        self.main, self.cheap = (
            seq(conv(i, o // 2, 1), nn.ReLU()),
            seq(conv(o // 2, o // 2, 3, 1, o // 2), nn.ReLU()),
        )

    def forward(self, x):
        y = self.main(x)
        return torch.cat([y, self.cheap(y)], 1)


case(images(), "ghostnet", identity=1, concat=2)(lambda: seq(conv(3, 4), Around(seq(Ghost(), Ghost()))))


class ResidualLSTM(nn.Module):
    """Layers of LSTM, each around which goes a shortcut."""

    def __init__(self, layers=3):
        super().__init__()
        self.layers = nn.ModuleList([nn.LSTM(8, 8, batch_first=True) for _ in range(layers)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)[0]
        return x


case(sequences(), "residual_lstm", identity=3)(ResidualLSTM)


class TCN(nn.Module):
    """1803.01271: dilated causal convolutions; a 1x1 where the width changes."""

    def __init__(self, i, o, dilation):
        super().__init__()
        self.net = seq(
            nn.ConstantPad1d((2 * dilation, 0), 0.0), nn.Conv1d(i, o, 3, dilation=dilation), nn.ReLU(), nn.Dropout(0.1),
            nn.ConstantPad1d((2 * dilation, 0), 0.0), nn.Conv1d(o, o, 3, dilation=dilation), nn.ReLU(), nn.Dropout(0.1),
        )  # fmt: skip
        self.down = nn.Conv1d(i, o, 1) if i != o else None

    def forward(self, x):
        return F.relu(self.net(x) + (x if self.down is None else self.down(x)))


case(sequences(2, 3, 12), "tcn", identity=2, projection=1)(
    lambda: seq(TCN(3, 4, 1), TCN(4, 4, 2), TCN(4, 4, 4))
)


class Separator(nn.Module):
    """As in Conv-TasNet: each block gives a residual and a skip output; the mask gates the encoder's output."""

    def __init__(self, c=4, blocks=2):
        super().__init__()
        self.encode, self.decode, self.mask = (
            nn.Conv1d(1, c, 4, 2),
            nn.ConvTranspose1d(c, 1, 4, 2),
            nn.Conv1d(c, c, 1),
        )
        self.body = nn.ModuleList(
            [
                seq(
                    nn.Conv1d(c, 6, 1),
                    nn.PReLU(),
                    nn.GroupNorm(1, 6),
                    nn.Conv1d(6, 6, 3, padding=1),
                    nn.PReLU(),
                )
                for _ in range(blocks)
            ]
        )
        self.res, self.skip = (nn.ModuleList([nn.Conv1d(6, c, 1) for _ in range(blocks)]) for _ in "rs")

    def forward(self, x):
        w = self.encode(x)
        y, total = w, 0
        for body, res, skip in zip(self.body, self.res, self.skip):
            h = body(y)
            total = total + skip(h)
            y = y + res(h)
        return self.decode(w * torch.sigmoid(self.mask(F.relu(total))))


# Two residual additions; the skip outputs are summed: one linear map past a block.
case(sequences(2, 1, 16), "conv_tasnet", identity=2, projection=1)(Separator)


class Coupling(nn.Module):
    """1605.08803: half of the channels go past; the other half is scaled and shifted by what they give."""

    def __init__(self, width=8):
        super().__init__()
        self.net = seq(nn.Linear(width // 2, 8), nn.ReLU(), nn.Linear(8, width))

    def forward(self, x):
        a, b = x.chunk(2, -1)
        log_scale, shift = self.net(a).chunk(2, -1)
        return torch.cat([b * torch.exp(torch.tanh(log_scale)) + shift, a], -1)


# In each, the half that goes past, and the other half, put back beside it: gated, and what the first gives is added.
case(features(), "realnvp", gated=2, concat=2)(lambda: seq(Coupling(), Coupling()))


class AdditiveCoupling(nn.Module):
    """1410.8516: the same without a scale; the halves change places."""

    def __init__(self, width=8):
        super().__init__()
        self.net = seq(nn.Linear(width // 2, 8), nn.ReLU(), nn.Linear(8, width // 2))

    def forward(self, x):
        a, b = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
        return torch.cat([b, a + self.net(b)], 1)


case(features(), "nice", identity=2, concat=2)(lambda: seq(AdditiveCoupling(), AdditiveCoupling()))


class RevNet(nn.Module):
    """1707.04585: two streams, parted once and put together at the end."""

    def __init__(self, blocks=2, width=4):
        super().__init__()
        self.f, self.g = (
            nn.ModuleList([seq(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, width)) for _ in range(blocks)])
            for _ in "fg"
        )

    def forward(self, x):
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g):
            a = a + f(b)
            b = b + g(a)
        return torch.cat([a, b], -1)


# Each sum; and beside the last one, what it was made from.
case(features(), "revnet", identity=4, concat=1)(RevNet)


class Euler(nn.Module):
    def __init__(self, steps=4):
        super().__init__()
        self.f, self.steps = seq(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 8)), steps

    def forward(self, x):
        for k in range(self.steps):
            t = torch.full_like(x[:, :1], k / self.steps)
            x = x + self.f(torch.cat([x, t], -1)) / self.steps
        return x


case(features(), "neural_ode", identity=4)(Euler)


class Hourglass(nn.Module):
    """1603.06937: at each level a branch down and up again, beside one that stays."""

    def __init__(self, depth=2, c=4):
        super().__init__()
        body = lambda: Around(seq(nn.ReLU(), conv(c, c), nn.ReLU(), conv(c, c)))  # noqa: E731
        self.up, self.low, self.after = body(), body(), body()
        self.inner = Hourglass(depth - 1, c) if depth > 1 else body()

    def forward(self, x):
        low = self.after(self.inner(self.low(F.max_pool2d(x, 2))))
        return self.up(x) + F.interpolate(low, scale_factor=2.0, mode="nearest")


# Seven residual blocks; at both levels the two sides are parallel: each holds a branch.
case(images(), "hourglass", identity=7)(lambda: seq(conv(3, 4), Hourglass()))


class UNetPlusPlus(nn.Module):
    def __init__(self, w=(4, 5, 6)):
        super().__init__()
        self.x00, self.x10, self.x20 = double(3, w[0]), double(w[0], w[1]), double(w[1], w[2])
        self.x01, self.x11 = double(w[0] + w[1], w[0]), double(w[1] + w[2], w[1])
        self.x02 = double(2 * w[0] + w[1], w[0])

    def forward(self, x):
        up = lambda t: F.interpolate(t, scale_factor=2.0, mode="nearest")  # noqa: E731
        a = self.x00(x)
        b = self.x10(F.max_pool2d(a, 2))
        c = self.x20(F.max_pool2d(b, 2))
        d = self.x01(torch.cat([a, up(b)], 1))
        e = self.x11(torch.cat([b, up(c)], 1))
        return self.x02(torch.cat([a, d, up(e)], 1))


case(images(), "unet_plus_plus", concat=3)(UNetPlusPlus)


class DETR(nn.Module):
    """Learned queries: a stream that begins in weights, three shortcuts a decoder layer."""

    def __init__(self, layers=2):
        super().__init__()
        self.patch, self.queries = (
            nn.Conv2d(3, 8, 4, 4),
            nn.Parameter(torch.linspace(-1, 1, 24).reshape(1, 3, 8)),
        )
        self.encoder = seq(*[Layer("post") for _ in range(layers)])
        self.cross, self.own = (nn.ModuleList([Attention() for _ in range(layers)]) for _ in "co")
        self.ff, self.norm = nn.ModuleList([mlp() for _ in range(layers)]), nn.LayerNorm(8)

    def forward(self, x):
        memory = self.encoder(self.patch(x).flatten(2).transpose(1, 2))
        y = self.queries.expand(x.shape[0], -1, -1) * 0.5
        for own, cross, ff in zip(self.own, self.cross, self.ff):
            y = self.norm(y + own(y + self.queries))
            y = self.norm(y + cross(y + self.queries, memory=memory))
            y = self.norm(y + ff(y))
        return y


case(images(), "detr", identity=10)(DETR)


class Retention(nn.Module):
    """2307.08621, as a recurrence: S = gamma S + k v."""

    def __init__(self, width=8):
        super().__init__()
        self.q, self.k, self.v, self.g, self.out = (nn.Linear(width, width) for _ in range(5))

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        decay = 0.9 ** (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])[None]).clamp(min=0).to(
            x.dtype
        )
        y = (q @ k.transpose(1, 2) * decay.tril()) @ v
        return self.out(F.silu(self.g(x)) * F.layer_norm(y, (8,)))


case(sequences(), "retnet", identity=2)(lambda: seq(Around(Retention()), Around(Retention())))


class Hyena(nn.Module):
    """2302.10866: gates around long convolutions; each filter's bias is a shortcut past it, scaled."""

    def __init__(self, width=8, length=6):
        super().__init__()
        self.inp, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.filter, self.bias = (
            nn.Parameter(torch.linspace(-1, 1, width * length).reshape(width, length)),
            nn.Parameter(torch.ones(width)),
        )

    def forward(self, x):
        a, b, v = self.inp(x).chunk(3, -1)
        v = (v * a).transpose(1, 2)
        n = 2 * v.shape[-1]
        y = torch.fft.irfft(torch.fft.rfft(v, n) * torch.fft.rfft(self.filter, n), n)[..., : v.shape[-1]]
        y = y + v * self.bias[:, None]
        return self.out(y.transpose(1, 2) * b)


case(sequences(), "hyena", identity=2, scaled=2)(lambda: seq(Around(Hyena()), Around(Hyena())))


class NeRF(nn.Module):
    """The position goes in again half way; the direction is another input."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (
            seq(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()),
            seq(nn.Linear(16, 8), nn.ReLU()),
        )
        self.color = nn.Linear(16, 3)

    def forward(self, position, direction):
        h = self.b(torch.cat([position, self.a(position)], -1))
        return self.color(torch.cat([h, direction], -1))


case((features(), features().flip(0)), "nerf", concat=1)(NeRF)


class DeepONet(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch, self.trunk = (seq(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in "bt")
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, u, y):
        return (self.branch(u) * self.trunk(y)).sum(-1) + self.bias


case((features(), features().flip(0)), "deeponet")(DeepONet)


class AttentionUNet(nn.Module):
    """1804.03999: what is concatenated is gated first, by the decoder's own state."""

    def __init__(self):
        super().__init__()
        self.down, self.bottom, self.up = double(3, 4), double(4, 4), double(8, 4)
        self.theta, self.phi, self.psi = conv(4, 2, 1), conv(4, 2, 1), conv(2, 1, 1)

    def forward(self, x):
        a = self.down(x)
        g = F.interpolate(self.bottom(F.max_pool2d(a, 2)), scale_factor=2.0, mode="nearest")
        gate = torch.sigmoid(self.psi(F.relu(self.theta(a) + self.phi(g))))
        return self.up(torch.cat([a * gate, g], 1))


# The gated skip; and inside the gate one linear map of a past the bottom.
case(images(), "attention_unet", concat=1, projection=1)(AttentionUNet)


class DiTBlock(nn.Module):
    """2212.09748: what is added is gated by the conditioning, which is another input."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp, self.condition = Attention(), mlp(), seq(nn.SiLU(), nn.Linear(8, 48))

    def forward(self, x, c):
        s1, b1, g1, s2, b2, g2 = self.condition(c)[:, None].chunk(6, -1)
        x = x + g1 * self.attn(F.layer_norm(x, (8,)) * (1 + s1) + b1)
        return x + g2 * self.mlp(F.layer_norm(x, (8,)) * (1 + s2) + b2)


class DiT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Linear(8, 8), nn.ModuleList([DiTBlock(), DiTBlock()])

    def forward(self, x, c):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, c)
        return x


case((sequences(), features(2)), "dit", identity=4)(DiT)


class Pooling(nn.Module):
    """As in EfficientFormer: the mean around it less itself, with a scale that is all the weights there are."""

    def __init__(self, c=4):
        super().__init__()
        self.scale = nn.Parameter(torch.full((c, 1, 1), 0.1))

    def forward(self, x):
        return x + self.scale * (F.avg_pool2d(x, 3, 1, 1) - x)


case(images(), "efficientformer_pooling", identity=2)(lambda: seq(conv(3, 4), Pooling(), Pooling()))


class NormalizedGPT(nn.Module):
    """2410.01131, as its authors' code has it: x is put on the sphere once more where it is blended."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.inp, self.parts = norm, nn.Linear(8, 8), nn.ModuleList([Attention(), mlp()])
        self.alphas = nn.ParameterList([torch.full((8,), 0.05) for _ in self.parts])

    def forward(self, x):
        x = self.norm(self.inp(x))
        for part, alpha in zip(self.parts, self.alphas):
            h, side = self.norm(part(x)), self.norm(x)
            x = self.norm(side + alpha.abs() * (h - side))
        return x


NORMS = {
    "by_hand": lambda x: x / x.norm(p=2, dim=-1, keepdim=True),
    "by_function": lambda x: F.normalize(x, dim=-1),
    "by_rms": lambda x: F.rms_norm(x, (8,)),
}
for form, norm in NORMS.items():
    case(sequences(), f"ngpt_{form}", scaled=2)(lambda norm=norm: NormalizedGPT(norm))
