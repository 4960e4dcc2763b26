"""Functions declared as merges by the user: fused kernels, custom autograd functions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch.overrides import handle_torch_function, has_torch_function

from skipscope._errors import SkipscopeError
from skipscope.shortcuts.trace import _operations


def mark_shortcut(
    function: Callable[..., Any], *, shortcut: str | int, branch: str | int
) -> Callable[..., Any]:
    """Declare that a function joins a shortcut and a branch, to be found and edited like an addition.

    Returns a wrapper that computes the same. Put it where the model finds the function
    (``block.join = mark_shortcut(kernel, ...)``), or use ``functools.partial`` as a decorator. Eager code
    only. Local.

    Args:
        function: returns one tensor, and is linear in each of the two operands while the other is zero.
        shortcut: name or position of the argument that carries the shortcut.
        branch: name or position of the argument that carries the branch.

    Raises:
        SkipscopeError: the function has no such argument.

    Example:
        >>> import torch
        >>> class Net(torch.nn.Module):
        ...     join = staticmethod(
        ...         mark_shortcut(lambda x, f: torch.stack([x, f]).sum(0), shortcut="x", branch="f")
        ...     )
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.lin = torch.nn.Linear(2, 2)
        ...     def forward(self, x):
        ...         return self.join(x, self.lin(x))
        >>> from skipscope.shortcuts import find_shortcuts
        >>> [(s.name, s.kind) for s in find_shortcuts(Net(), torch.ones(1, 2))]
        [('lin', 'identity')]
    """
    slots = tuple(_slot(function, argument) for argument in (shortcut, branch))
    name = (
        f"marked {getattr(function, '__module__', '')}.{getattr(function, '__qualname__', repr(function))}"
        f" {slots}"
    )

    @functools.wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        if has_torch_function((function,)):
            return handle_torch_function(marked, (), *args, **kwargs)
        return function(*args, **kwargs)

    marked.__name__ = name
    setattr(marked, _operations.MARK, _operations.Operation(name, slots))
    return marked


def _slot(function: Callable[..., Any], argument: str | int) -> tuple[int, str]:
    if isinstance(argument, int):
        return (argument, "")
    names = list(inspect.signature(function).parameters)
    if argument not in names:
        raise SkipscopeError(
            "mark_shortcut",
            "the function has no such argument",
            expected=", ".join(names),
            got=argument,
            cure="give the name of an argument, or its position",
        )
    return (names.index(argument), argument)
