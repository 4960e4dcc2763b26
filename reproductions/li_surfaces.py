"""Li et al. 2018, loss surfaces: with shortcuts smooth, without them chaotic from some depth on.

The surfaces of `li_depth`'s networks and their plain twins, side by side on the same plane (`ss.paired_landscapes`:
random directions normalised filter by filter, from -1 to 1), and their convexity and roughness.
"""

import numpy as np
import torch.nn.functional as F
from matplotlib import pyplot as plt

import skipscope as ss
from reproductions import _images
from reproductions._report import Claim, Judgement, Reproduction, band, estimate, paired, where
from reproductions.li_depth import PAPER, TWINS, depths, middle, network, specification

FRESH = 100  # seeds from here on belong to the claim that was written after a first run
CHAOTIC = 0.05, 0.5  # roughness from here on, or a convex share below: as `skipscope compare` says "chaotic"
REPRODUCTION = Reproduction(
    title="Loss surfaces: where chaos begins",
    papers=(PAPER,),
    claims=(
        Claim(
            "smooth",
            "The surface of a deep network is chaotic without shortcuts, and smooth and nearly convex with them",
            "Figures 1 and 5, section 6: ResNet-56 with and without shortcuts",
            "At the greatest depth, over pairs of which both networks have learnt: the convex share with less that without, and"
            " the roughness without less that with. *Shown* if both paired intervals lie above 0, and in the mean the network"
            " without shortcuts is chaotic (roughness of 0.05 or more, or a convex share below 0.5) and the one with is not;"
            " *in part* if one of the two intervals lies above 0; *too small to tell* with fewer than three pairs; else *not"
            " shown*.",
        ),
        Claim(
            "onset",
            "Without shortcuts a shallow network's surface is benign; with depth it turns chaotic, with shortcuts it does not",
            "Figure 5, section 6: ResNet-20, 56 and 110 without shortcuts; the transition lies between 20 and 56 layers",
            "*Shown* if at depth 8 the mean surface without shortcuts is not chaotic (as above), and the roughness without"
            " shortcuts rises from depth 20 to the greatest depth, and by more than with shortcuts, both beyond their paired"
            " intervals; *in part* if one of the two rises lies beyond its interval; else *not shown*. Chaos *begins* at the"
            " least depth from which on the roughness without less that with lies above 0 beyond its paired interval.",
        ),
        Claim(
            "onset by convexity",
            "The same, told by the convex share",
            "Figure 5, section 6, as above",
            "Written after a first run of the claim above, whose criterion is a blunder: roughness weighs ups and downs by their"
            " size, and where the loss at the edge is 10^8 nothing else counts. On fresh seeds, at 8, 20 and 32 layers: *shown*"
            " if without shortcuts the mean convex share is 0.5 or more at 8 layers and less at 32, with shortcuts 0.5 or more"
            " at both, and from 8 to 32 layers it falls without shortcuts, and by more than with, both beyond their paired"
            " intervals; *in part* if only the falls are; else *not shown*. Chaos *begins* at the least depth from which on the"
            " convex share with less that without lies above 0 beyond its paired interval.",
        ),
    ),
    setup=(
        "The networks of [error by depth](li_depth.md). Each pair of twins, trained separately, has the same Gaussian draw,"
        " normalised to its own filters; biases and batch norms stay still, batch-norm statistics are frozen, as in the paper."
        " A grid of 15 x 15 points (51 x 51 in the paper) from -1 to 1, the loss on 256 training images. *Convex share*: of the"
        " plane's interior, where the discrete 2 x 2 Hessian has no negative eigenvalue. *Roughness*: the share of the ups and"
        " downs along rows and columns that one valley would not need. Networks that have not learnt are left out."
    ),
    seeds=3,
    takes_cifar=True,
)  # fmt: skip


def settings(options):
    grid, samples = {"quick": (5, 64), "default": (15, 256), "full": (31, 512)}[options.size]
    return [
        {
            "depth": depth,
            "seed": seed,
            "grid": grid,
            "samples": samples,
            "twins": {twin: specification(options, depth, shortcuts, seed) for twin, shortcuts in TWINS.items()},
        }
        for seed, depth in [
            *((seed, depth) for seed in options.seeds for depth in depths(options)),
            *((FRESH + seed, depth) for seed in options.seeds for depth in fresh_depths(options)),
        ]
    ]  # fmt: skip


def fresh_depths(options) -> list[int]:
    """The depths of the claim that was written after a first run."""
    return depths(options)[:1] if options.size == "quick" else [8, 20, 32]


def measure(setting):
    twins = {twin: network(spec) for twin, spec in setting["twins"].items()}
    data = _images.images(setting["twins"]["with"]["cifar"], "train")
    pair = ss.paired_landscapes(
        twins, data, F.cross_entropy, grid=setting["grid"], samples=setting["samples"], seed=setting["seed"]
    )
    names = ("convexity_share", "roughness", "width")
    return {
        twin: {
            **{name: getattr(pair.scores[twin], name) for name in names},
            "label": pair.scores[twin].label,
            "centre": pair.scores[twin].centre,
            "values": [[float(f"{v:.4g}") for v in line] for line in surface.values],
        }
        for twin, surface in pair.surfaces.items()
    }


def learnt(rows, depth) -> list[dict]:
    """The pairs at a depth of which both networks have learnt."""
    return [row for row in where(rows, depth=depth) if not any(row[twin]["label"] for twin in TWINS)]


def values(rows, depth, twin, name) -> list[float]:
    return [row[twin][name] for row in learnt(rows, depth)]


def is_chaotic(rows, depth, twin) -> bool:
    rough, convex = (
        estimate(values(rows, depth, twin, name)).mean for name in ("roughness", "convexity_share")
    )
    return rough >= CHAOTIC[0] or convex < CHAOTIC[1]


def rougher(rows, depth):
    return paired(values(rows, depth, "without", "roughness"), values(rows, depth, "with", "roughness"))


def first_run(rows) -> list[dict]:
    return [row for row in rows if row["seed"] < FRESH]


def judge_convexity(rows) -> Judgement:
    """The claim that was written after a first run, on its fresh seeds."""
    fresh = [row for row in rows if row["seed"] >= FRESH]
    every = sorted({row["depth"] for row in fresh})
    low, high = every[0], every[-1]
    pairs = {depth: {row["seed"]: row for row in learnt(fresh, depth)} for depth in every}
    both = sorted(pairs[low].keys() & pairs[high].keys())

    def fall(twin):
        return [
            pairs[low][seed][twin]["convexity_share"] - pairs[high][seed][twin]["convexity_share"]
            for seed in both
        ]

    falls, more = estimate(fall("without")), paired(fall("without"), fall("with"))
    means = {
        (twin, depth): estimate(values(fresh, depth, twin, "convexity_share")).mean
        for twin in TWINS
        for depth in (low, high)
    }
    sides = (
        means["without", high]
        < CHAOTIC[1]
        <= min(means["without", low], means["with", low], means["with", high])
    )
    beyond = falls.low > 0 and more.low > 0
    begins = None
    for depth in reversed(every):
        shares = [values(fresh, depth, twin, "convexity_share") for twin in TWINS]
        if not paired(*shares).low > 0:
            break
        begins = depth
    return Judgement(
        "not shown" if not beyond else "shown" if sides else "shown in part",
        f"from {low} to {high} layers the convex share falls by {falls} without shortcuts, by {more} more than with",
        f"By this criterion chaos begins at {begins} layers." if begins
        else "There is no depth from which on the networks without shortcuts are less convex.",
    )  # fmt: skip


def judge(rows):
    by_convexity, rows = judge_convexity(rows), first_run(rows)
    every = sorted({row["depth"] for row in rows})
    deepest, first = every[-1], middle(every)
    convex = paired(
        values(rows, deepest, "with", "convexity_share"), values(rows, deepest, "without", "convexity_share")
    )
    rough = rougher(rows, deepest)
    clear = (convex.low > 0) + (rough.low > 0)
    chaotic = {twin: is_chaotic(rows, deepest, twin) for twin in TWINS}
    few = len(learnt(rows, deepest)) < 3
    smooth = (
        "too small to tell" if few
        else "shown" if clear == 2 and chaotic["without"] and not chaotic["with"]
        else "shown in part" if clear else "not shown"
    )  # fmt: skip
    both = [row["seed"] for row in learnt(rows, deepest)]
    at_20 = [row for row in learnt(rows, first) if row["seed"] in both]
    at_end = [row for row in learnt(rows, deepest) if row["seed"] in [r["seed"] for r in at_20]]

    def rise(twin):
        return [b[twin]["roughness"] - a[twin]["roughness"] for a, b in zip(at_20, at_end)]

    rises, more = estimate(rise("without")), paired(rise("without"), rise("with"))
    benign = not is_chaotic(rows, every[0], "without")
    beyond = (rises.low > 0) + (more.low > 0)
    begins = None
    for depth in reversed(every):
        if not rougher(rows, depth).low > 0:
            break
        begins = depth
    return {
        "smooth": Judgement(
            smooth,
            f"at {deepest} layers the convex share is {convex} higher with shortcuts, the roughness {rough} higher without",
            f"Chaotic: {', '.join(twin for twin in TWINS if chaotic[twin]) or 'neither'} shortcuts"
            f" ({len(both)} pairs of which both have learnt). Roughness"
            " weighs ups and downs by their size, so the heights at the edge hide those near the centre.",
        ),
        "onset": Judgement(
            "shown" if benign and beyond == 2 else "shown in part" if beyond else "not shown",
            f"chaos begins at {begins} layers" if begins else "no depth from which on the plain networks are rougher",
            f"At {every[0]} layers the surface without shortcuts is {'benign' if benign else 'chaotic already'}; from {first} to"
            f" {deepest} layers its roughness rises by {rises}, by {more} more than with shortcuts.",
        ),
        "onset by convexity": by_convexity,
    }  # fmt: skip


def table(rows):
    return [
        {
            "layers": depth,
            "seeds": "first" if part[0]["seed"] < FRESH else "fresh",
            "pairs": len(learnt(part, depth)),
            **{
                f"{label} {twin}": estimate(values(part, depth, twin, name))
                for name, label in (
                    ("convexity_share", "convex share"),
                    ("roughness", "roughness"),
                    ("centre", "loss at centre"),
                )
                for twin in TWINS
            },
        }
        for part in (first_run(rows), [row for row in rows if row["seed"] >= FRESH])
        for depth in sorted({row["depth"] for row in part})
    ]


def figures(rows):
    rows = first_run(rows)
    every = sorted({row["depth"] for row in rows})
    scores, pair = plt.subplots(1, 2)
    for axes, name, label in (
        (pair[0], "convexity_share", "convex share"),
        (pair[1], "roughness", "roughness"),
    ):
        for twin in TWINS:
            band(axes, every, [estimate(values(rows, d, twin, name)) for d in every], f"{twin} shortcuts")
        axes.set(xlabel="layers", ylabel=label, ylim=(0, None))
    pair[0].legend()

    surfaces, grid = plt.subplots(2, len(every), figsize=(7.2, 3.4), squeeze=False, sharex=True, sharey=True)
    for column, depth in enumerate(every):
        row = where(rows, depth=depth, seed=0)[0]
        for axes, twin in zip(grid[:, column], TWINS):
            shown = np.log10(np.maximum(row[twin]["values"], 1e-6)).T
            at = np.linspace(-1, 1, row["grid"])
            axes.contourf(at, at, shown, levels=14, cmap="viridis")
            axes.contour(at, at, shown, levels=14, colors="white", linewidths=0.3)
            axes.grid(False)
            axes.set_aspect("equal")
            axes.set_title(f"{depth} layers" if twin == "with" else "", fontsize=8.5)
    for axes, twin in zip(grid[:, 0], TWINS):
        axes.set_ylabel(f"{twin} shortcuts")
    surfaces.supxlabel("log10 of the loss, seed 0; each panel has its own range", fontsize=8)
    return {"scores": scores, "surfaces": surfaces}
