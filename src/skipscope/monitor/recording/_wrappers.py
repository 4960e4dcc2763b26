"""Unwrapping of models and optimizers from the wrappers of trainers and libraries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from skipscope._errors import SkipscopeError

# Attributes that hold the wrapped optimizer: in Accelerate, Lightning, Fabric, timm's Lookahead, and
# sharpness-aware and schedule-free wrappers.
_INNER = ("optimizer", "_optimizer", "base_optimizer", "_base_optimizer", "base")
# Attributes that hold several optimizers: in torchtitan, and in Hugging Face's layer-wise optimizers (an
# optimizer for each parameter).
_SEVERAL = ("optimizers", "optimizer_dict")


def innermost(model: nn.Module) -> nn.Module:
    """The user's module inside DDP, DataParallel, Fabric and ``torch.compile`` wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
            continue
        inner = getattr(model, "_orig_mod", None) or getattr(model, "_forward_module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def inner_optimizers(optimizer: Any) -> list[tuple[torch.optim.Optimizer, tuple[Any, ...]]]:
    """The torch optimizers whose ``step`` changes the weights, each with the wrappers around it.

    Raises:
        SkipscopeError: not an optimizer, or an optimizer whose steps cannot be observed.
    """
    return list(_inside(optimizer, ()))


def _inside(
    optimizer: Any, outer: tuple[Any, ...]
) -> Iterator[tuple[torch.optim.Optimizer, tuple[Any, ...]]]:
    for name in _SEVERAL:
        several = getattr(optimizer, name, None)
        several = list(several.values()) if isinstance(several, dict) else several
        if (
            isinstance(several, list | tuple)
            and several
            and all(isinstance(o, torch.optim.Optimizer) for o in several)
        ):
            for each in {id(o): o for o in several}.values():
                yield from _inside(each, (*outer, optimizer))
            return
    for name in _INNER:
        inner = getattr(optimizer, name, None)
        if inner is not optimizer and _steps_for(inner, optimizer):
            yield from _inside(inner, (*outer, optimizer))
            return
    if not isinstance(optimizer, torch.optim.Optimizer) or not hasattr(
        optimizer, "_optimizer_step_pre_hooks"
    ):
        raise SkipscopeError(
            "watch",
            "this optimizer's steps cannot be seen",
            expected="a torch.optim.Optimizer, or a wrapper with one in ." + ", .".join(_INNER),
            got=type(optimizer).__name__,
            cure=(
                "pass the torch optimizer inside it; a class of your own: call torch.optim.Optimizer.__init__"
                " in its __init__"
            ),
        )
    if not getattr(type(optimizer).step, "hooked", False):  # type: ignore[attr-defined]
        raise SkipscopeError(
            "watch",
            "this optimizer's step() does not run torch's step hooks, so its steps cannot be seen",
            got=type(optimizer).__name__,
            cure="its __init__ must call torch.optim.Optimizer.__init__",
        )
    yield optimizer, outer


def _steps_for(inner: Any, outer: Any) -> bool:
    """Whether ``inner`` is, or wraps, an optimizer of the parameters that ``outer`` appears to update."""
    if not isinstance(inner, torch.optim.Optimizer):
        held = (getattr(inner, name, None) for name in _INNER if inner is not None)
        return any(one is not inner and one is not outer and _steps_for(one, outer) for one in held)
    theirs = _members(outer)
    return not theirs or bool(_members(inner) & theirs)


def _members(optimizer: Any) -> set[int]:
    groups = getattr(optimizer, "param_groups", None) or ()
    return {id(p) for group in groups for p in group["params"]}
