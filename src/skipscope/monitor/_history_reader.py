"""From columns to a :class:`History`: of a live monitor, and of a folder on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from skipscope._errors import SkipscopeError
from skipscope.monitor import _live_verdict
from skipscope.monitor._history import STATES, History, LiveVerdict, VerdictEvent
from skipscope.monitor._row_files import most_rows, read_rows
from skipscope.monitor._step_row import SCALARS

# How many of the last steps a verdict from parameter gradients looks at.
WINDOW = 8
ABOUT = "monitor.json"
EVENTS = "events.jsonl"

Columns = Sequence[tuple[dict[str, Any], np.ndarray]]  # (what the columns are, [rows, width])


def assemble(
    gradients: Columns, flow: Columns, events: Sequence[VerdictEvent], notes: Sequence[str], *,
    verdict: LiveVerdict | None = None, complete: bool = True,
) -> History:  # fmt: skip
    """Put columns side by side; parameters that came later are absent before.

    Args:
        gradients: one entry for each optimizer and each set of parameters it had.
        flow: one entry for each set of boundaries.
        events: when the state changed.
        notes: what a reader should know.
        complete: whether the run is over.
        verdict: the live one; by default it is judged anew.
    """
    place: dict[tuple[int, str], tuple[Any, ...]] = {}
    for about, _ in gradients:
        for i, name in enumerate(about["names"]):
            key = (about["optimizer"], name)
            place.setdefault(key, (about["order"][i], len(place), about, i))
    keys = sorted(place, key=lambda key: place[key][:2])
    column = {key: k for k, key in enumerate(keys)}
    blocks = [_block(about, rows, column) for about, rows in gradients]
    joined = np.concatenate(blocks) if blocks else np.empty((0, len(SCALARS) + 1 + 4 * len(keys)))
    joined = joined[np.argsort(joined[:, SCALARS.index("seconds")], kind="stable")]
    P, S = len(keys), len(SCALARS) + 1
    norm, mean, before, states = (joined[:, S + k * P : S + (k + 1) * P] for k in range(4))
    step, seconds, evaluations, skipped, scale, total, owner = joined[:, :S].T
    names, flow_rows = _flow(flow)

    def of(key: tuple[int, str], what: str) -> Any:
        about, i = place[key][2:]
        return about[what][i]

    history = History(
        parameters=tuple(name for _, name in keys),
        shapes=tuple(tuple(of(key, "shapes")) for key in keys),
        owners=tuple(owner for owner, _ in keys), groups=tuple(of(key, "groups") for key in keys),
        roles=tuple(of(key, "roles") if "roles" in place[key][2] else "" for key in keys),
        steps=step, seconds=seconds, optimizers=owner, norm=norm, mean_abs=mean, norm_before_clip=before,
        states=states, total_before_clip=total, loss_scale=scale, skipped=skipped, evaluations=evaluations,
        boundaries=names, flow_steps=flow_rows[:, 0], flow=flow_rows[:, 1:], verdict=verdict or _live_verdict.UNKNOWN,
        events=tuple(events), notes=tuple(notes), complete=complete,
    )  # fmt: skip
    return history if verdict is not None else _judged(history)


def _block(about: dict[str, Any], rows: np.ndarray, column: dict[tuple[int, str], int]) -> np.ndarray:
    """A file's rows in the history's columns: scalars, optimizer, then norm, mean, before and states, each [P]."""
    P, p, S = len(column), len(about["names"]), len(SCALARS)
    out = np.full((len(rows), S + 1 + 4 * P), np.nan)
    out[:, :S], out[:, S] = rows[:, :S], about["optimizer"]
    norm, mean, before = (rows[:, S + k * p : S + (k + 1) * p] for k in range(3))
    states = states_of(mean, np.array(about["tiny"]))
    at = [column[about["optimizer"], name] for name in about["names"]]
    out[:, S + 1 + 3 * P :] = STATES.index("absent")
    for k, block in enumerate((norm, np.where(states_without_gradient(mean), np.nan, mean), before, states)):
        out[:, [S + 1 + k * P + i for i in at]] = block
    return out


def states_without_gradient(mean: np.ndarray) -> np.ndarray:
    """Where a row says that there was no gradient: mean |g| is then minus the state's number."""
    return mean < 0


def states_of(mean: np.ndarray, tiny: np.ndarray) -> np.ndarray:
    """Index into STATES of each gradient, from its mean |g| and its dtype's smallest normal number."""
    states = np.full(mean.shape, float(STATES.index("ok")))
    states[mean < tiny] = STATES.index("underflow")
    states[mean == 0] = STATES.index("exact_zero")
    states[~np.isfinite(mean)] = STATES.index("nonfinite")
    none = states_without_gradient(mean)
    states[none] = -mean[none]
    return states


def _flow(flow: Columns) -> tuple[tuple[str, ...], np.ndarray]:
    """The flow's boundaries and ``[rows, 1 + B]``; when the boundaries changed, of the last set."""
    if not flow:
        return (), np.empty((0, 1))
    about, rows = flow[-1]
    return tuple(about["names"]), rows


def _judged(history: History) -> History:
    return replace(history, verdict=verdict_of(history))


def verdict_of(history: History, was: str = "unknown") -> LiveVerdict:
    """The verdict on a history: from its flow where it has one, else from its parameters' gradients."""
    of_parameters = _verdict_of_parameters(history, was)
    if not len(history.flow_steps):
        return of_parameters
    step = int(history.flow_steps[-1])
    if of_parameters.step > step and of_parameters.state in {"nonfinite", "dead", "unconnected"}:
        return of_parameters  # the flow was last read before this happened
    return _live_verdict.judge_flow(history.boundaries, history.flow[-1], step, was)


def _verdict_of_parameters(history: History, was: str) -> LiveVerdict:
    """From the biases of linear maps and convolutions, where there are some to compare; else from the weights."""
    if not len(history):
        return _live_verdict.UNKNOWN
    everyone = range(len(history.shapes))
    matrices = [i for i in everyone if len(history.shapes[i]) > 1]
    # The gradient of an embedding is that of a few rows, by chance of the shape of other weights.
    weights = [i for i in matrices if history.roles[i] != "table"] or matrices or list(everyone)
    # What is not finite counts wherever it is.
    broken = (history.states[-WINDOW:] == STATES.index("nonfinite")).any(axis=0)
    weights = [i for i in everyone if i in set(weights) or broken[i]]
    of_weights = _judged_by(history, weights, [history.shapes[i] for i in weights], was, "weights")
    if of_weights.state in {"nonfinite", "dead", "unconnected"}:
        return of_weights
    biases = [i for i in everyone if history.roles[i] == "bias"]
    alike = [(history.shapes[i], re.sub(r"\d+", "#", history.parameters[i])) for i in biases]
    of_biases = _judged_by(history, biases, alike, was, "biases")
    return of_weights if of_biases.state in {"unknown", "nonfinite", "dead", "unconnected"} else of_biases


def _judged_by(history: History, chosen: list[int], alike: Sequence[Any], was: str, what: str) -> LiveVerdict:
    """The verdict from the last steps of some parameters; those with the same entry in ``alike`` can be compared."""
    rms, states = np.full((WINDOW, len(chosen)), np.nan), np.full((WINDOW, len(chosen)), np.nan)
    everything = history.rms
    for owner in set(history.owners):
        own = np.flatnonzero((history.optimizers == owner) & (history.skipped == 0))[-WINDOW:]
        if not len(own):
            own = np.flatnonzero(history.optimizers == owner)[-WINDOW:]
            if len(own) < WINDOW:
                continue  # a scaler skips its first few steps while it looks for its scale
        its = [k for k, i in enumerate(chosen) if history.owners[i] == owner]
        at = own[:, None], np.array([chosen[k] for k in its], dtype=int)
        rms[-len(own) :, its], states[-len(own) :, its] = everything[at], history.states[at]
    names = [history.parameters[i] for i in chosen]
    return _live_verdict.judge_gradients(names, alike, rms, states, int(history.steps[-1]), was, what)


def read_history(path: Path, *, all_rows: bool = False) -> History | None:
    """The history that a monitor writes to a folder, also while it runs or after it was killed; None if it is not one.

    Of a long run every second, or fourth, ... row is read, as many as a live history would hold; a note says so. Local.

    Args:
        path: the folder.
        all_rows: read every row.

    Raises:
        SkipscopeError: it is one, but damaged.
    """
    path = Path(path)
    if not (path / ABOUT).is_file():
        return None
    try:
        notes = list(json.loads((path / ABOUT).read_text(encoding="utf-8"))["notes"])
        gradients = _files(path, "gradients", all_rows, notes)
        flow = _files(path, "flow", all_rows, [])
        events, closed = _events(path / EVENTS)
        notes += [] if closed else ["The run that writes this is not over, or was cut short."]
        return assemble(gradients, flow, events, notes, complete=closed)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise SkipscopeError(
            "load", f"{path} is a monitor's folder, but damaged ({type(error).__name__}: {error})"
        ) from error


def _files(
    folder: Path, kind: str, all_rows: bool, notes: list[str]
) -> list[tuple[dict[str, Any], np.ndarray]]:
    found = []
    for file in sorted(folder.glob(f"{kind}-*.rows")):
        with open(file, "rb") as begun:
            first = begun.readline()
        if not first.endswith(b"\n"):
            continue  # just begun
        about, rows, whole = read_rows(file, None if all_rows else most_rows(len(json.loads(first)["names"])))
        found.append((about, rows))
        if len(rows) < whole:
            notes.append(
                f"{len(rows):,} of {whole:,} rows of {file.name} are here; "
                "skipscope.monitor.read_history(folder, all_rows=True) gives all."
            )
    return found


def _events(file: Path) -> tuple[list[VerdictEvent], bool]:
    """(events, whether the monitor was closed); a torn last line is left out."""
    events, closed = [], False
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        entry = json.loads(line)
        if entry.get("closed"):
            closed = True
            continue
        found = dict(entry["verdict"])
        if found.get("slope_interval") is not None:
            found["slope_interval"] = tuple(float(v) for v in found["slope_interval"])
        events.append(VerdictEvent(entry["step"], entry["before"], LiveVerdict(**found)))
    return events, closed
