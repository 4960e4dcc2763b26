"""``gradient_split``: how much gradient arrives at each fork through the branch, and how much through the shortcut.

Autograd's nodes are hooked: the gradient of each edge into a fork is seen as it arrives, the edges are sorted by the
side they lead to, and they sum to the fork's gradient. One backward pass for all, and no gradient of a weight.

A gate t stands on both sides, in t H and in (1 - t) x. What arrives at t by the shortcut is noted, and sent on to the
fork once more by itself: a way back through the gate's own layer, and only there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skipscope._calls import no_gradient
from skipscope._data import Batch, Objective, map_tensors
from skipscope._public_call import public_call
from skipscope._subject import Subject, prepare
from skipscope.flow._flow import mode_of
from skipscope.flow._measure import shares_of
from skipscope.flow._readings import norm_of
from skipscope.flow._results import GradientSplit, SplitAt
from skipscope.flow._seed import backward_error
from skipscope.flow._ways import Edge, Ways, edge_of
from skipscope.shortcuts import meaning, tap_merges

SIDES = ("branch", "shortcut", "other")


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
    """Split the gradient at each fork into what the branch and what the shortcut brings.

    For y = x + f(x) with no other consumer of x they are grad(x) - grad(y) and grad(y). Local; under
    FSDP2 collective: every rank calls it.

    Args:
        model: any eager module; as found afterwards. It runs in the modes its modules are in.
        data: a batch ``(inputs, target)``, a Mapping, or a re-iterable of batches.
        loss: ``loss(output, target)``; left out when the output carries ``.loss``.
        found: the shortcuts to look at; all that are found by default.
        seed: of the random numbers drawn inside (dropout).
        weight: what a batch counts for in the mean over batches.

    Raises:
        SkipscopeError: data or loss cannot be read, the loss has no gradient, or re-entrant checkpointing hides the graph.

    Example:
        >>> import skipscope as ss
        >>> model = ss.reference.deep_mlp(depth=4, width=16, inputs=16, classes=16, shortcut="identity")
        >>> split = ss.gradient_split(model, (torch.randn(8, 16), torch.zeros(8, 16)), nn.functional.mse_loss)
        >>> len(split), split[0].shortcut_rms > 0
        (4, True)
    """
    return split_of(prepare(model, data, loss, "gradient_split", weight=weight, found=found), seed)


def split_of(subject: Subject, seed: int = 0) -> GradientSplit:
    """:func:`gradient_split` of what is prepared. Local, or collective."""
    model, batches, objective, found = subject.model, subject.data, subject.loss, subject.found
    forks = [_Fork() for _ in found]
    value = 0.0
    with subject.running(seed):
        mode = mode_of(model)
        for batch, share in shares_of(batches, objective, "gradient_split"):
            value += share * _one_batch(model, batch, objective, found, forks, share)
    rows = tuple(fork.row(one) for one, fork in zip(found, forks))
    lost = [row.name for row, fork in zip(rows, forks) if not fork.elements]
    notes = (f"No gradient was seen at the fork of: {', '.join(lost)}.",) if lost else ()
    return GradientSplit(rows, value, mode, meaning(model), notes)


@dataclass
class _Fork:
    """What one fork has seen over all batches.

    Attributes:
        norms: of each side, of the whole, and of what the sides differ from it by.
        product: between branch and shortcut.
    """

    norms: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*SIDES, "total", "off"), 0.0))
    product: float = 0.0
    elements: int = 0

    def add(self, parts: dict[str, Tensor], total: Tensor, share: float) -> None:
        """Take in what arrived in one batch."""
        for side, part in parts.items():
            self.norms[side] = math.hypot(self.norms[side], share * norm_of(part))
        if "branch" in parts and "shortcut" in parts:
            self.product += share**2 * float((parts["branch"].double() * parts["shortcut"].double()).sum())
        self.norms["total"] = math.hypot(self.norms["total"], share * norm_of(total))
        off = total.double() - sum(part.double() for part in parts.values())
        self.norms["off"] = math.hypot(self.norms["off"], share * norm_of(off))
        self.elements += total.numel()

    def row(self, one: Any) -> SplitAt:
        """As a row of the result."""
        rms = {
            name: norm / math.sqrt(self.elements) if self.elements else 0.0
            for name, norm in self.norms.items()
        }
        branch, shortcut = self.norms["branch"], self.norms["shortcut"]
        return SplitAt(
            one.name, one.kind, one.fork, rms["branch"], rms["shortcut"],
            self.product / (branch * shortcut) if branch * shortcut else None, rms["total"],
            rms["other"] or None, shortcut / (shortcut + branch) if shortcut + branch else None,
            self.norms["off"] / self.norms["total"] if self.norms["total"] else None,
        )  # fmt: skip


def _one_batch(
    model: nn.Module, batch: Batch, loss: Objective, found: Any, forks: list[_Fork], share: float
) -> float:
    for parameter in model.parameters():  # so that a frozen table of embeddings does not hide the graph
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    leaves: list[Tensor] = []
    merges: dict[int, tuple[list[tuple[str, Edge]], Any]] = {}

    def touch(k: int, merge: Any) -> Tensor:
        ends = [(side, edge_of(o)) for side, o in zip(merge.sides, merge.operands) if o.requires_grad]
        if merge.later:
            merges[k][0].extend(end for end in ends if end[0] == "branch")
        else:
            merges[k] = (ends, merge.output.grad_fn)
        return merge.output

    with tap_merges(model, found, touch):
        value = loss(model, _with_leaves(batch, leaves))
        if not value.requires_grad:
            raise no_gradient("gradient_split", model)
        bypassing = [edge[0] for ends, _ in merges.values() for side, edge in ends if side == "shortcut"]
        ways = Ways(value, leaves, bypassing)
        arrivals = {k: ways.arrivals(ends, joined) for k, (ends, joined) in merges.items()}
        handles = []
        try:
            adders = ((a, partial(forks[k].add, share=share)) for k, a in arrivals.items())
            handles += [handle for arriving, add in adders for handle in arriving.watch(add)]
            if ways.starts:
                gates = any(arriving.gates for arriving in arrivals.values())
                torch.autograd.grad(value, ways.starts, allow_unused=True, retain_graph=gates)
        except RuntimeError as error:
            raise backward_error("gradient_split", error) from error
        finally:
            while handles:
                handles.pop().remove()
        while arrivals:
            arrivals.popitem()[1].part_gates()
    result = float(value.detach())
    merges.clear()
    del value, bypassing
    ways.release()
    return result


def _with_leaves(batch: Batch, leaves: list[Tensor]) -> Batch:
    """The batch with inputs that require gradients, so that activations can be told from weights in the graph."""

    def leaf(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[-1].clone()  # a leaf could not be changed in place by what follows

    if isinstance(batch, list | tuple) and len(batch) == 2:
        return (map_tensors(batch[0], leaf), batch[1])
    return map_tensors(batch, leaf)
