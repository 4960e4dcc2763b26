"""Results made by hand, so that drawing is tested without measuring: every text in them can be chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from skipscope.comparison import Claim, Comparison, Curves, DepthResult, StrengthSweep, Training, Twin
from skipscope.curvature import ExtremeEigenvalues, Layout, SpectralDensity
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
from skipscope.monitor import STATES, History, LiveVerdict, VerdictEvent
from skipscope.shortcuts._shortcut_result import (
    Boundary,
    CallKey,
    Layer,
    Place,
    Rejected,
    Shortcut,
    Shortcuts,
)
from skipscope.surfaces import (
    Checks,
    CurvatureMap,
    Difference,
    KnownPoints,
    PairedBand,
    PairedMaps,
    PairedSurfaces,
    Provenance,
    Scores,
    Surface,
    SurfaceBand,
)


def flow(depth=20, slope=0.25, text: Callable[[str], str] = str, state="vanishing", zeros=0) -> GradientFlow:
    rms = 10.0 ** (-slope * np.arange(depth)[::-1] - 1) * (1 + 0.2 * np.sin(np.arange(depth)))
    rms[:zeros] = 0.0
    boundaries = tuple(
        BoundaryFlow(
            text(f"layers.{i}.0"), i, "module", float(rms[i]), 1.0, float(rms[i] / rms[i + 1]) if i + 1 < depth and rms[i + 1] else None,
            None, 0.0, "ok" if rms[i] else "exact_zero",
        )
        for i in range(depth)
    )  # fmt: skip
    layers = tuple(
        LayerGradient(text(f"layers.{i}.0.weight"), float(rms[i]), float(rms[i] * 1.3), 0.0, "ok", 0.1)
        for i in range(depth)
    )
    fall = float(slope * (depth - 1))
    verdict = Verdict(
        state,
        fall,
        slope,
        (slope * 0.9, slope * 1.1),
        text("layers.7.0"),
        text("the gain is 0.56 at layers.7.0"),
        "gain",
        0.56,
    )
    return GradientFlow(
        boundaries, layers, verdict, 0.3, 0.8, float(np.prod([b.factor for b in boundaries if b.factor])), 2.3, 0.1, "train",
        text("as built"), text("float32"), 2, 64, (text("a note"),),
    )  # fmt: skip


def split(depth=18, text: Callable[[str], str] = str) -> GradientSplit:
    rows = tuple(
        SplitAt(
            text(f"layer{i // 3 + 1}.{i % 3}"),
            "identity",
            text("fork"),
            0.2 + 0.01 * i,
            0.9,
            0.1,
            1.0,
            None,
            0.1 + 0.8 * i / depth,
            0.0,
        )
        for i in range(depth)
    )
    return GradientSplit(rows, 2.3, "train", text("as built"), (text("note"),))


def paths(branches=18, text: Callable[[str], str] = str) -> PathSpectrum:
    k = np.arange(branches + 1)
    norms = np.exp(-((k - branches * 0.3) ** 2) / (branches * 0.4))
    return PathSpectrum(
        norms,
        float((k * norms).sum() / norms.sum()),
        1e-7,
        1.0,
        branches,
        text("input"),
        "batched",
        2.3,
        "train",
        text("as built"),
    )


def importance(count=12, text: Callable[[str], str] = str) -> Importance:
    rows = tuple(
        ImportanceOf(
            text(f"layers.{i}"), "identity", Cost(2.3, 0.1 * (i % 5) + 0.02, 3.0, 0.5 - 0.1 * i, "healthy"),
            Cost(2.2, -0.02 * i, 2.0, 0.1, "healthy") if i != 3 else None, text("cannot be edited") if i == 3 else None,
        )
        for i in range(count)
    )  # fmt: skip
    return Importance(rows, 0.4, 1.2, "eval", (text("note"),))


def prescription(text: Callable[[str], str] = str) -> Prescription:
    return Prescription(
        Remedy(text("as it is"), "", "vanishing", 8.1, 2.3, 2.3),
        (Remedy(text("identity shortcuts"), text("ss.add_shortcuts(model, x)"), "healthy", 0.3, 2.1, 0.4, text("n")), Remedy(text("He"), "he_(model)", "healthy", 0.9, 2.4, 1.9)),
        (text("batch norm: no batches"),), text("add shortcuts"),
    )  # fmt: skip


def correlation(text: Callable[[str], str] = str) -> GradientCorrelation:
    return GradientCorrelation(
        np.linspace(0, 1, 9),
        np.linspace(1, 0, 9),
        0.4,
        ((0.1, 0.9, 3), (0.5, 0.4, 3), (0.9, 0.1, 3)),
        text("input"),
        (text("n"),),
    )


def found(
    blocks=9,
    per_block=2,
    text: Callable[[str], str] = str,
    kinds=("identity", "identity", "projection"),
    model="ResNet",
) -> Shortcuts:
    """A chain: stem, ``blocks`` blocks of ``per_block`` layers each skipped, head."""
    layers, entries = [Layer(text("stem.conv"), "Conv2d", 100)], []
    key = CallKey(text("host"), text("forward:12"), 0, 0)
    for b in range(blocks):
        first = len(layers)
        layers += [
            Layer(text(f"layer{b // 3 + 1}.{b % 3}.conv{i + 1}"), "Conv2d", 10) for i in range(per_block)
        ]
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


def surface(points=21, rough=0.0, text: Callable[[str], str] = str, label="", name="with") -> Surface:
    a = np.linspace(-1, 1, points)
    x, y = np.meshgrid(a, a, indexing="ij")
    values = 0.08 + 4 * (x**2 + 1.7 * y**2 + 0.3 * x * y) * 10 ** (
        rough * (0.8 + np.sin(7 * x) * np.cos(6 * y + 2 * x))
    )
    if points > 9:
        values[0, 0], values[-1, -1] = np.nan, np.inf
    scores = Scores(
        text(label),
        0.08,
        0.8 - 0.3 * rough,
        0.1 + 0.4 * rough,
        0.0,
        0.4,
        0.5,
        False,
        {"roughness": 0.01, "convexity_share": 0.02},
    )
    checks = Checks(0.001, 1.0, 0.08, 0.08, True, True, 1e-7, 256, 1)
    provenance = Provenance(0, text("random Gaussian"), "filter", ("biases", "norms"), (1.0, 1.0), "ab" * 20, "cd" * 20, text("cross_entropy"), "none",
                            text("plain loop"), text("it was the fastest"), "float32", "cpu", {"torch": text("2.13")}, points**2, 3.2)  # fmt: skip
    return Surface(text(name), values, a, a, np.ones((points, points)), np.full((points, points), 0.02), np.full((points, points), 0.01), "", text(label),
                   (text("direction 1"), text("direction 2")), {text("accuracy"): values}, None, scores, checks, provenance)  # fmt: skip


def pair(text: Callable[[str], str] = str, points=21) -> PairedSurfaces:
    first, second = surface(points, 0.0, text, name="with"), surface(points, 0.8, text, name="without")
    with np.errstate(invalid="ignore"):
        change = second.values - first.values
    difference = Difference(
        text("without - with"), change, np.full_like(change, 0.1), change - 0.2, change + 0.2
    )
    return PairedSurfaces(
        {text("with"): first, text("without"): second}, True, {text("without"): difference}, (text("a note"),)
    )


def trajectory(text: Callable[[str], str] = str, points=15) -> Surface:
    """An adaptive surface, a quarter of it computed, with five checkpoints on its plane."""
    from dataclasses import replace

    plain = surface(points, 0.2, text, name="trained")
    at = np.linspace(0.9, 0.0, 5)
    known = KnownPoints(
        tuple(text(f"epoch {i}") for i in range(5)),
        np.stack([at, at**2 - 0.3 * at], 1),
        at / 10,
        at + 0.1,
        (0.8, 0.15),
    )
    some = np.zeros((points, points), dtype=bool)
    some[::2, ::2] = True
    return replace(plain, computed=some, interpolation_error=0.01, points=known)


def line(text: Callable[[str], str] = str, name="with") -> Surface:
    """A surface along one direction."""
    from dataclasses import replace

    plain = surface(9, 0.1, text, name=name)
    return replace(
        plain,
        values=plain.values[4],
        betas=np.array([]),
        computed=np.ones(9, dtype=bool),
        stderr=plain.values[4] * 0.1,
        centre_stderr=None,
        metrics={},
    )


def band(text: Callable[[str], str] = str) -> SurfaceBand:
    parts = {str(seed): surface(9, 0.1 * seed, text) for seed in range(3)}
    values = np.stack([p.values for p in parts.values()])
    first = parts["0"]
    return SurfaceBand(
        parts,
        first.alphas,
        first.betas,
        np.median(values, 0),
        values.min(0),
        values.max(0),
        {"roughness": (0.2, 0.05), text("convexity"): (0.8, 0.1)},
    )


def paired_band(text: Callable[[str], str] = str) -> PairedBand:
    scores = {text("with"): {"roughness": (0.1, 0.02)}, text("without"): {"roughness": (0.4, 0.05)}}
    return PairedBand({"0": pair(text, 9), "1": pair(text, 9)}, scores, {text("without"): {"roughness": 1.0}})


def curvature_map(text: Callable[[str], str] = str) -> CurvatureMap:
    a = np.linspace(-1, 1, 9)
    x, y = np.meshgrid(a, a, indexing="ij")
    good = np.ones((9, 9), dtype=bool)
    good[0, :3] = False
    return CurvatureMap(text("with"), -0.1 - x**2, 5 + 3 * y**2, 0.01 * np.ones((9, 9)), 0.99 * np.ones((9, 9)), good, good, a, a, 1e-3, 0.999, 800, 1,
                        text("cached graph"), "hessian", 964, text("mse"), 0, "ab" * 20, "cd" * 20)  # fmt: skip


def paired_maps(text: Callable[[str], str] = str) -> PairedMaps:
    return PairedMaps(
        {text("with"): curvature_map(text), text("without"): curvature_map(text)}, True, (text("a note"),)
    )


def eigenvalues(text: Callable[[str], str] = str) -> ExtremeEigenvalues:
    return ExtremeEigenvalues(np.array([-0.4, -0.2]), np.array([12.0, 7.0]), np.array([0.01, 0.02]), np.array([0.02, 0.03]), True, 0.99999, 0.999, 1e-3, 44,
                              text("cached graph, Lanczos"), "hessian", 964, 1, 1e-7, 1e-8, Layout((text("w"),), ((2,),)), None, None, text("mse"))  # fmt: skip


def density(text: Callable[[str], str] = str) -> SpectralDensity:
    grid = np.linspace(-1, 12, 200)
    values = np.exp(-((grid) ** 2) * 8) + 0.01 * np.exp(-((grid - 9) ** 2))
    return SpectralDensity(grid, values, values * 0.8, values * 1.2, 0.1, np.array([[-0.4, 0.1, 12.0]]), np.array([[0.1, 0.8, 0.1]]), 0.12, 0.02, 0.05, 0.01, 33.0, 1.0,
                           1e-3, 80, text("cached graph"), "hessian", 964, text("mse"))  # fmt: skip


def history(steps=60, count=12, text: Callable[[str], str] = str) -> History:
    names = tuple(text(f"layers.{i}.0.weight") for i in range(count))
    at = np.arange(1, steps + 1)
    norm = 10.0 ** (-0.3 * np.arange(count)[::-1][None] - 1 - 0.02 * at[:, None]) * (
        1 + 0.3 * np.sin(at[:, None] / 3 + np.arange(count))
    )
    norm[5, 2] = 0.0
    norm[7, 3] = np.nan
    nothing = np.full(steps, np.nan)
    verdict = LiveVerdict(
        "vanishing",
        "boundary flow",
        steps,
        text("falls 3.3 decades"),
        text("layers.1.0"),
        3.3,
        0.3,
        (0.2, 0.4),
    )
    events = (VerdictEvent(steps // 3, "healthy", verdict),)
    flow = 10.0 ** (-0.25 * np.arange(count)[::-1][None] + 0.0 * at[::10, None])
    return History(
        parameters=names, shapes=((8, 8),) * count, owners=(0,) * count, groups=(0,) * count, steps=at.astype(float), seconds=at * 0.1,
        optimizers=np.zeros(steps), norm=norm, mean_abs=norm / 10, norm_before_clip=norm * 1.5, states=np.zeros((steps, count)),
        total_before_clip=np.linspace(3, 1, steps), loss_scale=nothing, skipped=np.zeros(steps), evaluations=np.zeros(steps), boundaries=names,
        flow_steps=at[::10].astype(float), flow=flow, verdict=verdict, events=events, notes=(text("a note"),), complete=True,
    )  # fmt: skip


def restless(text: Callable[[str], str] = str) -> History:
    """A history whose state changes often, with a gradient that is not finite and one that is not connected."""
    calm = history(text=text)
    norm, states = calm.norm.copy(), calm.states.copy()
    norm[20:30, 4:8], states[20:30, 4:8] = np.nan, STATES.index("nonfinite")
    states[7, 3] = STATES.index("not_connected")
    at = (1, 2, 4, 6, 20, 22, 41, 42, 55, 58, 59, 60)
    names = ("vanishing", "healthy", "nonfinite", "unconnected", "dead", "exploding")
    events = tuple(
        VerdictEvent(
            step, names[i % 6], LiveVerdict(names[(i + 1) % 6], "boundary flow", step, text(f"reason {i}"))
        )
        for i, step in enumerate(at)
    )
    return dataclasses.replace(calm, norm=norm, states=states, events=events)


def strength(depth=18, text: Callable[[str], str] = str) -> StrengthSweep:
    s = np.linspace(0, 1, 11)
    rms = np.stack([10.0 ** (-(0.4 - 0.45 * v) * np.arange(depth)[::-1] - 1) for v in s])
    falls = np.log10(rms[:, -1] / rms[:, 0])
    return StrengthSweep(
        s,
        tuple(text(f"layers.{i}") for i in range(depth)),
        rms,
        falls,
        tuple("vanishing" if f > 2 else "healthy" for f in falls),
    )


def training(text: Callable[[str], str] = str, steps=200, seeds=3) -> Training:
    rng = np.random.default_rng(0)
    ends = {"plain": 2.29, "plain, He": 0.3, "shortcuts": 0.06, "shortcuts, scaled": 0.09}
    curves = {}
    for name, end in ends.items():
        curves[text(name)] = {}
        for optimizer, speed in (("SGD", 30), ("Adam", 12)):
            at = np.arange(steps)
            mean = end + (2.35 - end) * np.exp(-at / speed / (3 if "plain" in name else 1))
            losses = mean * np.exp(0.12 * rng.standard_normal((seeds, steps)))
            reached = tuple(
                int(np.argmax(losses[s] < 0.5)) if (losses[s] < 0.5).any() else None for s in range(seeds)
            )
            curves[text(name)][optimizer] = Curves(
                0.1,
                {"0.1": end, "0.01": end * 2, "1": float("inf")},
                losses,
                1e-3 * np.ones_like(losses),
                reached,
                end < 1,
            )
    return Training(
        curves,
        0.5,
        steps,
        64,
        tuple(range(seeds)),
        "initialisation and batch order",
    )


def comparison(text: Callable[[str], str] = str, depth=30, points=21) -> Comparison:
    names = ["plain", "plain, He", "shortcuts", "shortcuts, scaled"]
    slopes = {
        "plain": 0.42,
        "plain, He": 0.05,
        "shortcuts": -0.06,
        "shortcuts, scaled": -0.01,
        "shortcuts, removed": 0.42,
        "shortcuts, detached": 0.45,
    }
    states = {
        "plain": "vanishing",
        "plain, He": "healthy",
        "shortcuts": "exploding",
        "shortcuts, scaled": "healthy",
    }
    net = found(depth - 1, 1, text, ("identity",), "DeepMLP")
    keys = ("smaller", "product", "stagnate", "path", "surface", "which", "strength")
    answers = (
        "holds in part",
        "holds",
        "holds in part",
        "holds",
        "holds",
        "not measured",
        "does not hold here",
    )
    claims = tuple(
        Claim(k, text("Gradients become progressively smaller as we go back through the network."), a,
              text("Without shortcuts, one part in 10^12 of the gradient reaches the first layer."),
              text("It does not come from depth alone: 'plain, He' is as deep, has no shortcut, and keeps its gradient."),
              text("Plain: vanishing, 12 decades lost on the way back (95 % of it at layers.4)."),
              text("Each line is one network; read it from right (the loss) to left (the input)."))
        for k, a in zip(keys, answers)
    )  # fmt: skip
    depths = tuple(
        DepthResult(d, {text(n): slopes[n] * d for n in names}, {text(n): states[n] for n in names}, {text(n): {"SGD": "34", "Adam": "> 200"} for n in names},
             {text(n): {"SGD": n != "plain"} for n in names})
        for d in (8, 12, 16, 30)
    )  # fmt: skip
    trained = PairedSurfaces({text(n): surface(points, r, text, label, n) for n, r, label in (
        ("plain", 0.0, "flat: this network has not learnt"), ("plain, He", 0.9, ""), ("shortcuts", 0.3, ""), ("shortcuts, scaled", 0.0, ""))}, False, {}, ())  # fmt: skip
    return Comparison(
        text("The lecture's network, 30 hidden layers deep, on 1,797 real digits"),
        (text("Without shortcuts the gradient shrinks by 12 decades on its way back through 31 boundaries; with them it grows 63-fold."),
         text("To reach a loss of 0.5 it takes 34 steps with shortcuts and > 200 without under SGD, each at its best rate."),
         text("Of the 29 branches a gradient could pass, the paths that carry it pass 8.7 on average: 95 % of it takes paths through at most 14.")),
        claims, tuple(Twin(text(n), text("as built"), text(n + ", 30 hidden layers"), 125_000) for n in names),
        {text("shortcuts"): net, text("shortcuts, scaled"): net},
        {text(n): flow(depth + 1, s, text, states.get(n, "vanishing")) for n, s in slopes.items()},
        {text("shortcuts"): split(depth - 1, text)}, {text("shortcuts"): paths(depth - 1, text), text("shortcuts, scaled"): paths(depth - 1, text)},
        training(text), depths, {"trained": trained, "paired": pair(text, points)}, {text("shortcuts"): importance(depth - 1, text)},
        {text("shortcuts"): strength(depth, text)}, text("Every network was measured on the same 256 samples. " * 6), (text("the deepest was left out"),),
        {"skipscope": "0.1.0", text("key"): text("value"), "seconds": {text("flow"): 1.2, "training": 40.0}},
    )  # fmt: skip


def everything(text: Callable[[str], str] = str) -> list:
    """One of each result."""
    return [
        flow(text=text), split(text=text), paths(text=text), importance(text=text), prescription(text=text), correlation(text=text), found(text=text),
        surface(text=text), pair(text=text), trajectory(text), line(text), band(text), paired_band(text), curvature_map(text), eigenvalues(text), density(text), history(text=text), strength(text=text), training(text), comparison(text),
    ]  # fmt: skip
