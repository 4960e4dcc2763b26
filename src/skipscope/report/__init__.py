"""Everything that is drawn: pictures, notebook fragments, the network with its arcs, and the page.

The ground knows this room by four functions (see ``_result.py``): :func:`plot`, :func:`save`, :func:`fragment` and
:func:`draw`. A result is told once, as a :class:`~skipscope.report._charts.Story`, and drawn by two hands: SVG for
pages, matplotlib for figures.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from skipscope._errors import SkipscopeError
from skipscope._files import write_whole
from skipscope._result import Result
from skipscope.report import _arcs, _arcs_text, _page
from skipscope.report import _view_comparison as _view_comparison
from skipscope.report import _view_curvature as _view_curvature
from skipscope.report import _view_flow as _view_flow
from skipscope.report import _view_monitor as _view_monitor
from skipscope.report import _view_shortcuts as _view_shortcuts
from skipscope.report import _view_surfaces as _view_surfaces
from skipscope.report._story import story as story


def plot(result: Result, ax: Any = None, *, chart: int = 0, **options: Any) -> Any:
    """Draw a result with matplotlib.

    Args:
        result: any result.
        ax: axes to draw into; several results drawn into the same axes get styles of their own.
        chart: which of its charts, the first by default.
        options: ``label=`` for lines, ``kind="3d"`` for surfaces, ``most=`` for bars.

    Returns:
        The axes (an array of them where there are several surfaces and no ``ax``).

    Raises:
        SkipscopeError: the result has no such chart.
    """
    from skipscope.report._matplotlib import draw as by_matplotlib

    charts = [chart for panel in story(result).panels for chart in panel.charts]
    if not -len(charts) <= chart < len(charts):
        raise SkipscopeError(
            "plot", f"a {type(result).__name__} has no chart number {chart}", expected=f"0 to {len(charts) - 1}" if charts else "a result with a chart",
            got=chart, cure=None if charts else "print(result) shows its table; save('x.html') makes a page of it",
        )  # fmt: skip
    return by_matplotlib(charts[chart], ax=ax, **options)


def save(result: Result, path: str | os.PathLike[str], **options: Any) -> Path:
    """Write a result as a page (``.html``) or as a picture (``.png``, ``.svg``, ``.pdf``), whole or not at all.

    Args:
        result: any result.
        path: where to; the ending says how.
        options: as for :func:`plot`; ``dpi=`` for a PNG.

    Raises:
        SkipscopeError: the ending is none of these, the result cannot be drawn so, or the place cannot be written.
    """
    path = Path(path)
    ending = path.suffix.lower().removeprefix(".")
    if ending == "html":
        return write_whole(path, _page.page(result, story(result), path.name))
    if ending not in {"png", "svg", "pdf"}:
        raise SkipscopeError(
            "save",
            f"a {type(result).__name__} is not saved as .{ending}",
            expected=".json, .html, .png, .svg or .pdf",
            got=path.name,
        )
    return write_whole(path, _picture(result, ending, **options))


def _picture(result: Result, ending: str, *, dpi: int = 160, **options: Any) -> bytes:
    import matplotlib
    import numpy as np

    from skipscope.report._matplotlib import hidden

    buffer = io.BytesIO()
    # No dates and no random names inside: the same result gives the same file
    with (
        hidden(),
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "skipscope", "pdf.fonttype": 42}),
    ):
        figure = np.ravel(plot(result, **options))[0].figure
        figure.savefig(
            buffer,
            format=ending,
            dpi=dpi,
            metadata={"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[ending],
        )
    return buffer.getvalue()


def fragment(result: Result) -> str:
    """A result as a piece of HTML for a notebook: its answer, its first chart, its numbers."""
    return _page.fragment(story(result))


def draw(
    found: Any, form: str = "text", *, width: int | None = None, shares: Any = None, ascii: bool = False
) -> str:
    """The network as a line of layers with its shortcuts as arcs.

    Args:
        found: what ``find_shortcuts`` returned.
        form: ``"text"`` for a terminal, ``"svg"`` for a file of its own, ``"html"`` for a page's fragment.
        width: columns of text (default: the terminal's) or pixels of the SVG (default 720).
        shares: shortcut's name -> the share of gradient that it carries, drawn as thickness; or a ``GradientSplit``.
        ascii: draw text without signs beyond ASCII.

    Raises:
        SkipscopeError: an unknown form.
    """
    import shutil

    if shares is not None and not isinstance(shares, dict):
        shares = {s.name: s.share for s in shares}
    chart = _view_shortcuts.drawing(found, shares)
    if form == "text":
        return _arcs_text.text(chart, width or shutil.get_terminal_size().columns, ascii=ascii)
    if form == "svg":
        return _page.alone(_arcs.network(chart, width or 720))
    if form == "html":
        return _page.piece(_page.svg(chart))
    raise SkipscopeError("draw", f"unknown form {form!r}", expected='"text", "svg" or "html"', got=form)
