"""Gain of the weights and slope of the activation functions between boundaries.

Between two boundaries, a weight W multiplies the gradient's RMS by RMS(W) sqrt(fan-out), and an activation
function by the RMS of its derivative (mean-field theory; Schoenholz 2016, Pennington 2017). In a plain
network their product is the factor at the boundary, up to correlations.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skipscope._subject import Subject
from skipscope.flow.passes._gradient_sites import ACTIVATIONS
from skipscope.flow.verdict._flow_rules import StretchGain
from skipscope.shortcuts import tap_boundaries
from skipscope.shortcuts.trace import function_of, in_order

SATURATED = 0.05  # of the greatest slope


class _Recorder(TorchFunctionMode):
    """Recorder of gains and slopes of calls, by the index of the last boundary before them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.at, self.busy = model, -1, False
        self.names: dict[int, str] = {}
        self.gains: dict[int, list[tuple[str, float]]] = {}
        self.slopes: dict[int, list[tuple[str, float, float, float]]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = in_order(func, args, kwargs or {})
        if self.busy or not args or not isinstance(args[0], Tensor):
            return func(*args, **kwargs)
        name = function_of(func).name
        if name == "softmax":
            self.slopes.setdefault(self.at, []).append(("softmax", *_softmax_slope(func(*args, **kwargs))))
        elif name in ACTIVATIONS and args[0].is_floating_point():
            # Inside torch.vmap and torch.func tensors cannot be made to require a gradient.
            with contextlib.suppress(RuntimeError):
                self.slopes.setdefault(self.at, []).append(self.slope(func, args, kwargs))
        elif name == "linear" or name in {"conv1d", "conv2d", "conv3d"}:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            stride = 1 if name == "linear" else args[3] if len(args) > 3 else kwargs.get("stride", 1)
            self.gains.setdefault(self.at, []).append((self.name_of(weight), gain(weight, stride)))
        return func(*args, **kwargs)

    def name_of(self, weight: Tensor) -> str:
        """Name of a weight, looked up during the call because FSDP2 replaces the parameters of a module."""
        if id(weight) not in self.names:
            self.names = {id(p): name for name, p in self.model.named_parameters()}
        return self.names.get(id(weight), "weight")

    def slope(self, func: Any, args: tuple, kwargs: dict) -> tuple[str, float, float, float]:
        self.busy = True
        try:
            with torch.enable_grad():
                x = args[0].detach().clone().requires_grad_()
                y = func(x.clone(), *args[1:], **{k: v for k, v in kwargs.items() if k != "inplace"})
                (d,) = torch.autograd.grad(y.sum(), x)
        finally:
            self.busy = False
        size = d.abs().double()
        top = max(float(size.max()), 0.25 if "sigmoid" in func.__name__ else 1.0) if size.numel() else 1.0
        rms = math.sqrt(float(size.square().mean())) if size.numel() else 1.0
        return (
            func.__name__.strip("_"),
            rms,
            float((size < SATURATED * top).double().mean()),
            float((size == 0).double().mean()),
        )


def _softmax_slope(shares: Tensor) -> tuple[float, float, float]:
    """RMS of p (1 - p) relative to a uniform p, and the shares of saturated and inactive units."""
    p = shares.detach().double()
    n = p.numel() / max(1, p.sum().item())  # classes
    slope = p * (1 - p) / max(1 / n * (1 - 1 / n), 1e-300)
    return (
        math.sqrt(float(slope.square().mean())),
        float((slope < SATURATED).double().mean()),
        float((slope == 0).double().mean()),
    )


def gain(weight: Tensor, stride: Any = 1) -> float:
    """RMS(W) sqrt(fan-out): the factor of a linear map with independent weights on a gradient's RMS.

    Example:
        >>> round(gain(torch.eye(4)), 6)
        1.0
    """
    strides = stride if isinstance(stride, tuple | list) else [stride] * (weight.ndim - 2)
    fan_out = weight.shape[0] * math.prod(weight.shape[2:]) / math.prod(strides)
    return math.sqrt(float(weight.detach().double().square().mean()) * fan_out)


def layer_gains(subject: Subject) -> dict[str, StretchGain]:
    """Gain after each boundary, from a forward pass over a batch; empty if the pass needs gradients."""
    recorder, points = _Recorder(subject.model), subject.boundaries

    def touch(i: int, activation: Tensor) -> Tensor:
        recorder.at = i
        return activation

    try:
        with torch.no_grad(), tap_boundaries(subject.model, points, touch), recorder:
            subject.loss(subject.model, subject.data.first())
    except RuntimeError:
        return {}
    gains, slopes = recorder.gains, recorder.slopes
    for i in range(len(points) - 1):
        # A softmax between boundaries is attention or routing; only that of the output acts as an activation.
        slopes[i] = [s for s in slopes.get(i, []) if s[0] != "softmax"]
    return {p.name: _stretch_gain(gains.get(i, []), slopes.get(i, [])) for i, p in enumerate(points)}


def _stretch_gain(
    gains: list[tuple[str, float]], slopes: list[tuple[str, float, float, float]]
) -> StretchGain:
    worst = min(slopes, key=lambda s: s[1], default=(None, 1.0, 0.0, 0.0))
    return StretchGain(
        worst[0],
        math.prod(s[1] for s in slopes),
        worst[2],
        worst[3],
        math.prod(g for _, g in gains),
        min(gains, key=lambda g: g[1])[0] if gains else None,
    )
