"""A deep version of the lecture's network: hidden layers of Linear and GELU, and a linear head.

The head has no GELU, since with GELU a logit could not fall below -0.17.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from skipscope._validation import require_option
from skipscope.nn import registry

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": lambda: nn.GELU(approximate="tanh"),  # the lecture's form
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "linear": nn.Identity,
}


class DeepMLP(nn.Module):
    """Hidden layers of one width and a linear head; see :func:`deep_mlp`.

    Example:
        >>> import torch
        >>> model = deep_mlp(depth=3, shortcut="identity")
        >>> type(model).__name__, len(model.layers), model(torch.ones(2, 64)).shape
        ('DeepMLP', 3, torch.Size([2, 10]))
    """

    def __init__(self, layers: list[nn.Module], head: nn.Module, use_shortcut: bool, scale: float):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = head
        self.use_shortcut, self.scale = use_shortcut, scale

    def forward(self, x: Tensor) -> Tensor:
        """``[n, inputs]``, or any shape that flattens to it, -> ``[n, classes]``."""
        x = x.flatten(1)
        for layer in self.layers:
            layer_output = layer(x)
            if self.use_shortcut and x.shape == layer_output.shape:
                x = x + (layer_output if self.scale == 1 else self.scale * layer_output)
            else:
                x = layer_output
        return self.head(x)


def deep_mlp(
    depth: int = 30,
    width: int = 64,
    *,
    inputs: int = 64,
    classes: int = 10,
    shortcut: str | None = None,
    scale: float | Literal["depth"] = 1.0,
    init: Literal["default", "he"] = "default",
    activation: Literal["gelu", "relu", "tanh", "linear"] = "gelu",
) -> DeepMLP:
    """A deep version of the lecture's network: ``depth`` layers of Linear and GELU, and a linear head.

    With and without the lecture's shortcut the parameters have the same names, so twins can share weights.
    Variants with the same ``init`` draw the same weights from the same seed.

    Args:
        depth: number of hidden layers, including the first.
        width: number of units in a hidden layer.
        inputs: number of input features; if it equals ``width``, the first layer has a shortcut too.
        classes: number of outputs.
        shortcut: ``"identity"`` is the lecture's rule, ``x + layer(x)`` where the shapes agree. Any other
            name of ``skipscope.nn.registry()`` that keeps the width wraps those layers in its module, which
            renames their parameters; a kind that spans depth joins them to one chain. None for no shortcut.
        scale: a factor on the branch: ``x + scale * layer(x)``; ``"depth"`` is ``1/sqrt(depth)``.
        init: ``"default"`` is torch's initialisation; ``"he"`` is He's normal initialisation with zero biases
            for the hidden layers (He et al. 2015, arXiv 1502.01852).
        activation: the activation function after each hidden layer.

    Raises:
        SkipscopeError: an unknown shortcut, init or activation.

    Example:
        >>> model = deep_mlp(depth=3, shortcut="identity", scale="depth")
        >>> sum(p.numel() for p in model.parameters())
        13130
    """
    for name, value, known in [
        ("shortcut", shortcut, (None, *registry())),
        ("init", init, ("default", "he")),
        ("activation", activation, tuple(_ACTIVATIONS)),
    ]:
        require_option("deep_mlp", name, value, known)
    sizes = [inputs] + [width] * depth
    layers: list[nn.Module] = [
        nn.Sequential(nn.Linear(a, b), _ACTIVATIONS[activation]()) for a, b in pairwise(sizes)
    ]
    head = nn.Linear(sizes[-1], classes)
    if init == "he":
        for linear in (m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)):
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
    if shortcut is not None and shortcut != "identity":
        agree = [a == b for a, b in pairwise(sizes)]
        kind, fitting = registry()[shortcut], [layer for layer, fits in zip(layers, agree) if fits]
        # The layers that fit are consecutive, since only the first layer can change the width.
        if kind.spans_depth:
            layers = [layer for layer, fits in zip(layers, agree) if not fits]
            layers += [kind(fitting, width)] if fitting else []
        else:
            layers = [
                kind(layer, width, depth=len(fitting)) if fits else layer
                for layer, fits in zip(layers, agree)
            ]
    factor = 1 / math.sqrt(depth) if scale == "depth" else float(scale)
    return DeepMLP(layers, head, shortcut == "identity", factor)
