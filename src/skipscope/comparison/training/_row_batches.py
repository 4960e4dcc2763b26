"""Test whether a large batch may be split into random mini-batches: only if its rows are independent samples.

The rows of a graph, of a sequence of time steps or of a table with a row per node depend on each other, and a
subset of them is another problem. The test: the model's output on some rows must equal those rows of its
output on more rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from skipscope._data import Batches, Objective, batch_size, rows, tensors_in, without_gradients
from skipscope._untouched import untouched


def can_be_cut(model: nn.Module, data: Batches, objective: Objective, size: int) -> bool:
    """Whether the single batch of ``data`` has more than ``size`` rows, each an independent sample.

    Batches declared by ``ss.batches`` and custom batch objects are never cut. Outputs of a model that draws
    noise in evaluation mode cannot be compared: it only has to accept a subset of the rows.
    """
    if not data.single or not data.cuttable:
        return False
    batch = data.first()
    count = batch_size(batch)
    parts = batch if isinstance(batch, tuple | list) else [batch]
    if count <= size or not all(map(_is_plain, parts)):
        return False
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: 2 * size]
    more = rows(batch, order)
    # Reverse order, because a causal model's output on its first rows does not depend on later rows.
    some = torch.arange(len(order)).flip(0)[:size]

    def outputs(part: Any, seed: int) -> list[Tensor]:
        with untouched(model, training=False, seed=seed, operation="train_twins"):
            return without_gradients(lambda: _outputs(model, objective, part))

    try:
        first, part = outputs(more, 0), outputs(rows(more, some), 0)
        by_row = [
            (own.reshape(size, -1), whole.reshape(len(order), -1))
            for own, whole in zip(part, first, strict=True)
        ]
        if all(_close(own, whole[some]) for own, whole in by_row):
            return True
        return not all(map(torch.equal, first, outputs(more, 1)))
    # A model may raise anything on a subset of its rows. It is then trained on the whole batch.
    except Exception:
        return False


def _is_plain(part: Any) -> bool:
    """Whether a value consists of tensors, strings, numbers and None in tuples, lists and Mappings only."""
    if isinstance(part, Mapping):
        return all(map(_is_plain, part.values()))
    if isinstance(part, tuple | list):
        return all(map(_is_plain, part))
    return isinstance(part, Tensor | str | int | float | None)


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs are equal up to rounding, by the norm of their difference."""
    if a.shape != b.shape or not a.dtype.is_floating_point:
        return a.shape == b.shape
    return float((a - b).norm()) <= torch.finfo(a.dtype).eps ** 0.5 * float(b.norm())


def _outputs(model: nn.Module, objective: Objective, batch: Any) -> list[Tensor]:
    """Outputs of each call of the model by the objective whose first dimension is a multiple of the rows."""
    found: list[Tensor] = []
    count = batch_size(batch)

    def note(_module: nn.Module, _arguments: Any, output: Any) -> None:
        found.extend(t.detach() for t in tensors_in(output) if t.ndim and not t.shape[0] % count)

    hook = model.register_forward_hook(note)
    try:
        objective(model, batch)
    finally:
        hook.remove()
    return found
