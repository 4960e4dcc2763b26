"""State of a comparison in progress: its settings, the roles of the networks, and the measurements so far."""

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
    """Sizes, seeds and training options of a comparison.

    Attributes:
        seeds: number of training runs of each twin.
        steps: optimizer steps per run.
        batch_size: samples per step.
        grid: points per side of a surface.
        samples: number of samples for gradients and surfaces.
        train: whether to train at all.
        optimizers: optimizer -> rates to try.
        target: loss to be reached; None: half of the first loss.
        strengths: number of shortcut strengths at which the flow is measured.
        seed: seed of every random draw.
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
    """Names of the twin with shortcuts, of the twin without, and of the controls."""

    with_shortcuts: str
    without_shortcuts: str
    controls: tuple[str, ...] = ()


@dataclass
class Evidence:
    """Measurements so far, from which ``comparison_of`` builds a :class:`Comparison`."""

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
