"""Orhan & Pitkow 2018: shortcuts take degenerate directions out of the loss, so that deep networks train faster.

All eigenvalues of the Hessian, exactly (`ss.curvature_operator` times the identity matrix, in float64), of small deep
networks with shortcuts and without, at the start and after some training: how many of them are next to zero?
"""

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from scipy.stats import spearmanr

import skipscope as ss
from reproductions._report import Claim, Judgement, Reproduction, estimate, paired, where

CUT = 1e-3  # of max |lambda|: eigenvalues within are degenerate
REPRODUCTION = Reproduction(
    title="Singularities",
    papers=(
        "A. E. Orhan, X. Pitkow: *Skip Connections Eliminate Singularities*, ICLR 2018,"
        " [arXiv 1701.09175](https://arxiv.org/abs/1701.09175)",
    ),
    claims=(
        Claim(
            "degenerate",
            "Without shortcuts more of the Hessian's eigenvalues are next to zero",
            "Section 3: the share of degenerate eigenvalues of fully connected networks of 10 to 30 layers during training,"
            " estimated from the spectrum's moments; it is greater in plain networks than in residual ones",
            "The share of eigenvalues within a thousandth of the greatest |lambda|, at the greater depth, without shortcuts less"
            " with. *Shown* if the paired interval lies above 0 at the start and after training; *in part* if at one of the two"
            " and it does not lie below 0 at the other; *not shown* if it lies below 0 at one; else *too small to tell*.",
        ),
        Claim(
            "depth",
            "Depth makes plain networks more degenerate, and residual ones less so",
            "Section 3 and the analysis of linear networks: a product of many matrices becomes singular",
            "The same share at the start, at the greater depth less at the smaller one. *Shown* if the interval of the rise without"
            " shortcuts lies above 0, and that of its excess over the rise with them, too; *in part* if only the first; else *not"
            " shown*.",
        ),
        Claim(
            "training",
            "The less degenerate network trains faster",
            "Section 3: among plain networks that differ in nothing but the draw of their weights, those that train worse are the"
            " more degenerate ones",
            "Rank correlation, over seeds and both depths of plain networks, of the degenerate share at the start with the loss"
            " after training, within each depth (ranks are taken by depth). *Shown* if it is above 0 with p < 0.05; *not shown* if"
            " below 0 with p < 0.05; else *too small to tell*.",
        ),
    ),
    setup=(
        "Fully connected ReLU networks of 4 and 16 hidden layers, 8 units wide (the paper's are 128 wide), He's initialisation,"
        " with `x + layer(x)` and without; 256 digits; 200 steps of Adam at 0.003 on all of them. Nearly 1,700 weights: small"
        " enough for every eigenvalue, so nothing is estimated. The residual network is `ss.add_shortcuts` of the plain one, with"
        " the same weights."
    ),
    seeds=6,
)  # fmt: skip
KINDS = ("without", "with")


def settings(options):
    depths, width, steps = ([2, 3], 3, 5) if options.size == "quick" else ([4, 16], 8, 200)
    return [
        {"kind": kind, "depth": depth, "width": width, "steps": steps, "seed": seed}
        for seed in options.seeds
        for depth in depths
        for kind in KINDS
    ]


def measure(setting):
    inputs, target = ss.reference.digits(256)
    data = inputs.double(), target
    torch.manual_seed(setting["seed"])
    model = ss.reference.deep_mlp(setting["depth"], setting["width"], init="he", activation="relu").double()
    if setting["kind"] == "with":
        model = ss.add_shortcuts(model, data[0], report=None)
    found = {"start": spectrum(model, data)}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    losses = []
    for _ in range(setting["steps"]):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data[0]), data[1])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return found | {
        "trained": spectrum(model, data),
        "losses": losses[:: max(1, len(losses) // 20)],
        "loss": losses[-1],
    }


def spectrum(model, data) -> dict:
    """Every eigenvalue of the Hessian of the loss: how many are degenerate, the greatest, and their sizes, thinned."""
    operator = ss.curvature_operator(model, data, F.cross_entropy)
    hessian = operator.matmat(np.eye(operator.shape[0]))
    values = np.linalg.eigvalsh((hessian + hessian.T) / 2)
    sizes = np.sort(np.abs(values))[::-1] / np.abs(values).max()
    thinned = np.linspace(0, len(sizes) - 1, 41).round().astype(int)
    return {
        "weights": len(values),
        "shares": [float(np.mean(sizes <= cut)) for cut in (CUT, CUT / 10)],
        "greatest": float(values[-1]),
        "sizes": sizes[thinned],
    }


def shares(rows, kind, depth, when="start", cut=0) -> list[float]:
    return [row[when]["shares"][cut] for row in where(rows, kind=kind, depth=depth)]


def judge(rows):
    shallow, deep = sorted({row["depth"] for row in rows})
    more = {
        when: paired(*(shares(rows, kind, deep, when) for kind in KINDS)) for when in ("start", "trained")
    }
    above, below = sum(m.low > 0 for m in more.values()), sum(m.high < 0 for m in more.values())
    rises = {
        kind: [b - a for a, b in zip(shares(rows, kind, shallow), shares(rows, kind, deep))] for kind in KINDS
    }
    rise, excess = estimate(rises["without"]), paired(rises["without"], rises["with"])
    ranks: list[np.ndarray] = [[], []]
    for depth in (shallow, deep):
        for place, values in enumerate(
            (
                shares(rows, "without", depth),
                [row["loss"] for row in where(rows, kind="without", depth=depth)],
            )
        ):
            ranks[place] = [*ranks[place], *np.argsort(np.argsort(values))]
    rank = spearmanr(*ranks)
    return {
        "degenerate": Judgement(
            "not shown" if below else "shown" if above == 2 else "shown in part" if above else "too small to tell",
            f"{deep} layers: the degenerate share without shortcuts is {more['start']} greater at the start,"
            f" {more['trained']} after training",
            f"With a cut ten times as small, at the start: {paired(*(shares(rows, kind, deep, cut=1) for kind in KINDS))}. The"
            " cut is relative: without a norm the greatest eigenvalue of the residual network grows with depth, by decades.",
        ),
        "depth": Judgement(
            "not shown" if not rise.low > 0 else "shown" if excess.low > 0 else "shown in part",
            f"from {shallow} to {deep} layers the share rises by {rise} without shortcuts, by {excess} more than with",
            f"With shortcuts it rises by {estimate(rises['with'])}.",
        ),
        "training": Judgement(
            "too small to tell" if not rank.pvalue < 0.05 else "shown" if rank.statistic > 0 else "not shown",
            f"rank correlation {rank.statistic:.2f} (p = {rank.pvalue:.2g}) over {len(ranks[0])} plain networks",
            f"Loss after training, {deep} layers: "
            + ", ".join(f"{estimate(row['loss'] for row in where(rows, kind=kind, depth=deep))} {kind}" for kind in KINDS)
            + " shortcuts.",
        ),
    }  # fmt: skip


def table(rows):
    return [
        {
            "network": f"{depth} layers, {kind} shortcuts",
            "weights": where(rows, kind=kind, depth=depth)[0]["start"]["weights"],
            "degenerate, start": estimate(shares(rows, kind, depth)),
            "degenerate, trained": estimate(shares(rows, kind, depth, "trained")),
            "greatest eigenvalue, start": estimate(row["start"]["greatest"] for row in where(rows, kind=kind, depth=depth)),
            "loss after training": estimate(row["loss"] for row in where(rows, kind=kind, depth=depth)),
        }
        for depth in sorted({row["depth"] for row in rows})
        for kind in KINDS
    ]  # fmt: skip


def figures(rows):
    deep = max(row["depth"] for row in rows)
    figure, panels = plt.subplots(1, 2, sharey=True)
    for axes, when in zip(panels, ("start", "trained")):
        for kind in reversed(KINDS):
            curves = [row[when]["sizes"] for row in where(rows, kind=kind, depth=deep)]
            mean = np.exp(np.mean(np.log(np.maximum(curves, 1e-16)), axis=0))
            axes.plot(np.linspace(0, 1, len(mean)), mean, label=f"{kind} shortcuts")
        axes.axhline(CUT, color="black", linewidth=0.7, linestyle=":")
        axes.set(yscale="log", ylim=(1e-9, 1.5), xlabel="share of eigenvalues", title=when)
    panels[0].set_ylabel("|lambda| / max |lambda|")
    panels[0].legend()
    return {"spectrum": figure}
