"""Document of a result, built by the view of its class: a title, the answer, and a panel for each claim.

The views (`_view_*.py`) register themselves here. A package's views are imported when one of its results is
first drawn, so that a page on shortcuts does not load SciPy. A result without a view is shown as its table.
"""

from __future__ import annotations

import functools
import importlib

from skipscope._result import Result
from skipscope.report._charts import Document, Panel

_VIEWS = {
    "book": ("_view_book",),
    "comparison": ("_view_comparison", "_view_training"),
    "curvature": ("_view_curvature",),
    "flow": ("_view_flow", "_view_paths"),
    "monitor": ("_view_monitor",),
    "shortcuts": ("_view_shortcuts",),
    "surfaces": ("_view_surfaces", "_view_bands", "_view_curvature"),
}


def document(result: Result) -> Document:
    """Build the document of a result."""
    for kind in type(result).__mro__:
        _import_views(kind.__module__)
    return view(result)


@functools.cache
def _import_views(module: str) -> None:
    package, _, rest = module.partition(".")
    for name in _VIEWS.get(rest.partition(".")[0], ()) if package == "skipscope" else ():
        importlib.import_module(f"skipscope.report.{name}")


@functools.singledispatch
def view(result: Result) -> Document:
    """Document of a result; by default only its table. Views register theirs."""
    table = result.table()
    return Document(
        title=table.title, lead=type(result).__name__, panels=[Panel(heading="The numbers", tables=[table])]
    )
