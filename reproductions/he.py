"""He et al. 2016: the identity is the best shortcut, and activation before the weights trains deep networks better.

One residual network whose identity shortcuts become other kinds (`ss.rewire`), or are removed (`ss.ablate`), trained
by the same recipe; and its counterpart with pre-activation. Each against the identity, seed by seed.
"""

from matplotlib import pyplot as plt
from torch import nn

import skipscope as ss
from reproductions import _images
from reproductions._report import Claim, Judgement, Reproduction, estimate, paired, where

REPRODUCTION = Reproduction(
    title="Kinds of shortcuts",
    papers=(
        "K. He, X. Zhang, S. Ren, J. Sun: *Identity Mappings in Deep Residual Networks*, ECCV 2016,"
        " [arXiv 1603.05027](https://arxiv.org/abs/1603.05027)",
    ),
    claims=(
        Claim(
            "identity",
            "The identity is the best shortcut: scaling, gates, 1 x 1 convolutions and dropout on it make the error higher",
            "Section 3, table 1: ResNet-110 on CIFAR-10; every other kind has a higher test error than the identity",
            "The test error of each other kind less that of the identity, paired over seeds. *Shown* if at least six of the eight"
            " intervals lie above 0 and none below; *in part* if at least one lies above and none below; *too small to tell* if"
            " all contain 0; else *not shown*.",
        ),
        Claim(
            "gates",
            "A gated shortcut works the better the more open it starts: a bias of -6 is better than one of 0",
            "Section 3, table 1: the shortcut-only gate of bias 0 is far worse than that of bias -6, which comes close to the"
            " identity; the exclusive gate depends on its bias as much",
            "The test error with a bias of 0 less that with one of -6. *Shown* if the paired interval lies above 0 for the"
            " shortcut-only gate and that of the exclusive gate is not below 0; *in part* if only for the exclusive gate; *too"
            " small to tell* if both contain 0; else *not shown*.",
        ),
        Claim(
            "training",
            "What impairs the shortcut impairs the training itself, not only the generalisation",
            "Section 3.5 and figure 3: kinds with more parameters, gates and 1 x 1 convolutions, could stand in for the identity,"
            " yet have a higher training error: a matter of optimisation",
            "The training loss at the end of gates (bias 0), 1 x 1 convolutions and dropout, less that of the identity. *Shown* if"
            " all four paired intervals lie above 0; *in part* if at least one does and none lies below; *too small to tell* if"
            " all contain 0; else *not shown*.",
        ),
        Claim(
            "activation",
            "Pre-activation has a lower test error than post-activation",
            "Section 4, tables 2 and 3: a small difference at 110 layers, a great one at 1001",
            "The test error of post-activation (the identity above) less that of pre-activation. *Shown* if the paired interval"
            " lies above 0; *too small to tell* if it contains 0; else *not shown*.",
        ),
    ),
    setup=(
        "A ResNet of 20 layers with 8, 16 and 32 channels (the paper: 110 layers, 16 to 64 channels; `--full`), on the 1,437"
        " training digits, tested on 360. SGD, momentum 0.9, rate 0.1 divided by 10 at a half and at three quarters, decay"
        " 0.0001, batches of 64, 20 epochs; no warm-up. All kinds start from the same weights and see the same batches. As in"
        " table 1, ReLU follows the sum, and every shortcut is of the kind, also the two where the shape changes. Exclusive"
        " gate: $(1 - g) x + g F$; shortcut-only gate: $(1 - g) x + F$; $g$ a 1 x 1 convolution and a sigmoid. Dropout: half of"
        " the shortcut's elements in training. Pre-activation: batch norm and ReLU before each convolution, nothing after the"
        " sum."
    ),
    seeds=4,
    takes_cifar=True,
)  # fmt: skip
IDENTITY, PRE = "identity", "identity, pre-activation"
# Name -> kind of `skipscope.nn.registry()` and its arguments.
KINDS = {
    "0.5 x + 0.5 F": ("scaled", {"scale": 0.5, "branch_scale": 0.5}),
    "0.5 x + F": ("scaled", {"scale": 0.5, "branch_scale": 1.0}),
    "exclusive gate, bias 0": ("exclusive-gate", {"bias": 0.0}),
    "exclusive gate, bias -6": ("exclusive-gate", {"bias": -6.0}),
    "shortcut-only gate, bias 0": ("shortcut-only-gate", {"bias": 0.0}),
    "shortcut-only gate, bias -6": ("shortcut-only-gate", {"bias": -6.0}),
    "1 x 1 convolution": ("projection", {}),
    "dropout 0.5": ("dropout", {"p": 0.5}),
}
OTHERS = (*KINDS, "none")
ORDER = (IDENTITY, *OTHERS, PRE)


def settings(options):
    depth, widths, epochs, batch = {
        "quick": (8, [4, 4, 8], 1, 256), "default": (20, _images.SMALL, 20, 64), "full": (110, _images.PAPER, 60, 128),
    }[options.size]  # fmt: skip
    epochs, batch = (164, 128) if options.cifar else (epochs, batch)
    return [
        {
            "kind": kind,
            "seed": seed,
            "depth": depth,
            "widths": widths,
            "epochs": epochs,
            "batch": batch,
            "cifar": options.cifar,
            **_images.HE,
        }
        for seed in options.seeds
        for kind in ORDER
    ]


def network(setting):
    """The network before training."""
    arguments = setting["depth"], setting["widths"], setting["cifar"]
    if setting["kind"] == PRE:
        return _images.PreResNet(*arguments)
    model = _images.resnet(*arguments)
    if setting["kind"] == IDENTITY:
        return model
    if setting["kind"] == "none":
        return _images.plain(model, setting["cifar"])
    kind, own = KINDS[setting["kind"]]
    rewired = ss.rewire(model, kind=kind, inputs=_images.blank(setting["cifar"]), **own)
    for module in rewired.shortcuts.modules():
        if isinstance(module, nn.Linear):  # 1 x 1 convolutions, of gates too, start as the network's own do
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return rewired


def measure(setting):
    model, _ = _images.trained(lambda: network(setting), setting)
    return _images.accuracy(model, setting["cifar"])


def values(rows, kind, name="test_error") -> list[float]:
    return [row[name] for row in where(rows, kind=kind)]


def worse(rows, kind, name="test_error", than=IDENTITY):
    return paired(values(rows, kind, name), values(rows, than, name))


def judge(rows):
    costs = {kind: worse(rows, kind) for kind in KINDS}
    above = [kind for kind, cost in costs.items() if cost.low > 0]
    below = [kind for kind, cost in costs.items() if cost.high < 0]
    alone, exclusive = (
        worse(rows, f"{gate}, bias 0", than=f"{gate}, bias -6")
        for gate in ("shortcut-only gate", "exclusive gate")
    )
    hard = ("exclusive gate, bias 0", "shortcut-only gate, bias 0", "1 x 1 convolution", "dropout 0.5")
    losses = {kind: worse(rows, kind, "train_loss") for kind in hard}
    harder = [kind for kind, cost in losses.items() if cost.low > 0]
    easier = [kind for kind, cost in losses.items() if cost.high < 0]
    activation = paired(values(rows, IDENTITY), values(rows, PRE))
    none = worse(rows, "none")
    return {
        "identity": Judgement(
            "not shown" if below else "shown" if len(above) >= 6 else "shown in part" if above else "too small to tell",
            f"{len(above)} of {len(KINDS)} kinds are worse than the identity beyond their interval, {len(below)} better",
            f"Worse: {'; '.join(above) or 'none'}. Better: {'; '.join(below) or 'none'}. No shortcuts at all: {none} points.",
        ),
        "gates": Judgement(
            "shown" if alone.low > 0 and exclusive.high >= 0
            else "not shown" if alone.high < 0 or exclusive.high < 0
            else "shown in part" if exclusive.low > 0 else "too small to tell",
            f"a bias of 0 costs {alone} points with the shortcut-only gate, {exclusive} with the exclusive one",
            "Test error with a bias of 0 less that with one of -6.",
        ),
        "training": Judgement(
            "not shown" if easier else "shown" if len(harder) == len(hard) else "shown in part" if harder else "too small to tell",
            f"{len(harder)} of {len(hard)} kinds end at a higher training loss than the identity",
            "; ".join(f"{kind}: {cost}" for kind, cost in losses.items()) + ".",
        ),
        "activation": Judgement(
            "shown" if activation.low > 0 else "not shown" if activation.high < 0 else "too small to tell",
            f"post-activation has {activation} points more",
            "In the paper the difference is small at 110 layers, and grows with depth.",
        ),
    }  # fmt: skip


def table(rows):
    return [
        {
            "shortcut": kind,
            "test error (%)": estimate(values(rows, kind)),
            "less the identity's, paired": worse(rows, kind) if kind != IDENTITY else "",
            "training error (%)": estimate(values(rows, kind, "train_error")),
            "training loss": estimate(values(rows, kind, "train_loss")),
        }
        for kind in ORDER
    ]


def figures(rows):
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for place, kind in enumerate(ORDER):
        errors = values(rows, kind)
        axes.plot(errors, [place] * len(errors), "o", color="#9a9a98", markersize=3, zorder=1)
        found = estimate(errors)
        axes.errorbar(
            found.mean, place, xerr=[[found.mean - found.low], [found.high - found.mean]], fmt="o", capsize=3,
            color="#c8500a" if kind in (IDENTITY, PRE) else "#0067a5",
        )  # fmt: skip
    axes.set(
        yticks=range(len(ORDER)), yticklabels=ORDER, xlabel="test error (%): seeds, mean and 95 % interval"
    )
    axes.set(xscale="log", xlim=(2, 105), xticks=(2, 5, 10, 20, 50, 100))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.invert_yaxis()
    return {"kinds": figure}
