"""A forward pass cut at every merge, and the backward pass over its segments by path length.

A *cut* is the output of a merge, detached: a leaf for all that follows. Between cuts are *segments*, ordinary
autograd graphs. The backward pass goes from the last cut to the first. At a cut its gradient is complete, one
row for each path length from the loss to there, since all that use it come later. It passes through the merge
to the operands, where the lengths of a branch operand grow by one; then all operands go back together through
their segments to earlier cuts. Few lengths exist near the loss, and no gradient of a weight is computed
unless asked for: this is why all lengths together cost less than as many plain backward passes. Each step is
a vector-Jacobian product of ``torch.autograd.grad``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, saved_tensors_hooks

from skipscope import _torch_private
from skipscope._data import Batch, Objective
from skipscope.flow._autograd_graph import leaves_above
from skipscope.shortcuts import Boundary, Merge, OperandSide, Shortcuts, tap_boundaries, tap_merges

# Elements of an activation up to which carrying all lengths at once was faster than one after the other
# (measured: benchmarks/paths.py).
SMALL_ON_CPU, SMALL_ELSEWHERE = 2**14, 2**20


@dataclass
class LengthGradients:
    """Gradients by path length: row i belongs to length ``low + i``.

    Attributes:
        low: the smallest length.
        rows: ``[lengths, *shape]``.
        is_own: nothing else holds the rows, so they may be added to in place.
    """

    low: int
    rows: Tensor
    is_own: bool = False

    @property
    def high(self) -> int:
        """The greatest length."""
        return self.low + self.rows.shape[0] - 1

    def between(self, low: int, high: int) -> Tensor:
        """The rows from ``low`` to ``high``, zeros where there are none."""
        return self.rows if (self.low, self.high) == (low, high) else self.widened(low, high).rows

    def widened(self, low: int, high: int) -> LengthGradients:
        """The same with lengths from ``low`` to ``high`` at least, in rows of its own."""
        low, high = min(low, self.low), max(high, self.high)
        if self.is_own and (low, high) == (self.low, self.high):
            return self
        rows = self.rows.new_empty(high - low + 1, *self.rows.shape[1:])
        rows[: self.low - low], rows[self.high - low + 1 :] = 0, 0
        rows[self.low - low : self.high - low + 1] = self.rows
        return LengthGradients(low, rows, is_own=True)

    def plus(self, other: LengthGradients) -> LengthGradients:
        """The sum over all lengths that either has; in place where possible."""
        total = self.widened(other.low, other.high)
        total.rows[other.low - total.low : other.high - total.low + 1] += other.rows
        return total


@dataclass(frozen=True, eq=False)
class SegmentEnd:
    """Where a segment ends: a tensor as it was when the merge took it, whatever is written into it later.

    Attributes:
        root: its gradient edge; a leaf itself.
        key: the same for the same value.
        elements: how many numbers it holds.
        bytes: its size.
        owner: keeps the root's part of the graph alive; None where the root does.
    """

    root: Tensor | GradientEdge
    key: tuple[Any, int]
    elements: int
    bytes: int
    owner: Any = None


def segment_end(tensor: Tensor) -> SegmentEnd | None:
    """The end that a tensor is; None where it requires no gradient."""
    if not tensor.requires_grad:
        return None
    size = tensor.numel(), tensor.numel() * tensor.element_size()
    if tensor.is_leaf:
        return SegmentEnd(tensor, (id(tensor), 0), *size)
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    owner = None
    # Holding a custom function's node in Python keeps nothing alive; newer torch does the same in the edge
    # itself.
    if isinstance(edge.node, torch.autograd.function.BackwardCFunction):
        with torch.enable_grad():
            owner = tensor.view_as(tensor).grad_fn
    return SegmentEnd(edge, (edge.node, edge.output_nr), *size, owner)


@dataclass
class Cut:
    """The output of one merge, cut off from what made it.

    Attributes:
        leaf: what the rest of the network gets.
        operands: what the merge joined, still attached to their segments.
        sides: of each operand.
        inner: the operands once more, detached, and the merge's output computed from them; None where each
            operand's gradient is the output's, as in a plain sum.
    """

    leaf: Tensor
    operands: tuple[SegmentEnd | None, ...]
    sides: tuple[OperandSide, ...]
    inner: tuple[tuple[Tensor, ...], Tensor] | None


@dataclass
class CutForward:
    """A forward pass cut at every merge, and at the target if that is an activation.

    Attributes:
        loss: the scalar.
        cuts: in order of execution.
        targets: where the paths end: a leaf, or a parameter.
        copies: by node of the copy that the network gets, the leaf it is a copy of.
    """

    loss: Tensor
    cuts: list[Cut]
    targets: list[Tensor]
    copies: dict[Any, Tensor] = field(default_factory=dict)


def cut_forward(
    model: nn.Module, batch: Batch, loss: Objective, found: Shortcuts, target: Boundary | nn.Parameter
) -> CutForward:
    """Run a model once, and cut it.

    Args:
        model: run in the modes its modules are in.
        batch: one batch.
        loss: the objective.
        found: the shortcuts whose merges are cut.
        target: the boundary or the parameter where paths end.
    """
    forward = CutForward(torch.empty(0), [], [target] if isinstance(target, Tensor) else [])

    def copied(leaf: Tensor) -> Tensor:
        copy = leaf.clone()  # what follows may write into it, and into a leaf it may not
        forward.copies[copy.grad_fn] = leaf
        return copy

    def cut(_: int, merge: Merge) -> Tensor:
        inner = None
        if not merge.is_plain_sum:
            operands = tuple(o.detach().requires_grad_(o.requires_grad) for o in merge.operands)
            # A checkpoint around the merge counts what is saved: this is none of its own.
            with torch.enable_grad(), saved_tensors_hooks(lambda t: t, lambda t: t):
                inner = (operands, merge.recompute(operands))
        leaf = merge.output.detach().requires_grad_()
        is_target = isinstance(target, Boundary) and (target.kind, target.name) == ("merge", merge.name)
        if is_target and not merge.later:
            forward.targets.append(leaf)
        forward.cuts.append(Cut(leaf, tuple(map(segment_end, merge.operands)), merge.sides, inner))
        return copied(leaf)

    def end(_: int, activation: Tensor) -> Tensor:
        leaf = activation.detach().requires_grad_()
        forward.targets.append(leaf)
        return copied(leaf)

    with ExitStack() as stack:
        if isinstance(target, Boundary) and target.kind != "merge":
            stack.enter_context(tap_boundaries(model, (target,), end))
        stack.enter_context(tap_merges(model, found, cut))
        forward.loss = loss(model, batch)
    return forward


class PathLengthBackward:
    """The backward pass from the loss to the targets, by path length.

    Args:
        forward: the cut forward pass; it is used up.
        batched: carry all lengths through a segment at once (vmap); False: one after the other; None: at once
            where a row is so small that the calls cost more than the arithmetic.
        max_bytes: a bound on the gradients that pass a segment at once.

    Attributes:
        unit: what one unit of the gradients is worth: the pass scales the loss by a power of two.
        methods: how segments were passed: ``"batched"``, ``"loop"``.
    """

    def __init__(self, forward: CutForward, *, batched: bool | None = None, max_bytes: int = 2**28):
        self.forward, self.max_bytes, self.may_batch = forward, max_bytes, batched is not False
        on_cpu = forward.loss.device.type == "cpu"
        self.small = math.inf if batched else SMALL_ON_CPU if on_cpu else SMALL_ELSEWHERE
        self.unit, self.methods = 1.0, set[Literal["batched", "loop"]]()
        self.leaves = {id(cut.leaf) for cut in forward.cuts} | {id(target) for target in forward.targets}
        # Gradients at leaves, by id; and at operands, which several merges may share.
        self.at_leaves: dict[int, LengthGradients] = {}
        self.pending: dict[Any, tuple[SegmentEnd, LengthGradients]] = {}
        # For each cut, the operands that no earlier cut uses.
        self.first_used: list[list[Any]] = []
        seen = set[Any]()
        for cut in forward.cuts:
            keys = {operand.key for operand in cut.operands if operand is not None} - seen
            self.first_used.append(list(keys))
            seen |= keys

    def run(self) -> list[LengthGradients | None]:
        """The gradients at the targets, None for a target that no path reaches."""
        loss, targets = self.forward.loss, {id(target) for target in self.forward.targets}
        end = segment_end(loss)
        assert end is not None, "the caller has made sure that the loss has a gradient"
        self.through_segment([end], [self.start(torch.ones_like(loss))])
        self.rescale()
        while self.forward.cuts:
            cut = self.forward.cuts.pop()
            if id(cut.leaf) not in targets:
                gradients = self.at_leaves.pop(id(cut.leaf), None)
                if gradients is not None:
                    self.through_merge(cut, gradients)
            self.propagate_pending()
        return [self.at_leaves.get(id(target)) for target in self.forward.targets]

    def start(self, seed: Tensor) -> LengthGradients:
        """The gradient at the loss, where no branch has been crossed."""
        return LengthGradients(0, seed[None])

    def shift_length(self, gradients: LengthGradients) -> LengthGradients:
        """Cross a branch operand: every length is one more."""
        return LengthGradients(gradients.low + 1, gradients.rows)

    def rescale(self) -> None:
        """Set the greatest gradient near the loss to about 1, so that small losses do not underflow."""
        greatest = max(
            (float(g.rows.abs().max()) for g in self.at_leaves.values() if g.rows.numel()), default=0.0
        )
        if greatest > 0 and math.isfinite(greatest):
            self.unit = 2.0 ** math.frexp(greatest)[1]
            for gradients in self.at_leaves.values():
                gradients.rows = gradients.rows / self.unit

    def through_merge(self, cut: Cut, gradients: LengthGradients) -> None:
        """Go from a merge's output to its operands; a branch operand adds one to the length."""
        live = [(i, end) for i, end in enumerate(cut.operands) if end is not None]
        arriving: list[Tensor | None] = [gradients.rows] * len(live)
        if cut.inner is not None:
            copies, output = cut.inner
            end = segment_end(output)
            arriving = [] if end is None else self.vjp(end, gradients.rows, [copies[i] for i, _ in live])
        for (i, operand), rows in zip(live, arriving):
            if rows is None:
                continue
            new = LengthGradients(gradients.low, rows)
            new = self.shift_length(new) if cut.sides[i] == "branch" else new
            leaf = self.forward.copies.get(operand.key[0])
            if leaf is not None:  # nothing is between
                self.accumulate(leaf, new)
            else:
                old = self.pending.get(operand.key)
                self.pending[operand.key] = (operand, new if old is None else old[1].plus(new))

    def accumulate(self, leaf: Tensor, new: LengthGradients, high: int = 0) -> None:
        """Add to the gradients at a leaf, which will have lengths up to ``high``."""
        high = max(high, new.high)
        old = self.at_leaves.get(id(leaf))
        if old is None:
            self.at_leaves[id(leaf)] = new if new.high == high else new.widened(new.low, high)
        else:
            self.at_leaves[id(leaf)] = old.widened(new.low, high).plus(new)

    def propagate_pending(self) -> None:
        """Send back what waits at operands that no earlier merge uses, which frees their graph."""
        ends = [self.pending.pop(key) for key in self.first_used.pop() if key in self.pending]
        if ends:
            self.through_segment([end for end, _ in ends], [gradients for _, gradients in ends])

    def through_segment(self, ends: list[SegmentEnd], gradients: list[LengthGradients]) -> None:
        """Go back from ``ends`` to the cuts and targets that they were computed from."""
        low, high = min(g.low for g in gradients), max(g.high for g in gradients)
        found = {end.key[0]: end.root for end in ends if isinstance(end.root, Tensor)}
        nodes = [end.root.node for end in ends if not isinstance(end.root, Tensor)]
        found |= {id(leaf): leaf for leaf in leaves_above(nodes)}
        sources = [leaf for key, leaf in found.items() if key in self.leaves]
        if not sources:
            return
        for i, products in self.vjp_chunks(ends, [g.between(low, high) for g in gradients], sources):
            for source, rows in zip(sources, products):
                if rows is not None:
                    self.accumulate(source, LengthGradients(low + i, rows, is_own=True), high)

    def vjp(self, end: SegmentEnd, rows: Tensor, sources: Sequence[Tensor]) -> list[Tensor | None]:
        """Vector-Jacobian products, ``[n, *source.shape]`` for each source, None where unreached."""
        columns = zip(*(products for _, products in self.vjp_chunks([end], [rows], sources)))
        return [None if c[0] is None else c[0] if len(c) == 1 else torch.cat(c) for c in columns]

    def vjp_chunks(
        self, ends: Sequence[SegmentEnd], rows: Sequence[Tensor], sources: Sequence[Tensor]
    ) -> Iterator[tuple[int, list[Tensor | None]]]:
        """The products of as many rows at a time as fit, with the index of the first of them."""
        one = sum(end.bytes for end in ends) + sum(t.numel() * t.element_size() for t in sources)
        most = max(1, self.max_bytes // max(1, one))
        for i in range(0, rows[0].shape[0], most):
            yield i, self.vjp_chunk(ends, [r[i : i + most] for r in rows], sources)

    def vjp_chunk(
        self, ends: Sequence[SegmentEnd], rows: Sequence[Tensor], sources: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The products of rows that fit at once."""
        n = rows[0].shape[0]
        if n > 1 and self.may_batch and ends[0].elements <= self.small:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # an operation that vmap itself loops over
                    products = _grad(ends, rows, sources, batched=True)
                self.methods.add("batched")
                return products
            except (RuntimeError, NotImplementedError):
                self.may_batch = False
        if n > 1:
            self.methods.add("loop")
        each = [_grad(ends, [r[i] for r in rows], sources) for i in range(n)]
        return [None if column[0] is None else torch.stack(column) for column in zip(*each)]


def _grad(
    ends: Sequence[SegmentEnd], rows: Sequence[Tensor], sources: Sequence[Tensor], *, batched: bool = False
) -> list[Tensor | None]:
    roots = [end.root for end in ends]  # tensors and edges side by side, which torch takes
    return _torch_private.gradients(roots, sources, rows, batched=batched)
