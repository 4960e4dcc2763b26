"""The k smallest and k largest eigenvalues of a symmetric matrix, from matrix-vector products alone.

The first run starts from a random block. A block of b vectors cannot show more than b copies of a multiple
eigenvalue, so for k > 1 further runs follow in the orthogonal complement of the eigenvectors found, until a
run shows that nothing there lies beyond the k-th. By Weyl's theorem the matrix's eigenvalues, counted with
multiplicity, then lie within the residuals of the computed ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from skipscope._progress import track
from skipscope.curvature._certificate import chance_unseen
from skipscope.curvature._lanczos import Draw, Krylov, Product, gaussian_blocks
from skipscope.curvature._vector_memory import require_vectors

_BASIS_BYTES = 1 << 30
# Vectors that a product and an orthogonalisation hold in addition to the basis.
_BESIDE = 4
# Norm of the random part of a warm start, relative to the unit vectors it is added to.
_SHAKE = 2.0


@dataclass(frozen=True)
class SolverOptions:
    """Options of :func:`find_ends`.

    Attributes:
        k: eigenvalues at each end.
        tol: largest residual, relative to max |lambda|.
        confidence: required probability that no eigenvalue lies beyond the ends by more than ``margin``.
        block: start vectors of a run.
        basis: vectors kept before a thick restart; None: as many as 1 GiB holds, at most 300.
        max_products: matrix-vector products after which the solver stops, converged or not.
        seed: random seed of the start vectors.
        margin: relative to max |lambda|; None: the tolerance.
        precision: relative rounding error of the products, if known (float32: 1.2e-7).
        screening: weaker (confidence, margin), at which the ends are recorded on the way; for k = 1.
    """

    k: int = 1
    tol: float = 1e-3
    confidence: float = 0.99
    block: int = 1
    basis: int | None = None
    max_products: int = 1000
    seed: int = 0
    margin: float | None = None
    precision: float = 0.0
    screening: tuple[float, float] | None = None


@dataclass
class Ends:
    """Extreme eigenvalues found so far.

    Attributes:
        values: Ritz values ``[p]``.
        residuals: error bounds of the values ``[p]``.
        vectors: orthonormal Ritz vectors ``[p, n]``.
        miss_probability: upper bound on the probability that an eigenvalue farther out was missed.
        converged: whether residuals and probability meet the options.
        products: matrix-vector products spent.
        scale: max |lambda|.
        noise: estimated rounding error of the products.
        asymmetry: largest |u'Av - v'Au| seen.
        screened: both ends at the moment the screening was reached, or None.
    """

    values: np.ndarray
    residuals: np.ndarray
    vectors: Tensor
    miss_probability: float = 0.0
    converged: bool = False
    products: int = 0
    scale: float = 0.0
    noise: float = 0.0
    asymmetry: float = 0.0
    screened: np.ndarray | None = None

    def order(self, k: int) -> np.ndarray:
        """Indices of the k smallest, ascending, and of the k largest, descending ``[2, k]``."""
        k = min(k, len(self.values))
        ascending = np.argsort(self.values)
        return np.array([ascending[:k], ascending[::-1][:k]])


def find_ends(
    product: Product,
    size: int,
    options: SolverOptions,
    *,
    device: torch.device | str = "cpu",
    near: Tensor | None = None,
) -> Ends:
    """Compute both ends of the spectrum; see the module docstring.

    A warm start from eigenvectors of a similar matrix (``near``) needs fewer products for the same residuals.
    The probability stays a bound: the start keeps a random part, and adding a fixed vector to it cannot make
    a direction less likely to be seen (Anderson 1955). As the random part is smaller, the bound is weaker.

    Args:
        product: multiplies the matrix with rows ``[b, size]`` in float64.
        size: dimension n of the matrix.
        options: solver options.
        device: device of the vectors.
        near: approximate eigenvectors ``[p, size]`` of unit norm, for k = 1.
    """
    found = Ends(np.zeros(0), np.zeros(0), torch.zeros(0, size, dtype=torch.float64, device=device))
    draw, allowed = gaussian_blocks(size, options.seed, device), 1.0 - options.confidence
    while True:
        # The miss probabilities of all runs add up; halving keeps their sum below the allowed total.
        if options.k > 1:
            allowed /= 2
        run = _deflated(product, size, found.vectors, draw, options, near)
        search = _Search(run, found, options, allowed, near)
        complete = search.finish()
        found = search.harvest()
        if not complete or options.k == 1 or run.exhausted or not len(search.wanted):
            found.converged = complete
            return found


def _deflated(
    product: Product, size: int, known: Tensor, draw: Draw, options: SolverOptions, near: Tensor | None
) -> Krylov:
    """Start a run in the space orthogonal to the vectors ``known [p, n]``."""
    left = size - known.shape[0]
    block = min(options.block, left)
    room = min(_rows(size, options), left)
    rows = torch.empty(room + block, size, dtype=torch.float64, device=known.device)
    run = Krylov(product, left, room, draw, rows, known, options.precision)
    start = run.draw(block)
    if near is not None:
        start = near.sum(0, keepdim=True) + _SHAKE * start[:1] / start[:1].norm()
    run.start(start)
    return run


def _rows(size: int, options: SolverOptions) -> int:
    """Number of basis vectors."""
    few, usual = _minimal_basis(options), 4 * options.k + 4 * options.block + 20
    return max(few, options.basis or int(np.clip(_BASIS_BYTES / (8 * size), usual, 300)))


def _minimal_basis(options: SolverOptions) -> int:
    return 2 * options.k + 3 * options.block + 2


def require_memory(operation: str, size: int, options: SolverOptions, device: torch.device) -> None:
    """Print the memory that the basis needs, and refuse a basis that does not fit, before allocating it.

    Raises:
        SkipscopeError: the basis does not fit; the cure names the ``basis=`` that does.
    """

    def cure(fitting: int) -> str | None:
        if fitting < _minimal_basis(options):
            return None
        return f"basis={fitting}; it restarts more often, and needs more products"

    beside = _BESIDE + options.block + 2 * options.k
    require_vectors(operation, size, min(_rows(size, options), size), beside, device, cure)


def _joined(known: Tensor, found: Tensor) -> Tensor:
    return torch.cat([known, found]) if len(known) else found


@dataclass
class _Search:
    """One Lanczos run for the eigenvalues beyond those known, until all are found or shown to be absent.

    Attributes:
        run: the Lanczos run.
        known: results of earlier runs.
        options: solver options.
        allowed: largest allowed probability of missing an eigenvalue.
        near: vectors of the warm start, if any.
        wanted: indices of the Ritz values that belong to the result.
        miss_probability: upper bound on the probability that an eigenvalue farther out was missed.
        patience: steps until the next convergence check.
        last: (distance to the limit in decades, products) at the last check; assumed to fall linearly.
    """

    run: Krylov
    known: Ends
    options: SolverOptions
    allowed: float
    near: Tensor | None = None
    wanted: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    miss_probability: float = 1.0
    patience: int = 0
    last: tuple[float, int] = (np.inf, 0)
    screened: np.ndarray | None = None

    def finish(self) -> bool:
        """Run to convergence. Returns False if the products are spent or too inaccurate."""
        run, width = self.run, self.run.width
        for _ in track(self._steps(), "ends of the spectrum"):
            run.step()
            self.patience -= 1
            if self.patience < 0 or run.exhausted or run.invariant:
                converged = self._check(width)
                if converged is not None:
                    return converged
            if run.filled + run.width > run.room:
                run.restart(_worth_keeping(run.filled, self.options.k, width))
        return bool(self._check(width))

    def _steps(self) -> Iterator[int]:
        spent, step = self.known.products, 0
        most, k = self.options.max_products, self.options.k
        while spent + self.run.products + self.run.width <= most or self._count < k:
            yield (step := step + 1)

    @property
    def _count(self) -> int:
        """Number of eigenvalues available so far."""
        return len(self.known.values) + self.run.filled

    def _check(self, width: int) -> bool | None:
        run, options = self.run, self.options
        values, _, residuals = run.ritz()
        self.wanted = self._wanted(values)
        limit = options.tol * max(self.known.scale, abs(values[0]), abs(values[-1]))
        # The first run's errors add to those of later runs, so it must meet a tighter limit.
        share = 1 + options.k**0.5 if options.k > 1 and not len(self.known.values) else 1
        within = residuals[self.wanted] - run.noise <= limit / share
        if not run.exhausted:
            if self._count < options.k or not within.all():
                self._wait(float(residuals[self.wanted].max()), limit)
                return None
            if (
                options.screening
                and self.screened is None
                and self._unseen(values, width, options.screening[1]) <= 1 - options.screening[0]
            ):
                self.screened = values[[0, -1]]
            self.miss_probability = self._unseen(
                values, width, options.tol if options.margin is None else options.margin
            )
            if limit and self.miss_probability > self.allowed:
                self._wait(self.miss_probability, self.allowed)
                return None
        # If all Ritz values are zero, from a random start, the matrix is zero.
        if run.exhausted or not limit:
            self.miss_probability = 0.0
        return bool((residuals[self.wanted] <= limit).all())

    def _unseen(self, values: np.ndarray, width: int, margin: float) -> float:
        """Bound the probability of an eigenvalue beyond the known ends by ``margin`` of max |lambda|."""
        out = margin * max(self.known.scale, abs(values[0]), abs(values[-1]))
        low, high = self._thresholds(values)
        # The fixed part of a warm start dilutes the random part that the bound rests on.
        diluted = 1.0 if self.near is None else 1.0 + float(self.near.sum(0).norm()) / _SHAKE
        return min(chance_unseen(self.run, [low - out, high + out], width, diluted), 1.0)

    def _wait(self, size: float, limit: float) -> None:
        """Schedule the next convergence check after half of the estimated remaining steps.

        A check costs as much as many products of a small network. The estimate extrapolates the decay since
        the last check; half of it is taken because the decay may accelerate. A warm start converges within a
        few products and is checked at each.
        """
        if self.near is not None:
            return
        far = float(np.log10(size / limit)) if limit and size > 0 else 0.0
        before, at = self.last
        self.last = far, self.run.products
        steps = (self.run.products - at) / max(self.run.width, 1)
        missing = far * steps / (before - far) if far < before < np.inf else 10.0 if far > 2 else 4 * far
        self.patience = int(np.clip(missing / 2, 1, 10)) - 1

    def _thresholds(self, values: np.ndarray) -> tuple[float, float]:
        """Values beyond which no eigenvalue may lie: the k-th known, or this run's ends if farther out."""
        if not len(self.known.values):
            return values[0], values[-1]
        low, high = self.known.values[self.known.order(self.options.k)[:, -1]]
        return min(values[0], low), max(values[-1], high)

    def _wanted(self, values: np.ndarray) -> np.ndarray:
        """Indices of the Ritz values among the k outermost of an end, counting those already known."""
        k, count = self.options.k, len(values)
        if not len(self.known.values):
            return np.r_[:k, count - k : count] if count > 2 * k else np.arange(count)
        order = self.known.order(k)
        if order.shape[1] < k:
            return np.arange(count)
        margin = self.options.tol * self.known.scale
        low, high = self.known.values[order[:, -1]]
        return np.flatnonzero((values < low - margin) | (values > high + margin))

    def harvest(self) -> Ends:
        """Merge this run's results into the known ones."""
        run, known = self.run, self.known
        values, coordinates, residuals = run.ritz()
        return Ends(
            values=np.r_[known.values, values[self.wanted]],
            residuals=np.r_[known.residuals, residuals[self.wanted]],
            vectors=_joined(known.vectors, run.vectors(coordinates[:, self.wanted])),
            miss_probability=known.miss_probability + self.miss_probability,
            products=known.products + run.products,
            scale=max(known.scale, abs(values[0]), abs(values[-1])),
            noise=max(known.noise, run.noise),
            asymmetry=max(known.asymmetry, run.asymmetry),
            screened=self.screened,
        )


def _worth_keeping(filled: int, k: int, block: int) -> np.ndarray:
    """Indices kept at a thick restart: at each end the k wanted and about a fifth of the basis."""
    each = min(k + max(2 * block, filled // 5), (filled - block) // 2)
    return np.r_[0:each, filled - each : filled]
