"""Convolutional networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ._cases import case, features, images, seq, sequences


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
