"""How well the verdict foretells learning on 100 convolutional, recurrent and transformer networks.

``python -m benchmarks.verdict_families label [FILE] [DRAW]`` trains each under the sweep of rates of the 300
networks of ``benchmarks/verdict.py`` and keeps the labels (one core; what is there already is kept); ``figures()``
compares the public ``verdict.score`` with them. On the first draw one rule was set; on the second none. The criteria are
those of the 300: a network learns under an optimizer where its loss, the mean of 20 steps, falls below 1.0 at the best
rate (it starts near ln 10) in 400 steps. For time, the batch is smaller, and the training ends where both optimizers
have got there.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.verdict import ADAM, LEARNT, OTHERS, SGD, STEPS, _auc, _confusion, digits

LABELS = Path(__file__).parent / "results" / "verdict_family_labels.json"
NETWORKS, BATCH = 100, 32
# The draws of networks: on the first one a rule was set (growth through time), so it is seen.
DRAW, HELD_OUT = 2026, 2027
HELD_OUT_LABELS = LABELS.with_name("verdict_family_labels_held_out.json")
PARTS = ((LABELS, "seen"), (HELD_OUT_LABELS, "held out"))

SHARED = {
    "activation": ("relu", "gelu", "tanh", "sigmoid"),
    "init": ("default", "he", "orthogonal", "small", "large"),
}
CHOICES = {
    "convolutional": SHARED | {
        "depth": (3, 6, 9, 14), "width": (8,), "norm": ("none", "none", "group", "batch"),
        "shortcut": ("none", "none", "identity", "scaled"), "pool": ("none", "average", "max", "stride"),
        "head": ("mean", "flatten"), "kernel": (3, 3, 1),
    },
    "recurrent": {
        "cell": ("tanh", "relu", "gru", "lstm"), "layers": (1, 2, 3), "width": (16, 32), "length": (8, 16, 32),
        "read": ("last", "last", "mean"), "init": ("default", "orthogonal", "small", "large"),
    },
    "transformer": {
        "depth": (2, 4, 8), "width": (16,), "length": (8, 16), "norm": ("pre", "post", "none"),
        "shortcut": ("identity", "identity", "scaled", "none"), "activation": ("gelu", "relu"),
        "init": ("default", "default", "he", "small", "large"), "read": ("mean", "first", "last"),
    },
}  # fmt: skip

# In the first draw some networks could not learn the task however their gradient flows: convolutions of 1 x 1 whose
# mean is read see no shapes, and neither do means over states of single pixels.
ABLE = {
    "convolutional": CHOICES["convolutional"] | {"kernel": (3,)},
    "recurrent": CHOICES["recurrent"] | {"length": (8, 16)},
    "transformer": CHOICES["transformer"],
}


def specifications(draw: int = DRAW) -> list[dict]:
    """The same on every machine; families in turn."""
    chosen, choices = random.Random(draw), CHOICES if draw == DRAW else ABLE
    found = []
    for i in range(NETWORKS):
        family = tuple(CHOICES)[i % len(CHOICES)]
        own = {name: chosen.choice(values) for name, values in choices[family].items()}
        found.append({"family": family, **own, "seed": 1000 * draw + i})
    return found


# --- the networks ---


def _activation(name: str) -> nn.Module:
    return {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}[name]()


@torch.no_grad()
def _initialised(weight: Tensor, init: str) -> None:
    """A weight ``[out, in, ...]`` drawn as the specification says; of torch's own by default."""
    if init == "default":
        return
    if init == "orthogonal":
        nn.init.orthogonal_(weight)
        return
    gain = {"he": math.sqrt(2), "small": 0.3, "large": 2.5}[init]
    nn.init.normal_(weight, std=gain / math.sqrt(weight[0].numel()))


class ConvBlock(nn.Module):
    """Convolution, norm, activation, and the shortcut that the specification says."""

    def __init__(self, spec: dict):
        super().__init__()
        width, size = spec["width"], spec["kernel"]
        self.conv = nn.Conv2d(width, width, size, padding=size // 2)
        self.norm = {
            "none": nn.Identity, "group": lambda: nn.GroupNorm(2, width),
            "batch": lambda: nn.BatchNorm2d(width, track_running_stats=False),
        }[spec["norm"]]()  # fmt: skip
        self.act = _activation(spec["activation"])
        self.is_plain = spec["shortcut"] == "none"
        self.scale = 1 / math.sqrt(spec["depth"]) if spec["shortcut"] == "scaled" else 1.0
        _initialised(self.conv.weight, spec["init"])

    def forward(self, x: Tensor) -> Tensor:
        """``[n, width, h, w]`` -> the same."""
        branch = self.act(self.norm(self.conv(x)))
        return branch if self.is_plain else x + self.scale * branch


def _convolutional(spec: dict) -> nn.Module:
    width, depth = spec["width"], spec["depth"]
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, width, 3, padding=1)]
    side, halved = 8, {depth // 3, 2 * depth // 3} if spec["pool"] != "none" else set()
    for i in range(depth):
        if i in halved and i:
            side //= 2
            layers.append(
                {
                    "average": lambda: nn.AvgPool2d(2), "max": lambda: nn.MaxPool2d(2),
                    "stride": lambda: nn.Conv2d(width, width, 3, 2, 1),
                }[spec["pool"]]()
            )  # fmt: skip
        layers.append(ConvBlock(spec))
    if spec["head"] == "mean":
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * side * side, 10))


class Recurrent(nn.Module):
    """Fused recurrent layers over an image's pixels in turn, and the same written out for ``torch.func``."""

    def __init__(self, spec: dict):
        super().__init__()
        self.cell, self.length, self.reads_last = spec["cell"], spec["length"], spec["read"] == "last"
        kind = {"gru": nn.GRU, "lstm": nn.LSTM}.get(self.cell, nn.RNN)
        more = {} if kind is not nn.RNN else {"nonlinearity": self.cell}
        self.net = kind(64 // self.length, spec["width"], spec["layers"], batch_first=True, **more)
        self.head = nn.Linear(spec["width"], 10)
        self.is_fused = True
        for name, weight in self.net.named_parameters():
            if weight.ndim > 1:
                for gate in weight.chunk(weight.shape[0] // spec["width"]):
                    _initialised(gate, spec["init"] if "hh" in name else "default")

    def forward(self, x: Tensor) -> Tensor:
        """``[n, 64]`` -> ``[n, 10]``."""
        x = x.unflatten(1, (self.length, -1))
        h = self.net(x)[0] if self.is_fused else self._written_out(x)
        return self.head(h[:, -1] if self.reads_last else h.mean(1))

    def _written_out(self, x: Tensor) -> Tensor:
        for layer in range(self.net.num_layers):
            # Not ``getattr``: under functional_call the weights stand in the module's own dictionary.
            own = {
                n: self.net._parameters[f"{n}_l{layer}"]
                for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            }
            given = x @ own["weight_ih"].T + own["bias_ih"]
            h = c = torch.zeros_like(given[:, 0, : self.net.hidden_size])
            steps = []
            for t in range(self.length):
                h, c = self._step(given[:, t], h @ own["weight_hh"].T + own["bias_hh"], h, c)
                steps.append(h)
            x = torch.stack(steps, 1)
        return x

    def _step(self, given: Tensor, kept: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        if self.cell == "gru":
            (ir, iz, new), (hr, hz, old) = given.chunk(3, 1), kept.chunk(3, 1)
            r, z = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
            return (1 - z) * torch.tanh(new + r * old) + z * h, c
        if self.cell == "lstm":
            i, f, g, o = (given + kept).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            return torch.sigmoid(o) * torch.tanh(c), c
        return (torch.tanh if self.cell == "tanh" else torch.relu)(given + kept), c


class TransformerBlock(nn.Module):
    """Attention and an MLP, each with the norm and the shortcut that the specification says."""

    def __init__(self, spec: dict):
        super().__init__()
        width = spec["width"]
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down, self.act = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), _activation(spec["activation"])  # fmt: skip
        self.norms, self.where = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * (spec["norm"] != "none"))), spec["norm"]  # fmt: skip
        self.keeps = 0.0 if spec["shortcut"] == "none" else 1.0
        self.scale = 1 / math.sqrt(2 * spec["depth"]) if spec["shortcut"] == "scaled" else 1.0
        for layer in (self.q, self.k, self.v, self.o, self.up, self.down):
            _initialised(layer.weight, spec["init"])

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        shares = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.o((shares @ v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        """``[n, t, width]`` -> the same."""
        for i, branch in enumerate((self._attend, lambda x: self.down(self.act(self.up(x))))):
            y = self.scale * branch(self.norms[i](x) if self.where == "pre" else x)
            x = x + y if self.keeps else y
            x = self.norms[i](x) if self.where == "post" else x
        return x


class Transformer(nn.Module):
    """Tokens of an image's pixels, learnt positions, blocks, a last norm where blocks begin with theirs."""

    def __init__(self, spec: dict):
        super().__init__()
        self.length, self.read = spec["length"], spec["read"]
        self.embed = nn.Linear(64 // self.length, spec["width"])
        self.positions = nn.Parameter(0.1 * torch.randn(self.length, spec["width"]))
        self.blocks = nn.ModuleList(TransformerBlock(spec) for _ in range(spec["depth"]))
        self.norm = nn.LayerNorm(spec["width"]) if spec["norm"] == "pre" else nn.Identity()
        self.head = nn.Linear(spec["width"], 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, 64]`` -> ``[n, 10]``."""
        x = self.embed(x.unflatten(1, (self.length, -1))) + self.positions
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean(1) if self.read == "mean" else x[:, 0 if self.read == "first" else -1])


def network(spec: dict) -> nn.Module:
    """Drawn from the specification's seed."""
    torch.manual_seed(spec["seed"])
    return {"convolutional": _convolutional, "recurrent": Recurrent, "transformer": Transformer}[
        spec["family"]
    ](spec)


# --- labels ---


def train(spec: dict) -> dict:
    """The loss at the end under each rate, all rates trained side by side from the same start."""
    start, model = time.perf_counter(), network(spec)
    if isinstance(model, Recurrent):
        model.is_fused = False
    x, y = digits()
    n, sgd = len(SGD) + len(ADAM), len(SGD)
    weights = {
        k: p.detach().expand(n, *p.shape).clone().requires_grad_() for k, p in model.named_parameters()
    }
    stepped = [(p, torch.zeros_like(p[sgd:]), torch.zeros_like(p[sgd:])) for p in weights.values()]

    def loss(parameters, inputs, target):
        return nn.functional.cross_entropy(torch.func.functional_call(model, parameters, (inputs,)), target)

    order, seen = torch.Generator().manual_seed(spec["seed"]), []
    for t in range(1, STEPS + 1):
        rows = torch.randint(len(x), (BATCH,), generator=order)
        # The rates share no weights: of the sum each gets its own gradient.
        values = torch.func.vmap(loss, in_dims=(0, None, None))(weights, x[rows], y[rows])
        gradients = torch.autograd.grad(values.sum(), list(weights.values()))
        seen.append(values.detach())
        best = torch.stack(seen[-20:]).mean(0).nan_to_num(math.inf).split([sgd, n - sgd])
        if t >= 20 and all(float(losses.min()) < LEARNT for losses in best):
            break
        with torch.no_grad():
            for (w, first, second), g in zip(stepped, gradients):
                shape = (-1,) + (1,) * (w.ndim - 1)
                w[:sgd] -= torch.tensor(SGD).view(shape) * g[:sgd]
                first.mul_(0.9).add_(g[sgd:], alpha=0.1)
                second.mul_(0.999).addcmul_(g[sgd:], g[sgd:], value=0.001)
                size = (second / (1 - 0.999**t)).sqrt_() + 1e-8
                w[sgd:] -= torch.tensor(ADAM).view(shape) * (first / (1 - 0.9**t)) / size
    end = [v if math.isfinite(v) else 1e9 for v in torch.stack(seen[-20:]).mean(0).tolist()]
    return {
        **spec, "sgd": end[:sgd], "adam": end[sgd:], "steps": t, "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def label(path: Path = LABELS, draw: int = DRAW) -> None:
    """Train what the file does not hold yet; it is written after each network."""
    torch.set_num_threads(1)
    rows = json.loads(path.read_text())["networks"] if path.exists() else []
    done = {row["seed"] for row in rows}
    for spec in specifications(draw):
        if spec["seed"] in done:
            continue
        rows.append(train(spec))
        print({k: rows[-1][k] for k in ("seed", "family", "seconds")}, flush=True)
        head = {
            "draw": draw,
            "sgd": SGD,
            "adam": ADAM,
            "steps": STEPS,
            "batch": BATCH,
            "torch": torch.__version__,
        }
        lines = ",\n".join(json.dumps(row) for row in rows)
        path.write_text(f'{json.dumps(head)[:-1]}, "networks": [\n{lines}\n]}}\n')


# --- the verdict against the labels ---


def figures() -> list[dict]:
    """The verdict and other tools' rules against the labels; by family, too."""
    parts = [(json.loads(path.read_text())["networks"], name) for path, name in PARTS if path.exists()]
    # A draw of which some are not labelled yet says little.
    return [row for networks, name in parts if len(networks) == NETWORKS for row in _of(networks, name)]


def _of(content: list[dict], part: str) -> list[dict]:
    seen = [_measured(row) for row in content]
    rows = []
    for optimizer, name in (("sgd", "SGD"), ("adam", "Adam")):
        learns = np.array([min(row[optimizer]) < LEARNT for row in content])
        borne = np.array([name not in one["flow"].verdict.hinders for one in seen])
        score = np.array([one["flow"].verdict.score for one in seen])
        rows.append({
            "name": f"verdict.score foretells learning under {name}, {len(content)} of three families, {part}: AUC",
            "value": _auc(score, learns), "unit": "", "aim": ">= 0.95", "detail": _confusion(borne, learns),
        })  # fmt: skip
        for family in CHOICES:
            own = np.array([row["family"] == family for row in content])
            rows.append({
                "name": f"verdict.score, {name}, {family}, {part}: AUC", "value": _auc(score[own], learns[own]), "unit": "",
                "aim": "", "detail": _confusion(borne[own], learns[own]),
            })  # fmt: skip
        for other in OTHERS:
            fine = np.array([one[other] for one in seen])
            rows.append({
                "name": f"{other}, {name}, {part}: accuracy", "value": float((fine == learns).mean()), "unit": "",
                "aim": f"verdict: {float((borne == learns).mean()):.2f}", "detail": _confusion(fine, learns),
            })  # fmt: skip
    return rows


def _measured(row: dict) -> dict:
    """The flow before training, and what the other tools' rules say."""
    import skipscope as ss

    x, y = digits()
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:256]
    model = network(row)
    flow = ss.gradient_flow(model, (x[chosen], y[chosen]), nn.functional.cross_entropy)
    return {"flow": flow} | {name: rule(flow, model) for name, rule in OTHERS.items()}


if __name__ == "__main__" and sys.argv[1:2] == ["label"]:
    label(*map(Path, sys.argv[2:3]), *map(int, sys.argv[3:4]))
