"""Formatting of numbers, shared by every table and caption; and Student's t quantiles."""

from __future__ import annotations

import functools
import math


def short(value: float | None, digits: int = 3) -> str:
    """Format a number with ``digits`` significant digits: 0.0412, 1.2e-07, nan, or - for None.

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


@functools.lru_cache(maxsize=4096)
def student_quantile(probability: float, freedom: int) -> float:
    """Upper quantile of Student's t distribution with ``freedom`` degrees of freedom.

    Bisection on the closed form for integer degrees of freedom (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4),
    in the angle theta with tan(theta) = t / sqrt(freedom). SciPy is slow to import. ``probability`` must be
    above 1/2.

    Example:
        >>> round(student_quantile(0.975, 9), 4)
        2.2622
    """
    odd = freedom % 2

    def within(theta: float) -> float:
        """Probability of the interval from -t to t."""
        term = total = math.cos(theta) if odd else 1.0
        for k in range(2 + odd, freedom - 1, 2):
            term *= (k - 1) / k * math.cos(theta) ** 2
            total += term
        series = math.sin(theta) * total if freedom > 1 else 0.0
        return (theta + series) * 2 / math.pi if odd else series

    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if within(middle) < 2 * probability - 1 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def times(value: float) -> str:
    """Format a ratio: ``4.2x``, ``1,099x``.

    Example:
        >>> times(4.18), times(1098.9)
        ('4.2x', '1,099x')
    """
    return f"{value:,.0f}x" if value >= 100 else f"{value:.2g}x"
