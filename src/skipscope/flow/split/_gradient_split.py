"""``gradient_split``: the gradient at each fork through the branch and through the shortcut.

The gradient of each edge into a fork is read as it arrives, and added to that of its side; all edges sum to
the fork's gradient. A single backward pass serves all forks, and no gradients of weights are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from skipscope._data import Batch, Objective, map_tensors
from skipscope._model_calls import no_gradient
from skipscope._public_call import public_call
from skipscope._subject import Subject, prepare
from skipscope.flow._flow_measures import GradientSplit, SplitAt
from skipscope.flow._gradient_flow import mode_of
from skipscope.flow.passes._gradient_pass import shares_of
from skipscope.flow.passes._gradient_seed import backward_error
from skipscope.flow.passes._tensor_norms import norm_of
from skipscope.flow.split._gradient_arrivals import Arrival, BackwardGraph, Done, GradientArrivals, MergeEdges
from skipscope.shortcuts import Merge, Shortcut, Shortcuts, meaning, tap_boundaries, tap_merges


@public_call("gradient_split")
def gradient_split(
    model: nn.Module,
    data: Any,
    loss: Any = None,
    *,
    found: Any = None,
    seed: int = 0,
    weight: Callable[[Batch], float] | None = None,
) -> GradientSplit:
    """Split the gradient at each fork into the parts through the branch and through the shortcut.

    For y = x + f(x) with no other consumer of x they are grad(x) - grad(y) and grad(y). Local; under
    FSDP2 collective: every rank calls it.

    Args:
        model: any eager module, run in its current modes and restored afterwards.
        data: a batch ``(inputs, target)``, a Mapping, or a re-iterable of batches.
        loss: ``loss(output, target)``; not needed if the output carries ``.loss``.
        found: shortcuts to measure; by default all shortcuts found.
        seed: seed of the random numbers drawn inside (dropout).
        weight: batch -> its weight in the mean over batches.

    Raises:
        SkipscopeError: data or loss cannot be read, the loss has no gradient, or re-entrant checkpointing
            hides the graph.

    Example:
        >>> import skipscope as ss
        >>> model = ss.reference.deep_mlp(depth=4, width=16, inputs=16, classes=16, shortcut="identity")
        >>> split = ss.gradient_split(model, (torch.randn(8, 16), torch.zeros(8, 16)), nn.functional.mse_loss)
        >>> len(split), split[0].shortcut_rms > 0
        (4, True)
    """
    return split_of(prepare(model, data, loss, "gradient_split", weight=weight, found=found), seed)


def split_of(subject: Subject, seed: int = 0) -> GradientSplit:
    """Run :func:`gradient_split` on a prepared subject. Local, or collective."""
    subject = subject.with_own_inputs()
    model, batches, objective, found = subject.model, subject.data, subject.loss, subject.found
    forks = [_Fork() for _ in found]
    value = 0.0
    with subject.running(seed):
        mode = mode_of(model)
        for batch, share in shares_of(batches, objective, "gradient_split"):
            value += share * _add_batch(
                model, batch, objective, found, [partial(f.add, share=share) for f in forks]
            )
    rows = tuple(fork.row(one) for one, fork in zip(found, forks))
    lost = [row.name for row, fork in zip(rows, forks) if not fork.elements]
    notes = (f"No gradient was seen at the fork of: {', '.join(lost)}.",) if lost else ()
    return GradientSplit(rows, value, mode, meaning(model), notes)


@dataclass
class _Fork:
    """Gradient at a fork over all batches.

    Attributes:
        norms: norms of each side, of the total, and of the difference between the total and the sum of sides.
        product: inner product of branch and shortcut.
        elements: number of elements of the fork, over all batches.
    """

    norms: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys((*get_args(Arrival), "total", "off"), 0.0)
    )
    product: float = 0.0
    elements: int = 0

    def add(self, parts: dict[Arrival, Tensor], total: Tensor, share: float) -> None:
        """Add the gradient of a batch."""
        off = total.double() - sum(part.double() for part in parts.values())
        for name, value in {**parts, "total": total, "off": off}.items():
            self.norms[name] = math.hypot(self.norms[name], share * norm_of(value))
        if "branch" in parts and "shortcut" in parts:
            self.product += share**2 * float((parts["branch"].double() * parts["shortcut"].double()).sum())
        self.elements += total.numel()

    def row(self, one: Shortcut) -> SplitAt:
        """Build the row of the result."""
        norms = self.norms
        rms = {name: norm / math.sqrt(max(1, self.elements)) for name, norm in norms.items()}
        branch, shortcut = norms["branch"], norms["shortcut"]
        return SplitAt(
            one.name,
            one.kind,
            one.fork,
            rms["branch"],
            rms["shortcut"],
            self.product / (branch * shortcut) if branch * shortcut else None,
            rms["total"],
            rms["other"] or None,
            shortcut / (shortcut + branch) if shortcut + branch else None,
            norms["off"] / norms["total"] if norms["total"] else None,
        )


def _add_batch(model: nn.Module, batch: Batch, loss: Objective, found: Shortcuts, add: list[Done]) -> float:
    """Read the gradients of a batch at all forks.

    Returns:
        The loss.
    """
    # A frozen embedding table would hide the graph.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    leaves: list[Tensor] = []
    merges: dict[int, MergeEdges] = {}

    def touch(k: int, merge: Merge) -> Tensor:
        if merge.later:
            merges[k].add(merge.sides, merge.operands, only="branch")
        else:
            merges[k] = MergeEdges(merge.output.grad_fn)
            merges[k].add(merge.sides, merge.operands)
        return merge.output

    def begin(_: int, activation: Tensor) -> Tensor:
        leaves.append(activation if activation.requires_grad else activation.detach().requires_grad_())
        return leaves[-1].clone()

    # If the model starts with token ids, the first activation is a call known from the trace.
    entries = tuple(point for point in getattr(found, "boundaries", ())[:1] if point.key.site != "input")
    with tap_boundaries(model, entries, begin), tap_merges(model, found, touch):
        value = loss(model, _with_leaves(batch, leaves))
        if not value.requires_grad:
            raise no_gradient("gradient_split", model)
        graph = BackwardGraph(value, leaves, merges.values())
        arrivals = dict(zip(merges, graph.arrivals(list(merges.values()))))
        merges.clear()
        watched = [(a, add[k]) for k, a in arrivals.items() if a is not None]
        _run_backward(value, graph, watched)
    result = float(value.detach())
    del value, arrivals, watched
    graph.release()
    return result


def _run_backward(value: Tensor, graph: BackwardGraph, watched: list[tuple[GradientArrivals, Done]]) -> None:
    handles = []
    try:
        for arrivals, done in watched:
            handles += arrivals.watch(done)
        if graph.starts:
            gates = any(arrivals.gates for arrivals, _ in watched)
            torch.autograd.grad(value, graph.starts, allow_unused=True, retain_graph=gates)
    except RuntimeError as error:
        raise backward_error("gradient_split", error) from error
    finally:
        while handles:
            handles.pop().remove()
    while watched:
        arrivals, done = watched.pop()
        arrivals.part_gates(done)


def _with_leaves(batch: Batch, leaves: list[Tensor]) -> Batch:
    """Copy a batch with inputs that require gradients, to distinguish activations from weights."""

    def leaf(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[-1].clone()  # a leaf could not be changed in place by what follows

    if isinstance(batch, list | tuple) and len(batch) == 2:
        return (map_tensors(batch[0], leaf), batch[1])
    return map_tensors(batch, leaf)
