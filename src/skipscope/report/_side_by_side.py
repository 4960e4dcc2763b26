"""Results of one kind side by side: a common table, and charts that are overlaid or listed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skipscope._errors import SkipscopeError
from skipscope._result import Result, Table, dumps, loads
from skipscope.report._charts import Chart, Document, Lines, Panel
from skipscope.report._document import document, view


@dataclass(frozen=True)
class SideBySide(Result):
    """Results of one kind side by side.

    Attributes:
        names: name of each result.
        texts: each result in its saved form.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = ss.reference.deep_mlp(4, width=16, shortcut="identity"), ss.reference.digits(32)
        >>> loss = torch.nn.functional.cross_entropy
        >>> flow = ss.gradient_flow(model, data, loss)
        >>> plain = ss.gradient_flow(ss.ablate(model, inputs=data[0]), data, loss)
        >>> both = ss.side_by_side({"with": flow, "without": plain})
        >>> list(both.results)
        ['with', 'without']
    """

    names: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def results(self) -> dict[str, Result]:
        """Results by name."""
        return {name: loads(text, name) for name, text in zip(self.names, self.texts)}

    def table(self) -> Table:
        """Table with a row for each row name of any result, and only the columns that differ."""
        tables = {name: result.table() for name, result in self.results.items()}
        first = next(iter(tables.values()))
        by_row = {name: {str(row[0]): row for row in table.rows} for name, table in tables.items()}
        rows = list(dict.fromkeys(key for rows in by_row.values() for key in rows))

        def cells(column: int) -> list[list[Any]]:
            return [
                [by_row[name][row][column] if row in by_row[name] else None for name in tables]
                for row in rows
            ]

        differing = [
            i for i in range(1, len(first.columns)) if any(len(set(map(str, c))) > 1 for c in cells(i))
        ]
        heads = [f"{first.columns[i]}, {name}" for i in differing for name in tables]
        body = [[row, *(c for i in differing for c in cells(i)[k])] for k, row in enumerate(rows)]
        notes = [f"{name}: {table.title}" for name, table in tables.items()]
        if not differing:
            notes.append("They agree in every number of the table.")
        return Table("Side by side", [first.columns[0], *heads], body, notes)


def side_by_side(results: Mapping[str, Result]) -> SideBySide:
    """Put results of one kind side by side. Local.

    Args:
        results: name -> result; names that are paths are shortened to the parts in which they differ.

    Raises:
        SkipscopeError: fewer than two results, or results of different kinds.

    Example:
        >>> import torch, skipscope as ss
        >>> from skipscope import reference
        >>> x = torch.randn(2, 64)
        >>> make = lambda n: reference.deep_mlp(n, shortcut="identity")
        >>> deep = {f"{n} layers": ss.find_shortcuts(make(n), x) for n in (2, 3)}
        >>> side_by_side(deep).names
        ('2 layers', '3 layers')
    """
    kinds = {type(result).__name__ for result in results.values()}
    if len(results) < 2 or len(kinds) > 1:
        raise SkipscopeError(
            "side_by_side",
            "these results cannot stand side by side",
            expected="two or more results of one kind",
            got=", ".join(f"{name}: {type(result).__name__}" for name, result in results.items()) or "none",
        )
    return SideBySide(_shortened(list(results)), tuple(map(dumps, results.values())))


def _shortened(names: list[str]) -> tuple[str, ...]:
    """Shorten paths to the parts in which they differ; other names are unchanged."""
    parts = [Path(name).parts for name in names]
    if len({len(p) for p in parts}) != 1 or len(set(names)) < len(names):
        return tuple(names)
    differing = [i for i in range(len(parts[0])) if len({p[i] for p in parts}) > 1]
    return tuple("/".join(p[i] for i in differing) for p in parts)


@view.register
def _(result: SideBySide) -> Document:
    documents = {name: document(entry) for name, entry in result.results.items()}
    panels = [Panel("All numbers", tables=[result.table()])]
    for k, panel in enumerate(next(iter(documents.values())).panels):
        drawn = {name: s.panels[k].chart for name, s in documents.items() if k < len(s.panels)}
        charts = {name: chart for name, chart in drawn.items() if chart is not None}
        merged = _over_each_other(charts)
        if merged is not None:
            panels.append(Panel(panel.heading, merged, panel.caption))
        elif charts:
            parts = [Panel(name, chart) for name, chart in charts.items()]
            panels.append(Panel(panel.heading, None, panel.caption, parts=parts))
    return Document(
        "Side by side",
        ", ".join(documents),
        [f"{name}: {s.answer[0]}" for name, s in documents.items() if s.answer],
        panels,
    )


def _over_each_other(charts: Mapping[str, Chart]) -> Lines | None:
    """Overlay line charts in one chart. Returns None if they are not lines, or their axes differ."""
    drawn = [(name, chart) for name, chart in charts.items() if isinstance(chart, Lines)]
    if len(drawn) < 2 or len(drawn) < len(charts):
        return None
    first = drawn[0][1]
    if any(
        (c.x_title, c.y_title, c.log_x, c.frames) != (first.x_title, first.y_title, first.log_x, ())
        for _, c in drawn
    ):
        return None
    series = [
        replace(
            s,
            label=f"{name}: {s.label}" if len(chart.series) > 1 else name,
            style=k if len(chart.series) == 1 else s.style,
        )
        for k, (name, chart) in enumerate(drawn)
        for s in chart.series
    ]
    same_ticks = all(chart.ticks == first.ticks for _, chart in drawn)
    return replace(first, series=series, ticks=first.ticks if same_ticks else None, marks=())
