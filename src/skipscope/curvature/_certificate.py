"""How surely a Lanczos run has seen the end of the spectrum: a bound that holds for every symmetric matrix.

A small residual says that *an* eigenvalue is near, not that it is the last one: the start vectors may have next to
nothing in the direction of another. How little they must have is known. Let ``A u = mu u`` and let ``c = u'Q_0 [b]`` be
the coordinates of ``u`` in the random start block. The recurrence of the run gives its coordinates in every later basis
vector, ``u'V = c P(mu)`` with ``P [b, m]`` known polynomials (the Lanczos polynomials, divided by what they are
normalised with), and as the rows of V are orthonormal, ``|c P(mu)| <= 1``. So

    |c|^2 <= 1 / sigma_min(P(mu))^2

(for b = 1 the right side is the Christoffel function of the run). The left side is Beta(b/2, (n - b)/2) for a
uniformly random start, whatever A is. Hence the chance that an eigenvalue at mu, or farther out, has stayed unseen is
at most that distribution's value at the right side; it holds at every step at once, so stopping when it is small is
fair.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import null_space
from scipy.special import betainc

from skipscope.curvature._lanczos import Krylov, Restart, Step


def chance_unseen(run: Krylov, mu: float, block: int) -> float:
    """At most this is the chance, over the random start, that an eigenvalue at ``mu`` left no more trace than was seen.

    Args:
        run: a run begun from ``block`` random vectors.
        mu: a place outside the run's Ritz values.
        block: how many start vectors there were.
    """
    if run.exhausted or block >= run.size:
        return 0.0  # the basis is the whole space
    seen, log_scale, constraints = _coordinates(run.history, mu, block, floor=max(run.noise, 1e-300))
    weakest = np.linalg.svd(seen, compute_uv=False)
    # What an SVD cannot tell from zero must count as zero.
    weakest = max(weakest[-1] - 8 * np.finfo(float).eps * weakest[0], 0.0)
    if weakest == 0.0:
        return 1.0
    largest_share = (1 + constraints) * np.exp(min(-2 * (np.log(weakest) + log_scale), 0.0))
    largest_share = min(largest_share, 1.0)
    return float(betainc(block / 2, (run.size - block) / 2, largest_share))


def _coordinates(
    history: list[Step | Restart], mu: float, block: int, floor: float
) -> tuple[np.ndarray, float, int]:
    """``P(mu)`` of the module's text, the logarithm of a factor taken out against overflow, and how many more columns.

    Where a direction of a block was dropped because its remainder was rounding, an eigenvector at ``mu`` must satisfy
    ``|c (mu P - P H)| <= that rounding``: a column more, whose product with c is at most 1 as well.
    """
    known, log_scale = np.eye(block), 0.0
    constraints = np.zeros((block, 0))
    for event in history:
        if isinstance(event, Restart):
            # The next block stands behind the basis and stays.
            split = event.kept.shape[0]
            known = np.hstack([known[:, :split] @ event.kept, known[:, split:]])
            continue
        width = event.measured.shape[1]
        beyond = mu * known[:, -width:] - known @ event.measured
        lost = null_space(event.onward) if event.onward.shape[0] else np.eye(width)
        constraints = np.hstack([constraints, beyond @ lost / max(event.dropped, floor)])
        known = np.hstack([known, beyond @ np.linalg.pinv(event.onward)])
        size = np.abs(known).max()
        if size > 1e100:
            known, constraints, log_scale = known / size, constraints / size, log_scale + np.log(size)
    return np.hstack([known, constraints]), log_scale, constraints.shape[1]
