"""Readings of parts whose gradient is exactly 0 only because trained tensors start at 0.

Examples are LoRA's B, ReZero's factor, zero-initialised last norms and gates, and adaLN-zero. Such parts are
judged on a copy in which these tensors are small random numbers. If several are in series, the next gets a
gradient only after the first has moved, so the measurement is repeated.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import nn

from skipscope._subject import Subject
from skipscope.flow.passes._gradient_pass import measure
from skipscope.flow.passes._gradient_readings import Readings

ROUNDS = 4
# Size of the random numbers relative to a usual initialisation: small, so that the network hardly changes.
SIZE = 0.1
# A scale of at most this size is small by design.
TINY = 1e-3


def settled(
    readings: Readings,
    subject: Subject,
    seed: int,
    term: str = "",
    each: Callable[[Readings], None] | None = None,
) -> tuple[Readings, tuple[str, ...]]:
    """Measure a copy in which tensors that start at zero by design have moved. Returns readings and notes.

    The given readings are returned if there is no gradient of exactly 0 and no tiny scale, or if moving the
    tensors changes nothing.

    Args:
        readings: readings of the unchanged network.
        subject: subject of the readings.
        seed: seed of the random numbers drawn inside, and of those that replace zeros.
        term: term of the loss.
        each: function called with the readings of each batch.
    """
    model = subject.model
    tiny = set() if subject.ranks else tiny_scales(model)
    if subject.ranks or not (tiny or (readings.moving and _silent(readings))):
        return readings, ()
    moved: set[str] = set()
    now, kept = readings, list[Readings]()
    now.moving |= tiny
    with subject.running(seed):
        try:
            twin = copy.deepcopy(model)
            draw = torch.Generator().manual_seed(seed)
            for _ in range(ROUNDS):
                new = {name for name in now.moving - moved if not name.endswith("bias")}
                if not new or not (_silent(now) or new & tiny):
                    break
                _move(twin, new, draw)
                kept.clear()
                moved |= new
                now = measure(subject, twin, term=term, each=kept.append if each else None)
        # If the model cannot be copied or run, the given readings are used.
        except Exception:
            return readings, ()
    if not moved or (not moved & tiny and _still_silent(readings, now)):
        return readings, ()
    for one in kept:
        each(one)  # type: ignore[misc]
    names = sorted(moved)
    note = (
        f"{len(names)} trained tensors start at 0 or nearly so"
        f" ({', '.join(names[:3])}{', ...' * (len(names) > 3)}). What they silence is judged with small"
        " random numbers in them, as it will be after the first step."
    )
    return now, (note,)


def tiny_scales(model: nn.Module) -> set[str]:
    """Names of trained scales that are a small constant, as in layer scale (Touvron et al. 2021)."""
    found = set()
    for name, p in model.named_parameters():
        if p.requires_grad and p.is_floating_point() and p.numel() and p.numel() == max(p.shape, default=1):
            value = p.detach().flatten()
            first = abs(float(value[0]))
            if 0 < first <= TINY and not name.endswith("bias") and bool((value == value[0]).all()):
                found.add(name)
    return found


def _silent(readings: Readings) -> set[str]:
    """Weights of trained calls whose gradient is exactly 0."""
    return {n for s in readings.sites if s.trained and s.seen and s.squares == 0 for n in s.weights}


def _still_silent(before: Readings, after: Readings) -> bool:
    """Whether all weights without a gradient before still have none."""
    return _silent(before) <= _silent(after)


@torch.no_grad()
def _move(model: nn.Module, names: set[str], draw: torch.Generator) -> None:
    for name, p in model.named_parameters():
        if name in names:
            fan_in = math.prod(p.shape[1:]) if p.ndim > 1 else 1
            p.copy_(SIZE / math.sqrt(fan_in) * torch.randn(p.shape, generator=draw).to(p.dtype))
