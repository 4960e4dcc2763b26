"""The k smallest and k largest eigenvalues of a symmetric matrix, from matrix-vector products alone.

The first run starts anywhere. One vector (or block) cannot show how often an eigenvalue occurs, so for k > 1
further runs follow in the orthogonal complement of the eigenvectors found, until one shows that nothing there
is beyond the k-th. By Weyl's theorem the matrix's eigenvalues, each counted as often as it occurs, then lie
within the residuals of those found.
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
_BESIDE = 4  # vectors that a product and an orthogonalisation hold beside the basis
_SHAKE = 2.0  # the random part of a start near known vectors, against unit vectors


@dataclass(frozen=True)
class SolverOptions:
    """Options of :func:`find_ends`.

    Attributes:
        k: eigenvalues at each end.
        tol: largest residual, relative to max |lambda|.
        confidence: the probability that nothing is farther out.
        block: start vectors of a run.
        basis: vectors kept before a thick restart; None: as many as 1 GiB holds, at most 300.
        max_products: after these it stops, converged or not.
        seed: of the start vectors.
        margin: how much farther out is meant by that, relative to max |lambda|; None: the tolerance.
        precision: relative rounding error of the products, where it is known beforehand (float32: 1.2e-7).
        screening: a lesser (confidence, margin), at which the ends are noted in passing; for k = 1.
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
    """What was found.

    Attributes:
        values: of every vector found ``[p]``.
        residuals: their bounds ``[p]``.
        vectors: ``[p, n]``, orthonormal.
        miss_probability: at most this is the chance that something farther out was not seen.
        converged: residuals and probability are as asked.
        products: matrix-vector products spent.
        scale: max |lambda|.
        noise: the products' rounding error, estimated.
        asymmetry: the largest |u'Av - v'Au| seen.
        screened: both ends once the screening was reached, or None.
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
    """Both ends of the spectrum; see the module's text.

    A run may start near eigenvectors that were found close by (``near``): it then needs fewer products for
    the same residuals. The probability stays a bound, for the start has a random part and what is added to
    that cannot make a direction less likely to be seen (Anderson 1955); but as it is a part only, the bound
    is weaker.

    Args:
        product: the matrix times rows ``[b, size]``, float64.
        size: n.
        options: what is asked for.
        device: where the vectors live.
        near: guesses ``[p, size]``, unit rows, for k = 1.
    """
    found = Ends(np.zeros(0), np.zeros(0), torch.zeros(0, size, dtype=torch.float64, device=device))
    draw, allowed = gaussian_blocks(size, options.seed, device), 1.0 - options.confidence
    while True:
        if options.k > 1:  # all runs together may miss no more than was allowed
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
    """A run in the space orthogonal to the vectors ``known [p, n]``."""
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
    """Vectors of the basis."""
    few, usual = _fewest(options), 4 * options.k + 4 * options.block + 20
    return max(few, options.basis or int(np.clip(_BASIS_BYTES / (8 * size), usual, 300)))


def _fewest(options: SolverOptions) -> int:
    return 2 * options.k + 3 * options.block + 2


def require_memory(operation: str, size: int, options: SolverOptions, device: torch.device) -> None:
    """Print what the basis takes, and refuse one that does not fit into free memory, before it is taken.

    Raises:
        SkipscopeError: with the ``basis=`` that fits.
    """

    def cure(fitting: int) -> str | None:
        if fitting < _fewest(options):
            return None
        return f"basis={fitting}; it restarts more often, and needs more products"

    beside = _BESIDE + options.block + 2 * options.k
    require_vectors(operation, size, min(_rows(size, options), size), beside, device, cure)


def _joined(known: Tensor, found: Tensor) -> Tensor:
    return torch.cat([known, found]) if len(known) else found


@dataclass
class _Search:
    """One run, until it has found what there is beyond what is known, or shown that there is nothing.

    Attributes:
        run: the run.
        known: what earlier runs found.
        options: what is asked for.
        allowed: the largest probability of missing one.
        near: what the run started near, if anything.
        wanted: indices of this run's part of the answer.
        miss_probability: at most this is the chance that something farther out was not seen.
        patience: steps until the next look at what there is.
        last: what was looked at last (how far off in decades, at how many products); falling in a straight
            line.
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
        """Step until done (True) or until the products are spent or cannot do better (False)."""
        run, width = self.run, self.run.width
        for _ in track(self._steps(), "ends of the spectrum"):
            run.step()
            self.patience -= 1
            if self.patience < 0 or run.exhausted or run.invariant:
                done = self._judge(width)
                if done is not None:
                    return done
            if run.filled + run.width > run.room:
                run.restart(_worth_keeping(run.filled, self.options.k, width))
        return bool(self._judge(width))

    def _steps(self) -> Iterator[int]:
        spent, step = self.known.products, 0
        most, k = self.options.max_products, self.options.k
        while spent + self.run.products + self.run.width <= most or self._count < k:
            yield (step := step + 1)

    @property
    def _count(self) -> int:
        """How many eigenvalues there would be, at most k of which are asked for."""
        return len(self.known.values) + self.run.filled

    def _judge(self, width: int) -> bool | None:
        run, options = self.run, self.options
        values, _, residuals = run.ritz()
        self.wanted = self._wanted(values)
        limit = options.tol * max(self.known.scale, abs(values[0]), abs(values[-1]))
        # What these are off by is added to those of the runs that follow: leave room for it.
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
        if run.exhausted or not limit:  # what a random vector shows nothing of is the zero matrix
            self.miss_probability = 0.0
        return bool((residuals[self.wanted] <= limit).all())

    def _unseen(self, values: np.ndarray, width: int, margin: float) -> float:
        """Bound the probability of an eigenvalue beyond the known ends by ``margin`` of max |lambda|."""
        out = margin * max(self.known.scale, abs(values[0]), abs(values[-1]))
        low, high = self._thresholds(values)
        # A random part of this size in the start: the rest of it can only hide what it would have shown.
        diluted = 1.0 if self.near is None else 1.0 + float(self.near.sum(0).norm()) / _SHAKE
        return min(chance_unseen(self.run, [low - out, high + out], width, diluted), 1.0)

    def _wait(self, size: float, limit: float) -> None:
        """Schedule the next convergence check after half of the steps that are estimated to be missing.

        The estimate assumes that the size falls as it has since the last check. A check costs as much as many
        products of a small network; half, because the size may fall faster. A run that started near its end
        is done after a few products, and checks at each.
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
        """Beyond these nothing may be: the k-th known at each end, or this run's own ends if farther out."""
        if not len(self.known.values):
            return values[0], values[-1]
        low, high = self.known.values[self.known.order(self.options.k)[:, -1]]
        return min(values[0], low), max(values[-1], high)

    def _wanted(self, values: np.ndarray) -> np.ndarray:
        """Indices of the Ritz values that belong to the k outermost at an end, those known counted."""
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
        """Everything known after this run."""
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
    """Indices kept at a thick restart: the wanted ends, and as much beside them as leaves half the room."""
    each = min(k + max(2 * block, filled // 5), (filled - block) // 2)
    return np.r_[0:each, filled - each : filled]
