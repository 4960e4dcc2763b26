"""Schoenholz et al. 2017: how far gradient and information reach into a random plain tanh network.

Over a plane of weight and bias variances: the factor on the squared gradient at each layer (`ss.gradient_flow`)
against the theory for infinite width, and where it is 1. Then networks of several depths are trained on the digits:
is a network trained exactly when information at its start still reaches through it?
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

import skipscope as ss
from reproductions import _mean_field as theory
from reproductions._report import Claim, Estimate, Judgement, Reproduction, estimate, where

REPRODUCTION = Reproduction(
    title="Deep information propagation",
    papers=(
        "S. S. Schoenholz, J. Gilmer, S. Ganguli, J. Sohl-Dickstein: *Deep Information Propagation.* ICLR 2017,"
        " [arXiv 1611.01232](https://arxiv.org/abs/1611.01232)",
    ),
    claims=(
        Claim(
            "gradient",
            "At the start the squared gradient changes by a factor $\\chi_1$ at each layer, which two variances foretell",
            "The section on the gradients' back-propagation: they vanish in the ordered phase and explode in the chaotic one, with depth scale"
            " $1/|\\ln\\chi_1|$",
            "The regression of measured on foretold $\\ln\\chi_1$ over the plane, seed by seed. *Shown* if the interval of its"
            " slope lies within 0.95 to 1.05 and $R^2$ is above 0.99 on average; *in part* if $R^2$ is above 0.9; else *not"
            " shown*.",
        ),
        Claim(
            "edge",
            "Between order and chaos lies a line on which the gradient neither vanishes nor explodes",
            "Figure 1: the line in the plane of the two variances, from $\\chi_1 = 1$",
            "The weight variance at which the measured $\\ln\\chi_1$ changes sign, by linear interpolation, over the foretold"
            " one. *Shown* if its interval lies within 0.95 to 1.05 for each bias variance; *in part* if for half of them;"
            " else *not shown*.",
        ),
        Claim(
            "training",
            "A network can be trained only where its depth is below about six times the depth scale of correlations, $6\\,\\xi_c$",
            "The section on experiments: tanh networks on MNIST; the boundary of what was trained follows $6\\,\\xi_c$",
            "A network is trained when the mean loss of its last 20 steps is below half of $\\ln 10$. The share of networks for"
            " which trained and depth $\\le 6\\,\\xi_c$ agree, seed by seed. *Shown* if its interval lies above 0.8; *in part*"
            " if the rank correlation over weight variances between the number of depths that were trained and $\\xi_c$ is above"
            " zero beyond its interval; else *not shown*.",
        ),
    ),
    setup=(
        "Tanh networks, no shortcuts: `ss.reference.deep_mlp(depth, width, activation=\"tanh\")`, drawn with the two"
        " variances. The gradient is read in networks of 48 layers of width 256, layers 8 to 44, on random inputs."
        " Training: width 64, 300 steps of SGD (rate 0.01, momentum 0.9) on the embedded digits, bias variance 0.05; the"
        " paper's networks are wider, its steps many more and its rate smaller."
    ),
    seeds=5,
)  # fmt: skip
TRAINED = math.log(10) / 2


def settings(options):
    quick = options.size == "quick"
    weights = [1.0, 1.5, 2.0, 3.0] if quick else [0.75 + 0.25 * k for k in range(12)]
    plane = [
        {"seed": seed, "biases": biases, "weights": weights, "depth": 16 if quick else 48, "width": 64 if quick else 256}
        for seed in options.seeds
        for biases in ([0.05] if quick else [0.01, 0.05, 0.2, 0.5])
    ]  # fmt: skip
    depths = {"quick": [2, 4], "default": [8, 16, 32, 64], "full": [8, 16, 32, 64, 96, 128, 192]}[
        options.size
    ]
    training = [
        {"seed": seed, "trained": True, "biases": 0.05, "weight": weight, "depth": depth,
         "width": 32 if quick else 64, "steps": 5 if quick else 300}
        for seed in list(options.seeds)[:3]
        for weight in ([1.0, 2.0] if quick else [0.8, 1.2, 1.76, 3.0, 4.0])
        for depth in depths
    ]  # fmt: skip
    return plane + training


def measure(setting):
    return training(setting) if "trained" in setting else log_chi(setting)


def log_chi(setting):
    """The slope of the log of the squared gradient by least squares over the layers that neither end disturbs."""
    torch.manual_seed(setting["seed"])
    depth, width = setting["depth"], setting["width"]
    data, found = theory.normal_batch(16, width), []
    for weight in setting["weights"]:
        model = ss.reference.deep_mlp(depth, width, inputs=width, activation="tanh")
        theory.initialise_(model, weight, setting["biases"])
        gradients = theory.hidden_gradients(ss.gradient_flow(model, data, F.cross_entropy))
        layers = np.arange(depth // 6, depth - depth // 12 + 1)
        slope = np.polyfit(layers, 2 * np.log(np.array(gradients)[layers]), 1)[0]
        found.append(-float(slope))  # going back
    return {"log_chi": found}


def training(setting):
    def make():
        model = ss.reference.deep_mlp(setting["depth"], setting["width"], activation="tanh")
        return theory.initialise_(model, setting["weight"], setting["biases"])

    runs = ss.train_twins(
        {"tanh": make},
        ss.reference.digits(split="train"),
        F.cross_entropy,
        seeds=[setting["seed"]],
        steps=setting["steps"],
        batch_size=64,
        optimizers={"SGD": lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9)},
    )
    curves = runs.curves["tanh"]["SGD"]
    return {"loss": float(curves.losses[0, -20:].mean())}


def regression(row) -> tuple[float, float]:
    """Slope and R^2 of measured on foretold ln chi_1, of the rows of one seed."""
    foretold, measured = np.array(row).T
    slope, offset = np.polyfit(foretold, measured, 1)
    rest = measured - slope * foretold - offset
    return float(slope), float(1 - rest.var() / measured.var())


def of_plane(rows):
    return [row for row in rows if "log_chi" in row]


def pairs_by_seed(rows) -> list[list[tuple[float, float]]]:
    by_seed: dict[int, list[tuple[float, float]]] = {}
    for row in of_plane(rows):
        foretold = [math.log(theory.chi(weight, row["biases"])) for weight in row["weights"]]
        by_seed.setdefault(row["seed"], []).extend(zip(foretold, row["log_chi"]))
    return list(by_seed.values())


def crossing(row) -> float:
    """The weight variance at which ln chi_1 changes sign."""
    values, weights = row["log_chi"], row["weights"]
    for low, high, a, b in zip(weights, weights[1:], values, values[1:]):
        if a < 0 <= b:
            return low + (high - low) * -a / (b - a)
    return math.nan


def edges(rows) -> dict[float, Estimate]:
    """Measured over foretold critical weight variance, by bias variance."""
    return {
        biases: estimate(
            crossing(row) / theory.critical_weight_variance(biases)
            for row in where(of_plane(rows), biases=biases)
        )
        for biases in sorted({row["biases"] for row in of_plane(rows)})
    }


def agreements(rows) -> tuple[Estimate, Estimate]:
    """Share of networks for which theory and training agree; rank correlation of depth scale and depths trained."""
    shares, ranks = [], []
    for seed in sorted({row["seed"] for row in where(rows, trained=True)}):
        mine = where(rows, trained=True, seed=seed)
        scales = {w: theory.correlation_scale(w, 0.05) for w in sorted({row["weight"] for row in mine})}
        shares.append(
            float(
                np.mean(
                    [(row["loss"] < TRAINED) == (row["depth"] <= 6 * scales[row["weight"]]) for row in mine]
                )
            )
        )
        counts = [sum(row["loss"] < TRAINED for row in where(mine, weight=weight)) for weight in scales]
        ranks.append(_rank_correlation(list(scales.values()), counts))
    return estimate(shares), estimate(ranks)


def _rank_correlation(a, b) -> float:
    from scipy.stats import spearmanr

    return 0.0 if len(set(b)) < 2 else float(spearmanr(a, b).statistic)


def judge(rows):
    fits = [regression(pairs) for pairs in pairs_by_seed(rows)]
    slope, explained = estimate(s for s, _ in fits), estimate(r for _, r in fits)
    edge = edges(rows)
    held = sum(e.low >= 0.95 and e.high <= 1.05 for e in edge.values())
    agree, rank = agreements(rows)
    good = slope.low >= 0.95 and slope.high <= 1.05
    return {
        "gradient": Judgement(
            "shown" if good and explained.mean > 0.99 else "shown in part" if explained.mean > 0.9 else "not shown",
            f"slope {slope}, $R^2$ {explained.mean:.4f}",
            "Two numbers known before any pass foretell how the gradient of a network of 48 layers shrinks or grows.",
        ),
        "edge": Judgement(
            "shown" if held == len(edge) else "shown in part" if 2 * held >= len(edge) else "not shown",
            "measured over foretold weight variance: "
            + "; ".join(f"{e} at bias variance {biases}" for biases, e in edge.items()),
            f"Within 5 % for {held} of {len(edge)} bias variances.",
        ),
        "training": Judgement(
            "shown" if agree.low > 0.8 else "shown in part" if rank.low > 0 else "not shown",
            f"agreement {agree}, rank correlation {rank}",
            _disagreements(rows),
        ),
    }  # fmt: skip


def _disagreements(rows) -> str:
    wrong = {True: 0, False: 0}
    for row in where(rows, trained=True):
        within = row["depth"] <= 6 * theory.correlation_scale(row["weight"], 0.05)
        if (row["loss"] < TRAINED) != within:
            wrong[within] += 1
    return (
        f"Of {len(where(rows, trained=True))} networks, {wrong[True]} were within six depth scales and not trained,"
        f" {wrong[False]} beyond and trained."
    )


def table(rows):
    scales = {
        w: theory.correlation_scale(w, 0.05) for w in sorted({r["weight"] for r in where(rows, trained=True)})
    }
    depths = sorted({row["depth"] for row in where(rows, trained=True)})
    return [
        {
            "weight variance": weight,
            "$6\\,\\xi_c$": f"{6 * scale:.0f}" if scale < 1e3 else "over 6000",
            **{
                f"final loss, depth {depth}": estimate(row["loss"] for row in where(rows, trained=True, weight=weight, depth=depth))
                for depth in depths
            },
        }
        for weight, scale in scales.items()
    ]  # fmt: skip


def figures(rows):
    chi, axes = plt.subplots()
    for biases in sorted({row["biases"] for row in of_plane(rows)}):
        mine = where(of_plane(rows), biases=biases)
        weights = mine[0]["weights"]
        values = [estimate(at) for at in zip(*(row["log_chi"] for row in mine))]
        [line] = axes.plot(
            weights,
            [math.log(theory.chi(w, biases)) for w in weights],
            linewidth=1,
            label=f"bias variance {biases}",
        )
        axes.errorbar(
            weights,
            [e.mean for e in values],
            [np.nan_to_num(e.high - e.mean) for e in values],
            fmt="o",
            color=line.get_color(),
            markersize=3.5,
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="weight variance", ylabel="$\\ln\\chi_1$ (lines: theory)")
    axes.legend()

    trained, axes = plt.subplots()
    mine = where(rows, trained=True)
    weights, depths = (sorted({row[key] for row in mine}) for key in ("weight", "depth"))
    grid = [
        [np.mean([row["loss"] for row in where(mine, weight=w, depth=d)]) for w in weights] for d in depths
    ]
    image = axes.imshow(grid, origin="lower", aspect="auto", cmap="viridis_r", vmin=0, vmax=math.log(10))
    axes.set_xticks(range(len(weights)), weights)
    axes.set_yticks(range(len(depths)), depths)
    axes.grid(False)
    reach = [6 * theory.correlation_scale(w, 0.05) for w in weights]
    edge = [
        np.interp(math.log(r), np.log(depths), range(len(depths)), right=len(depths) - 0.5) for r in reach
    ]
    axes.plot(
        range(len(weights)),
        [at if r > depths[0] else -0.4 for at, r in zip(edge, reach)],
        "o-",
        color="#c8500a",
        label="$6\\,\\xi_c$",
    )
    axes.set(xlabel="weight variance (bias variance 0.05)", ylabel="depth", ylim=(-0.5, len(depths) - 0.5))
    trained.colorbar(image, label="final training loss")
    axes.legend(loc="upper left", facecolor="white", frameon=True)
    return {"chi": chi, "training": trained}
