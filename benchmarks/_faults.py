"""Networks broken in a known manner: hosts of several libraries with one fault put in.

Each case says which state, place and cause an expert would name, before a verdict is run. ``TABLE`` is the table
fault -> state, cause and which call can see it; those that only a training loop can show (a cleared gradient, another
model's optimizer) are seen by ``watch``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import _hosts

# fault: (states that are right, causes that are right, what sees it)
TABLE: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "through time": (("vanishing",), ("time",), "gradient_flow, watch"),
    "one weight too small": (("vanishing",), ("gain",), "gradient_flow, watch"),
    "all weights too small": (("vanishing",), ("gain",), "gradient_flow, watch"),
    "all weights too large": (("exploding", "nonfinite"), ("gain", "overflow"), "gradient_flow, watch"),
    "in one branch": (("vanishing",), ("branch",), "gradient_flow"),
    "at the head": (("vanishing",), ("head",), "gradient_flow"),
    "saturated output": (("vanishing", "dead"), ("saturation",), "gradient_flow"),
    "saturation": (("vanishing", "dead"), ("saturation",), "gradient_flow, watch"),
    "dead units": (("dead",), ("inactive",), "gradient_flow, watch"),
    "stale batch norm, too small": (("exploding", "nonfinite", "dead"), ("batch norm", "overflow"), "gradient_flow"),
    "stale batch norm, too large": (("vanishing", "dead"), ("batch norm",), "gradient_flow"),
    "masked softmax": (("nonfinite",), ("softmax",), "gradient_flow, watch"),
    "division by 0": (("nonfinite",), ("div",), "gradient_flow, watch"),
    "root at 0": (("nonfinite",), ("sqrt",), "gradient_flow, watch"),
    "weight is NaN": (("nonfinite",), ("weights",), "gradient_flow, watch"),
    "data are NaN": (("nonfinite",), ("data",), "gradient_flow"),
    "detached": (("unconnected",), ("missing path",), "gradient_flow, watch"),
    "no_grad": (("unconnected",), ("missing path",), "gradient_flow, watch"),
    "loss passes nothing on": (("dead",), ("loss",), "gradient_flow"),
    "cleared gradient": (("dead",), ("cleared",), "watch"),
    "another model's optimizer": (("unconnected",), ("optimizer",), "watch"),
    "unused part": (("healthy",), ("none",), "gradient_flow (named in its notes), watch"),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One broken network.

    Attributes:
        fault: a key of ``TABLE``.
        host: where it was put in.
        build: makes model, data and loss.
        place: what the verdict's ``where`` must contain; "" where any place is right.
    """

    fault: str
    host: str
    build: Callable[[int], tuple[nn.Module, Any, Any]]
    place: str = ""

    @property
    def name(self) -> str:
        """Fault and host."""
        return f"{self.fault}: {self.host}"


def _host(name: str) -> _hosts.Host:
    return next(h for h in _hosts.hosts() if h.name == name)


def _built(name: str, change: Callable[[nn.Module], Any], size: int, seed: int, n: int = 4) -> tuple[nn.Module, Any, Any]:  # fmt: skip
    torch.manual_seed(seed)
    host = _host(name)
    classes = 2 if host.kind == "tokens" else 10
    model = host.make(classes, size)
    changed = change(model)
    data = _hosts.batch(host, n, classes, size, seed=seed)
    return changed if isinstance(changed, nn.Module) else model, data, _hosts.loss_of(host)


def _in(
    host: str, fault: str, change: Callable[[nn.Module], Any], size: int, place: str = "", n: int = 4
) -> Case:
    return Case(fault, host, lambda seed: _built(host, change, size, seed, n), place)


def _after(path: str, function: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], None]:
    """Put a function after a module."""

    def change(model: nn.Module) -> None:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (function(output[0]), *output[1:])
            return function(output)

        model.get_submodule(path).register_forward_hook(hook)

    return change


def _masked(h: Tensor) -> Tensor:
    """Softmax over a row of which every entry is masked."""
    scores = h.flatten(1)[:, :4].clone()
    mask = torch.zeros_like(scores)
    mask[0] = -torch.inf
    return h * (scores + mask).softmax(-1).sum(-1).view(-1, *[1] * (h.ndim - 1))


def _divided(h: Tensor) -> Tensor:
    return h / (h - h.detach()).norm(dim=-1, keepdim=True)


def _rooted(h: Tensor) -> Tensor:
    return h + (h - h).sqrt()


def _no_grad(model_path: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        module = model.get_submodule(model_path)
        forward = module.forward

        @functools.wraps(forward)
        def without(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                return forward(*args, **kwargs)

        module.forward = without

    return change


@torch.no_grad()
def _scaled(factor: float, *paths: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        with torch.no_grad():
            for path in paths:
                module = model.get_submodule(path)
                module.weight.mul_(factor)  # type: ignore[operator, union-attr]
                if getattr(module, "bias", None) is not None:
                    module.bias.mul_(factor)  # type: ignore[operator, union-attr]

    return change


def _every(factor: float) -> Callable[[nn.Module], None]:
    """Every matrix but the last."""

    def change(model: nn.Module) -> None:
        with torch.no_grad():
            for p in [p for p in model.parameters() if p.ndim >= 2][:-1]:
                p.mul_(factor)

    return change


def _bias(path: str, value: float) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        with torch.no_grad():
            model.get_submodule(path).bias.fill_(value)  # type: ignore[union-attr, operator]

    return change


def _stale(value: float) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for module in model.eval().modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
                module.running_var.fill_(value)

    return change


def _one(path: str, value: float) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        with torch.no_grad():
            model.get_submodule(path).weight.view(-1)[0] = value  # type: ignore[union-attr, operator]

    return change


class _Squashed(nn.Module):
    """A model whose output is squashed far out on its flat part."""

    def __init__(self, model: nn.Module, squash: nn.Module, by: float):
        super().__init__()
        self.model, self.squash, self.by = model, squash, by

    def forward(self, x: Tensor) -> Tensor:
        return self.squash(self.by + self.model(x))


def _squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - nn.functional.one_hot(target, output.shape[1])).square().mean()


def _squashed(host: str, squash: nn.Module, by: float, size: int) -> Case:
    def build(seed: int) -> tuple[nn.Module, Any, Any]:
        model, data, _ = _built(host, lambda m: None, size, seed)
        return _Squashed(model, squash, by), data, _squared

    return Case("saturated output", host, build)


class _DeepBranch(nn.Module):
    """One skip over many sigmoid layers, in front of a model that takes vectors."""

    def __init__(self, model: nn.Module, width: int, depth: int):
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.branch = nn.Sequential(
            *[nn.Sequential(nn.Linear(width, width), nn.Sigmoid()) for _ in range(depth)]
        )
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.model(x + self.branch(x))


class _WithUnused(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.unused = model, nn.Linear(8, 8)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class _Tanh(nn.Module):
    """The plain network of a textbook."""

    def __init__(self, depth: int, squash: type[nn.Module], classes: int = 10):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), squash()) for _ in range(depth)])
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


def _plain(fault: str, depth: int, squash: type[nn.Module], change: Callable[[nn.Module], Any], place: str = "") -> Case:  # fmt: skip
    def build(seed: int) -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(seed)
        model = _Tanh(depth, squash)
        for layer in model.layers:
            nn.init.orthogonal_(layer[0].weight, 1.4 if squash is nn.ReLU else 1.1)  # type: ignore[index]
        change(model)
        return model, _hosts.batch(_host("torch/mlp"), 32, 10, 64, seed=seed), nn.functional.cross_entropy

    return Case(fault, f"plain {squash.__name__} of {depth}", build, place)


def _over_time(kind: type[nn.Module], steps: int, layers: int = 1) -> Case:
    def build(seed: int) -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(seed)
        model = _hosts._Recurrent(kind, 10, 8, layers)
        return model, (torch.randn(8, steps, 8), torch.randint(0, 10, (8,))), nn.functional.cross_entropy

    return Case("through time", f"{kind.__name__} of {layers}, {steps} steps", build, "net")


class _Cells(nn.Module):
    def __init__(self, kind: type[nn.Module]):
        super().__init__()
        self.cell, self.head = kind(8, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


def _over_cells(kind: type[nn.Module], steps: int) -> Case:
    def build(seed: int) -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(seed)
        return (
            _Cells(kind),
            (torch.randn(8, steps, 8), torch.randint(0, 10, (8,))),
            nn.functional.cross_entropy,
        )

    return Case("through time", f"{kind.__name__}, {steps} steps", build, "cell")


# A block in the middle of the main line of each host, and the size it is measured at.
MIDDLES = {
    "timm/resnet18": ("layer2", 64), "timm/vit_tiny_patch16_224": ("blocks.5", 64), "timm/convnext_atto": ("stages.1", 64),
    "timm/efficientnet_b0": ("blocks.3", 64), "timm/resmlp_12_224": ("blocks.4", 64), "torchvision/resnet18": ("layer3", 64),
    "torchvision/mobilenet_v2": ("features.7", 64), "torchvision/vgg11_bn": ("features.10", 64),
    "torchvision/convnext_tiny": ("features.3", 64), "transformers/llama-64x4": ("model.layers.1", 32),
    "transformers/gpt2": ("transformer.h.3", 32), "transformers/bert-mlm": ("bert.encoder.layer.1", 32),
    "transformers/opt": ("model.decoder.layers.1", 32), "skipscope/resnet20": ("stages.1", 16), "torch/rezero": ("8", 64),
    "torch/mlp-batchnorm": ("8", 64),
}  # fmt: skip
NORMED = (
    ("timm/resnet18", 64), ("timm/vgg11_bn", 64), ("torchvision/resnet18", 64), ("torchvision/vgg11_bn", 64),
    ("torch/mlp-batchnorm", 64), ("torchvision/mobilenet_v2", 64),
)  # fmt: skip
HEADS = (
    ("timm/resnet18", "fc", 64), ("timm/vit_tiny_patch16_224", "head", 64), ("torchvision/convnext_tiny", "classifier.2", 64),
    ("transformers/llama-64x4", "lm_head", 32), ("torch/mlp", "6", 64), ("skipscope/resnet20", "head", 16),
)  # fmt: skip


@functools.cache
def cases() -> tuple[Case, ...]:
    """All of them."""
    found = [
        *(_over_time(kind, steps) for kind in (nn.RNN, nn.LSTM, nn.GRU) for steps in (100, 200)),
        _over_time(nn.LSTM, 150, 2),
        *(_over_cells(kind, 120) for kind in (nn.RNNCell, nn.LSTMCell, nn.GRUCell)),
        _plain("one weight too small", 8, nn.Tanh, _scaled(1e-4, "layers.4.0"), "layers.3"),
        _plain("one weight too small", 8, nn.ReLU, _scaled(1e-4, "layers.4.0"), "layers.3"),
        _plain("all weights too small", 12, nn.Tanh, _every(0.3)),
        _plain("all weights too small", 24, nn.ReLU, _every(0.5)),
        _plain("all weights too large", 16, nn.ReLU, _every(3.0)),
        _plain("all weights too large", 24, nn.ReLU, _every(2.0)),
        _plain("saturation", 8, nn.Tanh, lambda m: [_bias(f"layers.{i}.0", 6.0)(m) for i in range(8)]),
        _plain("saturation", 8, nn.Sigmoid, lambda m: [_bias(f"layers.{i}.0", 12.0)(m) for i in range(8)]),
        _plain("dead units", 8, nn.ReLU, _bias("layers.3.0", -1e3), "layers.3"),
        _plain("dead units", 8, nn.ReLU, _bias("layers.6.0", -1e3), "layers.6"),
        _in("torch/mlp", "dead units", _bias("2", -1e3), 64, "2", 32),
        _in("torch/cnn with average pools", "one weight too small", _scaled(1e-4, "6"), 32, "3"),
        _in("torch/cnn with average pools", "dead units", _bias("6", -1e3), 32, "6"),
        _in("torchvision/squeezenet1_1", "one weight too small", _scaled(1e-4, "features.7.squeeze"), 64),
        _in("torchvision/alexnet", "one weight too small", _scaled(1e-4, "features.6"), 64, "features.3"),
        _in("torch/mlp", "in one branch", lambda m: _DeepBranch(m, 64, 15), 64, "branch", 32),
        _in("torch/mlp-batchnorm", "in one branch", lambda m: _DeepBranch(m, 64, 20), 64, "branch", 32),
        _in("torch/rezero", "in one branch", lambda m: _DeepBranch(m, 64, 15), 64, "branch", 32),
        *(_in(host, "at the head", _scaled(1e-6, path), size) for host, path, size in HEADS),
        _squashed("timm/resnet18", nn.Sigmoid(), 40.0, 64), _squashed("torch/mlp", nn.Sigmoid(), 20.0, 64),
        _squashed("torch/mlp", nn.Tanh(), 12.0, 64), _squashed("torchvision/resnet18", nn.Tanh(), 9.0, 64),
        _squashed("timm/vit_tiny_patch16_224", nn.Sigmoid(), 25.0, 64),
        *(_in(host, "stale batch norm, too small", _stale(1e-8), size) for host, size in NORMED),
        *(_in(host, "stale batch norm, too large", _stale(1e10), size) for host, size in NORMED if "mlp" in host or "vgg" in host),
        *(_in(host, "masked softmax", _after(path, _masked), size) for host, (path, size) in MIDDLES.items()),
        *(_in(host, "division by 0", _after(path, _divided), size) for host, (path, size) in list(MIDDLES.items())[::2]),
        *(_in(host, "root at 0", _after(path, _rooted), size) for host, (path, size) in list(MIDDLES.items())[1::2]),
        *(_in(host, "detached", _after(path, Tensor.detach), size) for host, (path, size) in MIDDLES.items()),
        *(_in(host, "no_grad", _no_grad(path), size) for host, (path, size) in list(MIDDLES.items())[:3]),
        _in("timm/resnet18", "weight is NaN", _one("layer3.0.conv1", float("nan")), 64),
        _in("transformers/gpt2", "weight is NaN", _one("transformer.h.2.mlp.c_fc", float("nan")), 32),
    ]  # fmt: skip
    return tuple(found)


def split(name: str) -> str:
    """``"held out"`` where the case's host is one of the held-out hosts, else ``"seen"``."""
    return "held out" if name in _hosts.held_out() else "seen"
