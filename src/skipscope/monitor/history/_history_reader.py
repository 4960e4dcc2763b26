"""Assembly of a :class:`History` from columns of a live monitor or of a folder on disk, and its verdict."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from skipscope._errors import SkipscopeError
from skipscope._files import refuse_devices
from skipscope._option_words import LiveState
from skipscope._result import refuse_later_format
from skipscope.flow import WEIGHTS_PER_NORM, Reach, Starved, starved_of
from skipscope.monitor.history import _live_verdict
from skipscope.monitor.history._history import STATES, History, LiveVerdict, VerdictEvent
from skipscope.monitor.history._live_verdict import Place
from skipscope.monitor.history._row_files import columns_of, most_rows, read_rows, unsealed
from skipscope.monitor.recording._missing_gradients import MissingGradients
from skipscope.monitor.recording._step_row import SCALARS
from skipscope.monitor.recording._weight_lines import WeightLines

# Number of last steps in a verdict from parameter gradients.
WINDOW = 8
# Value in flow_norm for a boundary that was not part of the row's pass.
NOT_RUN = -1.0
# A gradient this much smaller than others, relative to the weight, is rounding (float32 has 7 digits).
_ROUNDING = 1e-7
ABOUT = "monitor.json"
EVENTS = "events.jsonl"
# Since format 3, rows and lines have checksums.
FORMAT = 3
_EXPECTED = "a file that a monitor wrote"

Columns = Sequence[tuple[dict[str, Any], np.ndarray]]  # (what the columns are, [rows, width])


def assemble(
    gradients: Columns,
    flow: Columns,
    events: Sequence[VerdictEvent],
    notes: Sequence[str],
    *,
    verdict: LiveVerdict | None = None,
    complete: bool = True,
    lines: WeightLines | None = None,
) -> History:
    """Join columns into a history; a parameter that was added later is absent in earlier rows.

    Args:
        gradients: an entry for each optimizer and each set of its parameters.
        flow: an entry for each set of boundaries.
        events: changes of the state.
        notes: remarks for the reader.
        complete: whether the run is over.
        verdict: the live verdict; by default the history is judged again.
        lines: towers and order of execution of the parameters, if known.
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
    names, flow_rows, flow_owners, flow_norm, flow_relative, reach = _flow(flow)

    def of(key: tuple[int, str], what: str) -> Any:
        about, i = place[key][2:]
        return about[what][i]

    history = History(
        parameters=tuple(name for _, name in keys),
        shapes=tuple(tuple(of(key, "shapes")) for key in keys),
        owners=tuple(owner for owner, _ in keys),
        groups=tuple(of(key, "groups") for key in keys),
        roles=tuple(of(key, "roles") if "roles" in place[key][2] else "" for key in keys),
        steps=step,
        seconds=seconds,
        optimizers=owner,
        norm=norm,
        mean_abs=mean,
        norm_before_clip=before,
        states=states,
        total_before_clip=total,
        loss_scale=scale,
        skipped=skipped,
        evaluations=evaluations,
        boundaries=names,
        flow_steps=flow_rows[:, 0],
        flow=flow_rows[:, 1:],
        verdict=verdict or _live_verdict.UNKNOWN,
        events=tuple(events),
        notes=tuple(notes),
        complete=complete,
        chains=tuple(of(key, "chains") if "chains" in place[key][2] else "" for key in keys),
        kinds=tuple(place[key][2].get("kind", "") for key in keys),
        flow_norm=flow_norm,
        flow_relative=flow_relative,
        flow_owners=flow_owners,
        hidden=tuple(_of_boundary(flow, name, "hidden", True) for name in names),
        averaging=tuple(_of_boundary(flow, name, "averaging", 0.0) for name in names),
        lines=tuple(_of_boundary(flow, name, "lines", 0) for name in names),
        normed=any(about.get("normed", False) for about, _ in flow[-1:]),
        recurrent=next((about.get("recurrent", "") for about, _ in flow[-1:]), ""),
        reach=reach,
    )
    return history if verdict is not None else replace(history, verdict=verdict_of(history, lines=lines))


def _block(about: dict[str, Any], rows: np.ndarray, column: dict[tuple[int, str], int]) -> np.ndarray:
    """Rows of a file in the columns of the history: scalars, optimizer, norm, mean, before, states."""
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
    """Mask of entries without a gradient: mean |g| is then minus the number of the state."""
    return mean < 0


def states_of(mean: np.ndarray, tiny: np.ndarray) -> np.ndarray:
    """Index into STATES of each gradient, from its mean |g| and the smallest normal number of its dtype."""
    states = np.full(mean.shape, float(STATES.index("ok")))
    states[mean < tiny] = STATES.index("underflow")
    states[mean == 0] = STATES.index("exact_zero")
    states[~np.isfinite(mean)] = STATES.index("nonfinite")
    none = states_without_gradient(mean)
    states[none] = -mean[none]
    return states


def _flow(flow: Columns) -> tuple[tuple[str, ...], *tuple[np.ndarray, ...]]:
    """Join the flow readings of all sets of boundaries.

    Returns:
        Names, nearest the input first; step and RMS ``[rows, 1 + B]``; owners; norms and norms of
        gradient times activation ``[rows, B]``; reach ``[rows, 3]``.
    """
    names: list[str] = []
    for about, _ in reversed(flow):
        place = 0
        for name in about["names"]:
            if name not in names:
                names.insert(place, name)
            place = names.index(name) + 1
    blocks, owners, norms, relatives, reaches = [], [], [], [], []
    for about, rows in flow:
        own, B = about["names"], len(about["names"])
        at = [names.index(name) for name in own]
        block, norm = np.full((len(rows), 1 + len(names)), np.nan), np.full((len(rows), len(names)), NOT_RUN)
        block[:, 0] = rows[:, 0]
        block[:, [1 + i for i in at]] = rows[:, 1 : 1 + B]
        norm[:, at] = rows[:, 1 + B : 1 + 2 * B] if rows.shape[1] > 1 + B else rows[:, 1:]
        relative = np.full((len(rows), len(names)), np.nan)
        width = rows.shape[1]  # earlier versions kept less
        if width in {3 + 3 * B, 4 + 3 * B}:
            relative[:, at] = rows[:, 1 + 2 * B : 1 + 3 * B]
        kept = 3 if width == 4 + 3 * B else 2 if width in {3 + 2 * B, 3 + 3 * B} else 0
        reach = np.full((len(rows), 3), np.nan)
        reach[:, :kept] = rows[:, width - kept :]
        reaches.append(reach)
        relatives.append(relative)
        blocks.append(block)
        norms.append(norm)
        owners.append(np.full(len(rows), float(about.get("optimizer", 0))))
    if not blocks:
        return (), np.empty((0, 1)), np.empty(0), np.empty((0, 0)), np.empty((0, 0)), np.empty((0, 3))
    joined = np.concatenate(blocks)
    order = np.argsort(joined[:, 0], kind="stable")
    columns = (np.concatenate(column)[order] for column in (owners, norms, relatives, reaches))
    return tuple(names), joined[order], *columns


def _of_boundary(flow: Columns, name: str, what: str, default: Any) -> Any:
    about = next(about for about, _ in reversed(flow) if name in about["names"])
    return about[what][about["names"].index(name)] if what in about else default


def verdict_of(
    history: History,
    was: LiveVerdict = _live_verdict.UNKNOWN,
    found: Mapping[int, MissingGradients] | None = None,
    *,
    is_early: bool = False,
    lines: WeightLines | None = None,
    sizes: Mapping[str, float] | None = None,
    is_damped: bool = False,
) -> LiveVerdict:
    """Judge the last rows of a history: a verdict for each chain, and the worst state for the whole.

    Args:
        history: the history.
        was: previous verdict, used for hysteresis.
        found: optimizer -> why gradients are missing, if known.
        is_early: whether zero and missing gradients are not judged yet, as parts may start at zero by design.
        sizes: L2 norms of the weights, to find starved weights; by default these are not searched.
        lines: towers and order of execution of the parameters; by default a single tower in the model's
            order.
        is_damped: whether trained scales damp branches by design (layer scale): a fall of the flow is none.
    """
    names = list(dict.fromkeys(history.chains or ("",) * len(history.parameters)))
    before: dict[str, LiveState] = {v.chain: v.state for v in was.chains} or {"": was.state}
    verdicts = []
    for name in names or [""]:
        part = [i for i in range(len(history.parameters)) if not history.chains or history.chains[i] == name]
        so_far = before.get(name, was.state if len(names) < 2 else "unknown")
        verdict = _verdict_of_chain(
            history, part, so_far, found or {}, is_early, lines or {}, sizes or {}, is_damped
        )
        kinds = {history.kinds[i] for i in part} if history.kinds else {""}
        verdicts.append(_live_verdict.for_optimizer(verdict, kinds, name))
    if len(verdicts) == 1:
        return replace(verdicts[0], chain="")
    worst = max(verdicts, key=lambda v: _live_verdict.badness(v.state))
    return replace(worst, chains=tuple(verdicts))


def _verdict_of_chain(
    history: History,
    part: Sequence[int],
    was: LiveState,
    found: Mapping[int, MissingGradients],
    is_early: bool,
    lines: WeightLines,
    sizes: Mapping[str, float],
    is_damped: bool,
) -> LiveVerdict:
    """Judge a chain by its flow if that was read, otherwise by the gradients of its parameters."""
    owners = {history.owners[i] for i in part}
    causes = [cause for owner in owners if (cause := found.get(owner)) is not None]
    unused = {name for cause in causes for name in cause.unused}
    part = [i for i in part if history.parameters[i] not in unused]
    towers = _lines(history, part, lines)
    hungry = [_starved(history, tower, sizes) for tower in towers]
    judged = [
        _verdict_of_tower(history, tower, was, is_early, less, lines) for tower, less in zip(towers, hungry)
    ]
    of_parameters = max(judged, key=_live_verdict.severity)
    for cause in causes:
        if of_parameters.state in {"dead", "unconnected"} and cause.cause != "unused":
            of_parameters = replace(of_parameters, finding="", reason=cause.reason, advice=cause.advice)
    first = {}
    for i, owner in enumerate(history.owners):
        first.setdefault(owner, history.chains[i] if history.chains else "")
    mine = [
        k
        for k, owner in enumerate(history.flow_owners.tolist())
        if owner in owners
        and part
        and first.get(int(owner)) == (history.chains[part[0]] if history.chains else "")
    ]
    if not mine:
        return of_parameters
    step = int(history.flow_steps[mine[-1]])
    if of_parameters.step > step and of_parameters.state in {"nonfinite", "dead", "unconnected"}:
        return of_parameters  # the flow was last read before this happened
    values = history.flow_norm[mine[-1]]
    own = np.flatnonzero(values != NOT_RUN)
    places = [
        Place(
            history.boundaries[i],
            history.hidden[i],
            history.averaging[i] if history.averaging else 0.0,
            history.lines[i] if history.lines else 0,
        )
        for i in own
    ]
    steps, length, growth = history.reach[mine[-1]] if len(history.reach) else [math.nan] * 3
    reach = None
    if math.isfinite(length):
        steps = int(steps) if math.isfinite(steps) else None
        reach = Reach(history.recurrent, steps, int(length), growth if growth > 0 else 0.0)
    relative = history.flow_relative[mine[-1]][own] if len(history.flow_relative) else ()
    of_flow = _live_verdict.judge_flow(
        places,
        values[own],
        step,
        was,
        normed=history.normed,
        reach=reach,
        is_early=is_early or step == 1,
        relative=relative,
        starved=max(hungry, key=lambda one: one.share),
    )
    return of_parameters if is_damped and of_flow.state == "vanishing" else of_flow


def _lines(history: History, part: Sequence[int], lines: WeightLines) -> list[list[int]]:
    """The parameters of each tower, in order of execution; parameters of no known tower are in all towers."""
    names = history.parameters
    towers = sorted({tower for i in part if names[i] in lines for tower in lines[names[i]][0]})
    if not towers:
        return [list(part)]
    places = {i: lines.get(names[i], (towers, i, 0)) for i in part}
    return [
        sorted((i for i in part if tower in places[i][0]), key=lambda i: places[i][1]) for tower in towers
    ]


def _verdict_of_tower(
    history: History, tower: list[int], was: LiveState, is_early: bool, starved: Starved, lines: WeightLines
) -> LiveVerdict:
    """Judge a tower as a whole, or each of its stretches, of which all but the last are branches."""
    whole = _verdict_of_parameters(history, tower, was, is_early, starved, bool(lines))
    stretches: dict[int, list[int]] = {}
    for i in tower:
        stretches.setdefault(lines.get(history.parameters[i], ((), i, -1))[2], []).append(i)
    if whole.state not in {"vanishing", "exploding"} or len(stretches) < 2:
        return whole
    # Weights of different shapes are only compared along a whole tower.
    usual = [Counter(history.shapes[i] for i in stretch) for stretch in stretches.values()]
    alike = [s for s, counts in zip(stretches.values(), usual) if max(counts.values()) >= _live_verdict.ALIKE]
    judged = [_verdict_of_parameters(history, stretch, was, is_early, starved, True) for stretch in alike]
    return max(judged, key=_live_verdict.severity, default=whole)


def _starved(history: History, tower: Sequence[int], sizes: Mapping[str, float]) -> Starved:
    """Weights of a tower with a tiny gradient for their size; weights with gradient 0 may just be unused."""
    typical: dict[int, np.ndarray] = {}  # of every parameter, by optimizer
    for owner in {history.owners[i] for i in tower}:
        own = np.flatnonzero(history.optimizers == owner)[-WINDOW:]
        if len(own):
            typical[owner] = np.median(history.norm[own], axis=0)
    ratio = {}
    for i in tower:
        name, owner = history.parameters[i], history.owners[i]
        norm = float(typical[owner][i]) if owner in typical else math.nan
        if name in sizes and math.isfinite(norm) and norm > 0 and sizes[name] > 0:
            ratio[name] = norm / sizes[name]
    # Rounding is no gradient: queries and keys that attend to a single position get 0, or its rounding.
    least = _ROUNDING * float(np.median([*ratio.values()])) if ratio else 0.0
    ratio = {name: value for name, value in ratio.items() if value > least}
    return starved_of(ratio, [(name,) for name in ratio])


def _verdict_of_parameters(
    history: History, part: Sequence[int], was: LiveState, is_early: bool, starved: Starved, is_ordered: bool
) -> LiveVerdict:
    """Judge by comparable biases of linear layers and convolutions, otherwise by weights."""
    if not len(history) or not part:
        return _live_verdict.UNKNOWN
    matrices = [i for i in part if len(history.shapes[i]) > 1]
    # Only a few rows of an embedding have a gradient, even if its shape equals that of other weights.
    weights = [i for i in matrices if history.roles[i] != "table"] or matrices or list(part)
    # A gradient that is not finite counts in any parameter.
    broken = (history.states[-WINDOW:] == STATES.index("nonfinite")).any(axis=0)
    weights = [i for i in part if i in set(weights) or broken[i]]
    shapes = [history.shapes[i] for i in weights]
    is_normed = len(matrices) <= WEIGHTS_PER_NORM * sum(history.roles[i] == "norm" for i in part)
    judged_by = partial(
        _judged_by, is_early=is_early, starved=starved, is_ordered=is_ordered, normed=is_normed
    )
    of_weights = judged_by(history, weights, shapes, was, "weights")
    biases = [i for i in part if history.roles[i] == "bias"]
    if of_weights.state == "dead":
        return _dead_at(history, biases, was, is_early) or of_weights
    if of_weights.state in {"nonfinite", "unconnected"}:
        return of_weights
    alike = [(history.shapes[i], re.sub(r"\d+", "#", history.parameters[i])) for i in biases]
    of_biases = judged_by(history, biases, alike, was, "biases")
    return of_weights if of_biases.state in {"unknown", "nonfinite", "dead", "unconnected"} else of_biases


def _dead_at(history: History, biases: Sequence[int], was: LiveState, is_early: bool) -> LiveVerdict | None:
    """Verdict on where the gradient ends, by the biases; None if they do not show it.

    A bias has gradient 0 only if no gradient arrives, a weight also if its input is 0.
    """
    shapes = [()] * len(biases)  # dead or not: nothing is compared
    found = _judged_by(history, list(biases), shapes, was, "biases", is_early, Starved())
    return found if found.state == "dead" and len(biases) > 2 else None


def _judged_by(
    history: History,
    chosen: list[int],
    alike: Sequence[Any],
    was: LiveState,
    what: str,
    is_early: bool,
    starved: Starved,
    is_ordered: bool = False,
    normed: bool = False,
) -> LiveVerdict:
    """Judge the last steps of some parameters; those with equal entries in ``alike`` can be compared."""
    rms, states = np.full((WINDOW, len(chosen)), np.nan), np.full((WINDOW, len(chosen)), np.nan)
    everything = history.rms
    last = 0
    for owner in {history.owners[i] for i in chosen}:
        own = np.flatnonzero((history.optimizers == owner) & (history.skipped == 0))[-WINDOW:]
        if not len(own):
            own = np.flatnonzero(history.optimizers == owner)[-WINDOW:]
            if len(own) < WINDOW:
                continue  # a scaler skips its first few steps while it looks for its scale
        last = max(last, int(history.steps[own[-1]]))
        its = [k for k, i in enumerate(chosen) if history.owners[i] == owner]
        at = own[:, None], np.array([chosen[k] for k in its], dtype=int)
        rms[-len(own) :, its], states[-len(own) :, its] = everything[at], history.states[at]
    names = [history.parameters[i] for i in chosen]
    return _live_verdict.judge_gradients(
        names,
        alike,
        rms,
        states,
        last or int(history.steps[-1]),
        was,
        what,
        is_early=is_early,
        is_ordered=is_ordered,
        normed=normed,
        starved=starved,
    )


def read_history(path: Path, *, all_rows: bool = False) -> History | None:
    """Read the history in a monitor's folder, even during the run or after a crash. Local.

    Of a long run only every second, fourth, ... row is read, as many as a live history holds; a note says so.

    Args:
        path: the folder.
        all_rows: whether to read every row.

    Returns:
        The history, or None if the folder holds none.

    Raises:
        SkipscopeError: the history is damaged or of a later format.
    """
    path = Path(path)
    if not (path / ABOUT).is_file():
        return None
    try:
        about, damage = read_about(path)
        notes = [*about["notes"], *damage]
        gradients = _files(path, "gradients", all_rows, notes)
        flow = _files(path, "flow", all_rows, notes)
        events, end, lines = _events(path / EVENTS, notes)
        notes += (
            ["The run that writes this is not over, or was cut short."]
            if end is None
            else [note for note in end.get("notes", ()) if note not in notes]
        )
        verdict = None if end is None or "verdict" not in end else _verdict_from(end["verdict"])
        history = assemble(
            gradients, flow, events, notes, verdict=verdict, complete=end is not None, lines=lines
        )
        str(history)  # a value of another type may fail only where it is used
        return history
    except SkipscopeError:
        raise
    except Exception as error:  # any damaged file must end here, whatever it holds
        raise SkipscopeError(
            "load", f"{path} is a monitor's folder, but damaged ({type(error).__name__}: {error})"
        ) from error


def read_about(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Read the description of a monitor's folder. Returns it with notes on damage.

    Raises:
        SkipscopeError: the folder was written in a later format.
        ValueError: the description is not a JSON object.
    """
    refuse_devices(folder / ABOUT, operation="load", expected=_EXPECTED)
    text = (folder / ABOUT).read_text(encoding="utf-8")
    about = json.loads(text)
    if not isinstance(about, dict):
        raise ValueError(f"{ABOUT} holds {type(about).__name__}, not names and values")
    refuse_later_format(about, FORMAT, str(folder))
    try:
        return unsealed(text), []
    except ValueError:
        return about, [f"{ABOUT} has changed since it was written: its checksum is not that of its data."]


def _files(
    folder: Path, kind: str, all_rows: bool, notes: list[str]
) -> list[tuple[dict[str, Any], np.ndarray]]:
    found: list[tuple[dict[str, Any], np.ndarray]] = []
    for file in sorted(folder.glob(f"{kind}-*.rows")):
        if _is_empty(file):
            continue
        refuse_devices(file, operation="load", expected=_EXPECTED)
        with open(file, "rb") as begun:
            first = begun.readline()
        if (columns := columns_of(first, file.name)) is None:
            continue
        keep = None if all_rows else most_rows(len(columns["names"]))
        about, rows, whole, changed = read_rows(file, keep)
        if (resumed := about.get("resumed_at")) is not None:
            # Steps after the checkpoint from which the run was resumed were repeated.
            found = [
                (other, kept[kept[:, 0] <= resumed] if other.get("resumed_at", -1) < resumed else kept)
                for other, kept in found
            ]
        found.append((about, rows))
        if changed:
            notes.append(
                f"{changed:,} rows of {file.name} have changed since they were written: their checksums are "
                "not those of their numbers. They are left out."
            )
        if len(rows) + changed < whole and kind == "gradients":
            notes.append(
                f"{len(rows):,} of {whole:,} rows of {file.name} are here; "
                "skipscope.monitor.read_history(folder, all_rows=True) gives all."
            )
    return found


def _is_empty(file: Path) -> bool:
    return file.is_file() and not file.stat().st_size


def _events(
    file: Path, notes: list[str]
) -> tuple[list[VerdictEvent], dict[str, Any] | None, WeightLines | None]:
    """Read the events, the monitor's closing entry and the parameters' lines.

    An incomplete last line is skipped; a damaged line is skipped with a note.
    """
    events, end, lines = [], None, None
    if not file.exists() or _is_empty(file):
        return [], None, None
    refuse_devices(file, operation="load", expected=_EXPECTED)
    *whole, _ = file.read_bytes().split(b"\n")
    changed = 0
    for line in whole:
        try:
            entry = unsealed(line)
        except ValueError:
            changed += 1
            continue
        if "lines" in entry:
            lines = {name: _line_from(place) for name, place in entry["lines"].items()}
            continue
        if "closed" in entry or "resumed" in entry:
            end = entry if "closed" in entry else None
            continue
        events.append(VerdictEvent(entry["step"], entry["before"], _verdict_from(entry["verdict"])))
    if changed:
        notes.append(
            f"{changed:,} lines of {file.name} have changed since they were written, and are left out."
        )
    return events, end, lines


def _line_from(place: list[Any]) -> tuple[tuple[int, ...], int, int]:
    """Earlier versions knew of one tower for each parameter, and of no stretches."""
    towers, order, stretch = [*place, 0][:3]
    return (towers,) if isinstance(towers, int) else tuple(towers), order, stretch


def _verdict_from(entry: dict[str, Any]) -> LiveVerdict:
    found = dict(entry)
    if found.get("slope_interval") is not None:
        found["slope_interval"] = tuple(float(v) for v in found["slope_interval"])
    found["hinders"] = tuple(found.get("hinders", ()))
    found["starved"] = tuple(found.get("starved", ()))
    found["chains"] = tuple(_verdict_from(chain) for chain in found.get("chains", ()))
    return LiveVerdict(**found)
