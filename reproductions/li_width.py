"""Li et al. 2018, width: more channels smooth the surface of a network without shortcuts.

Plain networks (residual ones whose shortcuts `ss.ablate` removed) of one depth and several widths, trained by the
paper's recipe, and their surfaces (`ss.landscape`).
"""

import numpy as np
import torch.nn.functional as F
from matplotlib import pyplot as plt

import skipscope as ss
from reproductions import _images
from reproductions._report import Claim, Judgement, Reproduction, band, estimate, paired, where
from reproductions.li_depth import PAPER, network, specification

REPRODUCTION = Reproduction(
    title="Loss surfaces: width",
    papers=(PAPER,),
    claims=(
        Claim(
            "smooth",
            "Without shortcuts, more channels make the surface smoother and more convex",
            "Section 6, figure 6: Wide-ResNet-56 without shortcuts, width times 1, 2, 4 and 8",
            "Between the greatest and the smallest width: convex share (greatest less smallest) and roughness (smallest less"
            " greatest). *Shown* if both paired intervals lie above 0; *in part* if one does; *not shown* if one lies below 0; else"
            " *too small to tell*. Networks that have not learnt are left out.",
        ),
        Claim(
            "error",
            "Wider networks have a lower test error",
            "Section 6: figure 6, test errors beside each panel",
            "The test error of the smallest width less that of the greatest. *Shown* if its paired interval lies above 0; *not"
            " shown* if below; else *too small to tell*.",
        ),
    ),
    setup=(
        "Plain networks of 32 layers (56 with `--full`) with 4, 8 and 16 channels in the first stage, twice and four times that"
        " in the others, trained and looked at as in [error by depth](li_depth.md) and [where chaos begins](li_surfaces.md):"
        " 20 epochs on the digits, 15 x 15 points from -1 to 1, filter-normalised, 256 training images. The"
        " depth was chosen when the errors of one seed of [error by depth](li_depth.md) were known, before any surface was; the"
        " middle width's networks are those of that page."
    ),
    seeds=3,
    takes_cifar=True,
)  # fmt: skip


def settings(options):
    depth, factors = {"quick": (8, [1, 2]), "default": (32, [1, 2, 4]), "full": (56, [1, 2, 4, 8])}[
        options.size
    ]
    grid, samples = {"quick": (5, 64), "default": (15, 256), "full": (31, 512)}[options.size]
    return [
        {
            "factor": factor, "seed": seed, "grid": grid, "samples": samples,
            "network": {**specification(options, depth, False, seed), "widths": [4 * factor, 8 * factor, 16 * factor]},
        }
        for seed in options.seeds
        for factor in factors
    ]  # fmt: skip


def measure(setting):
    model, spec = network(setting["network"]), setting["network"]
    surface = ss.landscape(
        model, _images.images(spec["cifar"], "train"), F.cross_entropy, grid=setting["grid"], samples=setting["samples"],
        seed=setting["seed"],
    )  # fmt: skip
    names = ("convexity_share", "roughness", "label", "centre")
    return {
        **_images.accuracy(model, spec["cifar"]),
        **{name: getattr(surface.scores, name) for name in names},
        "values": [[float(f"{v:.4g}") for v in line] for line in surface.values],
    }


def learnt(rows, factor) -> dict[int, dict]:
    return {row["seed"]: row for row in where(rows, factor=factor) if not row["label"]}


def widening(rows, name):
    """The greatest width less the smallest, over the seeds of which both have learnt."""
    factors = sorted({row["factor"] for row in rows})
    low, high = learnt(rows, factors[0]), learnt(rows, factors[-1])
    both = sorted(low.keys() & high.keys())
    return paired([high[seed][name] for seed in both], [low[seed][name] for seed in both])


def judge(rows):
    factors = sorted({row["factor"] for row in rows})
    convex, rough = widening(rows, "convexity_share"), widening(rows, "roughness")
    up, down = (convex.low > 0) + (rough.high < 0), (convex.high < 0) + (rough.low > 0)
    error = paired(
        *([row["test_error"] for row in where(rows, factor=factor)] for factor in (factors[0], factors[-1]))
    )
    return {
        "smooth": Judgement(
            "not shown" if down else ("too small to tell", "shown in part", "shown")[up],
            f"with {factors[-1]} times the channels the convex share changes by {convex}, the roughness by {rough}",
            f"Over {convex.n} pairs of which both networks have learnt.",
        ),
        "error": Judgement(
            "shown" if error.low > 0 else "not shown" if error.high < 0 else "too small to tell",
            f"the narrowest network has {error} points more",
            "Test error, paired.",
        ),
    }


def table(rows):
    return [
        {
            "width": f"x {factor}",
            "learnt": len(learnt(rows, factor)),
            "convex share": estimate(row["convexity_share"] for row in learnt(rows, factor).values()),
            "roughness": estimate(row["roughness"] for row in learnt(rows, factor).values()),
            "test error (%)": estimate(row["test_error"] for row in where(rows, factor=factor)),
            "training loss": estimate(row["train_loss"] for row in where(rows, factor=factor)),
        }
        for factor in sorted({row["factor"] for row in rows})
    ]


def figures(rows):
    factors = sorted({row["factor"] for row in rows})
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.4, 3.0))
    for axes, name in ((left, "convexity_share"), (right, "roughness")):
        band(
            axes,
            factors,
            [estimate(row[name] for row in learnt(rows, factor).values()) for factor in factors],
        )
        axes.set(
            xlabel="width, times", ylabel=name.replace("convexity_share", "convex share"), ylim=(0, None)
        )

    surfaces, panels = plt.subplots(1, len(factors), figsize=(6.4, 2.4), squeeze=False, sharey=True)
    for axes, factor in zip(panels[0], factors):
        row = where(rows, factor=factor, seed=0)[0]
        at = np.linspace(-1, 1, row["grid"])
        shown = np.log10(np.maximum(row["values"], 1e-6)).T
        axes.contourf(at, at, shown, levels=14, cmap="viridis")
        axes.contour(at, at, shown, levels=14, colors="white", linewidths=0.3)
        axes.grid(False)
        axes.set_aspect("equal")
        axes.set_title(f"x {factor}")
    return {"scores": figure, "surfaces": surfaces}
