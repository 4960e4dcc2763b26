"""Removing layers of a trained language model: which can go, alone and together, and does `importance` foretell it?

A small GPT is trained on English text. `ss.importance` lesions each attention and each feed-forward branch alone, on
one part of the text that was not trained on. On another part we then measure what it costs to remove whole blocks and
random sets of branches (`ss.ablate`), and compare.
"""

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from scipy.stats import spearmanr

import skipscope as ss
from reproductions._report import Claim, Judgement, Reproduction, band, estimate, paired

REPRODUCTION = Reproduction(
    title="Removing layers of a language model",
    papers=(
        "X. Men, M. Xu, Q. Zhang, B. Wang, H. Lin, Y. Lu, X. Han, W. Chen: *ShortGPT: Layers in Large Language Models are More"
        " Redundant Than You Expect.* 2024, [arXiv 2403.03853](https://arxiv.org/abs/2403.03853)",
        "A. Gromov, K. Tirumala, H. Shapourian, P. Glorioso, D. A. Roberts: *The Unreasonable Ineffectiveness of the Deeper"
        " Layers.* 2024, [arXiv 2403.17887](https://arxiv.org/abs/2403.17887)",
        "S. He, G. Sun, Z. Shen, A. Li: *What Matters in Transformers? Not All Attention is Needed.* 2024,"
        " [arXiv 2406.15786](https://arxiv.org/abs/2406.15786)",
    ),
    claims=(
        Claim(
            "deeper",
            "The first block is indispensable, and the deeper a later one is, the less it costs to remove",
            "Men et al. and Gromov et al.: in large pruned models the deeper layers, but for the last ones, matter least",
            "Cost in loss of removing each block alone. *Shown* if the first block's cost exceeds the largest of the others',"
            " paired by seed, and the rank correlation of cost and depth from the second block to the last but one is below 0,"
            " both beyond their intervals; *in part* if one holds; else *not shown*.",
        ),
        Claim(
            "attention",
            "Attention branches cost less to remove than feed-forward branches",
            "He et al., abstract: many attention layers can be removed with little loss, fewer feed-forward layers",
            "Mean cost of removing one attention branch less that of one feed-forward branch, paired by seed. *Shown* if the"
            " interval lies below 0; *too small to tell* if it contains 0; else *not shown*.",
        ),
        Claim(
            "attention, later blocks",
            "The same, without the first block",
            "As above",
            "Written after the run, from the same networks: the first block's feed-forward branch alone decides the claim above."
            " The same criterion over the second block to the last.",
        ),
        Claim(
            "quarter",
            "A quarter of the blocks can be removed, without training again, at little cost",
            "Men et al. remove about a quarter of the layers of large models and keep most of their score",
            "The two of eight blocks that are cheapest alone are removed together: the cost in loss over the distance from the"
            " loss as built to the entropy of single bytes. *Shown* if the interval lies below 0.1; *in part* if below 0.25;"
            " else *not shown*.",
        ),
        Claim(
            "foretold",
            "The costs of single branches foretell the cost of removing several",
            "Not a paper's: what a user of `ss.importance` relies on (Veit et al. 2016 ask the same of residual networks)",
            "Rank correlation, over random sets of 2 to 6 branches, of the sum of the single costs by `ss.importance` with the"
            " measured cost on other text. *Shown* if its interval lies above 0.8; *in part* if above 0.5; else *not shown*.",
        ),
    ),
    setup=(
        "`ss.reference.gpt` with 8 blocks of width 48, trained by Adam on bytes of the text that every Python carries (its first"
        " four fifths), 500 steps of 16 passages of 48 bytes; costs are measured on the last fifth. A removed branch adds nothing:"
        ' `ss.ablate(model, shortcuts, "lesion")`. The papers prune models of billions of weights, trained on trillions of'
        " words: what is redundant there need not be here."
    ),
    seeds=4,
)  # fmt: skip


def settings(options):
    quick = options.size == "quick"
    return [
        {"seed": seed, "blocks": 3 if quick else 8, "width": 16 if quick else 48, "context": 16 if quick else 48,
         "steps": 3 if quick else 500, "passages": 4 if quick else 48, "sets": 6 if quick else 60}
        for seed in options.seeds
    ]  # fmt: skip


def passages(
    count: int, context: int, low: float, high: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Passages between two parts of the text, and the same moved on by one byte."""
    ids = ss.reference.english_text().ids
    draw = torch.Generator().manual_seed(seed)
    first, last = int(low * len(ids)), int(high * len(ids)) - context - 1
    starts = torch.randint(first, last, (count, 1), generator=draw)
    windows = ids[starts + torch.arange(context + 1)]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def trained(setting) -> torch.nn.Module:
    torch.manual_seed(setting["seed"])
    context, steps = setting["context"], setting["steps"]
    model = ss.reference.gpt(setting["blocks"], setting["width"], context=context)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 1.5 * (1 - step / steps), 1.0)
    )
    for step in range(steps):
        inputs, target = passages(16, context, 0.0, 0.8, seed=1000 * setting["seed"] + step)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), target).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def measure(setting):
    model = trained(setting)
    first = passages(setting["passages"], setting["context"], 0.8, 0.9, seed=setting["seed"])
    inputs, target = passages(4 * setting["passages"], setting["context"], 0.9, 1.0, seed=setting["seed"])
    found = ss.find_shortcuts(model, first[0])
    names = [shortcut.name for shortcut in found]
    ranking = ss.importance(model, first, F.cross_entropy, found=found)
    foretold = {one.name: one.lesioned.loss_cost for one in ranking if one.lesioned is not None}

    @torch.no_grad()
    def loss(chosen=()) -> float:
        edited = ss.ablate(model, [found[i] for i in chosen], "lesion", share=True) if len(chosen) else model
        return float(F.cross_entropy(edited(inputs), target))

    built = loss()
    draw = np.random.default_rng(setting["seed"])
    sets = [
        sorted(
            draw.choice(len(names), size=int(draw.integers(2, min(7, len(names)))), replace=False).tolist()
        )
        for _ in range(setting["sets"])
    ]
    blocks = {
        i: [k for k, name in enumerate(names) if name.startswith(f"h.{i}.")] for i in range(setting["blocks"])
    }
    block_costs = {i: loss(chosen) - built for i, chosen in blocks.items()}
    cheapest = sorted(block_costs, key=block_costs.__getitem__)[: setting["blocks"] // 4 or 1]
    ascending = sorted(range(len(names)), key=lambda k: foretold[names[k]])
    orders = {"least important first": ascending, "most important first": ascending[::-1]}
    orders["random order"] = draw.permutation(len(names)).tolist()
    return {
        "loss": built,
        "names": names,
        "foretold": [foretold[name] for name in names],
        "single": [loss([k]) - built for k in range(len(names))],
        "block": list(block_costs.values()),
        "quarter": loss([k for i in cheapest for k in blocks[i]]) - built,
        "random_sets": sets,
        "random_costs": [loss(chosen) - built for chosen in sets],
        "orders": {
            name: [loss(order[:k]) - built for k in range(1, len(names) + 1)]
            for name, order in orders.items()
        },
    }


def entropy() -> float:
    """Of single bytes of the text, in nats."""
    counts = ss.reference.english_text().ids.bincount().double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())


def rank_correlation(a, b) -> float:
    return float(spearmanr(a, b).statistic) if len(set(a)) > 1 and len(set(b)) > 1 else 0.0


def sums(row) -> list[float]:
    """The sum of the single costs by `importance`, for each random set."""
    return [sum(row["foretold"][k] for k in chosen) for chosen in row["random_sets"]]


def by_kind(row, kind) -> list[float]:
    return [cost for name, cost in zip(row["names"], row["single"]) if name.endswith(kind)]


def attention_verdict(rows, first: int) -> Judgement:
    attention, mlp = (
        [float(np.mean(by_kind(row, kind)[first:])) for row in rows] for kind in ("attn", "mlp")
    )
    cheaper = paired(attention, mlp)
    return Judgement(
        "shown" if cheaper.high < 0 else "too small to tell" if cheaper.low <= 0 else "not shown",
        f"attention less feed-forward: {cheaper} nats",
        f"Removed alone, an attention branch costs {estimate(attention)} nats, a feed-forward branch {estimate(mlp)}.",
    )


def without_first_mlp(row) -> float:
    """The rank correlation over the random sets that leave the costliest branch, the first feed-forward, in."""
    first = row["names"].index("h.0.mlp")
    kept = [i for i, chosen in enumerate(row["random_sets"]) if first not in chosen]
    return rank_correlation([sums(row)[i] for i in kept], [row["random_costs"][i] for i in kept])


def judge(rows):
    first = paired([row["block"][0] for row in rows], [max(row["block"][1:]) for row in rows])
    depth = estimate(rank_correlation(range(len(row["block"]) - 2), row["block"][1:-1]) for row in rows)
    held = (first.low > 0) + (depth.high < 0)
    share = estimate(row["quarter"] / (entropy() - row["loss"]) for row in rows)
    foretells = estimate(rank_correlation(sums(row), row["random_costs"]) for row in rows)
    excess = estimate(float(np.median(np.array(row["random_costs"]) / np.array(sums(row)))) for row in rows)
    again = estimate(rank_correlation(row["foretold"], row["single"]) for row in rows)
    return {
        "deeper": Judgement(
            ("not shown", "shown in part", "shown")[held],
            f"the first block costs {first} nats more than the worst other; rank correlation with depth {depth}",
            f"The first block costs {estimate(row['block'][0] for row in rows)} nats a byte.",
        ),
        "attention": attention_verdict(rows, 0),
        "attention, later blocks": attention_verdict(rows, 1),
        "quarter": Judgement(
            "shown" if share.high < 0.1 else "shown in part" if share.high < 0.25 else "not shown",
            f"{share} of what the model has learnt beyond single bytes",
            f"The loss as built is {estimate(row['loss'] for row in rows)} nats a byte; of single bytes {entropy():.2f}.",
        ),
        "foretold": Judgement(
            "shown" if foretells.low > 0.8 else "shown in part" if foretells.low > 0.5 else "not shown",
            f"rank correlation {foretells}",
            f"Over the sets that leave the first feed-forward branch in, it is {estimate(map(without_first_mlp, rows))}. A set"
            f" costs {excess} times the sum of its single costs (median over sets). On the other text the single costs"
            f" have the same order (rank correlation {again}).",
        ),
    }  # fmt: skip


def table(rows):
    found = []
    for block in range(len(rows[0]["block"])):
        line: dict = {"block": block + 1, "whole block": estimate(row["block"][block] for row in rows)}
        for kind, title in (("attn", "attention"), ("mlp", "feed-forward")):
            line[title] = estimate(by_kind(row, kind)[block] for row in rows)
        found.append(line)
    return found


def figures(rows):
    single, axes = plt.subplots()
    blocks = range(1, len(rows[0]["block"]) + 1)
    for kind, title in (("attn", "attention"), ("mlp", "feed-forward")):
        band(axes, blocks, [estimate(at) for at in zip(*(by_kind(row, kind) for row in rows))], title)
    band(axes, blocks, [estimate(at) for at in zip(*(row["block"] for row in rows))], "whole block")
    axes.set(xlabel="block", ylabel="cost of removing it (nats a byte)")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.legend()

    together, (left, right) = plt.subplots(1, 2, figsize=(7.4, 3.4))
    for row in rows:
        left.plot(sums(row), row["random_costs"], "o", markersize=2.5, alpha=0.6, label=f"seed {row['seed']}")
    limit = max(max(sums(row)) for row in rows)
    left.plot([0, limit], [0, limit], color="black", linewidth=0.8)
    left.set(
        xlabel="sum of single costs by importance", ylabel="measured cost", title="Random sets of branches"
    )
    left.legend(fontsize=7)
    for name in rows[0]["orders"]:
        values = [estimate(at) for at in zip(*(row["orders"][name] for row in rows))]
        band(right, range(1, len(values) + 1), values, name, marker="")
    right.set(xlabel="branches removed", ylabel="cost (nats a byte)", title="One after the other")
    right.legend(fontsize=8)
    return {"single": single, "together": together}
