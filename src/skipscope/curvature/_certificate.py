"""How surely a Lanczos run has seen the end of the spectrum: a bound that holds for every symmetric matrix.

A small residual says that *an* eigenvalue is near, not that it is the last one: the start vectors may have next to
nothing in the direction of another. How little they must have is known. Let ``A u = mu u`` and let ``c = u'Q_0 [b]`` be
the coordinates of ``u`` in the random start block. The recurrence of the run gives its coordinates in every later basis
vector, ``u'V = c P(mu)`` with ``P [b, m]`` known polynomials (the Lanczos polynomials, divided by what they are
normalised with), and as the rows of V are orthonormal, ``|c P(mu)| <= 1``. So

    |c|^2 <= 1 / sigma_min(P(mu))^2

(for b = 1 the right side is the Christoffel function of the run). The left side is Beta(b/2, (n - b)/2) for a
uniformly random start, whatever A is. Hence the chance that an eigenvalue at mu, or farther out, has stayed unseen is at
most that distribution's value at the right side; it holds at every step at once, so stopping when it is small is fair.
"""

from __future__ import annotations

import numpy as np
from scipy.special import betainc

from skipscope.curvature._lanczos import Krylov, Restart, Step


def chance_unseen(run: Krylov, mu: float, block: int) -> float:
    """At most this is the chance, over the random start, that an eigenvalue at ``mu`` left no more trace than was seen.

    Args:
        run: a run begun from ``block`` random vectors.
        mu: a place outside the run's Ritz values.
        block: how many start vectors there were.
    """
    if run.exhausted and not run.invariant:
        return 0.0  # the basis is the whole space
    if block >= run.size:
        return 0.0
    seen, log_scale = _coordinates(run.history, mu, block, floor=max(run.noise, 1e-300))
    weakest = np.linalg.svd(seen, compute_uv=False)
    # What an SVD cannot tell from zero must count as zero.
    weakest = max(weakest[-1] - 8 * np.finfo(float).eps * weakest[0], 0.0)
    if weakest == 0.0:
        return 1.0
    largest_share = np.exp(min(-2 * (np.log(weakest) + log_scale), 0.0))
    return float(betainc(block / 2, (run.size - block) / 2, largest_share))


def _coordinates(
    history: list[Step | Restart], mu: float, block: int, floor: float
) -> tuple[np.ndarray, float]:
    """``P(mu) [b, m]`` of the module's text, and the logarithm of the factor taken out against overflow."""
    known, log_scale = np.eye(block), 0.0
    for event in history:
        if isinstance(event, Restart):
            # The next block stands behind the basis and stays.
            split = event.kept.shape[0]
            known = np.hstack([known[:, :split] @ event.kept, known[:, split:]])
            continue
        width = event.measured.shape[1]
        beyond = mu * known[:, -width:] - known @ event.measured
        # In an invariant space an unseen direction's remainder would have shown, had it been above the rounding.
        invariant = not event.onward.shape[0]
        ahead = beyond / max(event.dropped, floor) if invariant else beyond @ np.linalg.pinv(event.onward)
        known = np.hstack([known, ahead])
        size = np.abs(known).max()
        if size > 1e100:
            known, log_scale = known / size, log_scale + np.log(size)
    return known, log_scale
