"""The shortcuts of a model, as plain frozen data, with keys that identify the same merge in another run."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, overload

from skipscope._errors import SkipscopeError
from skipscope._result import Result, Table, call_drawer
from skipscope._validation import did_you_mean, require_option

Kind = Literal["identity", "scaled", "projection", "gated", "concat"]
# Ordered by how much the shortcut changes its input, the identity first.
KINDS: tuple[Kind, ...] = get_args(Kind)
OperandSide = Literal["branch", "shortcut", "both"]
BoundaryKind = Literal["input", "merge", "module"]


@dataclass(frozen=True)
class CallKey:
    """Identifier of one call in a forward pass, the same in every run and process.

    In eager code host, site and ``nth`` identify a call. Compiled code has no frames: there host, ``call``
    and ``index`` do, checked by ``among``.

    Attributes:
        host: path of the module whose forward makes the call ("" is the model itself).
        site: function, line, columns and operation.
        nth: number of earlier calls of this host at this site in the same forward pass.
        index: number of earlier calls of the same operation in this run of the host's forward, including
            those of its children.
        call: number of earlier runs of this host's forward.
        total: number of calls of this host at this site in the whole pass.
        among: number of calls of the same operation in this run of the host's forward.
        runs: number of runs of this host's forward in the whole pass.
        compiled: the compiled code around the call: a ``"function"`` that the host's forward calls, or the
            ``"host"`` (the host itself or a module around it). Empty for eager code.
    """

    host: str
    site: str
    nth: int
    index: int = 0
    call: int = 0
    total: int = 1
    among: int = 0
    runs: int = 1
    compiled: Literal["", "function", "host"] = ""


@dataclass(frozen=True)
class Place:
    """One operand of one call."""

    call: CallKey
    operand: int


@dataclass(frozen=True)
class Boundary:
    """A point of the forward pass where the gradient flow is read.

    Attributes:
        name: the shortcut's or module's name, or ``"input"``.
        depth: 0, 1, 2, ... in order of execution.
        kind: ``"input"``, ``"merge"`` or ``"module"``.
        key: identifies the point, for skipscope's own use.
        summed: whether the activation is the sum over the stack that the call returns, not the stack.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = ss.reference.deep_mlp(4, width=16, shortcut="identity"), ss.reference.digits(32)
        >>> loss = torch.nn.functional.cross_entropy
        >>> found = ss.find_shortcuts(model, data[0])
        >>> [(b.depth, b.name, b.kind) for b in found.boundaries][:2]
        [(0, 'input', 'input'), (1, 'layers.0.0', 'module')]
    """

    name: str
    depth: int
    kind: BoundaryKind
    key: CallKey
    summed: bool = False


@dataclass(frozen=True)
class Layer:
    """A module with weights of its own.

    Attributes:
        name: its path.
        type: its class.
        weights: number of elements of its own parameters.
    """

    name: str
    type: str
    weights: int


@dataclass(frozen=True)
class Shortcut:
    """One merge that at least one operand reaches by skipping a branch with weights.

    Attributes:
        name: name of the branch's module, made unique; the same from run to run.
        kind: ``identity``, ``scaled``, ``projection``, ``gated`` or ``concat``.
        fork: where the two sides part: the producing module's path, or ``"input"``.
        merge: where they join: path of the module that merges, and the operation.
        branch: modules with weights on the branch.
        shortcut: modules with weights on the shortcut side.
        source: ``file.py:line`` of the merge.
        span: positions in ``Shortcuts.layers`` of the first and last layer of the branch.
        sides: for each operand of the merge ``"branch"``, ``"shortcut"``, or ``"both"``, as t (H - x) in
            x + t (H - x).
        key: the merge's call, for skipscope's own use.
        shortcut_at: operands that carry the shortcut, for editing.
        branch_at: operands that carry the branch, for editing.
        blocked: why this shortcut cannot be edited, or None.
        summed: whether the merge is a stack, complete only where the stack has been summed.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = ss.reference.deep_mlp(4, width=16, shortcut="identity"), ss.reference.digits(32)
        >>> loss = torch.nn.functional.cross_entropy
        >>> one = ss.find_shortcuts(model, data[0])[0]
        >>> one.name, one.kind, one.fork, one.span
        ('layers.1', 'identity', 'layers.0.1', (1, 1))
    """

    name: str
    kind: Kind
    fork: str
    merge: str
    branch: tuple[str, ...]
    shortcut: tuple[str, ...]
    source: str
    span: tuple[int, int]
    sides: tuple[OperandSide, ...]
    key: CallKey
    shortcut_at: tuple[Place, ...]
    branch_at: tuple[Place, ...]
    blocked: str | None = None
    summed: bool = False


@dataclass(frozen=True)
class Rejected:
    """A merge that is not a shortcut, and why.

    Attributes:
        name: path of the module that merges, and the operation.
        reason: why it is not.
        source: ``file.py:line``.
    """

    name: str
    reason: str
    source: str


@dataclass(frozen=True)
class Shortcuts(Result, Sequence):
    """The shortcuts of a model in order of execution; a sequence.

    Attributes:
        entries: the shortcuts.
        rejected: every other merge, with its reason.
        boundaries: points where the gradient flow is read: input, merges, modules outside every branch.
        layers: the modules with weights, in order of execution, for drawing.
        opaque: calls that may hold shortcuts inside (fused kernels, custom autograd functions), and where.
        model: class name of the model.
        not_run: paths of modules with weights that this pass did not call (LayerDrop, an expert that was not
            chosen).
        passed: concatenations of a decoder whose skip passes a block with weights of its own. By definition
            they are not shortcuts, but they can be edited like shortcuts.
        writes_inputs: whether the model writes into its input tensors.
        weights_used: paths of modules that did not run although their weights were used.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = ss.reference.deep_mlp(4, width=16, shortcut="identity"), ss.reference.digits(32)
        >>> loss = torch.nn.functional.cross_entropy
        >>> found = ss.find_shortcuts(model, data[0])
        >>> len(found), found[0].name, len(found.select(name="layers.2*")), len(found.rejected)
        (3, 'layers.1', 1, 0)
    """

    entries: tuple[Shortcut, ...]
    rejected: tuple[Rejected, ...]
    boundaries: tuple[Boundary, ...]
    layers: tuple[Layer, ...]
    opaque: tuple[Rejected, ...] = ()
    model: str = ""
    not_run: tuple[str, ...] = ()
    passed: tuple[Shortcut, ...] = ()
    writes_inputs: bool = False
    weights_used: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int) -> Shortcut: ...
    @overload
    def __getitem__(self, index: slice) -> Shortcuts: ...
    def __getitem__(self, index: int | slice) -> Shortcut | Shortcuts:
        return replace(self, entries=self.entries[index]) if isinstance(index, slice) else self.entries[index]

    def select(self, *, name: str = "*", kind: Kind | Sequence[Kind] | None = None) -> Shortcuts:
        """Select by a shell pattern for the name, and by kind.

        Args:
            name: a pattern such as ``"layer1.*"``.
            kind: one kind or several; None for all.

        Raises:
            SkipscopeError: an unknown kind, or a pattern that no name matches.
        """
        kinds = KINDS if kind is None else (kind,) if isinstance(kind, str) else tuple(kind)
        for one in kinds:
            require_option("select", "kind", one, KINDS)
        named = [s for s in self.entries if fnmatch.fnmatchcase(s.name, name)]
        if not named and name != "*":
            names = [s.name for s in self.entries]
            raise SkipscopeError(
                "select",
                f"no shortcut of {self.model} has a name that matches",
                got=repr(name),
                expected=f"a pattern for one of the {len(names)} names"
                if names
                else "none: there are no shortcuts",
                cure=did_you_mean(name, names) or (f"the names begin with {names[0]}" if names else None),
            )
        return replace(self, entries=tuple(s for s in named if s.kind in kinds))

    def draw(self, form: Literal["text", "svg", "html"] = "text", **options: Any) -> str:
        """Draw the network as a line of layers with its shortcuts as arcs."""
        return call_drawer("draw", self, form=form, **options)

    def table(self) -> Table:
        """A table with one row for each shortcut."""
        rows = [[s.name, s.kind, s.fork, s.merge, s.source] for s in self.entries]
        notes = (
            [f"{len(self.rejected)} other merges are no shortcuts: see .rejected"] if self.rejected else []
        )
        notes += [f"could not look into {o.name} ({o.source}): {o.reason}" for o in self.opaque]
        if self.not_run:
            names = ", ".join(self.not_run[:3]) + ", ..." * (len(self.not_run) > 3)
            notes.append(
                f"{len(self.not_run)} modules did not run in this pass, and nothing is known of them: {names}"
            )
        notes += [f"{s.name} ({s.source}) passes a block with weights: see .passed" for s in self.passed]
        notes += [f"{s.name} cannot be edited: {s.blocked}" for s in self.entries if s.blocked]
        title = f"{self.model}: {len(self)} shortcut{'' if len(self) == 1 else 's'}"
        return Table(title, ["name", "kind", "forks at", "merges at", "source"], rows, notes)
