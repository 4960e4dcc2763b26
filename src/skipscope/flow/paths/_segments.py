"""A forward pass cut at every merge, and the backward pass over its segments by path length.

A *cut* is the detached output of a merge, a leaf for everything downstream. Between cuts are *segments*,
ordinary autograd graphs. The backward pass goes from the last cut to the first. When it reaches a cut, the
gradient there is complete, with a row for each path length from the loss, because all its consumers come
later. It passes through the merge to the operands, where the lengths of a branch operand grow by one; then
all operands are propagated together through their segments to earlier cuts. There are few lengths near the
loss, and gradients of weights are not computed unless requested, so all lengths together cost less than as
many plain backward passes. Each step is a vector-Jacobian product of ``torch.autograd.grad``.
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

# Most elements of an activation for which carrying all lengths at once was faster than one after the other
# (benchmarks/paths.py).
SMALL_ON_CPU, SMALL_ELSEWHERE = 2**14, 2**20


@dataclass
class LengthGradients:
    """Gradients by path length: row i belongs to length ``low + i``.

    Attributes:
        low: the smallest length.
        rows: gradients ``[lengths, *shape]``.
        is_own: whether there are no other references to the rows, so that they may be changed in place.
    """

    low: int
    rows: Tensor
    is_own: bool = False

    @property
    def high(self) -> int:
        """The greatest length."""
        return self.low + self.rows.shape[0] - 1

    def between(self, low: int, high: int) -> Tensor:
        """The rows from ``low`` to ``high``, with zeros for lengths without a row."""
        return self.rows if (self.low, self.high) == (low, high) else self.widened(low, high).rows

    def widened(self, low: int, high: int) -> LengthGradients:
        """Copy the gradients to a range of lengths that includes ``low`` to ``high``."""
        low, high = min(low, self.low), max(high, self.high)
        if self.is_own and (low, high) == (self.low, self.high):
            return self
        rows = self.rows.new_empty(high - low + 1, *self.rows.shape[1:])
        rows[: self.low - low], rows[self.high - low + 1 :] = 0, 0
        rows[self.low - low : self.high - low + 1] = self.rows
        return LengthGradients(low, rows, is_own=True)

    def plus(self, other: LengthGradients) -> LengthGradients:
        """Add other gradients, for all lengths of either; in place if possible."""
        total = self.widened(other.low, other.high)
        total.rows[other.low - total.low : other.high - total.low + 1] += other.rows
        return total


@dataclass(frozen=True, eq=False)
class SegmentEnd:
    """End of a segment: a tensor as the merge received it, independent of later in-place writes.

    Attributes:
        root: gradient edge of the tensor, or the tensor itself if it is a leaf.
        key: identifier that is equal for the same value.
        elements: number of elements.
        bytes: size in bytes.
        owner: object that keeps the graph of the root alive, or None if the root does.
    """

    root: Tensor | GradientEdge
    key: tuple[Any, int]
    elements: int
    bytes: int
    owner: Any = None


def segment_end(tensor: Tensor) -> SegmentEnd | None:
    """The segment end of a tensor, or None if it requires no gradient."""
    if not tensor.requires_grad:
        return None
    size = tensor.numel(), tensor.numel() * tensor.element_size()
    if tensor.is_leaf:
        return SegmentEnd(tensor, (id(tensor), 0), *size)
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    owner = None
    # A Python reference to the node of a custom function does not keep the graph alive. Newer versions of
    # torch handle this in the edge itself.
    if isinstance(edge.node, torch.autograd.function.BackwardCFunction):
        with torch.enable_grad():
            owner = tensor.view_as(tensor).grad_fn
    return SegmentEnd(edge, (edge.node, edge.output_nr), *size, owner)


@dataclass
class Cut:
    """Detached output of a merge.

    Attributes:
        leaf: leaf that the rest of the network gets.
        operands: operands of the merge, attached to their segments.
        sides: side of each operand.
        inner: detached copies of the operands, and the merge's output computed from them; None if each
            operand's gradient is that of the output, as in a plain sum.
    """

    leaf: Tensor
    operands: tuple[SegmentEnd | None, ...]
    sides: tuple[OperandSide, ...]
    inner: tuple[tuple[Tensor, ...], Tensor] | None


@dataclass
class CutForward:
    """Forward pass cut at every merge, and at the target if that is an activation.

    Attributes:
        loss: the scalar loss.
        cuts: cuts in order of execution.
        targets: leaves or parameters at which the paths end.
        copies: autograd node of the copy that the network gets -> the original leaf.
    """

    loss: Tensor
    cuts: list[Cut]
    targets: list[Tensor]
    copies: dict[Any, Tensor] = field(default_factory=dict)


def cut_forward(
    model: nn.Module, batch: Batch, loss: Objective, found: Shortcuts, target: Boundary | nn.Parameter
) -> CutForward:
    """Run a forward pass and cut it at the merges.

    Args:
        model: the model, run in its current modes.
        batch: a batch.
        loss: the objective.
        found: shortcuts whose merges are cut.
        target: boundary or parameter at which the paths end.
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
            # A checkpoint around the merge counts saved tensors, and must not see those of this computation.
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
    """Backward pass from the loss to the targets, by path length.

    Args:
        forward: the cut forward pass, which is consumed.
        batched: True to carry all lengths through a segment at once (vmap), False for one after the other,
            None for at once if rows are so small that calls cost more than arithmetic.
        max_bytes: bound on the gradients that pass a segment at a time.

    Attributes:
        unit: power of two by which the gradients must be multiplied, because the pass rescales them.
        methods: methods used: ``"batched"``, ``"loop"``.
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
        # Operands of each cut that no earlier cut uses.
        self.first_used: list[list[Any]] = []
        seen = set[Any]()
        for cut in forward.cuts:
            keys = {operand.key for operand in cut.operands if operand is not None} - seen
            self.first_used.append(list(keys))
            seen |= keys

    def run(self) -> list[LengthGradients | None]:
        """Run the pass. Returns the gradients at the targets, with None for a target that no path reaches."""
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
        """Gradient at the loss, before any branch is crossed."""
        return LengthGradients(0, seed[None])

    def shift_length(self, gradients: LengthGradients) -> LengthGradients:
        """Increase every length by one, for a branch operand."""
        return LengthGradients(gradients.low + 1, gradients.rows)

    def rescale(self) -> None:
        """Scale the gradients near the loss to a maximum of about 1, to avoid underflow for small losses."""
        greatest = max(
            (float(g.rows.abs().max()) for g in self.at_leaves.values() if g.rows.numel()), default=0.0
        )
        if greatest > 0 and math.isfinite(greatest):
            self.unit = 2.0 ** math.frexp(greatest)[1]
            for gradients in self.at_leaves.values():
                gradients.rows = gradients.rows / self.unit

    def through_merge(self, cut: Cut, gradients: LengthGradients) -> None:
        """Propagate gradients from a merge's output to its operands; a branch adds one to the length."""
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
        """Add gradients at a leaf, with room for lengths up to ``high``."""
        high = max(high, new.high)
        old = self.at_leaves.get(id(leaf))
        if old is None:
            self.at_leaves[id(leaf)] = new if new.high == high else new.widened(new.low, high)
        else:
            self.at_leaves[id(leaf)] = old.widened(new.low, high).plus(new)

    def propagate_pending(self) -> None:
        """Propagate pending gradients at operands that no earlier merge uses, and free their graph."""
        ends = [self.pending.pop(key) for key in self.first_used.pop() if key in self.pending]
        if ends:
            self.through_segment([end for end, _ in ends], [gradients for _, gradients in ends])

    def through_segment(self, ends: list[SegmentEnd], gradients: list[LengthGradients]) -> None:
        """Propagate gradients from ``ends`` to the cuts and targets upstream."""
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
        """Vector-Jacobian products ``[n, *source.shape]`` for each source, or None if it is not reached."""
        columns = zip(*(products for _, products in self.vjp_chunks([end], [rows], sources)))
        return [None if c[0] is None else c[0] if len(c) == 1 else torch.cat(c) for c in columns]

    def vjp_chunks(
        self, ends: Sequence[SegmentEnd], rows: Sequence[Tensor], sources: Sequence[Tensor]
    ) -> Iterator[tuple[int, list[Tensor | None]]]:
        """Products for chunks of rows that fit into memory, each with the index of its first row."""
        one = sum(end.bytes for end in ends) + sum(t.numel() * t.element_size() for t in sources)
        most = max(1, self.max_bytes // max(1, one))
        for i in range(0, rows[0].shape[0], most):
            yield i, self.vjp_chunk(ends, [r[i : i + most] for r in rows], sources)

    def vjp_chunk(
        self, ends: Sequence[SegmentEnd], rows: Sequence[Tensor], sources: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Products for a chunk of rows."""
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
