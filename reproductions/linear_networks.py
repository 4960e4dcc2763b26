"""Hardt & Ma 2016 and Li et al. 2016: deep linear networks, in exact numbers.

The whole Hessian of a small linear network at its start (`ss.curvature_operator`, made dense), for shortcuts over one,
two and three layers and for none: its condition number against depth. Then the optimum that residual layers
`x + A x` are trained to: how large are the A? And is there a critical point among small A that is no optimum?
"""

import math

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import nn

import skipscope as ss
from reproductions._report import Claim, Estimate, Judgement, Reproduction, band, estimate, geometric, where

REPRODUCTION = Reproduction(
    title="Deep linear networks, exactly",
    papers=(
        "M. Hardt, T. Ma: *Identity Matters in Deep Learning.* ICLR 2017, [arXiv 1611.04231](https://arxiv.org/abs/1611.04231)",
        "S. Li, J. Jiao, Y. Han, T. Weissman: *Demystifying ResNet.* 2016, [arXiv 1611.01186](https://arxiv.org/abs/1611.01186)",
    ),
    claims=(
        Claim(
            "two",
            "With shortcuts over two layers the condition number of the Hessian at zero weights does not depend on depth",
            "Li et al., abstract and first theorem",
            "The condition number (largest over smallest absolute eigenvalue of the whole Hessian) at the greatest depth over"
            " that at the least. *Shown* if it is within a millionth of 1 for every seed; *in part* if its interval contains"
            " 1; else *not shown*.",
        ),
        Claim(
            "one",
            "With shortcuts over one layer it explodes with depth",
            "Li et al., abstract: \"has a condition number exploding to infinity as the number of layers grows\"",
            "The slope of log condition number against log depth, seed by seed. *Shown* if its interval lies above 0.5 (it grows"
            " at least like the root of depth); *in part* if above 0; else *not shown*.",
        ),
        Claim(
            "one, more seeds",
            "The same, on forty seeds",
            "As above",
            "Written after a first run of the claim above: three seeds tell nothing, since the least absolute eigenvalue of an"
            " indefinite matrix comes near zero by chance. The same criterion on fresh seeds, at 6 and 24 layers; *too small to"
            " tell* if the interval contains 0.",
        ),
        Claim(
            "none",
            "A shortcut over one layer is essentially no shortcut: an orthogonal start without one has the same Hessian",
            "Li et al., abstract: \"shortcut 1, however, is essentially equivalent to no shortcuts\"",
            "The spectra of a residual network at zero and of a plain one at orthogonal weights, whose target is turned by"
            " their product: the largest difference over the largest eigenvalue. *Shown* if below a millionth for all seeds"
            " and depths; else *not shown*.",
        ),
        Claim(
            "three",
            "With shortcuts over three layers the start is a flat stationary point",
            "Li et al., abstract: \"shortcuts of higher depth result in an extremely flat (high-order) stationary point\"",
            "*Shown* if gradient and Hessian at zero weights are exactly zero for all seeds and depths; else *not shown*.",
        ),
        Claim(
            "small",
            "Residual layers $x + A x$ can represent any map of positive determinant with $A$ as small as $1/L$",
            "Hardt & Ma, theorem on the existence of a global optimum whose largest spectral norm falls with depth",
            "Networks trained to a random target of positive determinant; the slope of the log of the largest spectral norm of"
            " the A against log depth, from 4 layers on, seed by seed. *Shown* if its interval lies within -1.2 to -0.8 and"
            " nine tenths of the networks reach a loss below $10^{-8}$; *in part* if the interval lies below -0.5; else *not"
            " shown*.",
        ),
        Claim(
            "critical",
            "Among small $A$ there is no critical point that is not a global optimum",
            "Hardt & Ma, theorem on critical points where every spectral norm is below 1; the proof bounds the gradient from"
            " below by the loss",
            "At random points with spectral norms $\\tau$ up to 0.9: squared gradient over loss, against the bound"
            " $4L(1-\\tau)^{2L-2}$ times the least eigenvalue of the inputs' covariance. *Shown* if it is above the bound at every"
            " point and, at zero weights, above zero with shortcuts and zero without; else *not shown*.",
        ),
    ),
    setup=(
        "Linear networks of width 3 (Hessian) or 6 (optimum) in float64, mean squared error to a random linear target on 64"
        " random inputs. The Hessian has $9 L$ rows; all its eigenvalues are computed. Layers with shortcuts start at zero,"
        " as in the paper."
    ),
    seeds=3,
)  # fmt: skip


class Block(nn.Sequential):
    """Linear layers without biases."""

    def __init__(self, width: int, layers: int):
        super().__init__(*[nn.Linear(width, width, bias=False, dtype=torch.float64) for _ in range(layers)])


def network(width: int, layers: int, span: int | None) -> nn.Sequential:
    """Linear layers with a shortcut over every ``span`` of them, or none."""
    if span is None:
        return Block(width, layers)
    return nn.Sequential(*[ss.nn.IdentityShortcut(Block(width, span)) for _ in range(layers // span)])


def squared_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().sum(1).mean()


def task(seed: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs, and a random map of positive determinant."""
    torch.manual_seed(seed)
    target = torch.randn(width, width, dtype=torch.float64) / math.sqrt(width)
    if torch.linalg.det(target) < 0:
        target[0] *= -1
    return torch.randn(64, width, dtype=torch.float64), target


def hessian(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
    operator = ss.curvature_operator(model, data, squared_error)
    return operator @ np.eye(operator.shape[0])


def settings(options):
    quick = options.size == "quick"
    depths = {"quick": [6, 12], "default": [6, 12, 24], "full": [6, 12, 24, 48, 96]}[options.size]
    start = [
        {"part": "hessian", "seed": seed, "span": span, "layers": layers, "width": 2 if quick else 3}
        for seed in options.seeds
        for layers in depths
        for span in (1, 2, 3, None)
    ]
    more = [
        {"part": "more", "seed": 1000 + seed, "span": 1, "layers": layers, "width": 2 if quick else 3}
        for seed in range(2 if quick else 40)
        for layers in (depths[0], depths[1] if quick else 24)
    ]
    optimum = [
        {"part": "optimum", "seed": seed, "layers": layers, "width": 3 if quick else 6}
        for seed in options.seeds
        for layers in ([2, 4, 8] if quick else [2, 4, 8, 16, 32])
    ]
    region = [
        {"part": "region", "seed": seed, "layers": layers, "width": 3 if quick else 6, "points": 5 if quick else 100}
        for seed in options.seeds
        for layers in (2, 4, 8)
    ]  # fmt: skip
    return start + more + optimum + region


def measure(setting):
    inputs, target = task(setting["seed"], setting["width"])
    return {"hessian": at_start, "more": at_start, "optimum": optimum, "region": region}[setting["part"]](
        setting, inputs, target
    )


def at_start(setting, inputs, target):
    model = network(setting["width"], setting["layers"], setting["span"])
    if setting["span"] is None:
        turned = torch.eye(setting["width"], dtype=torch.float64)
        for layer in model:
            nn.init.orthogonal_(layer.weight)
            turned = layer.weight.detach() @ turned
        target = turned @ target
    else:
        for weight in model.parameters():
            nn.init.zeros_(weight)
    data = inputs, inputs @ target.T
    eigenvalues = np.linalg.eigvalsh(hessian(model, data))
    gradients = torch.autograd.grad(squared_error(model(inputs), data[1]), list(model.parameters()))
    found = {
        "largest": float(np.abs(eigenvalues).max()),
        "condition": condition(eigenvalues),
        "gradient": math.sqrt(sum(float(part.square().sum()) for part in gradients)),
    }
    if setting["span"] is None:
        found["from_residual"] = difference_from_residual(setting, inputs, eigenvalues)
    return found


def difference_from_residual(setting, inputs, eigenvalues) -> float:
    """The largest difference to the spectrum of one-layer shortcuts at zero, over the largest eigenvalue."""
    target = task(setting["seed"], setting["width"])[1]
    model = network(setting["width"], setting["layers"], 1)
    for weight in model.parameters():
        nn.init.zeros_(weight)
    residual = np.linalg.eigvalsh(hessian(model, (inputs, inputs @ target.T)))
    return float(np.abs(eigenvalues - residual).max() / np.abs(residual).max())


def condition(eigenvalues: np.ndarray) -> float:
    sizes = np.abs(eigenvalues)
    return float(sizes.max() / sizes.min()) if sizes.min() > 0 else math.inf


def optimum(setting, inputs, target):
    torch.manual_seed(setting["seed"])
    model, outputs = network(setting["width"], setting["layers"], 1), inputs @ target.T
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.01)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=1000, max_eval=2000, tolerance_grad=1e-12, tolerance_change=1e-16,
        history_size=50, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        loss = squared_error(model(inputs), outputs)
        loss.backward()
        return loss

    optimizer.step(closure)
    norms = [float(torch.linalg.matrix_norm(w.detach(), 2)) for w in model.parameters()]
    with torch.no_grad():
        loss = float(squared_error(model(inputs), outputs))
    return {"loss": loss, "largest_norm": max(norms)}


def region(setting, inputs, target):
    """The least of squared gradient over loss over its bound, among random points; and the ratio at zero."""
    outputs, layers = inputs @ target.T, setting["layers"]
    least = float(torch.linalg.eigvalsh(inputs.T @ inputs / len(inputs))[0])
    draw = torch.Generator().manual_seed(setting["seed"])

    def ratio(model):
        loss = squared_error(model(inputs), outputs)
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        return float(sum(part.square().sum() for part in gradient) / loss.detach())

    model, found = network(setting["width"], layers, 1), []
    for _ in range(setting["points"]):
        size = 0.9 * float(torch.rand((), generator=draw))
        for weight in model.parameters():
            drawn = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
            weight.data = size * drawn / torch.linalg.matrix_norm(drawn, 2)
        found.append(ratio(model) / (4 * layers * (1 - size) ** (2 * layers - 2) * least))
    at_zero = {}
    for name, span in (("residual", 1), ("plain", None)):
        model = network(setting["width"], layers, span)
        for weight in model.parameters():
            nn.init.zeros_(weight)
        at_zero[name] = ratio(model)
    return {"least_over_bound": min(found), "at_zero": at_zero}


def part(rows, name, **values):
    return where(rows, part=name, **values)


def growth(rows, span) -> list[float]:
    """Condition number at the greatest depth over that at the least, seed by seed."""
    mine = part(rows, "hessian", span=span)
    low, high = (f(row["layers"] for row in mine) for f in (min, max))
    first, last = ({r["seed"]: r["condition"] for r in where(mine, layers=d)} for d in (low, high))
    return [last[seed] / first[seed] for seed in first]


def slopes(rows, value, low=0) -> Estimate:
    """The slope of log value against log depth, seed by seed."""
    found = []
    for seed in sorted({row["seed"] for row in rows}):
        mine = [row for row in where(rows, seed=seed) if row["layers"] >= low]
        x, y = np.log([[row["layers"], row[value]] for row in mine]).T
        found.append(float(np.polyfit(x, y, 1)[0]))
    return estimate(found)


def judge(rows):
    two, one = growth(rows, 2), growth(rows, 1)
    slope = slopes(part(rows, "hessian", span=1), "condition")
    more = slopes(part(rows, "more"), "condition")
    apart = max(row["from_residual"] for row in part(rows, "hessian", span=None))
    flat = [row["largest"] + row["gradient"] for row in part(rows, "hessian", span=3)]
    reached = [row["loss"] < 1e-8 for row in part(rows, "optimum")]
    norm = slopes(part(rows, "optimum"), "largest_norm", low=4)
    above = min(row["least_over_bound"] for row in part(rows, "region"))
    zero = [row["at_zero"] for row in part(rows, "region")]
    contrast = all(at["residual"] > 0 and at["plain"] == 0 for at in zero)
    contains = estimate(two)
    return {
        "two": Judgement(
            "shown" if max(abs(ratio - 1) for ratio in two) < 1e-6
            else "shown in part" if contains.low <= 1 <= contains.high else "not shown",
            f"condition number at the greatest depth over the least: {min(two):.6f} to {max(two):.6f}",
            "The Hessian is one block, repeated: each pair of layers sees only itself.",
        ),
        "one": Judgement(
            "shown" if slope.low > 0.5 else "shown in part" if slope.low > 0 else "not shown",
            f"condition number $\\propto L^p$ with $p$ = {slope}; {geometric(one)} times as large at the greatest depth",
            "The largest eigenvalue grows with depth, since all layers can move the output together; the least one does not.",
        ),
        "one, more seeds": Judgement(
            "shown" if more.low > 0.5 else "shown in part" if more.low > 0
            else "too small to tell" if more.high >= 0 else "not shown",
            f"condition number $\\propto L^p$ with $p$ = {more}",
            "In the mean over seeds; one network's condition number can fall with depth.",
        ),
        "none": Judgement(
            "shown" if apart < 1e-6 else "not shown",
            f"the spectra differ by {apart:.1g} of the largest eigenvalue",
            "Turning each layer's coordinates maps the one network onto the other.",
        ),
        "three": Judgement(
            "shown" if max(flat) == 0 else "not shown",
            f"largest entry of gradient and spectrum: {max(flat):.1g}",
            "At zero weights a block's output is of third order in its weights: no first and no second derivative.",
        ),
        "small": Judgement(
            "shown" if norm.low >= -1.2 and norm.high <= -0.8 and np.mean(reached) >= 0.9
            else "shown in part" if norm.high < -0.5 else "not shown",
            f"largest norm $\\propto L^p$ with $p$ = {norm}",
            f"{sum(reached)} of {len(reached)} networks reached the optimum.",
        ),
        "critical": Judgement(
            "shown" if above >= 1 and contrast else "not shown",
            f"squared gradient over loss is at least {above:.3g} times its bound",
            "At zero weights the gradient of the residual network is not zero; that of the plain one is, and its loss is not.",
        ),
    }  # fmt: skip


NAMES = {1: "over one layer", 2: "over two layers", 3: "over three layers", None: "none, orthogonal"}


def table(rows):
    found = []
    for layers in sorted({row["layers"] for row in part(rows, "hessian")}):
        line: dict = {"layers": layers}
        for span in (1, 2, None):
            values = [row["condition"] for row in part(rows, "hessian", span=span, layers=layers)]
            line[f"condition number, {NAMES[span]}"] = geometric(values)
        line[f"largest eigenvalue, {NAMES[3]}"] = max(
            row["largest"] for row in part(rows, "hessian", span=3, layers=layers)
        )
        found.append(line)
    return found


def figures(rows):
    start, axes = plt.subplots()
    layers = sorted({row["layers"] for row in part(rows, "hessian")})
    for span, style in ((None, "-"), (1, "--"), (2, "-")):
        values = [
            geometric(r["condition"] for r in part(rows, "hessian", span=span, layers=d)) for d in layers
        ]
        band(
            axes,
            layers,
            values,
            f"shortcuts {NAMES[span]}" if span else "no shortcuts, orthogonal",
            linestyle=style,
        )
    axes.set(
        xscale="log", yscale="log", xlabel="layers", ylabel="condition number of the Hessian at the start"
    )
    axes.set_xticks(layers, layers)
    axes.minorticks_off()
    axes.legend()

    small, axes = plt.subplots()
    depths = sorted({row["layers"] for row in part(rows, "optimum")})
    values = [geometric(row["largest_norm"] for row in part(rows, "optimum", layers=d)) for d in depths]
    band(axes, depths, values, "at the optimum")
    axes.plot(
        depths, [values[-1].mean * depths[-1] / d for d in depths], ":", color="black", label="$\\propto 1/L$"
    )
    axes.set(xscale="log", yscale="log", xlabel="layers", ylabel="largest spectral norm of the A")
    axes.set_xticks(depths, depths)
    axes.minorticks_off()
    axes.legend()
    return {"start": start, "norms": small}
