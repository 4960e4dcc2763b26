"""Style of matplotlib figures: named styles, and the options of a single picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from skipscope._validation import require_option

StyleName = Literal["default", "paper"]
Limits = tuple[float, float]


@dataclass(frozen=True)
class FigureStyle:
    """Style of a picture.

    Attributes:
        rc: matplotlib's settings.
        width: width of a new figure in inches, with proportional height; None: the chart's own.
        notes: whether to draw sentences beside the axes.
        legend: whether to draw legends and colour bars.
        figsize: size of a new figure in inches.
        limits: ends of the colour scale, or of the y axis of lines.
        to_file: whether new figures bypass pyplot and open no window.
    """

    rc: dict[Any, Any] = field(default_factory=dict)
    width: float | None = None
    notes: bool = True
    legend: bool = True
    figsize: tuple[float, float] | None = None
    limits: Limits | None = None
    to_file: bool = False


_STYLES: dict[str, FigureStyle] = {
    "default": FigureStyle(),
    "paper": FigureStyle(
        {
            "font.family": "serif",
            "font.serif": ["Times New Roman", "Nimbus Roman", "STIXGeneral", "DejaVu Serif"],
            "mathtext.fontset": "stix",
            "font.size": 8,
            "axes.labelsize": 8,
            "axes.titlesize": 8,
            "legend.fontsize": 7,
            "xtick.labelsize": 7,
            "ytick.labelsize": 7,
            "axes.linewidth": 0.6,
            "pdf.fonttype": 42,
            "svg.fonttype": "none",
        },
        width=3.3,
        notes=False,
    ),
}

_named = _STYLES["default"]
_override: ContextVar[FigureStyle | None] = ContextVar("_override", default=None)


class style:
    """Set the style of all later pictures or, as a context manager, of the pictures inside.

    Local.

    Args:
        name: "paper" is for a column of a paper: 3.3 inches wide, a serif font of 7 and 8 points that stays
            text in a PDF, no sentences beside the axes (``plot(notes=True)`` still draws them). "default"
            is the usual style.

    Raises:
        SkipscopeError: the style is unknown.

    Example:
        >>> import skipscope as ss
        >>> with ss.style("paper"):
        ...     pass  # result.save("figure.pdf")
    """

    def __init__(self, name: StyleName = "default"):
        global _named
        require_option("style", "style", name, get_args(StyleName))
        self._before, _named = _named, _STYLES[name]

    def __enter__(self) -> style:
        return self

    def __exit__(self, *error: object) -> None:
        global _named
        _named = self._before


def current() -> FigureStyle:
    """Style of the current picture."""
    return _override.get() or _named


@contextmanager
def with_options(**options: Any) -> Iterator[FigureStyle]:
    """Context that overrides options of the style; an option that is None is unchanged."""
    chosen = replace(current(), **{name: value for name, value in options.items() if value is not None})
    token = _override.set(chosen)
    try:
        yield chosen
    finally:
        _override.reset(token)
