"""Builders of escaped markup: a layer may have any name, even ``<script>``."""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup, escape

# Characters that XML forbids even when escaped, and those that change the text direction.
_UNWRITABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]"
)


# SVG elements that are written without an end tag if empty.
_SHAPES = {"path", "line", "rect", "circle"}
_POWER = re.compile(r"\b10\^(-?\d+)\b")
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_LOWERED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "−0123456789")
_EXPONENT = re.compile("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+")


def clean(text: Any) -> str:
    """Replace control characters and characters that change the text direction."""
    return _UNWRITABLE.sub("\N{REPLACEMENT CHARACTER}", str(text))


def raised(text: str) -> str:
    """Write powers of ten with superscript characters.

    Example:
        >>> raised("one part in 10^17")
        'one part in 10¹⁷'
    """
    return _POWER.sub(lambda found: "10" + found[1].translate(_RAISED), text)


def raised_markup(text: str) -> Markup:
    """Write powers of ten with ``<sup>``, for a page.

    The characters ¹, ² and ³ often come from another font than ⁰ and ⁴ to ⁹.

    Example:
        >>> raised_markup("one part in 10^17")
        Markup('one part in 10<sup>17</sup>')
    """
    return Markup(
        _POWER.sub(lambda found: f"10<sup>{found[1].replace('-', '−')}</sup>", str(escape(clean(text))))
    )


def _drawn(text: str) -> str:
    """Escape text for an SVG, with exponents as small raised digits of the same font."""
    parts, at = [], 0
    for found in _EXPONENT.finditer(text):
        lowered, rest = found[0].translate(_LOWERED), text[found.end() :]
        parts += [
            escape(text[at : found.start()]),
            f'<tspan dy="-.5em" font-size="75%">{lowered}</tspan>',
            # The next character returns to the baseline.
            f'<tspan dy=".375em">{escape(rest[0])}</tspan>' if rest else "",
        ]
        at = found.end() + bool(rest)
    return "".join(map(str, [*parts, escape(text[at:])]))


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """Build an element with attributes and children; children that are not markup are escaped.

    In attribute names a trailing underscore is dropped (``class_``), and other underscores become hyphens
    (``stroke_width``).

    Example:
        >>> tag("text", "a < b", x=1.25, text_anchor="end")
        Markup('<text x="1.2" text-anchor="end">a &lt; b</text>')
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_value(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = "".join(
        child
        if isinstance(child, Markup)
        else _drawn(clean(child))
        if name == "text"
        else str(escape(clean(child)))
        for child in children
        if child is not None
    )
    if not inside and name in _SHAPES:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{inside}</{name}>")


def join(*parts: Any) -> Markup:
    """Concatenate markup; parts that are not markup are escaped."""
    return Markup("").join(part if isinstance(part, Markup) else clean(part) for part in parts)


def _value(value: Any) -> str:
    # A tenth of a pixel is precise enough, and keeps pages small.
    if isinstance(value, float):
        return f"{value:.1f}".removesuffix(".0")
    return clean(value)


def ellipsis(text: str, most: int, *, keep: str = "end") -> str:
    """Shorten text to ``most`` characters, by default keeping its end, which identifies a dotted name.

    Example:
        >>> ellipsis("model.encoder.layers.11.attention", 20)
        '…layers.11.attention'
    """
    if len(text) <= most:
        return text
    return "…" + text[-(most - 1) :] if keep == "end" else text[: most - 1] + "…"
