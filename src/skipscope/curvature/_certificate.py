"""Bound on the probability that a Lanczos run missed an end of the spectrum, for any symmetric matrix.

A small residual says that *an* eigenvalue is near, not that it is the outermost: the start vectors may be
nearly orthogonal to the eigenvector of another. How nearly they must be is known. Let ``A u = mu u`` and let
``c = u'Q_0 [b]`` be the coordinates of ``u`` in the random start block. The recurrence of the run gives its
coordinates in every later basis vector, ``u'V = c P(mu)`` with ``P [b, m]`` known polynomials (the Lanczos
polynomials, normalised), and as the rows of V are orthonormal, ``|c P(mu)| <= 1``. So

    |c|^2 <= 1 / sigma_min(P(mu))^2

(for b = 1 the right side is the Christoffel function of the run). The left side is Beta(b/2, (n - b)/2) for a
uniformly random start, for every A. Hence the probability that an eigenvalue at mu or beyond was missed is at
most that distribution's CDF at the right side. The bound holds at every step at once, so stopping as soon as
it is small does not bias it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from skipscope.curvature._lanczos import Krylov, Restart, Step


def chance_unseen(run: Krylov, places: Sequence[float], block: int, diluted: float = 1.0) -> float:
    """Bound the probability, over random starts, that an eigenvalue at or beyond ``places`` is unseen.

    Args:
        run: Lanczos run started from ``block`` random vectors.
        places: values outside the range of the run's Ritz values.
        block: number of start vectors.
        diluted: norm of the start vector over the norm of its random part.
    """
    if run.exhausted or block >= run.size:
        # The basis spans the whole space.
        return 0.0
    seen, log_scale, constraints = _coordinates(
        run.history, np.array(places), block, floor=max(run.noise, 1e-300)
    )
    sizes = np.linalg.svd(seen, compute_uv=False)
    # Singular values below the SVD's rounding error must count as zero.
    weakest = np.maximum(sizes[:, -1] - 8 * np.finfo(float).eps * sizes[:, 0], 1e-300)
    shares = diluted**2 * (1 + constraints) * np.exp(np.minimum(-2 * (np.log(weakest) + log_scale), 0.0))
    from scipy.special import betainc

    return float(betainc(block / 2, (run.size - block) / 2, np.minimum(shares, 1.0)).sum())


def _coordinates(
    history: list[Step | Restart], places: np.ndarray, block: int, floor: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """Evaluate the polynomials ``P`` of the module docstring at each place.

    If a direction of a block was dropped because its remainder was rounding, an eigenvector at ``mu`` must
    satisfy ``|c (mu P - P H)| <= that rounding``. This adds a column, whose product with c is at most 1 as
    well.

    Returns:
        P, the logarithm of the factor it was divided by, and the number of added columns.
    """
    known = np.empty(
        (len(places), block, sum(e.onward.shape[0] for e in history if isinstance(e, Step)) + block)
    )
    known[:, :, :block], filled = np.eye(block), block
    log_scale, constraints = np.zeros(len(places)), np.empty((len(places), block, 0))
    for event in history:
        if isinstance(event, Restart):
            # The next block follows the basis and is kept.
            split, kept = event.kept.shape
            ahead = known[:, :, split:filled].copy()
            known[:, :, :kept] = known[:, :, :split] @ event.kept
            filled = kept + ahead.shape[2]
            known[:, :, kept:filled] = ahead
            continue
        width = event.measured.shape[1]
        beyond = places[:, None, None] * known[:, :, filled - width : filled]
        beyond -= known[:, :, :filled] @ event.measured
        back, lost = event.backward
        if lost.shape[1]:
            constraints = np.concatenate([constraints, beyond @ lost / max(event.dropped, floor)], axis=2)
        found = beyond @ back
        known[:, :, filled : filled + back.shape[1]] = found
        filled += back.shape[1]
        size = np.abs(found).max(axis=(1, 2), initial=1.0)
        # Rescale before float64 overflows.
        if size.max() > 1e100:
            known, constraints = known / size[:, None, None], constraints / size[:, None, None]
            log_scale += np.log(size)
    return np.concatenate([known[:, :, :filled], constraints], axis=2), log_scale, constraints.shape[2]
