"""Colours, markers and dashes that are distinct with any colour vision, and in black and white.

Series have Okabe and Ito's colours, each with its own marker and dash. Heights have viridis, whose lightness
increases evenly.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np

LIGHT = ("#0067a5", "#c8500a", "#2c8a6b", "#7b4f9d", "#9a7b00", "#4a4a48", "#b0366f", "#1f9bb5")
DARK = ("#6bb8ee", "#f39a5b", "#5cc9a3", "#c3a1e3", "#dcc04d", "#b9b7b0", "#ee8fbb", "#74d3e6")
# Colours of the stripes for values that are not finite.
BROKEN = ("#b3123f", "#ffd9e2")
DASHES = ("", "6 4", "2 3", "9 3 2 3", "12 4", "4 2", "1 4", "8 2 2 2 2 2")
PLOT_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def _circle(x: float, y: float) -> str:
    # A single arc, which ends a twentieth of a pixel from its start, is half as long as two half circles.
    return f"M{x:.1f} {y - 3.2:.1f}a3.2 3.2 0 1 0 .05 0z"


def _square(x: float, y: float) -> str:
    return f"M{x - 3:.1f} {y - 3:.1f}h6v6h-6z"


def _up(x: float, y: float) -> str:
    return f"M{x - 3.7:.1f} {y + 3:.1f}h7.4l-3.7-6.4z"


def _diamond(x: float, y: float) -> str:
    return f"M{x - 3.8:.1f} {y:.1f}l3.8-3.8l3.8 3.8l-3.8 3.8z"


def _down(x: float, y: float) -> str:
    return f"M{x - 3.7:.1f} {y - 3:.1f}h7.4l-3.7 6.4z"


def _plus(x: float, y: float) -> str:
    return f"M{x - 3.5:.1f} {y - 1.1:.1f}h2.4v-2.4h2.2v2.4h2.4v2.2h-2.4v2.4h-2.2v-2.4h-2.4z"


def _bar(x: float, y: float) -> str:
    return f"M{x - 1.3:.1f} {y - 4:.1f}h2.6v8h-2.6z"


def _flat(x: float, y: float) -> str:
    return f"M{x - 4:.1f} {y - 1.3:.1f}h8v2.6h-8z"


MARKERS: tuple[Callable[[float, float], str], ...] = (
    _circle,
    _square,
    _up,
    _diamond,
    _down,
    _plus,
    _bar,
    _flat,
)


def viridis(count: int = 256) -> np.ndarray:
    """Viridis as ``[count, 3]`` bytes, from dark to light."""
    import matplotlib

    return (matplotlib.colormaps["viridis"](np.linspace(0, 1, count))[:, :3] * 255).round().astype(np.uint8)


def heat_png(values: np.ndarray, size: tuple[int, int] = (720, 460)) -> tuple[bytes, float, float]:
    """Render a positive matrix as a PNG on a log scale. Returns it and the range of the colours.

    Zero is grey, a value that is not finite (inf) is striped, an unknown value (NaN) is transparent.

    Args:
        values: ``[rows, columns]``; with more columns than pixels, each pixel shows the nearest column.
        size: width and height on the screen in pixels.
    """
    values = np.asarray(values, dtype=float)
    positive = np.isfinite(values) & (values > 0)
    low, high = (
        (float(values[positive].min()), float(values[positive].max())) if positive.any() else (0.1, 1.0)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        part = (np.log10(values) - np.log10(low)) / max(np.log10(high) - np.log10(low), 1e-12)
    # With fewer pixels than steps each pixel shows the nearest step.
    if part.shape[1] > size[0]:
        part, values = (
            a[:, np.linspace(0, a.shape[1] - 1, size[0]).round().astype(int)] for a in (part, values)
        )
    colours = viridis()[np.nan_to_num(part * 255, nan=0, posinf=255, neginf=0).clip(0, 255).astype(int)]
    pixels = np.concatenate([colours, np.full((*part.shape, 1), 255, np.uint8)], axis=2)
    pixels[values == 0] = (140, 140, 140, 255)
    pixels[np.isnan(values)] = (0, 0, 0, 0)
    if np.isinf(values).any():
        pixels = _striped(pixels, np.isinf(values), (size[0], max(size[1], len(values))))
    import matplotlib.image

    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, pixels, format="png")
    return buffer.getvalue(), low, high


def _striped(pixels: np.ndarray, where: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale the picture to the screen's pixels and stripe the values ``where`` is True."""
    row, column = np.indices(size[::-1])
    at = row * len(where) // size[1], column * where.shape[1] // size[0]
    return striped(pixels[at], where[at])


def striped(pixels: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Copy ``pixels`` with slanted stripes ``where`` is True, for values that are not finite."""
    row, column = np.indices(where.shape)
    pixels = pixels.copy()
    for number, colour in enumerate(BROKEN):
        pixels[where & ((row + column) // 4 % 2 == number)] = (*bytes.fromhex(colour[1:]), 255)
    return pixels
