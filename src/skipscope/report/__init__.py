"""Rendering of results: figures, notebook fragments, network drawings and HTML pages.

The core calls this package through four functions (see ``_result.py``): :func:`plot`, :func:`save`,
:func:`fragment` and :func:`draw`. A result is described once, as a
:class:`~skipscope.report._charts.Document`, and has two renderers: SVG for pages, matplotlib for figures.
"""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipscope._errors import SkipscopeError
from skipscope._files import write_whole
from skipscope._result import Result
from skipscope._validation import require_option
from skipscope.report import _arcs, _arcs_text, _page
from skipscope.report._charts import Chart, Lines, Surfaces
from skipscope.report._document import document as document
from skipscope.report._figure_style import style as style
from skipscope.report._figure_style import with_options
from skipscope.report._live import LIVE_PAGE as LIVE_PAGE
from skipscope.report._live import live_page as live_page
from skipscope.report._side_by_side import SideBySide as SideBySide
from skipscope.report._side_by_side import side_by_side as side_by_side

if TYPE_CHECKING:
    from skipscope.flow import GradientSplit
    from skipscope.shortcuts import Shortcuts


def plot(
    result: Result,
    ax: Any = None,
    *,
    chart: int | None = None,
    figsize: tuple[float, float] | None = None,
    title: str | None = None,
    notes: bool | None = None,
    legend: bool | None = None,
    limits: tuple[float, float] | Sequence[Result] | None = None,
    **options: Any,
) -> Any:
    """Draw a result with matplotlib, with the arguments of :meth:`skipscope.Result.plot`."""
    # Imported lazily: matplotlib is slow to import, and a page needs little of it.
    import matplotlib
    import numpy as np

    from skipscope.report import _comparison_picture, _matplotlib
    from skipscope.report import _matplotlib_maps as _matplotlib_maps

    if ax is not None and figsize is not None:
        raise SkipscopeError(
            "plot",
            "figsize= is of a new figure, and axes were given",
            expected="one of the two",
            cure="ax.figure.set_size_inches(width, height)",
        )
    drawn = None if _is_comparison(result) and chart is None and ax is None else _chart(result, chart)
    ends = _limits(result, drawn, chart, limits)
    with (
        with_options(figsize=figsize, notes=notes, legend=legend, limits=ends) as look,
        matplotlib.rc_context(look.rc),
    ):
        try:
            axes = (
                _comparison_picture.comparison_picture(result)  # type: ignore[arg-type]
                if drawn is None
                else _matplotlib.draw(drawn, ax=ax, **options)
            )
        except TypeError as error:
            if "unexpected keyword" not in str(error):
                raise
            raise SkipscopeError(
                "plot",
                f"a {type(result).__name__} is not drawn with these options",
                got=", ".join(options),
                expected=(
                    "figsize, title, notes, legend, limits, chart; label for lines; kind for surfaces; most"
                    " for bars"
                ),
            ) from error
        if title is not None:
            several = isinstance(axes, np.ndarray)
            put = axes[0].get_figure(root=True).suptitle if several else axes.set_title
            put(_matplotlib.plain(title))
    return axes


def _is_comparison(result: Any) -> bool:
    return isinstance(result, _class("comparison", "Comparison"))


def _chart(result: Result, number: int | None) -> Chart:
    charts = [chart for panel in document(result).panels for chart in panel.charts]
    # The default chart is the gradient flow of a comparison, and the first chart of any other result.
    if number is None:
        lines = (i for i, chart in enumerate(charts) if isinstance(chart, Lines))
        number = next(lines, 0) if _is_comparison(result) else 0
    if not -len(charts) <= number < len(charts):
        raise SkipscopeError(
            "plot",
            f"a {type(result).__name__} has no chart{f' number {number}' if charts else ''}",
            got=f"chart={number}",
            expected=f"0 to {len(charts) - 1}" if charts else "a result with a chart",
            cure=None if charts else "print(result) shows its table; save('x.html') makes a page of it",
        )
    return charts[number]


def _limits(
    result: Result, chart: Chart | None, number: int | None, limits: Any
) -> tuple[float, float] | None:
    """Ends of the scale: as given, or common to a surface and the surfaces in ``limits``."""
    from skipscope.report import _surface_charts

    if limits is None:
        return None
    if isinstance(limits, Result):
        limits = [limits]
    others = [_chart(other, number) for other in limits if isinstance(other, Result)]
    if others and len(others) == len(limits) and all(isinstance(c, Surfaces) for c in [chart, *others]):
        together = [surface for c in [chart, *others] for surface in c.surfaces]  # type: ignore[union-attr]
        scale = _surface_charts.heights(dataclasses.replace(chart, surfaces=together))  # type: ignore[type-var]
        return scale.low, scale.high
    try:
        low, high = map(float, limits)
        if low < high:
            return low, high
    except (TypeError, ValueError):
        pass
    raise SkipscopeError(
        "plot",
        "limits= cannot be used",
        expected="(low, high), or other results with a surface each",
        got=repr(limits)[:120],
    )


def save(result: Result, path: str | os.PathLike[str], **options: Any) -> Path:
    """Save a result as a page (``.html``) or a picture (``.png``, ``.svg``, ``.pdf``), atomically.

    A surface, or twins' surfaces, with a trajectory on the plane can also be an animation (``.gif``).

    Args:
        result: any result.
        path: output path; its ending determines the format.
        options: as for :func:`plot`; ``dpi=`` for a PNG.

    Raises:
        SkipscopeError: the ending is not supported, the result cannot be drawn in this format, or the path
            cannot be written.
    """
    path = Path(path)
    ending = path.suffix.lower().removeprefix(".")
    if ending == "html":
        live = LIVE_PAGE if path.with_name(LIVE_PAGE).exists() else None
        return write_whole(path, _page.page(result, document(result), path.name, live))
    surfaces = (_class("surfaces", name) for name in ("Surface", "PairedSurfaces"))
    if ending == "gif" and isinstance(result, tuple(surfaces)):
        from skipscope.report._animation import gif

        return write_whole(path, gif(result, **options))  # type: ignore[arg-type]
    if ending not in {"png", "svg", "pdf"}:
        raise SkipscopeError(
            "save",
            f"a {type(result).__name__} is not saved as .{ending}",
            got=path.name,
            expected=".json, .html, .png, .svg or .pdf",
        )
    return write_whole(path, _picture(result, ending, **options))


def _class(package: str, name: str) -> Any:
    """A class of a package, without importing the package: drawing a result must not load all packages.

    Returns a class without instances if the package has not been imported.
    """
    module = sys.modules.get(f"skipscope.{package}")
    return getattr(module, name) if module is not None else type(name, (), {})


def _picture(result: Result, ending: str, *, dpi: int = 160, **options: Any) -> bytes:
    import matplotlib
    import numpy as np

    # Without dates and random ids the same result gives the same file.
    undated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[ending]
    buffer = io.BytesIO()
    with (
        with_options(to_file=True),
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "skipscope", "pdf.fonttype": 42}),
    ):
        figure = np.ravel(plot(result, **options))[0].get_figure(root=True)
        figure.savefig(buffer, format=ending, dpi=dpi, metadata=undated)
    return buffer.getvalue()


def fragment(result: Result) -> str:
    """Render a result as an HTML fragment for a notebook: its answer, first chart and table."""
    return _page.fragment(document(result))


class Drawing(str):
    """Drawing of a network: text in a terminal, a picture in a notebook."""

    html: str = ""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return self.html


def draw(
    found: Shortcuts,
    form: str = "text",
    *,
    width: int | None = None,
    shares: Mapping[str, float | None] | GradientSplit | None = None,
    ascii: bool = False,
) -> str:
    """Draw a network as a line of layers with its shortcuts as arcs.

    Args:
        found: result of ``find_shortcuts``.
        form: ``"text"`` for a terminal (a notebook shows it as a picture), ``"svg"`` for a standalone file,
            ``"html"`` for a fragment of a page.
        width: columns of text (default: the terminal's) or pixels of the SVG (default 720).
        shares: shortcut's name -> share of the gradient that it carries, drawn as thickness; or a
            ``GradientSplit``.
        ascii: draw text with ASCII characters only.

    Raises:
        SkipscopeError: the form is unknown.
    """
    from skipscope.report import _view_shortcuts

    known: Any = shares
    if isinstance(shares, _class("flow", "GradientSplit")):
        known = {split.name: split.share for split in known}
    require_option("draw", "form", form, ("text", "svg", "html"))
    chart = _view_shortcuts.drawing(found, known)
    if form == "text":
        drawing = Drawing(_arcs_text.text(chart, width or shutil.get_terminal_size().columns, ascii=ascii))
        drawing.html = _page.piece(_page.svg(chart))
        return drawing
    if form == "svg":
        return _page.alone(_arcs.network(chart, width or 720))
    return _page.piece(_page.svg(chart))
