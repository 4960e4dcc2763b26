"""De & Smith 2020, Bachlechner et al. 2020, Zhang et al. 2019: SkipInit, ReZero, Fixup: depth without normalisation.

How the mean square of the activations grows with depth at the start (`ss.gradient_flow` reads it at each merge), with
batch normalisation, without, and with the three remedies; then how deep each of these networks can be trained.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import nn

import skipscope as ss
from reproductions._report import (
    Claim,
    Estimate,
    Judgement,
    Reproduction,
    band,
    estimate,
    geometric,
    paired,
    where,
)

REPRODUCTION = Reproduction(
    title="Deep networks without normalisation",
    papers=(
        "S. De, S. L. Smith: *Batch Normalization Biases Residual Blocks Towards the Identity Function in Deep Networks.*"
        " NeurIPS 2020, [arXiv 2002.10444](https://arxiv.org/abs/2002.10444)",
        "T. Bachlechner, B. P. Majumder, H. H. Mao, G. W. Cottrell, J. McAuley: *ReZero is All You Need: Fast Convergence at"
        " Large Depth.* UAI 2021, [arXiv 2003.04887](https://arxiv.org/abs/2003.04887)",
        "H. Zhang, Y. N. Dauphin, T. Ma: *Fixup Initialization: Residual Learning Without Normalization.* ICLR 2019,"
        " [arXiv 1901.09321](https://arxiv.org/abs/1901.09321)",
    ),
    claims=(
        Claim(
            "variance",
            "At the start the variance of the stream doubles with each block without normalisation, and grows linearly with"
            " batch normalisation",
            "De & Smith, the section on why normalised residual blocks are near the identity",
            "Without: the slope of $\\log_2$ of the mean square against blocks, blocks 1 to 24, within 0.9 to 1.1. With: the"
            " slope of log mean square against log blocks, blocks 8 to 64, within 0.9 to 1.1. *Shown* if both intervals over"
            " seeds lie within; *in part* if one does; else *not shown*.",
        ),
        Claim(
            "skipinit",
            "One factor a branch, zero at the start, is enough to train very deep residual networks without normalisation"
            " (SkipInit, ReZero)",
            "De & Smith, the table of wide residual networks of depth up to 1000; Bachlechner et al., fully connected networks"
            " of 10,000 layers",
            "A network is trained when the mean loss of its last 20 steps is below half of $\\ln 10$ at the better of two rates."
            " *Shown* if at every depth it is trained with the factor for every seed, and at the greatest depth without it for"
            " none; *in part* if for every depth it is trained for at least as many seeds, and at some depth for more; else"
            " *not shown*.",
        ),
        Claim(
            "fixup",
            "Scaling the start alone (Fixup) trains very deep residual networks without normalisation",
            "Zhang et al., abstract: as stable as with normalisation, \"even for networks with 10,000 layers\"",
            "The same criterion, for Fixup.",
        ),
        Claim(
            "norm",
            "Without normalisation, at great depth, SkipInit and Fixup learn no worse than batch normalisation",
            "Zhang et al., abstract; De & Smith compare test accuracy",
            "Final training loss at the greatest depth less that with batch normalisation, paired by seed. *Shown* if both"
            " upper ends are below 0.1 nats; *in part* if one is; *too small to tell* if both intervals contain 0 and reach"
            " beyond 0.1; else *not shown*.",
        ),
        Claim(
            "speed",
            "ReZero learns faster than an unscaled residual network at 32 layers",
            "Bachlechner et al., the section on fully connected networks: 32 layers of width 256 on CIFAR-10",
            "Loss averaged over all steps, 16 blocks of two layers, each at its better rate: ReZero less unscaled, paired by"
            " seed. *Shown* if the interval lies below 0; *too small to tell* if it contains 0; else *not shown*.",
        ),
        Claim(
            "speed, capped",
            "The same, with the loss of a step counted as $\\ln 10$ at most",
            "As above",
            "Written after a first run of the claim above: at the start the unscaled network's loss is so large that its mean over"
            " steps says nothing else. The same criterion with every step's loss capped, on five fresh seeds.",
        ),
    ),
    setup=(
        "A block is `x + Linear(ReLU(Linear(ReLU(x))))` of width 32, wrapped in `ss.nn.IdentityShortcut`, `ss.nn.SkipInit`"
        " (ReZero has the same equation) or `ss.nn.Fixup`, or with batch normalisation before each ReLU;"
        " He's initialisation. 120 steps of SGD (momentum 0.9, batches of 64 of the embedded digits) at rates 0.05 and 0.005."
        " The papers train convolutional networks and transformers, tune the rate and train for long. The variance is measured"
        " at width 256 on random inputs."
    ),
    seeds=3,
)  # fmt: skip
KINDS = ("unscaled", "batch norm", "SkipInit", "Fixup", "plain")
TRAINED, RATES = math.log(10) / 2, (0.05, 0.005)


def branch(width: int, normed: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(2):
        linear = nn.Linear(width, width)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        layers += [*([nn.BatchNorm1d(width)] if normed else []), nn.ReLU(), linear]
    return nn.Sequential(*layers)


def network(kind: str, blocks: int, width: int, inputs: int = 64) -> nn.Sequential:
    wrap = {
        "plain": lambda f: f,
        "unscaled": ss.nn.IdentityShortcut,
        "batch norm": ss.nn.IdentityShortcut,
        "SkipInit": ss.nn.SkipInit,
        "Fixup": lambda f: ss.nn.Fixup(f, depth=blocks),
    }[kind]
    head = nn.Linear(width, 10)
    if kind == "Fixup":  # the paper's classifier starts at zero too
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    body = [wrap(branch(width, kind == "batch norm")) for _ in range(blocks)]
    return nn.Sequential(nn.Linear(inputs, width), *body, head)


def settings(options):
    quick = options.size == "quick"
    variance = [
        {"part": "variance", "seed": seed, "kind": kind, "blocks": 8 if quick else 64, "width": 32 if quick else 256}
        for seed in range(len(options.seeds) + (0 if quick else 2))
        for kind in KINDS[:-1]
    ]  # fmt: skip
    depths = {"quick": [2], "default": [4, 16, 64], "full": [4, 16, 64, 256, 1024, 5000]}[options.size]
    capped = [
        {"part": "speed", "seed": 1000 + seed, "kind": kind, "blocks": 2 if quick else 16, "width": 32, "steps": 4 if quick else 120}
        for seed in range(2 if quick else 5)
        for kind in ("unscaled", "SkipInit")
    ]  # fmt: skip
    return variance + capped + [
        {"part": "training", "seed": seed, "kind": kind, "blocks": blocks, "width": 32, "steps": 4 if quick else 120}
        for seed in options.seeds
        for blocks in depths
        for kind in KINDS
    ]  # fmt: skip


def measure(setting):
    if setting["part"] != "variance":
        return training(setting)
    torch.manual_seed(setting["seed"])
    width = setting["width"]
    model = network(setting["kind"], setting["blocks"], width, inputs=width)
    data = torch.randn(64, width), torch.arange(64) % 10
    flow = ss.gradient_flow(model, data, F.cross_entropy)
    return {"mean_square": [b.activation_rms**2 for b in flow.boundaries if b.kind == "merge"]}


def training(setting):
    runs = ss.train_twins(
        {"net": lambda: network(setting["kind"], setting["blocks"], setting["width"])},
        ss.reference.digits(split="train"),
        F.cross_entropy,
        seeds=[setting["seed"]],
        steps=setting["steps"],
        batch_size=64,
        optimizers={f"{rate}": sgd(rate) for rate in RATES},
    )
    found = {}
    for rate, curves in runs.curves["net"].items():
        losses = np.nan_to_num(curves.losses[0], nan=1e9, posinf=1e9)
        found[rate] = {
            "final": float(losses[-20:].mean()),
            "mean": float(losses.mean()),
            "capped": float(losses.clip(max=math.log(10)).mean()),
        }
    return {"by_rate": found}


def sgd(rate: float):
    return lambda parameters: torch.optim.SGD(parameters, rate, momentum=0.9)


def better(row, which: str) -> float:
    """The final or mean loss at the rate whose final loss is lower."""
    return min(row["by_rate"].values(), key=lambda found: found["final"])[which]


def trained(rows, kind, blocks) -> int:
    return sum(
        better(row, "final") < TRAINED for row in where(rows, part="training", kind=kind, blocks=blocks)
    )


def slope(rows, kind, low, high, log_blocks=False, base=math.e) -> Estimate:
    found = []
    for row in where(rows, part="variance", kind=kind):
        values = row["mean_square"]
        kept = [(b, v) for b, v in enumerate(values, 1) if low <= b <= high and 0 < v < math.inf]
        if len(kept) > 1:
            blocks, sizes = np.array(kept).T
            x = np.log(blocks) if log_blocks else blocks
            found.append(float(np.polyfit(x, np.log(sizes) / math.log(base), 1)[0]))
    return estimate(found)


def depth_verdict(rows, kind) -> Judgement:
    mine = where(rows, part="training")
    depths, seeds = sorted({row["blocks"] for row in mine}), len({row["seed"] for row in mine})
    ours, bare = ([trained(rows, k, blocks) for blocks in depths] for k in (kind, "unscaled"))
    everywhere = all(count == seeds for count in ours)
    at_least, more = all(a >= b for a, b in zip(ours, bare)), any(a > b for a, b in zip(ours, bare))
    counts = "; ".join(f"{d} blocks: {a} and {b} of {seeds}" for d, a, b in zip(depths, ours, bare))
    return Judgement(
        "shown" if everywhere and bare[-1] == 0 else "shown in part" if at_least and more else "not shown",
        f"trained with {kind}, and unscaled: {counts}",
        "A block has two layers.",
    )


def difference(rows, kind, blocks, other, which, part="training") -> Estimate:
    first, second = (
        [better(row, which) for row in where(rows, part=part, kind=k, blocks=blocks)] for k in (kind, other)
    )
    return paired(first, second)


def speed_verdict(found: Estimate, what: str) -> Judgement:
    return Judgement(
        "shown" if found.high < 0 else "too small to tell" if found.low <= 0 else "not shown",
        f"{what}: ReZero less unscaled {found}",
        "Each at the better of its two rates.",
    )


def judge(rows):
    bare = slope(rows, "unscaled", 1, 24, base=2)
    normed = slope(rows, "batch norm", 8, 64, log_blocks=True)
    held = sum(e.low >= 0.9 and e.high <= 1.1 for e in (bare, normed))
    depths = sorted({row["blocks"] for row in where(rows, part="training")})
    worse = {
        kind: difference(rows, kind, depths[-1], "batch norm", "final") for kind in ("SkipInit", "Fixup")
    }
    below = sum(e.high < 0.1 for e in worse.values())
    unclear = all(e.low <= 0 <= e.high for e in worse.values())
    speed = difference(rows, "SkipInit", 16 if 16 in depths else depths[0], "unscaled", "mean")
    blocks = where(rows, part="speed")[0]["blocks"]
    capped = difference(rows, "SkipInit", blocks, "unscaled", "capped", part="speed")
    return {
        "variance": Judgement(
            ("not shown", "shown in part", "shown")[held],
            f"without: a factor of $2^s$ a block, $s$ = {bare}; with: blocks to the power {normed}",
            "So with normalisation the branch of block l adds a share of 1/l only, which is what the remedies imitate.",
        ),
        "skipinit": depth_verdict(rows, "SkipInit"),
        "fixup": depth_verdict(rows, "Fixup"),
        "norm": Judgement(
            ("too small to tell" if unclear and below == 0 else ("not shown", "shown in part", "shown")[below]),
            "final loss less that with batch norm: " + "; ".join(f"{kind} {e}" for kind, e in worse.items()),
            f"At {depths[-1]} blocks; in nats of training loss after a few hundred steps.",
        ),
        "speed": speed_verdict(speed, "mean loss over the run"),
        "speed, capped": speed_verdict(capped, "mean capped loss over the run"),
    }  # fmt: skip


def table(rows):
    mine = where(rows, part="training")
    return [
        {
            "network": kind,
            **{
                f"{blocks} blocks": f"{geometric(better(row, 'final') for row in where(mine, kind=kind, blocks=blocks)).mean:.3g}"
                f" ({trained(rows, kind, blocks)} trained)"
                for blocks in sorted({row["blocks"] for row in mine})
            },
        }
        for kind in KINDS
    ]


def figures(rows):
    variance, axes = plt.subplots()
    for kind in KINDS:
        if mine := where(rows, part="variance", kind=kind):
            values = [
                geometric(max(v, 1e-12) for v in at) for at in zip(*(row["mean_square"] for row in mine))
            ]
            band(
                axes,
                range(1, len(values) + 1),
                values,
                kind,
                marker="",
                linestyle="--" if kind == "Fixup" else "-",
            )
    axes.set(
        xscale="log",
        yscale="log",
        ylim=(0.1, 1e6),
        xlabel="block",
        ylabel="mean square of the activations at the start",
    )
    axes.legend()

    depth, axes = plt.subplots()
    mine = where(rows, part="training")
    depths = sorted({row["blocks"] for row in mine})
    for kind, marker in zip(KINDS, "os^Dv"):
        losses = [
            np.exp(
                np.mean(
                    [math.log(min(better(row, "final"), 10.0)) for row in where(mine, kind=kind, blocks=d)]
                )
            )
            for d in depths
        ]
        axes.plot(depths, losses, marker=marker, label=kind)
    axes.axhline(math.log(10), color="black", linestyle=":", linewidth=0.8)
    axes.text(depths[0], math.log(10) * 1.1, "chance", fontsize=8).set_in_layout(False)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="blocks of two layers",
        ylabel="training loss after the last step (at most 10)",
    )
    axes.set_xticks(depths, depths)
    axes.minorticks_off()
    axes.legend()
    return {"variance": variance, "depth": depth}
