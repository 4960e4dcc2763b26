"""The command line: parse the arguments and call the public API.

Nothing here imports torch before a command runs, so that --help is immediate.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Group, Parameter, validators

from skipscope._errors import SkipscopeError
from skipscope._option_words import BatchNorm, Engine, Normalization, Precision
from skipscope._printable import printable_lines
from skipscope._version import __version__

app = App(
    name="skipscope",
    version=__version__,
    help=(
        "See what the shortcut connections in a network do: find them, cut them, add them, measure with and"
        " without."
    ),
    help_epilogue="Start with: skipscope compare",
    # main() handles Ctrl-C and says what was kept.
    suppress_keyboard_interrupt=False,
)
app.register_install_completion_command(
    help="Complete commands and options in this shell, from its next start on."
)
_model, _output = Group("Model and data", sort_key=1), Group("Output", sort_key=9)


@Parameter(name="*", group=_model)
@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the data, the loss and the weights come from.

    Attributes:
        data: module:callable that returns one batch (inputs, target) or a re-iterable of batches.
        loss: a loss of torch.nn.functional, such as cross_entropy, or module:callable; guessed from the
            target when left out.
        weights: a file of weights (safetensors, or a state_dict read with weights_only).
        input: shape of random inputs where no data are given, e.g. 1x3x224x224.
        device: where to run, e.g. cuda or cuda:1.
        seed: seeds a factory's initialisation and everything drawn.
    """

    data: str | None = None
    loss: str | None = None
    weights: Path | None = None
    input: str | None = None
    device: str | None = None
    seed: Annotated[int, Parameter(validator=validators.Number(gte=0, lt=2**63))] = 0


@Parameter(name="*", group=_output)
@dataclass(frozen=True, kw_only=True)
class Output:
    """Where results go.

    Attributes:
        out: folder for the page and the data; by default one for each command and model. Nothing is
            overwritten.
        save: also write this file: a picture (.svg, .png, .pdf) or a table (.csv, .tex, .md, .npz).
        json: print plain data on standard output, and nothing else.
        open: open the page when done; asked at a terminal when left out.
    """

    out: Path | None = None
    save: Path | None = None
    json: bool = False
    open: bool | None = None


Model = Annotated[
    str | None,
    Parameter(
        help=(
            "module:callable, timm:NAME, hf:NAME, torchvision:NAME, or one of skipscope's own (skipscope find"
            " --list)."
        ),
        group=_model,
    ),
]


@app.command
def compare(
    model: Model = None,
    *,
    quick: bool = False,
    train: bool = True,
    seeds: int = 3,
    steps: int | None = None,
    budget: float | None = None,
    kinds: str | None = None,
    source: Source = Source(),
    output: Output = Output(),
) -> None:
    """Show on one page what the shortcuts of a network do for it.

    Args:
        model: default: a deep version of the lecture's network, on embedded digits.
        quick: a smaller version, in at most half a minute; what a busy machine has no time for is left out
            and named.
        train: also train the twins side by side; --no-train leaves it out.
        seeds: training runs of each twin.
        steps: optimizer steps a run; more where neither twin has learnt in the default.
        budget: seconds to stay within; parts that do not fit are left out and named.
        kinds: kinds of shortcut that replace the model's own, e.g. identity,rezero,highway; a line of a table
            for each.
    """
    _run(
        "compare",
        model,
        output,
        model,
        source,
        quick=quick,
        train=train,
        seeds=seeds,
        steps=steps,
        budget=budget,
        kinds=kinds,
    )


@app.command
def play(*, output: Output = Output()) -> None:
    """The lecture, live in the browser: one offline page to experiment with."""
    _run("play", None, output)


@app.command
def book(*, seeds: int = 1000, output: Output = Output()) -> None:
    """The lecture's experiment, printed as the lecture prints it, and what it does and does not show.

    Args:
        seeds: initialisations in the distribution below the lecture's own.
    """
    _run("book", None, output, seeds)


@app.command
def find(
    model: Model = None,
    *,
    list_models: Annotated[bool, Parameter(name="--list")] = False,
    source: Source = Source(),
    output: Output = Output(),
) -> None:
    """Find a model's shortcuts: where each starts and ends, what it skips; other merges with their reasons.

    Args:
        list_models: list the networks that need no MODEL of yours.
    """
    _run("find", model, output, model, source, list_models=list_models)


@app.command
def flow(model: Model, *, source: Source = Source(), output: Output = Output()) -> None:
    """Measure a model's gradient flow, boundary by boundary, and judge it."""
    _run("flow", model, output, model, source)


@app.command
def paths(
    model: Model, *, wrt: str | None = None, source: Source = Source(), output: Output = Output()
) -> None:
    """Compute the path-length spectrum: how much gradient takes paths through k branches.

    Args:
        wrt: a boundary or parameter; default: the first boundary.
    """
    _run("paths", model, output, model, source, wrt=wrt)


@app.command
def landscape(
    model: Model,
    *,
    grid: str = "25",
    line: bool = False,
    span: float = 1.0,
    tolerance: float | None = None,
    samples: int | None = None,
    normalize: Normalization = "filter",
    batch_norm: BatchNorm = "frozen",
    l2: float = 0.0,
    precision: Precision | None = None,
    strategy: str = "auto",
    engine: Engine = "auto",
    source: Source = Source(),
    output: Output = Output(),
) -> None:
    """Compute the loss surface on a filter-normalised plane; run again, it resumes where it was stopped.

    Args:
        grid: points a side, or a number a side: 51x31.
        line: along one direction only.
        span: the plane reaches this many times the weights' own length in each direction.
        tolerance: compute coarsely first, and more only where interpolation is off by more than this share of
            the range.
        samples: use a random subset of the data of this size.
        normalize: which length of the weights a direction has, part by part.
        batch_norm: running statistics as they are, measured again at each point, or each batch's own.
        l2: count l2/2 |w|^2 in.
        precision: of the arithmetic; default: the model's own.
        strategy: auto takes the fastest; plain has the same bits on every run.
        engine: who computes the points; ray needs the package of that name.
    """
    options = {
        "span": span,
        "tolerance": tolerance,
        "samples": samples,
        "normalize": normalize,
        "batch_norm": batch_norm,
        "l2": l2,
        "precision": precision,
        "strategy": strategy,
        "engine": engine,
    }
    _run("landscape", model, output, model, source, grid=grid, line=line, **options)


@app.command
def show(*files: Path, output: Output = Output()) -> None:
    """Show a saved result or a monitor's history, also while it is written; several results side by side.

    Args:
        files: saved results and pages, folders of monitors and landscapes.
    """
    _run("show", None, output, files)


def _run(command: str, model: str | None, output: Output, *arguments: Any, **options: Any) -> None:
    """Run a command of :mod:`skipscope.cli._commands`; a first line is printed before torch is imported."""
    if not output.json and os.environ.get("RANK", "0") == "0":
        say(f"skipscope {command} {model or ''}".rstrip() + " ...")
    # The user's own functions may change the working folder.
    if output.save is not None:
        output = replace(output, save=output.save.absolute())
    with _prints_on_stderr() if output.json else contextlib.nullcontext(print) as answer:
        commands = importlib.import_module("skipscope.cli._commands")
        try:
            data = getattr(commands, command)(*arguments, output=output, **options)
            if data is not None:
                answer(json.dumps(data, indent=1, allow_nan=False))
        except SystemExit as error:
            raise SkipscopeError(
                command,
                f"your own code ended the program (sys.exit({error.code!r:.60}))",
                got=_own_line(error),
                cure="guard what is meant for the command line with: if __name__ == '__main__'",
            ) from error
        finally:
            commands.remove_empty_folders()


@contextlib.contextmanager
def _prints_on_stderr() -> Iterator[Callable[[str], None]]:
    """Send to standard error what is printed inside: by Python, by libraries in C and by child processes.

    What threads and the user's own code print later, until the process has ended, goes there too.

    Yields:
        What prints a text on standard output.
    """
    stream = sys.stdout
    if sys.__stdout__ is None or sys.__stderr__ is None:  # closed by who called
        with contextlib.redirect_stdout(sys.stderr):
            yield lambda text: print(text, file=stream, flush=True)
        return
    sys.__stdout__.flush()
    kept, is_command = os.dup(1), stream is sys.__stdout__
    os.dup2(2, 1)

    def answer(text: str) -> None:
        if not is_command:  # a program that calls main() has its own
            print(text, file=stream, flush=True)
            return
        with open(kept, "w", encoding="utf-8", closefd=False) as own:  # as JSON is, whatever the terminal
            print(text, file=own)

    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield answer
    finally:
        with contextlib.suppress(OSError):
            sys.__stdout__.flush()
        if not is_command:
            os.dup2(kept, 1)
        os.close(kept)


def main() -> None:
    """Entry point. An error that the user can fix is reported as text, without a traceback."""
    # module:callable is searched in the working folder first, as for `python -m`; that folder may be gone.
    with contextlib.suppress(OSError):
        sys.path.insert(0, os.getcwd())
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        app()
        if sys.stdout is not None:
            sys.stdout.flush()
    except SkipscopeError as error:
        say(f"skipscope {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        say("\nskipscope: stopped; finished parts are kept where this command keeps them")
        sys.exit(130)
    except BrokenPipeError:
        # `skipscope ... | head` is not an error: the results are saved before they are printed.
        _discard_output()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            _unexpected(error)
        say("skipscope: nothing more can be printed (no space left); what was saved before is kept")
        _discard_output()
        sys.exit(1)
    # Raised by --help, --version and invalid options.
    except SystemExit as error:
        # In `skipscope --help | head` rich exits with 1 when the pipe is closed. After an invalid option that
        # exit status is right.
        if isinstance(pipe := error.__context__, BrokenPipeError) and pipe.__context__ is None:
            return
        raise
    except BaseException as error:
        _unexpected(error)


def say(text: str) -> None:
    """Print on standard error; what it cannot take is lost, and nothing else."""
    with contextlib.suppress(OSError, ValueError):  # full, or closed by the user's own code
        print(printable_lines(text), file=sys.stderr, flush=True)


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unexpected(error: BaseException) -> None:
    if os.environ.get("SKIPSCOPE_DEBUG"):
        raise error
    if (place := _own_line(error)) is not None:
        words = f"{type(error).__name__}: {error}"
        say(
            f"skipscope: your own code failed ({words})\n  got:      {place}\n  cure:     call it in Python"
            " and mend what fails; SKIPSCOPE_DEBUG=1 shows the whole traceback"
        )
        sys.exit(1)
    say(
        f"skipscope: unexpected {type(error).__name__}: {error}\n  cure:     set SKIPSCOPE_DEBUG=1 to see"
        " where, and please report it"
    )
    sys.exit(70)


def _own_line(error: BaseException) -> str | None:
    """The line of the user's own code that raised an error, or None if skipscope raised it."""
    package = str(Path(__file__).parents[1])
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith(package):
            return None
        # Frames of libraries are skipped: the caller outside them made the mistake.
        if "site-packages" not in frame.filename and not frame.filename.startswith((sys.base_prefix, "<")):
            return f"{Path(frame.filename).name}:{frame.lineno}, {frame.line}"
    return None
