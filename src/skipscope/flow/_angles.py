"""Path lengths of very deep networks: a bounded number of gradients, however many lengths there are.

With G(z) = sum_k z^k G_k, and each branch operand multiplying by z = exp(i t), the gradients at M angles t = 2 pi j / M
give by a discrete Fourier transform the sums over all lengths that are equal modulo M. Lengths fill a band around
their mean (for a chain of L equal blocks about sqrt(L) wide), so where the band is narrower than M those sums are the
G_k themselves, once it is known where the band lies: at <G, sum_k k G_k> / |G|^2, which one more gradient carried along
gives. What is left at the far ends of the window shows the error. Real gradients need half of the angles.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from skipscope.flow._cuts import Stack, Walk

MOST = 256  # branches up to which every length is carried; and the number of lengths told apart beyond


class AngleWalk(Walk):
    """A walk whose stacks hold, instead of lengths, the real and imaginary parts at each angle, G and sum_k k G_k."""

    angles = MOST // 2 + 1

    def start(self, seed: Tensor) -> Stack:
        """G(z) = 1 at every angle; G = 1; the derivative 0."""
        rows = seed.new_zeros(2 * self.angles + 2, *seed.shape)
        rows[: self.angles], rows[-2] = seed, seed
        return Stack(0, rows)

    def cross(self, stack: Stack) -> Stack:
        """Times z at every angle; the derivative of z G is G + z G'."""
        a, rows = self.angles, stack.rows
        t = (2 * math.pi / MOST * torch.arange(a, dtype=torch.float64)).to(rows.device)
        shape = (a,) + (1,) * (rows.ndim - 1)
        cos, sin = t.cos().to(rows.dtype).view(shape), t.sin().to(rows.dtype).view(shape)
        real, imaginary = rows[:a], rows[a : 2 * a]
        turned = [
            cos * real - sin * imaginary,
            sin * real + cos * imaginary,
            rows[-2:-1],
            rows[-1:] + rows[-2:-1],
        ]
        return Stack(0, torch.cat(turned))

    def window(self, stack: Stack | None, branches: int) -> tuple[int, int] | None:
        """The first of the lengths that are told apart, and how many."""
        if stack is None:
            return None
        whole, derivative = stack.rows[-2].double().flatten(), stack.rows[-1].double().flatten()
        square = float(whole @ whole)
        middle = float(whole @ derivative) / square if square else 0.0
        middle = middle if math.isfinite(middle) else 0.0
        return max(0, min(round(middle) - MOST // 2, branches + 1 - MOST)), MOST

    def lengths(self, stack: Stack | None, window: tuple[int, int] | None) -> Stack | None:
        """From angles to lengths, those of the window."""
        if stack is None or window is None:
            return None
        rows = stack.rows[: 2 * self.angles].double()
        spectrum = torch.complex(rows[: self.angles], -rows[self.angles :])
        residues = torch.fft.irfft(spectrum, n=MOST, dim=0)
        return Stack(window[0], residues.roll(-(window[0] % MOST), 0))
