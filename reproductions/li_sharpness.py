"""Li et al. 2018, sharpness: minima of small and large batches, with filter normalisation and without.

A plain network (a residual one whose shortcuts `ss.ablate` removed), trained with small and with large batches, with
and without weight decay. The loss on the line between the two solutions, along random directions as drawn, and along
random directions normalised filter by filter (`ss.landscape`). `li_trajectories` looks at the way there.
"""

import copy
import math

import numpy as np
import torch.nn.functional as F
from matplotlib import pyplot as plt
from scipy.stats import spearmanr
from torch import nn

import skipscope as ss
from reproductions import _images
from reproductions._report import Claim, Judgement, Reproduction, estimate, paired, where
from reproductions.li_depth import PAPER

REPRODUCTION = Reproduction(
    title="Loss surfaces: sharpness and batch size",
    papers=(PAPER,),
    claims=(
        Claim(
            "line",
            "On the line between the solutions of small and large batches, weight decay decides which one looks sharper",
            "Section 3, figure 2: VGG-9 on CIFAR-10. Without decay the small batch's minimum looks wide and the large one's sharp;"
            " with a decay of 0.0005 it is the other way round, although the small batch generalises better in both",
            "The rise of the loss a fifth of the way to either side of each end; log of the small batch's over the large one's."
            " *Shown* if its interval lies below 0 without decay and above 0 with; *in part* if only the paired difference (with"
            " less without) lies above 0; else *not shown*.",
        ),
        Claim(
            "weights",
            "Weight decay shrinks the weights of small batches more, since they take more steps",
            "Section 3, figure 2: histograms of weights",
            "Log of |w| of the small batch over that of the large one, with decay less without. *Shown* if its paired interval lies"
            " below 0; *not shown* if above; else *too small to tell*.",
        ),
        Claim(
            "filters",
            "With directions normalised filter by filter, large batches have sharper minima than small ones, with decay and without",
            "Section 4, figures 3 and 4",
            "The mean rise of the loss from -0.5 to 0.5 along three such directions; log of the small batch's over the large one's."
            " *Shown* if both intervals (with decay, without) lie below 0; *in part* if one does and the other does not lie above"
            " 0; else *not shown*.",
        ),
        Claim(
            "error",
            "Small batches generalise better than large ones",
            "Sections 3 and 4, figures 2 to 4: test errors beside each plot",
            "Test error of the large batch less that of the small one. *Shown* if the paired intervals with decay and without lie"
            " above 0; *in part* if one does and the other does not lie below 0; *too small to tell* if both contain 0; else *not"
            " shown*.",
        ),
        Claim(
            "correlation",
            "Sharpness goes with the test error if directions are normalised filter by filter",
            "Section 4: side by side comparisons are then meaningful, and sharper minima have a higher error",
            "Rank correlation of sharpness and test error over the four networks of a seed. *Shown* if its interval lies above 0"
            " with filter normalisation and not with directions as drawn; *in part* if with both; else *not shown*.",
        ),
    ),
    setup=(
        "A plain network of 8 layers with batch norm and 8, 16, 32 channels in place of VGG-9, on the 1,437 training digits,"
        " tested on 360; batches of 32 and of 512 in place of 128 and 8,192; 30 epochs in place of 300; SGD, Nesterov momentum"
        " 0.9, rate 0.1 in steps for both, as in the paper. Both start from the same weights. On the line, batch-norm statistics"
        " are measured again at each point. Directions as drawn have the same Gaussian draw for both, at 0.02 to either side."
        " Control: the weights before each batch norm times two, which leaves the function as it is."
    ),
    seeds=5,
    takes_cifar=True,
)  # fmt: skip
DECAYS = (0.0, 5e-4)
SIZES = ("small", "large")


def specification(options, size: str, decay: float, seed: int) -> dict:
    """How a network of these two scripts is trained."""
    batch = {"quick": (128, 512), "default": (32, 512), "full": (32, 512)}[options.size]
    batch = (128, 8192) if options.cifar else batch
    return {
        "net": "plain", "depth": 8, "widths": [4, 4, 8] if options.size == "quick" else _images.SMALL, "seed": seed,
        "epochs": {"quick": 2, "default": 30, "full": 300}[options.size], "batch": batch[SIZES.index(size)],
        "cifar": options.cifar, "trajectory": True, **_images.LI, "decay": decay,
    }  # fmt: skip


def network(spec: dict):
    """The trained network, and its weights before each epoch."""
    return _images.trained(
        lambda: _images.plain(_images.resnet(spec["depth"], spec["widths"], spec["cifar"]), spec["cifar"]),
        spec,
    )


def settings(options):
    points, samples = (9, 64) if options.size == "quick" else (41, 512)
    return [
        {
            "decay": decay,
            "seed": seed,
            "points": points,
            "samples": samples,
            "networks": {size: specification(options, size, decay, seed) for size in SIZES},
        }
        for seed in options.seeds
        for decay in DECAYS
    ]


def measure(setting):
    specs = setting["networks"]
    nets = {size: network(spec)[0] for size, spec in specs.items()}
    data = _images.images(specs["small"]["cifar"], "train")
    options = {"samples": setting["samples"], "strategy": "plain"}
    line = ss.landscape(
        nets["small"], data, F.cross_entropy, directions=ss.solutions_plane(nets["small"], nets["large"]),
        grid=(setting["points"],), span=[(-0.5, 1.5)], batch_norm="recalibrate", **options,
    )  # fmt: skip
    at = np.interp
    found = {"line": line.values, "along": line.alphas}
    for size, net in nets.items():
        end = float(SIZES.index(size))
        sides = [float(at(end + side, line.alphas, line.values)) for side in (-0.2, 0.2)]
        found[size] = {
            **_images.accuracy(net, specs[size]["cifar"]),
            "line_rise": float(np.mean(sides) - at(end, line.alphas, line.values)),
            "length": math.sqrt(
                sum(float(p.detach().double().square().sum()) for p in net.parameters() if p.ndim > 1)
            ),
            "filter_rise": rise(net, data, 0.5, setting, normalize="filter"),
            "drawn_rise": rise(net, data, 0.02, setting, normalize="none"),
        }
    doubled = rescaled(nets["small"], 2.0)
    found["doubled"] = {
        "filter_rise": rise(doubled, data, 0.5, setting, normalize="filter"),
        "drawn_rise": rise(doubled, data, 0.02, setting, normalize="none"),
    }
    return found


def rise(net, data, span, setting, *, normalize) -> float:
    """The mean of the loss along three random lines, less the loss at their middle."""
    lines = [
        ss.landscape(
            net, data, F.cross_entropy, grid=(11,), span=span, seed=seed, normalize=normalize,
            samples=setting["samples"], strategy="plain",
        )
        for seed in range(3)
    ]  # fmt: skip
    return float(np.mean([line.values.mean() - line.values[5] for line in lines]))


def rescaled(net: nn.Module, factor: float) -> nn.Module:
    """The same function with the weights before each batch norm times ``factor``."""
    twin = copy.deepcopy(net)
    for module in twin.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data *= factor
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean *= factor
            module.running_var.add_(module.eps).mul_(factor**2).sub_(module.eps)
    return twin


def ratios(rows, decay, name) -> list[float]:
    """Log of the small batch's over the large one's; a rise is at least a millionth."""
    return [
        math.log(max(row["small"][name], 1e-6) / max(row["large"][name], 1e-6))
        for row in where(rows, decay=decay)
    ]


def correlations(rows, name):
    found = []
    for seed in sorted({row["seed"] for row in rows}):
        nets = [row[size] for row in where(rows, seed=seed) for size in SIZES]
        found.append(spearmanr([n[name] for n in nets], [n["test_error"] for n in nets]).statistic)
    return estimate(found)


def judge(rows):
    line = {decay: estimate(ratios(rows, decay, "line_rise")) for decay in DECAYS}
    turn = paired(ratios(rows, 5e-4, "line_rise"), ratios(rows, 0.0, "line_rise"))
    shrink = paired(ratios(rows, 5e-4, "length"), ratios(rows, 0.0, "length"))
    filters = [estimate(ratios(rows, decay, "filter_rise")) for decay in DECAYS]
    flatter, sharper = sum(f.high < 0 for f in filters), sum(f.low > 0 for f in filters)
    gaps = [
        paired(
            *([row[size]["test_error"] for row in where(rows, decay=decay)] for size in ("large", "small"))
        )
        for decay in DECAYS
    ]
    better, worse = sum(g.low > 0 for g in gaps), sum(g.high < 0 for g in gaps)
    normalised, drawn = correlations(rows, "filter_rise"), correlations(rows, "drawn_rise")
    control = {
        name: estimate(row["doubled"][name] / row["small"][name] for row in rows)
        for name in ("filter_rise", "drawn_rise")
    }
    short = {size: f"{estimate(row[size]['train_loss'] for row in rows).mean:.2g}" for size in SIZES}
    spec = rows[0]["networks"]["large"]
    samples = len(_images.images(spec["cifar"], "train")[0]) if spec["cifar"] is None else 50000
    steps = spec["epochs"] * (samples // spec["batch"])
    return {
        "line": Judgement(
            "shown" if line[0.0].high < 0 and line[5e-4].low > 0 else "shown in part" if turn.low > 0 else "not shown",
            f"log ratio of the rises (small over large): {line[0.0]} without decay, {line[5e-4]} with",
            f"Decay changes it by {turn}. The large batch takes {steps} steps in the same epochs, and its training loss ends at"
            f" {short['large']}, that of the small one at {short['small']}: here it has not come as far.",
        ),
        "weights": Judgement(
            "shown" if shrink.high < 0 else "not shown" if shrink.low > 0 else "too small to tell",
            f"decay changes log(|w| small / |w| large) by {shrink}",
            f"Without decay it is {estimate(ratios(rows, 0.0, 'length'))}.",
        ),
        "filters": Judgement(
            "not shown" if sharper or not flatter else "shown" if flatter == 2 else "shown in part",
            f"log ratio of the rises (small over large): {filters[0]} without decay, {filters[1]} with",
            f"Control, all weights before batch norms times two: the rise along normalised directions changes by a factor"
            f" {control['filter_rise']}, along directions as drawn by {control['drawn_rise']}.",
        ),
        "error": Judgement(
            "not shown" if worse else "shown" if better == 2 else "shown in part" if better else "too small to tell",
            f"large batches have {gaps[0]} points more without decay, {gaps[1]} with",
            "Test error, paired.",
        ),
        "correlation": Judgement(
            "not shown" if not normalised.low > 0 else "shown in part" if drawn.low > 0 else "shown",
            f"rank correlation {normalised} with filter normalisation, {drawn} with directions as drawn",
            "Over four networks a seed.",
        ),
    }  # fmt: skip


def table(rows):
    return [
        {
            "decay": decay,
            "batches": size,
            "test error (%)": of("test_error"),
            "training loss": of("train_loss"),
            "|w|": of("length"),
            "rise on the line": of("line_rise"),
            "rise, filter-normalised": of("filter_rise"),
            "rise, as drawn": of("drawn_rise"),
        }
        for decay in DECAYS
        for size in SIZES
        for of in [
            lambda name, size=size, decay=decay: estimate(row[size][name] for row in where(rows, decay=decay))
        ]
    ]


def figures(rows):
    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(6.4, 3.2))
    for axes, decay in zip(panels, DECAYS):
        for row in where(rows, decay=decay):
            axes.plot(row["along"], row["line"], color="#0067a5", alpha=0.5, linewidth=1)
        axes.set(yscale="log", xlabel="0: small batch, 1: large batch", title=f"weight decay {decay:g}")
        for end in (0, 1):
            axes.axvline(end, color="black", linewidth=0.6, linestyle=":")
    panels[0].set_ylabel("training loss")
    return {"line": figure}
