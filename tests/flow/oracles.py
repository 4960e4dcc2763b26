"""Slow, independent answers in float64, and networks whose answers are known."""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import torch
from torch import nn


class Branch(nn.Module):
    """Marks a branch operand: the identity, unless an oracle shuts some of them to gradients."""

    def __init__(self):
        super().__init__()
        self.open = True

    def forward(self, x):
        if not self.open:
            return x.detach()
        return x


@contextmanager
def only_open(marks, chosen):
    for i, mark in enumerate(marks):
        mark.open = i in chosen
    try:
        yield
    finally:
        for mark in marks:
            mark.open = True


def by_enumeration(model, loss, x, of=None):
    """G_k by all 2^L subsets of branch operands: the paths that use exactly a set S are, by inclusion and exclusion,
    sum over T in S of (-1)^(|S| - |T|) of the gradient with only T open.
    """
    marks = [m for m in model.modules() if isinstance(m, Branch)]
    n = len(marks)
    open_to = {}
    for bits in itertools.product((0, 1), repeat=n):
        leaf = x.clone().requires_grad_()
        with only_open(marks, {i for i, bit in enumerate(bits) if bit}):
            value = loss(model(leaf))
        (g,) = torch.autograd.grad(value, leaf if of is None else of, allow_unused=True)
        open_to[bits] = torch.zeros_like(leaf if of is None else of) if g is None else g
    exactly = dict(open_to)
    for i in range(n):  # Moebius inversion over subsets, one element at a time
        for bits in exactly:
            if bits[i]:
                exactly[bits] = exactly[bits] - exactly[(*bits[:i], 0, *bits[i + 1 :])]
    total = [0.0] * (n + 1)
    for bits, g in exactly.items():
        total[sum(bits)] = total[sum(bits)] + g
    return total


# --- networks with planted branches ---


class Chain(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


class Residual(nn.Module):
    """x + F(x), a x + F(x), or x + F(x) in place."""

    def __init__(self, inner, scale=None, in_place=False):
        super().__init__()
        self.inner, self.mark, self.scale, self.in_place = inner, Branch(), scale, in_place

    def forward(self, x):
        branch = self.mark(self.inner(x))
        if self.in_place:
            branch = branch * 1.0
            branch += x
            return branch
        return (x if self.scale is None else self.scale * x) + branch


class PostActivation(nn.Module):
    """relu(x + F(x)), both in place, as ResNets are written."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.mark = inner, Branch()

    def forward(self, x):
        out = self.mark(self.inner(x)) * 1.0
        out += x
        return nn.functional.relu_(out)


class Overwritten(nn.Module):
    """x + F(x), after which x itself is written into."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.mark = inner, Branch()

    def forward(self, x):
        x = x * 1.5
        y = x + self.mark(self.inner(x.clone()))
        x.mul_(2.0)
        return y


class Gated(nn.Module):
    """t H(x) + (1 - t) x."""

    def __init__(self, inner, width):
        super().__init__()
        self.inner, self.mark, self.gate = inner, Branch(), nn.Linear(width, width)

    def forward(self, x):
        t = torch.sigmoid(self.gate(x))
        return self.mark(t * self.inner(x)) + (1 - t) * x


class Projected(nn.Module):
    """W x + F(x)."""

    def __init__(self, width, inner):
        super().__init__()
        self.side, self.inner, self.mark = nn.Linear(width, width), inner, Branch()

    def forward(self, x):
        return self.side(x) + self.mark(self.inner(x))


class Dense(nn.Module):
    """[x, F(x)], brought back to its width."""

    def __init__(self, width, inner):
        super().__init__()
        self.inner, self.mark, self.back = inner, Branch(), nn.Linear(2 * width, width)

    def forward(self, x):
        return self.back(torch.cat([x, self.mark(self.inner(x))], -1))


class DenseBlock(nn.Module):
    """DenseNet's: every layer sees all before it."""

    def __init__(self, width, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width * (i + 1), width) for i in range(layers))
        self.marks = nn.ModuleList(Branch() for _ in range(layers))
        self.back = nn.Linear(width * (layers + 1), width)

    def forward(self, x):
        seen = x
        for layer, mark in zip(self.layers, self.marks):
            seen = torch.cat([seen, mark(torch.tanh(layer(seen)))], -1)
        return self.back(seen)


def layer(width):
    return nn.Sequential(nn.Linear(width, width), nn.Tanh())


def chain(length, width=6, **options):
    torch.manual_seed(length)
    return Chain(*[Residual(layer(width), **options) for _ in range(length)], nn.Linear(width, 3)).double()


# --- networks with a flow known in closed form ---


def orthogonal(width, gain):
    linear = nn.Linear(width, width, bias=False)
    nn.init.orthogonal_(linear.weight, gain)
    return linear


class Turn(nn.Module):
    """x + a Q x with Q orthogonal and antisymmetric: the gradient's norm grows by sqrt(1 + a^2), exactly."""

    def __init__(self, width, a):
        super().__init__()
        self.turn = nn.Linear(width, width, bias=False)
        half = width // 2
        basis = torch.linalg.qr(torch.randn(width, width)).Q
        block = torch.zeros(width, width)
        block[:half, half:], block[half:, :half] = torch.eye(half), -torch.eye(half)
        with torch.no_grad():
            self.turn.weight.copy_(a * basis @ block @ basis.T)

    def forward(self, x):
        return x + self.turn(x)


class Severed(nn.Module):
    def forward(self, x):
        return x.detach()
