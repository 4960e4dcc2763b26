"""What a caller may ask for: whole and finite numbers, and parameters by name or pattern."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

from skipscope._errors import SkipscopeError


def is_integer(value: Any, least: float = 1, most: float = math.inf) -> bool:
    """A whole number of any library's, in a range; True and False are none.

    Example:
        >>> is_integer(3), is_integer(3.0), is_integer(True), is_integer(0), is_integer(0, least=0)
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


def names_matching(names: Sequence[str], patterns: str | Iterable[str], operation: str) -> set[str]:
    """Those of ``names`` that are named, or that match a pattern such as ``"layer1.*"``.

    Args:
        names: of a model's parameters.
        patterns: one or several.
        operation: named in the error.

    Raises:
        SkipscopeError: a pattern matches nothing.

    Example:
        >>> sorted(names_matching(["a.weight", "a.bias", "b.weight"], ["a.*"], "landscape"))
        ['a.bias', 'a.weight']
    """
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise SkipscopeError(
                operation, f"no parameter is called {pattern!r}",
                expected=", ".join(names[:8]) + (", ..." if len(names) > 8 else ""),
                cure='names as in model.named_parameters(), or patterns such as "layer1.*"',
            )  # fmt: skip
        found.update(matching)
    return found
