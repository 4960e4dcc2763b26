"""How well the verdict foretells learning: 300 networks, labelled by training each under a fixed sweep of rates.

``python benchmarks/verdict.py label FILE`` trains them (torch and the digits alone; minutes on 16 cores) and writes the
labels; ``figures()`` measures each network as it is at its start and compares the public ``verdict.score`` with the labels
in ``results/verdict_labels.json`` (AUC), and ``verdict.hinders`` (accuracy). Thresholds were set on the first 200.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

HERE = Path(__file__).parent
LABELS = HERE / "results" / "verdict_labels.json"
DIGITS = HERE.parent / "src" / "skipscope" / "reference" / "digits.npz"

NETWORKS, HELD_OUT = 300, 100
SGD = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
ADAM = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
STEPS, BATCH = 400, 128
LEARNT = 1.0  # of the loss, which starts near ln 10 = 2.3

CHOICES = {
    "depth": (3, 5, 8, 12, 16, 24, 32, 48),
    "width": (16, 32, 64),
    "activation": ("relu", "gelu", "tanh", "sigmoid"),
    "init": ("default", "he", "xavier", "orthogonal", "small", "large"),
    "norm": ("none", "none", "layer", "batch"),
    "shortcut": ("none", "none", "none", "identity", "scaled", "highway"),
}


def specifications() -> list[dict]:
    """The same 300 on every machine."""
    draw = random.Random(20)
    return [
        {name: draw.choice(values) for name, values in CHOICES.items()} | {"seed": i} for i in range(NETWORKS)
    ]


# --- the networks ---


class Block(nn.Module):
    """Linear, norm, activation, and the shortcut that the specification says."""

    def __init__(self, spec: dict):
        super().__init__()
        width = spec["width"]
        self.linear, self.kind = nn.Linear(width, width), spec["shortcut"]
        self.norm = {
            "none": nn.Identity, "layer": lambda: nn.LayerNorm(width),
            "batch": lambda: nn.BatchNorm1d(width, track_running_stats=False),
        }[spec["norm"]]()  # fmt: skip
        self.act = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}[
            spec["activation"]
        ]()
        self.scale = 1 / math.sqrt(spec["depth"]) if self.kind == "scaled" else 1.0
        if self.kind == "highway":
            self.gate = nn.Linear(width, width)

    def forward(self, x):
        """``[n, width]`` -> ``[n, width]``."""
        branch = self.act(self.norm(self.linear(x)))
        if self.kind == "none":
            return branch
        if self.kind == "highway":
            t = torch.sigmoid(self.gate(x))
            return t * branch + (1 - t) * x
        return x + self.scale * branch


def network(spec: dict) -> nn.Sequential:
    """Stem, blocks, linear head; drawn from the specification's seed."""
    torch.manual_seed(spec["seed"])
    blocks = [Block(spec) for _ in range(spec["depth"])]
    model = nn.Sequential(nn.Linear(64, spec["width"]), *blocks, nn.Linear(spec["width"], 10))
    for block in blocks:
        weight = block.linear.weight
        if spec["init"] == "default":
            continue
        nn.init.zeros_(block.linear.bias)
        if spec["init"] == "orthogonal":
            nn.init.orthogonal_(weight)
        else:
            gain = {"he": math.sqrt(2), "xavier": 1.0, "small": 0.3, "large": 2.5}[spec["init"]]
            nn.init.normal_(weight, std=gain / math.sqrt(spec["width"]))
        if block.kind == "highway":
            nn.init.constant_(block.gate.bias, -1.0)
    return model


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All 1,797 images, scaled to mean 0 and variance 1."""
    with np.load(DIGITS) as file:
        arrays = sorted((file[k] for k in file.files), key=lambda a: -a.size)
    x = torch.tensor(arrays[0].reshape(len(arrays[0]), -1).astype("float32"))
    return (x - x.mean()) / x.std(), torch.tensor(arrays[1].astype("int64"))


# --- labels ---


def train(spec: dict) -> dict:
    """The loss at the end under each rate, all rates trained side by side from the same start."""
    torch.set_num_threads(1)
    start, model = time.perf_counter(), network(spec)
    x, y = digits()
    n, sgd = len(SGD) + len(ADAM), len(SGD)
    weights = {k: p.detach().expand(n, *p.shape).clone() for k, p in model.named_parameters()}
    first = {k: torch.zeros_like(w[sgd:]) for k, w in weights.items()}
    second = {k: torch.zeros_like(w[sgd:]) for k, w in weights.items()}

    def loss(parameters, inputs, target):
        return nn.functional.cross_entropy(torch.func.functional_call(model, parameters, (inputs,)), target)

    step_of = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(0, None, None), randomness="same")
    order, seen = torch.Generator().manual_seed(spec["seed"]), []
    for t in range(1, STEPS + 1):
        rows = torch.randint(len(x), (BATCH,), generator=order)
        gradients, values = step_of(weights, x[rows], y[rows])
        seen.append(values)
        for k, w in weights.items():
            g, shape = gradients[k], (-1,) + (1,) * (w.ndim - 1)
            w[:sgd] -= torch.tensor(SGD).view(shape) * g[:sgd]
            first[k].mul_(0.9).add_(g[sgd:], alpha=0.1)
            second[k].mul_(0.999).addcmul_(g[sgd:], g[sgd:], value=0.001)
            size = (second[k] / (1 - 0.999**t)).sqrt_() + 1e-8
            w[sgd:] -= torch.tensor(ADAM).view(shape) * (first[k] / (1 - 0.9**t)) / size
    end = torch.stack(seen[-20:]).mean(0)
    end = [v if math.isfinite(v) else 1e9 for v in end.tolist()]
    return {**spec, "sgd": end[:sgd], "adam": end[sgd:], "seconds": time.perf_counter() - start}


def label(path: str) -> None:
    """Train all networks, on all cores, and write what came out."""
    specs = sorted(specifications(), key=lambda s: -s["depth"] * s["width"])
    torch.set_num_threads(1)
    rows, start = [], time.perf_counter()
    with multiprocessing.get_context("fork").Pool() as pool:
        for i, row in enumerate(pool.imap_unordered(train, specs)):
            rows.append(row)
            if i % 20 == 19:
                print(f"{i + 1} of {len(specs)}, {time.perf_counter() - start:.0f} s", flush=True)
    rows.sort(key=lambda row: row["seed"])
    content = {
        "sgd": SGD,
        "adam": ADAM,
        "steps": STEPS,
        "batch": BATCH,
        "torch": torch.__version__,
        "networks": rows,
    }
    Path(path).write_text(json.dumps(content))


# --- the verdict against the labels ---


def figures() -> list[dict]:
    """The verdict, the monitor's (from parameter gradients alone), and other tools' rules, against the labels."""
    content = json.loads(LABELS.read_text())["networks"]
    seen = [_measured(row) for row in content]
    live = np.array([one["live"].state == "healthy" for one in seen])
    parts = {"200 seen": slice(0, -HELD_OUT), "100 held out": slice(-HELD_OUT, None)}
    rows = []
    for optimizer in ("sgd", "adam"):
        learns = np.array([min(row[optimizer]) < LEARNT for row in content])
        aim = ">= 0.95"
        name_of = {"sgd": "SGD", "adam": "Adam"}[optimizer]
        borne = np.array([name_of not in one["flow"].verdict.hinders for one in seen])
        score = np.array([one["flow"].verdict.score for one in seen])
        live_score = np.array([_of_fall(one["live"].fall_decades) for one in seen])
        for name, part in parts.items():
            for what, scores, fine in (
                ("verdict.score", score, borne),
                ("monitor's fall of parameter gradients", live_score, live),
            ):
                rows.append({
                    "name": f"{what} foretells learning under {optimizer.upper()}, {name}: AUC",
                    "value": _auc(scores[part], learns[part]), "unit": "", "aim": aim if what == "verdict.score" else "",
                    "detail": _confusion(fine[part], learns[part]),
                })  # fmt: skip
        held = parts["100 held out"]
        for other in OTHERS:
            fine = np.array([one[other] for one in seen])[held]
            rows.append({
                "name": f"{other}, {optimizer.upper()}, 100 held out: accuracy",
                "value": float((fine == learns[held]).mean()), "unit": "",
                "aim": f"verdict: {float((borne == learns)[held].mean()):.2f}",
                "detail": _confusion(fine, learns[held]),
            })  # fmt: skip
    return rows


def _measured(row: dict) -> dict:
    """What is known of a network before it is trained: its flow, the monitor's verdict, and the other tools' rules."""
    import skipscope as ss

    x, y = digits()
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:256]
    model, batch = network(row), (x[chosen], y[chosen])
    flow = ss.gradient_flow(model, batch, nn.functional.cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with ss.watch(model, optimizer) as monitor:
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    others = {name: rule(flow, model) for name, rule in OTHERS.items()}
    return {"flow": flow, "live": monitor.verdict, **others}


def _of_fall(fall: float | None) -> float:
    return -math.inf if fall is None else -abs(fall)


def _means(flow) -> list[float]:
    return [w.weight_grad_mean_abs or 0.0 for w in flow.layers]


def _rates(flow) -> list[float]:
    means = _means(flow)
    return [a / b if b else math.inf for a, b in itertools.pairwise(means)]


def _norms(flow, model) -> list[float]:
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    return [(w.weight_grad_rms or 0.0) * math.sqrt(sizes[w.name]) for w in flow.layers]


# The published rules of other tools, read at the start of training; True: nothing wrong.
OTHERS = {
    "SageMaker Debugger's rule": lambda flow, model: min(_means(flow)) >= 1e-7,
    "AutoTrainer's rule": lambda flow, model: (
        not (
            (_means(flow)[0] < 1e-3 * _means(flow)[-1] and _means(flow)[0] < 1e-4)
            or _means(flow)[0] > 70 * _means(flow)[-1]
            or max(w.zero_fraction or 0.0 for w in flow.layers) >= 0.7
        )
    ),
    "TheDeepChecker's rule": lambda flow, model: (
        min(_means(flow)) >= 1e-6 and max(_means(flow)) <= 1e6 and all(0.5 <= r <= 2 for r in _rates(flow))
    ),
    "torchmortem's rule": lambda flow, model: _means(flow)[-1] < 100 * _means(flow)[0],
    "TorchLens's rule": lambda flow, model: (
        min(_norms(flow, model)) >= 1e-7 and max(_norms(flow, model)) <= 1e4
    ),
}


def _auc(score: np.ndarray, label: np.ndarray) -> float:
    """The chance that a network that learns scores above one that does not."""
    yes, no = score[label][:, None], score[~label][None]
    return float((yes > no).mean() + (yes == no).mean() / 2)


def _confusion(fine: np.ndarray, learns: np.ndarray) -> str:
    return (
        f"healthy and learns {int((fine & learns).sum())}, healthy and fails {int((fine & ~learns).sum())}, "
        f"trouble and learns {int((~fine & learns).sum())}, trouble and fails {int((~fine & ~learns).sum())}; "
        f"accuracy {float((fine == learns).mean()):.2f}"
    )


if __name__ == "__main__" and sys.argv[1:2] == ["label"]:
    label(sys.argv[2])
