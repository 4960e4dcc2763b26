"""The arguments of a call in the order of its signature: keywords may be given in any order.

What is read by its place (the first operand, a key beside a value) is then right however the call is written.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

from torch import Tensor

from skipscope._torch_private import schemas_of


def in_order(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments, those at the front by position, where keywords give tensors out of order.

    Example:
        >>> import torch
        >>> in_order(torch.sub, (), {"other": torch.ones(1), "input": torch.zeros(1)})
        ((tensor([0.]), tensor([1.])), {})
    """
    named = [name for name, value in kwargs.items() if _holds_tensor(value)]
    if not named:
        return args, kwargs
    names = _names(func, len(args), tuple(kwargs))
    if not names or (args and named == sorted(named, key=names.index)):
        return args, kwargs
    rest = {name: kwargs[name] for name in sorted(kwargs, key=names.index)}
    front = list(args)
    for name in names[len(args) :]:
        if name not in rest or name in _keyword_only(func):
            break
        front.append(rest.pop(name))
    return tuple(front), rest


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value)
    )


@functools.lru_cache(4096)
def _names(func: Callable[..., Any], count: int, keywords: tuple[str, ...]) -> tuple[str, ...]:
    """The parameters of the signature that such a call fits; () where none is known."""
    fitting = (names for names, _ in _signatures(func) if set(keywords) <= set(names[count:]))
    return next(fitting, ())


@functools.lru_cache(4096)
def _keyword_only(func: Callable[..., Any]) -> frozenset[str]:
    return frozenset(name for _, only in _signatures(func) for name in only)


def _signatures(func: Callable[..., Any]) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Of each form of a function, all parameters, and those that are given by keyword alone.

    Functions in C have no Python signature; the schemas of the operators of that name have their names.
    """
    if isinstance(func, FunctionType):
        parameters = inspect.signature(func).parameters.values()
        only = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        yield tuple(p.name for p in parameters), only
        return
    for schema in schemas_of(getattr(func, "__name__", "")):
        arguments = [("input" if name == "self" else name, only) for name, only in schema]
        yield tuple(name for name, _ in arguments), tuple(name for name, only in arguments if only)
