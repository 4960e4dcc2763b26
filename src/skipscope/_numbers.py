"""How numbers are written for people: one place, so that every table and caption agrees."""

from __future__ import annotations

import functools
import math


def short(value: float | None, digits: int = 3) -> str:
    """A number in as few characters as it can be read from: 0.0412, 1.2e-07, nan, -.

    Example:
        >>> short(0.04123), short(1.234e-7), short(float("nan")), short(None)
        ('0.0412', '1.23e-07', 'nan', '-')
    """
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if math.isnan(value) or math.isinf(value):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))) if value else 0)}f}"


def times(value: float) -> str:
    """A ratio for people: ``4.2x``, ``1,099x``.

    Example:
        >>> times(4.18), times(1098.9)
        ('4.2x', '1,099x')
    """
    return f"{value:,.0f}x" if value >= 100 else f"{value:.2g}x"


@functools.lru_cache(maxsize=4096)
def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t with a whole number of degrees of freedom, to 1e-12.

    By the finite sum for its distribution function and Newton's method in the angle; from 300 degrees on by the
    Cornish-Fisher expansion. (Abramowitz and Stegun 26.7.3, 26.7.4, 26.7.5; scipy.stats takes a second to import.)

    Example:
        >>> round(student_quantile(1), 9), round(student_quantile(10), 9)
        (12.706204736, 2.228138852)
    """
    z = 1.959963984540054
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    if freedom >= 300:
        return z + sum(term / freedom**k for k, term in enumerate(terms, 1))
    density = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) * 2 / math.sqrt(math.pi)
    angle = math.atan(2.0 / math.sqrt(freedom))
    for _ in range(30):
        sine, cosine = math.sin(angle), math.cos(angle)
        term = sine if freedom % 2 == 0 else sine * cosine
        within = 0.0 if freedom == 1 else term
        for k in range(2 + freedom % 2, freedom - 1, 2):
            term *= (k - 1) / k * cosine * cosine
            within += term
        if freedom % 2:
            within = 2 / math.pi * (angle + within)
        angle += (0.95 - within) / (density * cosine ** (freedom - 1))
        angle = min(max(angle, 1e-9), math.pi / 2 - 1e-9)
    return math.sqrt(freedom) * math.tan(angle)
