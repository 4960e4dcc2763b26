"""Caches of tensors that a model computes once from its weights in evaluation mode, e.g. merged weights.

On a copy that moves they would stay those of the first point. A cache that is empty when the call begins is
emptied before every point; a full cache hides its weights, and the call is refused.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skipscope._data import tensors_in, without_gradients
from skipscope._errors import SkipscopeError
from skipscope._untouched import private_copy

_OF_EVERY_MODULE = set(vars(nn.Module()))


@dataclass(frozen=True)
class Cache:
    """An attribute that was empty before the first forward pass and holds a tensor after it.

    Attributes:
        module: the module's name.
        name: the attribute's.
        buffer: it is a buffer.
        missing: the module had no such attribute; else it was None, or an empty container.
    """

    module: str
    name: str
    buffer: bool
    missing: bool


def caches_filled_by(run: Callable[[], Any], model: nn.Module) -> tuple[Any, list[Cache]]:
    """What ``run()`` returns, and the caches of ``model`` that it filled."""
    before = {
        where: value is None or (isinstance(value, dict | list) and not value)
        for where, value in _entries(model)
    }
    found = run()
    caches = [
        Cache(*where, missing=where not in before)
        for where, value in _entries(model)
        if before.get(where, True) and _holds_tensors(value)
    ]
    return found, caches


def empty(model: nn.Module, caches: Iterable[Cache]) -> None:
    """Empty caches of ``model``, or of a copy of it."""
    for cache in caches:
        module = model.get_submodule(cache.module)
        held = module._buffers if cache.buffer else vars(module)
        value = held.get(cache.name)
        if cache.missing:
            held.pop(cache.name, None)
        elif isinstance(value, dict | list):
            value.clear()
        else:
            held[cache.name] = None


def tensors_kept(model: nn.Module) -> dict[str, str]:
    """Modules that hold floating-point tensors of their own, with the name of an attribute that does."""
    return {
        module: name
        for (module, name, buffer), value in _entries(model)
        if not buffer and any(t.is_floating_point() for t in _tensors_of(value))
    }


def refuse_full_caches(
    operation: str,
    model: nn.Module,
    held: dict[str, str],
    moved: Iterable[str],
    run: Callable[[nn.Module], Any],
) -> None:
    """Refuse weights that a pass in training mode reads, but in evaluation mode only through a full cache.

    Args:
        operation: named in the error.
        model: a copy of our own in evaluation mode; it is run once if its modules held tensors of their own.
        held: what it held before it was run first, by :func:`tensors_kept`.
        moved: names of the parameters that the call is about.
        run: a forward pass.

    Raises:
        SkipscopeError: naming the weight and the cache.
    """
    parameters = dict(model.named_parameters())
    moved = [
        name
        for name in moved
        if any(name.startswith(f"{m}." if m else "") for m in held) and name in parameters
    ]
    if not moved:
        return
    read = _read_by(model, run)
    unread = [name for name in moved if id(parameters[name]) not in read]
    if not unread:
        return
    trained = private_copy(model, operation)
    for module in trained.modules():
        module.training = True
    try:
        read = _read_by(trained, run)
    except Exception:  # a model that has no training mode here shows nothing
        return
    named = dict(trained.named_parameters())
    hidden = [name for name in unread if id(named[name]) in read]
    if hidden:
        owner = max((m for m in held if hidden[0].startswith(f"{m}." if m else "")), key=len)
        raise SkipscopeError(
            operation,
            "in evaluation mode the model does not read this weight, but a tensor that it keeps",
            layer=hidden[0],
            got=f"{owner}.{held[owner]}".lstrip(".") + ", computed from the weights as they are",
            cure=(
                "empty that cache before the call (often model.train(), then model.eval()): it is then"
                " computed at each point"
            ),
        )


class _Reads(TorchFunctionMode):
    """Collects the identities of all tensors that are arguments of torch's functions."""

    def __init__(self):
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.update(id(t) for t in tensors_in([*args, *(kwargs or {}).values()]))
        return func(*args, **(kwargs or {}))


def _read_by(model: nn.Module, run: Callable[[nn.Module], Any]) -> set[int]:
    def tracked() -> None:
        with reads:
            run(model)

    reads = _Reads()
    without_gradients(tracked)
    return reads.seen


def holds_generators(model: nn.Module) -> bool:
    """Whether an object reachable from the modules' attributes draws from a random state of its own."""
    waiting: list[tuple[Any, int]] = [(vars(module), 0) for module in model.modules()]
    seen: set[int] = set()
    while waiting:
        thing, depth = waiting.pop()
        if isinstance(thing, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
            return True
        if id(thing) in seen or depth > 4 or isinstance(thing, Tensor | nn.Module | type):
            continue
        seen.add(id(thing))
        inner = (
            thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else ()
        )
        if not inner and hasattr(thing, "__dict__") and not isinstance(thing, ModuleType):
            inner = vars(thing).values()
        waiting += [(value, depth + 1) for value in inner]
    return False


def _entries(model: nn.Module) -> Iterator[tuple[tuple[str, str, bool], Any]]:
    """((module, attribute, whether it is a buffer), value) of everything but parameters and modules."""
    for name, module in model.named_modules():
        for key, value in module._buffers.items():
            yield (name, key, True), value
        for key, value in vars(module).items():
            if key not in _OF_EVERY_MODULE and not isinstance(value, nn.Parameter):
                yield (name, key, False), value


def _holds_tensors(value: Any) -> bool:
    return bool(_tensors_of(value))


def _tensors_of(value: Any) -> list[Tensor]:
    """The tensors in an attribute, or in a container there; none of them parameters."""
    if not isinstance(value, Tensor | dict | list | tuple):
        return []
    return [t for t in tensors_in(value) if not isinstance(t, nn.Parameter)]
