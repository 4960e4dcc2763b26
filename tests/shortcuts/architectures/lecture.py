"""The lecture's network."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import nn

from ._cases import case, features, seq


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
