"""Block Lanczos with a float64 basis, full re-orthogonalisation and thick restart.

Re-orthogonalisation is repeated where once is not enough. This module knows nothing about networks.

Notation: ``A [n, n]`` is symmetric and known only by products. The *basis* ``V [m, n]`` has orthonormal rows;
``Q [b, n]`` is the next block, orthonormal and orthogonal to ``V``. They obey

    A V' = V' H + Q' T',   H = V A V' [m, m],   T = Q A V' [b, m]

so a Ritz pair ``H s = theta s`` has the residual ``|A V's - theta V's| = |T s|``, and an eigenvalue of A is
within that distance of theta (Parlett, *The Symmetric Eigenvalue Problem*, theorem 4.5.1). Because ``H`` is
measured in full, not assumed tridiagonal, a restart from Ritz vectors (Wu & Simon 2000) uses the same
formulas as the first steps. Entries that should vanish for a symmetric matrix, but do not, measure the
rounding error of the products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]  # [b, n] float64 -> [b, n] float64
Draw = Callable[[int], Tensor]  # b -> a random block [b, n]
# A remainder this small relative to the matrix is rounding: the space is invariant.
_BREAKDOWN = 1e-12
# If at least this share of a vector's norm is left, one orthogonalisation was enough.
_KEPT = 0.5
_EPS = float(np.finfo(float).eps)
# Columns of the basis that are combined at once.
_COLUMNS = 1 << 15
# Safety factor on the estimate of the products' rounding error.
_SAFETY = 4.0


@dataclass
class Step:
    """One Lanczos step, recorded for the certificate.

    Attributes:
        measured: ``V A Q'`` ``[m, b]``, with Q already the last rows of V.
        onward: coordinates ``[b', b]`` of A Q in the next block. No rows if the space is invariant.
        dropped: norm of the remainder that was cut off as rounding.
    """

    measured: np.ndarray
    onward: np.ndarray
    dropped: float

    @functools.cached_property
    def backward(self) -> tuple[np.ndarray, np.ndarray]:
        """Right inverse of ``onward`` ``[b, b']``, and its null space ``[b, b - b']``."""
        kept, width = self.onward.shape
        if kept == width:
            return np.linalg.inv(self.onward), np.zeros((width, 0))
        return np.linalg.pinv(self.onward), np.linalg.svd(self.onward)[2][kept:].T if kept else np.eye(width)


@dataclass
class Restart:
    """Thick restart, recorded for the certificate: ``kept [m, p]`` are the Ritz vectors' coordinates."""

    kept: np.ndarray


@dataclass
class Krylov:
    """State of one Lanczos run; :meth:`step` adds one block to the basis.

    Attributes:
        product: multiplies ``A`` with a block of rows.
        size: dimension n of the searched space.
        room: maximal number of rows of the basis.
        draw: draws a random block ``[b, n]``, for the start and after a breakdown.
        rows: storage for the basis, followed by the next block.
        outside: orthonormal rows ``[p, N]`` that the run stays orthogonal to, so that n = N - p.
        precision: relative rounding error of the products, if known.
        history: steps and restarts up to the first invariant space, for the certificate.
    """

    product: Product
    size: int
    room: int
    draw: Draw
    rows: Tensor
    outside: Tensor
    precision: float = _EPS
    filled: int = 0
    width: int = 0
    products: int = 0
    scale: float = 0.0
    asymmetry: float = 0.0
    invariant: bool = False
    history: list[Step | Restart] = field(default_factory=list)

    def __post_init__(self):
        self.projected = np.zeros((0, 0))
        # V A Q' [m, b], as symmetry predicts it.
        self.coupling = np.zeros((0, 0))
        # The part of A V' in the excluded space [p, m], which is projected out.
        self.leak = np.zeros((self.outside.shape[0], 0))
        self._lost, self._lost_count, self._dropped = 0.0, 0, 0.0
        self._ritz: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def start(self, block: Tensor) -> None:
        """Start or restart from ``block [b, n]``, orthonormalised and made orthogonal to the basis."""
        self.width = len(self._orthonormal(block, floor=0.0, sure=False)[0])
        self.coupling = np.zeros((self.filled, self.width))

    @property
    def exhausted(self) -> bool:
        """Whether the basis spans the whole space."""
        return self.width == 0

    def step(self) -> None:
        """Add the next block to the basis, at the cost of one product per row."""
        m, b = self.filled, self.width
        image = self.product(self.rows[m : m + b])
        self.products, self._ritz = self.products + b, None
        self.scale = max(self.scale, float(torch.linalg.vector_norm(image, dim=1).max()))
        columns = self._orthogonalise(image)
        self._note_rounding(columns[:m] - self.coupling)
        grown = np.zeros((m + b, m + b))
        grown[:m, :m] = self.projected
        grown[:m, m:], grown[m:, :m] = self.coupling, self.coupling.T
        grown[m:, m:] = (columns[m:] + columns[m:].T) / 2
        self.projected, self.filled = grown, m + b
        self._next_block(image, columns)

    def _orthogonalise(self, image: Tensor) -> np.ndarray:
        """Orthogonalise ``image [b, n]`` in place against the basis, the next block and the outside rows.

        Returns the removed coordinates in the basis ``[m + b, b]``. Twice is enough (Giraud, Langou &
        Rozloznik 2005), and once where most of the image is left (Daniel, Gragg, Kaufman & Stewart 1976).
        """
        space, outside = self.rows[: self.filled + self.width], self.outside
        self.leak = np.hstack([self.leak, (outside @ image.T).cpu().numpy()])
        coordinates = None
        for _ in range(2):
            before = torch.linalg.vector_norm(image, dim=1)
            if outside.shape[0]:
                image.addmm_(image @ outside.T, outside, alpha=-1)
            part = space @ image.T
            image.addmm_(part.T, space, alpha=-1)
            coordinates = part if coordinates is None else coordinates + part
            if bool((torch.linalg.vector_norm(image, dim=1) >= _KEPT * before).all()):
                break
        assert coordinates is not None
        return coordinates.cpu().numpy()

    def _next_block(self, image: Tensor, measured: np.ndarray) -> None:
        m, b = self.filled, image.shape[0]
        onward, dropped = self._orthonormal(image, _BREAKDOWN * self.scale, sure=True)
        self._dropped = max(self._dropped, dropped)
        if not self.invariant:
            self.history.append(Step(measured, onward, dropped))
        self.width = len(onward)
        self.coupling = np.zeros((m, self.width))
        self.coupling[m - b :] = onward.T
        # The space is invariant: the rest of the spectrum needs a new start.
        if not self.width and m < self.size:
            self.invariant = True
            self.start(self.draw(min(b, self.size - m)))

    def _orthonormal(self, block: Tensor, floor: float, *, sure: bool) -> tuple[np.ndarray, float]:
        """Orthonormalise ``block``, in place, and append the rows after the basis.

        If the block is ``sure`` to be orthogonal to the basis, a row is orthogonalised against the basis
        again only if the other rows of the block cancel most of it.

        Returns:
            The block's coordinates in the new rows, and the largest norm among dropped rows. A row is dropped
            if its norm is at most ``floor``, or if the basis already spans the space.
        """
        m, kept, room = self.filled, 0, self.size - self.filled
        onward, dropped = np.zeros((min(block.shape[0], room), block.shape[0])), 0.0
        for i, row in enumerate(block):
            whole = float(torch.linalg.vector_norm(row))
            for j, other in enumerate(self.rows[m : m + kept]):
                inner = float(other @ row)
                onward[j, i] += inner
                row.add_(other, alpha=-inner)
            norm = float(torch.linalg.vector_norm(row)) if kept else whole
            if norm <= floor or norm == 0.0 or kept == room:
                dropped = max(dropped, norm)
                continue
            row.div_(norm)
            if not sure or norm < _KEPT * whole:
                for others in (self.outside, self.rows[: m + kept]) * 2:
                    row.addmv_(others.T, others @ row, alpha=-1)
                row.div_(torch.linalg.vector_norm(row))
            onward[kept, i] = norm
            self.rows[m + kept] = row
            kept += 1
        return onward[:kept], dropped

    def _note_rounding(self, difference: np.ndarray) -> None:
        if difference.size:
            self.asymmetry = max(self.asymmetry, float(np.abs(difference).max()))
            self._lost += float((difference**2).sum())
            self._lost_count += difference.size

    @property
    def noise(self) -> float:
        """Upper estimate of one product's error, from asymmetry, dropped remainders and precision."""
        seen = (self._lost / self._lost_count * self.size) ** 0.5 if self._lost_count else 0.0
        return _SAFETY * float(seen) + self._dropped + 16 * max(self.precision, _EPS) * self.scale

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ritz values ``[m]``, ascending, coordinates of their vectors ``[m, m]``, error bounds ``[m]``."""
        if self._ritz is None:
            # Not NumPy's eigh: with several threads it is 100 times slower for matrices of this size.
            values, coordinates = (t.numpy() for t in torch.linalg.eigh(torch.from_numpy(self.projected)))
            remainder = np.vstack([self.leak @ coordinates, self.coupling.T @ coordinates])
            self._ritz = values, coordinates, np.linalg.norm(remainder, axis=0) + self.noise
        return self._ritz

    def vectors(self, coordinates: np.ndarray) -> Tensor:
        """Ritz vectors ``[p, n]`` from coordinates ``[m, p]``. Overwrites the basis, which ends the run."""
        self._combine(coordinates)
        return self.rows[: coordinates.shape[1]].clone()

    def _combine(self, coordinates: np.ndarray) -> None:
        """Replace the first rows of the basis by Ritz vectors, a few columns at a time to save memory."""
        mix = torch.from_numpy(coordinates.T.copy()).to(self.rows)
        for start in range(0, self.rows.shape[1], _COLUMNS):
            part = self.rows[:, start : start + _COLUMNS]
            part[: mix.shape[0]] = mix @ part[: self.filled]

    def restart(self, chosen: np.ndarray) -> None:
        """Keep only the Ritz vectors ``chosen`` (indices into :meth:`ritz`) and the next block."""
        values, coordinates, _ = self.ritz()
        kept = coordinates[:, chosen]
        ahead = self.rows[self.filled : self.filled + self.width]
        self._combine(kept)
        # Source and target may overlap; copying forward is safe, because the basis has shrunk.
        for i in range(self.width):
            self.rows[len(chosen) + i] = ahead[i]
        self.filled = len(chosen)
        self.projected = np.diag(values[chosen])
        self.coupling, self.leak, self._ritz = kept.T @ self.coupling, self.leak @ kept, None
        if not self.invariant:
            self.history.append(Restart(kept))


def own_generator(seed: int) -> torch.Generator:
    """Generator with another stream than ``torch.manual_seed(seed)``, which users draw their data from."""
    state = np.random.SeedSequence([seed, *b"skipscope curvature"]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


def gaussian_blocks(size: int, seed: int, device: torch.device | str = "cpu") -> Draw:
    """Function that draws random blocks ``[b, n]`` without touching the global generators."""
    generator = own_generator(seed)
    return lambda rows: torch.randn(rows, size, generator=generator, dtype=torch.float64).to(device)
