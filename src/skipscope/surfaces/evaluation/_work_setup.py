"""Setup of twins for evaluation: precision, strategy, and cleanup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from skipscope._data import Batches, Objective
from skipscope._option_words import Precision
from skipscope._untouched import untouched
from skipscope._validation import require_option
from skipscope.surfaces._landscape_settings import Settings
from skipscope.surfaces.evaluation._autotune import Choice, choose
from skipscope.surfaces.evaluation._evaluator import Point
from skipscope.surfaces.evaluation._twins_on_plane import TwinOnPlane, Work, make_twins

_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def open_twins(
    models: Mapping[str, nn.Module], data: Batches, loss: Objective, settings: Settings, axes: int
) -> Iterator[list[TwinOnPlane]]:
    """Context that prepares the twins, and ends their worker processes on exit."""
    twins = make_twins(models, data, loss, settings, axes)
    try:
        yield twins
    finally:
        for twin in twins:
            twin.evaluator.strategy.close()


def open_work(
    models: Mapping[str, nn.Module],
    data: Batches,
    loss: Objective,
    settings: Settings,
    axes: tuple[np.ndarray, ...],
    strategies: Mapping[str, str],
) -> tuple[Work, ExitStack]:
    """Set up a run's work in another process. Returns it and a stack to close at the end."""
    opened, first = ExitStack(), next(iter(models.values()))
    opened.enter_context(untouched(*models.values(), training=False, seed=0, operation="landscape"))
    opened.enter_context(precision_of(settings.precision, first))
    twins = opened.enter_context(open_twins(models, data, loss, settings, len(axes)))
    work = Work(twins, axes)
    some = some_points(work, int(np.prod(work.shape)))
    for twin in twins:
        choose(twin.evaluator, some, len(some), strategies[twin.name])
    return work, opened


@contextmanager
def precision_of(precision: Precision | None, model: nn.Module) -> Iterator[None]:
    """Context with the chosen precision; None keeps the model's own and torch's current settings."""
    require_option("landscape", "precision", precision, (None, "fp32", "tf32", *_PRECISIONS))
    device = next((p.device.type for p in model.parameters()), "cpu")
    if precision is None:
        yield
    elif precision in _PRECISIONS:
        with torch.autocast(device, _PRECISIONS[precision], cache_enabled=False):
            yield
    else:
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def choose_for_all(twins: list[TwinOnPlane], work: Work, count: int, wanted: str) -> dict[str, Choice]:
    """Choose a strategy for the first twin, and use it for all twins that it works on."""
    some = some_points(work, count)
    choices = {}
    for twin in twins:
        choices[twin.name] = choose(twin.evaluator, some, count, wanted, asked=twin is twins[0])
        wanted = choices[twins[0].name].name
    return choices


def some_points(work: Work, count: int) -> list[Point]:
    """Grid points to try strategies on: after the middle one, where the weights have moved."""
    middle = range(count // 2 + 1, min(count, count // 2 + 29))
    return work.points(np.array([*middle, *range(min(4, count // 2 + 1))][:28]))
