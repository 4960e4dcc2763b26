"""Li et al. 2018, curvature: is the loss convex in all directions where its picture looks convex?

|lambda_min / lambda_max| of the Hessian at every point of the plane (`ss.curvature_map`), for `li_depth`'s deepest
networks with shortcuts and without.
"""

import numpy as np
import torch.nn.functional as F
from matplotlib import pyplot as plt

import skipscope as ss
from reproductions import _images
from reproductions._report import Claim, Judgement, Reproduction, estimate, paired
from reproductions.li_depth import PAPER, TWINS, depths, network, specification

REPRODUCTION = Reproduction(
    title="Loss surfaces: curvature in all directions",
    papers=(PAPER,),
    claims=(
        Claim(
            "ratio",
            "Over the plane, negative curvature is weaker with shortcuts than without, relative to the positive one",
            "Section 6, figure 7: maps of |lambda_min / lambda_max| of ResNet-56 with and without shortcuts: chaotic surfaces hold"
            " large negative curvature",
            "log10 of the map's median ratio, without shortcuts less with. *Shown* if the paired interval lies above 0; *not shown*"
            " if below; else *too small to tell*.",
        ),
        Claim(
            "convex",
            "Where the surface with shortcuts looks convex, negative curvature is small: the picture does not hide it",
            "Section 6, figure 7: around the minimum of a smooth surface negative eigenvalues are a small share of the positive"
            " ones (for DenseNet less than one percent)",
            "The mean ratio over the inner half of the plane (coefficients from -0.5 to 0.5). *Shown* if its interval with"
            " shortcuts lies below 0.1 and that without above; *in part* if only the first; else *not shown*.",
        ),
    ),
    setup=(
        "The networks of 56 layers of [error by depth](li_depth.md), on the planes of [where chaos begins](li_surfaces.md): both"
        " ends of the Hessian's spectrum on 32 training images, in the weights that move, at 5 x 5 points from -1 to 1."
    ),
    seeds=3,
    takes_cifar=True,
)  # fmt: skip


def settings(options):
    grid, samples = {"quick": (3, 16), "default": (5, 32), "full": (21, 256)}[options.size]
    return [
        {
            "twin": twin, "seed": seed, "grid": grid, "samples": samples,
            "network": specification(options, depths(options)[-1], shortcuts, seed),
        }
        for seed in options.seeds
        for twin, shortcuts in TWINS.items()
    ]  # fmt: skip


def measure(setting):
    data = _images.images(setting["network"]["cifar"], "train")
    found = ss.curvature_map(
        network(setting["network"]), data, F.cross_entropy, grid=setting["grid"], samples=setting["samples"],
        seed=setting["seed"], tol=0.05,
    )  # fmt: skip
    return {
        "smallest": found.smallest, "largest": found.largest, "ratio": found.ratio,
        "converged": float(np.mean(found.converged)), "products": found.products,
    }  # fmt: skip


def of(rows, twin) -> list[dict]:
    return [row for row in rows if row["twin"] == twin]


def median(row) -> float:
    return float(np.log10(max(np.nanmedian(row["ratio"]), 1e-12)))


def inner(row) -> float:
    edge = np.abs(np.linspace(-1, 1, row["grid"])) <= 0.5
    return float(np.nanmean(np.array(row["ratio"])[np.ix_(edge, edge)]))


def judge(rows):
    more = paired(*([median(row) for row in of(rows, twin)] for twin in ("without", "with")))
    inside = {twin: estimate(inner(row) for row in of(rows, twin)) for twin in TWINS}
    small = inside["with"].high < 0.1
    return {
        "ratio": Judgement(
            "shown" if more.low > 0 else "not shown" if more.high < 0 else "too small to tell",
            f"without shortcuts the median ratio is $10^s$ times as great, $s$ = {more}",
            f"{estimate(row['converged'] for row in rows).mean:.0%} of the points converged.",
        ),
        "convex": Judgement(
            "not shown" if not small else "shown" if inside["without"].low > 0.1 else "shown in part",
            f"in the inner half the ratio is {inside['with']} with shortcuts, {inside['without']} without",
            "A ratio of 0 is a convex point, of 1 a saddle that curves down as strongly as up.",
        ),
    }


def table(rows):
    return [
        {
            "network": f"{twin} shortcuts",
            "log10 of the median ratio": estimate(median(row) for row in of(rows, twin)),
            "inner half": estimate(inner(row) for row in of(rows, twin)),
            "at the minimum": estimate(
                row["ratio"][row["grid"] // 2][row["grid"] // 2] for row in of(rows, twin)
            ),
            "largest eigenvalue at the minimum": estimate(
                row["largest"][row["grid"] // 2][row["grid"] // 2] for row in of(rows, twin)
            ),
        }
        for twin in TWINS
    ]


def figures(rows):
    figure, panels = plt.subplots(1, 2, figsize=(6.4, 3.0), sharey=True)
    shown, edge = None, 1 + 1 / (rows[0]["grid"] - 1)  # a cell's middle is its point
    for axes, twin in zip(panels, TWINS):
        mean = np.nanmean([np.log10(np.maximum(row["ratio"], 1e-4)) for row in of(rows, twin)], axis=0)
        shown = axes.imshow(
            mean.T, origin="lower", extent=(-edge, edge, -edge, edge), vmin=-3, vmax=0.5, cmap="magma"
        )
        axes.grid(False)
        axes.set_title(f"{twin} shortcuts")
    figure.colorbar(shown, ax=panels, label="log10 |lambda_min / lambda_max|, mean over seeds")
    return {"maps": figure}
