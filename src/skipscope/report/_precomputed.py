"""Precomputed surfaces of a ResNet-56 with and without shortcuts, as in the paper (docs/make_resnet56.py)."""

from __future__ import annotations

from importlib.resources import files

import numpy as np

from skipscope.report._charts import Panel, Surface, Surfaces
from skipscope.report._view_surfaces import height_sentence


def resnet56_panel() -> Panel:
    """Panel with both surfaces, marked as precomputed, with their provenance."""
    with (
        files("skipscope.report").joinpath("resnet56_surfaces.npz").open("rb") as file,
        np.load(file) as saved,
    ):
        values, alphas, betas = saved["values"].astype(float), saved["alphas"], saved["betas"]
        names, words, source = saved["names"].tolist(), saved["words"].tolist(), str(saved["source"])
    axes = ("random direction 1 in |w| by filter", "random direction 2 in |w| by filter")
    chart = Surfaces([Surface(v, alphas, betas, n) for v, n in zip(values, names)], "loss", axes)
    caption = f"Precomputed, not of your network. {'. '.join(words)}. {source} {height_sentence(chart)}"
    return Panel("Precomputed: a deep convolutional network, as in the paper", chart, caption)
