"""Recorded step for sinks, and its scalars for loggers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from skipscope.monitor.history import STATES, LiveVerdict
from skipscope.monitor.history._history import total_of
from skipscope.monitor.history._history_reader import states_of
from skipscope.monitor.recording._step_row import SCALARS
from skipscope.monitor.recording._tracked_parameters import TrackedParameters


@dataclass(frozen=True, eq=False)
class Record:
    """A recorded step, as sinks receive it.

    Attributes:
        optimizer: index of the optimizer.
        step: step of that optimizer.
        seconds: seconds since the watch began.
        names: names of its parameters; ``[P]``.
        rms, mean_abs, norm_before_clip: RMS, mean |g| and norm before clipping of each gradient; NaN if there
            is no gradient or the value is unknown; ``[P]``.
        states: state of each gradient; ``[P]``.
        total_norm: L2 norm of all gradients together.
        total_before_clip: total norm measured by ``clip_grad_norm_``; NaN if unknown.
        loss_scale: scale of GradScaler, already divided out; NaN without a scaler.
        skipped: whether GradScaler skipped this step.
        verdict: verdict before this step.
    """

    optimizer: int
    step: int
    seconds: float
    names: tuple[str, ...]
    rms: np.ndarray
    mean_abs: np.ndarray
    norm_before_clip: np.ndarray
    states: tuple[str, ...]
    total_norm: float
    total_before_clip: float
    loss_scale: float
    skipped: bool
    verdict: LiveVerdict

    @classmethod
    def of(cls, optimizer: int, tracked: TrackedParameters, row: np.ndarray, verdict: LiveVerdict) -> Record:
        """Build a record from a row of the history."""
        P, S = len(tracked.names), len(SCALARS)
        norm, mean, before = (row[S + k * P : S + (k + 1) * P] for k in range(3))
        scalars = dict(zip(SCALARS, row.tolist()))
        states = states_of(mean, np.array(tracked.tiny))
        return cls(
            optimizer,
            int(scalars["step"]),
            scalars["seconds"],
            tracked.names,
            norm / np.sqrt(tracked.sizes),
            np.where(mean < 0, np.nan, mean),
            before,
            tuple(STATES[int(code)] for code in states),
            float(total_of(norm, states)),
            scalars["total_before_clip"],
            scalars["loss_scale"],
            bool(scalars["skipped"]),
            verdict,
        )


def scalars(record: Record, *, parameters: bool) -> dict[str, float]:
    """Scalars of a record by name; values that are not finite are left out, because most loggers refuse them.

    Args:
        record: the recorded step.
        parameters: whether to include the RMS and mean |g| of each parameter.
    """
    which = f"optimizer{record.optimizer}/" if record.optimizer else ""
    values = {
        f"gradients/{which}total_norm": record.total_norm,
        f"gradients/{which}total_norm_before_clip": record.total_before_clip,
        f"gradients/{which}loss_scale": record.loss_scale,
        f"gradients/{which}skipped": float(record.skipped),
    }
    if parameters:
        for name, rms, mean in zip(record.names, record.rms.tolist(), record.mean_abs.tolist()):
            values[f"gradient_rms/{name}"], values[f"gradient_mean_abs/{name}"] = rms, mean
    return {key: value for key, value in values.items() if math.isfinite(value)}
