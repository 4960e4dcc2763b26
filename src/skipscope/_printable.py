"""Removal of control characters from text: in a name they could move the cursor or reverse the text."""

from __future__ import annotations

import re

# C0 and C1 control characters, marks that change the direction of text, and lone surrogates.
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Replace control characters, so that a name cannot move a terminal's cursor or end a comment.

    Example:
        >>> printable("layer" + chr(27) + "[31m")
        'layer�[31m'
    """
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def printable_lines(text: str) -> str:
    """Replace control characters as :func:`printable` does, but keep line breaks.

    Example:
        >>> print(printable_lines("one" + chr(7) + chr(10) + "two"))
        one�
        two
    """
    return "\n".join(map(printable, text.split("\n")))
