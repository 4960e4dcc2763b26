"""Yang & Schoenholz 2017: with shortcuts the gradient of a random tanh network no longer changes exponentially.

The gradient of `x + tanh(W x + b)` at every layer (`ss.gradient_flow`), up to 400 layers, against the theory for
infinite width; and over the plane of weight and bias variances, with and without shortcuts.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

import skipscope as ss
from reproductions import _mean_field as theory
from reproductions._report import Claim, Judgement, Reproduction, band, estimate, where

REPRODUCTION = Reproduction(
    title="Mean field residual networks",
    papers=(
        "G. Yang, S. S. Schoenholz: *Mean Field Residual Networks: On the Edge of Chaos.* NeurIPS 2017,"
        " [arXiv 1712.08969](https://arxiv.org/abs/1712.08969)",
    ),
    claims=(
        Claim(
            "growth",
            "In residual tanh networks the logarithm of the gradient's growth rises like $\\sqrt{L}$, not like $L$",
            "The table of main results: for tanh the gradient grows like $\\exp(\\Theta(\\sqrt{L}))$",
            "The slope of the log of the log growth against log depth, depth from 25 to 400, seed by seed. *Shown* if its"
            " interval lies within 0.45 to 0.65 for each weight variance (infinite width gives 0.53 to 0.57 there); *in"
            " part* if all lie below 0.8; else *not shown*.",
        ),
        Claim(
            "theory",
            "The theory for infinite width foretells the gradient's growth in residual networks",
            "Its figures lay theory over measured values",
            "The measured log growth at the greatest depth over the foretold one. *Shown* if its interval lies within 0.9 to"
            " 1.1 for each weight variance; *in part* if for half of them; else *not shown*.",
        ),
        Claim(
            "plane",
            "Residual networks stay near the edge of chaos wherever they start; plain ones only on a line",
            "The abstract: residual networks \"hover over the boundary between stability and chaos\"",
            "The range, over the plane of variances, of the decades by which the gradient changes through 64 layers: with"
            " shortcuts over without. *Shown* if its interval lies below one fifth; *in part* if below one half; else *not"
            " shown*.",
        ),
    ),
    setup=(
        "Tanh networks of width 256 at their start on random inputs:"
        " `ss.reference.deep_mlp(depth, 256, activation=\"tanh\", shortcut=\"identity\")`, the paper's reduced residual"
        " network; the same without shortcuts for the plane."
    ),
    seeds=5,
)  # fmt: skip


def settings(options):
    quick = options.size == "quick"
    growth = [
        {"seed": seed, "weight": weight, "biases": 0.05, "depth": 32 if quick else 400, "width": 32 if quick else 256}
        for seed in options.seeds
        for weight in ([1.0] if quick else [0.5, 1.0, 2.0, 4.0])
    ]  # fmt: skip
    weights = [1.0, 3.0] if quick else [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0]
    plane = [
        {"seed": seed, "shortcut": shortcut, "biases": biases, "weights": weights, "depth": 8 if quick else 64,
         "width": 32 if quick else 256}
        for seed in list(options.seeds)[:3]
        for biases in ([0.05] if quick else [0.01, 0.05, 0.2, 0.5])
        for shortcut in ("identity", None)
    ]  # fmt: skip
    return growth + plane


def measure(setting):
    torch.manual_seed(setting["seed"])
    if "weights" in setting:
        ratios = []
        for weight in setting["weights"]:
            gradients = read(weight, setting["shortcut"], setting)
            ratios.append(math.log10(gradients[0] / gradients[-1]))
        return {"decades": ratios}
    gradients = np.array(read(setting["weight"], "identity", setting))
    growth = 2 * np.log(gradients[0] / gradients)
    depths = [d for d in (1, 2, 5, 10, 25, 50, 100, 200, 300, 400) if d <= setting["depth"]]
    return {"depths": depths, "log_growth": [float(growth[d]) for d in depths]}


def read(weight, shortcut, setting) -> list[float]:
    depth, width = setting["depth"], setting["width"]
    model = ss.reference.deep_mlp(depth, width, inputs=width, activation="tanh", shortcut=shortcut)
    theory.initialise_(model, weight, setting["biases"])
    return theory.hidden_gradients(ss.gradient_flow(model, theory.normal_batch(16, width), F.cross_entropy))


def of_growth(rows):
    return [row for row in rows if "log_growth" in row]


def foretold(row) -> list[float]:
    sums = np.cumsum(np.log(theory.residual_gains(row["weight"], row["biases"], row["depth"], 1.0)))
    return [float(sums[d - 1]) for d in row["depths"]]


def exponents(rows):
    """The power of depth by which the log growth rises, by weight variance."""
    found = {}
    for weight in sorted({row["weight"] for row in of_growth(rows)}):
        slopes = []
        for row in where(of_growth(rows), weight=weight):
            low = min(25, row["depths"][-2])
            points = [(d, g) for d, g in zip(row["depths"], row["log_growth"]) if d >= low and g > 0]
            if len(points) > 1:
                slopes.append(float(np.polyfit(*np.log(np.array(points)).T, 1)[0]))
        found[weight] = estimate(slopes)
    return found


def against_theory(rows):
    return {
        weight: estimate(
            row["log_growth"][-1] / foretold(row)[-1] for row in where(of_growth(rows), weight=weight)
        )
        for weight in sorted({row["weight"] for row in of_growth(rows)})
    }


def ranges(rows, shortcut) -> list[float]:
    """The range of decades over the plane, seed by seed."""
    plane = [row for row in rows if "decades" in row and row["shortcut"] == shortcut]
    seeds = sorted({row["seed"] for row in plane})
    return [
        float(np.ptp([value for row in where(plane, seed=seed) for value in row["decades"]]))
        for seed in seeds
    ]


def judge(rows):
    powers, ratios = exponents(rows), against_theory(rows)
    residual, plain = ranges(rows, "identity"), ranges(rows, None)
    share = estimate(a / b for a, b in zip(residual, plain))
    close = sum(e.low >= 0.9 and e.high <= 1.1 for e in ratios.values())
    return {
        "growth": Judgement(
            "shown" if all(e.low >= 0.45 and e.high <= 0.65 for e in powers.values())
            else "shown in part" if all(e.high < 0.8 for e in powers.values()) else "not shown",
            "log growth $\\propto L^p$: " + "; ".join(f"$p$ = {e} at weight variance {w}" for w, e in powers.items()),
            "An exponential would have $p = 1$.",
        ),
        "theory": Judgement(
            "shown" if close == len(ratios) else "shown in part" if 2 * close >= len(ratios) else "not shown",
            "measured over foretold: " + "; ".join(f"{e} at weight variance {w}" for w, e in ratios.items()),
            f"Within a tenth for {close} of {len(ratios)} weight variances.",
        ),
        "plane": Judgement(
            "shown" if share.high < 0.2 else "shown in part" if share.high < 0.5 else "not shown",
            f"ratio of the ranges {share}",
            f"Over the plane the gradient's change ranges over {estimate(residual)} decades with shortcuts and"
            f" {estimate(plain)} without.",
        ),
    }  # fmt: skip


def table(rows):
    lines = []
    for weight in sorted({row["weight"] for row in of_growth(rows)}):
        mine = where(of_growth(rows), weight=weight)
        line = {"weight variance": weight}
        for i, depth in enumerate(mine[0]["depths"]):
            if depth >= 10:
                line[f"log growth, depth {depth}"] = (
                    f"{estimate(r['log_growth'][i] for r in mine)}; theory {foretold(mine[0])[i]:.3g}"
                )
        lines.append(line)
    return lines


def figures(rows):
    growth, axes = plt.subplots()
    for weight in sorted({row["weight"] for row in of_growth(rows)}):
        mine = where(of_growth(rows), weight=weight)
        values = [estimate(at) for at in zip(*(row["log_growth"] for row in mine))]
        line = band(axes, mine[0]["depths"], values, f"weight variance {weight}", linestyle="none")
        axes.plot(mine[0]["depths"], foretold(mine[0]), color=line.get_color(), linewidth=1)
    depths = np.array([2, mine[0]["depths"][-1]])
    axes.plot(depths, 0.4 * depths**0.5, "--", color="black", linewidth=0.8, label="$\\propto\\sqrt{L}$")
    axes.plot(depths, 0.4 * depths, ":", color="black", linewidth=0.8, label="$\\propto L$ (exponential)")
    axes.set(xscale="log", yscale="log", ylim=(0.1, 60), xlabel="depth L", ylabel="log growth of the squared gradient (lines: theory)")  # fmt: skip
    axes.legend(fontsize=8)

    plane, both = plt.subplots(1, 2, figsize=(6.4, 2.9), sharey=True)
    cells = [row for row in rows if "decades" in row]
    limit = max(abs(value) for row in cells for value in row["decades"])
    biases = sorted({row["biases"] for row in cells})
    for axes, shortcut, title in zip(both, (None, "identity"), ("without shortcuts", "with shortcuts")):
        grid = [
            np.mean([row["decades"] for row in where(cells, shortcut=shortcut, biases=b)], axis=0)
            for b in biases
        ]
        image = axes.imshow(grid, origin="lower", aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set_xticks(range(len(cells[0]["weights"])), cells[0]["weights"])
        axes.set_yticks(range(len(biases)), biases)
        axes.grid(False)
        axes.set(title=title, xlabel="weight variance")
    both[0].set_ylabel("bias variance")
    plane.colorbar(image, ax=list(both), label="decades of growth, 64 layers back")
    return {"growth": growth, "plane": plane}
