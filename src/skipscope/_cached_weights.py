"""Caches of tensors that a model computes once from its weights in evaluation mode, e.g. merged weights.

When the weights of a copy change, a filled cache would be stale. A cache that is empty at the start of a call
is emptied before every point; a call with a filled cache, which hides its weights, is refused.
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
    """Attribute that is empty before the first forward pass and holds a tensor after it.

    Attributes:
        module: name of the module.
        name: name of the attribute.
        buffer: whether it is a buffer.
        missing: whether the attribute did not exist before; otherwise it was None or an empty container.
    """

    module: str
    name: str
    buffer: bool
    missing: bool


def caches_filled_by(run: Callable[[], Any], model: nn.Module) -> tuple[Any, list[Cache]]:
    """Call ``run()``. Returns its result and the caches of ``model`` that it filled."""
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
    """Empty the given caches of ``model``, or of a copy of it."""
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
    """Map modules with plain floating-point tensors as attributes to the name of such an attribute."""
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
    """Refuse weights that are read in training mode, but in evaluation mode only through a filled cache.

    Args:
        operation: public call, named in the error.
        model: private copy in evaluation mode; it is run once if ``held`` is not empty.
        held: result of :func:`tensors_kept` before the first run.
        moved: names of the parameters that the call changes.
        run: function that runs a forward pass.

    Raises:
        SkipscopeError: a weight is hidden by a cache; the error names both.
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
    # A model that cannot run in training mode gives no evidence.
    except Exception:
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
    """Recorder of the ids of all tensors passed to torch functions."""

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
    """Whether a random generator is reachable from the modules' attributes."""
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
    """Yield ((module, attribute, is buffer), value) of all attributes except parameters and modules."""
    for name, module in model.named_modules():
        for key, value in module._buffers.items():
            yield (name, key, True), value
        for key, value in vars(module).items():
            if key not in _OF_EVERY_MODULE and not isinstance(value, nn.Parameter):
                yield (name, key, False), value


def _holds_tensors(value: Any) -> bool:
    return bool(_tensors_of(value))


def _tensors_of(value: Any) -> list[Tensor]:
    """The tensors in an attribute value, including containers, except parameters."""
    if not isinstance(value, Tensor | dict | list | tuple):
        return []
    return [t for t in tensors_in(value) if not isinstance(t, nn.Parameter)]
