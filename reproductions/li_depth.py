"""Li et al. 2018, error by depth: without shortcuts deeper networks become worse; with them they do not.

Residual networks and their plain twins (the same network, the same first weights, shortcuts removed by `ss.ablate`),
trained by the paper's recipe at several depths. `li_surfaces` and `li_curvature` look at these same networks.
"""

from matplotlib import pyplot as plt

from reproductions import _images
from reproductions._report import Claim, Judgement, Reproduction, band, estimate, paired, where

PAPER = (
    "H. Li, Z. Xu, G. Taylor, C. Studer, T. Goldstein: *Visualizing the Loss Landscape of Neural Nets*, NeurIPS 2018,"
    " [arXiv 1712.09913](https://arxiv.org/abs/1712.09913)"
)
REPRODUCTION = Reproduction(
    title="Loss surfaces: error by depth",
    papers=(PAPER,),
    claims=(
        Claim(
            "degradation",
            "Without shortcuts, networks become harder to train with depth: their test error rises",
            "Section 5 and Table 1: ResNet-20, 56 and 110 without shortcuts on CIFAR-10; the error rises at each step, and 110"
            " does not train",
            "The test error without shortcuts at the greatest depth, less that at depth 20. *Shown* if the paired interval lies"
            " above 0 and so does that of the training loss; *in part* if only one of them does; *too small to tell* if neither"
            " does but the mean error rises; else *not shown*.",
        ),
        Claim(
            "rescue",
            "With shortcuts, deep networks have a lower error than without",
            "Section 5 and Table 1: ResNet-56 and 110 with shortcuts against those without",
            "The test error without less that with shortcuts, at the greatest depth. *Shown* if its paired interval lies above 0"
            " there, and the error with shortcuts at the greatest depth is not above that at depth 20 beyond its paired interval;"
            " *in part* if only the first; else *not shown*.",
        ),
    ),
    setup=(
        "ResNets of 8 to 56 layers (110 with `--full`) with 8, 16 and 32 channels (half of the paper's), on the 1,437 training"
        " digits, 8 x 8 pixels, tested on 360. Recipe of the paper, shortened: SGD, Nesterov momentum 0.9, rate 0.1 divided by"
        " 10 at a half, three quarters and eleven twelfths of the steps, weight decay 0.0005, batches of 64 (128 in the paper),"
        " 20 epochs (300). Twins start from the same weights and see the same batches. A run of seed 99 at depths 20, 56 and"
        " 110 had chosen the sizes; it is not among those below."
    ),
    seeds=3,
    takes_cifar=True,
)  # fmt: skip
TWINS = {"with": True, "without": False}


def specification(options, depth: int, shortcuts: bool, seed: int) -> dict:
    """How a network of these scripts is made and trained."""
    widths, epochs, batch = {
        "quick": ([4, 4, 8], 1, 128), "default": (_images.SMALL, 20, 64), "full": (_images.PAPER, 60, 128),
    }[options.size]  # fmt: skip
    epochs = 300 if options.cifar else epochs
    return {
        "depth": depth, "shortcuts": shortcuts, "seed": seed, "widths": widths, "epochs": epochs, "batch": batch,
        "cifar": options.cifar, **_images.LI,
    }  # fmt: skip


def depths(options) -> list[int]:
    return {"quick": [8, 14], "default": [8, 20, 32, 56], "full": [20, 56, 110]}[options.size]


def network(spec: dict):
    """The trained network of a specification."""

    def make():
        model = _images.resnet(spec["depth"], spec["widths"], spec["cifar"])
        return model if spec["shortcuts"] else _images.plain(model, spec["cifar"])

    return _images.trained(make, spec)[0]


def settings(options):
    return [
        specification(options, depth, shortcuts, seed)
        for seed in options.seeds
        for depth in depths(options)
        for shortcuts in TWINS.values()
    ]


def measure(setting):
    return _images.accuracy(network(setting), setting["cifar"])


def values(rows, depth, shortcuts, name) -> list[float]:
    return [row[name] for row in where(rows, depth=depth, shortcuts=shortcuts)]


def middle(every: list[int]) -> int:
    """The depth from which the errors' rise is counted: 20, where it was run."""
    return 20 if 20 in every else every[0]


def judge(rows):
    every = sorted({row["depth"] for row in rows})
    deepest, first = every[-1], middle(every)
    rise = paired(values(rows, deepest, False, "test_error"), values(rows, first, False, "test_error"))
    loss = paired(values(rows, deepest, False, "train_loss"), values(rows, first, False, "train_loss"))
    gap = paired(values(rows, deepest, False, "test_error"), values(rows, deepest, True, "test_error"))
    kept = paired(values(rows, deepest, True, "test_error"), values(rows, first, True, "test_error"))
    risen = (rise.low > 0) + (loss.low > 0)
    worse = [
        depth
        for depth in every
        if paired(values(rows, depth, False, "test_error"), values(rows, depth, True, "test_error")).low > 0
    ]
    return {
        "degradation": Judgement(
            "shown" if risen == 2 else "shown in part" if risen else "too small to tell" if rise.mean > 0 else "not shown",
            f"from {first} to {deepest} layers the test error rises by {rise} points without shortcuts",
            f"The training loss rises by {loss}: it is the training that fails, not the generalisation.",
        ),
        "rescue": Judgement(
            "not shown" if not gap.low > 0 else "shown in part" if kept.low > 0 else "shown",
            f"at {deepest} layers the test error without shortcuts is {gap} points higher",
            f"With shortcuts, from {first} to {deepest} layers, it changes by {kept} points. Depths at which the network without"
            f" is worse beyond its interval: {', '.join(map(str, worse)) or 'none'}.",
        ),
    }  # fmt: skip


def table(rows):
    names = ("test_error", "train_error", "train_loss")
    return [
        {
            "layers": depth,
            **{
                f"{name.replace('_', ' ')} {twin}{' (%)' if 'error' in name else ''}": estimate(
                    values(rows, depth, shortcuts, name)
                )
                for name in names
                for twin, shortcuts in TWINS.items()
            },
        }
        for depth in sorted({row["depth"] for row in rows})
    ]


def figures(rows):
    figure, (left, right) = plt.subplots(1, 2)
    every = sorted({row["depth"] for row in rows})
    for axes, name, label in (
        (left, "test_error", "test error (%)"),
        (right, "train_loss", "training loss at the end"),
    ):
        for twin, shortcuts in TWINS.items():
            band(
                axes, every, [estimate(values(rows, d, shortcuts, name)) for d in every], f"{twin} shortcuts"
            )
        axes.set(xlabel="layers", ylabel=label, ylim=(0, None))
    left.legend()
    return {"errors": figure}
