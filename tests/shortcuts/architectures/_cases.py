"""Where networks are registered with their inputs and the shortcuts they are known to have."""

from __future__ import annotations

import torch
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
