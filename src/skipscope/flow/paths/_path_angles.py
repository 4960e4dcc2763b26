"""Estimate of the path spectrum of very deep networks with a bounded number of gradients.

With G(z) = sum_k z^k G_k, and each branch operand multiplying by z = exp(i t), a discrete Fourier transform
of the gradients at M angles t = 2 pi j / M gives the sums over all lengths that are equal modulo M. Lengths
fill a band around their mean (about sqrt(L) wide for a chain of L equal blocks). If the band is narrower than
M, these sums are the G_k themselves; the band is located at <G, sum_k k G_k> / |G|^2. Real gradients need
half of the angles. Three more gradients are carried along: G and its moments sum_k k G_k and sum_k k^2 G_k.
Lengths outside of the window are aliased by M, so that the moments of the aliased lengths differ by M and by
M^2. This difference shows the error, as do the ends of the window, where a band that is too wide has not
decayed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from skipscope.flow.paths._segments import LengthGradients, PathLengthBackward

MAX_LENGTHS = (
    256  # the most branches of which every length is carried; beyond, the number of lengths resolved
)


class PathAngleBackward(PathLengthBackward):
    """Backward pass that carries gradients at angles, G and its two moments instead of lengths."""

    angles = MAX_LENGTHS // 2 + 1

    def start(self, seed: Tensor) -> LengthGradients:
        """Start with G(z) = 1 at every angle, G = 1, and moments 0."""
        rows = seed.new_zeros(2 * self.angles + 3, *seed.shape)
        rows[: self.angles], rows[-3] = seed, seed
        return LengthGradients(0, rows)

    def shift_length(self, gradients: LengthGradients) -> LengthGradients:
        """Multiply by z at every angle: lengths k become k + 1, and the moments follow."""
        a, rows = self.angles, gradients.rows
        t = (2 * math.pi / MAX_LENGTHS * torch.arange(a, dtype=torch.float64)).to(rows.device)
        shape = (a,) + (1,) * (rows.ndim - 1)
        cos, sin = t.cos().to(rows.dtype).view(shape), t.sin().to(rows.dtype).view(shape)
        real, imaginary = rows[:a], rows[a : 2 * a]
        whole, first, second = rows[-3:-2], rows[-2:-1], rows[-1:]
        turned = [cos * real - sin * imaginary, sin * real + cos * imaginary]
        return LengthGradients(0, torch.cat([*turned, whole, first + whole, second + 2 * first + whole]))

    def window(self, gradients: LengthGradients | None, branches: int) -> tuple[int, int] | None:
        """The first length that is resolved, and the number of resolved lengths; None without gradients."""
        if gradients is None:
            return None
        whole, first = gradients.rows[-3].double().flatten(), gradients.rows[-2].double().flatten()
        square = float(whole @ whole)
        middle = float(whole @ first) / square if square else 0.0
        middle = middle if math.isfinite(middle) else 0.0
        return max(0, min(round(middle) - MAX_LENGTHS // 2, branches + 1 - MAX_LENGTHS)), MAX_LENGTHS

    def lengths(
        self, gradients: LengthGradients | None, window: tuple[int, int] | None
    ) -> LengthGradients | None:
        """Transform angles to the lengths of the window."""
        if gradients is None or window is None:
            return None
        rows = gradients.rows[: 2 * self.angles].double()
        spectrum = torch.complex(rows[: self.angles], -rows[self.angles :])
        residues = torch.fft.irfft(spectrum, n=MAX_LENGTHS, dim=0)
        return LengthGradients(window[0], residues.roll(-(window[0] % MAX_LENGTHS), 0))

    def folded(self, gradients: LengthGradients, lengths: LengthGradients) -> float:
        """Estimate the norm of the gradient outside of the window from the error of its moments."""
        middle = lengths.low + MAX_LENGTHS // 2
        j = torch.arange(
            lengths.low - middle, lengths.high - middle + 1, dtype=torch.float64, device=lengths.rows.device
        )
        whole, first, second = (row.double() for row in gradients.rows[-3:])
        right = first - middle * whole, second - 2 * middle * first + middle**2 * whole
        off = [
            (torch.tensordot(j**p, lengths.rows, 1) - right[p - 1]).norm() / MAX_LENGTHS**p for p in (1, 2)
        ]
        return float(max(off))
