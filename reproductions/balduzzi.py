"""Balduzzi et al. 2017: gradients of deep plain networks shatter into white noise; with shortcuts they do not.

For networks of one width at their start, on inputs drawn from a normal distribution: the cosine of the input
gradients of two samples, averaged over pairs (`ss.gradient_correlation`), against depth. Then the paper's first
figure: the derivative of a network of one input over a grid of that input, and its autocorrelation.
"""

import math

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import nn

import skipscope as ss
from reproductions._report import Claim, Estimate, Judgement, Reproduction, band, estimate, paired, where

REPRODUCTION = Reproduction(
    title="Shattered gradients",
    papers=(
        "D. Balduzzi, M. Frean, L. Leary, J. P. Lewis, K. W.-D. Ma, B. McWilliams: *The Shattered Gradients Problem: If"
        " resnets are the answer, then what is the question?* ICML 2017, [arXiv 1702.08591](https://arxiv.org/abs/1702.08591)",
    ),
    claims=(
        Claim(
            "plain",
            "In plain ReLU networks the correlation of two samples' gradients halves with every layer: $2^{-L}$",
            "Theorem 1, for He's initialisation, if at every layer each of two samples activates half of the units,"
            " independently of the other",
            "The slope of $\\log_2$ of the mean correlation against depth, over depths from 1 to 8. *Shown* if its interval"
            " over seeds lies within -1.1 to -0.9 for plain networks both without and with batch normalisation (which keeps"
            " the theorem's assumption alive at depth); *in part* if for one of them; else *not shown*.",
        ),
        Claim(
            "averaged",
            "In plain ReLU networks with batch normalisation the correlation halves with every layer: $2^{-L}$",
            "Theorem 1; batch normalisation keeps its assumption alive at depth",
            "Written after a first run of the claim above, whose criterion is a blunder: at depth 8 the value of one seed is"
            " mostly noise, and its logarithm is biased. On fresh seeds, averaged in groups of ten before the logarithm, over"
            " depths from 1 to 6: *shown* if the interval of the slope of $\\log_2$ over groups lies within -1.1 to -0.9; *in"
            " part* if it contains -1; else *not shown*.",
        ),
        Claim(
            "residual",
            "With shortcuts and batch normalisation the correlation falls only like $1/\\sqrt{L}$",
            "Theorem 3, for residual networks with batch normalisation at the start of each branch",
            "The slope of log correlation against log depth, over depths from 8 to 128, for residual networks with batch"
            " normalisation. *Shown* if its interval lies within -0.6 to -0.4 and a power law fits the means better than an"
            " exponential; *in part* if only the power law fits better; else *not shown*.",
        ),
        Claim(
            "unnormalised",
            "With shortcuts but no normalisation the correlation falls like $(3/4)^L$",
            "Theorem 2, for residual networks without normalisation, under the assumption of Theorem 1",
            "The slope of log correlation against depth, over depths from 1 to 8, divided by $\\log(3/4)$. *Shown* if its"
            " interval lies within 0.9 to 1.1; *in part* if it lies below 0.9 (falls, but more slowly); else *not shown*.",
        ),
        Claim(
            "noise",
            "Over a line of inputs the gradient of a shallow network looks like brown noise, that of a deep plain one like"
            " white noise, and that of a deep residual one lies between",
            "Figure 1: networks of 200 units a layer; 1 layer, 24 layers, and a 50-layer residual network",
            "The autocorrelation of the derivative at lag 1, grid of 256 points. *Shown* if it is lower with 24 plain layers"
            " than with 1, and higher with 50 residual layers than with 24 plain ones, both beyond their paired intervals,"
            " and the interval for 24 plain layers lies below 0.5; *in part* if both orders hold; else *not shown*.",
        ),
        Claim(
            "noise as drawn",
            "The same, with the 24 plain layers centred and the residual branches scaled by 0.1, as the paper's figure has it",
            "Figure 1, whose caption says that the 24-layer network uses mean-centring and the residual one batch"
            " normalisation with a factor 0.1 on the branch",
            "Written after a first run of the claim above, which had left out both. The same criterion, on fresh seeds.",
        ),
    ),
    setup=(
        "Networks of width 256 with He's initialisation, no training, depth 1 to 128; 64 inputs drawn from a normal"
        " distribution. A residual block is `x + Linear(ReLU(x))`, or `x + Linear(ReLU(BatchNorm(x)))`; a plain layer is"
        " the same without `x +`. Batch normalisation has the statistics of these 64 inputs, found by `ss.recalibrate`,"
        " so that a sample's gradient is its own. Biases are zero, but on the line of inputs they are drawn like the"
        " weights. The thin line is the exact value for infinite width, which the paper's assumption leaves out: in a plain"
        " network without normalisation two samples come closer with every layer, so they activate the same units more"
        " often, and their gradients agree more than $2^{-L}$."
    ),
    seeds=10,
)  # fmt: skip
KINDS = ("plain", "plain, batch norm", "residual", "residual, batch norm")
LINES = [("plain", 1), ("plain", 24), ("residual, batch norm", 50)]
AS_DRAWN = [("plain", 1), ("plain, centred", 24), ("residual, batch norm, 0.1", 50)]


class Centre(nn.Module):
    """Subtract the mean over the batch, held fixed, so that a sample's gradient is its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.detach().mean(0)


def network(kind: str, depth: int, width: int, inputs: int | None = None, outputs: int = 10) -> nn.Sequential:
    """``depth`` hidden layers of one kind; with ``inputs``, a first layer from them, and biases that are drawn."""
    has_shortcut, normed = kind.startswith("residual"), "batch norm" in kind

    def linear(a: int, b: int, gain: float = 2.0) -> nn.Linear:
        layer = nn.Linear(a, b)
        nn.init.normal_(layer.weight, std=math.sqrt(gain / a))
        nn.init.normal_(layer.bias, std=math.sqrt(gain / a) if inputs else 0.0)
        return layer

    def block() -> nn.Module:
        norm = [nn.BatchNorm1d(width)] if normed else [Centre()] if "centred" in kind else []
        branch = nn.Sequential(*norm, nn.ReLU(), linear(width, width))
        if kind.endswith("0.1"):
            return ss.nn.LayerScale(branch, width, init=0.1)
        return ss.nn.IdentityShortcut(branch) if has_shortcut else branch

    first = linear(inputs or width, width, gain=1.0)
    return nn.Sequential(first, *[block() for _ in range(depth)], linear(width, outputs, gain=1.0))


def settings(options):
    quick = options.size == "quick"
    depths = [1, 2, 4] if quick else [1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
    width, points = (32, 64) if quick else (256, 256)
    found = [
        {"seed": seed, "kind": kind, "depths": depths, "width": width, "samples": 16 if quick else 64}
        for seed in options.seeds
        for kind in KINDS
    ]
    fresh = range(1000, 1000 + (2 if quick else 10 * len(options.seeds)))
    found += [
        {"seed": seed, "kind": "plain, batch norm", "depths": depths[: 2 if quick else 6], "width": width,
         "samples": 16 if quick else 64} for seed in fresh
    ]  # fmt: skip
    line = {"width": 16 if quick else 200, "points": points}
    found += [
        {"seed": seed, "line": kind, "depth": depth, **line}
        for seed in options.seeds
        for kind, depth in LINES
    ]
    return found + [
        {"seed": seed, "line": kind, "depth": depth, **line}
        for seed in fresh[: len(options.seeds)]
        for kind, depth in AS_DRAWN
    ]


def measure(setting):
    torch.manual_seed(setting["seed"])
    if "line" in setting:
        return along_a_line(setting)
    inputs = torch.randn(setting["samples"], setting["width"])
    found = []
    for depth in setting["depths"]:
        torch.manual_seed(setting["seed"])
        model = network(setting["kind"], depth, setting["width"])
        data = inputs, torch.zeros(len(inputs), 10)
        if "batch norm" in setting["kind"]:
            ss.recalibrate(model, data)
        found.append(ss.gradient_correlation(model.eval(), data, nn.MSELoss()).mean)
    return {"correlation": found}


def along_a_line(setting):
    grid = torch.linspace(-2, 2, setting["points"]).unsqueeze(1).requires_grad_()
    model = network(setting["line"], setting["depth"], setting["width"], inputs=1, outputs=1)
    if "batch norm" in setting["line"]:
        ss.recalibrate(model, (grid.detach(), torch.zeros(len(grid), 1)))
    [derivative] = torch.autograd.grad(model.eval()(grid).sum(), grid)
    centred = (derivative - derivative.mean()).flatten().double()
    spread = centred.square().sum()
    lags = [float((centred[lag:] * centred[: len(centred) - lag]).sum() / spread) for lag in range(1, 16)]
    return {"autocorrelation": lags, "derivative": [round(d, 3) for d in (centred / centred.std()).tolist()]}


def infinite_width(depth: int) -> float:
    """Two orthogonal inputs, plain ReLU layers of infinite width without biases (arc-cosine kernel)."""
    angle, correlation = math.pi / 2, 1.0
    for _ in range(depth):
        correlation *= 1 - angle / math.pi
        cosine = (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / math.pi
        angle = math.acos(min(cosine, 1.0))
    return correlation


def first_run(rows, **values) -> list[dict]:
    return [row for row in where(rows, **values) if row["seed"] < 1000]


def slopes(rows, kind, low, high, *, log_depth=False, base=math.e) -> Estimate:
    """The slope of log correlation against depth or its log, seed by seed."""
    found = []
    for row in first_run(rows, kind=kind):
        pairs = [(d, c) for d, c in zip(row["depths"], row["correlation"]) if low <= d <= high and c > 0]
        if len(pairs) > 1:
            depths, values = np.array(pairs).T
            x = np.log(depths) if log_depth else depths
            found.append(float(np.polyfit(x, np.log(values) / math.log(base), 1)[0]))
    return estimate(found)


def means(rows, kind) -> list[Estimate]:
    return [estimate(values) for values in zip(*(row["correlation"] for row in first_run(rows, kind=kind)))]


def power_law_fits_better(rows, kind, low, high) -> bool:
    depths = first_run(rows, kind=kind)[0]["depths"]
    pairs = [(d, e.mean) for d, e in zip(depths, means(rows, kind)) if low <= d <= high and e.mean > 0]
    if len(pairs) < 3:
        return False
    d, c = np.array(pairs).T
    errors = [np.polyfit(x, np.log(c), 1, full=True)[1].sum() for x in (np.log(d), d)]
    return bool(errors[0] < errors[1])


def within(found: Estimate, low: float, high: float) -> bool:
    return low <= found.low and found.high <= high


def averaged_slopes(rows) -> Estimate:
    """The slope of log2 of the mean correlation of ten fresh seeds against depth, group by group."""
    fresh = [row for row in where(rows, kind="plain, batch norm") if row["seed"] >= 1000]
    found = []
    for start in range(0, len(fresh), 10):
        values = np.mean([row["correlation"] for row in fresh[start : start + 10]], axis=0)
        kept = values > 0
        found.append(float(np.polyfit(np.array(fresh[0]["depths"])[kept], np.log2(values[kept]), 1)[0]))
    return estimate(found)


def judge_lines(rows, lines) -> Judgement:
    first = min(row["seed"] for row in where(rows, line=lines[1][0])) >= 1000
    chosen = [row for row in rows if "line" in row and (row["seed"] >= 1000) == first]
    shallow, deep, residual = (
        [row["autocorrelation"][0] for row in where(chosen, line=kind, depth=depth)] for kind, depth in lines
    )
    falls, rises = paired(shallow, deep), paired(residual, deep)
    orders, white = falls.low > 0 and rises.low > 0, estimate(deep).high < 0.5
    return Judgement(
        "shown" if orders and white else "shown in part" if orders else "not shown",
        f"at lag 1: {estimate(shallow)}, {estimate(deep)} and {estimate(residual)}",
        f"1 plain layer less 24: {falls}; 50 residual layers less 24 plain ones: {rises} (paired).",
    )


def judge(rows):
    plain = {kind: slopes(rows, kind, 1, 8, base=2) for kind in ("plain", "plain, batch norm")}
    held = [kind for kind, found in plain.items() if within(found, -1.1, -0.9)]
    power = slopes(rows, "residual, batch norm", 8, 128, log_depth=True)
    is_power = power_law_fits_better(rows, "residual, batch norm", 8, 128)
    bare = slopes(rows, "residual", 1, 8, base=0.75)
    again = averaged_slopes(rows)
    return {
        "plain": Judgement(
            ("not shown", "shown in part", "shown")[len(held)],
            f"a factor of $2^s$ a layer: $s$ = {plain['plain']} without, {plain['plain, batch norm']} with batch norm",
            f"Halving with every layer holds for: {'; '.join(held) or 'neither'}. Without normalisation two samples"
            " come closer with every layer, and the exact value for infinite width falls more slowly than any exponential.",
        ),
        "residual": Judgement(
            "shown" if within(power, -0.6, -0.4) and is_power else "shown in part" if is_power else "not shown",
            f"$L^s$ with $s$ = {power}",
            f"{'A power law' if is_power else 'An exponential'} of depth describes the means better.",
        ),
        "unnormalised": Judgement(
            "shown" if within(bare, 0.9, 1.1) else "shown in part" if bare.high < 0.9 and bare.low > 0 else "not shown",
            f"$(3/4)^{{sL}}$ with $s$ = {bare}",
            "Here, too, the samples come closer with depth, which the theorem's assumption excludes.",
        ),
        "averaged": Judgement(
            "shown" if within(again, -1.1, -0.9) else "shown in part" if again.low <= -1 <= again.high else "not shown",
            f"a factor of $2^s$ a layer: $s$ = {again}",
            "With the noise averaged out before the logarithm.",
        ),
        "noise": judge_lines(rows, LINES),
        "noise as drawn": judge_lines(rows, AS_DRAWN),
    }  # fmt: skip


def table(rows):
    depths = first_run(rows, kind="plain")[0]["depths"]
    columns = {kind: means(rows, kind) for kind in KINDS}
    return [
        {"depth": depth, "$2^{-L}$": 2.0**-depth, "infinite width": infinite_width(depth), **{k: v[i] for k, v in columns.items()}}
        for i, depth in enumerate(depths)
    ]  # fmt: skip


def figures(rows):
    correlations, axes = plt.subplots()
    depths = first_run(rows, kind="plain")[0]["depths"]
    for kind in KINDS:
        band(axes, depths, means(rows, kind), kind)
    fine = np.arange(1, max(depths) + 1)
    axes.plot(fine, 2.0**-fine, ":", color="black", linewidth=1, label="$2^{-L}$")
    axes.plot(fine, fine**-0.5, "--", color="black", linewidth=1, label="$1/\\sqrt{L}$")
    axes.plot(
        fine, [infinite_width(d) for d in fine], color="black", linewidth=0.7, label="plain, infinite width"
    )
    axes.set(
        xscale="log",
        yscale="log",
        ylim=(5e-4, 1.2),
        xlabel="depth L",
        ylabel="mean correlation of input gradients",
    )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)

    lines, rows_of_axes = plt.subplots(3, 1, figsize=(6.4, 4.8), sharex=True)
    for at, (kind, depth) in zip(rows_of_axes, AS_DRAWN):
        derivative = where(rows, line=kind, depth=depth, seed=1000)[0]["derivative"]
        at.plot(np.linspace(-2, 2, len(derivative)), derivative, linewidth=1)
        at.set_title(f"{kind}, {depth} layer{'s' if depth > 1 else ''}")
    rows_of_axes[-1].set(xlabel="input")
    rows_of_axes[1].set(ylabel="derivative (standardised)")
    return {"correlation": correlations, "line": lines}
