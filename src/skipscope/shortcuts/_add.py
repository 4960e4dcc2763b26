"""Add shortcuts to the children of sequential containers and lists: the lecture's rule, where the shapes agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from skipscope import _data
from skipscope._errors import SkipscopeError
from skipscope._untouched import private_copy, untouched


class Skip(nn.Module):
    """x + F(x) around a stretch of layers.

    Args:
        layers: what is wrapped, one after the other.
        projection: a linear map for the shortcut side where the shapes do not agree.
    """

    def __init__(self, layers: list[nn.Module], projection: nn.Module | None = None):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.projection = projection

    def forward(self, x: Tensor) -> Tensor:
        return (x if self.projection is None else self.projection(x)) + self.layers(x)


def add_shortcuts(
    model: nn.Module,
    inputs: Any,
    kind: str | Callable[[nn.Module], nn.Module] = "identity",
    *,
    span: int = 1,
    where: str | Callable[[str], bool] | None = None,
) -> nn.Module:
    """A twin of ``model`` with a shortcut around every ``span`` children of its containers whose shapes agree.

    Args:
        model: any eager module; it is left as found.
        inputs: what it is called with, to see shapes.
        kind: ``"identity"``, ``"projection"``, or a function (a ``skipscope.nn`` class) from branch to module.
        span: layers skipped by one shortcut.
        where: only in containers whose path matches this pattern or predicate.

    Example:
        >>> deep = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))
        >>> twin = add_shortcuts(deep, torch.ones(1, 3))
        >>> [type(m).__name__ for m in twin]
        ['Skip', 'Skip', 'Linear']
    """
    import fnmatch

    matches = (
        (lambda path: fnmatch.fnmatchcase(path, where))
        if isinstance(where, str)
        else where or (lambda path: True)
    )
    if kind not in {"identity"} and not callable(kind):
        raise SkipscopeError(
            "add_shortcuts", "unknown kind", expected="identity, or a module class", got=repr(kind)
        )
    shapes = _shapes(model, inputs)
    twin = private_copy(model, "add_shortcuts")
    done: list[str] = []
    for path, container in list(twin.named_modules()):
        inside = any(path == outer or path.startswith(outer + ".") for outer in done)
        if isinstance(container, nn.Sequential | nn.ModuleList) and matches(path) and not inside:
            done += _wrap(container, path, shapes, kind, span)
    return twin


def _shapes(model: nn.Module, inputs: Any) -> dict[str, tuple[Any, Any]]:
    shapes: dict[str, tuple[Any, Any]] = {}
    handles = []
    with untouched(model, operation="add_shortcuts"), torch.no_grad():
        for path, module in model.named_modules():

            def hook(_: nn.Module, args: Any, output: Any, path: str = path) -> None:
                one = len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor)
                shapes[path] = (args[0].shape, output.shape) if one else (None, None)

            handles.append(module.register_forward_hook(hook))
        try:
            _data.forward(model, (inputs, None), "add_shortcuts")
        finally:
            for handle in handles:
                handle.remove()
    return shapes


def _wrap(container: Any, path: str, shapes: dict[str, Any], kind: Any, span: int) -> list[str]:
    names, wrapped = list(container._modules), []
    for start in range(0, len(names) - span + 1, span):
        stretch = names[start : start + span]
        paths = [f"{path}.{n}" if path else n for n in stretch]
        seen = [shapes.get(p, (None, None)) for p in paths]
        modules = [container._modules[n] for n in stretch]
        if any(s[0] is None for s in seen) or seen[0][0] != seen[-1][1]:
            continue
        if not any(True for m in modules for _ in m.parameters()):
            continue
        branch = modules[0] if span == 1 else nn.Sequential(*modules)
        container._modules[stretch[0]] = Skip(modules) if kind == "identity" else kind(branch)
        for name in stretch[1:]:
            container._modules[name] = nn.Identity()
        wrapped += paths
    return wrapped
