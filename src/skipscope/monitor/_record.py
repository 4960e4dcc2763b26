"""One recorded step as sinks receive it, and as scalars for a logger."""

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
    """One recorded step, as sinks get it.

    Attributes:
        optimizer, step, seconds: which optimizer, its step, seconds since the watch began.
        names: of its parameters; ``[P]``.
        rms, mean_abs, norm_before_clip: of each gradient; NaN where there is none, or where it is unknown;
            ``[P]``.
        states: in words; ``[P]``.
        total_norm: L2 norm of all gradients together.
        total_before_clip: what ``clip_grad_norm_`` found; NaN where unknown.
        loss_scale: GradScaler's, already divided out; NaN without one.
        skipped: GradScaler skipped this step.
        verdict: as it was before this step.
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
        """From a row of the history."""
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
    """A record as loggers of scalars take it; what is not finite is left out, for most cannot draw it.

    Args:
        record: a step.
        parameters: each parameter's RMS and mean |g| as well.
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
