"""``add_shortcuts``: wrap children of containers in a shortcut where the shapes agree, as in the lecture."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from skipscope import _data
from skipscope import nn as connections
from skipscope._errors import SkipscopeError
from skipscope._option_words import ConnectionKind
from skipscope._printable import printable
from skipscope._public_call import public_call
from skipscope._untouched import private_copy, require_module, untouched

Wrap = Callable[[nn.Module], nn.Module]


@public_call("add_shortcuts")
def add_shortcuts(
    model: nn.Module,
    inputs: Any,
    kind: ConnectionKind | type[nn.Module] | Wrap = "identity",
    *,
    span: int = 1,
    where: str | Callable[[str], bool] | None = None,
    report: Callable[[str], Any] | None = print,
    **arguments: Any,
) -> nn.Module:
    """Return a twin of ``model`` with a shortcut around every ``span`` layers whose shapes agree.

    A *stretch* is ``span`` consecutive children of a ``Sequential`` or ``ModuleList``. It is wrapped if it
    holds the weights of a layer (a norm alone does not count), each child takes one tensor and returns one,
    and the output has the input's shape; otherwise the next stretch begins one child later. Containers inside
    a wrapped stretch are left alone, and so are layers whose owner does more than call them. In a
    ``Sequential`` the norm after a layer, and the activation after that norm, stay on its branch. A kind that
    spans depth (hyper-connections, attention residuals) joins neighbouring stretches to one chain. The twin
    is run once before it is returned. Local; shard a twin afterwards.

    Args:
        model: any eager module; left unchanged.
        inputs: its inputs, to measure shapes.
        kind: a name of ``skipscope.nn.registry()``, one of its classes, or a function from branch to module.
            ``"projection"`` also goes around stretches that change the width.
        span: number of children that one shortcut skips.
        where: a shell pattern or a predicate for the paths of the containers to change; by default all.
        report: called with one line for each stretch: wrapped, or not wrapped and why. None for silence.
        arguments: arguments of the kind, for instance ``init=0.1`` for ``"layer-scale"``.

    Raises:
        SkipscopeError: an unknown kind, a span below 1, a kind that does not keep the width that the next
            layer takes, or a twin that does not run.

    Example:
        >>> deep = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))
        >>> twin = add_shortcuts(deep, torch.ones(1, 3))
        0: wrapped, identity
        1: wrapped, identity
        2: not wrapped: 1 x 3 comes in, 1 x 1 goes out
        >>> [type(m).__name__ for m in twin]
        ['IdentityShortcut', 'IdentityShortcut', 'Linear']
    """
    if span < 1:
        raise SkipscopeError(
            "add_shortcuts", "a shortcut skips at least one layer", expected="span >= 1", got=span
        )
    known = connections.find_kind(kind, "add_shortcuts")
    maker = _ShortcutMaker(kind, known, arguments)
    chosen = (
        partial(fnmatch.fnmatchcase, pat=where) if isinstance(where, str) else where or (lambda path: True)
    )
    require_module(model, "add_shortcuts")
    twin = private_copy(model, "add_shortcuts")
    runs = _OriginalRuns(model, inputs)
    plan = _Plan(runs.shapes, maker, span)
    for path, container in list(twin.named_modules()):
        inside = any(path == outer or path.startswith(outer + ".") for outer in plan.wrapped)
        if isinstance(container, nn.Sequential | nn.ModuleList) and not inside and chosen(path):
            plan.add(container, path)
    stretches = _runnable(twin, plan, runs)
    if known is not None and known.spans_depth and not stretches:
        raise SkipscopeError(
            "add_shortcuts",
            f"the kind {known.name!r} joins layers that follow one another, and there are none",
            expected="children of one Sequential that keep the shape",
            got="; ".join(f"{label}: {line}" for label, line in plan.lines.items())[:300] or "no container",
            cure=(
                "put the layers into one nn.Sequential, or choose a kind that goes around one layer:"
                " kind='identity'"
            ),
        )
    for stretch in stretches:
        stretch.put(maker.module(stretch, depth=sum(len(s.parts) for s in stretches)))
    _run_once(twin, stretches, maker, runs)
    if report is not None:
        for label, line in plan.lines.items():
            report(printable(f"{label}: {line}"))
    return twin


class _OriginalRuns:
    """Runs of the original on the inputs, in its current mode and in the other mode (training or eval).

    Attributes:
        shapes: module path -> input and output shape, or the reason why these are unknown.
        outputs: ``training`` flag, or None for the current mode -> output tensors. A mode in which the
            original does not run is missing.
    """

    def __init__(self, model: nn.Module, inputs: Any):
        self.inputs = inputs
        self.shapes: dict[str, tuple[torch.Size, torch.Size] | str] = {}
        self.outputs: dict[bool | None, list[Tensor]] = {}
        with contextlib.ExitStack() as hooks:
            for path, module in model.named_modules():
                hooks.callback(module.register_forward_hook(partial(self._note, path)).remove)
            self.outputs[None] = self.run(model, None)
        # If the original does not run in that mode (batch norm on one sample), the twin need not either.
        with contextlib.suppress(Exception):
            self.outputs[not model.training] = self.run(model, not model.training)

    def _note(self, path: str, _: nn.Module, args: Any, output: Any) -> None:
        if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            self.shapes[path] = "it does not take one tensor and give one"
        elif self.shapes.setdefault(path, (args[0].shape, output.shape)) != (args[0].shape, output.shape):
            self.shapes[path] = "its shapes change from call to call"

    def run(self, model: nn.Module, training: bool | None) -> list[Tensor]:
        """The output tensors of a model in training or eval mode, or in its current mode if None."""
        with untouched(model, training=training, seed=0, operation="add_shortcuts"), torch.no_grad():
            return _data.tensors_in(_data.forward(model, (self.inputs, None), "add_shortcuts"))

    def difference(self, model: nn.Module) -> str | None:
        """How a model's outputs differ from the original's, in words. None if they are equal."""
        for training, expected in self.outputs.items():
            try:
                got = self.run(model, training)
            except Exception as error:
                return (str(getattr(error, "problem", error)).strip() or repr(error)).splitlines()[0][:200]
            if len(got) != len(expected) or not all(map(_is_close, got, expected)):
                return "the output changes when its layers are called through another module"
        return None


def _is_close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)


class _Bare(connections.Connection):
    """A branch in a module of its own, without a shortcut."""

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        return f


@dataclass(frozen=True)
class _Stretch:
    """Children of one container that one shortcut module replaces.

    Attributes:
        container: their owner.
        path: path of the owner.
        parts: for each shortcut the names of the children it skips; several parts are a chain.
        before: input shape.
        after: output shape.
    """

    container: Any
    path: str
    parts: tuple[tuple[str, ...], ...]
    before: torch.Size
    after: torch.Size

    @property
    def names(self) -> list[str]:
        return [name for part in self.parts for name in part]

    @property
    def label(self) -> str:
        return _label(self.path, self.names)

    def branches(self) -> list[nn.Module]:
        """The module of each part."""
        children = self.container._modules
        modules = [[children[name] for name in part] for part in self.parts]
        return [part[0] if len(part) == 1 else nn.Sequential(*part) for part in modules]

    def put(self, module: nn.Module) -> None:
        """Replace the first child by a module, and the others by ``Identity``."""
        self.container._modules.update({name: nn.Identity() for name in self.names} | {self.names[0]: module})


@dataclass(frozen=True)
class _ShortcutMaker:
    """Builds the shortcut module of a stretch."""

    kind: Any
    known: connections.Kind | None
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return self.known.name if self.known else getattr(self.kind, "__name__", "a module")

    @property
    def spans_depth(self) -> bool:
        return self.known is not None and self.known.spans_depth

    def fits(self, before: torch.Size, after: torch.Size) -> bool:
        changes = sum(a != b for a, b in zip(before, after)) if len(before) == len(after) else 2
        return changes == 0 or (changes == 1 and self.name == "projection")

    def module(self, stretch: _Stretch, depth: int) -> nn.Module:
        branches = stretch.branches()
        if self.known is None:
            made = self.kind(branches[0], **self.arguments)
        else:
            own, dim = dict(self.arguments), 1 if any(map(_holds_convolution, branches)) else -1
            if self.known.name == "projection":
                own.setdefault("width_out", stretch.after[dim])
            branch = branches if self.spans_depth else branches[0]
            made = self.known(branch, stretch.before[dim], dim=dim, depth=depth, **own)
        weight = next(p for branch in branches for p in branch.parameters())
        return made.to(weight.device, weight.dtype)


@dataclass
class _Plan:
    """Decides for every stretch before any is wrapped, since some kinds need the number of branches.

    Attributes:
        lines: label of a stretch -> its line in the report.
        wrapped: paths of the children of all stretches.
    """

    shapes: dict[str, Any]
    maker: _ShortcutMaker
    span: int
    lines: dict[str, str] = field(default_factory=dict)
    wrapped: list[str] = field(default_factory=list)
    stretches: list[_Stretch] = field(default_factory=list)

    def add(self, container: Any, path: str) -> None:
        """Add the stretches of one container. After a failed stretch the next begins one child later."""
        children, start = list(container._modules), 0
        first = next((m for m in container if any(True for _ in m.parameters())), None)
        norm_first, found = first is not None and _is_norm(first), list[_Stretch]()
        while start < len(children):
            names = children[start : start + 1]
            if norm_first or self.span == 1 or _is_layer(container._modules[names[0]]):
                names = self._window(container, path, children[start:], norm_first)
            paths, label = [_joined(path, name) for name in names], _label(path, names)
            reason = self._reason([container._modules[name] for name in names], paths)
            self.lines[label] = f"wrapped, {self.maker.name}" if reason is None else f"not wrapped: {reason}"
            if reason is not None:
                start += 1
                continue
            before, after = self.shapes[paths[0]][0], self.shapes[paths[-1]][1]
            last = found[-1] if found else None
            follows = last is not None and last.names[-1] == children[start - 1] and last.after == before
            if self.maker.spans_depth and last is not None and follows:
                found[-1] = replace(last, parts=(*last.parts, tuple(names)), after=after)
            else:
                found.append(_Stretch(container, path, (tuple(names),), before, after))
            self.wrapped += paths
            start += len(names)
        self.stretches += found

    def _window(self, container: Any, path: str, names: list[str], norm_first: bool) -> list[str]:
        """The first ``span`` names; in a ``Sequential`` also those of a following norm and its activation."""
        stop = self.span
        after = [container._modules[name] for name in names[stop : stop + 2]]
        if not isinstance(container, nn.Sequential) or norm_first or not after or not _is_norm(after[0]):
            return names[:stop]
        shapes = self.shapes.get(_joined(path, names[stop + 1])) if len(after) > 1 else None
        keeps_shape = isinstance(shapes, tuple) and shapes[0] == shapes[1]
        return names[: stop + 1 + (keeps_shape and not any(True for _ in after[1].parameters()))]

    def _reason(self, modules: list[nn.Module], paths: list[str]) -> str | None:
        """Why these children cannot be wrapped. None if they can."""
        seen = [self.shapes.get(path, "it did not run") for path in paths]
        unknown = next((shape for shape in seen if isinstance(shape, str)), None)
        if unknown:
            return unknown
        if not any(True for module in modules for _ in module.parameters()):
            return "it holds no weights"
        if not any(map(_is_layer, modules)):
            return "it holds only a norm"
        if len(modules) < self.span:
            return f"fewer than the span of {self.span} are left"
        before, after = seen[0][0], seen[-1][1]
        if any(one[1] != two[0] for one, two in pairwise(seen)):
            return "its layers do not follow one another"
        if not self.maker.fits(before, after):
            return f"{_shape(before)} comes in, {_shape(after)} goes out"
        return None


def _label(path: str, names: Sequence[str]) -> str:
    return " to ".join(dict.fromkeys([_joined(path, names[0]), _joined(path, names[-1])]))


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _runnable(twin: nn.Module, plan: _Plan, runs: _OriginalRuns) -> list[_Stretch]:
    """The stretches whose owner only calls its layers, tested by wrapping them without a shortcut."""
    if not plan.stretches or _difference(twin, plan.stretches, runs) is None:
        return plan.stretches
    kept = []
    for path in dict.fromkeys(stretch.path for stretch in plan.stretches):
        stretches = [stretch for stretch in plan.stretches if stretch.path == path]
        difference = _difference(twin, stretches, runs)
        if difference is None:
            kept += stretches
            continue
        reason = f"not wrapped: its owner does more than call it ({difference})"
        plan.lines |= {_label(path, part): reason for stretch in stretches for part in stretch.parts}
    return kept


def _difference(twin: nn.Module, stretches: list[_Stretch], runs: _OriginalRuns) -> str | None:
    """How the twin's outputs differ from the original's when its layers are wrapped without a shortcut."""
    before = [(stretch, dict(stretch.container._modules)) for stretch in stretches]
    try:
        for stretch in stretches:
            bare = [_Bare(branch) for branch in stretch.branches()]
            stretch.put(bare[0] if len(bare) == 1 else nn.Sequential(*bare))
        return runs.difference(twin)
    finally:
        for stretch, children in reversed(before):
            stretch.container._modules.update(children)


def _run_once(twin: nn.Module, stretches: list[_Stretch], maker: _ShortcutMaker, runs: _OriginalRuns) -> None:
    """Run the twin, and refuse a kind whose width does not fit.

    Raises:
        SkipscopeError: a shortcut module returns another shape than the layers it replaces, or the twin does
            not run.
    """
    entered: list[_Stretch] = []

    def enter(stretch: _Stretch, *_: Any) -> None:
        entered.append(stretch)

    def leave(stretch: _Stretch, _: nn.Module, args: Any, output: Any) -> None:
        entered.pop()
        if isinstance(output, Tensor) and output.shape != stretch.after:
            raise _does_not_fit(maker, stretch, _shape(output.shape))

    with contextlib.ExitStack() as hooks:
        for stretch in stretches:
            module = stretch.container._modules[stretch.names[0]]
            hooks.callback(module.register_forward_pre_hook(partial(enter, stretch)).remove)
            hooks.callback(module.register_forward_hook(partial(leave, stretch)).remove)
        try:
            for training in runs.outputs:
                runs.run(twin, training)
        except Exception as error:
            problem = getattr(error, "problem", f"{type(error).__name__}: {error}")
            if problem.startswith(_MISFIT):
                raise
            raise _does_not_fit(maker, entered[-1] if entered else None, problem) from error


_MISFIT = "a shortcut of kind"


def _does_not_fit(maker: _ShortcutMaker, stretch: _Stretch | None, got: str) -> SkipscopeError:
    return SkipscopeError(
        "add_shortcuts",
        f"{_MISFIT} {maker.name!r} does not fit here: the twin would not run",
        layer=stretch.label if stretch else None,
        expected=(
            f"{_shape(stretch.before)} in, {_shape(stretch.after)} out" if stretch else "a twin that runs"
        ),
        got=got[:200],
        cure=(
            "choose a kind that keeps the width, such as 'identity' or 'rezero', leave this layer out by"
            " where=, or build the network for it with skipscope.nn"
        ),
    )


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has weights, and all of them are vectors or scalars, as in batch norm."""
    parameters = list(module.parameters())
    return bool(parameters) and all(p.ndim < 2 for p in parameters)


def _is_layer(module: nn.Module) -> bool:
    """Whether a module has a weight of two or more dimensions."""
    return any(p.ndim > 1 for p in module.parameters())


def _holds_convolution(branch: nn.Module) -> bool:
    kinds = nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm
    return any(isinstance(module, kinds) for module in branch.modules())


def _shape(shape: torch.Size) -> str:
    return " x ".join(map(str, shape))
