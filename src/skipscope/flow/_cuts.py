"""A forward pass cut at every merge, and the walk back over the pieces that sorts the gradient by path length.

Vocabulary. A *cut* is the output of a merge, detached: an independent leaf for all that follows. Between cuts lie
*segments*, ordinary autograd graphs. A cut's *stack* is its gradient taken apart: ``[hi - lo + 1, *shape]``, row k - lo
being the sum over all paths from the loss to the cut that cross k branch operands. The walk goes from the last cut to
the first: when it reaches one its stack is complete, since all that use it come later. The stack goes through the
merge to its operands; the rows of a branch operand move up by one; then all operands go back together through their
segments to the cuts before. Few lengths exist near the loss, and no gradient of a weight is computed unless asked for:
this is why all lengths together cost less than as many plain backward passes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from skipscope._data import Batch, Objective
from skipscope.shortcuts import tap_boundaries, tap_merges

# Elements of an activation up to which carrying all lengths at once was faster than one after the other (measured:
# benchmarks/paths.py).
SMALL_ON_CPU, SMALL_ELSEWHERE = 2**14, 2**20


@dataclass
class Stack:
    """Gradients by length: row i belongs to length ``low + i``.

    Attributes:
        own: no one else holds the rows, so that they may be added to in place.
    """

    low: int
    rows: Tensor
    own: bool = False

    @property
    def high(self) -> int:
        """The greatest length in it."""
        return self.low + self.rows.shape[0] - 1

    def spread(self, low: int, high: int) -> Tensor:
        """The rows from ``low`` to ``high``, zeros where there are none."""
        return self.rows if (self.low, self.high) == (low, high) else self.room(low, high).rows

    def room(self, low: int, high: int) -> Stack:
        """The same with room for lengths from ``low`` to ``high`` at least, in rows of its own."""
        low, high = min(low, self.low), max(high, self.high)
        if self.own and (low, high) == (self.low, self.high):
            return self
        rows = self.rows.new_empty(high - low + 1, *self.rows.shape[1:])
        rows[: self.low - low], rows[self.high - low + 1 :] = 0, 0
        rows[self.low - low : self.high - low + 1] = self.rows
        return Stack(low, rows, own=True)

    def plus(self, other: Stack) -> Stack:
        """The sum, over all lengths that either has; in place where that may be."""
        total = self.room(other.low, other.high)
        total.rows[other.low - total.low : other.high - total.low + 1] += other.rows
        return total


@dataclass(frozen=True, eq=False)
class End:
    """Where a segment ends: a tensor as it was when the merge met it, whatever is written into it later.

    Attributes:
        root: its edge in autograd's graph; a leaf itself.
        key: the same for the same value.
        elements, bytes: its size.
        owner: keeps the root's piece of the graph alive; None where the root does.
    """

    root: Any
    key: tuple[Any, int]
    elements: int
    bytes: int
    owner: Any = None


def end_of(tensor: Tensor) -> End | None:
    """The end that a tensor is; None where no gradient goes."""
    if not tensor.requires_grad:
        return None
    size = tensor.numel(), tensor.numel() * tensor.element_size()
    if tensor.grad_fn is None:
        return End(tensor, (id(tensor), 0), *size)
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    owner = None
    if isinstance(
        edge.node, torch._C._FunctionBase
    ):  # to hold a custom function's node in Python keeps nothing
        with torch.enable_grad():
            owner = tensor.view_as(tensor).grad_fn  # newer torch does the same in the edge itself
    return End(edge, (edge.node, edge.output_nr), *size, owner)


@dataclass
class Cut:
    """One merge's output, cut off from what made it.

    Attributes:
        leaf: what the rest of the network was given.
        operands: what the merge joined, still attached to their segments.
        sides: ``"branch"`` or ``"shortcut"`` for each operand.
        inner: the operands once more, detached, and the merge's output computed from them; None when the gradient of
            a plain sum is wanted, which is the same for every operand.
    """

    leaf: Tensor
    operands: tuple[End | None, ...]
    sides: tuple[str, ...]
    inner: tuple[tuple[Tensor, ...], Tensor] | None


@dataclass
class CutForward:
    """A forward pass cut at every merge, and at the target if the target is an activation.

    Attributes:
        loss: the scalar.
        cuts: in order of execution.
        targets: what the paths lead back to: a leaf, or a parameter.
        handed: what the network was given for each leaf is its copy: the copy's node -> the leaf.
    """

    loss: Tensor
    cuts: list[Cut]
    targets: list[Tensor]
    handed: dict[Any, Tensor]


def cut_forward(
    model: nn.Module, batch: Batch, loss: Objective, found: Any, target: Any, parameter: nn.Parameter | None
) -> CutForward:
    """Run ``model`` once, cutting it.

    Args:
        model: run in the modes its modules are in.
        batch: one batch.
        loss: the objective.
        found: the shortcuts whose merges are cut.
        target: the boundary that paths lead back to, unless ``parameter`` is given.
        parameter: a parameter they lead back to.
    """
    cuts: list[Cut] = []
    targets: list[Tensor] = [] if parameter is None else [parameter]
    handed: dict[Any, Tensor] = {}

    def hand(leaf: Tensor) -> Tensor:
        copy = leaf.clone()  # a leaf could not be changed in place by what follows
        handed[copy.grad_fn] = leaf
        return copy

    def merge(k: int, one: Any) -> Tensor:
        operands = tuple(one.operands)
        inner = None
        if not _is_plain_sum(one.output, operands):
            copies = tuple(o.detach().requires_grad_(o.requires_grad) for o in operands)
            # A checkpoint around it counts what is saved: what is saved here is none of its own.
            with torch.enable_grad(), saved_tensors_hooks(lambda t: t, lambda t: t):
                inner = (copies, one.recompute(copies))
        leaf = one.output.detach().requires_grad_()
        if parameter is None and target.kind == "merge" and target.name == one.name and not one.later:
            targets.append(leaf)
        cuts.append(Cut(leaf, tuple(end_of(o) for o in operands), tuple(one.sides), inner))
        return hand(leaf)

    def reach(_: int, activation: Tensor) -> Tensor:
        leaf = activation.detach().requires_grad_()
        targets.append(leaf)
        return hand(leaf)

    with ExitStack() as stack:
        if parameter is None and target.kind != "merge":
            stack.enter_context(tap_boundaries(model, (target,), reach))
        stack.enter_context(tap_merges(model, found, merge))
        value = loss(model, batch)
    return CutForward(value, cuts, targets, handed)


def _is_plain_sum(output: Tensor, operands: Sequence[Tensor]) -> bool:
    """For x + y of equal shapes: each operand gets the output's gradient as it is."""
    node = output.grad_fn
    return (
        node is not None and type(node).__name__ == "AddBackward0" and len(operands) == 2
        and getattr(node, "_saved_alpha", None) == 1
        and all(o.shape == output.shape and o.dtype == output.dtype for o in operands)
    )  # fmt: skip


class Walk:
    """From the loss back to the targets, by path length.

    Args:
        forward: the cut forward pass; it is used up.
        batched: carry all lengths through a segment at once (vmap); False: one after the other; None: at once where
            a row is so small that the calls cost more than the arithmetic.
        max_bytes: a bound on the cotangents that go through a segment at once.

    Attributes:
        unit: what one unit of the stacks is worth: the walk scales the loss by a power of two.
        ways: how segments were passed: ``"batched"``, ``"loop"``.
    """

    def __init__(self, forward: CutForward, *, batched: bool | None = None, max_bytes: int = 2**28):
        self.forward, self.max_bytes, self.may_batch = forward, max_bytes, batched is not False
        cpu = forward.loss.device.type == "cpu"
        self.small = math.inf if batched else SMALL_ON_CPU if cpu else SMALL_ELSEWHERE
        self.unit, self.ways = 1.0, set[str]()
        self.leaves = {id(cut.leaf) for cut in forward.cuts} | {id(target) for target in forward.targets}
        self.stacks: dict[int, Stack] = {}  # at leaves
        self.pending: dict[Any, tuple[End, Stack]] = {}  # at operands, which several merges may share
        self.first_used: list[list[Any]] = []  # for each cut, operands that none before it uses
        seen = set[Any]()
        for cut in forward.cuts:
            keys = {operand.key for operand in cut.operands if operand is not None} - seen
            self.first_used.append(list(keys))
            seen |= keys

    def run(self) -> list[Stack | None]:
        """The stacks of the targets, None for one that no path reaches."""
        loss, targets = self.forward.loss, {id(target) for target in self.forward.targets}
        end = end_of(loss)
        assert end is not None, "the caller has made sure that the loss has a gradient"
        self.segment([end], [self.start(torch.ones_like(loss))])
        self.rescale()
        while self.forward.cuts:
            cut = self.forward.cuts.pop()
            if id(cut.leaf) not in targets:
                stack = self.stacks.pop(id(cut.leaf), None)
                if stack is not None:
                    self.through(cut, stack)
            self.flush()
        return [self.stacks.get(id(target)) for target in self.forward.targets]

    def start(self, seed: Tensor) -> Stack:
        """The stack at the loss: nothing crossed yet."""
        return Stack(0, seed[None])

    def cross(self, stack: Stack) -> Stack:
        """What a branch operand does to a stack: every length is one more."""
        return Stack(stack.low + 1, stack.rows)

    def rescale(self) -> None:
        """Set the greatest gradient near the loss to about 1, so that small losses do not underflow on the way."""
        greatest = max(
            (float(s.rows.abs().max()) for s in self.stacks.values() if s.rows.numel()), default=0.0
        )
        if greatest > 0 and math.isfinite(greatest):
            self.unit = 2.0 ** math.frexp(greatest)[1]
            for stack in self.stacks.values():
                stack.rows = stack.rows / self.unit

    def through(self, cut: Cut, stack: Stack) -> None:
        """From a merge's output to its operands; a branch operand adds one to the length."""
        live = [(i, end) for i, end in enumerate(cut.operands) if end is not None]
        if cut.inner is None:
            arriving: list[Tensor | None] = [stack.rows] * len(live)
        else:
            copies, output = cut.inner
            sources = [copies[i] for i, _ in live]
            end = end_of(output)
            arriving = self.backward([end], [stack.rows], sources) if end is not None else []
        for (i, operand), rows in zip(live, arriving):
            if rows is None:
                continue
            new = Stack(stack.low, rows)
            new = self.cross(new) if cut.sides[i] == "branch" else new
            leaf = self.forward.handed.get(operand.key[0])
            if leaf is not None:  # nothing lies between
                self.arrive(leaf, new)
            else:
                old = self.pending.get(operand.key)
                self.pending[operand.key] = (operand, new if old is None else old[1].plus(new))

    def arrive(self, leaf: Tensor, new: Stack, high: int = 0) -> None:
        """Add to the stack of a leaf, which will have lengths up to ``high``."""
        high = max(high, new.high)
        old = self.stacks.get(id(leaf))
        if old is None:
            self.stacks[id(leaf)] = new if new.high == high else new.room(new.low, high)
        else:
            self.stacks[id(leaf)] = old.room(new.low, high).plus(new)

    def flush(self) -> None:
        """Send on what waits at the operands that no earlier merge uses; with them goes their piece of the graph."""
        ends = [self.pending.pop(key) for key in self.first_used.pop() if key in self.pending]
        if ends:
            self.segment([end for end, _ in ends], [stack for _, stack in ends])

    def segment(self, ends: list[End], stacks: list[Stack]) -> None:
        """Back from ``ends`` to whatever cuts and targets they were computed from."""
        low, high = min(s.low for s in stacks), max(s.high for s in stacks)
        sources = self.sources(ends)
        if not sources:
            return
        for i, gradients in self.parts(ends, [s.spread(low, high) for s in stacks], sources):
            for source, rows in zip(sources, gradients):
                if rows is not None:
                    self.arrive(source, Stack(low + i, rows, own=True), high)

    def sources(self, ends: list[End]) -> list[Tensor]:
        """The cuts and targets that the graph above ``ends`` starts from."""
        found = {end.key[0]: end.root for end in ends if end.key[0] in self.leaves}
        stack = [end.root.node for end in ends if not isinstance(end.root, Tensor)]
        seen = set(stack)
        while stack:
            node = stack.pop()
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) in self.leaves:
                found[id(leaf)] = leaf
            for parent, _ in node.next_functions:
                if parent is not None and parent not in seen:
                    seen.add(parent)
                    stack.append(parent)
        return list(found.values())

    def backward(
        self, ends: Sequence[End], rows: Sequence[Tensor], sources: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Vector-Jacobian products of every row: ``[n, *source.shape]`` for each source, None where unreached."""
        columns = zip(*(gradients for _, gradients in self.parts(ends, rows, sources)))
        return [None if c[0] is None else c[0] if len(c) == 1 else torch.cat(c) for c in columns]

    def parts(
        self, ends: Sequence[End], rows: Sequence[Tensor], sources: Sequence[Tensor]
    ) -> Iterator[tuple[int, list[Tensor | None]]]:
        """The same, so many rows at a time as fit: the first of them, and their products."""
        one = sum(end.bytes for end in ends) + sum(t.numel() * t.element_size() for t in sources)
        most = max(1, self.max_bytes // max(1, one))
        for i in range(0, rows[0].shape[0], most):
            yield i, self.some(ends, [r[i : i + most] for r in rows], sources)

    def some(
        self, ends: Sequence[End], rows: Sequence[Tensor], sources: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The products of so few rows that they fit."""
        n = rows[0].shape[0]
        if n > 1 and self.may_batch and ends[0].elements <= self.small:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # an operation that vmap itself loops over
                    gradients = _grad(ends, rows, sources, is_grads_batched=True)
                self.ways.add("batched")
                return gradients
            except (RuntimeError, NotImplementedError):
                self.may_batch = False
        if n > 1:
            self.ways.add("loop")
        each = [_grad(ends, [r[i] for r in rows], sources) for i in range(n)]
        return [None if column[0] is None else torch.stack(column) for column in zip(*each)]


def _grad(
    ends: Sequence[End], rows: Sequence[Tensor], sources: Sequence[Tensor], **how: bool
) -> list[Tensor | None]:
    roots = [end.root for end in ends]
    return list(torch.autograd.grad(roots, sources, rows, retain_graph=True, allow_unused=True, **how))
