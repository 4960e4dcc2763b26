"""HTML renderer: a self-contained page, or a fragment for a notebook.

Text is escaped by jinja2, and charts by `_markup.py`. The content security policy in the page's head allows
only the page's own scripts, by their hashes, and no network access.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any, TypeGuard

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from skipscope._errors import SkipscopeError
from skipscope._numbers import short
from skipscope._result import Result, Table, dumps, packed
from skipscope._version import __version__
from skipscope.report import _arcs, _surface_charts, _svg_bars, _svg_heat, _svg_lines
from skipscope.report._charts import Bars, Chart, Document, Heat, Lines, Network, Panel, Surfaces
from skipscope.report._glossary import with_terms
from skipscope.report._markup import clean, raised_markup
from skipscope.report._svg import both

# Largest page in bytes, for browsers on phones and for mail attachments.
MOST = 8_000_000
# Rows of a table that are shown; the rest is in the page's data.
ROWS = 400


@functools.singledispatch
def svg(chart: Chart) -> Markup:
    """Render a chart as SVG, at both widths."""
    raise TypeError(type(chart).__name__)


svg.register(Lines, functools.partial(both, _svg_lines.lines))
svg.register(Bars, functools.partial(both, _svg_bars.bars))
svg.register(Heat, functools.partial(both, _svg_heat.heat))
svg.register(Surfaces, functools.partial(both, _surface_charts.contours))
svg.register(Network, functools.partial(both, _arcs.network))


def page(result: Result, document: Document, file: str = "report.html", live: str | None = None) -> str:
    """Render a result as a page.

    Args:
        result: embedded as data, so that the page can be loaded.
        document: content of the page.
        file: name of the page's file, for the line that says how to load it.
        live: address of the live page, or None.

    Raises:
        SkipscopeError: the page would be larger than :data:`MOST`, even without the data.
    """
    panels = [_panel(panel, f"s{i + 1}") for i, panel in enumerate(document.panels)]
    turning = any(_turns(chart) for panel in document.panels for chart in panel.charts)
    scripts = [*([asset("surface3d.js")] if turning else []), asset("page.js")]
    data = packed(dumps(result))
    content = {
        "document": document,
        "panels": panels,
        "contents": [p for p in panels if p["claim"]] if len(panels) > 3 else [],
        "facts": [(name, _cell(value)) for name, value in document.facts.items()],
        "file": file,
        "version": __version__,
        "live": live,
        "css": Markup(_without_space(asset("chart.css") + asset("page.css"))),
        "scripts": [Markup(script) for script in scripts],
        "policy": content_policy(scripts),
    }
    made = _environment().get_template("page").render(content, data=data)
    if len(made.encode()) > MOST:
        made = _environment().get_template("page").render(content, data=None)
    if len(made.encode()) > MOST:
        raise SkipscopeError(
            "save",
            f"the page would have {len(made.encode()) / 1e6:.1f} MB",
            expected=f"at most {MOST / 1e6:.0f} MB",
            cure='save(".json") for the data, and a page of a part of it',
        )
    return made


def fragment(document: Document) -> str:
    """Render the first panel as an HTML fragment for a notebook, with its style."""
    first = _panel(document.panels[0], "s1") if document.panels else None
    content = {"document": document, "panel": first, "css": Markup(asset("chart.css"))}
    return _environment().get_template("fragment").render(content)


def piece(drawing: Markup) -> str:
    """Wrap a drawing as an HTML fragment with its style."""
    css = Markup(asset("chart.css"))
    return str(Markup('<div class="skipscope fragment"><style>{}</style>{}</div>').format(css, drawing))


def alone(drawing: Markup) -> str:
    """Make a standalone SVG file of a drawing, with its style."""
    box = re.search(r'viewBox="0 0 (\S+) (\S+)"', drawing)
    assert box, "every drawing has a viewBox"
    css = re.sub(r"\.skipscope svg(?=[.\s])", "svg", asset("chart.css")).replace(".skipscope {", "svg {")
    start, _, rest = str(drawing).partition(">")
    size = f' width="{box[1]}" height="{box[2]}" style="background: var(--paper)">'
    return (
        start.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
        + size
        + f"<style>{css}</style>"
        + rest
    )


def _panel(panel: Panel, name: str) -> dict[str, Any]:
    return {
        "anchor": name,
        "heading": panel.heading,
        "finding": panel.finding,
        "claim": panel.claim,
        "verdict": panel.verdict,
        "mood": {
            "holds": "holds",
            "holds in part": "half",
            "half true": "half",
            "does not hold here": "fails",
        }.get(panel.verdict, ""),
        "limits": panel.limits,
        "why": panel.why,
        "caption": panel.caption,
        "figure": None if panel.chart is None else _figure(panel.chart, f"{name}-f"),
        "tables": [_table(t) for t in panel.tables],
        "parts": [_panel(part, f"{name}-{i + 1}") for i, part in enumerate(panel.parts)],
    }


def _figure(chart: Chart, name: str) -> dict[str, Any]:
    figure: dict[str, Any] = {"id": name, "svg": svg(chart), "scenes": [], "labels": None}
    if _turns(chart):
        figure |= {
            "scenes": chart.surfaces,
            "height": chart.height,
            "payload": _safe_json(json.dumps(_surface_charts.payload(chart))),
        }
    if isinstance(chart, Lines) and chart.frames:
        labels = json.dumps([clean(label) for label in chart.frames])
        figure |= {
            "labels": labels,
            "last": len(chart.frames) - 1,
            "frame": chart.frame,
            "slider": chart.slider,
        }
    return figure


def _turns(chart: Chart) -> TypeGuard[Surfaces]:
    """Whether a chart has a 3-D view; a difference reads better flat."""
    return isinstance(chart, Surfaces) and not chart.flat


def _table(table: Table) -> dict[str, Any]:
    numeric = [
        any(isinstance(row[i], int | float) for row in table.rows)
        and not any(isinstance(row[i], str) for row in table.rows)
        for i in range(len(table.columns))
    ]
    notes = list(table.notes)
    if len(table.rows) > ROWS:
        notes.append(f"{len(table.rows) - ROWS:,} more rows are in the data that this page carries.")
    rows = [[_cell(cell) for cell in row] for row in table.rows[:ROWS]]
    return {"title": table.title, "columns": table.columns, "numeric": numeric, "rows": rows, "notes": notes}


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    return (
        clean(value)
        if isinstance(value, str)
        else clean(short(value) if isinstance(value, int | float | None) else value)
    )


def _safe_json(text: str) -> Markup:
    """Escape ``<`` in JSON, so that nothing in it can end a script element or open a comment."""
    return Markup(text.replace("<", "\\u003c"))


def _without_space(css: str) -> str:
    """Strip comments and indentation from a style sheet."""
    return re.sub(r"\s*([{};,])\s*", r"\1", re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL))


def content_policy(scripts: Sequence[str]) -> str:
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def stress(sentence: str) -> Markup:
    """Set the numbers of a sentence in bold.

    Example:
        >>> stress("<It> falls 8.3 decades at layers.4")
        Markup('&lt;It&gt; falls <b>8.3 decades</b> at layers.4')
    """
    parts, at = [], 0
    for found in _NUMBER.finditer(sentence):
        parts += [
            escape(clean(sentence[at : found.start()])),
            Markup("<b>{}</b>").format(raised_markup(found[0])),
        ]
        at = found.end()
    return Markup("").join([*parts, escape(clean(sentence[at:]))])


_NUMBER = re.compile(
    r"(?<![\w.-])(?:> ?|< ?|≥ ?|≤ ?)?[-−+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?(?:\^-?\d+(?:\.\d+)?)?"
    r"(?:-fold\b| ?(?:x\b|%|decades?\b|steps?\b|times\b|branches\b|layers\b|boundaries\b))?(?![\w-])"
)


@functools.cache
def _environment() -> Environment:
    from jinja2 import FunctionLoader

    made = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
        loader=FunctionLoader(lambda name: asset(f"{name}.html")),
    )
    made.filters["stress"] = stress
    made.filters["terms"] = with_terms
    return made


def _finalize(value: Any) -> Any:
    return value if isinstance(value, Markup) else clean(value) if isinstance(value, str) else value


@functools.cache
def asset(name: str) -> str:
    return resources.files("skipscope.report").joinpath(name).read_text(encoding="utf-8")
