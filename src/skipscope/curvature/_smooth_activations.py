"""Activations whose second derivative is computed once for all products on a kept graph.

A product runs backward through a gradient's graph, and torch recomputes each activation's derivatives, from
exponentials and error functions, in every product, although they do not depend on the vector. With y = f(x),
the backward pass is ``g -> g f'(x)``, and its own backward is ``s -> (s f'(x), s g f''(x))``. All factors are
known after the gradient, so a product only multiplies.

This leaves out the third derivative. A loss that differentiates the network itself (a gradient penalty,
forces, a physics-informed loss) needs it, so a backward pass inside the loss uses torch's own formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

# Elementwise, smooth, and costly to differentiate twice. tanh and sigmoid are cheap: their outputs suffice.
_SMOOTH = {F.gelu, F.silu, F.mish, F.softplus, F.logsigmoid}


class SharedDerivatives(TorchFunctionMode):
    """Mode in which activations save their derivatives; the values do not change.

    Attributes:
        computing: whether the loss is being computed, so that a backward pass belongs to the loss.
    """

    def __init__(self):
        super().__init__()
        self.computing = False

    def __enter__(self):
        self.computing = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.computing = False
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        plain = func in _SMOOTH and args and type(args[0]) is Tensor and not kwargs.get("inplace")
        if (
            plain
            and args[0].requires_grad
            and torch.is_grad_enabled()
            and True not in args[1:]
            and not _hooked()
        ):
            return _Smooth.apply(args[0], lambda x: func(x, *args[1:], **kwargs), self)
        return func(*args, **kwargs)


def _hooked() -> bool:
    """Whether saved-tensor hooks are active: a checkpoint would not find the tensors that it expects."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"):
            return False
    except RuntimeError:
        return True


class _Smooth(torch.autograd.Function):
    """``f(x)`` with saved first and second derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], mode: SharedDerivatives) -> Tensor:
        ctx.function, ctx.mode = function, mode
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            value = function(point)
            (slope,) = torch.autograd.grad(value.sum(), point, create_graph=True)
            (bend,) = torch.autograd.grad(slope.sum(), point)
        ctx.save_for_backward(x, slope.detach(), bend)
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, slope, bend = ctx.saved_tensors
        (grad,) = grads
        if not torch.is_grad_enabled():
            found = grad * slope
        elif ctx.mode.computing:
            (found,) = torch.autograd.grad(ctx.function(x), x, grad, create_graph=True)
        else:
            found = _Pull.apply(grad, x, slope, bend)
        return found, None, None  # type: ignore[return-value]


class _Pull(torch.autograd.Function):
    """``grad f'(x)``, whose backward uses the saved derivatives."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
        ctx.save_for_backward(slope, grad * bend)
        return grad * slope

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *seeds: Tensor) -> tuple[Tensor, Tensor, None, None]:
        slope, bent = ctx.saved_tensors
        (seed,) = seeds
        return seed * slope, seed * bent, None, None
