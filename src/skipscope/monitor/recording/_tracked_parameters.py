"""Parameters that an optimizer updates, with their names in the model."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skipscope._errors import SkipscopeError

# Prefixes and infixes that wrappers add to a parameter's name.
_WRAPPERS = ("_orig_mod.", "_forward_module.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


@dataclass(frozen=True, eq=False)
class TrackedParameters:
    """Snapshot of an optimizer's parameters, in the model's order.

    Attributes:
        parameters: the parameters, ``[P]``.
        names: their names.
        shapes: their full shapes, even if this rank holds a shard.
        groups: index of each parameter's group in the optimizer.
        sizes: number of elements; 1 for an empty parameter.
        tiny: smallest normal number of each dtype.
        order: index of each parameter among the model's parameters.
        roles: ``"table"`` for an embedding, ``"bias"`` for the bias of a linear layer or a convolution,
            ``"norm"`` for the weight of a norm layer, otherwise ``""``.
        members: the parameters in the optimizer's own order.
        device: common device if all share device and dtype, otherwise None.
        models: prefix of the model of each parameter; ``""`` if there is one model, or no model holds it.
        kind: scaling of the optimizer's step: ``"SGD"`` (proportional to the gradient), ``"Adam"``
            (normalised), or ``""`` if unknown.
    """

    parameters: tuple[Tensor, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: np.ndarray
    groups: tuple[int, ...]
    tiny: tuple[float, ...]
    order: tuple[int, ...]
    roles: tuple[str, ...]
    members: list[Tensor]
    device: torch.device | None
    models: tuple[str, ...]
    kind: str


def named_models(models: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Models by prefix: empty for a single model, otherwise the key or index of each model."""
    if isinstance(models, nn.Module):
        return {"": models}
    if isinstance(models, Mapping):
        return {f"{name}.": model for name, model in models.items()}
    if not isinstance(models, Sequence):
        raise SkipscopeError(
            "watch",
            "this is no model",
            expected="an nn.Module, a list of them, or a dict of names",
            got=f"{type(models).__name__}: {models!r:.60}",
            cure="watch(model, optimizer)",
        )
    return {f"{i}.": model for i, model in enumerate(models)}


def names_of(models: Mapping[str, nn.Module]) -> dict[int, tuple[int, str]]:
    """Map ids of parameters to their position among the models' parameters and their unwrapped names."""
    names: dict[int, tuple[int, str]] = {}
    for prefix, model in models.items():
        outer = "module." if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel) else ""
        for name, parameter in model.named_parameters():
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            names.setdefault(id(parameter), (len(names), prefix + name.removeprefix(outer)))
    return names


def track(optimizer: torch.optim.Optimizer, index: int, models: Mapping[str, nn.Module]) -> TrackedParameters:
    """Read an optimizer's parameters; those of no model come last, named by their position."""
    names = names_of(models)
    entries = []
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            place, name = names.get(id(p), (len(names), f"optimizer{index}.group{g}.{i}"))
            entries.append((place, len(entries), name, g, p))
    members = [entry[4] for entry in entries]
    entries.sort(key=lambda entry: entry[:2])
    roles = _roles(models)
    kinds = {(entry[4].device, entry[4].dtype) for entry in entries}
    held = {prefix: {id(p) for p in model.parameters()} for prefix, model in models.items()}
    return TrackedParameters(
        parameters=tuple(e[4] for e in entries),
        names=tuple(e[2] for e in entries),
        shapes=tuple(tuple(e[4].shape) for e in entries),
        sizes=np.array([max(1, e[4].numel()) for e in entries], dtype=float),
        groups=tuple(e[3] for e in entries),
        tiny=tuple(float(torch.finfo(e[4].dtype).tiny) for e in entries),
        order=tuple(e[0] for e in entries),
        roles=tuple(roles.get(id(e[4]), "") for e in entries),
        members=members,
        device=next(iter(kinds))[0] if len(kinds) == 1 else None,
        models=tuple(next((key for key, ids in held.items() if id(e[4]) in ids), "") for e in entries),
        kind=kind_of(optimizer),
    )


def _roles(models: Mapping[str, nn.Module]) -> dict[int, str]:
    """Map ids of parameters to ``"table"``, ``"bias"`` or ``"norm"``; other parameters are left out."""
    roles = {}
    for module in (module for model in models.values() for module in model.modules()):
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            roles[id(weight)] = "table"
        elif weight is not None and weight.ndim > 1 and bias is not None:
            roles[id(bias)] = "bias"
        elif weight is not None and weight.ndim == 1 and _is_norm(module):
            roles[id(weight)] = "norm"
    return roles


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm layer; libraries have their own RMS norms, which are norms by name only."""
    return isinstance(module, nn.modules.batchnorm._NormBase) or "norm" in type(module).__name__.lower()


_PROPORTIONAL = re.compile(r"SGD|LBFGS|Momentum|Nesterov", re.IGNORECASE)
_NORMALIZED = re.compile(
    r"Adam|ADOPT|Adagrad|Adadelta|RMSprop|Rprop|Lion|Muon|Adafactor|LAMB|LARS|Shampoo|SOAP|Sophia|NovoGrad|Yogi|Prodigy|"
    r"Adan|GaLore",
    re.IGNORECASE,
)


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """``"SGD"`` if steps are proportional to the gradient, ``"Adam"`` if they are normalised, else ``""``.

    Example:
        >>> kind_of(torch.optim.AdamW([torch.zeros(1)]))
        'Adam'
    """
    names = " ".join(kind.__name__ for kind in type(optimizer).__mro__ if kind is not torch.optim.Optimizer)
    normalized = bool(_NORMALIZED.search(names))
    return "SGD" if _PROPORTIONAL.search(names) and not normalized else "Adam" if normalized else ""


def about_columns(tracked: TrackedParameters, index: int, chains: Sequence[str]) -> dict[str, Any]:
    """Description of the columns of an optimizer's rows, as plain data."""
    return {
        "optimizer": index,
        "names": list(tracked.names),
        "shapes": [list(shape) for shape in tracked.shapes],
        "groups": list(tracked.groups),
        "tiny": list(tracked.tiny),
        "order": list(tracked.order),
        "roles": list(tracked.roles),
        "chains": list(chains),
        "kind": tracked.kind,
    }


def same_members(tracked: TrackedParameters, optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer still updates exactly these parameters, on the same device."""
    now = [p for group in optimizer.param_groups for p in group["params"]]
    same = len(now) == len(tracked.members) and all(map(operator.is_, now, tracked.members))
    return same and (tracked.device is None or tracked.parameters[0].device == tracked.device)
