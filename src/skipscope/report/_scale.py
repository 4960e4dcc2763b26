"""Axes: positions of numbers, ticks and their labels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

# Larger numbers are clipped, because the arithmetic of ticks would overflow.
FAR = 1e300
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """Scale from numbers to positions.

    On a log axis, zero and negative numbers are drawn on the lower edge and infinity on the upper edge, each
    with its own tick, so that a dead gradient is visible.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    ticks: tuple[tuple[float, str], ...] = ()

    def __call__(self, value: float | None) -> float | None:
        """Position of a number. None for a missing number or NaN."""
        return None if value is None or math.isnan(value) else self.at(value)

    def at(self, value: float) -> float:
        """Position of a number that is not NaN."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        if self.log:
            value = -math.inf if value <= 0 else math.log10(value) if value < math.inf else math.inf
        part = (
            min(1.0, max(0.0, (value - low) / ((high - low) or 1.0)))
            if abs(value) != math.inf
            else float(value > 0)
        )
        return self.start + part * (self.end - self.start)


def axis(
    values: Iterable[float], start: float, end: float, *, log: bool = False, zero: bool = False, most: int = 6
) -> Axis:
    """Create an axis that contains ``values``, with about ``most`` ticks.

    Args:
        values: numbers to show.
        start: position of the low end.
        end: position of the high end.
        log: whether the scale is logarithmic.
        zero: whether a linear axis must contain zero.
        most: approximate number of ticks.
    """
    array = np.array([v for v in values if v is not None], dtype=float)
    finite = np.clip(array[np.isfinite(array)], -FAR, FAR)
    if log:
        return _log_axis(array, np.maximum(finite[finite > 0], 1 / FAR), start, end, most)
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-280):
        pad = abs(high) * 0.5 or 0.5
        low, high = low - pad, high + pad
    step = _nice((high - low) / max(1, most - 1))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], start, end, ticks=tuple((t, plain(t)) for t in ticks))


def whole_axis(low: float, high: float, start: float, end: float, most: int = 6) -> Axis:
    """Create a linear axis that ends exactly at the data, with integers or round numbers as ticks."""
    if high <= low:
        high = low + 1
    step = _nice((high - low) / max(1, most))
    # Counts have integer ticks: there is no boundary 2.5.
    if float(low).is_integer() and float(high).is_integer():
        step = max(1.0, math.ceil(step))
    ticks = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return Axis(low, high, start, end, ticks=tuple((t, plain(t)) for t in ticks))


def _log_axis(array: np.ndarray, positive: np.ndarray, start: float, end: float, most: int) -> Axis:
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (0.1, 1.0)
    if high / low < 1.05:
        low, high = low / 2, high * 2
    decades = math.log10(high) - math.log10(low)
    if decades > 1.6:
        bottom, top = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
        step = max(1, math.ceil((top - bottom) / most))
        ticks = [(10.0**e, power(e)) for e in range(bottom, top + 1) if e % step == 0 and -320 < e < 308]
        low, high = 10.0 ** max(bottom, -320), 10.0 ** min(top, 308)
    else:
        low, high = low / 10 ** (0.04 * decades), high * 10 ** (0.04 * decades)
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        grid = [
            m * 10.0**e
            for e in exponents
            for m in ((1, 2, 5) if decades > 0.5 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8))
        ]
        ticks = [(t, plain(t)) for t in grid if low <= t <= high]
        ticks = ticks[:: max(1, math.ceil(len(ticks) / most))]
        # A narrow range may contain none of these ticks.
        if not ticks:
            step = _nice((high - low) / 3)
            ticks = [(t, plain(t)) for t in (math.ceil(low / step) * step, math.floor(high / step) * step)]
            ticks = ticks[: 1 + (ticks[1][0] > ticks[0][0])]
    # Make room below for zero.
    if (array <= 0).any():
        low = max(low / 10 ** max(0.15 * decades, 0.5), 1e-320)
        ticks = [(0.0, "0"), *ticks]
    if np.isposinf(array).any():
        high = min(high * 10 ** max(0.15 * decades, 0.5), 1e308)
        ticks = [*ticks, (math.inf, "inf")]
    return Axis(low, high, start, end, log=True, ticks=tuple(ticks))


def _nice(step: float) -> float:
    scale = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= step * (1 - 1e-9))


def plain(value: float) -> str:
    """Format a tick's number without rounding noise.

    Example:
        >>> plain(0.25), plain(1500), plain(-2e-7), plain(1e-5), plain(0)
        ('0.25', '1,500', '−2·10⁻⁷', '10⁻⁵', '0')
    """
    if value == 0:
        return "0"
    if not 1e-4 < abs(value) < 1e6 and math.isfinite(value):
        digits, _, exponent = f"{abs(value):.2e}".partition("e")
        leading = f"{float(digits):g}"
        text = ("" if leading == "1" else f"{leading}·") + "10" + str(int(exponent)).translate(SUPERSCRIPTS)
        return "−" * (value < 0) + text
    return f"{round(value, 10):,.10g}".replace("-", "−")


def power(exponent: int) -> str:
    """Format a power of ten: 10⁻³, 0.1, 1, 10, 100."""
    return {0: "1", 1: "10", 2: "100", -1: "0.1"}.get(exponent) or "10" + str(exponent).translate(
        SUPERSCRIPTS
    )
