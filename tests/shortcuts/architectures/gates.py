"""Gates and recurrent networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ._blocks import Attention, mlp
from ._cases import case, features, seq, sequences

HIGHWAYS = {
    "coupled": lambda x, H, T: T * H + (1 - T) * x,
    "reversed": lambda x, H, T: x * (1.0 - T) + H * T,
    "difference": lambda x, H, T: x + T * (H - x),
    "minus": lambda x, H, T: x - T * (x - H),
    "lerp": lambda x, H, T: torch.lerp(x, H, T),
    "addcmul": lambda x, H, T: torch.addcmul(x, T, H - x),
    "addcmul_coupled": lambda x, H, T: torch.addcmul(T * H, 1 - T, x),
    "in_place": lambda x, H, T: (T * H).add_((1 - T) * x),
    "multiplied_out": lambda x, H, T: x + T * H - T * x,
    "stacked": lambda x, H, T: (torch.stack([x, H]) * torch.stack([1 - T, T])).sum(0),
    "stacked_einsum": lambda x, H, T: torch.einsum(
        "n...,n...->...", torch.stack([1 - T, T]), torch.stack([x, H])
    ),
}


class Highway(nn.Module):
    def __init__(self, write, width=8, layers=3):
        super().__init__()
        self.h, self.t = (nn.ModuleList([nn.Linear(width, width) for _ in range(layers)]) for _ in "ht")
        self.write = write

    def forward(self, x):
        for h, t in zip(self.h, self.t):
            x = self.write(x, torch.relu(h(x)), torch.sigmoid(t(x)))
        return x


for form, write in HIGHWAYS.items():
    case(features(), f"highway_{form}", gated=3)(lambda write=write: Highway(write))
case(features(), "shortcut_only_gate", gated=3)(lambda: Highway(lambda x, H, T: (1 - T) * x + H))


class Conditioned(nn.Module):
    """The gate is another input, or made from one."""

    def __init__(self, write):
        super().__init__()
        self.inp, self.h, self.t, self.write = nn.Linear(8, 8), mlp(), nn.Linear(8, 8), write

    def forward(self, x, y):
        return self.write(self, self.inp(x), y)


CONDITIONED = {
    "mask": lambda net, x, y: (1 - y) * x + y * net.h(x),
    "gate": lambda net, x, y: torch.lerp(x, net.h(x), torch.sigmoid(net.t(y))),
    "coupled": lambda net, x, y: net.h(x) * (t := torch.sigmoid(net.t(y))) + (1 - t) * x,
}
for form, write in CONDITIONED.items():
    case((features(), features().abs()), f"conditioned_{form}", gated=1)(
        lambda write=write: Conditioned(write)
    )


class ConvolutionalProjection(nn.Module):
    """2103.15808 (CvT): before attention the tokens go through a convolution, the class token past it."""

    def __init__(self):
        super().__init__()
        self.inp, self.conv, self.attn = nn.Linear(8, 8), nn.Conv1d(8, 8, 3, padding=1), Attention()

    def forward(self, x):
        x = self.inp(x)
        cls, tokens = x.split([1, x.shape[1] - 1], 1)
        tokens = self.conv(tokens.transpose(1, 2)).transpose(1, 2)
        return x + self.attn(torch.cat([cls, tokens], 1))


# The class token is another step of the sequence, as the other tokens are: it skips nothing.
case(sequences(), "cvt", identity=1)(ConvolutionalProjection)


class FourierMixer(nn.Module):
    """2105.03824 (FNet): the mixer holds no weights, so that what goes around it goes around no branch."""

    def __init__(self):
        super().__init__()
        self.n1, self.n2, self.mlp = nn.LayerNorm(8), nn.LayerNorm(8), mlp()

    def forward(self, x):
        x = self.n1(x + torch.fft.fft2(x).real)
        return self.n2(x + self.mlp(x))


case(sequences(), "fnet", identity=2)(lambda: seq(FourierMixer(), FourierMixer()))


class MixtureOfDepths(nn.Module):
    """2404.02258: some tokens go through the block, the others past it."""

    def __init__(self):
        super().__init__()
        self.inp, self.score, self.block = nn.Linear(8, 8), nn.Linear(8, 1), mlp()

    def forward(self, x):
        x = self.inp(x)
        score = self.score(x)
        return torch.where(score > score.mean(1, keepdim=True), self.block(x), x)


case(sequences(), "mixture_of_depths", gated=1)(MixtureOfDepths)


class ChosenFrom(MixtureOfDepths):
    """The same, by the method of either side."""

    def forward(self, x):
        x = self.inp(x)
        score = self.score(x)
        x = x.where(score <= score.mean(1, keepdim=True), self.block(x))
        return self.block(x).where(other=x, condition=score > 0)


case(sequences(), "mixture_of_depths_by_method", gated=2)(ChosenFrom)


class GRU(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.z, self.r, self.n = (nn.Linear(2 * width, width) for _ in "zrn")

    def forward(self, x):
        h = torch.tanh(x[:, 0])
        for t in range(1, x.shape[1]):
            both = torch.cat([x[:, t], h], -1)
            z, r = torch.sigmoid(self.z(both)), torch.sigmoid(self.r(both))
            n = torch.tanh(self.n(torch.cat([x[:, t], r * h], -1)))
            h = (1 - z) * n + z * h
        return h


case(sequences(), "gru", gated=5)(GRU)


class LSTM(nn.Module):
    def __init__(self, width=8, join=torch.stack):
        super().__init__()
        self.cell, self.join = nn.LSTMCell(width, width), join

    def forward(self, x):
        h = c = torch.zeros(x.shape[0], 8, dtype=x.dtype)
        outputs = []
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
            outputs.append(h)
        return self.join(outputs, 1)


case(sequences(), "lstm_stacked")(LSTM)
# The outputs of the same cell, step by step, side by side: no shortcut past anything.
case(sequences(), "lstm_concatenated")(lambda: LSTM(join=torch.cat))


class SharedLoop(nn.Module):
    """One block, as often as the data says."""

    def __init__(self):
        super().__init__()
        self.block, self.head = seq(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), nn.Linear(8, 2)

    def forward(self, x):
        for _ in range(int(x[0, 0].item() * 0 + x.shape[0] + 1)):
            x = x + self.block(x)
        return self.head(x)


case(features(), "shared_loop", identity=4)(SharedLoop)


class ResidualMLP(nn.Module):
    def __init__(self, write, width=8):
        super().__init__()
        self.a, self.b = nn.Linear(width, 12), nn.Linear(12, width)
        self.c, self.alpha = (
            nn.Parameter(torch.full((12, width), 0.1)),
            nn.Parameter(torch.full((width,), 0.5)),
        )
        self.write = write

    def forward(self, x):
        return self.write(self, x, torch.relu(self.a(x)))


def in_place(self, x, h):
    x = x.clone()
    x += self.b(h)
    return x


def in_slice(self, x, h):
    out = x.clone()
    out[:, 2:6] += self.b(h)[:, 2:6]
    return out


ROWS = torch.tensor([True, False, True])
COLUMNS = torch.arange(8) % 3 == 0


def on_parts(*parts, assigned=False, shared=False):
    """x + F, part by part."""

    def write(self, x, h):
        out, f = x.clone(), self.b(h)
        for part in parts:
            f = f if shared else self.b(h)
            if assigned:
                out[part] = out[part] + f[part]
            else:
                out[part] += f[part]
        return out

    return write


def put_twice(self, x, h):
    for rows in (ROWS, ~ROWS):
        (at,) = torch.where(rows)
        x = x.index_put((at,), self.b(h)[rows], accumulate=True)
    return x


def each_in_place(self, x, h):
    x = x.clone()
    torch._foreach_add_([x], [self.b(h)])
    return x


WRITINGS = {
    "masks": on_parts(ROWS, ~ROWS),
    "shared_masks": on_parts(ROWS, ~ROWS, shared=True),
    "shared_slices": on_parts((slice(None), slice(3)), (slice(None), slice(3, None)), shared=True),
    "assigned_masks": on_parts(~ROWS, ROWS, assigned=True),
    "columns": on_parts((slice(None), COLUMNS), (slice(None), ~COLUMNS)),
    "slices": on_parts((slice(None), slice(3)), (slice(None), slice(3, None))),
    "assigned_slices": on_parts((slice(None), slice(3)), (slice(None), slice(3, None)), assigned=True),
    "put_twice": put_twice,
    "each": lambda s, x, h: torch._foreach_add([x], [s.b(h)])[0],
    "each_in_place": each_in_place,
    "plus": lambda s, x, h: x + s.b(h),
    "branch_first": lambda s, x, h: s.b(h) + x,
    "in_place": in_place,
    "in_slice": in_slice,
    "add_alpha": lambda s, x, h: torch.add(x, s.b(h), alpha=0.5),
    "add_method": lambda s, x, h: s.b(h).add_(x),
    "addmm": lambda s, x, h: torch.addmm(x, h, s.c),
    "baddbmm": lambda s, x, h: torch.baddbmm(x[None], h[None], s.c[None])[0],
    "addcmul": lambda s, x, h: torch.addcmul(x, s.b(h), s.alpha),
    "python_sum": lambda s, x, h: sum([x, s.b(h)]),
    "index_add": lambda s, x, h: x.index_add(0, torch.arange(x.shape[0]), s.b(h)),
    "subtract": lambda s, x, h: torch.sub(x, s.b(h)),
    "rsub": lambda s, x, h: torch.rsub(x, s.b(h)),
    "method": lambda s, x, h: torch.Tensor.__add__(x, s.b(h)),
    "rezero": lambda s, x, h: x + s.alpha * s.b(h),
    "reshaped": lambda s, x, h: x.view(-1, 2, 4).transpose(1, 2).transpose(1, 2).reshape(-1, 8) + s.b(h),
    "keywords": lambda s, x, h: torch.add(input=x, other=s.b(h)),
}
for writing, write in WRITINGS.items():
    case(features(), f"write_{writing}", identity=1)(lambda write=write: ResidualMLP(write))
SCALED = {
    "constant": lambda s, x, h: 0.5 * x + s.b(h),
    "divided": lambda s, x, h: x / 2 + s.b(h) / 2,
    "learned": lambda s, x, h: x * s.alpha + s.b(h),
    "dropped": lambda s, x, h: F.dropout(x, 0.5, training=True) + s.b(h),
    "addcmul": lambda s, x, h: torch.addcmul(s.b(h), x, s.alpha),
}
for writing, write in SCALED.items():
    case(features(), f"scaled_{writing}", scaled=1)(lambda write=write: ResidualMLP(write))
