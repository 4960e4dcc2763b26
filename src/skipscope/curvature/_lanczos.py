"""Block Lanczos with a float64 basis, full re-orthogonalisation and thick restart.

Re-orthogonalisation is repeated where once is not enough. Nothing here is about networks.

Notation: ``A [n, n]`` is symmetric and known only by products. The *basis* ``V [m, n]`` has orthonormal rows;
``Q [b, n]`` is the next block, orthonormal and orthogonal to ``V``. They obey

    A V' = V' H + Q' T',   H = V A V' [m, m],   T = Q A V' [b, m]

so a Ritz pair ``H s = theta s`` has the residual ``|A V's - theta V's| = |T s|``, and an eigenvalue of A is
within that distance of theta (Parlett, *The Symmetric Eigenvalue Problem*, theorem 4.5.1). Because ``H`` is
measured in full, not assumed tridiagonal, a restart from Ritz vectors (Wu & Simon 2000) needs no other
formulas than the first steps do, and what should vanish in a symmetric matrix but does not measures the
rounding error of the products as they come.
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
_BREAKDOWN = 1e-12  # a remainder this small against the matrix is rounding: the space is invariant
_KEPT = 0.5  # what is left of an image, against all of it, where one orthogonalisation has lost nothing
_EPS = float(np.finfo(float).eps)
_COLUMNS = 1 << 15  # of the basis that are combined at once
_SAFETY = 4.0  # on the estimate of the products' rounding error


@dataclass
class Step:
    """One block taken in, for the certificate: its products on the basis, and the step to the next block.

    Attributes:
        measured: ``V A Q'`` ``[m, b]`` with Q already the last rows of V.
        onward: ``[b', b]``: A's image of Q outside the basis, in the next block. No rows: the space is
            invariant.
        dropped: the norm of what was cut off as rounding.
    """

    measured: np.ndarray
    onward: np.ndarray
    dropped: float

    @functools.cached_property
    def backward(self) -> tuple[np.ndarray, np.ndarray]:
        """Inverse of ``onward`` from the right ``[b, b']``, and the directions it loses ``[b, b - b']``."""
        kept, width = self.onward.shape
        if kept == width:
            return np.linalg.inv(self.onward), np.zeros((width, 0))
        return np.linalg.pinv(self.onward), np.linalg.svd(self.onward)[2][kept:].T if kept else np.eye(width)


@dataclass
class Restart:
    """A basis replaced by Ritz vectors: ``kept [m, p]`` holds their coordinates."""

    kept: np.ndarray


@dataclass
class Krylov:
    """The state of one run; :meth:`step` takes in one block.

    Attributes:
        product: ``A`` on a block of rows.
        size: n.
        room: rows the basis may have.
        draw: gives a random block ``[b, n]``, for the start and after a breakdown.
        rows: storage: the basis, and the next block behind it.
        outside: orthonormal rows ``[p, N]`` that the run stays orthogonal to, so that n = N - p.
        precision: relative rounding error of the products, where it is known beforehand.
        history: what happened, for the certificate; ends at the first invariant space.
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
        self.coupling = np.zeros((0, 0))  # V A Q', as expected by symmetry, [m, b]
        self.leak = np.zeros((self.outside.shape[0], 0))  # what A V' has outside, cut off: [p, m]
        self._lost, self._lost_count, self._dropped = 0.0, 0, 0.0
        self._ritz: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def start(self, block: Tensor) -> None:
        """Begin (again) with ``block [b, n]``, made orthogonal to the basis and to itself."""
        self.width = len(self._orthonormal(block, floor=0.0, sure=False)[0])
        self.coupling = np.zeros((self.filled, self.width))

    @property
    def exhausted(self) -> bool:
        """The basis spans the whole space."""
        return self.width == 0

    def step(self) -> None:
        """Take the next block into the basis: as many products as it has rows."""
        m, b = self.filled, self.width
        image = self.product(self.rows[m : m + b])
        self.products, self._ritz = self.products + b, None
        self.scale = max(self.scale, float(torch.linalg.vector_norm(image, dim=1).max()))
        columns = self._take_out(image)
        self._note_rounding(columns[:m] - self.coupling)
        grown = np.zeros((m + b, m + b))
        grown[:m, :m] = self.projected
        grown[:m, m:], grown[m:, :m] = self.coupling, self.coupling.T
        grown[m:, m:] = (columns[m:] + columns[m:].T) / 2
        self.projected, self.filled = grown, m + b
        self._next_block(image, columns)

    def _take_out(self, image: Tensor) -> np.ndarray:
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
        if not self.width and m < self.size:  # invariant: anything else needs a new start
            self.invariant = True
            self.start(self.draw(min(b, self.size - m)))

    def _orthonormal(self, block: Tensor, floor: float, *, sure: bool) -> tuple[np.ndarray, float]:
        """Write orthonormal rows for ``block`` behind the basis; the block is overwritten.

        Returns its coordinates in these rows, and the norm of what was cut off: what is below ``floor``.
        Where the block is ``sure`` to be orthogonal to the basis, only a row of which its own block takes
        much away is not any more.
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
        """Upper estimate of the error of one product, from asymmetry, dropped remainders and precision."""
        seen = (self._lost / self._lost_count * self.size) ** 0.5 if self._lost_count else 0.0
        return _SAFETY * float(seen) + self._dropped + 16 * max(self.precision, _EPS) * self.scale

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ritz values ascending ``[m]``, their coordinates ``[m, m]`` and residual bounds ``[m]``."""
        if self._ritz is None:
            # Not NumPy's eigh: with several threads it is 100 times slower for matrices of this size.
            values, coordinates = (t.numpy() for t in torch.linalg.eigh(torch.from_numpy(self.projected)))
            remainder = np.vstack([self.leak @ coordinates, self.coupling.T @ coordinates])
            self._ritz = values, coordinates, np.linalg.norm(remainder, axis=0) + self.noise
        return self._ritz

    def vectors(self, coordinates: np.ndarray) -> Tensor:
        """Ritz vectors ``[p, n]`` from coordinates ``[m, p]``; overwrites the basis and so ends the run."""
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
        for i in range(self.width):  # forward, row by row: fewer rows are kept than there were
            self.rows[len(chosen) + i] = ahead[i]
        self.filled = len(chosen)
        self.projected = np.diag(values[chosen])
        self.coupling, self.leak, self._ritz = kept.T @ self.coupling, self.leak @ kept, None
        if not self.invariant:
            self.history.append(Restart(kept))


def own_generator(seed: int) -> torch.Generator:
    """Generator whose stream is not that of ``torch.manual_seed(seed)``, from which users draw data."""
    state = np.random.SeedSequence([seed, *b"skipscope curvature"]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


def gaussian_blocks(size: int, seed: int, device: torch.device | str = "cpu") -> Draw:
    """A source of random blocks ``[b, n]`` that leaves the global generators alone."""
    generator = own_generator(seed)
    return lambda rows: torch.randn(rows, size, generator=generator, dtype=torch.float64).to(device)
