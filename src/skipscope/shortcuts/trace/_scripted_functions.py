"""Scripted functions that a model's code names: TorchScript runs them out of every mode's sight."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator

import torch
from torch import nn

SCRIPTED = "a scripted function: what it joins cannot be seen"


def scripted_functions(modules: Iterable[nn.Module]) -> tuple[str, ...]:
    """The scripted functions that the methods of some modules name, or their attributes hold, by name."""
    found: dict[str, None] = {}
    seen: set[int] = set()
    classes = {base for module in modules for base in type(module).__mro__}
    for base in classes:
        if not base.__module__.startswith("torch."):
            for method in vars(base).values():
                if isinstance(method, types.FunctionType):
                    found.update(dict.fromkeys(_named(method, seen)))
    for module in modules:
        held = (v for v in vars(module).values() if isinstance(v, torch.jit.ScriptFunction))
        found.update(dict.fromkeys(str(function.name) for function in held))
    return tuple(found)


def _named(function: types.FunctionType, seen: set[int]) -> Iterator[str]:
    """The same for one function, and the functions of the same package that it names."""
    if id(function) in seen:
        return
    seen.add(id(function))
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, torch.jit.ScriptFunction):
            yield str(value.name)
        elif isinstance(value, types.FunctionType) and _package(value) == _package(function):
            yield from _named(value, seen)


def _package(function: types.FunctionType) -> str:
    return (function.__module__ or "").partition(".")[0]


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
