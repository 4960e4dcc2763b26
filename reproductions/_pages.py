"""The pages of docs/papers, written from the kept results: a table of all claims, and a page a reproduction.

``python -m reproductions pages`` writes them; a test holds the committed pages equal to the results.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from reproductions._report import RESULTS, ROOT, VERDICTS, Reproduction

PAGES = ROOT / "docs" / "papers"
INDEX = """# The papers, reproduced

The lecture rests on papers. Here their claims are measured again with skipscope, on two processor cores and data that
the package carries. What would count as *shown* was written down before each run. An order of two means counts only
where the 95 % interval of their difference over seeds does not contain zero. "Not shown" is a result: it says that
this experiment, at this size, does not show the claim; it does not say that the paper is wrong. Where a criterion turned
out to be a blunder, it stays, and a second one stands beside it. Times are wall-clock, on cores that other work shared.

```console
$ python -m reproductions            # lists them
$ python -m reproductions balduzzi   # runs one, or goes on with it
$ make reproductions                 # all
```

"""


def write() -> list[Path]:
    """Write every page anew; returns their paths."""
    PAGES.mkdir(parents=True, exist_ok=True)
    pages = render()
    for old in PAGES.glob("*.md"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        (PAGES / name).write_text(text, encoding="utf-8")
    return [PAGES / name for name in pages]


def render() -> dict[str, str]:
    """Every page's text by its file's name."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    pages = {f"{result['reproduction']}.md": _page(result) for result in results}
    lines = ["| paper | claim | in the paper | here | verdict |", "|---|---|---|---|---|"]
    counts = dict.fromkeys(VERDICTS, 0)
    for result in results:
        link = f"[{_about(result).title}]({result['reproduction']}.md)"
        for claim in result["claims"]:
            counts[claim["verdict"]] += 1
            cells = [
                link,
                *(_cell(claim[key]) for key in ("statement", "where", "ours")),
                f"*{claim['verdict']}*",
            ]
            lines.append(f"| {' | '.join(cells)} |")
            link = ""
    total = ", ".join(f"{count} *{verdict}*" for verdict, count in counts.items() if count)
    lines = [f"Of {sum(counts.values())} claims: {total}.", "", *lines]
    contents = "\n".join(["", "```{toctree}", ":hidden:", "", *(name[:-3] for name in pages), "```", ""])
    return {"index.md": INDEX + "\n".join(lines) + "\n" + contents, **pages}


def _about(result: dict) -> Reproduction:
    return importlib.import_module(f"reproductions.{result['reproduction']}").REPRODUCTION


def _page(result: dict) -> str:
    name = result["reproduction"]
    about = _about(result)
    parts = [f"# {about.title}", "\n\n".join(about.papers), about.setup]
    for picture in result["figures"]:
        described = picture.removeprefix(f"{name}_").removesuffix(".svg")
        parts.append(f"![{about.title}: {described}](../../reproductions/results/{picture})")
    for claim in result["claims"]:
        parts += [
            f"## {claim['statement']}",
            f"*In the paper*: {claim['where']}",
            f"*What counts as shown*{_when(claim['criterion'])}: {claim['criterion']}",
            f"**{claim['verdict'].capitalize()}.** {_capital(claim['ours'])}.",
            claim["why"],
        ]
    parts.append(_table(result["table"]))
    if any("[" in str(cell) for line in result["table"] for cell in line.values()):
        parts.append("In brackets: the 95 % interval of the mean over seeds.")
    parts.append(_provenance(name, result["provenance"]))
    return "\n\n".join(parts) + "\n"


def _when(criterion: str) -> str:
    """A criterion that came after a run says so itself."""
    return "" if criterion.startswith("Written after") else ", written before the run"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _table(rows: list[dict]) -> str:
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _provenance(name: str, made: dict) -> str:
    threads = ", ".join(map(str, made["threads"]))
    several = len(made["commits"]) > 3
    commits = (
        f"{len(made['commits'])} commits, which its JSON lists" if several else ", ".join(made["commits"])
    )
    return (
        f"*How it was made*: `{made['command']}`; {made['units']} units of work, {made['seconds'] / 60:.1f} minutes on"
        f" {threads} thread{'s' if threads != '1' else ''} ({made['machine']}); skipscope {made['skipscope']} at"
        f" {commits}, torch {made['torch']}, Python {made['python']}; {', '.join(made['dates'])}."
        f" Every measured number: `reproductions/results/{name}.json`; the script: `reproductions/{name}.py`."
    )
