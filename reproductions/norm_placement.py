"""Xiong et al. 2020 and Wang et al. 2022: where a transformer's norm stands, and DeepNorm.

Small transformers that predict English text byte by byte, with the norm before each branch, after each sum, or after
a sum with a scaled shortcut (DeepNorm): the gradient of each layer at the start (`ss.gradient_flow`), how far one
step moves the output, and training with and without a warm-up of the learning rate (`ss.train_twins`).
"""

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import Tensor, nn

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
    title="Where the norm stands in a transformer",
    papers=(
        "R. Xiong, Y. Yang, D. He, K. Zheng, S. Zheng, C. Xing, H. Zhang, Y. Lan, L. Wang, T.-Y. Liu: *On Layer Normalization"
        " in the Transformer Architecture.* ICML 2020, [arXiv 2002.04745](https://arxiv.org/abs/2002.04745)",
        "H. Wang, S. Ma, L. Dong, S. Huang, D. Zhang, F. Wei: *DeepNet: Scaling Transformers to 1,000 Layers.* 2022,"
        " [arXiv 2203.00555](https://arxiv.org/abs/2203.00555)",
    ),
    claims=(
        Claim(
            "layers",
            "At the start the gradient of a post-norm transformer grows towards the last layer; that of a pre-norm one is about"
            " the same in every layer",
            "Xiong et al., the figure of the norms of gradients in each layer of a 6-layer model at the start",
            "The gradient of the second feed-forward weight, last layer over first, 12 layers, geometric mean over seeds. *Shown*"
            " if the interval for post-norm lies above 2 and that for pre-norm within 0.5 to 2; *in part* if post-norm's lies"
            " above pre-norm's; else *not shown*.",
        ),
        Claim(
            "depth",
            "The last layer's gradient does not depend on depth with post-norm, and falls like $1/\\sqrt{L}$ with pre-norm",
            "Xiong et al., Theorem 1",
            "The slope of the log of that gradient in the last layer against log depth, 2 to 32 layers, seed by seed. *Shown* if"
            " its interval lies within -0.2 to 0.2 for post-norm and within -0.7 to -0.3 for pre-norm; *in part* if one does;"
            " else *not shown*.",
        ),
        Claim(
            "warm-up",
            "A post-norm transformer needs a warm-up of the learning rate, a pre-norm one does not",
            "Xiong et al., the experiments on translation with and without warm-up",
            "Final loss without warm-up less with, paired by seed, 8 layers. *Shown* if post-norm's interval lies above 0.05"
            " nats and pre-norm's below 0.05; *in part* if post-norm loses more than pre-norm beyond the paired interval; *too"
            " small to tell* if that interval contains 0; else *not shown*.",
        ),
        Claim(
            "warm-up, slower",
            "The same, at a third of the rate and with 6 layers",
            "As above",
            "Written after a first run of the claim above, in which the post-norm network learnt with neither. The same criterion"
            " at rate 0.001, 6 layers, on fresh seeds.",
        ),
        Claim(
            "update",
            "The first step moves the output of a post-norm transformer the farther, the deeper it is; with DeepNorm not",
            "Wang et al., the section on the instability of deep transformers: the model's update in early training",
            "The slope of the log change of the logits (RMS) in one step of Adam, rate 0.0001, against log depth, 2 to 32 layers."
            " *Shown* if DeepNorm's interval lies within -0.25 to 0.25 and post-norm's slope is greater beyond the paired"
            " interval; *in part* if only the latter; else *not shown*.",
        ),
        Claim(
            "deep",
            "DeepNorm trains depths at which post-norm fails",
            "Wang et al., the figures and tables on depth: post-norm diverges where DeepNorm trains",
            "24 layers, warm-up of 40 of 100 steps. A network learns when the mean loss of its last 20 steps is 0.2 nats or more"
            " below the entropy of single bytes. *Shown* if DeepNorm learns for every seed and post-norm for none; *in part* if"
            " DeepNorm's final loss is lower beyond the paired interval; *too small to tell* if that interval contains 0; else"
            " *not shown*.",
        ),
    ),
    setup=(
        "Width 48, 4 heads, contexts of 32 bytes, Xavier's initialisation; the norms are `ss.nn.PreNorm`, `ss.nn.PostNorm` and"
        " `ss.nn.DeepNorm` around attention and feed-forward. Training: 8 layers, 200 steps of Adam at rate 0.003 in batches of"
        " 16 passages, warm-up linear over 60 steps or none. The papers translate with encoders and decoders and train for long."
    ),
    seeds=3,
)  # fmt: skip
KINDS = ("post-norm", "pre-norm", "DeepNorm")


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """A language model over bytes whose norms stand where ``kind`` says."""

    def __init__(self, kind: str, layers: int, width: int, heads: int = 4, context: int = 32):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(context, width)
        branches = [
            branch
            for _ in range(layers)
            for branch in (
                Attention(width, heads),
                nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)),
            )
        ]
        for layer in (m for branch in branches for m in branch.modules() if isinstance(m, nn.Linear)):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        if kind == "DeepNorm":
            branches = [ss.nn.deep_norm_(branch, layers) for branch in branches]
        wrap = {
            "pre-norm": ss.nn.PreNorm,
            "post-norm": ss.nn.PostNorm,
            "DeepNorm": lambda branch, width: ss.nn.DeepNorm(branch, width, layers),
        }[kind]
        self.blocks = nn.Sequential(*[wrap(branch, width) for branch in branches])
        self.norm = nn.LayerNorm(width) if kind == "pre-norm" else nn.Identity()
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


def settings(options):
    quick = options.size == "quick"
    size = {"width": 16 if quick else 48}
    depths = [2, 4] if quick else [2, 4, 8, 12, 16, 32]
    start = [
        {"part": "start", "seed": seed, "kind": kind, "layers": layers, **size}
        for seed in range(2 if quick else len(options.seeds) + 2)
        for kind in KINDS
        for layers in depths
    ]
    training = [
        {"part": "training", "seed": seed, "kind": kind, "layers": 1 if quick else 8, "warm_up": warm_up,
         "steps": 3 if quick else 200, "rate": 3e-3, **size}
        for seed in options.seeds
        for kind in KINDS
        for warm_up in (0, 2 if quick else 60)
    ]  # fmt: skip
    deep = [
        {"part": "deep", "seed": seed, "kind": kind, "layers": 2 if quick else 24, "warm_up": 2 if quick else 40,
         "steps": 3 if quick else 100, "rate": 3e-3, **size}
        for seed in options.seeds
        for kind in ("post-norm", "DeepNorm")
    ]  # fmt: skip
    slower = [
        {"part": "slower", "seed": 1000 + seed, "kind": kind, "layers": 1 if quick else 6, "warm_up": warm_up,
         "steps": 3 if quick else 200, "rate": 1e-3, **size}
        for seed in options.seeds
        for kind in ("post-norm", "pre-norm")
        for warm_up in (0, 2 if quick else 60)
    ]  # fmt: skip
    return start + training + slower + deep


def measure(setting):
    return at_start(setting) if setting["part"] == "start" else training(setting)


def at_start(setting):
    torch.manual_seed(setting["seed"])
    model = Transformer(setting["kind"], setting["layers"], setting["width"])
    inputs, target = data = ss.reference.english(16, context=32, seed=setting["seed"])
    flow = ss.gradient_flow(model, data, F.cross_entropy)
    by_layer = [layer.weight_grad_rms for layer in flow.layers if layer.name.endswith("branch.2.weight")]
    before = model(inputs).detach()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    F.cross_entropy(model(inputs), target).backward()
    optimizer.step()
    change = (model(inputs).detach() - before).square().mean().sqrt()
    return {"gradients": by_layer, "change": float(change)}


def training(setting):
    warm_up = setting["warm_up"]
    runs = ss.train_twins(
        {"net": lambda: Transformer(setting["kind"], setting["layers"], setting["width"])},
        ss.reference.english(4000, context=32),
        F.cross_entropy,
        seeds=[setting["seed"]],
        steps=setting["steps"],
        batch_size=16,
        optimizers={"Adam": lambda parameters: torch.optim.Adam(parameters, setting["rate"])},
        schedule=(lambda step: min(1.0, (step + 1) / warm_up)) if warm_up else None,
    )
    losses = np.nan_to_num(runs.curves["net"]["Adam"].losses[0], nan=99.0, posinf=99.0)
    return {"losses": [round(float(loss), 4) for loss in losses], "final": float(losses[-20:].mean())}


def entropy() -> float:
    """Of single bytes of the text, in nats."""
    counts = ss.reference.english_text().ids.bincount().double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())


def last_over_first(rows, kind, layers) -> Estimate:
    mine = where(rows, part="start", kind=kind, layers=layers)
    return geometric(row["gradients"][-1] / row["gradients"][0] for row in mine)


def slopes(rows, kind, value) -> list[float]:
    found = []
    for seed in sorted({row["seed"] for row in where(rows, part="start")}):
        points = [(r["layers"], value(r)) for r in where(rows, part="start", kind=kind, seed=seed)]
        found.append(float(np.polyfit(*np.log(np.array(points)).T, 1)[0]))
    return found


def finals(rows, part, kind, **values) -> list[float]:
    return [row["final"] for row in where(rows, part=part, kind=kind, **values)]


def without_warm_up(rows, kind, part="training") -> list[float]:
    """Final loss without warm-up less with, seed by seed."""
    longest = max(row["warm_up"] for row in where(rows, part=part))
    pair = (finals(rows, part, kind, warm_up=steps) for steps in (0, longest))
    return [a - b for a, b in zip(*pair, strict=True)]


def warm_up_verdict(rows, part) -> Judgement:
    kinds = [kind for kind in KINDS if where(rows, part=part, kind=kind)]
    loses = {kind: without_warm_up(rows, kind, part) for kind in kinds}
    lost = {kind: estimate(values) for kind, values in loses.items()}
    more = paired(loses["post-norm"], loses["pre-norm"])
    best = {kind: estimate(finals(rows, part, kind)).mean for kind in kinds}
    return Judgement(
        "shown" if lost["post-norm"].low > 0.05 and lost["pre-norm"].high < 0.05
        else "shown in part" if more.low > 0 else "too small to tell" if more.high >= 0 else "not shown",
        "final loss without warm-up less with: " + "; ".join(f"{kind} {e}" for kind, e in lost.items()),
        f"Post-norm loses {more} nats more by it than pre-norm. Mean final losses: "
        + ", ".join(f"{kind} {loss:.2f}" for kind, loss in best.items()) + f"; of single bytes {entropy():.2f}.",
    )  # fmt: skip


def within(found: Estimate, low: float, high: float) -> bool:
    return low <= found.low and found.high <= high


def judge(rows):
    depths = {row["layers"] for row in where(rows, part="start")}
    layers = 12 if 12 in depths else max(depths)
    post, pre = (last_over_first(rows, kind, layers) for kind in ("post-norm", "pre-norm"))
    last = {kind: estimate(slopes(rows, kind, lambda row: row["gradients"][-1])) for kind in KINDS}
    held = within(last["post-norm"], -0.2, 0.2) + within(last["pre-norm"], -0.7, -0.3)
    moved = {kind: slopes(rows, kind, lambda row: row["change"]) for kind in KINDS}
    farther = paired(moved["post-norm"], moved["DeepNorm"])
    level = within(estimate(moved["DeepNorm"]), -0.25, 0.25)
    deep = {kind: finals(rows, "deep", kind) for kind in ("post-norm", "DeepNorm")}
    learnt = {kind: sum(loss < entropy() - 0.2 for loss in losses) for kind, losses in deep.items()}
    lower = paired(deep["DeepNorm"], deep["post-norm"])
    seeds = len(deep["DeepNorm"])
    return {
        "layers": Judgement(
            "shown" if post.low > 2 and within(pre, 0.5, 2) else "shown in part" if post.low > pre.high else "not shown",
            f"last over first layer: post-norm {post}, pre-norm {pre}, DeepNorm {last_over_first(rows, 'DeepNorm', layers)}",
            f"In networks of {layers} layers.",
        ),
        "depth": Judgement(
            ("not shown", "shown in part", "shown")[held],
            "last layer's gradient $\\propto L^p$: " + "; ".join(f"{kind} $p$ = {e}" for kind, e in last.items()),
            "The theorem holds for a model whose norms and attention are idealised.",
        ),
        "warm-up": warm_up_verdict(rows, "training"),
        "warm-up, slower": warm_up_verdict(rows, "slower"),
        "update": Judgement(
            "shown" if level and farther.low > 0 else "shown in part" if farther.low > 0 else "not shown",
            "change of the logits $\\propto L^p$: " + "; ".join(f"{k} $p$ = {estimate(v)}" for k, v in moved.items()),
            f"The exponent of post-norm less that of DeepNorm: {farther}.",
        ),
        "deep": Judgement(
            "shown" if learnt["DeepNorm"] == seeds and not learnt["post-norm"]
            else "shown in part" if lower.high < 0 else "too small to tell" if lower.low <= 0 else "not shown",
            f"learns for {learnt['DeepNorm']} of {seeds} seeds with DeepNorm, {learnt['post-norm']} with post-norm; final loss"
            f" {estimate(deep['DeepNorm'])} and {estimate(deep['post-norm'])}",
            f"The entropy of single bytes is {entropy():.2f} nats; the difference of the final losses is {lower}.",
        ),
    }  # fmt: skip


def table(rows):
    found = []
    for kind in KINDS:
        line: dict = {"network": kind}
        for name, warm_up in (
            ("without warm-up", 0),
            ("with warm-up", max(r["warm_up"] for r in where(rows, part="training"))),
        ):
            line[f"final loss {name}"] = estimate(finals(rows, "training", kind, warm_up=warm_up))
        deep = finals(rows, "deep", kind)
        line["final loss, deep"] = estimate(deep) if deep else "not run"
        for layers in sorted({row["layers"] for row in where(rows, part="start")}):
            line[f"logits' change in one step, {layers} layers"] = geometric(
                row["change"] for row in where(rows, part="start", kind=kind, layers=layers)
            ).mean
        found.append(line)
    return found  # fmt: skip


def figures(rows):
    start, (left, right) = plt.subplots(1, 2, figsize=(7.4, 3.4))
    depths = sorted({row["layers"] for row in where(rows, part="start")})
    layers = 12 if 12 in depths else depths[-1]
    for kind in KINDS:
        mine = where(rows, part="start", kind=kind, layers=layers)
        values = [geometric(at) for at in zip(*(row["gradients"] for row in mine))]
        band(left, range(1, layers + 1), values, kind)
        changes = [
            geometric(r["change"] for r in where(rows, part="start", kind=kind, layers=d)) for d in depths
        ]
        band(right, depths, changes, kind)
    left.set(
        yscale="log",
        xlabel=f"layer of {layers}",
        ylabel="RMS of the gradient",
        title="Second feed-forward weight, at the start",
    )
    right.set(
        xscale="log", yscale="log", xlabel="layers", ylabel="RMS change of the logits", title="One step"
    )
    right.set_xticks(depths, depths)
    right.minorticks_off()
    right.legend()

    trained, axes = plt.subplots()
    for kind, colour in zip(KINDS, ("#0067a5", "#c8500a", "#2c8a6b")):
        for warm_up in sorted({row["warm_up"] for row in where(rows, part="training")}):
            mine = where(rows, part="training", kind=kind, warm_up=warm_up)
            curve = np.mean([row["losses"] for row in mine], axis=0)
            width = min(10, len(curve))
            smooth = np.convolve(curve, np.ones(width) / width, mode="valid")
            axes.plot(
                np.arange(len(smooth)) + width, smooth, color=colour, linestyle="-" if warm_up else "--",
                label=f"{kind}, {'warm-up' if warm_up else 'no warm-up'}",
            )  # fmt: skip
    axes.set(xlabel="step", ylabel="loss (nats a byte, mean over seeds)", ylim=(1.8, 5.0))
    axes.legend(fontsize=8)
    return {"start": start, "training": trained}
