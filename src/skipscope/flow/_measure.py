"""One forward and one backward pass, read where it crosses the boundaries: readings, before any judgement.

The backward pass is seeded with 1 / |dL/d(output)|, so that a factor on the loss cancels; every reading is
brought back to the loss's own units in Python's float64, so that batches can be added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from skipscope._data import Batch, Batches, Objective, batch_size, tensors_in
from skipscope._errors import SkipscopeError

# Called with (i, activation) at boundary i; what it returns takes the activation's place.
Touch = Callable[[int, Tensor], Tensor]
Tap = Callable[[Touch], AbstractContextManager[Any]]

# How torch says that re-entrant checkpointing wants .backward(), in older and newer versions.
RE_ENTRANT = ("Checkpointing is not compatible with .grad()", "checkpoint is incompatible with .grad()")


@dataclass
class Reading:
    """What was read of one tensor over all batches: of a gradient, or of an activation."""

    norm: float = 0.0
    elements: int = 0
    zeros: int = 0
    lost: int = 0  # elements that training, with its own scale of the loss, would flush to zero
    finite: bool = True
    seen: bool = False
    dtype: torch.dtype | None = None

    def add(self, value: Tensor, unit: float = 1.0, training_unit: float = 1.0) -> None:
        """Take in a tensor.

        Args:
            value: any shape, dense or sparse.
            unit: what one unit of it is worth in what is reported.
            training_unit: what one unit of it is worth in training, scaled as the user's GradScaler scales.
        """
        value = _dense(value.detach())
        self.seen, self.dtype = True, value.dtype
        self.elements += value.numel()
        if not value.numel():
            return
        norm = norm_of(value)
        self.finite = self.finite and math.isfinite(norm)
        self.norm = math.hypot(self.norm, norm * unit)
        self.zeros += value.numel() - int(torch.count_nonzero(value))
        floor = _smallest(value.dtype) / training_unit if training_unit else 0.0
        if floor > float(torch.finfo(value.dtype).tiny):
            self.lost += int(((value.abs() < floor) & (value != 0)).sum())

    @property
    def rms(self) -> float:
        """Root mean square."""
        return self.norm / math.sqrt(self.elements) if self.elements else 0.0

    @property
    def all_zero(self) -> bool:
        """Something arrived, and it was nothing."""
        return self.seen and self.elements > 0 and self.norm == 0


@dataclass
class WeightReading:
    """The gradient of one weight: its sum over batches, and its RMS in each."""

    trainable: bool
    total: Tensor | None = None
    unit: float = 1.0  # what one unit of ``total`` is worth
    rms: list[float] = field(default_factory=list)

    def add(self, gradient: Tensor, unit: float, share: float) -> None:
        """Take in one batch's gradient; ``unit``: what one unit of it is worth; ``share``: the batch's in the mean."""
        gradient = gradient.detach()
        gradient = _dense(gradient.to_dense() if gradient.is_sparse else gradient)
        self.rms.append(norm_of(gradient) * unit / math.sqrt(max(1, gradient.numel())))
        if self.total is None:
            self.total, self.unit = gradient, unit * share
        elif unit * share:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            self.total = self.total.to(wide) + gradient.to(wide) * (unit * share / self.unit)


@dataclass
class Readings:
    """Everything one measurement read, boundary by boundary and weight by weight."""

    gradients: list[Reading]
    activations: list[Reading]
    similarities: list[float | None]
    weights: dict[str, WeightReading]
    output_gradient: float = 0.0
    loss: float = 0.0
    batches: int = 0
    samples: int = 0


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
    for batch, share in shares_of(data, loss, "gradient_flow"):
        try:
            one = _Pass(model, batch, loss, share, scale, readings)
            one.run(tap)
        except RuntimeError as error:
            if not wants_backward(error):
                raise
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


class _Pass:
    """Forward and backward over one batch; nothing is kept in ``readings`` until it has gone well."""

    def __init__(
        self, model: nn.Module, batch: Batch, loss: Objective, share: float, scale: float, readings: Readings,
        accumulate: bool = False,
    ):  # fmt: skip
        self.model, self.batch, self.loss, self.share, self.scale = model, batch, loss, share, scale
        self.readings, self.accumulate = readings, accumulate
        self.activations: dict[int, Reading] = {}
        self.similarities: dict[int, float | None] = {}
        self.gradients: dict[int, Reading] = {}
        self.leaves: list[Tensor] = []
        self.unit: float | None = None  # what one unit of a gradient is worth, once the seed is known

    def touch(self, i: int, activation: Tensor) -> Tensor:
        if i not in self.activations:  # re-entrant checkpointing comes by twice
            self.activations[i] = Reading()
            self.activations[i].add(activation)
            if self.readings.batches == 0:
                self.similarities[i] = similarity(activation.detach())
        if not torch.is_grad_enabled():
            return activation
        if not activation.requires_grad:
            leaf = activation.detach().requires_grad_()
            self.leaves.append(leaf)
            activation = leaf.clone()  # a leaf could not be changed in place by what follows
        activation.register_hook(lambda gradient: self.arrive(i, gradient))
        return activation

    def arrive(self, i: int, gradient: Tensor | None) -> None:
        if self.unit is not None and gradient is not None:  # the hooks also run while the seed is being found
            self.gradients.setdefault(i, Reading()).add(
                gradient, self.unit * self.share, self.unit * self.scale
            )

    def run(self, tap: Tap) -> None:
        outputs: list[Any] = []
        handle = self.model.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            with tap(self.touch):
                self.value = self.loss(self.model, self.batch)
                if not self.value.requires_grad:
                    raise no_gradient("gradient_flow", self.model)
                self.at_output = output_gradient(
                    self.value, outputs[-1] if outputs else None, self.accumulate
                )
                seed = seed_for(self.at_output, self.value.dtype)
                self.unit = 1.0 / seed
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
        for kind, mine in ((to.activations, self.activations), (to.gradients, self.gradients)):
            for i, one in mine.items():
                _merge(kind[i], one)
        for i, value in self.similarities.items():
            to.similarities[i] = value
        for name, gradient in self.weights.items():
            if name in to.weights:
                to.weights[name].add(gradient, self.unit or 1.0, self.share)
        if self.accumulate:
            self.model.zero_grad(set_to_none=True)
        to.loss += self.share * float(self.value.detach())
        to.output_gradient = math.hypot(to.output_gradient, self.share * self.at_output)
        to.batches += 1
        to.samples += batch_size(self.batch)


def _merge(total: Reading, one: Reading) -> None:
    total.norm = math.hypot(total.norm, one.norm)
    total.elements += one.elements
    total.zeros += one.zeros
    total.lost += one.lost
    total.finite = total.finite and one.finite
    total.seen = total.seen or one.seen
    total.dtype = one.dtype or total.dtype


def wants_backward(error: RuntimeError) -> bool:
    """Whether torch refuses ``torch.autograd.grad`` because of re-entrant checkpointing."""
    return any(text in str(error) for text in RE_ENTRANT)


def re_entrant(operation: str) -> SkipscopeError:
    """The error where the graph between a fork and its merge is needed and hidden."""
    return SkipscopeError(
        operation, "re-entrant checkpointing hides the graph between a fork and its merge",
        cure="torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or switch checkpointing off for this call",
    )  # fmt: skip


@contextmanager
def _post_accumulate_hooks_off(parameters: list[nn.Parameter]):
    """Some people run their optimizer in such hooks: a measurement must not take a step."""
    kept = [p._post_accumulate_grad_hooks for p in parameters]
    try:
        for p in parameters:
            p._post_accumulate_grad_hooks = None
        yield
    finally:
        for p, hooks in zip(parameters, kept):
            p._post_accumulate_grad_hooks = hooks


# --- the seed -------------------------------------------------------------------------------------------------


def output_gradient(loss: Tensor, output: Any, accumulate: bool = False) -> float:
    """|dL/d(output)| over the tensors of ``output`` that the loss is made of; 1 where it cannot be had."""
    tensors = [
        t for t in _direct_outputs(output) if t.requires_grad and t is not loss and t.is_floating_point()
    ]
    tensors = _without_ancestors(tensors)
    if not tensors or (accumulate and len(tensors) == 1 and tensors[0].grad_fn is None):
        return 1.0
    narrow = any(torch.finfo(t.dtype).bits < 32 for t in tensors)
    near = 2.0**6 if narrow else 1e25  # in half precision the seed must be about right before the norm can be
    seed, found = 1.0, 0.0
    for _ in range(4):
        gradients = torch.autograd.grad(
            loss, tensors, loss.new_tensor(seed), retain_graph=True, allow_unused=True
        )
        if all(g is None for g in gradients):
            return 1.0
        norm = math.hypot(*(norm_of(_dense(g)) for g in gradients if g is not None))
        found = norm / seed
        step = 2.0**24 if norm == 0 else seed_for(norm, loss.dtype) if math.isfinite(norm) else 2.0**-24
        if 1 / near < norm < near or not 0 < seed * step < torch.finfo(loss.dtype).max:
            break
        seed *= step
    return found


def _direct_outputs(output: Any) -> list[Tensor]:
    """What the loss is computed from: of an output with a name for it (Hugging Face), the logits."""
    for name in ("logits", "prediction_logits", "last_hidden_state"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return [found]
    return tensors_in(output)


def _without_ancestors(tensors: list[Tensor]) -> list[Tensor]:
    """Leave out tensors that others are computed from (hidden states handed out beside the logits)."""
    nodes = {t.grad_fn: t for t in tensors if t.grad_fn is not None}
    if len(tensors) < 2:
        return tensors
    ancestors: set[Any] = set()
    for node in nodes:
        ancestors |= _above(node)
    return [t for t in tensors if t.grad_fn not in ancestors] or tensors


def _above(node: Any) -> set[Any]:
    seen: set[Any] = set()
    stack = [parent for parent, _ in node.next_functions if parent is not None]
    while stack:
        one = stack.pop()
        if one not in seen:
            seen.add(one)
            stack += [parent for parent, _ in one.next_functions if parent is not None]
    return seen


def seed_for(norm: float, dtype: torch.dtype) -> float:
    """1 / norm as a power of two (no rounding), as far as ``dtype`` can hold it."""
    if not (math.isfinite(norm) and norm > 0):
        return 1.0
    most = math.floor(math.log2(torch.finfo(dtype).max)) - 1
    return 2.0 ** max(-most + 2, min(most, -math.frexp(norm)[1]))


def no_gradient(operation: str, model: nn.Module) -> SkipscopeError:
    """The error for a loss that depends on nothing that has a gradient."""
    frozen = all(not p.requires_grad for p in model.parameters())
    return SkipscopeError(
        operation, "the loss has no gradient", expected="a loss that depends on the model's output differentiably",
        got="a loss without grad_fn" + (" (every parameter is frozen)" if frozen else ""),
        cure="compute the output without torch.no_grad, .detach(), .item() or argmax, and the loss from it",
    )  # fmt: skip


# --- numbers --------------------------------------------------------------------------------------------------


def _dense(value: Tensor) -> Tensor:
    value = value.coalesce().values() if value.is_sparse else value
    return torch.view_as_real(value) if value.is_complex() else value


def _smallest(dtype: torch.dtype) -> float:
    """Half the smallest number above zero: what is below is rounded to zero."""
    info = torch.finfo(dtype)
    return float(info.smallest_normal) * float(info.eps) / 2


def norm_of(value: Tensor) -> float:
    """The L2 norm, squares summed in float64, right as far as float64's own range goes."""
    norm = float(torch.linalg.vector_norm(value, dtype=torch.float64))
    if 1e-140 < norm < 1e140 or math.isnan(norm):
        return norm
    largest = float(value.abs().max()) if value.numel() else 0.0
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * float(torch.linalg.vector_norm(value.double() / largest))


def similarity(activation: Tensor, most: int = 256) -> float | None:
    """Mean cosine between different tokens of a sample ``[B, T, C]``, else between different samples."""
    if activation.ndim < 2 or not activation.is_floating_point():
        return None
    rows = activation[:8, :most] if activation.ndim == 3 else activation[:most].flatten(1).unsqueeze(0)
    n = rows.shape[1]
    if n < 2 or rows.shape[-1] < 2:
        return None
    unit = torch.nn.functional.normalize(rows.float(), dim=-1)
    pairs = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))
    value = float((pairs / (n * (n - 1))).mean())
    return value if math.isfinite(value) else None
