"""Validation of arguments: integers, finite numbers, options, and parameter names or patterns."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

from skipscope._errors import SkipscopeError


def is_integer(value: Any, least: float = 1, most: float = math.inf) -> bool:
    """Whether a value is an integer of any library in a range; bool does not count.

    Example:
        >>> is_integer(3), is_integer(3.0), is_integer(True), is_integer(0), is_integer(0, least=0)
        (True, False, False, False, True)
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most


def is_finite(value: Any) -> bool:
    """Whether a value is a finite real number of any library; bool does not count.

    Example:
        >>> is_finite(2), is_finite(0.5), is_finite(float("nan")), is_finite("2"), is_finite(True)
        (True, True, False, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def require_option(
    operation: str, what: str, value: Any, options: Iterable[str | None], more: str = ""
) -> None:
    """Refuse a value that is not among the options.

    Args:
        operation: public call, named in the error.
        what: name of the option, e.g. ``"engine"``.
        value: the value given.
        options: allowed values; None among them if the option may be omitted.
        more: description of other allowed values.

    Raises:
        SkipscopeError: ``value`` is not among them.

    Example:
        >>> require_option("ablate", "edit", "remove", ("remove", "detach"))
        >>> require_option("ablate", "edit", "detatch", ("remove", "detach"))
        Traceback (most recent call last):
        ...
        skipscope._errors.SkipscopeError: ablate: unknown edit 'detatch'
          expected: 'remove' or 'detach'
          cure:     did you mean 'detach'?
    """
    known = list(options)
    if (value is None or isinstance(value, str)) and value in known:
        return
    words = [word for word in known if word is not None]
    raise SkipscopeError(
        operation,
        f"unknown {what} {value!r:.60}",
        expected=_either([*map(repr, known), *([more] if more else [])]),
        cure=did_you_mean(str(value), words),
    )


def did_you_mean(asked: str, names: Sequence[str]) -> str | None:
    """Suggest the names most similar to ``asked``, or return None if no name is similar.

    Example:
        >>> did_you_mean("detatch", ["remove", "detach"])
        "did you mean 'detach'?"
    """
    near = difflib.get_close_matches(asked, names, n=3, cutoff=0.5)
    return "did you mean " + " or ".join(map(repr, near)) + "?" if near else None


def _either(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def names_matching(names: Sequence[str], patterns: str | Iterable[str], operation: str) -> set[str]:
    """Select the names that equal a pattern or match it, such as ``"layer1.*"``.

    Args:
        names: names of a model's parameters.
        patterns: a pattern or several.
        operation: public call, named in the error.

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
                operation,
                f"no parameter is called {pattern!r}",
                expected=", ".join(names[:8]) + (", ..." if len(names) > 8 else ""),
                cure='names as in model.named_parameters(), or patterns such as "layer1.*"',
            )
        found.update(matching)
    return found
