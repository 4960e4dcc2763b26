"""Surfaces along several seeds' directions, to separate the network from the random direction."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from skipscope._errors import SkipscopeError
from skipscope._untouched import require_module
from skipscope.surfaces._landscape_settings import Settings
from skipscope.surfaces._surface_run import ranks_together, surfaces
from skipscope.surfaces.evaluation._point_loss import resident
from skipscope.surfaces.results._band_result import PairedBand, SurfaceBand
from skipscope.surfaces.results._score_result import Scores
from skipscope.surfaces.results._surface_result import PairedSurfaces

_SCORES = ("convexity_share", "roughness", "barrier", "width")


def read_seed(seed: Any) -> int | list[int]:
    """Convert ``seed=`` to an int or a list of ints.

    Raises:
        SkipscopeError: a seed is not an integer or occurs twice, or there is none.
    """
    try:
        if not isinstance(seed, Iterable):
            return operator.index(seed)
        seeds = [operator.index(number) for number in seed]
    except TypeError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds):
        raise SkipscopeError(
            "landscape",
            "these are not seeds",
            expected="a whole number, or several that differ: [0, 1, 2]",
            got=repr(seed),
        )
    return seeds


def by_seed(
    models: Mapping[str, nn.Module], data: Any, loss: Any, settings: Settings
) -> dict[str, PairedSurfaces]:
    """Compute surfaces for each seed, each in its own folder of the store, on the first seed's data."""
    for model in models.values():
        require_module(model, "landscape")
    # Read once: a loader that shuffles or augments would give each seed other data.
    with ranks_together(models, settings) as group:
        data = resident(next(iter(models.values())), data, loss, settings.samples, settings.seed[0], group)
    pairs = {}
    for seed in settings.seed:
        store = None if settings.store is None else Path(settings.store) / f"seed-{seed}"
        own = dataclasses.replace(settings, seed=seed, store=store)
        pairs[str(seed)] = surfaces(models, data, loss, own)
    return pairs


def surface_band(pairs: dict[str, PairedSurfaces], name: str) -> SurfaceBand:
    """Summarise one network's surfaces over seeds."""
    found = {seed: pair.surfaces[name] for seed, pair in pairs.items()}
    stack = np.stack([surface.values for surface in found.values()])
    some = next(iter(found.values()))
    return SurfaceBand(
        surfaces=found,
        alphas=some.alphas,
        betas=some.betas,
        median=np.median(stack, axis=0),
        low=stack.min(axis=0),
        high=stack.max(axis=0),
        scores=_spread([surface.scores for surface in found.values()]),
    )


def paired_band(pairs: dict[str, PairedSurfaces]) -> PairedBand:
    """Summarise the twins' surfaces over seeds, and how far the seeds agree."""
    first, *others = next(iter(pairs.values())).surfaces
    by_twin = {name: [pair.scores[name] for pair in pairs.values()] for name in (first, *others)}
    agreement = {
        name: {score: _share_higher(by_twin[name], by_twin[first], score) for score in _SCORES}
        for name in others
    }
    return PairedBand(pairs, {name: _spread(scores) for name, scores in by_twin.items()}, agreement)


def _share_higher(scores: list[Scores], others: list[Scores], name: str) -> float:
    """Share of seeds on which a score is higher than the other network's; nan if no seed has both scores."""
    pairs = np.array([[getattr(a, name), getattr(b, name)] for a, b in zip(scores, others)])
    pairs = pairs[np.isfinite(pairs).all(1)]
    return float(np.mean(pairs[:, 0] > pairs[:, 1])) if len(pairs) else float("nan")


def _spread(scores: list[Scores]) -> dict[str, tuple[float, float]]:
    found = {}
    for name in _SCORES:
        values = np.array([getattr(score, name) for score in scores])
        found[name] = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else float("nan")
    return found
