"""Candidate remedies: initialisations, norms, shortcuts, scaled branches; each changes a copy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skipscope._data import call_model
from skipscope._errors import SkipscopeError
from skipscope.nn import registry
from skipscope.shortcuts import add_shortcuts, find_shortcuts

_MAPS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.instancenorm._InstanceNorm,
)


@dataclass(frozen=True)
class Candidate:
    """One thing to try.

    Attributes:
        name: in words.
        code: how to do it by hand.
        apply: changes a copy of the model, or returns another module; raises SkipscopeError where it cannot.
    """

    name: str
    code: str
    apply: Callable[[nn.Module, Any], nn.Module]


def candidates(shortcuts: int) -> list[Candidate]:
    """What to try on a network that has so many shortcuts."""
    he = Candidate(
        "He initialisation", "nn.init.kaiming_normal_(weight); nn.init.zeros_(bias)",
        partial(_initialised, nn.init.kaiming_normal_),
    )  # fmt: skip
    found = [
        he,
        Candidate(
            "orthogonal initialisation",
            "nn.init.orthogonal_(weight); nn.init.zeros_(bias)",
            partial(_initialised, nn.init.orthogonal_),
        ),
        Candidate(
            "each layer's output scaled to variance 1 (LSUV)", "weight.div_(output.std())", _unit_variance
        ),
        Candidate(
            "a norm after each layer",
            "nn.Sequential(layer, nn.LayerNorm(width))  # BatchNorm2d for images",
            _normed,
        ),
    ]
    if shortcuts:
        return [
            *found,
            Candidate("branches scaled by 1/sqrt(L)", "last_weight_of_each_branch.div_(L ** 0.5)",
                      lambda model, inputs: _scaled_branches(model, inputs, 1 / math.sqrt(shortcuts))),
            Candidate("branches that start at zero", "nn.init.zeros_(last_weight_of_each_branch)",
                      lambda model, inputs: _scaled_branches(model, inputs, 0.0)),
        ]  # fmt: skip
    kinds = ("identity", "depth-scaled", "pre-norm", "highway", "rezero")
    found += [
        Candidate(
            f"{kind} shortcuts",
            f'ss.add_shortcuts(model, inputs, kind="{kind}")',
            partial(_with_shortcuts, kind),
        )
        for kind in kinds
    ]
    both = Candidate(
        "depth-scaled shortcuts and He initialisation",
        'ss.add_shortcuts(model, inputs, kind="depth-scaled"); ' + he.code,
        lambda model, inputs: _with_shortcuts("depth-scaled", he.apply(model, inputs), inputs),
    )
    return [*found, both]


def _maps(model: nn.Module) -> list[nn.Module]:
    found = [m for m in model.modules() if isinstance(m, _MAPS) or _is_transposed(m)]
    if not found:
        raise SkipscopeError("prescribe", "the model has no linear map or convolution of torch's own")
    return found


def _hidden(model: nn.Module) -> list[nn.Module]:
    """The maps whose weights are trained, without the last one, whose output is no activation's input."""
    found = _maps(model)[:-1]
    if not found:
        raise SkipscopeError("prescribe", "the model has no hidden linear map or convolution of torch's own")
    found = [module for module in found if module.weight.requires_grad]  # type: ignore[union-attr]
    if not found:
        raise SkipscopeError("prescribe", "every hidden layer is frozen, and is left alone")
    return found


def frozen(model: nn.Module) -> int:
    """How many maps are frozen."""
    # Not ``module.weight``: a parametrization computes that, and may move its own state (spectral norm).
    return sum(
        not any(p.requires_grad for name, p in m.named_parameters() if not name.endswith("bias"))
        for m in model.modules()
        if isinstance(m, _MAPS)
    )


def _is_transposed(module: nn.Module) -> bool:
    """The linear map of Hugging Face's GPT-2, whose weight is ``[in, out]``."""
    return type(module).__name__ == "Conv1D" and getattr(module, "nf", None) is not None


def _matrix(module: nn.Module) -> Tensor:
    """The weight as torch has it: ``[out, in, ...]``."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.t() if _is_transposed(module) else weight


@torch.no_grad()
def _initialised(rule: Callable[[Tensor], Any], model: nn.Module, inputs: Any) -> nn.Module:
    """Hidden maps by ``rule``; the last one stays."""
    for module in _hidden(model):
        rule(_matrix(module))
        if module.bias is not None:
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return model


@torch.no_grad()
def _unit_variance(model: nn.Module, inputs: Any) -> nn.Module:
    """Mishkin & Matas 2015, without the orthogonal start: in one forward pass, each layer in turn."""
    hidden, handles = _hidden(model), []

    @torch.no_grad()
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        spread = float(output.std())
        if not (math.isfinite(spread) and spread > 0):
            return output
        module.weight.div_(spread)  # type: ignore[union-attr]
        if module.bias is not None:
            module.bias.div_(spread)  # type: ignore[union-attr]
        return output / spread

    for module in hidden:
        handles.append(module.register_forward_hook(hook))
    try:
        with torch.enable_grad():  # the model may differentiate inside
            call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return model


def _normed(model: nn.Module, inputs: Any) -> nn.Module:
    """A norm after every map but the last, where the map stands in a container that only calls it."""
    last, done = _maps(model)[-1], 0
    for container in list(model.modules()):
        if not isinstance(container, nn.Sequential | nn.ModuleList):
            continue
        children = list(container._modules.items())
        for (name, child), (_, after) in zip(children, [*children[1:], ("", None)]):
            if isinstance(child, _MAPS) and child is not last and not isinstance(after, _NORMS):
                norm = _norm_for(child).to(child.weight.device, child.weight.dtype)
                container._modules[name] = nn.Sequential(child, norm)
                done += 1
    if not done:
        raise SkipscopeError(
            "prescribe",
            "no layer without a norm stands in a Sequential or ModuleList, where a norm could follow it",
        )
    return model


def _norm_for(module: nn.Module) -> nn.Module:
    kinds = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
    kind = next((norm for conv, norm in kinds.items() if isinstance(module, conv)), nn.LayerNorm)
    return kind(module.weight.shape[0])  # type: ignore[union-attr]


def _with_shortcuts(kind: str, model: nn.Module, inputs: Any) -> nn.Module:
    plain = add_shortcuts(model, inputs, report=None)
    depth = len(find_shortcuts(plain, inputs))
    if not depth:
        raise SkipscopeError("prescribe", "no layers of equal shape stand in a Sequential or ModuleList")
    if kind == "identity":
        return plain

    def wrap(branch: nn.Module) -> nn.Module:
        last = _maps(branch)[-1]
        dim = -1 if isinstance(last, nn.Linear) else 1
        made = registry()[kind](branch, last.weight.shape[0], dim=dim, depth=depth)  # type: ignore[union-attr]
        return made.to(last.weight.device, last.weight.dtype)  # type: ignore[union-attr]

    return add_shortcuts(model, inputs, kind=wrap, report=None)


@torch.no_grad()
def _scaled_branches(model: nn.Module, inputs: Any, factor: float) -> nn.Module:
    """The last map of each branch times ``factor``: norms before it cannot undo it."""
    modules, done = dict(model.named_modules()), set()
    for shortcut in find_shortcuts(model, inputs):
        ends = [
            modules[name] for name in shortcut.branch if getattr(modules[name], "weight", None) is not None
        ]
        if ends and id(ends[-1]) not in done:
            done.add(id(ends[-1]))
            ends[-1].weight.mul_(factor)  # type: ignore[union-attr]
            if getattr(ends[-1], "bias", None) is not None:
                ends[-1].bias.mul_(factor)  # type: ignore[union-attr]
    if not done:
        raise SkipscopeError("prescribe", "no branch has a weight that could be scaled")
    return model
