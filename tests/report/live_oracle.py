"""The live page's network, written again in torch from its settings, and what skipscope measures on it."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import skipscope as ss

ACTIVATIONS = {
    "gelu": lambda: nn.GELU(approximate="tanh"), "relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "linear": nn.Identity,
}  # fmt: skip


class Network(nn.Module):
    def __init__(self, s: dict[str, Any]):
        super().__init__()
        lecture = s["data"] == "lecture"
        inputs, outputs = {"lecture": (3, 1), "digits": (64, 10), "spirals": (2, 2)}[s["data"]]
        left, width = s["depth"] - lecture, s["width"]
        self.blocks = nn.ModuleList()
        if inputs != width:
            self.blocks.append(nn.Sequential(nn.Linear(inputs, width), ACTIVATIONS[s["activation"]]()))
            left -= 1
        while left > 0:
            layers: list[nn.Module] = [nn.LayerNorm(width)] if s["norm"] == "layer" else []
            for _ in range(min(left, s["span"])):
                layers += [nn.Linear(width, width), ACTIVATIONS[s["activation"]]()]
            self.blocks.append(nn.Sequential(*layers))
            left -= s["span"]
        last = width if len(self.blocks) else inputs
        self.head = nn.Sequential(
            nn.Linear(last, outputs), *([ACTIVATIONS[s["activation"]]()] if lecture else [])
        )
        self.strength = 0.0 if s["shortcut"] == "none" else s["strength"]
        self.scale = s["depth"] ** -0.5 if s["shortcut"] == "scaled" else 1.0

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = block(x)
            x = self.strength * x + self.scale * y if x.shape == y.shape else y
        return self.head(x)


def network(s: dict[str, Any]) -> Network:
    """Drawn as the page says that it draws."""
    with torch.random.fork_rng():
        torch.manual_seed(s["seed"])
        model = Network(s).double()
        hidden = model if s["data"] == "lecture" else model.blocks
        for layer in (m for m in hidden.modules() if isinstance(m, nn.Linear)):
            if s["init"] == "xavier":
                nn.init.xavier_uniform_(layer.weight)
            elif s["init"] == "he":
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            elif s["init"] == "orthogonal":
                nn.init.orthogonal_(layer.weight)
            if s["init"] != "default":
                nn.init.zeros_(layer.bias)
            with torch.no_grad():
                layer.weight.mul_(s["gain"])
    return model


def data(s: dict[str, Any]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(s["seed"])
    if s["data"] == "lecture":
        return torch.tensor([[1.0, 0.0, -1.0]]).double(), torch.zeros(1, 1).double()
    if s["data"] == "digits":
        inputs, target = ss.reference.digits(split="train")
        order = torch.randperm(len(target), generator=generator)
        return inputs.double()[order], target[order]
    unit = torch.rand(3, 768, generator=generator, dtype=torch.float64)
    target = torch.arange(768) % 2
    radius = unit[0] ** 0.5
    angle = 3 * math.pi * radius + math.pi * target.double()
    inputs = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return (inputs + 0.1 * (unit[1:].T - 0.5))[:512], target[:512]


def loss_of(s: dict[str, Any]) -> Any:
    return nn.functional.mse_loss if s["data"] == "lecture" else nn.functional.cross_entropy


def optimizer(name: str, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=rate)
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9 if name == "momentum" else 0)


def around(s: dict[str, Any], steps: int, points: int) -> tuple[list[float], float]:
    """The loss along one direction after some steps of SGD, and at the corner (-1, -1) of the plane."""
    model, (inputs, target) = network(s), data(s)
    train(s, model, "sgd", 10 ** s["rate"], steps)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    generator = torch.Generator().manual_seed(s["seed"])
    directions = []
    for _ in range(2):
        drawn = [torch.empty_like(w).normal_(generator=generator) for w in weights]
        directions.append(
            [d * (w.norm(dim=1, keepdim=True) / d.norm(dim=1, keepdim=True)) for d, w in zip(drawn, weights)]
        )

    def at(a: float, b: float) -> float:
        there = copy.deepcopy(model)
        moved = [m.weight for m in there.modules() if isinstance(m, nn.Linear)]
        with torch.no_grad():
            for w, d, e in zip(moved, *directions):
                w += a * d + b * e
            return loss_of(s)(there(inputs[:64]), target[:64]).item()

    return [at(a, 0) for a in np.linspace(-1, 1, points)], at(-1, -1)


def losses(s: dict[str, Any], name: str, rate: float, steps: int = 20, off: float = 0.0) -> np.ndarray:
    """Of training steps from the drawn weights, each moved by ``off`` of itself at random."""
    model = network(s)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + off * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return train(s, model, name, rate, steps)


def train(s: dict[str, Any], model: nn.Module, name: str, rate: float, steps: int) -> np.ndarray:
    inputs, target = data(s)
    stepper, found = optimizer(name, model, rate), []
    for step in range(steps):
        rows = (torch.arange(s["batch"]) + step * s["batch"]) % len(target)
        loss = loss_of(s)(model(inputs[rows]), target[rows])
        stepper.zero_grad()
        loss.backward()
        stepper.step()
        found.append(loss.item())
    return np.array(found)


def readings(s: dict[str, Any]) -> dict[str, np.ndarray]:
    """What skipscope says of the network, and the share of the gradient that reaches the first layer, by hooks."""
    model, (inputs, target) = network(s), data(s)
    batch = inputs[: s["batch"]], target[: s["batch"]]
    flow = ss.gradient_flow(model, batch, loss_of(s))
    paths = ss.path_spectrum(model, batch, loss_of(s))
    split = ss.gradient_split(model, batch, loss_of(s))
    return {
        "gradient": np.array([b.gradient_rms for b in flow.boundaries]),
        "factor": np.array([math.nan if b.factor is None else b.factor for b in flow.boundaries]),
        "weights": np.array([w.weight_grad_mean_abs for w in flow.layers if "norm" not in w.name.lower()]),
        "norms": paths.norms,
        "mean": np.array(paths.mean_length),
        "loss": np.array(flow.loss),
        "share": np.array(share(s)),
        "branch": np.array([part.branch_rms for part in split]),
        "around": np.array([part.shortcut_rms for part in split]),
    }


def share(s: dict[str, Any]) -> float:
    model, (inputs, target) = copy.deepcopy(network(s)), data(s)
    kept: list[Tensor] = []

    def keep(module: nn.Module, given: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    linears[0].register_forward_hook(keep)
    # The last hidden boundary: what comes into the last linear map, or its output where an activation follows.
    if s["data"] == "lecture" and s["activation"] != "linear":
        linears[-1].register_forward_hook(keep)
    else:
        model.head.register_forward_pre_hook(lambda module, given: keep(module, given, given[0]))
    loss_of(s)(model(inputs[: s["batch"]]), target[: s["batch"]]).backward()
    first, last = kept[0].grad, kept[-1].grad
    if last is None or first is None or not float(last.norm()):
        return math.nan
    return float(first.norm() / last.norm())


def random_settings(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Settings over the whole of the page's ranges."""
    draw = random.Random(seed)
    return [
        {
            "depth": draw.randint(2, 60) if draw.random() < 0.5 else draw.randint(2, 12), "width": draw.randint(3, 64),
            "activation": draw.choice(list(ACTIVATIONS)), "init": draw.choice(["default", "xavier", "he", "orthogonal"]),
            "gain": draw.choice([1, 1, round(draw.uniform(0.5, 1.5) / 0.05) * 5 / 100]), "norm": draw.choice(["none", "layer"]),
            "shortcut": draw.choice(["none", "identity", "scaled"]), "strength": draw.choice([1, 1, 0.5, 1.2, 0]),
            "span": draw.choice([1, 1, 2, 3, 4]), "seed": draw.randint(0, 9999), "data": draw.choice(["lecture", "digits", "spirals"]),
            "batch": draw.choice([1, 4, 16, 32]), "optimizer": draw.choice(["sgd", "momentum", "adam"]), "rate": draw.choice([-3, -2, -1]),
        }
        for _ in range(count)
    ]  # fmt: skip
