"""The command line: parse and call. Nothing here imports torch before a command runs, so that --help is immediate."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import App, Group, Parameter

from skipscope._errors import SkipscopeError
from skipscope._version import __version__

app = App(
    name="skipscope",
    version=__version__,
    help="See what the shortcut connections in a network do: find them, cut them, add them, measure with and without.",
    help_epilogue="Start with: skipscope compare",
    suppress_keyboard_interrupt=False,  # main() says what was kept
)
_model, _output = Group("Model and data", sort_key=1), Group("Output", sort_key=9)


@Parameter(name="*", group=_model)
@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the data, the loss and the weights come from.

    Attributes:
        data: module:callable that returns one batch (inputs, target) or a re-iterable of batches.
        loss: a loss of torch.nn.functional, such as cross_entropy; guessed from the target when left out.
        weights: a file of weights (safetensors, or a state_dict read with weights_only).
        input: shape of random inputs where no data are given, e.g. 1x3x224x224.
        seed: seeds a factory's initialisation and everything drawn.
    """

    data: str | None = None
    loss: str | None = None
    weights: Path | None = None
    input: str | None = None
    seed: int = 0


@Parameter(name="*", group=_output)
@dataclass(frozen=True, kw_only=True)
class Output:
    """Where results go.

    Attributes:
        out: folder for the page and the data.
        json: print plain data on standard output, and nothing else.
        open: open the page when done; asked at a terminal when left out.
    """

    out: Path | None = None
    json: bool = False
    open: bool | None = None


Model = Annotated[
    str | None,
    Parameter(
        help="module:callable, timm:NAME, hf:NAME, torchvision:NAME, or one of skipscope's own (skipscope find --list).",
        group=_model,
    ),
]


@app.command
def compare(
    model: Model = None,
    *,
    quick: bool = False,
    train: bool = True,
    steps: int | None = None,
    budget: float | None = None,
    source: Source = Source(),
    output: Output = Output(),
) -> None:
    """What do its shortcuts do for a network? The main job: one page of evidence.

    Args:
        model: without one: the lecture's network, made deep, on embedded digits.
        quick: a smaller version, in at most half a minute.
        train: also train the twins side by side; --no-train leaves it out.
        steps: optimizer steps a run; more where neither twin has learnt in the default.
        budget: seconds to stay within; parts that do not fit are left out and named.
    """
    from skipscope.cli import _commands

    _commands.compare(model, source, output, quick=quick, train=train, steps=steps, budget=budget)


@app.command
def play(*, output: Output = Output()) -> None:
    """The lecture, live in the browser: one offline page to experiment with."""
    from skipscope.cli import _commands

    _commands.play(output)


@app.command
def book(*, seeds: int = 1000, output: Output = Output()) -> None:
    """The lecture's experiment, printed as the lecture prints it, and what it does and does not show.

    Args:
        seeds: initialisations in the distribution below the lecture's own.
    """
    from skipscope.cli import _commands

    _commands.book(seeds, output)


@app.command
def find(
    model: Model = None,
    *,
    list_models: Annotated[bool, Parameter(name="--list")] = False,
    source: Source = Source(),
    output: Output = Output(),
) -> None:
    """Its shortcuts: where each one starts and ends, what it skips, and every other merge with its reason.

    Args:
        list_models: list the networks that need no MODEL of yours.
    """
    from skipscope.cli import _commands

    _commands.find(model, source, output, list_models=list_models)


@app.command
def flow(model: Model, *, source: Source = Source(), output: Output = Output()) -> None:
    """Its gradient flow, boundary by boundary, and the verdict."""
    from skipscope.cli import _commands

    _commands.flow(model, source, output)


@app.command
def paths(
    model: Model, *, wrt: str | None = None, source: Source = Source(), output: Output = Output()
) -> None:
    """Its path-length spectrum: how much gradient takes paths through k branches.

    Args:
        wrt: a boundary or parameter; default: the first boundary.
    """
    from skipscope.cli import _commands

    _commands.paths(model, source, output, wrt=wrt)


@app.command
def landscape(
    model: Model,
    *,
    grid: str = "25",
    line: bool = False,
    span: float = 1.0,
    tolerance: float | None = None,
    samples: int | None = None,
    normalize: str = "filter",
    batch_norm: str = "frozen",
    l2: float = 0.0,
    precision: str | None = None,
    strategy: str = "auto",
    engine: str = "auto",
    source: Source = Source(),
    output: Output = Output(),
) -> None:
    """Its loss surface on a filter-normalised plane; run it again and it goes on where it was stopped.

    Args:
        grid: points a side, or a number a side: 51x31.
        line: along one direction only.
        span: the plane reaches this many times the weights' own length in each direction.
        tolerance: compute coarsely first, and more only where interpolation is off by more than this share of the range.
        samples: use a random subset of the data of this size.
        normalize: filter, layer, tensor or none.
        batch_norm: frozen, recalibrate or batch.
        l2: count l2/2 |w|^2 in.
        precision: fp32, tf32, bf16 or fp16 instead of the model's own.
        strategy: auto takes the fastest; plain has the same bits on every run.
        engine: auto, or ray (extra).
    """
    from skipscope.cli import _commands

    options = {
        "span": span, "tolerance": tolerance, "samples": samples, "normalize": normalize, "batch_norm": batch_norm, "l2": l2,
        "precision": precision, "strategy": strategy, "engine": engine,
    }  # fmt: skip
    _commands.landscape(model, source, output, grid=grid, line=line, **options)


@app.command
def show(file: Path, *, output: Output = Output()) -> None:
    """Any saved result, or a monitor's history, also while it is being written.

    Args:
        file: what a result, a page, a monitor or a landscape was saved as.
    """
    from skipscope.cli import _commands

    _commands.show(file, output)


def main() -> None:
    """The entry point: what a user can put right is told in words, never as a traceback."""
    sys.path.insert(0, os.getcwd())  # module:callable means the user's own folder first, as for `python -m`
    try:
        app()
    except SkipscopeError as error:
        print(f"skipscope {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nskipscope: stopped; finished parts are kept where this command keeps them", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # `skipscope ... | head` is not an error
    except Exception as error:
        if os.environ.get("SKIPSCOPE_DEBUG"):
            raise
        print(
            f"skipscope: unexpected {type(error).__name__}: {error}\n  cure:     set SKIPSCOPE_DEBUG=1 to see where, and "
            "please report it",
            file=sys.stderr,
        )
        sys.exit(70)
