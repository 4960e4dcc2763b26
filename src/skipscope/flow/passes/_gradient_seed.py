"""Seed of a backward pass, 1 / |dL/d(output)|; errors of passes that fail."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from skipscope._data import tensors_in
from skipscope._errors import SkipscopeError
from skipscope._model_calls import error_text
from skipscope.flow.passes._gradient_readings import dense, norm_of

# Messages of torch, in older and newer versions, that re-entrant checkpointing needs .backward().
RE_ENTRANT = ("Checkpointing is not compatible with .grad()", "checkpoint is incompatible with .grad()")


def output_gradient(loss: Tensor, output: Any, accumulate: bool = False) -> float:
    """|dL/d(output)| over the tensors of ``output`` that the loss uses, or 1 if it cannot be computed."""
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
        gradients = seeded(loss, tensors, seed, retain_graph=True)
        if all(g is None for g in gradients):
            return 1.0
        norm = math.hypot(*(norm_of(dense(g)) for g in gradients if g is not None))
        found = norm / seed
        step = 2.0**24 if norm == 0 else seed_for(norm, loss.dtype) if math.isfinite(norm) else 2.0**-24
        if 1 / near < norm < near or not 0 < seed * step < torch.finfo(loss.dtype).max:
            break
        seed *= step
    return found


def seeded(loss: Tensor, tensors: Sequence[Tensor], seed: float, **options: Any) -> tuple[Tensor | None, ...]:
    """Gradients of ``seed`` times the loss; with ``grad_outputs=`` torch would import sympy."""
    return torch.autograd.grad((loss * seed).sum(), tensors, allow_unused=True, **options)


def _direct_outputs(output: Any) -> list[Tensor]:
    """Tensors from which the loss is computed: the logits of a Hugging Face output, otherwise all tensors."""
    for name in ("logits", "prediction_logits", "last_hidden_state"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return [found]
    return tensors_in(output)


def _without_ancestors(tensors: list[Tensor]) -> list[Tensor]:
    """Leave out tensors upstream of others (hidden states returned with the logits)."""
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
    """1 / norm, rounded to a power of two to avoid rounding errors, within the range of ``dtype``."""
    if not (math.isfinite(norm) and norm > 0):
        return 1.0
    most = math.floor(math.log2(torch.finfo(dtype).max)) - 1
    return 2.0 ** max(-most + 2, min(most, -math.frexp(norm)[1]))


def wants_backward(error: RuntimeError) -> bool:
    """Whether an error is torch's refusal of ``torch.autograd.grad`` with re-entrant checkpointing."""
    return any(text in str(error) for text in RE_ENTRANT)


def backward_error(operation: str, error: RuntimeError) -> RuntimeError | SkipscopeError:
    """Convert torch's error in a backward pass to the error to raise."""
    if isinstance(error, torch.OutOfMemoryError):
        return error
    if wants_backward(error):  # the graph between a fork and its merge is needed and hidden
        return SkipscopeError(
            operation,
            "re-entrant checkpointing hides the graph between a fork and its merge",
            cure=(
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or switch checkpointing off for"
                " this call"
            ),
        )
    return SkipscopeError(
        operation,
        f"the backward pass fails ({error_text(error)})",
        cure="loss.backward() on this batch fails alike: mend the model first",
    )
