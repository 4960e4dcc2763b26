"""Candidate remedies, each applied to a copy: initialisations, norms, shortcuts, scaled branches."""

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
from skipscope._option_words import VerdictCause
from skipscope.flow.advice._residual_blocks import MAPS, NORMS, block_places, in_words, residual_blocks
from skipscope.nn import registry
from skipscope.shortcuts import add_shortcuts, find_shortcuts


@dataclass(frozen=True)
class Candidate:
    """A remedy to try.

    Attributes:
        name: in words.
        code: how to do it by hand.
        apply: changes a copy of the model, or returns another module; raises SkipscopeError where it cannot.
        places: on a copy, which layers it goes around, and which it leaves as they are; None where that needs
            no saying.
        means: what its name says only to those who know it.
    """

    name: str
    code: str
    apply: Callable[[nn.Module, Any], nn.Module]
    places: Callable[[nn.Module, Any], str] | None = None
    means: str = ""


_BLOCKS = Candidate(
    "residual blocks (He et al. 2015)",
    "y = norm2(layer2(act(norm1(layer1(x))))); x = act(y + x), where the shape changes act(y +"
    " norm3(layer3(x))) with a linear map or 1 x 1 convolution as layer3",
    residual_blocks,
    block_places,
)


def candidates(shortcuts: int, normed: bool = False, cause: VerdictCause = "none") -> list[Candidate]:
    """Remedies to try on a network.

    Args:
        shortcuts: number of its shortcuts.
        normed: whether most of its layers have a norm.
        cause: cause in its verdict.
    """
    he = Candidate(
        "He initialisation",
        "nn.init.kaiming_normal_(weight); nn.init.zeros_(bias)",
        partial(_initialised, nn.init.kaiming_normal_),
        means="random weights of standard deviation sqrt(2 / inputs), made for ReLU",
    )
    found = [
        he,
        Candidate(
            "orthogonal initialisation",
            "nn.init.orthogonal_(weight); nn.init.zeros_(bias)",
            partial(_initialised, nn.init.orthogonal_),
            means="random weights that keep the length of what they multiply",
        ),
        Candidate(
            "each layer's output scaled to variance 1 (LSUV)",
            "from the first layer to the last, on a batch: weight.div_(output.std())",
            _unit_variance,
            means="layer-sequential unit variance (Mishkin and Matas 2016): a batch goes through the network,"
            " and layer by layer, from the first on, the weights are divided by the standard deviation of the"
            " layer's output, so that it becomes 1; here without the orthogonal start",
        ),
    ]
    if cause == "head":
        found.insert(
            0, Candidate("the last layer reinitialised", "last_layer.reset_parameters()", _fresh_head)
        )
    if not normed:
        found.append(
            Candidate(
                "a norm after each layer",
                "nn.Sequential(layer, nn.LayerNorm(width)) in place of each layer but the last; after a"
                " convolution of images nn.BatchNorm2d(channels)",
                _normed,
            )
        )
    if shortcuts:
        return [
            *found,
            Candidate("branches scaled by 1/sqrt(L)", "last_weight_of_each_branch.div_(L ** 0.5)",
                      lambda model, inputs: _scaled_branches(model, inputs, 1 / math.sqrt(shortcuts)),
                      means="L is the number of shortcuts"),
            Candidate("branches that start at zero", "nn.init.zeros_(last_weight_of_each_branch)",
                      lambda model, inputs: _scaled_branches(model, inputs, 0.0),
                      means="each block begins as its shortcut alone, and learns its branch"),
        ]  # fmt: skip
    # Layers with norms usually form residual blocks, whose branch needs no further norm.
    kinds = ("depth-scaled", "highway", "rezero")
    found += [_BLOCKS] if normed else []
    found += [
        Candidate(
            f"{kind} shortcuts",
            f'ss.add_shortcuts(model, inputs, kind="{kind}")',
            partial(_with_shortcuts, kind),
            _shortcut_places,
            registry()[kind].equation,
        )
        for kind in (kinds if normed else ("identity", "pre-norm", *kinds))
    ]
    both = Candidate(
        "depth-scaled shortcuts and He initialisation",
        'ss.add_shortcuts(model, inputs, kind="depth-scaled"); ' + he.code,
        lambda model, inputs: _with_shortcuts("depth-scaled", he.apply(model, inputs), inputs),
    )
    return [*found, both]


def _maps(model: nn.Module) -> list[nn.Module]:
    found = [m for m in model.modules() if isinstance(m, MAPS) or _is_transposed(m)]
    if not found:
        raise SkipscopeError("prescribe", "the model has no linear map or convolution of torch's own")
    return found


def _hidden(model: nn.Module) -> list[nn.Module]:
    """Linear and convolution layers with trained weights, except the last, which gives the output."""
    found = _maps(model)[:-1]
    if not found:
        raise SkipscopeError("prescribe", "the model has no hidden linear map or convolution of torch's own")
    found = [module for module in found if module.weight.requires_grad]  # type: ignore[union-attr]
    if not found:
        raise SkipscopeError("prescribe", "every hidden layer is frozen, and is left alone")
    return found


def frozen(model: nn.Module) -> int:
    """Number of frozen linear and convolution layers."""
    return sum(_is_frozen(m) for m in model.modules() if isinstance(m, MAPS))


def only_the_last_is_trained(model: nn.Module) -> bool:
    """Whether every layer but the last is frozen, as in a linear probe."""
    maps = [m for m in model.modules() if isinstance(m, MAPS)]
    inside = {id(p) for m in maps for p in m.parameters()}
    adapters = any(p.requires_grad and p.ndim > 1 for p in model.parameters() if id(p) not in inside)
    return len(maps) > 1 and all(map(_is_frozen, maps[:-1])) and not adapters


def _is_frozen(module: nn.Module) -> bool:
    # Reading ``module.weight`` would run a parametrization, which may change its state (spectral norm).
    return not any(p.requires_grad for name, p in module.named_parameters() if not name.endswith("bias"))


def _is_transposed(module: nn.Module) -> bool:
    """Whether a module is the linear layer of Hugging Face's GPT-2, whose weight is ``[in, out]``."""
    return type(module).__name__ == "Conv1D" and getattr(module, "nf", None) is not None


def _matrix(module: nn.Module) -> Tensor:
    """The weight in torch's layout, ``[out, in, ...]``."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.t() if _is_transposed(module) else weight


@torch.no_grad()
def _initialised(rule: Callable[[Tensor], Any], model: nn.Module, inputs: Any) -> nn.Module:
    """Initialise the hidden layers with ``rule``; the last layer is not changed."""
    for module in _hidden(model):
        rule(_matrix(module))
        if module.bias is not None:
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return model


def _fresh_head(model: nn.Module, inputs: Any) -> nn.Module:
    """Initialise the last layer with torch's default."""
    last = _maps(model)[-1]
    if _is_transposed(last):
        raise SkipscopeError("prescribe", "the last layer is not one of torch's layers")
    if not last.weight.requires_grad:  # type: ignore[union-attr]
        raise SkipscopeError("prescribe", "the last layer is frozen, and is left alone")
    last.reset_parameters()  # type: ignore[operator]
    return model


@torch.no_grad()
def _unit_variance(model: nn.Module, inputs: Any) -> nn.Module:
    """Mishkin & Matas 2016, without the orthogonal start: in one forward pass, each layer in turn."""
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
    """Add a norm after every layer but the last, if the layer's container only calls its children in turn."""
    last, done = _maps(model)[-1], 0
    for container in list(model.modules()):
        if not isinstance(container, nn.Sequential | nn.ModuleList):
            continue
        children = list(container._modules.items())
        for (name, child), (_, after) in zip(children, [*children[1:], ("", None)]):
            if isinstance(child, MAPS) and child is not last and not isinstance(after, NORMS):
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
    """Add shortcuts of a kind around trained layers; a frozen layer could not adapt to its new input."""
    depth, frozen_stretches = 0, 0

    def count(branch: nn.Module) -> nn.Module:
        nonlocal depth, frozen_stretches
        trained = any(p.requires_grad for p in branch.parameters())
        depth, frozen_stretches = depth + trained, frozen_stretches + (not trained)
        return branch

    def wrap(branch: nn.Module) -> nn.Module:
        if not any(p.requires_grad for p in branch.parameters()):
            return branch
        last = _maps(branch)[-1]
        dim = -1 if isinstance(last, nn.Linear) else 1
        made = registry()[kind](branch, last.weight.shape[0], dim=dim, depth=depth)  # type: ignore[union-attr]
        return made.to(last.weight.device, last.weight.dtype)  # type: ignore[union-attr]

    add_shortcuts(model, inputs, kind=count, report=None)
    if not depth:
        problem = "no layers of equal shape stand in a Sequential or ModuleList"
        if frozen_stretches:
            problem = "every layer that a shortcut could go around is frozen, and is left alone"
        raise SkipscopeError("prescribe", problem)
    return add_shortcuts(model, inputs, kind=wrap, report=None)


def _shortcut_places(model: nn.Module, inputs: Any) -> str:
    """Describe the layers that ``add_shortcuts`` bypasses, and those where the shape changes."""
    lines: list[tuple[str, str]] = []
    add_shortcuts(model, inputs, report=lambda line: lines.append(tuple(line.split(": ", 1))))  # type: ignore[arg-type]
    modules = dict(model.named_modules())
    around, left = [], dict[str, str]()
    for label, said in lines:
        is_trained = any(p.requires_grad for p in modules[label.partition(" to ")[0]].parameters())
        if said.startswith("wrapped") and is_trained:
            around.append(label)
        elif said.startswith("wrapped"):
            left[label] = "frozen"
        elif said.endswith("goes out") or "its owner" in said:
            left[label] = said.removeprefix("not wrapped: ")
    return in_words(around, left)


@torch.no_grad()
def _scaled_branches(model: nn.Module, inputs: Any, factor: float) -> nn.Module:
    """Multiply the last layer of each branch by ``factor``, which norms before it cannot undo."""
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
