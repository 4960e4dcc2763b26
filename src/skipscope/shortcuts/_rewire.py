"""Rewired twins: at chosen merges, ``x + F`` is replaced by another connection of ``skipscope.nn``.

The model's own code runs. Its addition is replaced by the connection's ``write(x, F)``. For a kind that
reads, the module that the fork feeds gets ``read(x)`` as its input. A kind that spans depth keeps its state
from merge to merge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from skipscope import _data
from skipscope import nn as connections
from skipscope._errors import SkipscopeError
from skipscope._option_words import ConnectionKind
from skipscope._untouched import private_copy, require_module, untouched
from skipscope.shortcuts._edit import choose_shortcuts, refuse_another_architecture
from skipscope.shortcuts._model_wrappers import unwrapped
from skipscope.shortcuts._shortcut_result import Shortcut, Shortcuts
from skipscope.shortcuts.taps import Merge, tap_merges
from skipscope.shortcuts.twin import REWIRED, ChainJoin, Group, Join, edits_of, follow, follow_callers

Maker = Callable[[int, int, int], nn.Module]

# The prefix of the new weights in the twin's state_dict.
PLACE = "shortcuts"


def rewire(
    model: nn.Module,
    found: Shortcuts | Shortcut | Iterable[Shortcut] | None = None,
    kind: ConnectionKind | type[nn.Module] | Maker = "rezero",
    *,
    inputs: Any = None,
    dim: int | None = None,
    **arguments: Any,
) -> nn.Module:
    """Return a twin of ``model`` in which merges ``x + F`` are replaced by another kind of connection.

    The twin runs the model's own code, and has the same ``state_dict`` keys and, under
    ``shortcuts.<name>.*``, the new weights. It can be trained, copied, pickled and compiled. Kinds that only
    join (scaled, ReZero, LayerScale, gates, norms after the sum) fit any sum of two. Kinds that read
    (pre-norm, Fixup, GRU gate) need a fork whose tensor goes to one module only before the merge. Kinds that
    span depth (hyper-connections, attention residuals) need the whole chain in order, in which each merge's
    output is the next one's shortcut. A misfit is refused: here if it can be seen, otherwise when the twin
    first runs. Local.

    Args:
        model: any eager module; left unchanged.
        found: the shortcuts to rewire: a ``Shortcuts`` (all of them), a single shortcut, or several.
        kind: a name of ``skipscope.nn.registry()``, one of its classes, or ``f(width, dim, depth) -> module``
            with ``read`` and ``write``.
        inputs: the model's inputs. With them shapes are measured instead of guessed from the branches'
            weights, and the twin is run once before it is returned. With ``found=None``, also the inputs
            with which to find all shortcuts.
        dim: the dimension that holds the features; by default 1 if the branch holds a convolution, else -1.
        arguments: arguments of the kind, for instance ``init=0.1`` for ``"layer-scale"``.

    Raises:
        SkipscopeError: an unknown kind or argument; a shortcut that this kind does not fit; a model with an
            attribute ``shortcuts``; also when the twin runs other code than that in which its shortcuts were
            found.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.lin = nn.Linear(3, 3)
        ...     def forward(self, x):
        ...         return x + self.lin(x)
        >>> from skipscope.shortcuts import find_shortcuts
        >>> model, x = Net(), torch.ones(1, 3)
        >>> twin = rewire(model, find_shortcuts(model, x), kind="rezero")
        >>> torch.equal(twin(x), x), list(twin.state_dict())
        (True, ['lin.weight', 'lin.bias', 'shortcuts.lin.alpha'])
    """
    require_module(model, "rewire")
    model = unwrapped(model)
    known = connections.find_kind(kind, "rewire")
    chosen, every = choose_shortcuts(model, found, inputs, "rewire")
    refuse_another_architecture(model, chosen if every is None else every, "rewire")
    for shortcut in chosen:
        _refuse_misfit(shortcut)
    if hasattr(model, PLACE):
        raise SkipscopeError(
            "rewire",
            f"the model has an attribute {PLACE!r}, where the new weights would go",
            got=type(model).__name__,
            expected="a model without one, not rewired before",
            cure="rename it, or rewire all merges in one call",
        )
    twin = private_copy(model, "rewire")
    modules = dict(twin.named_modules())
    called = known.name if known else getattr(kind, "__name__", type(kind).__name__)
    group = Group((), False, (*edits_of(model), f"{REWIRED}{called}"))
    if every is not None:
        group.known = frozenset(item.source for item in (*every.entries, *every.rejected))
    group.root = follow(twin, group)
    shapes = _shapes(model, chosen, inputs) if inputs is not None else [None] * len(chosen)
    builder = _Builder(kind, known, arguments, dim, len(chosen))
    holder = connections.Holder()
    joins = builder.joins(chosen, modules, shapes)
    for shortcut, join in zip(chosen, joins, strict=True):
        follow(modules[shortcut.key.host], group).add(join)
        if join.reads:
            follow(modules[_reader(shortcut)], group).reads.append(join)
            group.has_readers = True
        if join.index == 0:
            holder.put(shortcut.name, join.module)
    twin.add_module(PLACE, holder)
    follow_callers(twin, group)
    if inputs is not None:
        with untouched(twin, seed=0, operation="rewire"), torch.no_grad():
            _data.forward(twin, (inputs, None), "rewire")
    return twin


def rewirable(found: Shortcuts) -> Shortcuts:
    """The shortcuts of ``found`` whose merge is the sum of a shortcut and a branch."""
    return replace(found, entries=tuple(shortcut for shortcut in found if _misfit(shortcut) is None))


def _misfit(shortcut: Shortcut) -> str | None:
    """Why a merge is not the sum of a shortcut and a branch. None if it is."""
    operation = shortcut.key.site.rpartition(":")[2]
    places = [*shortcut.shortcut_at, *shortcut.branch_at]
    reason = shortcut.blocked
    if reason is None and shortcut.kind in {"gated", "concat"}:
        reason = f"its kind is {shortcut.kind}"
    elif reason is None and (
        operation != "add" or sorted(shortcut.sides) != ["branch", "shortcut"] or shortcut.summed
    ):
        reason = f"it merges by {operation} of {', '.join(shortcut.sides)}"
    elif reason is None and any(place.call != shortcut.key for place in places):
        reason = "an operation stands between a side and the sum"
    return reason


def _refuse_misfit(shortcut: Shortcut) -> None:
    """Refuse a merge that is not the sum of a shortcut and a branch."""
    reason = _misfit(shortcut)
    if reason is not None:
        raise SkipscopeError(
            "rewire",
            "this merge is not the sum of a shortcut and a branch",
            layer=shortcut.name,
            expected="x + F(x)",
            got=reason,
            cure='leave it out: found.select(kind=("identity", "scaled", "projection"), name="...")',
        )


def _shapes(model: nn.Module, chosen: Sequence[Shortcut], inputs: Any) -> list[torch.Size | None]:
    """The shape of each merge."""
    shapes: list[torch.Size | None] = [None] * len(chosen)

    def note(k: int, merge: Merge) -> Tensor:
        shapes[k] = merge.output.shape
        return merge.output

    found = Shortcuts(tuple(chosen), (), (), ())
    with untouched(model, seed=0, operation="rewire"), torch.no_grad(), tap_merges(model, found, note):
        _data.forward(model, (inputs, None), "rewire")
    return shapes


def _reader(shortcut: Shortcut) -> str:
    """Path of the module that reads the fork: the branch if it is a module, else its first module."""
    home, host = shortcut.name.partition("#")[0], shortcut.key.host
    is_around = not home or home == host or host.startswith(home + ".")
    return shortcut.branch[0] if is_around or home not in _ancestors(shortcut.branch[:1]) else home


def _ancestors(paths: Sequence[str]) -> set[str]:
    parts = [path.split(".") for path in paths]
    return {".".join(part[:i]) for part in parts for i in range(1, len(part) + 1)}


class _Builder:
    """Builds the connection of each merge."""

    def __init__(
        self,
        kind: Any,
        known: connections.Kind | None,
        arguments: dict[str, Any],
        dim: int | None,
        depth: int,
    ):
        self.kind, self.known, self.arguments, self.dim, self.depth = kind, known, arguments, dim, depth

    def joins(
        self, chosen: Sequence[Shortcut], modules: dict[str, nn.Module], shapes: Sequence[torch.Size | None]
    ) -> list[Join]:
        """One rule for each merge; the rules of a kind that spans depth share one module."""
        branches = [[modules[path] for path in s.branch if path in modules] for s in chosen]
        if self.known is not None and self.known.spans_depth:
            if self.known.module is connections.Reversible and len(chosen) % 2:
                raise SkipscopeError(
                    "rewire",
                    "reversible layers come in pairs of branches",
                    expected="an even number of merges",
                    got=len(chosen),
                    cure="leave one out: found[:-1]",
                )
            width, dim = self._features(chosen[0], branches[0], shapes[0])
            stand_ins = [connections.Elsewhere() for _ in chosen]
            module = self._placed(
                self.known(stand_ins, width, dim=dim, depth=self.depth, **self.arguments), branches[0]
            )
            reads = isinstance(module, connections.HyperConnected)
            return [ChainJoin.at(s, module, index=i, reads=reads and i == 0) for i, s in enumerate(chosen)]
        made = []
        for shortcut, branch, shape in zip(chosen, branches, shapes, strict=True):
            width, dim = self._features(shortcut, branch, shape)
            module = self._placed(self._connection(width, dim), branch)
            if isinstance(module, connections.Connection):
                module.initialise_(nn.ModuleList(branch))
            reads = getattr(type(module), "read", None) not in {None, connections.Connection.read}
            if reads and shortcut.kind == "projection":
                raise SkipscopeError(
                    "rewire",
                    "this kind reads what the branch and the sum read, and a projection stands between",
                    layer=shortcut.name,
                    expected="a shortcut that carries the fork's own tensor",
                    got=shortcut.kind,
                    cure='leave it out: found.select(kind=("identity", "scaled"))',
                )
            made.append(Join.at(shortcut, module, reads=reads))
        return made

    def _connection(self, width: int, dim: int) -> nn.Module:
        if self.known is None:
            made = self.kind(width, dim, self.depth, **self.arguments)
            if not callable(getattr(made, "write", None)):
                raise SkipscopeError(
                    "rewire",
                    "the kind makes something without write(x, f)",
                    expected="a skipscope.nn.Connection",
                    got=type(made).__name__,
                    cure="subclass skipscope.nn.Connection, and give it a write",
                )
            return made
        if not self.known.keeps_width or self.known.own_branches:
            raise SkipscopeError(
                "rewire",
                f"the kind {self.known.name!r} cannot take the place of a sum",
                expected="one branch, and an output as wide as the input",
                got=self.known.equation,
                cure=(
                    "a kind of one branch that keeps the width: 'rezero', 'highway', ...; or build the"
                    " network with skipscope.nn"
                ),
            )
        return self.known(connections.Elsewhere(), width, dim=dim, depth=self.depth, **self.arguments)

    @staticmethod
    def _placed(module: nn.Module, branch: Sequence[nn.Module]) -> nn.Module:
        """Move a module to the branch's device and dtype."""
        weight = next((p for part in branch for p in part.parameters() if p.is_floating_point()), None)
        return module if weight is None else module.to(weight.device, weight.dtype)

    def _features(
        self, shortcut: Shortcut, branch: Sequence[nn.Module], shape: torch.Size | None
    ) -> tuple[int, int]:
        """The width of the stream, and the dimension that holds the features."""
        convolution = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
        dim = (
            self.dim if self.dim is not None else 1 if any(isinstance(m, convolution) for m in branch) else -1
        )
        if shape is not None:
            return shape[dim], dim
        width = next((w for m in reversed(branch) if (w := _width(m)) is not None), None)
        if width is None:
            raise SkipscopeError(
                "rewire",
                "the branch does not say how wide it is",
                layer=shortcut.name,
                expected="a layer of known width",
                got=", ".join(type(m).__name__ for m in branch) or "no module",
                cure="rewire(model, found, kind, inputs=x)",
            )
        return width, dim


def _width(module: nn.Module) -> int | None:
    """The number of features of a module's output, or None if unknown."""
    for name in ("out_features", "out_channels", "num_features", "embed_dim", "hidden_size", "nf"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    vectors = [p for p in module.parameters(recurse=False) if p.ndim == 1]
    return vectors[-1].numel() if vectors else None
