"""What each command does: load what it names, call one public function, say what came out and where it went."""

from __future__ import annotations

import json
import os
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import skipscope as ss
from skipscope import reference
from skipscope._errors import SkipscopeError
from skipscope._files import write_whole
from skipscope._progress import progress
from skipscope._result import Result, finite

if TYPE_CHECKING:
    from skipscope.cli import Output, Source
    from skipscope.cli._subject import Subject

DEFAULT_FOLDER = Path("skipscope-out")


def compare(
    model: str | None, source: Source, output: Output, *, quick: bool, train: bool, budget: float | None,
    steps: int | None,
) -> None:  # fmt: skip
    """The main job, with its page."""
    folder = _folder(output)
    with progress(not output.json):
        if model is None:
            if source.data or source.weights or source.input or source.loss:
                raise SkipscopeError(
                    "compare", "data without a model", cure="skipscope compare MODULE:CALLABLE --data ..."
                )
            result = ss.compare(quick=quick, train=train, steps=steps, budget=budget, seed=source.seed)
        else:
            subject = _subject(model, source, samples=512)
            result = ss.compare(
                subject.make or subject.model, subject.data, subject.loss,
                quick=quick, train=train, steps=steps, budget=budget, seed=source.seed, name=model, about=subject.said,
            )  # fmt: skip
    _deliver(result, "compare", output, folder)


def play(output: Output) -> None:
    """The live page."""
    page = _write_live_page(_folder(output))
    print(json.dumps({"page": str(page.resolve())}) if output.json else f"Page: {page.resolve()}")
    _offer(page, output)


def _write_live_page(folder: Path) -> Path:
    from skipscope.report import LIVE_PAGE, live_page

    return write_whole(folder / LIVE_PAGE, live_page())


def book(seeds: int, output: Output) -> None:
    """The lecture's experiment."""
    from skipscope import book as lecture

    folder = _folder(output)
    with progress(not output.json):
        result = lecture.experiment(seeds=seeds)
    _deliver(result, "book", output, folder)


def find(model: str | None, source: Source, output: Output, *, list_models: bool) -> None:
    """The shortcuts of a model, drawn as arcs."""
    if list_models:
        print("\n".join(reference.networks()))
        return
    folder = _folder(output)
    subject = _subject(_required(model), source)
    found = ss.find_shortcuts(subject.model, subject.inputs)
    if not output.json:
        print(found.draw("text"))
    _deliver(found, "find", output, folder)


def flow(model: str | None, source: Source, output: Output) -> None:
    """The gradient flow and its verdict."""
    folder = _folder(output)
    subject = _subject(_required(model), source)
    _deliver(ss.gradient_flow(subject.model, subject.data, subject.loss), "flow", output, folder)


def paths(model: str | None, source: Source, output: Output, *, wrt: str | None) -> None:
    """The path-length spectrum."""
    folder = _folder(output)
    subject = _subject(_required(model), source)
    with progress(not output.json):
        result = ss.path_spectrum(subject.model, subject.data, subject.loss, wrt=wrt)
    _deliver(result, "paths", output, folder)


def landscape(
    model: str | None, source: Source, output: Output, *, grid: str, line: bool, **options: Any
) -> None:
    """The loss surface, kept point by point so that it can be resumed; of several ranks the first one speaks."""
    sizes = _sizes(grid, line)
    folder, leads = _folder(output), int(os.environ.get("RANK", "0")) == 0
    subject = _subject(_required(model), source, speaks=leads)
    with progress(leads and not output.json):
        result = ss.landscape(
            subject.model, subject.data, subject.loss,
            grid=sizes, seed=source.seed, store=folder / "landscape.zarr", **options,
        )  # fmt: skip
    if leads:
        _deliver(result, "landscape", output, folder)


def _sizes(grid: str, line: bool) -> tuple[int, ...]:
    sizes = tuple(int(n) for n in grid.split("x") if n.isdecimal())
    if "x".join(map(str, sizes)) != grid or len(sizes) > 2 - line:
        raise SkipscopeError(
            "landscape", "this is no grid", expected="51" if line else "51, or 51x31", got=grid[:60]
        )
    return sizes if line or len(sizes) == 2 else sizes * 2


def show(file: Path, output: Output) -> None:
    """Anything that was saved."""
    result = ss.load(file)
    if output.json:
        _print_json(result)
    elif output.out:
        _deliver(result, file.stem or "result", output, _folder(output))
    else:
        print(result)


# --- in and out


def _required(model: str | None) -> str:
    if model is None:
        raise SkipscopeError(
            "model",
            "no model was named",
            expected="module:callable, or one of " + ", ".join(reference.networks()),
        )
    return model


def _subject(model: str, source: Source, samples: int = 128, speaks: bool = True) -> Subject:
    from skipscope.cli._subject import load_subject

    subject = load_subject(model, source, samples)
    for sentence in subject.said if speaks else ():
        print(f"({sentence})", file=sys.stderr)
    return subject


def _folder(output: Output) -> Path:
    """The folder results go to, made before the work so that a place that cannot be written costs nothing."""
    folder = output.out or DEFAULT_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "it cannot be written", str(folder))
    except OSError as error:
        raise SkipscopeError(
            "out", f"cannot use the folder {folder}: {error.strerror}", cure="give another one: --out FOLDER"
        ) from error
    return folder


def _deliver(result: Result, name: str, output: Output, folder: Path) -> None:
    """Print the result, write it, say where it went, and offer to open the page."""
    if output.json:
        _print_json(result)
        if output.out is None:
            return
    else:
        print(result)
    data = result.save(folder / f"{name}.json")
    _write_live_page(folder)  # the result's page links to it
    page = result.save(folder / f"{name}.html")
    print(f"\nPage: {page.resolve()}\nData: {data.resolve()}", file=sys.stderr if output.json else sys.stdout)
    _offer(page, output)


def _offer(page: Path, output: Output) -> None:
    wanted = output.open
    if wanted is None and not output.json and sys.stdin.isatty() and sys.stdout.isatty():
        wanted = input("Open the page? [y/N] ").strip().lower() in {"y", "yes"}
    if wanted:
        webbrowser.open(page.resolve().as_uri())


def _print_json(result: Any) -> None:
    json.dump(finite(result.to_dict()), sys.stdout, indent=1, allow_nan=False)
    print()
