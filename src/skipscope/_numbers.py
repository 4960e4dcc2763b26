"""How numbers are written for people: one place, so that every table and caption agrees."""

from __future__ import annotations

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


def student_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t distribution with ``freedom`` degrees of freedom.

    Example:
        >>> round(student_quantile(0.975, 9), 4)
        2.2622
    """
    from scipy.special import stdtrit  # scipy.stats takes seconds to import

    return float(stdtrit(freedom, probability))


def times(value: float) -> str:
    """A ratio for people: ``4.2x``, ``1,099x``.

    Example:
        >>> times(4.18), times(1098.9)
        ('4.2x', '1,099x')
    """
    return f"{value:,.0f}x" if value >= 100 else f"{value:.2g}x"
