"""What a comparison is asked for, which network plays which part, and what has been measured so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from skipscope.comparison._comparison_result import DepthResult, StrengthSweep, Twin
from skipscope.comparison.training import RATES, Training
from skipscope.flow import GradientFlow, GradientSplit, Importance, PathSpectrum
from skipscope.shortcuts import Shortcuts
from skipscope.surfaces import PairedSurfaces

Factory = Callable[[], nn.Module]


@dataclass(frozen=True)
class Settings:
    """How much is done.

    Attributes:
        seeds, steps, batch_size: of the training.
        grid: points a side of a surface.
        samples: how many samples gradients and surfaces rest on.
        train: whether to train at all.
        optimizers: optimizer -> rates to try.
        target: the loss to be reached; None: half of the first loss.
        strengths: at how many strengths of the shortcuts the flow is measured.
        seed: for everything drawn.
    """

    seeds: int = 3
    steps: int = 200
    batch_size: int | None = None
    grid: int = 21
    samples: int = 256
    train: bool = True
    optimizers: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: RATES)
    target: float | None = None
    seed: int = 0
    strengths: int = 11


@dataclass(frozen=True)
class Roles:
    """Which twin has the shortcuts, which has none, and which are controls."""

    with_shortcuts: str
    without_shortcuts: str
    controls: tuple[str, ...] = ()


@dataclass
class Evidence:
    """What has been measured so far; ``comparison_of`` makes a :class:`Comparison` of it."""

    roles: Roles
    twins: dict[str, Twin]
    found: dict[str, Shortcuts] = field(default_factory=dict)
    flow: dict[str, GradientFlow] = field(default_factory=dict)
    split: dict[str, GradientSplit] = field(default_factory=dict)
    paths: dict[str, PathSpectrum] = field(default_factory=dict)
    training: Training | None = None
    depths: list[DepthResult] = field(default_factory=list)
    surfaces: dict[str, PairedSurfaces] = field(default_factory=dict)
    importance: dict[str, Importance] = field(default_factory=dict)
    strength: dict[str, StrengthSweep] = field(default_factory=dict)
