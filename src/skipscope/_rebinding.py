"""Rebinding of functions that a deep copy shares with its original.

``copy.deepcopy`` copies bound methods, partials and objects, but not functions. A closure that is set as
``module.forward``, kept in an attribute or registered as a hook would still run the original's modules. Here
such functions are rebuilt with the copy's counterparts of the objects in their closures. A function that
reads the model from a global variable cannot be rebuilt, and is refused.
"""

from __future__ import annotations

import copy
import dis
import functools
import os
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from skipscope._errors import SkipscopeError

_DYNAMO = os.path.join(os.path.dirname(str(torch.__file__)), "_dynamo") + os.sep
_CONTAINERS = (dict, list, tuple, set, deque)
# Most objects that are searched behind a value.
_MAX_SEARCHED = 100_000


def rebind(copied: nn.Module, memo: dict[int, Any], operation: str) -> None:
    """Rebind the functions of a deep copy from its original to the copy.

    Functions compiled by ``torch.compile`` are replaced by the eager functions inside.

    Args:
        copied: result of ``copy.deepcopy(model, memo)``.
        memo: memo of that call: id of each copied object -> its copy.
        operation: public call, named in errors.

    Raises:
        SkipscopeError: a function reads the original from a global variable.
    """
    rebinder = _Rebinder(memo, operation)
    rebinder.own.update(map(id, copied.modules()))
    seen: set[int] = set()
    queue: list[Any] = list(copied.modules())
    while queue:
        holder = queue.pop()
        if id(holder) in rebinder.own and id(holder) not in seen:
            seen.add(id(holder))
            contents = vars(holder) if _has_attributes(holder) else holder
            _replace(contents, rebinder.rebound)
            queue += _contents(contents)


def eager(function: Any) -> Any:
    """The eager function inside a function compiled by ``torch.compile``, or the function itself."""
    while isinstance(function, types.FunctionType) and function.__code__.co_filename.startswith(_DYNAMO):
        inside = getattr(function, "_torchdynamo_orig_callable", None)
        if inside is None or getattr(function, "_torchdynamo_disable", False):
            return function
        function = inside
    if isinstance(function, types.MethodType) and eager(function.__func__) is not function.__func__:
        return types.MethodType(eager(function.__func__), function.__self__)
    return function


class _Rebinder:
    """Map from objects of the original to their counterparts in the copy, extended to functions.

    Args:
        memo: memo of the deep copy.
        operation: public call, named in errors.
    """

    def __init__(self, memo: dict[int, Any], operation: str):
        self.operation = operation
        self.images = dict(memo)
        self.own = {id(image) for key, image in memo.items() if key != id(image)}
        # References to these objects keep their ids from being reused.
        self.kept: list[Any] = [memo]

    def rebound(self, value: Any) -> Any:
        """The replacement of a value that the copy holds, or the value itself."""
        value = eager(value)
        if isinstance(value, types.MethodType | functools.partial | tuple):
            if not any(map(self._reaches, _contents(value))):
                return value
            made = self._rebuilt(value)
            self.own.add(id(made))
            self.kept.append(made)
            return made
        return self.image(value) if isinstance(value, types.FunctionType | weakref.ref) else value

    def image(self, value: Any) -> Any:
        """The copy's counterpart of a value, or the value itself if it does not refer to the original."""
        value = eager(value)
        known = self.images.get(id(value))
        if known is not None:
            return known
        return self._rebuilt(value) if self._reaches(value) else value

    def _rebuilt(self, value: Any) -> Any:
        image = self.image
        self.kept.append(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return types.MethodType(image(value.__func__), image(value.__self__))
        if isinstance(value, functools.partial):
            keywords = {key: image(v) for key, v in value.keywords.items()}
            made = functools.partial(image(value.func), *map(image, value.args), **keywords)
            made.__dict__.update({key: image(v) for key, v in vars(value).items()})
            return made
        if isinstance(value, weakref.ref):
            return weakref.ref(image(value()))
        if isinstance(value, tuple | set):
            made = [image(v) for v in value]
            return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
        # Registered before its contents are mapped, because they may refer back to it.
        made = self.images[id(value)] = copy.copy(value)
        _replace(vars(made) if _has_attributes(made) else made, image)
        return made

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        self._refuse_globals(function)
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        made = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, closure=cells or None
        )
        self.images[id(function)] = made
        functools.update_wrapper(made, function, updated=())
        made.__defaults__ = self.image(function.__defaults__)
        made.__kwdefaults__ = self.image(function.__kwdefaults__)
        made.__dict__.clear()
        made.__dict__.update({key: self.image(value) for key, value in vars(function).items()})
        for cell, before in zip(cells, function.__closure__ or (), strict=True):
            if not _is_empty(before):
                cell.cell_contents = self.image(before.cell_contents)
        return made

    def _reaches(self, value: Any) -> bool:
        """Whether an object of the original with a counterpart in the copy is reachable from a value."""
        seen: set[int] = set()
        queue = [value]
        while queue and len(seen) < _MAX_SEARCHED:
            thing = queue.pop()
            if id(thing) in seen or id(thing) in self.own:
                continue
            seen.add(id(thing))
            image = self.images.get(id(thing))
            if image is not None:
                if image is not thing:
                    return True
                continue
            if isinstance(thing, types.FunctionType) and self._globals(thing):
                return True
            queue += _contents(vars(thing) if _has_attributes(thing) else thing)
        return False

    def _globals(self, function: types.FunctionType) -> list[str]:
        """Names of global variables of a function that refer to the original."""
        return [
            name
            for name in _global_names(function.__code__)
            if isinstance(value := function.__globals__.get(name), nn.Module | Tensor | types.MethodType)
            and self._is_of_original(value)
        ]

    def _is_of_original(self, value: Any) -> bool:
        value = value.__self__ if isinstance(value, types.MethodType) else value
        return self.images.get(id(value), value) is not value

    def _refuse_globals(self, function: types.FunctionType) -> None:
        for name in self._globals(function):
            raise SkipscopeError(
                self.operation,
                "a function that was set on the model names the model as a global variable: a copy would run"
                " the original's weights",
                got=f"{function.__qualname__} reads the global variable {name!r}",
                cure=(
                    "make the twin first and set the function on it; or let the function take the module as"
                    " an argument: model.forward = types.MethodType(function, model)"
                ),
            )


def _replace(contents: Any, image: Any) -> None:
    """Replace each value of a container by its image, in place."""
    if isinstance(contents, dict):
        for key, value in list(contents.items()):
            if (new := image(value)) is not value:
                contents[key] = new
    elif isinstance(contents, list | deque):
        for i, value in enumerate(contents):
            if (new := image(value)) is not value:
                contents[i] = new


def _contents(value: Any) -> Iterable[Any]:
    """The objects that a container or a function refers to."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, _CONTAINERS):
        return list(value)
    if isinstance(value, types.MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, functools.partial):
        return (value.func, value.args, value.keywords, vars(value))
    if isinstance(value, weakref.ref):
        return (value(),)
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if not _is_empty(cell)]
        return (*cells, value.__defaults__, value.__kwdefaults__, vars(value))
    return ()


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _has_attributes(value: Any) -> bool:
    """Whether a value is a module or an object of a class of the user's."""
    kind = type(value)
    if issubclass(kind, nn.Module):
        return True
    package = kind.__module__.partition(".")[0]
    is_foreign = package in {"torch", "numpy", "skipscope"} or package in sys.stdlib_module_names
    return not is_foreign and not issubclass(kind, (type, *_CONTAINERS)) and hasattr(value, "__dict__")


@functools.lru_cache(4096)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    """Names of the global variables that a function or a function nested in it reads."""
    return tuple(sorted(set(_each_global_name(code))))


def _each_global_name(code: types.CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in {"LOAD_GLOBAL", "LOAD_NAME"}:
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _each_global_name(constant)
