"""Numbers of an optimizer step, summed over ranks, as a row."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipscope._option_words import RecordedState
from skipscope.monitor.recording import _gradient_norms, _rank_sums
from skipscope.monitor.recording._tracked_parameters import TrackedParameters

# First columns of a row, before norm, mean |g| and norm before clipping, each [P].
SCALARS = ("step", "seconds", "evaluations", "skipped", "loss_scale", "total_before_clip")
# State of a parameter's gradient at a step; History.states holds the index.
STATES: tuple[RecordedState, ...] = (
    "ok",
    "exact_zero",
    "underflow",
    "not_connected",
    "nonfinite",
    "frozen",
    "absent",
)
# Without a gradient, mean |g| holds minus the number of the state.
_NOT_CONNECTED, _FROZEN = -STATES.index("not_connected"), -STATES.index("frozen")

# (indices of parameters, [2, n] as an array or a pending Reading)
Parts = list[tuple[list[int] | slice, Any]]


@dataclass(frozen=True, eq=False)
class Clip:
    """Call of a clipping function.

    Attributes:
        members: ids of the parameters whose gradients it changed.
        factor: factor on the gradients, or None if elements were clipped separately.
        total: total norm before clipping.
        witness: a parameter, and the address and version of its gradient just after the call.
    """

    members: frozenset[int]
    factor: Tensor | None
    total: Tensor | None
    witness: tuple[Tensor, int, int]

    def still_true(self) -> bool:
        """Whether the gradient has not changed since it was clipped."""
        parameter, address, version = self.witness
        grad = parameter.grad
        return grad is not None and (grad.data_ptr(), grad._version) == (address, version)


def clip_of(
    parameters: Sequence[Tensor], tracked: TrackedParameters, factor: Tensor | None, total: Tensor | None
) -> Clip | None:
    """Record a clipping call on tracked parameters, or return None if it did not clip any of them."""
    mine = {id(p) for p in tracked.parameters}
    touched = [p for p in parameters if id(p) in mine and p.grad is not None]
    if not touched:
        return None
    grad: Tensor = touched[0].grad  # type: ignore[assignment]
    return Clip(
        frozenset(id(p) for p in touched), factor, total, (touched[0], grad.data_ptr(), grad._version)
    )


@dataclass(eq=False)
class Step:
    """Numbers of a step, some of which may still be transferred from an accelerator.

    Attributes:
        tracked: parameters of the optimizer.
        step: number of the step.
        seconds: seconds since the watch began.
        codes: 1 if there is a gradient, otherwise minus its state; ``[P]``.
        parts: sums for the parameters of each device.
        squares: whether the first row of a part is a sum of squares instead of a norm.
        extras: further numbers: ``still_scaled`` (a factor still in the gradients), ``loss_scale``,
            ``skipped``, ``factor0``, ``total0``, ...
        clips: clipping calls on these gradients.
        evaluations: number of evaluations of the closure.
        open: whether the closure may be evaluated again.
        too_narrow: whether an accelerator's float32 could not hold a sum of squares; set by :meth:`row`.
    """

    tracked: TrackedParameters
    step: int
    seconds: float
    codes: np.ndarray
    parts: Parts
    squares: bool
    extras: dict[str, Any]
    clips: list[Clip]
    evaluations: int = 0
    open: bool = False
    too_narrow: bool = False

    def ready(self) -> bool:
        """Whether every number has arrived."""
        numbers = [*(part for _, part in self.parts), *self.extras.values()]
        return not self.open and all(n.ready() for n in numbers if isinstance(n, _gradient_norms.Reading))

    def row(self) -> np.ndarray:
        """Row for the history, ``[len(SCALARS) + 3 P]``, after waiting for pending transfers."""
        P, S = len(self.tracked.parameters), len(SCALARS)
        row = np.full(S + 3 * P, np.nan)
        norm, mean, before = row[S : S + P], row[S + P : S + 2 * P], row[S + 2 * P :]
        mean[:] = self.codes
        for places, part in self.parts:
            values = _arrived(part)
            norm[places] = np.sqrt(values[0]) if self.squares else values[0]
            mean[places] = values[1] / self.tracked.sizes[places]
        extras = {key: float(_arrived(value)) for key, value in self.extras.items()}
        there = self.codes > 0
        lost = there & (mean > 0) & (mean < np.inf) & ((norm == 0) | (norm == np.inf))
        self.too_narrow = bool(lost.any())
        norm[~there | lost] = np.nan
        norm /= extras.get("still_scaled", 1.0)
        mean /= extras.get("still_scaled", 1.0)
        mean[~there] = self.codes[~there]
        total = np.nan
        if self.clips:
            factors, total = self._clipping(extras)
            with np.errstate(divide="ignore", invalid="ignore"):
                before[:] = norm / factors
        row[:S] = (
            self.step,
            self.seconds,
            self.evaluations,
            extras.get("skipped", 0.0) > 0,
            extras.get("loss_scale", np.nan),
            total,
        )
        return row

    def _clipping(self, extras: dict[str, float]) -> tuple[np.ndarray, float]:
        """Factor of clipping on each gradient (NaN if not clipped or unknown), and total norm before."""
        factors = np.full(len(self.tracked.parameters), np.nan)
        squares = 0.0
        for k, clip in enumerate(self.clips):
            covered = np.array([id(p) in clip.members for p in self.tracked.parameters])
            so_far = np.where(np.isnan(factors), 1.0, factors)
            factors = np.where(covered, so_far * extras.get(f"factor{k}", np.nan), factors)
            squares += extras.get(f"total{k}", np.nan) ** 2
        if any(clip.factor is None for clip in self.clips):
            factors[:], squares = np.nan, np.nan
        return factors, float(np.sqrt(squares))


def _arrived(number: Any) -> Any:
    return number.array() if isinstance(number, _gradient_norms.Reading) else number


def on_its_way(number: Any) -> Any:
    """Convert a 0-dim tensor to a float, or to a Reading if it is on an accelerator."""
    if not isinstance(number, Tensor):
        return float(number)
    return float(number) if number.device.type == "cpu" else _gradient_norms.Reading(number.detach())


def codes_of(tracked: TrackedParameters, grads: Sequence[Tensor | None]) -> np.ndarray:
    """Codes ``[P]``: 1 if there is a gradient, otherwise minus the state (frozen or not connected)."""
    codes = np.ones(len(grads))
    for i in [i for i, grad in enumerate(grads) if grad is None]:
        codes[i] = _NOT_CONNECTED if tracked.parameters[i].requires_grad else _FROZEN
    return codes


def local_sums(tracked: TrackedParameters, grads: Sequence[Tensor | None], wide: bool) -> Parts:
    """L2 norms and sums of |g| of this rank's gradients, as a part for each device.

    Args:
        tracked: the parameters.
        grads: their gradients, ``[P]``.
        wide: whether to sum squares in float64 on accelerators too, after float32 was too small.
    """
    if tracked.device is not None and tracked.device.type != "cpu" and set(map(type, grads)) == {Tensor}:
        with contextlib.suppress(RuntimeError):  # not for sparse gradients
            return [(slice(None), _gradient_norms.Reading(_gradient_norms.on_device(grads, wide)))]  # type: ignore[arg-type]
    places: dict[torch.device, list[int]] = {}
    for i, grad in enumerate(grads):
        if grad is not None:
            places.setdefault(tracked.device or grad.device, []).append(i)
    parts: Parts = []
    for device, at in places.items():
        plain = [_gradient_norms.plain(grads[i]) for i in at]  # type: ignore[arg-type]
        where = slice(None) if len(at) == len(grads) else at
        if device.type == "cpu":
            parts.append((where, _gradient_norms.on_host(plain)))
        else:
            parts.append((where, _gradient_norms.Reading(_gradient_norms.on_device(plain, wide))))
    return parts


def whole_sums(grads: Sequence[Tensor | None], size: int, wide: bool) -> Parts:
    """Sums of squares and of |g| over all ranks, each element once, in one all-reduce (collective)."""
    grads = [None if grad is None else _rank_sums.whole(grad) for grad in grads]
    device = next((grad.device for grad in grads if grad is not None), torch.device("cpu"))
    weights = tuple(0.0 if grad is None else _rank_sums.weight_of(grad, size) for grad in grads)
    nothing = torch.zeros(0, device=device)
    plain = [nothing if grad is None else _gradient_norms.plain(grad) for grad in grads]
    on_host = device.type == "cpu"
    sums = (
        torch.from_numpy(_gradient_norms.on_host(plain))
        if on_host
        else _gradient_norms.on_device(plain, wide)
    )
    sums[0].square_()
    sums *= _on_device(weights, device)
    _rank_sums.all_reduced(sums)
    return [(slice(None), sums.numpy() if on_host else _gradient_norms.Reading(sums))]


@functools.lru_cache(maxsize=16)
def _on_device(weights: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(weights, dtype=torch.float64, device=device)
