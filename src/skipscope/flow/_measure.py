"""One forward and one backward pass, read where it crosses the boundaries: readings, before any judgement.

The backward pass is seeded with 1 / |dL/d(output)|, so that a factor on the loss cancels; every reading is
brought back to the loss's own units in Python's float64, so that batches can be added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from skipscope._calls import no_gradient
from skipscope._data import Batch, Batches, Objective, batch_size, map_tensors
from skipscope._errors import SkipscopeError
from skipscope._ranks import greatest, ranks_of
from skipscope.flow._readings import Reading, Readings, WeightReading, dense, merge, similarity
from skipscope.flow._seed import backward_error, output_gradient, seed_for, wants_backward
from skipscope.flow._site_readings import SiteRecorder

# Called with (i, activation) at boundary i; what it returns takes the activation's place.
Touch = Callable[[int, Tensor], Tensor]
Tap = Callable[[Touch], AbstractContextManager[Any]]


def measure(
    model: nn.Module, data: Batches, loss: Objective, count: int, tap: Tap, *, scale: float = 1.0
) -> Readings:
    """Read gradient and activation at ``count`` boundaries and the gradient of every weight, over all batches.

    Args:
        model: run as it is, in the mode its modules are in; the caller wraps this in ``untouched``.
        data: as ``_data.read`` gave it.
        loss: as ``_data.read`` gave it.
        count: how many boundaries there are.
        tap: enters what calls ``touch(i, activation)`` at each boundary.
        scale: by which training multiplies the loss (a GradScaler's).
    """
    weights = {n: WeightReading(p.requires_grad) for n, p in model.named_parameters() if p.ndim >= 2}
    readings = Readings(
        [Reading() for _ in range(count)], [Reading() for _ in range(count)], [None] * count, weights
    )
    spread = bool(ranks_of(model))
    for batch, share in shares_of(data, loss, "gradient_flow"):
        try:
            one = _Pass(model, batch, loss, share, scale, readings, accumulate=spread, spread=spread)
            one.run(tap)
        except RuntimeError as error:
            if not wants_backward(error):
                raise backward_error("gradient_flow", error) from error
            one = _Pass(model, batch, loss, share, scale, readings, accumulate=True)
            one.run(tap)
        one.commit()
    return readings


def shares_of(data: Batches, loss: Objective, operation: str) -> list[tuple[Batch, float]]:
    """Each batch with its share in the mean over batches (1 each where the loss is a sum)."""
    if data.single or loss.sums:
        return [(batch, 1.0) for batch in data]
    weighed = [(batch, float(loss.weight(batch))) for batch in data]
    total = sum(weight for _, weight in weighed)
    if not total > 0:
        raise SkipscopeError(
            operation, "every batch counts for nothing in the mean", got=f"{len(weighed)} batches of weight 0",
            cure="check that the labels are not all ignored, or pass weight=",
        )  # fmt: skip
    return [(batch, weight / total) for batch, weight in weighed if weight]


class _Arrivals:
    """What the hooks on activations have read. It holds no tensor: autograd's nodes keep their hooks alive, and
    Python's garbage collector does not see into autograd's nodes, so a hook that led back to the loss would keep the
    whole graph, the batch and the model for ever.
    """

    def __init__(self, share: float, scale: float):
        self.share, self.scale = share, scale
        self.readings: dict[int, Reading] = {}
        self.unit: float | None = None  # what one unit of a gradient is worth, once the seed is known

    def hook(self, i: int) -> Callable[[Tensor | None], None]:
        """The hook on the activation at boundary ``i``."""

        def arrive(gradient: Tensor | None) -> None:
            # The hooks also run while the seed is being found.
            if self.unit is not None and gradient is not None:
                self.readings.setdefault(i, Reading()).add(
                    gradient, self.unit * self.share, self.unit * self.scale
                )

        return arrive


class _Pass:
    """Forward and backward over one batch; nothing is kept in ``readings`` until it has gone well."""

    def __init__(
        self, model: nn.Module, batch: Batch, loss: Objective, share: float, scale: float, readings: Readings,
        accumulate: bool = False, spread: bool = False,
    ):  # fmt: skip
        self.model, self.loss, self.share = model, loss, share
        self.batch = map_tensors(batch, _as_data)
        self.readings, self.accumulate, self.spread = readings, accumulate, spread
        self.activations: dict[int, Reading] = {}
        self.similarities: dict[int, float | None] = {}
        self.arrivals = _Arrivals(share, scale)
        self.leaves: list[Tensor] = []
        # What a DTensor's calls are made of is no business of ours: under FSDP2 there are boundaries only.
        self.recorder = None if spread else SiteRecorder(model, self.batch, readings.sites, readings.pools)

    def touch(self, i: int, activation: Tensor) -> Tensor:
        if i not in self.activations:  # re-entrant checkpointing comes by twice
            self.activations[i] = Reading()
            with torch._C.DisableTorchFunction():
                self.activations[i].add(activation)
                if self.readings.batches == 0:
                    self.similarities[i] = similarity(activation.detach())
        touched = self.hooked(i, activation)
        if self.recorder is not None:
            self.recorder.note_boundary(i, touched)
        return touched

    def hooked(self, i: int, activation: Tensor) -> Tensor:
        """The activation with a hook on it, made to require a gradient where it does not."""
        if not torch.is_grad_enabled():
            return activation
        if activation.is_leaf:
            # Autograd goes back to a leaf only where it is asked for; some objectives make their inputs leaves.
            leaf = activation if activation.requires_grad else activation.detach().requires_grad_()
            self.leaves.append(leaf)
            activation = leaf.clone()  # a leaf could not be changed in place by what follows
        activation.register_hook(self.arrivals.hook(i))
        return activation

    def run(self, tap: Tap) -> None:
        outputs: list[Any] = []
        handle = self.model.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            # The recorder is the outer of the two: the tap finds its calls by the frames between it and the model's code.
            with self.recorder or nullcontext(), tap(self.touch):
                self.value = self.loss(self.model, self.batch)
            with tap(self.touch):  # re-entrant checkpoints come by again
                if not self.value.requires_grad:
                    raise no_gradient("gradient_flow", self.model)
                self.at_output = output_gradient(
                    self.value, outputs[-1] if outputs else None, self.accumulate
                )
                # Where weights are spread over ranks their gradient is the mean over ranks: all have one seed.
                size = greatest(self.model, self.at_output) if self.spread else self.at_output
                seed = seed_for(size, self.value.dtype)
                self.arrivals.unit = 1.0 / seed
                if self.recorder is not None:
                    self.recorder.graph.result = self.recorder.call_of(self.value)
                    self.recorder.unit.append(self.share / seed)
                self.weights = self.backward(seed)
        finally:
            handle.remove()

    def backward(self, seed: float) -> dict[str, Tensor]:
        """The gradients of the parameters. ``torch.autograd.grad`` runs no optimizer that hangs on a parameter."""
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if self.accumulate:
            with _post_accumulate_hooks_off(list(named.values())):
                self.value.backward(self.value.new_tensor(seed))
            return {name: p.grad for name, p in named.items() if p.grad is not None}
        gradients = torch.autograd.grad(
            self.value, [*named.values(), *self.leaves], self.value.new_tensor(seed), allow_unused=True
        )
        return {name: g for name, g in zip(named, gradients) if g is not None}

    def commit(self) -> None:
        to = self.readings
        for kind, mine in ((to.activations, self.activations), (to.gradients, self.arrivals.readings)):
            for i, one in mine.items():
                merge(kind[i], one)
        for i, value in self.similarities.items():
            to.similarities[i] = value
        for name, gradient in self.weights.items():
            if name in to.weights:
                to.weights[name].add(gradient, self.arrivals.unit or 1.0, self.share)
        if self.recorder is not None and to.graph is None:
            to.graph, to.calls, to.cuts = self.recorder.graph, self.recorder.boundaries, self.recorder.cuts
        if not self.spread:
            held = dict(self.model.named_parameters())
            to.moving |= {
                n for n, g in self.weights.items() if not bool(held[n].any()) and bool(dense(g).any())
            }
        if self.accumulate:
            self.model.zero_grad(set_to_none=True)
        to.loss += self.share * float(self.value.detach())
        to.output_gradient = math.hypot(to.output_gradient, self.share * self.at_output)
        to.batches += 1
        to.samples += batch_size(self.batch)


def _as_data(tensor: Tensor) -> Tensor:
    """Where the data come from is not asked: no gradient goes into what they were made of."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


@contextmanager
def _post_accumulate_hooks_off(parameters: list[nn.Parameter]):
    """Some people run their optimizer in such hooks: a measurement must not take a step."""
    kept = [p._post_accumulate_grad_hooks for p in parameters]
    try:
        for p in parameters:
            p._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        yield
    finally:
        for p, hooks in zip(parameters, kept):
            p._post_accumulate_grad_hooks = hooks
