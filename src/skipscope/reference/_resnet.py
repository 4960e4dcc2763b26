"""Residual networks: He et al. 2015, arXiv 1512.03385.

The CIFAR family (section 4.2: 3 stages of 16, 32 and 64 channels, 6n + 2 layers), which also fits 8 x 8
images, and ResNet-18. If the shape changes, the shortcut is option A (every second pixel, zeros for new
channels, no weights) or option B (a 1 x 1 convolution).
"""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from skipscope._validation import require_option
from skipscope.nn import pad_shortcut


class OptionA(nn.Module):
    """Option A as a module: every ``stride``-th pixel, and zeros for new channels."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """``[n, c, h, w]`` -> ``[n, channels, h / stride, w / stride]``."""
        return pad_shortcut(x, self.channels, stride=self.stride)


class BasicBlock(nn.Module):
    """``relu(shortcut(x) + F(x))``, where F is two 3 x 3 convolutions with batch norm."""

    def __init__(self, channels_in: int, channels: int, stride: int, option: Literal["A", "B"]):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != channels_in:
            self.shortcut = (
                OptionA(channels, stride)
                if option == "A"
                else nn.Sequential(
                    nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        """``[n, c, h, w]`` -> ``[n, channels, h / stride, w / stride]``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, stages of basic blocks, global average pooling, and a linear head.

    Example:
        >>> import torch
        >>> model = ResNet((1, 1), (4, 8), classes=3, in_channels=1, option="A")
        >>> model(torch.ones(2, 1, 8, 8)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        widths: tuple[int, ...],
        *,
        classes: int,
        in_channels: int,
        option: Literal["A", "B"],
        large_images: bool = False,
    ):
        super().__init__()
        require_option("resnet", "option", option, ("A", "B"))
        self.in_channels = in_channels
        kernel, stride = (7, 2) if large_images else (3, 1)
        self.conv1 = nn.Conv2d(in_channels, widths[0], kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.pool = nn.MaxPool2d(3, 2, 1) if large_images else nn.Identity()
        self.stages = nn.Sequential()
        channels = widths[0]
        for i, (count, width) in enumerate(zip(blocks, widths)):
            stage = nn.Sequential()
            for j in range(count):
                stage.append(BasicBlock(channels, width, 2 if i and not j else 1, option))
                channels = width
            self.stages.append(stage)
        self.head = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """``[n, in_channels, h, w]``, or flattened square images ``[n, pixels]``, -> ``[n, classes]``."""
        if x.ndim == 2:
            side = math.isqrt(x.shape[1] // self.in_channels)
            x = x.reshape(-1, self.in_channels, side, side)
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        return self.head(self.stages(x).mean((2, 3)))


def _small(layers: int, classes: int, in_channels: int, option: Literal["A", "B"]) -> ResNet:
    n = (layers - 2) // 6
    return ResNet((n, n, n), (16, 32, 64), classes=classes, in_channels=in_channels, option=option)


def resnet20(classes: int = 10, in_channels: int = 1, option: Literal["A", "B"] = "B") -> ResNet:
    """ResNet-20 for small images: 9 blocks with 9 shortcuts, two of them across a change of shape.

    Args:
        classes: number of classes.
        in_channels: 1 for the digits, 3 for colour images.
        option: the shortcut across a change of shape: ``"A"`` slices and pads, ``"B"`` projects.

    Example:
        >>> sum(p.numel() for p in resnet20(in_channels=3, option="A").parameters())
        269722
    """
    return _small(20, classes, in_channels, option)


def resnet32(classes: int = 10, in_channels: int = 1, option: Literal["A", "B"] = "B") -> ResNet:
    """ResNet-32 for small images: 15 blocks; arguments as for :func:`resnet20`.

    Example:
        >>> sum(len(stage) for stage in resnet32().stages)
        15
    """
    return _small(32, classes, in_channels, option)


def resnet56(classes: int = 10, in_channels: int = 1, option: Literal["A", "B"] = "B") -> ResNet:
    """ResNet-56 for small images: 27 blocks; arguments as for :func:`resnet20`.

    Example:
        >>> sum(len(stage) for stage in resnet56().stages)
        27
    """
    return _small(56, classes, in_channels, option)


def resnet110(classes: int = 10, in_channels: int = 1, option: Literal["A", "B"] = "B") -> ResNet:
    """ResNet-110 for small images: 54 blocks; arguments as for :func:`resnet20`.

    Example:
        >>> sum(len(stage) for stage in resnet110().stages)
        54
    """
    return _small(110, classes, in_channels, option)


def resnet18(
    classes: int = 10, in_channels: int = 1, option: Literal["A", "B"] = "B", *, large_images: bool = False
) -> ResNet:
    """ResNet-18: 8 blocks in four stages of 64 to 512 channels; arguments as for :func:`resnet20`.

    Args:
        classes: number of classes.
        in_channels: 1 for the digits, 3 for colour images.
        option: the shortcut across a change of shape.
        large_images: the paper's stem for 224 x 224 images: 7 x 7 with stride 2, then max pooling.

    Example:
        >>> sum(p.numel() for p in resnet18(1000, 3, large_images=True).parameters())
        11689512
    """
    return ResNet(
        (2, 2, 2, 2),
        (64, 128, 256, 512),
        classes=classes,
        in_channels=in_channels,
        option=option,
        large_images=large_images,
    )
