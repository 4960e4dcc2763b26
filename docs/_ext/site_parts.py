"""What the site needs beside its text: equations without a script, chart colours, the live page."""

from __future__ import annotations

import re
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml


def _mathml(tex: str, block: bool) -> str:
    return latex2mathml.tex2mathml(tex, as_block=block)


def _visit_math(self: Any, node: nodes.math) -> None:
    self.body.append(_mathml(node.astext(), block=False))
    raise nodes.SkipNode


def _visit_math_block(self: Any, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math">{_mathml(node.astext(), block=True)}</div>\n')
    raise nodes.SkipNode


def _write_files(app: Any) -> None:
    """Write the charts' colours for the theme's switch, and the live page, beside the site's own files."""
    from skipscope.report import LIVE_PAGE, live_page

    static = Path(app.outdir) / "_static"
    static.mkdir(parents=True, exist_ok=True)
    (static / LIVE_PAGE).write_text(live_page(), encoding="utf-8")
    css = (resources.files("skipscope.report") / "chart.css").read_text(encoding="utf-8")
    light, dark = (re.findall(r"^\s+(--\w.*)$", part, re.MULTILINE) for part in _schemes(css))
    rules = [
        f'body[data-theme="{theme}"] .skipscope.fragment {{\n  ' + "\n  ".join(lines) + "\n}\n"
        for theme, lines in (("light", light), ("dark", dark))
    ]
    (static / "charts.css").write_text("".join(rules), encoding="utf-8")


def _schemes(css: str) -> tuple[str, str]:
    before, _, after = css.partition("prefers-color-scheme: dark")
    return before, after.partition("}")[0]


def _link_notebooks(app: Any, name: str, content: list[str]) -> None:
    """Link a gallery page's notebook in the cloud, where a base address is set."""
    if app.config.notebooks_base and name.startswith("gallery/") and not name.endswith("index"):
        address = f"{app.config.notebooks_base}/notebooks/{name.removeprefix('gallery/')}.ipynb"
        content[0] += f"\n\n`Open this notebook in the cloud <{address}>`_\n"


def _copy_notebooks(app: Any, error: Exception | None) -> None:
    """Put the gallery's notebooks where their addresses do not change."""
    if error is None and app.builder.format == "html":
        folder = Path(app.outdir) / "notebooks"
        folder.mkdir(exist_ok=True)
        for notebook in Path(app.srcdir, "gallery").glob("*.ipynb"):
            shutil.copy(notebook, folder)


def _escape_bars(app: Any, kind: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep ``|G|`` in a docstring a norm: in reStructuredText bars would be a substitution."""
    for at, line in enumerate(lines):
        if "|" in line and not line.lstrip().startswith((">>>", "...")):
            parts = re.split(r"(``.*?``)", line)
            lines[at] = "".join(p if p.startswith("``") else p.replace("|", "\\|") for p in parts)


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_html_math_renderer(
        "mathml", inline_renderers=(_visit_math, None), block_renderers=(_visit_math_block, None)
    )
    app.add_config_value("notebooks_base", "", "env")
    app.connect("builder-inited", _write_files)
    app.connect("source-read", _link_notebooks)
    app.connect("build-finished", _copy_notebooks)
    app.connect("autodoc-process-docstring", _escape_bars)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
