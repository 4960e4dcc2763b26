"""Add shortcuts to the children of sequential containers and lists: the lecture's rule, where the shapes agree."""

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
from skipscope._public_call import public_call
from skipscope._untouched import private_copy, require_module, untouched

Wrap = Callable[[nn.Module], nn.Module]


@public_call("add_shortcuts")
def add_shortcuts(
    model: nn.Module,
    inputs: Any,
    kind: str | type[nn.Module] | Wrap = "identity",
    *,
    span: int = 1,
    where: str | Callable[[str], bool] | None = None,
    report: Callable[[str], Any] | None = print,
    **arguments: Any,
) -> nn.Module:
    """A twin of ``model`` with a shortcut around every ``span`` layers of its containers whose shapes agree.

    The children of each ``Sequential`` and ``ModuleList`` are gone through in order; containers inside something that
    was wrapped are left alone. A stretch of ``span`` children is wrapped when it holds the weights of a layer (a norm
    alone is none), when each child took one tensor and gave one, and when what came out has the shape of what went
    in; where a stretch cannot be wrapped, the next begins one child later. In a ``Sequential`` the norm that follows a
    layer, and the activation after that norm, stay on its branch. Layers whose owner does more with them than to call
    them are left alone. A kind that spans depth (hyper-connections, attention residuals) joins neighbouring stretches
    to one chain. The twin is run before it is handed over. Local; shard a twin after it was made.

    Args:
        model: any eager module; it is left as found.
        inputs: what it is called with, to see shapes.
        kind: a name of ``skipscope.nn.registry()``, one of its classes, or a function from branch to module.
            ``"projection"`` also goes around stretches that change the width.
        span: children skipped by one shortcut.
        where: only in containers whose path matches this shell pattern, or for which this function is true.
        report: called with one line for each stretch that was wrapped or not, and why; None for silence.
        arguments: the kind's own, for instance ``init=0.1`` of ``"layer-scale"``.

    Raises:
        SkipscopeError: an unknown kind, a span that is no positive number, a kind that does not keep the width that
            the next layer takes, or a twin that does not run.

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
    known = connections.find_kind(kind, "add_shortcuts") if isinstance(kind, str | type) else None
    maker = _Maker(kind, known, arguments)
    chosen = (
        partial(fnmatch.fnmatchcase, pat=where) if isinstance(where, str) else where or (lambda path: True)
    )
    require_module(model, "add_shortcuts")
    twin = private_copy(model, "add_shortcuts")
    runs = _Runs(model, inputs)
    plan = _Plan(runs.shapes, maker, span)
    for path, container in list(twin.named_modules()):
        inside = any(path == outer or path.startswith(outer + ".") for outer in plan.wrapped)
        if isinstance(container, nn.Sequential | nn.ModuleList) and not inside and chosen(path):
            plan.go_through(container, path)
    stretches = _runnable(twin, plan, runs)
    if known is not None and known.spans_depth and not stretches:
        raise SkipscopeError(
            "add_shortcuts", f"the kind {known.name!r} joins layers that follow one another, and there are none",
            expected="children of one Sequential that keep the shape", got="; ".join(f"{where}: {told}" for where, told in plan.lines.items())[:300] or "no container",
            cure="put the layers into one nn.Sequential, or choose a kind that goes around one layer: kind='identity'",
        )  # fmt: skip
    for stretch in stretches:
        stretch.put(maker.module(stretch, depth=sum(len(s.parts) for s in stretches)))
    _run_once(twin, stretches, maker, runs)
    if report is not None:
        for label, told in plan.lines.items():
            report(f"{label}: {told}")
    return twin


class _Runs:
    """What the original does with the inputs, in the mode it was found in and in the other one.

    Attributes:
        shapes: by module path, what went in and came out, or why that is no one shape.
        outputs: by training mode; without the mode in which the original does not run.
    """

    def __init__(self, model: nn.Module, inputs: Any):
        self.inputs = inputs
        self.shapes: dict[str, tuple[torch.Size, torch.Size] | str] = {}
        self.outputs: dict[bool | None, list[Tensor]] = {}
        handles = [m.register_forward_hook(partial(self._note, path)) for path, m in model.named_modules()]
        try:
            self.outputs[None] = self.run(model, None)
        finally:
            for handle in handles:
                handle.remove()
        # Where the original does not run in that mode (batch norm on one sample), the twin need not either.
        with contextlib.suppress(Exception):
            self.outputs[not model.training] = self.run(model, not model.training)

    def _note(self, path: str, _: nn.Module, args: Any, output: Any) -> None:
        if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            self.shapes[path] = "it does not take one tensor and give one"
        elif self.shapes.setdefault(path, (args[0].shape, output.shape)) != (args[0].shape, output.shape):
            self.shapes[path] = "its shapes change from call to call"

    def run(self, model: nn.Module, training: bool | None) -> list[Tensor]:
        """The output's tensors; None is the mode that the model is in."""
        with untouched(model, training=training, seed=0, operation="add_shortcuts"), torch.no_grad():
            return _data.tensors_in(_data.forward(model, (self.inputs, None), "add_shortcuts"))

    def differ(self, model: nn.Module) -> str | None:
        """How a model that should do what the original does differs from it; None where it does not."""
        for training, expected in self.outputs.items():
            try:
                got = self.run(model, training)
            except Exception as error:
                return (
                    str(getattr(error, "problem", error)).strip().splitlines()[0][:200]
                    if str(error)
                    else repr(error)
                )
            alike = len(got) == len(expected) and all(map(_alike, got, expected))
            if not alike:
                return "the output changes when its layers are called through another module"
        return None


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)


class _Bare(connections.Connection):
    """A branch in a module of its own, without a shortcut."""

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        return f


@dataclass(frozen=True)
class _Stretch:
    """Children of one container that one shortcut module takes the place of.

    Attributes:
        container: their owner.
        path: of the owner.
        parts: names of the children around which one shortcut goes; several parts are a chain.
        before: the shape that comes in.
        after: the shape that goes out.
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
        return _labelled([_joined(self.path, name) for name in self.names])

    def follows(self, other: _Stretch, neighbour: str) -> bool:
        """Whether this stretch begins where another ends; ``neighbour`` is the child before it."""
        return other.names[-1] == neighbour and other.after == self.before

    def joined_with(self, following: _Stretch) -> _Stretch:
        """One chain of both."""
        return replace(self, parts=self.parts + following.parts, after=following.after)

    def branches(self) -> list[nn.Module]:
        """The module of each part."""
        children = self.container._modules
        return [
            children[part[0]] if len(part) == 1 else nn.Sequential(*(children[name] for name in part))
            for part in self.parts
        ]

    def put(self, module: nn.Module) -> None:
        """Put a module in the place of the first child, and ``Identity`` in those of the others."""
        first, *others = self.names
        self.container._modules[first] = module
        for name in others:
            self.container._modules[name] = nn.Identity()


@dataclass(frozen=True)
class _Maker:
    """Makes the shortcut module of a stretch."""

    kind: Any
    known: connections.Kind | None
    arguments: dict[str, Any]

    @property
    def called(self) -> str:
        return self.known.name if self.known else getattr(self.kind, "__name__", "a module")

    @property
    def spans_depth(self) -> bool:
        return self.known is not None and self.known.spans_depth

    def fits(self, before: torch.Size, after: torch.Size) -> bool:
        projects = self.known is not None and self.known.name == "projection"
        return before == after or (projects and _width_changes_only(before, after))

    def module(self, stretch: _Stretch, depth: int) -> nn.Module:
        branches = stretch.branches()
        if self.known is None:
            made = self.kind(branches[0], **self.arguments)
        else:
            dim = 1 if any(map(_holds_convolution, branches)) else -1
            own = dict(self.arguments)
            if self.known.name == "projection":
                own.setdefault("width_out", stretch.after[dim])
            what = branches if self.spans_depth else branches[0]
            made = self.known(what, stretch.before[dim], dim=dim, depth=depth, **own)
        weight = next(p for branch in branches for p in branch.parameters())
        return made.to(weight.device, weight.dtype)


@dataclass
class _Plan:
    """Decides for every stretch, before anything is wrapped: some kinds need to know how many branches there are.

    Attributes:
        lines: by label, what is told of each stretch.
        wrapped: paths of the modules that stand inside a stretch.
    """

    shapes: dict[str, Any]
    maker: _Maker
    span: int
    lines: dict[str, str] = field(default_factory=dict)
    wrapped: list[str] = field(default_factory=list)
    stretches: list[_Stretch] = field(default_factory=list)

    def go_through(self, container: Any, path: str) -> None:
        """Go through one container; windows slide past what cannot be wrapped."""
        children = list(container._modules)
        first = next((m for m in container if any(True for _ in m.parameters())), None)
        norm_first, start = first is not None and _is_norm(first), 0
        found: list[_Stretch] = []
        while start < len(children):
            begins = norm_first or self.span == 1 or _is_layer(container._modules[children[start]])
            names = (
                self._window(container, path, children[start:], norm_first) if begins else [children[start]]
            )
            paths = [_joined(path, name) for name in names]
            reason = self._reason([container._modules[name] for name in names], paths)
            label = _labelled(paths)
            if reason is not None:
                self.lines[label] = f"not wrapped: {reason}"
                start += 1
                continue
            stretch = _Stretch(
                container, path, (tuple(names),), self.shapes[paths[0]][0], self.shapes[paths[-1]][1]
            )
            previous = found[-1] if found else None
            if self.maker.spans_depth and previous and stretch.follows(previous, children[start - 1]):
                found[-1] = previous.joined_with(stretch)
            else:
                found.append(stretch)
            self.lines[label] = f"wrapped, {self.maker.called}"
            self.wrapped += paths
            start += len(names)
        self.stretches += found

    def _window(self, container: Any, path: str, names: list[str], norm_first: bool) -> list[str]:
        """``span`` children; in a ``Sequential`` the norm after a layer belongs to it, and an activation after that."""
        stop = self.span
        if isinstance(container, nn.Sequential) and not norm_first and stop < len(names):
            modules = [container._modules[name] for name in names[stop : stop + 2]]
            if _is_norm(modules[0]):
                stop += 1
                shapes = self.shapes.get(_joined(path, names[stop])) if len(modules) > 1 else None
                keeps_shape = isinstance(shapes, tuple) and shapes[0] == shapes[1]
                if keeps_shape and not any(True for _ in modules[1].parameters()):
                    stop += 1
        return names[:stop]

    def _reason(self, modules: list[nn.Module], paths: list[str]) -> str | None:
        """Why no shortcut goes around these; None where one does."""
        seen = [self.shapes.get(path, "it did not run") for path in paths]
        unknown = next((shape for shape in seen if isinstance(shape, str)), None)
        if unknown:
            return unknown
        if not any(True for module in modules for _ in module.parameters()):
            return "it holds no weights"
        if not any(map(_is_layer, modules)):
            return "a norm alone is no layer"
        if len(modules) < self.span:
            return f"fewer than the span of {self.span} are left"
        before, after = seen[0][0], seen[-1][1]
        if any(one[1] != two[0] for one, two in pairwise(seen)):
            return "its layers do not follow one another"
        if not self.maker.fits(before, after):
            return f"{_written(before)} comes in, {_written(after)} goes out"
        return None


def _labelled(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} to {paths[-1]}"


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _runnable(twin: nn.Module, plan: _Plan, runs: _Runs) -> list[_Stretch]:
    """The stretches whose owner does no more with its layers than to call them: each is tried without a shortcut."""
    if not plan.stretches or _difference(twin, plan.stretches, runs) is None:
        return plan.stretches
    owners: dict[str, list[_Stretch]] = {}
    for stretch in plan.stretches:
        owners.setdefault(stretch.path, []).append(stretch)
    kept = []
    for path, stretches in owners.items():
        difference = _difference(twin, stretches, runs)
        if difference is None:
            kept += stretches
            continue
        for stretch in stretches:
            for part in stretch.parts:
                label = _labelled([_joined(path, name) for name in part])
                plan.lines[label] = f"not wrapped: its owner does more with it than to call it ({difference})"
    return kept


def _difference(twin: nn.Module, stretches: list[_Stretch], runs: _Runs) -> str | None:
    """How the twin differs from the original when the layers of these stretches stand in modules of their own."""
    before = [(stretch, dict(stretch.container._modules)) for stretch in stretches]
    try:
        for stretch in stretches:
            bare = [_Bare(branch) for branch in stretch.branches()]
            stretch.put(bare[0] if len(bare) == 1 else nn.Sequential(*bare))
        return runs.differ(twin)
    finally:
        for stretch, children in reversed(before):
            stretch.container._modules.update(children)


def _run_once(twin: nn.Module, stretches: list[_Stretch], maker: _Maker, runs: _Runs) -> None:
    """Run the twin, and refuse a kind whose width does not fit.

    Raises:
        SkipscopeError: a shortcut module gives another shape than the layers it stands for, or the twin does not run.
    """
    entered: list[_Stretch] = []
    handles = []
    for stretch in stretches:
        module = stretch.container._modules[stretch.names[0]]

        def enter(_: nn.Module, args: Any, stretch: _Stretch = stretch) -> None:
            entered.append(stretch)

        def leave(_: nn.Module, args: Any, output: Any, stretch: _Stretch = stretch) -> None:
            entered.pop()
            if isinstance(output, Tensor) and output.shape != stretch.after:
                raise _does_not_fit(maker, stretch, _written(output.shape))

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        for training in runs.outputs:
            runs.run(twin, training)
    except SkipscopeError as error:
        if error.problem.startswith(_MISFIT):
            raise
        raise _does_not_fit(maker, entered[-1] if entered else None, error.problem) from error
    except Exception as error:
        raise _does_not_fit(
            maker, entered[-1] if entered else None, f"{type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


_MISFIT = "a shortcut of kind"


def _does_not_fit(maker: _Maker, stretch: _Stretch | None, got: str) -> SkipscopeError:
    return SkipscopeError(
        "add_shortcuts", f"{_MISFIT} {maker.called!r} does not fit here: the twin would not run",
        layer=stretch.label if stretch else None,
        expected=f"{_written(stretch.before)} in, {_written(stretch.after)} out" if stretch else "a twin that runs",
        got=got[:200],
        cure="choose a kind that keeps the width, such as 'identity' or 'rezero', leave this layer out by where=, "
        "or build the network for it with skipscope.nn",
    )  # fmt: skip


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has weights, and each of them scales or shifts one feature: batch norm and its like."""
    parameters = list(module.parameters())
    return bool(parameters) and all(p.ndim < 2 for p in parameters)


def _is_layer(module: nn.Module) -> bool:
    """Whether a module has weights that are more than a norm's."""
    return any(p.ndim > 1 for p in module.parameters())


def _holds_convolution(branch: nn.Module) -> bool:
    return any(
        isinstance(m, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm) for m in branch.modules()
    )


def _width_changes_only(before: torch.Size, after: torch.Size) -> bool:
    return len(before) == len(after) and sum(a != b for a, b in zip(before, after, strict=True)) == 1


def _written(shape: torch.Size) -> str:
    return " x ".join(map(str, shape))
