"""Li et al. 2018, trajectories: the way of training lies to a large part in a plane, and PCA finds it.

The networks of `li_sharpness`, with their weights before each epoch: the plane closest to them
(`ss.trajectory_plane`) and how much of the way it holds, against two random directions.
"""

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

import skipscope as ss
from reproductions import _images
from reproductions._report import Claim, Judgement, Reproduction, estimate, where
from reproductions.li_depth import PAPER
from reproductions.li_sharpness import DECAYS, SIZES, network, specification

REPRODUCTION = Reproduction(
    title="Loss surfaces: trajectories",
    papers=(PAPER,),
    claims=(
        Claim(
            "plane",
            "Between 40 and 90 percent of the variation of a training path lies in a plane",
            "Section 7, figure 9: VGG-9 on CIFAR-10, small and large batches, with and without weight decay",
            "The share of the summed squared distances from the end that the two principal directions hold. *Shown* if in all four"
            " settings the interval over seeds lies within 0.4 to 0.9; *in part* if it lies above 0.4 in all, or within in at"
            " least two; else *not shown*.",
        ),
        Claim(
            "random",
            "Random directions show almost nothing of the path",
            "Section 7, figure 8: projected on random directions, hardly any motion is seen, since high-dimensional vectors"
            " are nearly orthogonal",
            "The same share held by two random directions, normalised filter by filter. *Shown* if in all four settings its"
            " interval lies below 0.05; *in part* if in at least one; else *not shown*.",
        ),
    ),
    setup=(
        "The networks of [sharpness and batch size](li_sharpness.md): 8 plain layers on the digits, 30 epochs, weights kept before"
        " each epoch. The plane passes through the trained weights, as in the paper."
    ),
    seeds=5,
    takes_cifar=True,
)  # fmt: skip
RUNS = [(decay, size) for decay in DECAYS for size in SIZES]


def settings(options):
    return [
        {
            "decay": decay, "size": size, "seed": seed, "grid": 5 if options.size == "quick" else 15,
            "network": specification(options, size, decay, seed),
        }
        for seed in options.seeds
        for decay, size in RUNS
    ]  # fmt: skip


def measure(setting):
    model, checkpoints = network(setting["network"])
    plane = ss.trajectory_plane(model, checkpoints)
    found = {
        "explained": plane.explained, "coordinates": plane.coordinates,
        "random": share_on(model, checkpoints, [ss.random_direction(model, seed=setting["seed"], axis=k) for k in (0, 1)]),
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    if setting["seed"] == 0:
        surface = ss.landscape(
            model, _images.images(setting["network"]["cifar"], "train"), F.cross_entropy, directions=plane,
            span=plane.span(), grid=setting["grid"], samples=256, batch_norm="recalibrate", strategy="plain",
        )  # fmt: skip
        found |= {
            "values": [[float(f"{v:.4g}") for v in line] for line in surface.values],
            "alphas": surface.alphas,
            "betas": surface.betas,
        }
    return found


def share_on(model, checkpoints, directions) -> float:
    """The share of the checkpoints' summed squared distances from the model that lies in the directions' span."""
    own = dict(model.named_parameters())

    def flat(tensors) -> torch.Tensor:
        return torch.cat(
            [tensors.get(n, torch.zeros_like(p)).detach().flatten().double() for n, p in own.items()]
        )

    end = flat(own)
    steps = torch.stack([flat(weights) - end for weights in checkpoints])
    basis = torch.linalg.qr(torch.stack([flat(direction) for direction in directions]).T).Q
    return float((steps @ basis).square().sum() / steps.square().sum())


def planes(rows, decay, size):
    return estimate(sum(row["explained"]) for row in where(rows, decay=decay, size=size))


def randoms(rows, decay, size):
    return estimate(row["random"] for row in where(rows, decay=decay, size=size))


def judge(rows):
    held = [planes(rows, *run) for run in RUNS]
    within = sum(h.low >= 0.4 and h.high <= 0.9 for h in held)
    random = [randoms(rows, *run) for run in RUNS]
    nothing = sum(r.high < 0.05 for r in random)
    return {
        "plane": Judgement(
            "shown" if within == len(RUNS) else "shown in part" if within >= 2 or all(h.low > 0.4 for h in held) else "not shown",
            f"two directions hold {min(h.mean for h in held):.0%} to {max(h.mean for h in held):.0%} of the path",
            f"Within 40 to 90 percent with their interval: {within} of {len(RUNS)} settings.",
        ),
        "random": Judgement(
            "shown" if nothing == len(RUNS) else "shown in part" if nothing else "not shown",
            f"two random directions hold at most {max(r.high for r in random):.2%} of the path",
            f"A network of {rows[0]['parameters']} weights: 2 / n = {2 / rows[0]['parameters']:.2%} is what directions without"
            " any relation to the path would hold.",
        ),
    }  # fmt: skip


def table(rows):
    return [
        {
            "decay": decay,
            "batches": size,
            "first direction": estimate(row["explained"][0] for row in where(rows, decay=decay, size=size)),
            "both directions": planes(rows, decay, size),
            "two random ones": randoms(rows, decay, size),
        }
        for decay, size in RUNS
    ]


def figures(rows):
    figure, panels = plt.subplots(2, 2, figsize=(6.4, 5.2))
    for axes, (decay, size) in zip(panels.flat, RUNS):
        row = where(rows, decay=decay, size=size, seed=0)[0]
        shown = np.log10(np.maximum(row["values"], 1e-6)).T
        axes.contourf(row["alphas"], row["betas"], shown, levels=14, cmap="viridis")
        axes.contour(row["alphas"], row["betas"], shown, levels=14, colors="white", linewidths=0.3)
        way = np.vstack([row["coordinates"], [[0, 0]]])
        axes.plot(*way.T, color="#c8500a", marker="o", markersize=2.5, linewidth=1)
        axes.grid(False)
        axes.set_title(f"{size} batches, decay {decay:g}", fontsize=9)
        axes.set_xlabel(f"{row['explained'][0]:.0%} of the path", fontsize=8)
        axes.set_ylabel(f"{row['explained'][1]:.0%}", fontsize=8)
    return {"trajectories": figure}
