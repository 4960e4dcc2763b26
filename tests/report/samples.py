"""Results made by hand, so that drawing is tested without measuring: every text in them can be chosen."""

from __future__ import annotations

import numpy as np

from skipscope.flow import (
    BoundaryFlow,
    Cost,
    GradientCorrelation,
    GradientFlow,
    GradientSplit,
    Importance,
    ImportanceOf,
    LayerGradient,
    PathSpectrum,
    Prescription,
    Remedy,
    SplitAt,
    Verdict,
)
from skipscope.shortcuts._results import CallKey, Layer, Place, Shortcut, Shortcuts
from skipscope.shortcuts._results import Boundary, Rejected


def flow(depth=20, slope=0.25, text=str, state="vanishing", zeros=0) -> GradientFlow:
    rms = 10.0 ** (-slope * np.arange(depth)[::-1] - 1) * (1 + 0.2 * np.sin(np.arange(depth)))
    rms[:zeros] = 0.0
    boundaries = tuple(
        BoundaryFlow(
            text(f"layers.{i}.0"), i, "module", float(rms[i]), 1.0, float(rms[i] / rms[i + 1]) if i + 1 < depth else None,
            None, 0.0, "ok" if rms[i] else "exact_zero",
        )
        for i in range(depth)
    )  # fmt: skip
    layers = tuple(LayerGradient(text(f"layers.{i}.0.weight"), float(rms[i]), float(rms[i] * 1.3), 0.0, "ok", 0.1) for i in range(depth))
    fall = float(slope * (depth - 1))
    verdict = Verdict(state, fall, slope, (slope * 0.9, slope * 1.1), text("layers.7.0"), text("the gain is 0.56 at layers.7.0"), "gain", 0.56)
    return GradientFlow(
        boundaries, layers, verdict, 0.3, 0.8, float(np.prod([b.factor for b in boundaries if b.factor])), 2.3, 0.1, "train",
        text("as built"), text("float32"), 2, 64, (text("a note"),),
    )  # fmt: skip


def split(depth=18, text=str) -> GradientSplit:
    rows = tuple(SplitAt(text(f"block.{i}"), "identity", text("fork"), 0.2 + 0.01 * i, 0.9, 0.1, 1.0, None, 0.9 / (1.1 + 0.01 * i), 0.0) for i in range(depth))
    return GradientSplit(rows, 2.3, "train", text("as built"), (text("note"),))


def paths(branches=18, text=str) -> PathSpectrum:
    k = np.arange(branches + 1)
    norms = np.exp(-((k - branches * 0.3) ** 2) / (branches * 0.4))
    return PathSpectrum(norms, float((k * norms).sum() / norms.sum()), 1e-7, 1.0, branches, text("input"), "batched", 2.3, "train", text("as built"))


def importance(count=12, text=str) -> Importance:
    rows = tuple(
        ImportanceOf(
            text(f"layers.{i}"), "identity", Cost(2.3, 0.1 * (i % 5) + 0.02, 3.0, 0.5 - 0.1 * i, "healthy"),
            Cost(2.2, -0.02 * i, 2.0, 0.1, "healthy") if i != 3 else None, text("cannot be edited") if i == 3 else None,
        )
        for i in range(count)
    )  # fmt: skip
    return Importance(rows, 0.4, 1.2, "eval", (text("note"),))


def prescription(text=str) -> Prescription:
    return Prescription(
        Remedy(text("as it is"), "", "vanishing", 8.1, 2.3, 2.3),
        (Remedy(text("identity shortcuts"), text("ss.add_shortcuts(model, x)"), "healthy", 0.3, 2.1, 0.4, text("n")), Remedy(text("He"), "he_(model)", "healthy", 0.9, 2.4, 1.9)),
        (text("batch norm: no batches"),), text("add shortcuts"),
    )  # fmt: skip


def correlation(text=str) -> GradientCorrelation:
    return GradientCorrelation(np.linspace(0, 1, 9), np.linspace(1, 0, 9), 0.4, ((0.1, 0.9, 3), (0.5, 0.4, 3), (0.9, 0.1, 3)), text("input"), (text("n"),))


def found(blocks=9, per_block=2, text=str, kinds=("identity", "identity", "projection"), model="ResNet") -> Shortcuts:
    """A chain: stem, ``blocks`` blocks of ``per_block`` layers each skipped, head."""
    layers, entries = [Layer(text("stem.conv"), "Conv2d", 100)], []
    key = CallKey(text("host"), text("forward:12"), 0, 0)
    for b in range(blocks):
        first = len(layers)
        layers += [Layer(text(f"layer{b // 3 + 1}.{b % 3}.conv{i + 1}"), "Conv2d", 10) for i in range(per_block)]
        kind = kinds[b % len(kinds)]
        aside = ()
        if kind == "projection":
            aside = (text(f"layer{b // 3 + 1}.{b % 3}.down"),)
            layers.append(Layer(aside[0], "Conv2d", 5))
        entries.append(
            Shortcut(
                text(f"layer{b // 3 + 1}.{b % 3}"), kind, text("relu"), text("add"), tuple(layer.name for layer in layers[first : first + per_block]), aside,
                text("model.py:12"), (first, first + per_block - 1), ("branch", "shortcut"), key, (Place(key, 1),), (Place(key, 0),), text("fused") if b == 1 else None,
            )
        )  # fmt: skip
    layers.append(Layer(text("head"), "Linear", 10))
    return Shortcuts(
        tuple(entries), (Rejected(text("gate"), text("a gate"), text("m.py:3")),), (Boundary(text("input"), 0, "input", key),), tuple(layers),
        (Rejected(text("fused"), text("opaque"), text("m.py:9")),), text(model),
    )  # fmt: skip


def everything(text=str) -> list:
    """One of each result that this file knows."""
    return [flow(text=text), split(text=text), paths(text=text), importance(text=text), prescription(text=text), correlation(text=text), found(text=text)]
