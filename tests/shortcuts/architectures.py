"""Compact versions of the families in the literature, each with the shortcuts it is known to have.

``CASES`` maps a name to ``(make, inputs, kinds)``: a factory, inputs for the model, and how many shortcuts of each kind
it has. Widths are tiny; what matters is how the merges are written.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

CASES: dict = {}


def case(inputs, name=None, **kinds):
    """Register a factory with its inputs and the number of shortcuts of each kind."""

    def register(make):
        CASES[name or make.__name__] = (make, inputs, kinds)
        return make

    return register


def tokens(n=2, length=6):
    return torch.arange(n * length).reshape(n, length) * 7 % 11


def images(n=2, channels=3, size=16):
    return torch.linspace(-9, 9, n * channels * size * size).reshape(n, channels, size, size).sin()


def features(n=3, width=8):
    return torch.linspace(-5, 5, n * width).reshape(n, width).cos()


def sequences(n=2, length=6, width=8):
    return torch.linspace(-9, 9, n * length * width).reshape(n, length, width).sin()


def seq(*layers):
    return nn.Sequential(*layers)


# --- the lecture ----------------------------------------------------------------------------------------------------


class HandGELU(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


class Lecture(nn.Module):
    def __init__(self, sizes, use_shortcut):
        super().__init__()
        self.use_shortcut = use_shortcut
        self.layers = nn.ModuleList([seq(nn.Linear(a, b), HandGELU()) for a, b in pairwise(sizes)])

    def forward(self, x):
        for layer in self.layers:
            layer_output = layer(x)
            x = x + layer_output if self.use_shortcut and x.shape == layer_output.shape else layer_output
        return x


case(features(2, 3), "lecture", identity=4)(lambda: Lecture([3, 3, 3, 3, 3, 1], True))
case(features(2, 3), "lecture_plain")(lambda: Lecture([3, 3, 3, 3, 3, 1], False))


class LectureProjected(nn.Module):
    """The lecture's layers with a projection where the shapes do not agree."""

    def __init__(self):
        super().__init__()
        sizes = [8, 6, 6, 4]
        self.layers = nn.ModuleList([seq(nn.Linear(a, b), nn.GELU()) for a, b in pairwise(sizes)])
        self.proj = nn.ModuleList([nn.Linear(a, b) if a != b else nn.Identity() for a, b in pairwise(sizes)])

    def forward(self, x):
        for layer, projection in zip(self.layers, self.proj):
            x = projection(x) + layer(x)
        return x


case(features(), "lecture_projected", identity=1, projection=2)(LectureProjected)


# --- convolutional --------------------------------------------------------------------------------------------------


def conv(i, o, k=3, stride=1, groups=1):
    return nn.Conv2d(i, o, k, stride, k // 2, bias=False, groups=groups)


class Basic(nn.Module):
    def __init__(self, i, o, stride=1, option="B"):
        super().__init__()
        self.conv1, self.bn1 = conv(i, o, 3, stride), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = conv(o, o), nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.stride, self.pad, self.option = stride, o - i, option
        changes = stride != 1 or i != o
        self.downsample = seq(conv(i, o, 1, stride), nn.BatchNorm2d(o)) if changes and option == "B" else None

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        elif self.option == "A" and self.stride > 1:
            identity = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad // 2, self.pad - self.pad // 2))
        out += identity
        return self.relu(out)


class SqueezeExcite(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.down, self.up = nn.Conv2d(c, 2, 1), nn.Conv2d(2, c, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Bottleneck(nn.Module):
    def __init__(self, i, width, stride=1, groups=1, gate=False):
        super().__init__()
        o = width * 4
        self.conv1, self.bn1 = conv(i, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride, groups), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, o, 1), nn.BatchNorm2d(o)
        self.se = SqueezeExcite(o) if gate else nn.Identity()
        self.downsample = seq(conv(i, o, 1, stride), nn.BatchNorm2d(o)) if stride != 1 or i != o else None

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.se(self.bn3(self.conv3(out)))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self, block, widths, counts, expansion=1, stem=4, **options):
        super().__init__()
        self.conv1, self.bn1 = conv(3, stem), nn.BatchNorm2d(stem)
        channels, stages = stem, []
        for s, (width, count) in enumerate(zip(widths, counts)):
            blocks = []
            for b in range(count):
                blocks.append(block(channels, width, 2 if s and not b else 1, **options))
                channels = width * expansion
            stages.append(seq(*blocks))
        self.stages = seq(*stages)
        self.fc = nn.Linear(channels, 5)

    def forward(self, x):
        x = self.stages(F.relu(self.bn1(self.conv1(x)), inplace=True))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


case(images(), "resnet18", identity=5, projection=3)(lambda: ResNet(Basic, [4, 8, 16, 32], [2, 2, 2, 2]))
case(images(), "resnet_option_a", identity=6)(lambda: ResNet(Basic, [4, 8, 16], [2, 2, 2], option="A"))
case(images(), "resnet50", identity=12, projection=4)(
    lambda: ResNet(Bottleneck, [2, 4, 8, 16], [3, 4, 6, 3], 4)
)
case(images(), "resnext", identity=4, projection=2)(lambda: ResNet(Bottleneck, [4, 8], [3, 3], 4, groups=2))
case(images(), "se_resnet", identity=2, projection=2)(
    lambda: ResNet(Bottleneck, [4, 8], [2, 2], 4, gate=True)
)


class PreActivation(nn.Module):
    def __init__(self, i, o, stride=1, dropout=0.0):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(i), conv(i, o, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(o), conv(o, o)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = conv(i, o, 1, stride) if stride != 1 or i != o else None

    def forward(self, x):
        out = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(self.dropout(F.relu(self.bn2(out))))
        return torch.add(out, skip)


case(images(), "preactivation", identity=4, projection=2)(
    lambda: ResNet(PreActivation, [4, 8, 16], [2, 2, 2])
)
case(images(), "wide_resnet", identity=2, projection=2)(
    lambda: ResNet(PreActivation, [8, 16], [2, 2], dropout=0.3)
)


class ShakeShake(nn.Module):
    def __init__(self, i, o, stride=1):
        super().__init__()
        self.a, self.b = (
            seq(nn.ReLU(), conv(i, o), nn.BatchNorm2d(o), nn.ReLU(), conv(o, o)) for _ in range(2)
        )

    def forward(self, x):
        alpha = torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype)
        return x + (alpha * self.a(x) + (1 - alpha) * self.b(x))


case(images(), "shake_shake", identity=3)(lambda: ResNet(ShakeShake, [4], [3]))


class StochasticDepth(nn.Module):
    def __init__(self, i, o, stride=1):
        super().__init__()
        self.body = seq(conv(i, o), nn.BatchNorm2d(o), nn.ReLU(), conv(o, o))

    def forward(self, x):
        keep = torch.bernoulli(torch.full((x.shape[0], 1, 1, 1), 0.8, dtype=x.dtype)) / 0.8
        return F.relu(x + self.body(x) * keep)


case(images(), "stochastic_depth", identity=2)(lambda: ResNet(StochasticDepth, [4], [2]))


class Fixup(nn.Module):
    def __init__(self, i, o, stride=1):
        super().__init__()
        self.b1, self.b2, self.b3 = (nn.Parameter(torch.full((1,), 0.1)) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(1))
        self.conv1, self.conv2 = conv(i, o), conv(o, o)

    def forward(self, x):
        out = F.relu(self.conv1(x + self.b1))
        return F.relu(self.conv2(out + self.b2) * self.scale + self.b3 + x)


case(images(), "fixup", identity=2)(lambda: ResNet(Fixup, [4], [2]))


class InvertedResidual(nn.Module):
    def __init__(self, i, o, stride=1, expand=2, gate=False):
        super().__init__()
        h = i * expand
        self.use_res = stride == 1 and i == o
        self.conv = seq(
            conv(i, h, 1), nn.BatchNorm2d(h), nn.ReLU6(inplace=True),
            conv(h, h, 3, stride, h), nn.BatchNorm2d(h), nn.ReLU6(inplace=True),
            SqueezeExcite(h) if gate else nn.Identity(), conv(h, o, 1), nn.BatchNorm2d(o),
        )  # fmt: skip

    def forward(self, x):
        return x + self.conv(x) if self.use_res else self.conv(x)


case(images(), "mobilenet_v2", identity=4)(lambda: ResNet(InvertedResidual, [4, 8, 8], [2, 2, 2]))
case(images(), "efficientnet", identity=4)(lambda: ResNet(InvertedResidual, [4, 8], [2, 3], gate=True))


class ConvNeXt(nn.Module):
    def __init__(self, i, o, stride=1, grn=False):
        super().__init__()
        self.dw, self.norm = conv(i, i, 7, 1, i), nn.LayerNorm(i)
        self.pw1, self.pw2 = nn.Linear(i, 4 * i), nn.Linear(4 * i, i)
        self.layer_scale = nn.Parameter(torch.full((i,), 0.1))
        self.gamma, self.beta = (
            (nn.Parameter(torch.full((4 * i,), 0.1)) for _ in range(2)) if grn else (None, None)
        )

    def forward(self, x):
        y = F.gelu(self.pw1(self.norm(self.dw(x).permute(0, 2, 3, 1))))
        if self.gamma is not None:
            g = y.norm(p=2, dim=(1, 2), keepdim=True)
            y = self.gamma * (y * (g / (g.mean(-1, keepdim=True) + 1e-6))) + self.beta + y
        return x + (self.layer_scale * self.pw2(y)).permute(0, 3, 1, 2)


case(images(), "convnext", identity=3)(lambda: ResNet(ConvNeXt, [4], [3]))
# GRN has a residual connection of its own (its paper says so), around a gain that holds vectors only.
case(images(), "convnext_v2", identity=4)(lambda: ResNet(ConvNeXt, [4], [2], grn=True))


class DenseLayer(nn.Module):
    def __init__(self, i, growth):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(i), conv(i, growth)

    def forward(self, features):
        return self.conv(F.relu(self.norm(torch.cat(features, 1))))


class DenseNet(nn.Module):
    def __init__(self, counts=(3, 4), growth=3):
        super().__init__()
        self.stem, c = conv(3, 4), 4
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for n in counts:
            self.blocks.append(nn.ModuleList([DenseLayer(c + k * growth, growth) for k in range(n)]))
            c += n * growth
            self.transitions.append(conv(c, c // 2, 1))
            c //= 2

    def forward(self, x):
        x = self.stem(x)
        for block, transition in zip(self.blocks, self.transitions):
            features = [x]
            for layer in block:
                features.append(layer(features))
            x = F.avg_pool2d(transition(torch.cat(features, 1)), 2)
        return x.mean((2, 3))


case(images(), "densenet", concat=7)(DenseNet)
case(images(size=32), "densenet121", concat=58)(lambda: DenseNet((6, 12, 24, 16), 1))


def double(i, o):
    return seq(conv(i, o), nn.BatchNorm2d(o), nn.ReLU(inplace=True), conv(o, o), nn.ReLU(inplace=True))


class UNet(nn.Module):
    def __init__(self, join="cat", block=double):
        super().__init__()
        w = [4, 8, 16]
        self.join, k = join, 2 if join == "cat" else 1
        self.d1, self.d2, self.bottom = block(3, w[0]), block(w[0], w[1]), block(w[1], w[2])
        self.up2, self.u2 = nn.ConvTranspose2d(w[2], w[1], 2, 2), block(k * w[1], w[1])
        self.up1, self.u1 = nn.ConvTranspose2d(w[1], w[0], 2, 2), block(k * w[0], w[0])
        self.head = conv(w[0], 2, 1)

    def merge(self, skip, x):
        return torch.cat([skip, x], 1) if self.join == "cat" else skip + x

    def forward(self, x):
        a = self.d1(x)
        b = self.d2(F.max_pool2d(a, 2))
        c = self.bottom(F.max_pool2d(b, 2))
        c = self.u2(self.merge(b, self.up2(c)))
        return self.head(self.u1(self.merge(a, self.up1(c))))


case(images(), "unet", concat=2)(UNet)
case(images(), "linknet", identity=2)(lambda: UNet("add"))
case(images(), "residual_unet", concat=2, projection=5)(lambda: UNet(block=Basic))


class RecursiveUNet(nn.Module):
    """As in pix2pix: each block holds the next, and concatenates its own input."""

    def __init__(self, outer, inner, inside=None):
        super().__init__()
        through = 2 * inner if inside is not None else inner
        layers = [conv(outer, inner, 3, 2), nn.ReLU(), *([inside] if inside is not None else [])]
        self.model = seq(*layers, nn.ConvTranspose2d(through, outer, 2, 2))

    def forward(self, x):
        return torch.cat([x, self.model(x)], 1)


case(images(), "recursive_unet", concat=3)(
    lambda: RecursiveUNet(3, 4, RecursiveUNet(4, 5, RecursiveUNet(5, 6)))
)


class Inception(nn.Module):
    def __init__(self, i):
        super().__init__()
        self.a, self.b = conv(i, 2, 1), seq(conv(i, 2, 1), nn.ReLU(), conv(2, 3))
        self.c, self.pool = seq(conv(i, 2, 1), nn.ReLU(), conv(2, 2, 5)), conv(i, 2, 1)

    def forward(self, x):
        return F.relu(torch.cat([self.a(x), self.b(x), self.c(x), self.pool(F.max_pool2d(x, 3, 1, 1))], 1))


case(images(), "googlenet")(
    lambda: seq(conv(3, 4), nn.ReLU(), Inception(4), Inception(9), nn.AdaptiveAvgPool2d(1))
)
case(images(), "vgg")(
    lambda: seq(
        double(3, 4), nn.MaxPool2d(2), double(4, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
)


class Fire(nn.Module):
    def __init__(self, i, bypass):
        super().__init__()
        self.squeeze, self.one, self.three, self.bypass = conv(i, 2, 1), conv(2, 4, 1), conv(2, 4), bypass

    def forward(self, x):
        s = F.relu(self.squeeze(x))
        y = torch.cat([F.relu(self.one(s)), F.relu(self.three(s))], 1)
        return x + y if self.bypass else y


case(images(), "squeezenet")(lambda: seq(Fire(3, False), Fire(8, False), Fire(8, False)))
case(images(), "squeezenet_bypass", identity=2)(lambda: seq(Fire(3, False), Fire(8, True), Fire(8, True)))


class ShuffleUnit(nn.Module):
    def __init__(self, c):
        super().__init__()
        h = c // 2
        self.branch = seq(conv(h, h, 1), nn.BatchNorm2d(h), nn.ReLU(), conv(h, h, 3, 1, h), conv(h, h, 1))

    def forward(self, x):
        a, b = x.chunk(2, dim=1)
        out = torch.cat((a, self.branch(b)), dim=1)
        n, c, h, w = out.shape
        return out.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


case(images(), "shufflenet_v2", concat=3)(
    lambda: seq(conv(3, 8), ShuffleUnit(8), ShuffleUnit(8), ShuffleUnit(8))
)


class C2f(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.split, self.join = conv(c, c, 1), conv(2 * c, c, 1)
        self.m = nn.ModuleList([seq(conv(c // 2, c // 2), nn.SiLU(), conv(c // 2, c // 2)) for _ in range(2)])

    def forward(self, x):
        y = list(self.split(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.join(torch.cat(y, 1))


case(images(), "csp_c2f", concat=1)(lambda: seq(conv(3, 8), C2f(8)))


class SPPF(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.a, self.b = conv(c, 2, 1), conv(8, c, 1)

    def forward(self, x):
        x = self.a(x)
        y = F.max_pool2d(x, 5, 1, 2)
        z = F.max_pool2d(y, 5, 1, 2)
        return self.b(torch.cat([x, y, z, F.max_pool2d(z, 5, 1, 2)], 1))


case(images(), "sppf")(lambda: seq(conv(3, 4), SPPF(4)))


class RepVGG(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.dense, self.one = seq(conv(c, c), nn.BatchNorm2d(c)), seq(conv(c, c, 1), nn.BatchNorm2d(c))
        self.identity = nn.BatchNorm2d(c)

    def forward(self, x):
        return F.relu(self.dense(x) + self.one(x) + self.identity(x))


# The two convolutions are parallel; the normalised identity beside them is a x + b per channel.
case(images(), "repvgg", scaled=2)(lambda: seq(conv(3, 4), RepVGG(4), RepVGG(4)))


class FPN(nn.Module):
    def __init__(self):
        super().__init__()
        self.c2, self.c3 = double(3, 4), double(4, 8)
        self.l2, self.l3, self.smooth = conv(4, 4, 1), conv(8, 4, 1), conv(4, 4)

    def forward(self, x):
        c2 = self.c2(x)
        c3 = self.c3(F.max_pool2d(c2, 2))
        return self.smooth(self.l2(c2) + F.interpolate(self.l3(c3), scale_factor=2.0, mode="nearest"))


case(images(), "fpn", projection=1)(FPN)


class EDSR(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        self.head, self.tail = conv(3, 4), seq(conv(4, 12), nn.PixelShuffle(2), conv(3, 3))
        self.blocks = nn.ModuleList([seq(conv(4, 4), nn.ReLU(True), conv(4, 4)) for _ in range(blocks)])
        self.last = conv(4, 4)

    def forward(self, x):
        x = self.head(x)
        y = x
        for block in self.blocks:
            y = y + block(y).mul(0.1)
        return self.tail(self.last(y) + x)


case(images(), "edsr", identity=4)(EDSR)


class Nested(nn.Module):
    """A long shortcut over a stream that is itself the identity plus branches."""

    def __init__(self):
        super().__init__()
        self.a, self.b = seq(nn.Linear(8, 8), nn.Tanh()), seq(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x):
        y = x + self.a(x)
        y = y + self.b(y)
        return x + y


case(features(), "nested", identity=3)(Nested)


class DnCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = seq(conv(3, 4), nn.ReLU(inplace=True), conv(4, 4), nn.ReLU(inplace=True), conv(4, 3))

    def forward(self, x):
        return x - self.body(x)


case(images(), "dncnn", identity=1)(DnCNN)


class WaveNet(nn.Module):
    def __init__(self, layers=3, c=4):
        super().__init__()
        self.inp = nn.Conv1d(2, c, 1)
        self.f, self.g = (
            nn.ModuleList([nn.Conv1d(c, c, 3, padding=2**k, dilation=2**k) for k in range(layers)])
            for _ in "fg"
        )
        self.res, self.skip = (nn.ModuleList([nn.Conv1d(c, c, 1) for _ in range(layers)]) for _ in "rs")
        self.out = nn.Conv1d(c, 2, 1)

    def forward(self, x):
        x, total = self.inp(x), 0
        for f, g, res, skip in zip(self.f, self.g, self.res, self.skip):
            h = torch.tanh(f(x)) * torch.sigmoid(g(x))
            total = total + skip(h)
            x = x + res(h)
        return self.out(F.relu(total))


# Three residual additions, the last of which no one uses. The skip outputs are summed: one linear map past a layer.
case(sequences(2, 2, 12), "wavenet", identity=3, projection=1)(WaveNet)


class FractalBlock(nn.Module):
    def __init__(self, depth=2, c=4):
        super().__init__()
        self.short = conv(c, c)
        self.long = seq(FractalBlock(depth - 1, c), FractalBlock(depth - 1, c)) if depth > 1 else None

    def forward(self, x):
        y = F.relu(self.short(x))
        return y if self.long is None else (y + self.long(x)) / 2


# Every column holds a convolution and a ReLU: parallel branches, no shortcut (its paper: "without residuals").
case(images(), "fractalnet")(lambda: seq(conv(3, 4), FractalBlock(3)))


# --- gates and recurrence -------------------------------------------------------------------------------------------


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


# --- transformers ---------------------------------------------------------------------------------------------------


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


def rotate(x):
    angles = torch.arange(x.shape[-2])[:, None] / 10 ** torch.arange(x.shape[-1])[None, :]
    angles = angles.to(x.dtype)
    a, b = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()


class RMSNorm(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class HandLayerNorm(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return self.scale * ((x - mean) / torch.sqrt(variance + 1e-5)) + self.shift


class SwiGLU(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, 12), nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def mlp(width=8):
    return seq(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))


class Layer(nn.Module):
    """One transformer layer in the ways that it is written."""

    def __init__(self, form="pre", norm=nn.LayerNorm, rope=False, ff=mlp, width=8):
        super().__init__()
        self.attn, self.mlp, self.form = Attention(width, rope=rope), ff(width), form
        self.n1, self.n2, self.n3, self.n4 = (norm(width) for _ in range(4))
        self.g1, self.g2 = (nn.Parameter(torch.full((width,), 0.1)) for _ in range(2))

    def forward(self, x):
        if self.form == "pre":
            x = x + self.attn(self.n1(x))
            return x + self.mlp(self.n2(x))
        if self.form == "post":
            x = self.n1(x + self.attn(x))
            return self.n2(x + self.mlp(x))
        if self.form == "sandwich":
            x = x + self.n3(self.attn(self.n1(x)))
            return x + self.n4(self.mlp(self.n2(x)))
        if self.form == "parallel":
            return self.mlp(self.n2(x)) + self.attn(self.n1(x)) + x
        if self.form == "parallel_left":
            return x + self.attn(self.n1(x)) + self.mlp(self.n2(x))
        if self.form == "deepnorm":
            x = self.n1(1.5 * x + self.attn(x))
            return self.n2(x * 1.5 + self.mlp(x))
        x = x + self.g1 * self.attn(self.n1(x))
        return x + self.g2 * self.mlp(self.n2(x))


class GPT(nn.Module):
    def __init__(self, layers=3, learned_positions=True, **options):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 8), nn.Embedding(6, 8) if learned_positions else None
        self.h = nn.ModuleList([Layer(**options) for _ in range(layers)])
        self.ln, self.head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids):
        x = self.wte(ids)
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(ids.shape[1]))
        for layer in self.h:
            x = layer(x)
        return {"logits": self.head(self.ln(x))}


case(tokens(), "gpt2", identity=6)(GPT)
case(tokens(), "gpt_hand_norm", identity=6)(lambda: GPT(norm=HandLayerNorm))
case(tokens(), "bert", identity=6)(lambda: GPT(form="post"))
case(tokens(), "gemma_sandwich", identity=6)(lambda: GPT(form="sandwich", norm=RMSNorm))
case(tokens(), "llama", identity=6)(lambda: GPT(learned_positions=False, norm=RMSNorm, rope=True, ff=SwiGLU))
case(tokens(), "neox_parallel", identity=3)(lambda: GPT(form="parallel", rope=True))
case(tokens(), "parallel_left", identity=3)(lambda: GPT(form="parallel_left"))
case(tokens(), "deepnorm", scaled=6)(lambda: GPT(form="deepnorm"))
case(tokens(), "cait_layer_scale", identity=6)(lambda: GPT(form="scale"))


class T5(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.shared, self.bias = nn.Embedding(11, 8), nn.Embedding(4, 2)
        self.encoder = nn.ModuleList(
            [nn.ModuleList([Attention(), mlp(), RMSNorm(), RMSNorm()]) for _ in range(layers)]
        )
        self.decoder = nn.ModuleList(
            [
                nn.ModuleList([Attention(), Attention(), mlp(), RMSNorm(), RMSNorm(), RMSNorm()])
                for _ in range(layers)
            ]
        )

    def forward(self, input_ids, decoder_input_ids):
        n = torch.arange(input_ids.shape[1])
        bias = self.bias((n[:, None] - n[None, :]).abs().clamp(max=3)).permute(2, 0, 1)[None]
        x = self.shared(input_ids)
        for attention, ff, n1, n2 in self.encoder:
            x = x + attention(n1(x), bias=bias)
            x = x + ff(n2(x))
        y = self.shared(decoder_input_ids)
        for own, cross, ff, n1, n2, n3 in self.decoder:
            y = y + own(n1(y), bias=bias)
            y = y + cross(n2(y), memory=x)
            y = y + ff(n3(y))
        return y


case({"input_ids": tokens(), "decoder_input_ids": (tokens() + 1) % 11}, "t5", identity=10)(T5)


class ViT(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.cls, self.position = (
            nn.Parameter(torch.zeros(1, 1, 8)),
            nn.Parameter(torch.full((1, 17, 8), 0.02)),
        )
        self.blocks, self.head = seq(*[Layer() for _ in range(layers)]), nn.Linear(8, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.blocks(x)[:, 0])


case(images(), "vit", identity=4)(ViT)


class SwinBlock(nn.Module):
    def __init__(self, shift):
        super().__init__()
        self.n1, self.attn, self.n2, self.mlp, self.shift = (
            nn.LayerNorm(8),
            Attention(),
            nn.LayerNorm(8),
            mlp(),
            shift,
        )
        self.table = nn.Parameter(torch.full((2, 16, 16), 0.01))

    def forward(self, x):  # [batch, 8, 8, width], windows of 4 x 4
        y = torch.roll(self.n1(x), (-self.shift, -self.shift), (1, 2))
        y = y.view(-1, 2, 4, 2, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 8)
        y = self.attn(y, bias=self.table)
        y = y.view(-1, 2, 2, 4, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 8, 8, 8)
        x = x + torch.roll(y, (self.shift, self.shift), (1, 2))
        return x + self.mlp(self.n2(x))


class Swin(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.blocks = nn.Conv2d(3, 8, 2, 2), seq(SwinBlock(0), SwinBlock(2))

    def forward(self, x):
        return self.blocks(self.patch(x).permute(0, 2, 3, 1)).mean((1, 2))


case(images(), "swin", identity=4)(Swin)


class PoolFormerBlock(nn.Module):
    def __init__(self, c=4, residual_scale=False):
        super().__init__()
        self.n1, self.n2 = nn.GroupNorm(1, c), nn.GroupNorm(1, c)
        self.mlp = seq(conv(c, 2 * c, 1), nn.GELU(), conv(2 * c, c, 1))
        self.s1, self.s2 = (nn.Parameter(torch.full((c, 1, 1), 0.1)) for _ in range(2))
        self.r1, self.r2 = (nn.Parameter(torch.ones(c, 1, 1)) if residual_scale else None for _ in range(2))

    def forward(self, x):
        y = self.n1(x)
        x = (x if self.r1 is None else self.r1 * x) + self.s1 * (F.avg_pool2d(y, 3, 1, 1) - y)
        return (x if self.r2 is None else self.r2 * x) + self.s2 * self.mlp(self.n2(x))


case(images(), "poolformer", identity=4)(lambda: seq(conv(3, 4), PoolFormerBlock(), PoolFormerBlock()))
case(images(), "metaformer_scaled", scaled=4)(
    lambda: seq(conv(3, 4), PoolFormerBlock(residual_scale=True), PoolFormerBlock(residual_scale=True))
)


class MixerBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.n1, self.n2 = (nn.LayerNorm(8) for _ in range(2))
        self.token, self.channel = mlp(6), mlp(8)

    def forward(self, x):
        x = x + self.token(self.n1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel(self.n2(x))


case(sequences(), "mlp_mixer", identity=4)(lambda: seq(MixerBlock(), MixerBlock()))


class GatedMLP(nn.Module):
    """gMLP: u * f(v), around which goes a shortcut."""

    def __init__(self):
        super().__init__()
        self.norm, self.inp, self.out = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(8, 8)
        self.gate_norm, self.spatial = nn.LayerNorm(8), nn.Conv1d(6, 6, 1)

    def forward(self, x):
        u, v = F.gelu(self.inp(self.norm(x))).chunk(2, -1)
        return x + self.out(u * self.spatial(self.gate_norm(v)))


case(sequences(), "gmlp", identity=2)(lambda: seq(GatedMLP(), GatedMLP()))


class Conformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.f1, self.f2 = seq(nn.LayerNorm(8), mlp()), seq(nn.LayerNorm(8), mlp())
        self.norm, self.attn, self.last = nn.LayerNorm(8), Attention(), nn.LayerNorm(8)
        self.pw1, self.dw, self.pw2 = (
            nn.Conv1d(8, 16, 1),
            nn.Conv1d(8, 8, 3, padding=1, groups=8),
            nn.Conv1d(8, 8, 1),
        )
        self.bn = nn.BatchNorm1d(8)

    def forward(self, x):
        x = x + 0.5 * self.f1(x)
        x = x + self.attn(self.norm(x))
        x = x + self.pw2(F.silu(self.bn(self.dw(F.glu(self.pw1(x.transpose(1, 2)), 1))))).transpose(1, 2)
        x = x + 0.5 * self.f2(x)
        return self.last(x)


case(sequences(), "conformer", identity=8)(lambda: seq(Conformer(), Conformer()))


class MoE(nn.Module):
    def __init__(self, width=8, experts=3):
        super().__init__()
        self.router, self.experts = (
            nn.Linear(width, experts),
            nn.ModuleList([mlp(width) for _ in range(experts)]),
        )
        self.shared = mlp(width)

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weight, chosen = self.router(flat).softmax(-1).topk(2, -1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == e)
            out.index_add_(0, rows, expert(flat[rows]) * weight[rows, slot, None])
        return out.view(x.shape) + self.shared(x)


case(tokens(), "mixture_of_experts", identity=4)(lambda: GPT(2, ff=MoE))


class ValueResidual(nn.Module):
    """2410.17897: every layer's values get the first layer's added: v_l = W_l x_l + v_1."""

    def __init__(self, layers=3):
        super().__init__()
        self.attn = nn.ModuleList([Attention() for _ in range(layers)])
        self.mlp, self.norm = nn.ModuleList([mlp() for _ in range(layers)]), nn.LayerNorm(8)

    def forward(self, x):
        first = None
        for attention, ff in zip(self.attn, self.mlp):
            y, value = attention(self.norm(x), value=first, return_value=True)
            first = value if first is None else first
            x = x + y
            x = x + ff(x)
        return x


case(sequences(), "value_residual", identity=8)(ValueResidual)


class HyperConnections(nn.Module):
    """2409.19606, static: X' = H_res X + H_post F(H_pre X) on n streams."""

    def __init__(self, layers=2, n=2):
        super().__init__()
        self.f = nn.ModuleList([seq(nn.LayerNorm(8), mlp()) for _ in range(layers)])
        self.pre, self.post = (nn.ParameterList([torch.ones(n) / n for _ in range(layers)]) for _ in range(2))
        self.res = nn.ParameterList([torch.eye(n) * 0.9 + 0.1 for _ in range(layers)])
        self.n = n

    def forward(self, x):
        streams = x.unsqueeze(0).expand(self.n, *x.shape)
        for f, pre, res, post in zip(self.f, self.pre, self.res, self.post):
            y = f(torch.einsum("n,nbtd->btd", pre, streams))
            streams = torch.einsum("mn,nbtd->mbtd", res, streams) + post[:, None, None, None] * y
        return streams.sum(0)


case(sequences(), "hyper_connections", projection=2)(HyperConnections)


class DenseFormer(nn.Module):
    """2402.02622: after each block a learned weighted average of all representations so far."""

    def __init__(self, layers=3):
        super().__init__()
        self.blocks = nn.ModuleList([Layer() for _ in range(layers)])
        self.alpha = nn.ParameterList([torch.full((k + 2,), 0.3) for k in range(layers)])

    def forward(self, x):
        seen = [x]
        for block, alpha in zip(self.blocks, self.alpha):
            seen.append(block(x))
            x = sum(a * s for a, s in zip(alpha, seen))
        return x


# Two merges a block inside; outside, a first average of 2, one of 3 and one of 4 addends: 1 + 2 + 3 merges.
case(sequences(), "denseformer", identity=6, scaled=6)(DenseFormer)


class Mamba(nn.Module):
    """A selective scan written out, with the paper's own skip D."""

    def __init__(self, width=8, state=3):
        super().__init__()
        self.norm, self.inp, self.out = RMSNorm(width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.conv = nn.Conv1d(width, width, 3, padding=2, groups=width)
        self.x_proj, self.dt = nn.Linear(width, 1 + 2 * state), nn.Linear(1, width)
        self.A, self.D = (
            nn.Parameter(torch.linspace(0, 1, width * state).reshape(width, state)),
            nn.Parameter(torch.ones(width)),
        )
        self.state = state

    def mix(self, x):
        u, z = self.inp(x).chunk(2, -1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        dt, B, C = self.x_proj(u).split([1, self.state, self.state], -1)
        dt = F.softplus(self.dt(dt))
        dA = torch.exp(dt[..., None] * -torch.exp(self.A))
        dBu = dt[..., None] * B[:, :, None, :] * u[..., None]
        h, ys = torch.zeros_like(dBu[:, 0]), []
        for t in range(x.shape[1]):
            h = dA[:, t] * h + dBu[:, t]
            ys.append((h * C[:, t, None, :]).sum(-1))
        y = torch.stack(ys, 1) + u * self.D
        return self.out(y * F.silu(z))

    def forward(self, x):
        return x + self.mix(self.norm(x))


case(sequences(), "mamba", identity=2, scaled=2)(lambda: seq(Mamba(), Mamba()))


class RWKV(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix_k, self.mix_r = (nn.Parameter(torch.full((width,), 0.3)) for _ in range(2))
        self.key, self.value, self.receptance = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x):
        x = self.n1(x)
        y = self.n2(x)
        last = F.pad(y, (0, 0, 1, -1))
        k = y * self.mix_k + last * (1 - self.mix_k)
        r = y * self.mix_r + last * (1 - self.mix_r)
        return x + torch.sigmoid(self.receptance(r)) * self.value(torch.relu(self.key(k)) ** 2)


case(sequences(), "rwkv_channel_mix", identity=2)(lambda: seq(RWKV(), RWKV()))


case(sequences(), "torch_encoder", identity=4)(
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
)
case(sequences(), "torch_encoder_pre_norm", identity=2)(
    lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
)
case((sequences(), sequences().flip(0)), "torch_transformer", identity=10)(
    lambda: nn.Transformer(8, 2, 2, 2, 16, batch_first=True)
)


class Perceiver(nn.Module):
    def __init__(self):
        super().__init__()
        self.latents = nn.Parameter(torch.linspace(-1, 1, 32).reshape(1, 4, 8))
        self.first, self.cross, self.ff = nn.Linear(8, 8), Attention(), mlp()

    def forward(self, x):
        z = self.latents + self.first(x.mean(1, keepdim=True))
        z = z + self.cross(z, memory=x)
        return z + self.ff(z)


case(sequences(), "perceiver", identity=2)(Perceiver)


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = seq(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, a, b):
        return torch.cat([self.body(a), self.body(b), self.body(a) - self.body(b)], -1)


case((features(), features() * 2), "siamese")(Siamese)


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.mu, self.log_var = seq(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 3), nn.Linear(8, 3)
        self.decoder = seq(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x):
        h = self.body(x)
        mu, log_var = self.mu(h), self.log_var(h)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * log_var)
        kl = -0.5 * (1 + log_var - mu.pow(2) - log_var.exp()).sum()
        return self.decoder(z), kl


case(features(), "vae")(VAE)


class LoRA(nn.Module):
    """A low-rank update of one linear map is no shortcut past another."""

    def __init__(self):
        super().__init__()
        self.base, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x)) * 2.0


case(features(), "lora")(lambda: seq(LoRA(), nn.ReLU(), LoRA()))


class GraphConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.message, self.own = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        source, target = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 0, 2])
        gathered = torch.zeros_like(x).index_add(0, target, self.message(x)[source])
        return F.relu(self.own(x) + gathered) + x


case(features(), "graph_conv", identity=2)(lambda: seq(GraphConv(), GraphConv()))


class DeepLinear(nn.Module):
    """1611.01186: two-layer linear shortcuts."""

    def __init__(self, layers=2):
        super().__init__()
        self.pairs = nn.ModuleList(
            [seq(nn.Linear(4, 4, False), nn.Linear(4, 4, False)) for _ in range(layers)]
        )

    def forward(self, x):
        for pair in self.pairs:
            x = x + pair(x)
        return x


case(features(3, 4), "deep_linear", identity=2)(DeepLinear)


# --- from a sweep over other people's models -----------------------------------------------------------------------------


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


# --- more of the literature ---------------------------------------------------------------------------------------------


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
