"""Tables as plain data, and as text, Markdown, LaTeX, CSV, NumPy arrays and pandas data frames."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import re
import shutil
import textwrap
import unicodedata
from collections.abc import Iterator
from typing import Any

from skipscope._errors import MissingExtra
from skipscope._numbers import short
from skipscope._printable import printable

# Below this width words and numbers would be split, so a narrower terminal wraps whole lines instead.
_NARROWEST = 60
# A spreadsheet reads a cell that begins with one of these characters as a formula, also in their wide forms.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table as plain data, printed by every result and shown with every chart.

    Attributes:
        title: line above the table.
        columns: headings.
        rows: cells by row; numbers are not formatted, because each format writes them differently.
        notes: sentences below the table.
    """

    title: str
    columns: list[str]
    rows: list[list[Any]]
    notes: list[str] = dataclasses.field(default_factory=list)

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers only."""
        cells = [row[column] for row in self.rows]
        return any(isinstance(c, int | float) for c in cells) and not any(isinstance(c, str) for c in cells)

    def text(self, width: int | None = None) -> str:
        """Format the table as text of at most ``width`` columns (default: the terminal's; at least 60)."""
        width = max(width or shutil.get_terminal_size().columns, _NARROWEST)
        lines = textwrap.wrap(printable(self.title), width, break_on_hyphens=False)
        if self.columns:
            cells = [
                [printable(column) for column in self.columns],
                *([_words(c) for c in row] for row in self.rows),
            ]
            columns = list(zip(*cells, strict=True))
            words = [
                max(_cell_width(w) for cell in column for w in cell.split() or [""]) for column in columns
            ]
            gap = 3 if sum(words) <= width - 2 - 3 * (len(words) - 1) else 2
            sizes = [max(map(_cell_width, column)) for column in columns]
            while sum(sizes) > width - 2 - gap * (len(sizes) - 1) and max(sizes) > 1:
                # The widest column is narrowed, first among columns that can break between words.
                foldable = [i for i in range(len(sizes)) if sizes[i] > words[i]] or list(range(len(sizes)))
                sizes[max(foldable, key=sizes.__getitem__)] -= 1
            right = [self.numeric(i) for i in range(len(sizes))]
            head, *body = (
                [line for row in rows for line in _aligned(row, sizes, right, gap)]
                for rows in ([cells[0]], cells[1:])
            )
            rule = "\u2500" * (sum(sizes) + gap * (len(sizes) - 1) + 1)
            lines += ["", *head, f" {rule}", *body[0], ""]
        for note in self.notes:
            lines += textwrap.wrap(printable(note), width, break_on_hyphens=False) or [""]
        return "\n".join(line.rstrip() for line in lines).strip("\n")

    def markdown(self) -> str:
        """The table in GitHub's Markdown; no name in it is markup, a link or a picture."""
        heads = ["---:" if self.numeric(i) else "---" for i in range(len(self.columns))]
        lines = [self.columns, heads, *self.rows]
        rows = [
            "| " + " | ".join(_markdown(_words(cell)).replace("|", r"\|") for cell in line) + " |"
            for line in lines
        ]
        notes = [_markdown(printable(note)) for note in self.notes]
        return "\n\n".join([f"**{_markdown(printable(self.title))}**", "\n".join(rows), *notes]) + "\n"

    def csv(self) -> str:
        """Rows as comma-separated values: numbers in full, text escaped against spreadsheet formulas."""
        lines = io.StringIO()
        writer = csv.writer(lines)
        writer.writerow([plain_text(column) for column in self.columns])
        for row in self.rows:
            writer.writerow([plain_text(cell) if isinstance(cell, str) else cell for cell in row])
        return lines.getvalue()

    def latex(self) -> str:
        """The table as a LaTeX tabular that needs no package; its title and notes are comments above it."""
        rows = [[_latex_cell(cell) for cell in row] for row in self.rows]
        sides = "".join(
            "r" if any(row[k].startswith("$") for row in rows) else "l" for k in range(len(self.columns))
        )
        heads = [latex_text(head) for head in self.columns]
        return "\n".join([
            *(f"% {printable(line)}" for line in (self.title, *self.notes)),
            rf"\begin{{tabular}}{{{sides}}}", r"\hline", " & ".join(heads) + r" \\", r"\hline",
            *(" & ".join(row) + r" \\" for row in rows), r"\hline", r"\end{tabular}", "",
        ])  # fmt: skip

    def npz(self) -> bytes:
        """The columns as NumPy arrays under their headings, compressed; a missing number is NaN."""
        import numpy as np

        columns = {}
        for i, name in enumerate(self.columns):
            cells = [row[i] for row in self.rows]
            columns[printable(name).replace("/", "|")] = (
                np.array([np.nan if cell is None else cell for cell in cells], dtype=float)
                if self.numeric(i)
                else np.array([_words(cell) for cell in cells], dtype=str)
            )
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **columns)
        return buffer.getvalue()

    def dataframe(self) -> Any:
        """The rows as a ``pandas.DataFrame``.

        Raises:
            MissingExtra: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtra("to_dataframe", "pandas") from error
        return pandas.DataFrame(self.rows, columns=self.columns)


def plain_text(text: str) -> str:
    """Text for a cell of a CSV file: printable, and never read as a formula."""
    text = printable(text)
    return "'" + text if text.startswith(_FORMULA) else text


def _markdown(text: str) -> str:
    return text.replace("<", "&lt;").replace("](", r"]\(")


def _cell_width(text: str) -> int:
    """Width of a text in terminal cells: wide characters take two, combining marks none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def _folded(text: str, width: int) -> list[str]:
    """Wrap a text at ``width`` cells, between words if possible."""
    lines, line = [], ""
    for word in re.findall(r"\S+\s*|\s+", text):
        if line and _cell_width(line + word.rstrip()) > width:
            lines.append(line)
            line = ""
        for letter in word:
            if line and not letter.isspace() and _cell_width(line + letter) > width:
                lines.append(line)
                line = ""
            line += letter
    return [part.rstrip() for part in [*lines, line]]


def _aligned(row: list[str], sizes: list[int], right: list[bool], gap: int) -> Iterator[str]:
    """Lines of a table row, with numbers aligned to the right."""
    parts = [_folded(cell, size) for cell, size in zip(row, sizes, strict=True)]
    for line in itertools.zip_longest(*parts, fillvalue=""):
        pads = [" " * (size - _cell_width(part)) for part, size in zip(line, sizes, strict=True)]
        yield " " + (" " * gap).join(p + s if r else s + p for p, s, r in zip(pads, line, right, strict=True))


def _words(cell: Any) -> str:
    return printable(cell if isinstance(cell, str) else short(cell))


# --- LaTeX ---

_NUMBER = r"-?(?:[\d,]+\.?\d*(?:e[+-]?\d+)?|nan|inf)"
_MATHS = re.compile(rf"(>= )?({_NUMBER})(?: \+- ({_NUMBER}))?( %)?")


def _latex_cell(cell: Any) -> str:
    text = _words(cell)
    found = _MATHS.fullmatch(text)
    if found is None:
        return latex_text(text)
    bound, value, error, percent = found.groups()
    bounded = (r"\geq " if bound else "") + _latex_number(value)
    return (
        f"${bounded}"
        + (rf" \pm {_latex_number(error)}" if error else "")
        + (r"\ \%" if percent else "")
        + "$"
    )


def _latex_number(text: str) -> str:
    if text.lstrip("-") in {"nan", "inf"}:
        return text.replace("nan", r"\mathrm{nan}").replace("inf", r"\infty")
    mantissa, _, power = text.partition("e")
    return mantissa.replace(",", "{,}") + (rf" \times 10^{{{int(power)}}}" if power else "")


def latex_text(text: str) -> str:
    """Text that LaTeX prints as it is."""
    special = {c: "\\" + c for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\~{}", "^": r"\^{}"}
    special |= {"|": r"$|$", "<": "$<$", ">": "$>$"}
    return "".join(special.get(c, c) for c in printable(text))
