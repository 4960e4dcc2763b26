"""Commands: each loads its inputs, calls a public function, and prints the result and its paths."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import re
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import skipscope as ss
from skipscope import reference
from skipscope._errors import SkipscopeError
from skipscope._files import write_whole
from skipscope._printable import printable
from skipscope._progress import progress
from skipscope._result import Result, finite
from skipscope.cli import say
from skipscope.report import side_by_side

if TYPE_CHECKING:
    from skipscope._option_words import ConnectionKind
    from skipscope.cli import Output, Source
    from skipscope.cli._command_subject import Subject

# Each full garbage collection would walk through the objects made while torch was imported, which takes a
# tenth of a second. They live as long as the process anyway.
gc.freeze()

DEFAULT_FOLDER = Path("skipscope-out")
_ALWAYS_WRITE = {"landscape", "play"}  # others with --json alone write nothing
# Folders created by this command, innermost first.
_created_folders: list[Path] = []


def compare(
    model: str | None,
    source: Source,
    *,
    output: Output,
    quick: bool,
    train: bool,
    budget: float | None,
    seeds: int,
    steps: int | None,
    kinds: str | None,
) -> Any:
    """Run the comparison and write its page."""
    folder = _folder(output, "compare", model)
    with progress(not output.json):
        if model is None:
            if source.data or source.weights or source.input or source.loss or source.device or kinds:
                raise SkipscopeError(
                    "compare",
                    "data or kinds without a model",
                    cure="skipscope compare MODULE:CALLABLE --data ...",
                )
            result = ss.compare(
                quick=quick, train=train, seeds=seeds, steps=steps, budget=budget, seed=source.seed
            )
        else:
            subject = _subject(model, source, samples=512)
            result = ss.compare(
                subject.make or subject.model,
                subject.data,
                subject.loss,
                quick=quick,
                train=train,
                seeds=seeds,
                steps=steps,
                budget=budget,
                seed=source.seed,
                name=model,
                about=subject.said,
                variants=cast("list[ConnectionKind]", kinds.split(",")) if kinds else None,
            )
    return _deliver(result, "compare", output, folder, before=result.kinds_table().text() if kinds else "")


def play(*, output: Output) -> Any:
    """Write the live page."""
    page = _write_live_page(_folder(output, "play", None))
    place = str(page.resolve())
    data = _printed(printable(f"Page: {place}"), {"page": place}, output)
    _offer(page, output)
    return data


def _write_live_page(folder: Path) -> Path:
    from skipscope.report import LIVE_PAGE, live_page

    return write_whole(folder / LIVE_PAGE, live_page())


def book(seeds: int, *, output: Output) -> Any:
    """Run the lecture's experiment."""
    from skipscope import book as lecture

    folder = _folder(output, "book", None)
    with progress(not output.json):
        result = lecture.experiment(seeds=seeds)
    return _deliver(result, "book", output, folder)


def find(model: str | None, source: Source, *, output: Output, list_models: bool) -> Any:
    """Find the shortcuts of a model and draw them as arcs."""
    if list_models:
        return _printed("\n".join(reference.networks()), list(reference.networks()), output)
    folder = _folder(output, "find", model)
    subject = _subject(_required(model), source, uses_loss=False)
    found = ss.find_shortcuts(subject.model, subject.inputs)
    return _deliver(found, "find", output, folder, before=found.draw("text"))


def flow(model: str | None, source: Source, *, output: Output) -> Any:
    """Measure the gradient flow and judge it."""
    folder = _folder(output, "flow", model)
    subject = _subject(_required(model), source)
    return _deliver(ss.gradient_flow(subject.model, subject.data, subject.loss), "flow", output, folder)


def paths(model: str | None, source: Source, *, output: Output, wrt: str | None) -> Any:
    """Measure the path-length spectrum."""
    folder = _folder(output, "paths", model)
    subject = _subject(_required(model), source)
    with progress(not output.json):
        result = ss.path_spectrum(subject.model, subject.data, subject.loss, wrt=wrt)
    return _deliver(result, "paths", output, folder)


def landscape(
    model: str | None, source: Source, *, output: Output, grid: str, line: bool, **options: Any
) -> Any:
    """Compute the loss surface.

    Checkpointed after every point, so an interrupted run resumes. Only rank 0 prints.
    """
    sizes = _sizes(grid, line)
    folder, leads = _folder(output, "landscape", model), os.environ.get("RANK", "0") == "0"
    subject = _subject(_required(model), source, quiet=not leads)
    with progress(leads and not output.json):
        result = ss.landscape(
            subject.model,
            subject.data,
            subject.loss,
            grid=sizes,
            seed=source.seed,
            store=folder / "landscape.zarr",
            **options,
        )
    return _deliver(result, "landscape", output, folder) if leads else None


def _sizes(grid: str, line: bool) -> tuple[int, ...]:
    sizes = tuple(int(n) for n in grid.split("x") if n.isdecimal())
    if "x".join(map(str, sizes)) != grid or len(sizes) > 2 - line:
        raise SkipscopeError(
            "landscape", "this is not a grid", expected="51" if line else "51, or 51x31", got=grid[:60]
        )
    return sizes if line or len(sizes) == 2 else sizes * 2


def show(files: tuple[Path, ...], *, output: Output) -> Any:
    """Print or draw saved results; several side by side."""
    if not files:
        raise SkipscopeError(
            "show", "no file was named", cure="skipscope show skipscope-out/flow-resnet20/flow.json"
        )
    result = ss.load(files[0]) if len(files) == 1 else side_by_side({str(f): ss.load(f) for f in files})
    if output.out and not output.json:
        return _deliver(result, files[0].stem or "result", output, _folder(output, "show", None))
    _save_picture(result, output)
    return _printed(result, result, output)


# --- in and out ---


def _required(model: str | None) -> str:
    if model is None:
        raise SkipscopeError(
            "model",
            "no model was named",
            expected="module:callable, or one of " + ", ".join(reference.networks()),
        )
    return model


def _subject(
    model: str, source: Source, samples: int = 128, *, quiet: bool = False, uses_loss: bool = True
) -> Subject:
    from skipscope.cli._command_subject import load_subject

    subject = load_subject(model, source, samples, uses_loss=uses_loss)
    for sentence in () if quiet else subject.said:
        say(f"({sentence})")
    return subject


def _folder(output: Output, command: str, model: str | None) -> Path:
    """Create the output folder before the work begins, so that an unwritable path fails early."""
    name = "-".join([command, *([re.sub(r"[^A-Za-z0-9.]+", "-", model).strip("-")] if model else [])])
    folder = output.out or DEFAULT_FOLDER / name
    if output.json and output.out is None and command not in _ALWAYS_WRITE:
        return folder.absolute()
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "it cannot be written", str(folder))
    # A name with a null character raises ValueError.
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise SkipscopeError(
            "out", f"cannot use the folder {folder}: {why}", cure="give another one: --out FOLDER"
        ) from error
    finally:
        _created_folders.extend(path for path in missing if path.exists())
    # The user's own functions may change the working folder.
    return folder.absolute()


def remove_empty_folders() -> None:
    """Remove empty folders created by this command, for example after an error."""
    for folder in _created_folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
    _created_folders.clear()


def _unused(folder: Path, name: str) -> str:
    """The first of ``name``, ``name-2``, ``name-3``, ... without a page or data in the folder."""
    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    return next(n for n in names if not any((folder / f"{n}.{end}").exists() for end in ("json", "html")))


def _deliver(result: Result, name: str, output: Output, folder: Path, before: str = "") -> Any:
    """Write the result, print it and its paths, and offer to open the page.

    The result is written first, so that it is kept even if printing fails.

    Returns:
        The result of :func:`_printed`.
    """
    if output.json and output.out is None:
        _save_picture(result, output)
        return _printed("", result, output)
    name = _unused(folder, name)
    data = result.save(folder / f"{name}.json")
    # The result's page links to the live page, so that is written first.
    _write_live_page(folder)
    page = result.save(folder / f"{name}.html")
    _save_picture(result, output)
    places = "\n".join(
        printable(f"{word}: {path.resolve()}") for word, path in (("Page", page), ("Data", data))
    )
    plain = _printed("\n".join([*filter(None, [before]), str(result), "", places]), result, output)
    if output.json:
        say(places)
    _offer(page, output)
    return plain


def _printed(text: Any, data: Any, output: Output) -> Any:
    """Print a text, or with ``--json`` return the data, which the command line prints last."""
    if not output.json:
        print(text)
        return None
    return finite(data.to_dict() if isinstance(data, Result) else data)


def _save_picture(result: Result, output: Output) -> None:
    if output.save is not None:
        say(f"Saved: {result.save(output.save).resolve()}")


def _offer(page: Path, output: Output) -> None:
    wanted = output.open
    if (
        wanted is None
        and not output.json
        and all(s is not None and s.isatty() for s in (sys.stdin, sys.stdout))
    ):
        # Ctrl-D raises EOFError.
        with contextlib.suppress(EOFError):
            wanted = input("Open the page? [y/N] ").strip().lower() in {"y", "yes"}
    if wanted:
        webbrowser.open(page.resolve().as_uri())
