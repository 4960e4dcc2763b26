"""Sinks for a monitor's reports: the protocol, terminal, JSON lines, CSV and functions."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from skipscope._errors import SkipscopeError
from skipscope._numbers import short
from skipscope._printable import printable
from skipscope.monitor._record import Record, scalars
from skipscope.monitor.history import History, VerdictEvent


@runtime_checkable
class Sink(Protocol):
    """Receiver of a monitor's reports, on rank 0. A sink that raises is dropped with a warning."""

    def open(self, notes: list[str]) -> None:
        """Called when the watch begins."""
        ...

    def step(self, record: Record) -> None:
        """Called after each recorded step."""
        ...

    def event(self, event: VerdictEvent) -> None:
        """Called when the state of the verdict changes."""
        ...

    def close(self, history: History) -> None:
        """Called when the watch ends."""
        ...


class Terminal:
    """Sink that prints a line every few recorded steps and whenever the state changes.

    Args:
        every: number of recorded steps between lines.
        file: output stream; standard error by default.
    """

    def __init__(self, every: int = 50, file: IO[str] | None = None):
        self.every, self.file, self._count = every, file, 0

    def open(self, notes: list[str]) -> None:
        """Print the notes."""
        for note in notes:
            self._say(f"watching: {note}")

    def step(self, record: Record) -> None:
        """Print a line every few recorded steps."""
        if self._count % self.every == 0 or record.skipped:
            clip = record.total_before_clip
            parts = [f"|g| {short(record.total_norm)}"]
            parts += [f"before clipping {short(clip)}"] if math.isfinite(clip) else []
            parts += [f"loss scale {short(record.loss_scale)}"] if math.isfinite(record.loss_scale) else []
            parts += ["skipped"] if record.skipped else []
            which = f" (optimizer {record.optimizer})" if record.optimizer else ""
            self._say(f"step {record.step:>6,}{which}  " + "  ".join(parts) + f"  {record.verdict.state}")
        self._count += 1

    def event(self, event: VerdictEvent) -> None:
        """Print the change of the state."""
        self._say(str(event))

    def close(self, history: History) -> None:
        """Print the number of steps and the last verdict."""
        self._say(f"{len(history):,} steps recorded. {history.verdict}")

    def _say(self, text: str) -> None:
        print(printable(f"skipscope: {text}"), file=self.file or sys.stderr, flush=True)


class JsonLines:
    """Sink that writes a line of JSON per recorded step or event; numbers that are not finite become null.

    Each line is flushed.

    Args:
        path: file to append to.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._file = _opened(path)

    def open(self, notes: list[str]) -> None:
        """Write the notes."""
        self._write({"kind": "open", "notes": notes})

    def step(self, record: Record) -> None:
        """Write the step with the numbers of every parameter."""
        self._write(
            {
                "kind": "step",
                "optimizer": record.optimizer,
                "step": record.step,
                "seconds": record.seconds,
                "total_norm": record.total_norm,
                "total_before_clip": record.total_before_clip,
                "loss_scale": record.loss_scale,
                "skipped": record.skipped,
                "verdict": record.verdict.state,
                "parameters": {
                    name: {"rms": rms, "mean_abs": mean, "norm_before_clip": before, "state": state}
                    for name, rms, mean, before, state in zip(
                        record.names,
                        record.rms.tolist(),
                        record.mean_abs.tolist(),
                        record.norm_before_clip.tolist(),
                        record.states,
                    )
                },
            }
        )

    def event(self, event: VerdictEvent) -> None:
        """Write the change of the state."""
        verdict = event.verdict
        self._write(
            {
                "kind": "event",
                "step": event.step,
                "before": event.before,
                "state": verdict.state,
                "basis": verdict.basis,
                "where": verdict.where,
                "reason": verdict.reason,
            }
        )

    def close(self, history: History) -> None:
        """Write the last verdict and close the file."""
        self._write({"kind": "close", "recorded": len(history), "state": history.verdict.state})
        self._file.close()

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(_finite(entry), allow_nan=False) + "\n")
        self._file.flush()


def _opened(path: str | os.PathLike[str]) -> IO[str]:
    try:
        return open(path, "a", encoding="utf-8", newline="")
    except OSError as error:
        raise SkipscopeError(
            "watch", f"cannot write {path}: {error.strerror}", cure="choose a file in a folder that exists"
        ) from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Csv:
    """Sink that writes a CSV table for pandas: per recorded step a row for each parameter, and a total row.

    In the total row, ``parameter`` is empty and ``rms`` holds the total norm.

    Args:
        path: file to append to.
    """

    COLUMNS = ("step", "optimizer", "seconds", "parameter", "rms", "mean_abs", "norm_before_clip", "state")

    def __init__(self, path: str | os.PathLike[str]):
        self._file = _opened(path)
        self._rows = csv.writer(self._file)
        if not self._file.tell():
            self._rows.writerow(self.COLUMNS)

    def open(self, notes: list[str]) -> None:
        """Nothing to say."""

    def step(self, record: Record) -> None:
        """Write the rows of a step."""
        start = (record.step, record.optimizer, f"{record.seconds:.3f}")
        self._rows.writerow(
            [*start, "", record.total_norm, "", record.total_before_clip, record.verdict.state]
        )
        self._rows.writerows(
            [*start, *line]
            for line in zip(
                record.names,
                record.rms.tolist(),
                record.mean_abs.tolist(),
                record.norm_before_clip.tolist(),
                record.states,
            )
        )
        self._file.flush()

    def event(self, event: VerdictEvent) -> None:
        """Do nothing: the state is in the total row."""

    def close(self, history: History) -> None:
        """Close the file."""
        self._file.close()


class Function:
    """Sink that calls a function.

    Args:
        call: function of the step and its scalars by name, called at every recorded step.
    """

    def __init__(self, call: Callable[[int, dict[str, float]], Any]):
        self.call = call

    def open(self, notes: list[str]) -> None:
        """Nothing to say."""

    def step(self, record: Record) -> None:
        """Call the function with the scalars of the step."""
        self.call(record.step, scalars(record, parameters=True))

    def event(self, event: VerdictEvent) -> None:
        """Do nothing: events are not scalars."""

    def close(self, history: History) -> None:
        """Do nothing: there is nothing to close."""


def as_sink(sink: Sink | str | Callable[[int, dict[str, float]], Any]) -> Sink:
    """Convert a short name or a function to a sink; a sink is returned unchanged.

    Raises:
        SkipscopeError: the sink is unknown.
        MissingExtra: the package of the sink is not installed.
    """
    if not isinstance(sink, str):
        if isinstance(sink, Sink):
            return sink
        if callable(sink) and not isinstance(sink, type):
            return Function(sink)
        raise SkipscopeError(
            "watch",
            "this is not a sink",
            expected="callable(step, values), or an object with open, step, event and close",
            got=repr(sink)[:60],
            cure='sinks=["terminal"], or sinks=[lambda step, values: ...]',
        )
    name, _, rest = sink.partition(":")
    ending = Path(sink).suffix.lower()
    if sink == "terminal":
        return Terminal()
    if ending in _BY_ENDING:
        return _BY_ENDING[ending](sink)
    if name in _BY_NAME and (not rest or name == "tensorboard"):
        adapter = getattr(importlib.import_module(f"skipscope.monitor.{name}"), _BY_NAME[name])
        return adapter(rest) if rest else adapter()
    raise SkipscopeError(
        "watch",
        f"there is no sink {sink!r}",
        expected=", ".join(SINKS) + ", any callable(step, values), or an object",
        cure=f'sinks=["run.{sink}"]' if f".{sink}" in _BY_ENDING else 'sinks=["terminal"]',
    )


# Sinks by file extension, and by the name of their module in this package.
_BY_ENDING: dict[str, Callable[[str], Sink]] = {".jsonl": JsonLines, ".csv": Csv}
_BY_NAME = {"tensorboard": "TensorBoard", "wandb": "WandB", "mlflow": "MLflow", "trackio": "Trackio"}
# Short names as a user writes them, for the error and the documentation.
SINKS = ("terminal", "run.jsonl", "run.csv", "tensorboard:FOLDER", "wandb", "mlflow", "trackio")
