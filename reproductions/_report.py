"""What every reproduction shares: options, resumable work, intervals over seeds, verdicts, figures.

A reproduction is a module of this folder. Its docstring says what is done; it has

    REPRODUCTION                        a `Reproduction`: the paper, the claims, each with its criterion
    settings(options) -> list[dict]     the units of work: one dict of JSON values each, all that a unit depends on
    measure(setting) -> dict            does one unit: numbers, strings, lists; kept as JSON as soon as it is done
    judge(rows) -> dict[str, Judgement] the verdict of each claim, by its name, from the rows alone
    table(rows) -> list[dict]           the measured rows that the page shows: text, numbers, `Estimate`
    figures(rows) -> dict[str, Figure]  matplotlib figures by name

A row is a setting and what was measured, in one dict. A run that is killed goes on where it stopped: finished units
lie in `OUT/units/NAME/`, keyed by their setting alone, so change a setting when you change what `measure` does.
`--quick` only makes `settings` smaller; `judge`, `table` and `figures` must stand every size.

The criterion of a claim is committed before the run whose results are kept. The verdict and the figures can be made
again from the kept rows: `python -m reproductions NAME --judge`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import matplotlib
import numpy as np
import scipy.stats
import torch

import skipscope as ss

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "reproductions" / "results"
VERDICTS = ("shown", "shown in part", "not shown", "too small to tell")
Verdict = Literal["shown", "shown in part", "not shown", "too small to tell"]


@dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    Attributes:
        name: a short key.
        statement: the claim in one sentence.
        where: the paper's figure, table or section, and what it shows there.
        criterion: what counts as shown, in part, and not shown; `judge` computes exactly this.
    """

    name: str
    statement: str
    where: str
    criterion: str


@dataclass(frozen=True)
class Reproduction:
    """What one script reproduces.

    Attributes:
        title: the heading of its page.
        papers: each as a line: authors, title, year, address.
        claims: one or more.
        setup: what is measured here and how it is smaller than the paper, as sentences in Markdown.
        seeds: how many by default.
        takes_cifar: whether `--cifar` means something.
    """

    title: str
    papers: tuple[str, ...]
    claims: tuple[Claim, ...]
    setup: str
    seeds: int = 5
    takes_cifar: bool = False


@dataclass(frozen=True)
class Options:
    """The options of one run.

    Attributes:
        seeds: their numbers, from 0.
        size: "quick" is seconds (for tests), "default" is minutes, "full" may be hours.
        cifar: the folder that holds CIFAR-10, or None.
        out: where results are kept.
    """

    seeds: range
    size: Literal["quick", "default", "full"] = "default"
    cifar: str | None = None
    out: Path = RESULTS


@dataclass(frozen=True)
class Judgement:
    """The verdict on one claim.

    Attributes:
        verdict: one of `VERDICTS`.
        ours: what was measured, in a few words, with its interval.
        why: one to three sentences.
    """

    verdict: Verdict
    ours: str
    why: str


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval (Student's t); the interval of one value is not known (NaN)."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.3g}"
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def estimate(values: Iterable[float]) -> Estimate:
    """The mean of values over seeds and its 95 % t-interval."""
    array = np.asarray(list(values), dtype=float)
    n, mean = len(array), float(array.mean()) if len(array) else math.nan
    if n < 2:
        return Estimate(mean, math.nan, math.nan, n)
    half = float(scipy.stats.t.ppf(0.975, n - 1) * array.std(ddof=1) / math.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n)


def paired(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """The mean of `first - second`, seed by seed, and its 95 % t-interval: an order counts only beyond zero."""
    return estimate(a - b for a, b in zip(first, second, strict=True))


def geometric(values: Iterable[float]) -> Estimate:
    """The geometric mean of positive values and its 95 % interval: for what spans decades."""
    logs = estimate(math.log(v) for v in values)
    return Estimate(*(math.exp(v) for v in (logs.mean, logs.low, logs.high)), logs.n)


def where(rows: Iterable[dict], **values: Any) -> list[dict]:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in values.items())]


def run(name: str, module: ModuleType, options: Options, *, say: Callable[[str], object] = print) -> Path:
    """Do what is left of a reproduction's work, then judge it, draw it and write `OUT/NAME.json`."""
    folder = options.out / "units" / name
    folder.mkdir(parents=True, exist_ok=True)
    units = module.settings(options)
    kept = []
    for number, setting in enumerate(units, 1):
        path = folder / f"{_key(setting)}.json"
        if not path.exists():
            start = time.perf_counter()
            measured = _plain(module.measure(dict(setting)))
            unit = {
                "setting": setting, "measured": measured, "seconds": round(time.perf_counter() - start, 2),
                "commit": _commit(name), "date": time.strftime("%Y-%m-%d"), "threads": torch.get_num_threads(),
            }  # fmt: skip
            _write(path, json.dumps(unit))
            said = ", ".join(
                f"{key} {value}" for key, value in setting.items() if not isinstance(value, (list, dict))
            )
            say(f"[{number}/{len(units)}] {said} ({unit['seconds']:.1f} s)")
        kept.append(json.loads(path.read_text(encoding="utf-8")))
    content = {
        "reproduction": name,
        "size": options.size,
        "provenance": _provenance(name, kept, options),
        "rows": [{**unit["setting"], **unit["measured"]} for unit in kept],
    }
    return judge(name, module, content, options.out, say=say)


def judge(
    name: str, module: ModuleType, content: dict, out: Path, *, say: Callable[[str], object] = print
) -> Path:
    """Judge and draw the rows of a result; write its JSON and its figures."""
    rows, judgements = content["rows"], module.judge(content["rows"])
    content["claims"] = [
        {**asdict(claim), **asdict(judgements[claim.name])} for claim in module.REPRODUCTION.claims
    ]
    content["table"] = [
        {key: str(value) if isinstance(value, Estimate) else value for key, value in line.items()}
        for line in module.table(rows)
    ]
    content["figures"] = draw(name, module, rows, out)
    for claim in content["claims"]:
        say(f"{name}/{claim['name']}: {claim['verdict']}. {claim['ours']}. {claim['why']}")
    order = ("reproduction", "size", "claims", "table", "figures", "provenance", "rows")
    head = [f" {json.dumps(key)}: {json.dumps(_plain(content[key]), indent=1)}" for key in order[:-1]]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)  # a line a row
    path = out / f"{name}.json"
    _write(path, "{\n" + ",\n".join(head) + ',\n "rows": [\n' + lines + "\n ]\n}\n")
    return path


def draw(name: str, module: ModuleType, rows: list[dict], out: Path) -> list[str]:
    """Draw a reproduction's figures as SVG of the same bytes every time; returns the files' names."""
    import matplotlib.pyplot as plt

    names = []
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        for title, figure in module.figures(rows).items():
            names.append(f"{name}_{title}.svg")
            figure.savefig(out / names[-1], metadata={"Date": None}, bbox_inches="tight")
            plt.close(figure)
    return names


# Okabe and Ito's colours darkened to be read as text: the colours of skipscope's own charts.
COLOURS = ("#0067a5", "#c8500a", "#2c8a6b", "#7b4f9d", "#9a7b00", "#4a4a48", "#b0366f", "#1f9bb5")
STYLE: dict[Any, Any] = {
    "figure.figsize": (6.4, 3.8), "figure.constrained_layout.use": True, "savefig.facecolor": "white",
    "font.size": 9.5, "axes.titlesize": 10, "axes.titlelocation": "left", "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.6,
    "lines.linewidth": 1.6, "lines.markersize": 4.5, "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
}  # fmt: skip


def band(
    axes: Any, x: Sequence[float], estimates: Sequence[Estimate], label: str | None = None, **kwargs: Any
):
    """Draw a line of means with its interval as a shaded band; returns the line."""
    [line] = axes.plot(x, [e.mean for e in estimates], label=label, **{"marker": "o", **kwargs})
    low, high = ([getattr(e, side) for e in estimates] for side in ("low", "high"))
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
    return line


def cifar10(folder: str, split: Literal["train", "test"] = "train") -> tuple[torch.Tensor, torch.Tensor]:
    """CIFAR-10 from its binary version (`data_batch_1.bin` and so on): `[n, 3, 32, 32]` in 0 to 1, and classes."""
    names = [f"data_batch_{k}.bin" for k in range(1, 6)] if split == "train" else ["test_batch.bin"]
    raw = np.concatenate([np.fromfile(Path(folder) / name, np.uint8).reshape(-1, 3073) for name in names])
    images = torch.from_numpy(raw[:, 1:].reshape(-1, 3, 32, 32).astype(np.float32) / 255)
    return images, torch.from_numpy(raw[:, 0].astype(np.int64))


def parser(names: Sequence[str], summary: str) -> argparse.ArgumentParser:
    """The command line that every reproduction shares."""
    parser = argparse.ArgumentParser(prog="python -m reproductions", description=summary)
    parser.add_argument("name", nargs="?", choices=[*names, "all", "pages"], metavar="NAME",
                        help=f"{', '.join(names)}; all; pages: write docs/papers from the results")  # fmt: skip
    parser.add_argument("--seeds", type=int, help="how many seeds (the default is the script's own)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="the larger form: hours")
    size.add_argument("--quick", action="store_true", help="seconds; tells nothing about the claim")
    parser.add_argument(
        "--cifar", metavar="FOLDER", help="the binary version of CIFAR-10, where a script takes it"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where results go; reproductions/results, or for --quick a temporary folder",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; 1, so that a run repeats")
    parser.add_argument(
        "--judge", action="store_true", help="judge and draw the kept rows again; no work is done"
    )
    return parser


def options_of(arguments: argparse.Namespace, module: ModuleType) -> Options:
    """The options of one script from the command line."""
    size: Any = "quick" if arguments.quick else "full" if arguments.full else "default"
    seeds = arguments.seeds or (2 if size == "quick" else module.REPRODUCTION.seeds)
    out = arguments.out or (Path(tempfile.mkdtemp(prefix="reproductions-")) if size == "quick" else RESULTS)
    return Options(range(seeds), size, arguments.cifar, out)


def _key(setting: dict) -> str:
    return hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:16]


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _plain(value: Any) -> Any:
    """JSON values, floats to seven digits; NaN and Infinity are written as Python's json does."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, np.ndarray, torch.Tensor)):
        return [_plain(part) for part in (value.tolist() if hasattr(value, "tolist") else value)]
    if isinstance(value, (bool, str, type(None))):
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    return float(f"{float(value):.7g}")


def _commit(name: str) -> str | None:
    """The commit that the work was done at, marked if skipscope or the script had changes that are not in it."""

    def git(*words: str) -> str:
        run = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        changed = git(
            "status", "--porcelain", "--", "src", "reproductions/_report.py", f"reproductions/{name}.py"
        )
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _provenance(name: str, units: list[dict], options: Options) -> dict:
    flags = [f"--{options.size}"] if options.size != "default" else []
    cifar = ["--cifar FOLDER"] if options.cifar else []
    return {
        "skipscope": ss.__version__,
        "commits": sorted({str(unit["commit"]) for unit in units}),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": sorted({unit["threads"] for unit in units}),
        "dates": sorted({unit["date"] for unit in units}),
        "seconds": round(sum(unit["seconds"] for unit in units), 1),
        "units": len(units),
        "seeds": len(options.seeds),
        "command": " ".join(
            ["python -m reproductions", name, f"--seeds {len(options.seeds)}", *flags, *cifar]
        ),
    }
