"""Veit et al. 2016: residual networks behave like ensembles of paths, and most gradient comes from short ones.

Blocks are taken out of trained networks, one at a time and in random sets (`ss.ablate(..., how="lesion")`), with
shortcuts and in the plain twin. The gradient is sorted by the number of branches it crossed: exactly, over all 2^n
paths (`ss.path_spectrum`), and by the paper's estimate from single paths drawn at random.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from scipy.stats import linregress, spearmanr

import skipscope as ss
from reproductions import _images
from reproductions._report import Claim, Estimate, Judgement, Reproduction, band, estimate, paired, where

CHANCE = 90.0  # percent
REPRODUCTION = Reproduction(
    title="Ensembles of paths",
    papers=(
        "A. Veit, M. Wilber, S. Belongie: *Residual Networks Behave Like Ensembles of Relatively Shallow Networks*, NeurIPS"
        " 2016, [arXiv 1605.06431](https://arxiv.org/abs/1605.06431)",
    ),
    claims=(
        Claim(
            "single",
            "Taking a single block out of a residual network hardly changes its error; without shortcuts it is lost",
            "Section 4.1, figure 3: a ResNet of 110 layers and a VGG network of 15 on CIFAR-10",
            "The error with one block taken out, as a share of the way from the whole network's error to chance; median over"
            " blocks, at 20 layers. *Shown* if the interval with shortcuts lies below 0.1 and that without above 0.5; *in part* if"
            " only one of these, or if only the paired difference lies above 0; else *not shown*.",
        ),
        Claim(
            "sets",
            "With shortcuts the error rises smoothly with the number of blocks taken out, as that of an ensemble does",
            "Section 4.2, figure 5a: up to 20 random blocks out of 54",
            "Random sets of blocks at the greatest depth, mean error by number of blocks. *Shown* if the interval of its rank"
            " correlation with the number lies above 0.9, and that of the share of blocks that must go until the mean error is"
            " half way to chance lies above 0.1; *in part* if only the first; else *not shown*.",
        ),
        Claim(
            "decay",
            "The gradient along a single path shrinks exponentially with the number of branches on it",
            "Section 5, figure 6: paths of given length, drawn at random",
            "A straight line through log10 of the mean norm of single paths' gradients against their length. *Shown* if the"
            " intervals of its slope and of $1 - R^2$ lie below 0 and below 0.05; *in part* if only the slope's; else *not shown*.",
        ),
        Claim(
            "short",
            "Most of the gradient comes from short paths, which are a small share of all paths",
            "Section 5, figure 6: the product of a path's gradient and the number of such paths; less than one percent of paths"
            " carry almost all gradient",
            "Exact spectrum of the trained network. *Shown* if the interval of the mean length, weighted by the gradient, lies"
            " below the mean length of all paths, n/2, and the lengths that hold nine tenths of the gradient (as few as"
            " possible) are those of less than 5 % of all paths; *in part* if only the first; else *not shown*.",
        ),
        Claim(
            "sampled",
            "The number of paths of a length times the mean gradient of sampled ones tells how much gradient comes by that length",
            "Section 5, figure 6c: the paper's estimate; it adds up the norms of single paths, whose gradients may cancel",
            "The mean length by that estimate less that of the exact spectrum, over n. *Shown* if its paired interval lies within"
            " -0.1 to 0.1; *in part* if the estimate's mean length, too, lies below n/2; else *not shown*.",
        ),
    ),
    setup=(
        "Networks with pre-activation as in the paper, of 20 and 56 layers (9 and 27 blocks; the paper's 110 layers with"
        " `--full`), 8, 16 and 32 channels, trained 20 epochs on the digits (SGD, momentum 0.9, rate 0.1 in three steps, decay"
        " 0.0001, batches of 64), tested on 360 images. The plain network is the same one with its shortcuts removed before"
        " training; taking one of its blocks out joins what is before it to what is after it. Nothing is trained or measured"
        " again after a block is gone. Gradients are those of the loss on 64 test images with respect to the images, in"
        " evaluation mode. A single path's gradient goes through the branches of chosen blocks and through the shortcuts of"
        " the others; the forward pass stays as it is. Where there is one path only, of length 0 or n, the estimate and the"
        " exact spectrum must agree. The paper's third experiment, blocks in another order, is not repeated."
    ),
    seeds=3,
    takes_cifar=True,
)  # fmt: skip


def settings(options):
    shallow, deep = {"quick": (8, 14), "default": (20, 56), "full": (20, 110)}[options.size]
    quick = options.size == "quick"
    widths, epochs = (
        ([4, 4, 8], 1) if quick else (_images.PAPER if options.size == "full" else _images.SMALL, 20)
    )
    found = []
    for seed in options.seeds:
        for depth, shortcuts in ((shallow, True), (shallow, False), (deep, True)):
            spec = {
                "depth": depth, "shortcuts": shortcuts, "seed": seed, "widths": widths, "block": "pre-activation",
                "epochs": 100 if options.cifar else epochs, "batch": 128 if quick or options.cifar else 64,
                "cifar": options.cifar, **_images.HE,
            }  # fmt: skip
            found.append({"part": "lesions", "sets": 2 if quick else 10, **spec})
        found.append({"part": "paths", "draws": 2 if quick else 8, **spec})  # of the deep one
    return found


def network(setting):
    """The trained network, and the shortcuts of the network that it was made from."""
    spec = {key: value for key, value in setting.items() if key not in {"part", "sets", "draws"}}

    def make():
        whole = _images.PreResNet(spec["depth"], spec["widths"], spec["cifar"])
        return whole if spec["shortcuts"] else _images.plain(whole, spec["cifar"])

    found = ss.find_shortcuts(
        _images.PreResNet(spec["depth"], spec["widths"], spec["cifar"]), _images.blank(spec["cifar"])
    )
    return _images.trained(make, spec)[0], found


def without_blocks(setting, model, found, gone) -> torch.nn.Module:
    """The trained network without these blocks: their input is joined to their output."""
    out, kept = [found[i] for i in gone], [s for i, s in enumerate(found) if i not in gone]
    if setting["shortcuts"]:
        return ss.ablate(model, out, how="lesion", share=True)
    # A plain network has no shortcuts left to keep: the same weights, in a network that keeps those of the gone blocks.
    whole = _images.PreResNet(setting["depth"], setting["widths"], setting["cifar"])
    whole.load_state_dict(model.state_dict())
    whole = whole.to(next(model.parameters()).device).eval()
    others = ss.ablate(whole, kept, how="remove") if kept else whole
    return ss.ablate(others, out, how="lesion")


def measure(setting):
    model, found = network(setting)
    return paths(setting, model, found) if setting["part"] == "paths" else lesions(setting, model, found)


def lesions(setting, model, found):
    def error(gone) -> float:
        return _images.test_error(without_blocks(setting, model, found, gone), setting["cifar"])

    blocks = len(found)
    draw = np.random.default_rng(setting["seed"])
    numbers = sorted({max(1, round(share * blocks)) for share in (0.04, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)})
    sets = {
        k: [draw.choice(blocks, k, replace=False).tolist() for _ in range(setting["sets"])] for k in numbers
    }
    return {
        "error": _images.test_error(model, setting["cifar"]),
        "single": [error([i]) for i in range(blocks)],
        "removed": numbers,
        "errors": [[error(gone) for gone in sets[k]] for k in numbers],
    }  # fmt: skip


def paths(setting, model, found):
    inputs, target = _images.images(setting["cifar"], "test")
    data = inputs[:64], target[:64]
    exact = ss.path_spectrum(model, data, F.cross_entropy)
    draw = np.random.default_rng(setting["seed"])
    blocks, singles = len(found), []
    for length in range(blocks + 1):
        draws = 1 if length in {0, blocks} else setting["draws"]
        chosen = [draw.choice(blocks, length, replace=False) for _ in range(draws)]
        singles.append([single_path(model, found, set(map(int, some)), data) for some in chosen])
    torch.manual_seed(setting["seed"])
    fresh = _images.PreResNet(setting["depth"], setting["widths"], setting["cifar"]).to(inputs.device)
    start = ss.path_spectrum(fresh, data, F.cross_entropy)
    return {
        "blocks": blocks,
        "exact": exact.norms,
        "start": start.norms,
        "residual": exact.residual,
        "singles": singles,
    }


def single_path(model, found, branches: set[int], data) -> float:
    """The norm of the gradient that goes through these blocks' branches and the other blocks' shortcuts."""
    inputs, target = data[0].clone().requires_grad_(), data[1]
    only = [found[i] for i in sorted(branches)]
    twin = ss.ablate(model, only, how="detach", share=True, allow_empty=True)
    modules = dict(twin.named_modules())
    for i, shortcut in enumerate(found):
        if i not in branches:  # the branch ends here: its last layer hands no gradient back
            modules[shortcut.branch[-1]].register_full_backward_hook(lambda _, back, out: (back[0] * 0,))
    loss = F.cross_entropy(twin(inputs), target)
    [gradient] = torch.autograd.grad(loss, inputs, materialize_grads=True)
    return float(gradient.double().norm())


def counts(blocks: int) -> np.ndarray:
    """How many paths there are of each length."""
    return np.array([math.comb(blocks, k) for k in range(blocks + 1)], dtype=float)


def mean_length(norms) -> float:
    norms = np.asarray(norms, dtype=float)
    return float(norms @ np.arange(len(norms)) / norms.sum())


def sampled(row) -> np.ndarray:
    """The paper's estimate: the number of paths of a length times the mean norm of those drawn."""
    return counts(row["blocks"]) * np.array([np.mean(norms) for norms in row["singles"]])


def share_of_paths(norms) -> float:
    """The share of all paths that have one of the fewest lengths that hold nine tenths of the gradient."""
    norms = np.asarray(norms, dtype=float)
    order = np.argsort(norms)[::-1]
    few = order[: int(np.searchsorted(np.cumsum(norms[order]), 0.9 * norms.sum())) + 1]
    every = counts(len(norms) - 1)
    return float(every[few].sum() / every.sum())


def to_chance(row, error) -> float:
    return (error - row["error"]) / max(CHANCE - row["error"], 1.0)


def half_way(row) -> float:
    """The share of blocks that must go until the mean error is half way to chance, on the straight line between."""
    removed = [0, *row["removed"]]
    means = [0.0, *(to_chance(row, np.mean(errors)) for errors in row["errors"])]
    for i in range(1, len(means)):
        if means[i] >= 0.5:
            part = (0.5 - means[i - 1]) / (means[i] - means[i - 1])
            return (removed[i - 1] + part * (removed[i] - removed[i - 1])) / len(row["single"])
    return 1.0


def fit(row):
    lengths = [k for k, norms in enumerate(row["singles"]) if np.mean(norms) > 0]
    return linregress(lengths, [math.log10(np.mean(row["singles"][k])) for k in lengths])


def lesion_rows(rows, shortcuts, deep=False):
    depths = sorted({row["depth"] for row in rows})
    return where(rows, part="lesions", shortcuts=shortcuts, depth=depths[-1] if deep else depths[0])


def single_shares(rows, shortcuts, deep=False) -> list[float]:
    found = lesion_rows(rows, shortcuts, deep)
    return [float(np.median([to_chance(row, error) for error in row["single"]])) for row in found]


def judge(rows):
    residual, plain = single_shares(rows, True), single_shares(rows, False)
    kept, lost, apart = estimate(residual), estimate(plain), paired(plain, residual)
    is_kept, is_lost = kept.high < 0.1, lost.low > 0.5
    deep = lesion_rows(rows, True, deep=True)
    ranks = estimate(
        spearmanr([0, *row["removed"]], [row["error"], *map(np.mean, row["errors"])]).statistic
        for row in deep
    )
    half = estimate(map(half_way, deep))
    spectra = where(rows, part="paths")
    n = spectra[0]["blocks"]
    fits = [fit(row) for row in spectra]
    slope, unfit = estimate(f.slope for f in fits), estimate(1 - f.rvalue**2 for f in fits)
    exact = [mean_length(row["exact"]) for row in spectra]
    theirs = [mean_length(sampled(row)) for row in spectra]
    length, few = estimate(exact), estimate(share_of_paths(row["exact"]) for row in spectra)
    off = paired([x / n for x in theirs], [x / n for x in exact])
    ends = max(abs(sampled(row)[k] / row["exact"][k] - 1) for row in spectra for k in (0, n))
    excess = estimate(float(sampled(row).sum() / np.sum(row["exact"])) for row in spectra)
    return {
        "single": Judgement(
            "shown" if is_kept and is_lost else "shown in part" if is_kept or is_lost or apart.low > 0 else "not shown",
            f"one block gone costs {kept} of the way to chance with shortcuts, {lost} without",
            f"Paired difference: {apart}. In the deeper residual network: {estimate(single_shares(rows, True, deep=True))}.",
        ),
        "sets": Judgement(
            "not shown" if not ranks.low > 0.9 else "shown" if half.low > 0.1 else "shown in part",
            f"the error is half way to chance with {half} of all blocks gone; rank correlation {ranks}",
            f"Random sets of the {len(deep[0]['single'])} blocks.",
        ),
        "decay": Judgement(
            "not shown" if not slope.high < 0 else "shown" if unfit.high < 0.05 else "shown in part",
            f"each branch multiplies a path's gradient by $10^s$, $s$ = {slope}",
            f"Not explained by the straight line ($1 - R^2$): {unfit}.",
        ),
        "short": Judgement(
            "not shown" if not length.high < n / 2 else "shown" if few.high < 0.05 else "shown in part",
            f"mean length {length} of {n}; nine tenths of the gradient come by {percent(few)} of all paths",
            f"All paths have a mean length of {n / 2}. At the start of training, in training mode, the mean length is"
            f" {estimate(mean_length(row['start']) for row in spectra)}.",
        ),
        "sampled": Judgement(
            "shown" if off.low >= -0.1 and off.high <= 0.1 else "shown in part" if estimate(theirs).high < n / 2 else "not shown",
            f"mean length {estimate(theirs)} by single paths, {length} exactly",
            f"The norms of single paths add up to {excess} times those of the exact spectrum: paths of one length cancel each"
            f" other. Where there is one path only the two agree to {max(ends, 1e-6):.0g}.",
        ),
    }  # fmt: skip


def percent(found: Estimate) -> str:
    return f"{100 * found.mean:.2g} % [{100 * found.low:.2g}, {100 * found.high:.2g}]"


def table(rows):
    lines = []
    for name, shortcuts, deep in (
        ("residual", True, False),
        ("plain", False, False),
        ("residual, deep", True, True),
    ):
        found = lesion_rows(rows, shortcuts, deep)
        lines.append(
            {
                "network": name,
                "blocks": len(found[0]["single"]),
                "test error (%)": estimate(row["error"] for row in found),
                "one block gone, median (%)": estimate(np.median(row["single"]) for row in found),
                "worst block gone (%)": estimate(max(row["single"]) for row in found),
                "share of blocks gone, half way to chance": estimate(map(half_way, found)),
            }
        )
    return lines


def figures(rows):
    single, (left, right) = plt.subplots(1, 2)
    for name, shortcuts in (("with shortcuts", True), ("without", False)):
        found = lesion_rows(rows, shortcuts)
        errors = np.array([row["single"] for row in found]).T
        band(left, range(len(errors)), [estimate(e) for e in errors], name)
    left.set(xlabel="block taken out", ylabel="test error (%)", ylim=(0, 100))
    left.legend()
    for name, shortcuts, deep in (
        ("with shortcuts", True, False),
        ("without", False, False),
        ("with, deep", True, True),
    ):
        found = lesion_rows(rows, shortcuts, deep)
        blocks = len(found[0]["single"])
        means = np.array([[row["error"], *map(np.mean, row["errors"])] for row in found]).T
        shares = [0, *(k / blocks for k in found[0]["removed"])]
        band(right, shares, [estimate(m) for m in means], name)
    right.set(xlabel="share of blocks taken out, at random", ylim=(0, 100))
    right.legend()

    spectrum, (sizes, shares) = plt.subplots(1, 2)
    found = where(rows, part="paths")
    lengths = range(found[0]["blocks"] + 1)
    logs = np.array([[math.log10(max(np.mean(n), 1e-300)) for n in row["singles"]] for row in found]).T
    band(sizes, lengths, [estimate(values) for values in logs])
    sizes.set(xlabel="branches on the path", ylabel="log10 of a single path's gradient")
    for label, of in (("exact", lambda row: row["exact"]), ("by single paths", sampled)):
        each = np.array([np.asarray(of(row)) / np.sum(of(row)) for row in found]).T
        band(shares, lengths, [estimate(values) for values in each], label)
    every = counts(found[0]["blocks"])
    shares.plot(lengths, every / every.sum(), ":", color="black", linewidth=1, label="all paths")
    shares.set(xlabel="branches crossed", ylabel="share of the gradient", ylim=(0, None))
    shares.legend()
    return {"lesions": single, "paths": spectrum}
