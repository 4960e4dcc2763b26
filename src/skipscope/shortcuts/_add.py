"""Add shortcuts to the children of sequential containers and lists: the lecture's rule, where the shapes agree."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from skipscope import _data
from skipscope import nn as shortcuts
from skipscope._errors import SkipscopeError
from skipscope._untouched import private_copy, untouched

Wrap = Callable[[nn.Module], nn.Module]


def add_shortcuts(
    model: nn.Module,
    inputs: Any,
    kind: str | Wrap = "identity",
    *,
    span: int = 1,
    where: str | Callable[[str], bool] | None = None,
    report: Callable[[str], Any] | None = print,
) -> nn.Module:
    """A twin of ``model`` with a shortcut around every ``span`` children of its containers whose shapes agree.

    The children of each ``Sequential`` and ``ModuleList`` are gone through in order; containers inside something that
    was wrapped are left alone. A stretch is wrapped when it holds weights, when each of its children took one tensor
    and gave one, and when what came out has the shape of what went in. Local; shard a twin after it was made.

    Args:
        model: any eager module; it is left as found.
        inputs: what it is called with, to see shapes.
        kind: a name of ``skipscope.nn.registry()``, or a function from branch to module (a class of ``skipscope.nn``).
            ``"projection"`` also goes around stretches that change the width.
        span: layers skipped by one shortcut.
        where: only in containers whose path matches this shell pattern, or for which this function is true.
        report: called with one line for each stretch that was wrapped or not, and why; None for silence.

    Raises:
        SkipscopeError: an unknown kind, or a span that is no positive number.

    Example:
        >>> deep = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))
        >>> twin = add_shortcuts(deep, torch.ones(1, 3))
        0: wrapped, identity
        1: wrapped, identity
        2: not wrapped: 1 x 3 comes in, 1 x 1 goes out
        >>> [type(m).__name__ for m in twin]
        ['IdentityShortcut', 'IdentityShortcut', 'Linear']
    """
    if not callable(kind) and kind not in shortcuts.registry():
        raise SkipscopeError(
            "add_shortcuts", "unknown kind", expected="one of " + ", ".join(shortcuts.registry()) + ", or a module class",
            got=repr(kind),
        )  # fmt: skip
    if span < 1:
        raise SkipscopeError(
            "add_shortcuts", "a shortcut skips at least one layer", expected="span >= 1", got=span
        )
    chosen = (
        partial(fnmatch.fnmatchcase, pat=where) if isinstance(where, str) else where or (lambda path: True)
    )
    twin = private_copy(model, "add_shortcuts")
    adder = _Adder(_shapes(model, inputs), kind, span)
    for path, container in list(twin.named_modules()):
        inside = any(path == outer or path.startswith(outer + ".") for outer in adder.wrapped)
        if isinstance(container, nn.Sequential | nn.ModuleList) and not inside and chosen(path):
            adder.stretches(container, path)
    adder.wrap_all()
    for line in adder.lines:
        if report is not None:
            report(line)
    return twin


def _shapes(model: nn.Module, inputs: Any) -> dict[str, tuple[torch.Size, torch.Size] | str]:
    """What went into each module and came out, or why that is no one shape."""
    shapes: dict[str, tuple[torch.Size, torch.Size] | str] = {}
    handles = []
    with untouched(model, operation="add_shortcuts"), torch.no_grad():
        for path, module in model.named_modules():

            def hook(_: nn.Module, args: Any, output: Any, path: str = path) -> None:
                if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
                    shapes[path] = "it does not take one tensor and give one"
                elif path in shapes and shapes[path] != (args[0].shape, output.shape):
                    shapes[path] = "its shapes change from call to call"
                else:
                    shapes[path] = (args[0].shape, output.shape)

            handles.append(module.register_forward_hook(hook))
        try:
            _data.forward(model, (inputs, None), "add_shortcuts")
        finally:
            for handle in handles:
                handle.remove()
    return shapes


@dataclass
class _Adder:
    """Decides for every stretch, then wraps: some kinds need to know how many branches there are."""

    shapes: dict[str, Any]
    kind: str | Wrap
    span: int
    lines: list[str] = field(default_factory=list)
    wrapped: list[str] = field(default_factory=list)
    todo: list[tuple[Any, list[str], torch.Size, torch.Size]] = field(default_factory=list)

    def stretches(self, container: Any, path: str) -> None:
        """Go through one container."""
        names = list(container._modules)
        for start in range(0, len(names) - self.span + 1, self.span):
            stretch = names[start : start + self.span]
            paths = [f"{path}.{name}" if path else name for name in stretch]
            label = paths[0] if self.span == 1 else f"{paths[0]} to {paths[-1]}"
            reason = self._reason([container._modules[name] for name in stretch], paths)
            self.lines.append(
                f"{label}: not wrapped: {reason}" if reason else f"{label}: wrapped, {self._called()}"
            )
            if not reason:
                self.wrapped += paths
                self.todo.append((container, stretch, self.shapes[paths[0]][0], self.shapes[paths[-1]][1]))
        rest = len(names) % self.span
        if rest:
            self.lines.append(
                f"{path or 'the model'}: the last {rest} are fewer than the span of {self.span}"
            )

    def _called(self) -> str:
        return self.kind if isinstance(self.kind, str) else getattr(self.kind, "__name__", "a module")

    def _reason(self, modules: list[nn.Module], paths: list[str]) -> str | None:
        seen = [self.shapes.get(path, "it did not run") for path in paths]
        unknown = next((shape for shape in seen if isinstance(shape, str)), None)
        if unknown:
            return unknown
        if not any(True for module in modules for _ in module.parameters()):
            return "it holds no weights"
        before, after = seen[0][0], seen[-1][1]
        if any(one[1] != two[0] for one, two in pairwise(seen)):
            return "its layers do not follow one another"
        if before != after and not (self.kind == "projection" and _width_changes_only(before, after)):
            return f"{_written(before)} comes in, {_written(after)} goes out"
        return None

    def wrap_all(self) -> None:
        """Put the shortcut modules in place; what a stretch leaves empty becomes ``Identity``."""
        for container, stretch, before, after in self.todo:
            modules = [container._modules[name] for name in stretch]
            branch = modules[0] if len(modules) == 1 else nn.Sequential(*modules)
            made = self._made(branch, before, after)
            weight = next(branch.parameters())
            container._modules[stretch[0]] = made.to(weight.device, weight.dtype)
            for name in stretch[1:]:
                container._modules[name] = nn.Identity()

    def _made(self, branch: nn.Module, before: torch.Size, after: torch.Size) -> nn.Module:
        if not isinstance(self.kind, str):
            return self.kind(branch)
        dim = 1 if _holds_convolution(branch) else -1
        if self.kind == "projection":
            return shortcuts.ProjectionShortcut(branch, before[dim], after[dim], dim=dim)
        return shortcuts.registry()[self.kind](branch, before[dim], dim=dim, depth=len(self.todo))


def _holds_convolution(branch: nn.Module) -> bool:
    return any(
        isinstance(m, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm) for m in branch.modules()
    )


def _width_changes_only(before: torch.Size, after: torch.Size) -> bool:
    return len(before) == len(after) and sum(a != b for a, b in zip(before, after, strict=True)) == 1


def _written(shape: torch.Size) -> str:
    return " x ".join(map(str, shape))
