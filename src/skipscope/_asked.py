"""What a caller may ask for in numbers: one place that says what a whole and what a finite number is."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def is_whole(value: Any, least: float = 1, most: float = math.inf) -> bool:
    """A whole number of any library's, in a range; True and False are none.

    Example:
        >>> is_whole(3), is_whole(3.0), is_whole(True), is_whole(0), is_whole(0, least=0)
        (True, False, False, False, True)
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most


def is_finite(value: Any) -> bool:
    """A number of any library's that is neither infinite nor NaN; True and False are none.

    Example:
        >>> is_finite(2), is_finite(0.5), is_finite(float("nan")), is_finite("2"), is_finite(True)
        (True, True, False, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
