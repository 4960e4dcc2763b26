"""How figures by matplotlib look: the styles by name, and the options of one picture."""

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
    """What decides how a picture looks, beside the chart.

    Attributes:
        rc: matplotlib's own settings.
        width: of a new figure in inches; None is each chart's own. The height follows.
        notes: sentences beside the axes are drawn.
        legend: legends and colour bars are drawn.
        figsize: of a new figure, in inches.
        limits: both ends of the scale of colours, or of the y axis of lines.
        to_file: new figures are no windows.
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
    """Choose how every later picture looks; as a context manager, every picture inside.

    Local.

    Args:
        name: "paper" is for a column of a paper: 3.3 inches wide, serif letters of 7 and 8 points that stay
            text in a PDF, no sentences beside the axes (``plot(notes=True)`` draws them all the same).
            "default" is the usual look.

    Raises:
        SkipscopeError: an unknown style.

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
    """The style of the picture that is being drawn."""
    return _override.get() or _named


@contextmanager
def with_options(**options: Any) -> Iterator[FigureStyle]:
    """Draw pictures inside with options of their own; what is None stays as it is."""
    chosen = replace(current(), **{name: value for name, value in options.items() if value is not None})
    token = _override.set(chosen)
    try:
        yield chosen
    finally:
        _override.reset(token)
