"""How surely a Lanczos run has seen the end of the spectrum: a bound that holds for every symmetric matrix.

A small residual says that *an* eigenvalue is near, not that it is the last one: the start vectors may have
next to nothing in the direction of another. How little they must have is known. Let ``A u = mu u`` and let
``c = u'Q_0 [b]`` be the coordinates of ``u`` in the random start block. The recurrence of the run gives its
coordinates in every later basis vector, ``u'V = c P(mu)`` with ``P [b, m]`` known polynomials (the Lanczos
polynomials, divided by what they are normalised with), and as the rows of V are orthonormal, ``|c P(mu)| <=
1``. So

    |c|^2 <= 1 / sigma_min(P(mu))^2

(for b = 1 the right side is the Christoffel function of the run). The left side is Beta(b/2, (n - b)/2) for a
uniformly random start, whatever A is. Hence the chance that an eigenvalue at mu, or farther out, has stayed
unseen is at most that distribution's value at the right side; it holds at every step at once, so stopping
when it is small is fair.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from skipscope.curvature._lanczos import Krylov, Restart, Step


def chance_unseen(run: Krylov, places: Sequence[float], block: int, diluted: float = 1.0) -> float:
    """Bound the probability, over random starts, that an eigenvalue at or beyond ``places`` is unseen.

    Args:
        run: a run begun from ``block`` random vectors.
        places: outside the run's Ritz values.
        block: how many start vectors there were.
        diluted: the start's length over that of its random part.
    """
    if run.exhausted or block >= run.size:
        return 0.0  # the basis is the whole space
    seen, log_scale, constraints = _coordinates(
        run.history, np.array(places), block, floor=max(run.noise, 1e-300)
    )
    sizes = np.linalg.svd(seen, compute_uv=False)
    # What an SVD cannot tell from zero must count as zero.
    weakest = np.maximum(sizes[:, -1] - 8 * np.finfo(float).eps * sizes[:, 0], 1e-300)
    shares = diluted**2 * (1 + constraints) * np.exp(np.minimum(-2 * (np.log(weakest) + log_scale), 0.0))
    from scipy.special import betainc

    return float(betainc(block / 2, (run.size - block) / 2, np.minimum(shares, 1.0)).sum())


def _coordinates(
    history: list[Step | Restart], places: np.ndarray, block: int, floor: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """``P`` of the module's docstring at each place, the log of its scale, and the number of added columns.

    Where a direction of a block was dropped because its remainder was rounding, an eigenvector at ``mu`` must
    satisfy ``|c (mu P - P H)| <= that rounding``. This is an added column, whose product with c is at most 1
    as well.
    """
    known = np.empty(
        (len(places), block, sum(e.onward.shape[0] for e in history if isinstance(e, Step)) + block)
    )
    known[:, :, :block], filled = np.eye(block), block
    log_scale, constraints = np.zeros(len(places)), np.empty((len(places), block, 0))
    for event in history:
        if isinstance(event, Restart):
            # The next block stands behind the basis and stays.
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
        if size.max() > 1e100:  # nearly the range of float64
            known, constraints = known / size[:, None, None], constraints / size[:, None, None]
            log_scale += np.log(size)
    return np.concatenate([known[:, :, :filled], constraints], axis=2), log_scale, constraints.shape[2]
