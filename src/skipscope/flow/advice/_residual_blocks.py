"""Residual blocks as in He et al. 2015 (arXiv 1512.03385), built from layers followed by a norm.

    y = act(F(x) + x),    F = norm(layer(act(norm(layer(x)))))

The addition is between the last norm and its activation; after the activation the stream could only grow. If
F changes the shape, x passes a 1 x 1 convolution (or a linear layer) with the stride of F, and a norm.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skipscope._data import call_model, tensors_in
from skipscope._errors import SkipscopeError

MAPS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.instancenorm._InstanceNorm,
)
# Fewest layers in the branch of a block; a shortcut around a single layer is close to a linear map.
LAYERS = 2
# A custom module with more layers than this is a stage, not a layer.
MOST_LAYERS = 3
# Most places that are named one by one.
MOST_NAMED = 8


class ResidualBlock(nn.Module):
    """``act(F(x) + W x)``, where W is the identity if shapes agree.

    Attributes:
        bypass: whether ``W x`` is added; False while checking that the regrouped network is unchanged.
    """

    def __init__(self, branch: nn.Module, projection: nn.Module, activation: nn.Module):
        super().__init__()
        self.branch, self.projection, self.activation, self.bypass = branch, projection, activation, False

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, in the shape of the branch's output."""
        y = self.branch(x)
        return self.activation(y + self.projection(x) if self.bypass else y)


def residual_blocks(model: nn.Module, inputs: Any) -> nn.Module:
    """Build residual blocks into a copy of a network.

    Raises:
        SkipscopeError: no container has two consecutive layers that each have a norm.
    """
    _Builder(model, inputs).build()
    return model


def block_places(model: nn.Module, inputs: Any) -> str:
    """Describe where ``residual_blocks`` puts blocks, and which layers it does not change."""
    builder = _Builder(model, inputs)
    builder.build()
    return in_words(builder.built, builder.left)


def in_words(around: list[str], left: dict[str, str]) -> str:
    """Sentences on the layers that shortcuts bypass, and on those that are not changed, with reasons."""
    some = [f"{name} ({why})" for name, why in left.items()]
    return f"Around {_few(around)}." + (f" As they are: {_few(some)}." if some else "")


def _few(names: list[str]) -> str:
    if len(names) <= MOST_NAMED:
        return ", ".join(names)
    return f"{', '.join(names[: MOST_NAMED - 2])}, ..., {names[-1]} ({len(names)} in all)"


def is_normed(model: nn.Module) -> bool:
    """Whether most hidden layers have a norm, so that residual blocks are the usual shortcut."""
    hidden = sum(isinstance(m, MAPS) for m in model.modules()) - 1
    return 2 * sum(isinstance(m, NORMS) for m in model.modules()) > hidden > 0


@dataclass(frozen=True)
class _Unit:
    """Children of a container that form a layer: linear or convolution, norm, activation and dropout.

    Attributes:
        names: names of the children, without the dropout after them.
        whole: the children themselves.
        modules: the children without the last activation and the dropout after it, if these can be moved.
        activation: the last activation with its dropout, or None if there is none or it cannot be moved.
        maps: linear and convolution modules inside.
        before: shape of the input.
        after: shape of the output.
        dropouts: dropout children after the unit, by name; inside a block they stay on its branch.
    """

    names: tuple[str, ...]
    whole: tuple[nn.Module, ...]
    modules: tuple[nn.Module, ...]
    activation: nn.Module | None
    maps: tuple[nn.Module, ...]
    before: torch.Size
    after: torch.Size
    dropouts: tuple[tuple[str, nn.Module], ...] = ()

    @property
    def all_names(self) -> list[str]:
        return [*self.names, *(name for name, _ in self.dropouts)]

    @property
    def inside(self) -> list[nn.Module]:
        """Modules of the unit on a branch that continues after it."""
        return [*self.whole, *(module for _, module in self.dropouts)]

    @property
    def changes(self) -> bool:
        return self.before != self.after

    @property
    def is_depthwise(self) -> bool:
        """Whether the last convolution is grouped, so that the next, which mixes channels, belongs to it."""
        return getattr(self.maps[-1], "groups", 1) > 1


@dataclass
class _Builder:
    """Builder of residual blocks in a model, container by container.

    Attributes:
        built: paths of the blocks.
        left: path -> why a layer with a norm is in no block.
        first: linear and convolution modules that no other precedes.
        last: linear or convolution module that runs last and gives the output.
    """

    model: nn.Module
    inputs: Any
    shapes: dict[str, tuple[torch.Size, torch.Size] | None] = field(default_factory=dict)
    built: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    first: set[nn.Module] = field(default_factory=set)
    last: nn.Module | None = None

    def build(self) -> None:
        handles = [
            module.register_forward_hook(partial(self._note, path))
            for path, module in self.model.named_modules()
        ]
        is_trained = [(p, p.requires_grad) for p in self.model.parameters() if p.is_floating_point()]
        try:
            for parameter, _ in is_trained:
                parameter.requires_grad_(True)
            expected = self._outputs()
        finally:
            for handle in handles:
                handle.remove()
            for parameter, trained in is_trained:
                parameter.requires_grad_(trained)
        done: list[str] = []
        for path, container in list(self.model.named_modules()):
            inside = any(path.startswith(f"{outer}.") or path == outer for outer in (*done, *self.left))
            if isinstance(container, nn.Sequential | nn.ModuleList) and not inside:
                done += self._build_in(container, path, expected)
        for block in self.model.modules():
            if isinstance(block, ResidualBlock):
                block.bypass = True
        if not self.built:
            raise SkipscopeError("prescribe", self._why_none())

    def _why_none(self) -> str:
        reasons = set(self.left.values()) - {"the first layer", "the last layer"}
        if reasons:
            return "no two layers with a norm can be joined to a block: " + ", ".join(sorted(reasons))
        return "no two layers with a norm each follow one another in a Sequential or ModuleList"

    def _note(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        """Note the shapes of a call; modules with several tensors or changing shapes are excluded."""
        single = len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor)
        shapes = (args[0].shape, output.shape) if single else None
        self.shapes[path] = shapes if self.shapes.get(path, shapes) == shapes else None
        if isinstance(module, MAPS):
            self.last = module
            # All weights require gradients here, so an input without gradient has no layer before it.
            if single and not args[0].requires_grad:
                self.first.add(module)

    def _outputs(self) -> list[Tensor]:
        flags = {module: module.training for module in self.model.modules()}
        try:
            # Without batch statistics and dropout, the same input must give the same output twice.
            with torch.enable_grad():  # the model may differentiate inside
                return tensors_in(call_model(self.model.eval(), self.inputs))
        finally:
            for module, training in flags.items():
                module.training = training

    def _build_in(self, container: Any, path: str, expected: list[Tensor]) -> list[str]:
        """Put blocks into a container. Returns the paths of the children inside them."""
        before, blocks, kept = dict(container._modules), [], []
        for run in self._runs(container, path):
            for units in _grouped(run):
                names = [name for unit in units[:-1] for name in unit.all_names] + [*units[-1].names]
                label = " to ".join(dict.fromkeys([_joined(path, names[0]), _joined(path, names[-1])]))
                block = _block(units)
                if isinstance(block, str):
                    self.left[label] = block
                    continue
                container._modules.update({name: nn.Identity() for name in names} | {names[0]: block})
                changed = f" (projection, {_shape(units[0].before)} to {_shape(units[-1].after)})"
                blocks.append((block, label + changed * (units[0].before != units[-1].after)))
                kept += [_joined(path, name) for name in names]
        try:
            same = all(map(_is_close, self._outputs(), expected))
        except Exception:  # whatever the owner does with modules that it does not know
            same = False
        if not same:
            container._modules.update(before)
            self.left |= {label: "its owner does more than to call it" for _, label in blocks}
            return []
        self.built += [label for _, label in blocks]
        return kept

    def _runs(self, container: Any, path: str) -> Iterator[list[_Unit]]:
        """Runs of consecutive units, without the first layer of the network and frozen layers."""
        names, run = list(container._modules), list[_Unit]()
        while names:
            unit = self._unit(container, path, names)
            taken = 1 if unit is None else len(unit.names)
            reason = "" if unit is None else self._reason(unit)
            if unit is not None and reason:
                self.left[_joined(path, unit.names[0])] = reason
            child = container._modules[names[0]]
            if run and isinstance(child, (*_DROPOUTS, nn.Identity)):
                run[-1] = replace(run[-1], dropouts=(*run[-1].dropouts, (names[0], child)))
                names = names[1:]
                continue
            broken = unit is None
            if broken or reason or (run and unit is not None and run[-1].after != unit.before):
                yield run
                run = []
            if unit is not None and not reason:
                run.append(unit)
            names = names[taken:]
        yield run

    def _unit(self, container: Any, path: str, names: list[str]) -> _Unit | None:
        """The unit that begins with the first of these children, or None."""
        children = [container._modules[name] for name in names]
        if isinstance(container, nn.Sequential) and isinstance(children[0], MAPS):
            parts = _parts(children)
            if parts is None:
                return None
            modules, activation = parts
            taken = len(modules) + (activation is not None)
        else:
            found = _inside(children[0])
            if found is None:
                return None
            (modules, activation), taken = found, 1
        shapes = [self.shapes.get(_joined(path, name)) for name in names[:taken]]
        ends = shapes[0], shapes[-1]
        if ends[0] is None or ends[1] is None:
            return None
        maps = tuple(m for module in modules for m in module.modules() if isinstance(m, MAPS))
        whole = tuple(children[:taken])
        return _Unit(tuple(names[:taken]), whole, tuple(modules), activation, maps, ends[0][0], ends[1][1])

    def _reason(self, unit: _Unit) -> str:
        """Why a unit cannot be in a block, or ""."""
        if self.first.intersection(unit.maps):
            return "the first layer"
        if self.last in unit.maps:
            return "the last layer"
        # Reading ``weight`` would run a parametrization.
        if not any(p.requires_grad for m in unit.maps for p in m.parameters()):
            return "frozen"
        return ""


_DROPOUTS = (nn.modules.dropout._DropoutNd,)
# Modules that change the shape or normalise whole rows.
_NO_ACTIVATIONS = (nn.GLU, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.MultiheadAttention)


def _is_activation(module: nn.Module) -> bool:
    own = type(module).__module__ == nn.ReLU.__module__
    return own and not isinstance(module, _NO_ACTIVATIONS)


def _parts(children: list[nn.Module]) -> tuple[list[nn.Module], nn.Module | None] | None:
    """The layer, norm and activation at the beginning of these children, or None if no norm follows."""
    if len(children) < 2 or not isinstance(children[0], MAPS):
        return None
    if _is_activation(children[1]) and len(children) > 2 and isinstance(children[2], NORMS):
        return children[:3], None  # the norm after the activation: the addition comes last
    if not isinstance(children[1], NORMS):
        return None
    activation = children[2] if len(children) > 2 and _is_activation(children[2]) else None
    return children[:2], activation


def _inside(module: nn.Module) -> tuple[list[nn.Module], nn.Module | None] | None:
    """A child that is a unit by itself: a Sequential of layers with norms, or a custom module; or None."""
    kinds = [isinstance(m, MAPS) for m in module.modules() if isinstance(m, MAPS + NORMS)]
    if not 0 < sum(kinds) <= MOST_LAYERS or all(kinds):
        return None
    if isinstance(module, nn.ModuleList):
        return None
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        # Custom code may call the activation by name, so it cannot be moved.
        return [module], None
    children = list(module._modules.items())
    end = len(children)
    while isinstance(children[end - 1][1], _DROPOUTS):
        end -= 1
    if not _is_activation(children[end - 1][1]):
        return [module], None
    after = [child for _, child in children[end - 1 :]]
    before = nn.Sequential(OrderedDict(children[: end - 1]))
    return [before], after[0] if len(after) == 1 else nn.Sequential(*after)


def _grouped(run: list[_Unit]) -> list[list[_Unit]]:
    """Group two layers per block, or three if one is left over; a change of shape begins a new block."""
    size = lambda units: sum(len(unit.maps) for unit in units)  # noqa: E731
    segments: list[list[list[_Unit]]] = []
    for item in _with_depthwise(run):
        block = segments[-1][-1] if segments else []
        changes = item[0].before != item[-1].after
        # A single layer left before a change of shape joins the previous block.
        if segments and size(block) < LAYERS and not (changes and len(segments[-1]) > 1):
            block += item
        elif segments and not changes:
            segments[-1].append(item)
        else:
            segments.append([item])
    blocks = []
    for segment in segments:
        if len(segment) > 1 and size(segment[-1]) < LAYERS:
            segment[-2:] = [segment[-2] + segment[-1]]
        blocks += segment
    return blocks


def _with_depthwise(run: list[_Unit]) -> list[list[_Unit]]:
    """Group each depthwise unit with the unit that mixes its channels."""
    items: list[list[_Unit]] = []
    for unit in run:
        if items and items[-1][-1].is_depthwise:
            items[-1].append(unit)
        else:
            items.append([unit])
    return items


def _block(units: list[_Unit]) -> ResidualBlock | str:
    """Build the block that replaces these units, or return the reason why it cannot be built."""
    last = units[-1]
    if sum(len(unit.maps) for unit in units) < LAYERS:
        return "one layer alone"
    projection = _projection(units)
    if projection is None:
        return f"{_shape(units[0].before)} comes in, {_shape(last.after)} goes out"
    branch = nn.Sequential(*(m for unit in units[:-1] for m in unit.inside), *last.modules)
    return ResidualBlock(branch, projection, last.activation or nn.Identity())


def _projection(units: list[_Unit]) -> nn.Module | None:
    """A 1 x 1 convolution or linear layer with a norm like the last, or None if no stride gives the shape."""
    before, after = units[0].before, units[-1].after
    if before == after:
        return nn.Identity()
    # The first module decides: a gate over the channels may be linear in a block of convolutions.
    maps = [m for unit in units for m in unit.maps]
    kind = next(stock for stock in MAPS if isinstance(maps[0], stock))
    weight = next(maps[0].parameters())
    if kind is nn.Linear:
        made: nn.Module = nn.Linear(before[-1], after[-1], bias=False)
        fits = before[:-1] == after[:-1]
    else:
        at = len(before) - (weight.ndim - 2)
        strides = tuple(map(math.prod, zip(*(m.stride for m in maps if isinstance(m, kind)))))
        made = kind(before[at - 1], after[at - 1], 1, stride=strides, bias=False)  # type: ignore[arg-type]
        fits = all(math.ceil(a / s) == b for a, b, s in zip(before[at:], after[at:], strides))
    parts = [part for unit in units for part in unit.modules]
    norm = copy.deepcopy([m for part in parts for m in part.modules() if isinstance(m, NORMS)][-1])
    norm.reset_parameters()  # type: ignore[operator]
    return nn.Sequential(made.to(weight.device, weight.dtype), norm) if fits else None


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _shape(shape: torch.Size) -> str:
    return " x ".join(map(str, shape[1:]))


def _is_close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
