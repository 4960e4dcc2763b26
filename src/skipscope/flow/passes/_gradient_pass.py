"""Forward and backward passes that read gradients and activations at the boundaries.

The backward pass is seeded with 1 / |dL/d(output)|, so that a factor on the loss cancels. Every reading is
converted back to the units of the loss in float64, so that batches can be added.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skipscope._data import Batch, Batches, Objective, batch_size, map_tensors
from skipscope._errors import SkipscopeError
from skipscope._model_calls import no_gradient
from skipscope._ranks import greatest, ranks_of
from skipscope._subject import Subject
from skipscope._torch_private import accumulation_hooks_off, without_modes
from skipscope.flow.passes._gradient_readings import Reading, Readings
from skipscope.flow.passes._gradient_seed import (
    backward_error,
    output_gradient,
    seed_for,
    seeded,
    wants_backward,
)
from skipscope.flow.passes._gradient_sites import WEIGHTED, CallGraph, SiteReader
from skipscope.flow.passes._tensor_norms import dense, is_zero, norm_of, similarity
from skipscope.shortcuts import tap_boundaries
from skipscope.shortcuts.trace import recording

# Called with (i, activation) at boundary i; the result replaces the activation.
Touch = Callable[[int, Tensor], Tensor]
Tap = Callable[[Touch], AbstractContextManager[Any]]


def measure(
    subject: Subject,
    model: nn.Module | None = None,
    data: Batches | None = None,
    *,
    scale: float = 1.0,
    term: str = "",
    each: Callable[[Readings], None] | None = None,
) -> Readings:
    """Read gradients and activations at boundaries, and the gradient of every weight, over all batches.

    Args:
        subject: subject to measure; the caller runs this inside ``subject.running``.
        model: copy to run instead of the subject's model.
        data: batches to use instead of the subject's data.
        scale: loss scale of the training (of a GradScaler).
        term: term of the loss whose gradient is read alone; batches without this term are left out.
        each: function called with the readings of each batch.
    """
    model = model or subject.model
    empty = partial(Readings.empty, len(subject.boundaries), _weights(model))
    total = empty()
    spread = bool(ranks_of(model))

    def tap(touch: Touch) -> AbstractContextManager[Any]:
        return tap_boundaries(model, subject.boundaries, touch)

    for batch, share in shares_of(data or subject.data, subject.loss, "gradient_flow"):
        one = _Pass(model, batch, subject.loss, share, scale, empty())
        one.term = term
        try:
            one.run(tap, accumulate=spread)
        except RuntimeError as error:
            if not wants_backward(error):
                raise backward_error("gradient_flow", error) from error
            one = _Pass(model, batch, subject.loss, share, scale, empty())
            one.term = term
            one.run(tap, accumulate=True)
        if one.readings.batches:
            if each is not None:
                each(one.readings)
            total.merge(one.readings)
    return total


def _weights(model: nn.Module) -> dict[str, bool]:
    return {n: p.requires_grad for n, p in model.named_parameters() if p.ndim >= 2}


def shares_of(data: Batches, loss: Objective, operation: str) -> list[tuple[Batch, float]]:
    """Each batch with its share in the mean over batches, or with 1 if the loss is a sum."""
    if data.single or loss.sums:
        return [(batch, 1.0) for batch in data]
    weighed = [(batch, float(loss.weight(batch))) for batch in data]
    total = sum(weight for _, weight in weighed)
    if not total > 0:
        raise SkipscopeError(
            operation,
            "every batch counts for nothing in the mean",
            got=f"{len(weighed)} batches of weight 0",
            cure="check that the labels are not all ignored, or pass weight=",
        )
    return [(batch, weight / total) for batch, weight in weighed if weight]


class _Arrivals:
    """Readings of the hooks on activations.

    It holds no tensor of the graph. Autograd's nodes keep their hooks alive, and Python's garbage collector
    does not see into these nodes, so a hook with a reference to the loss would leak the whole graph, the
    batch and the model.
    """

    def __init__(self, readings: list[Reading], share: float, scale: float, samples: int):
        self.share, self.scale, self.samples = share, scale, samples
        self.readings = readings
        self.unit: float | None = None  # what one unit of a gradient is worth, once the seed is known

    def hook(self, i: int, activation: Tensor) -> Callable[[Tensor | None], None]:
        """Make the hook for the activation at boundary ``i``; it holds no reference to the graph."""

        def arrive(gradient: Tensor | None) -> None:
            # The hooks also run while the seed is being computed.
            if self.unit is not None and gradient is not None:
                unit, reading = self.unit * self.share, self.readings[i]
                reading.add(gradient, unit, self.unit * self.scale, self.samples)
                if gradient.layout == activation.layout == torch.strided:
                    reading.relative = math.hypot(
                        reading.relative, unit * norm_of(dense(gradient * activation))
                    )

        return arrive


class _Pass:
    """Forward and backward pass over a batch."""

    term = ""

    def __init__(
        self, model: nn.Module, batch: Batch, loss: Objective, share: float, scale: float, readings: Readings
    ):
        self.model, self.loss, self.share, self.readings = model, loss, share, readings
        self.batch = map_tensors(batch, _as_data)
        samples = batch_size(self.batch)
        self.arrivals = _Arrivals(self.readings.gradients, share, scale, samples)
        self.leaves: list[Tensor] = []
        # Calls inside a DTensor are not the model's code, so under FSDP2 only boundaries are read.
        self.sites = None if ranks_of(model) else SiteReader(model)
        self.values: dict[int, int] = {}
        self.trained: dict[str, nn.Parameter] = {}

    def touch(self, i: int, activation: Tensor) -> Tensor:
        if activation.layout != torch.strided and not activation.is_nested:
            return activation  # no gradient is read at a sparse input: torch gives a sparse leaf none to hook
        reading = self.readings.activations[i]
        with without_modes():  # the recorder need not see what is only looked at
            if not reading.seen:  # re-entrant checkpointing comes by twice
                reading.add(activation)
                alike = self.readings.similarities[i] = similarity(activation.detach())
                if activation.ndim == 3:
                    alike = similarity(activation.detach(), tokens=False)
                self.readings.samples_alike[i] = alike
            is_leaf = activation.is_leaf
            if not is_leaf and torch.is_grad_enabled():
                activation.register_hook(self.arrivals.hook(i, activation.detach()))
        touched = self.leaf(i, activation) if is_leaf else activation
        recorder = self.sites.recorder if self.sites is not None else None
        if recorder is not None:
            self.values.setdefault(i, recorder.value_of(touched))
        return touched

    def leaf(self, i: int, activation: Tensor) -> Tensor:
        """Hook a leaf, after making it require a gradient if necessary.

        Autograd only reaches a leaf if its gradient is requested; some objectives make their inputs leaves.
        """
        if not torch.is_grad_enabled():
            return activation
        leaf = activation if activation.requires_grad else activation.detach().requires_grad_()
        self.leaves.append(leaf)
        activation = leaf.clone()  # a leaf could not be changed in place by what follows
        with without_modes():
            activation.register_hook(self.arrivals.hook(i, activation.detach()))
        return activation

    def run(self, tap: Tap, accumulate: bool) -> None:
        outputs: list[Any] = []
        handle = self.model.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            value = self.forward(tap)
            if value is None:
                return
            with tap(self.touch):  # re-entrant checkpoints come by again
                if not value.requires_grad:
                    raise no_gradient("gradient_flow", self.model)
                self.at_output = output_gradient(value, outputs[-1] if outputs else None, accumulate)
                # The gradient of sharded weights is the mean over ranks, so all ranks need the same seed.
                size = greatest(self.model, self.at_output) if self.sites is None else self.at_output
                seed = seed_for(size, value.dtype)
                self.arrivals.unit = 1.0 / seed
                if self.sites is not None:
                    self.sites.unit.append(self.share / seed)
                weights = self.backward(value, seed, accumulate)
        finally:
            handle.remove()
        self.finish(weights, value, accumulate)

    def forward(self, tap: Tap) -> Tensor | None:
        """Run the forward pass. Returns the loss or its term, or None if this batch has no such term."""
        with ExitStack() as stack:
            if self.sites is not None:
                # The recorder must be outside of the tap, which finds its calls by the frames between the tap
                # and the model.
                recorder = stack.enter_context(recording(self.model, self.sites, gradients=True))
                self.sites.recorder = recorder
                recorder.note_inputs(self.batch)
            with tap(self.touch):
                value = self.loss(self.model, self.batch)
            if self.sites is None:
                return value
            terms = self.sites.terms(value) if value.requires_grad else []
            results: tuple[int, ...] = (recorder.value_of(value),)
            trace = recorder.trace
        if self.term:
            chosen = next(((t, tensors) for t, tensors in terms if t.name == self.term), None)
            if chosen is None:
                return None
            results, value = chosen[0].values, _alone(value, chosen[1])
        to = self.readings
        to.graph = CallGraph.of(trace, results)
        to.sites, to.pools, to.cuts = self.sites.sites, self.sites.pools, self.sites.cuts
        to.single = self.sites.single
        to.hidden = self.sites.hidden
        to.terms = tuple(t for t, _ in terms)
        to.opaque = [hidden.name for hidden in trace.hidden if hidden.name not in WEIGHTED]
        to.normed, to.squashed = (
            self.sites.is_normed(trace),
            self.sites.is_squashed(trace, to.graph.reached()),
        )
        to.calls.update({i: to.graph.place_of(trace, v) for i, v in self.values.items()})
        self.sites.forget()
        return value

    def backward(self, value: Tensor, seed: float, accumulate: bool) -> dict[str, Tensor]:
        """Compute the parameters' gradients; ``torch.autograd.grad`` runs no post-accumulate hooks."""
        self.trained = named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if accumulate:
            with accumulation_hooks_off(list(named.values())):
                (value * seed).sum().backward()
            return {name: p.grad for name, p in named.items() if p.grad is not None}
        gradients = seeded(value, [*named.values(), *self.leaves], seed)
        found = {name: g for name, g in zip(named, gradients) if g is not None}
        # A reversible Function runs its own backward pass, which leaves gradients of its modules in .grad.
        inside = {name: p.grad for name, p in named.items() if name not in found and p.grad is not None}
        for name in inside:
            named[name].grad = None
        return found | inside

    def finish(self, weights: dict[str, Tensor], value: Tensor, accumulate: bool) -> None:
        to, unit = self.readings, self.arrivals.unit or 1.0
        for name, gradient in weights.items():
            if name in to.weights:
                to.weights[name].add(gradient, unit, self.share)
        if self.sites is not None:
            to.moving = {n for n, g in weights.items() if is_zero(self.trained[n]) and not is_zero(dense(g))}
        if accumulate:
            self.model.zero_grad(set_to_none=True)
        to.loss = self.share * float(value.detach())
        to.output_gradient = self.share * self.at_output
        to.batches, to.samples = 1, batch_size(self.batch)


def _alone(whole: Tensor, summands: list[Tensor]) -> Tensor:
    """Sum some summands of a loss, each times its factor in the loss."""
    factors = torch.autograd.grad(whole.sum(), summands, retain_graph=True, allow_unused=True)
    parts = [(one * factor).sum() for one, factor in zip(summands, factors) if factor is not None]
    return torch.stack(parts).sum() if parts else whole * 0


def _as_data(tensor: Tensor) -> Tensor:
    """Detach a tensor of the data, so that no gradient reaches the graph that produced it."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()
