"""Has a network learnt anything about its targets? Its loss is held against its loss on exchanged targets."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from skipscope._data import Batch, Batches, Objective, batch_size, forward, target_of
from skipscope.surfaces._points import take

_MARGIN = 0.05


@torch.no_grad()
def has_learnt(model: nn.Module, data: Batches, loss: Objective) -> bool | None:
    """Whether the loss is clearly lower than with the targets given to other samples.

    A network that knows nothing loses nothing when targets change places. "Clearly": by 5 % and, where per-sample
    losses can be had, by four standard errors. None when targets cannot be exchanged (an ``@objective``, one sample).
    """
    own = exchanged = weight = 0.0
    gaps = []
    samples = loss.samples if loss.from_output is not None else None
    for batch in data:
        other = _exchanged(batch, loss)
        if other is None:
            continue
        share = float(loss.weight(batch))
        if not share:
            continue
        own += share * float(loss(model, batch))
        exchanged += share * float(loss(model, other))
        weight += share
        if samples is not None:
            output = forward(model, batch, "landscape")
            gaps.append((samples(output, other)[0] - samples(output, batch)[0]).double().flatten())
    if not weight:
        return None
    gap = (exchanged - own) / weight
    if gap != gap:  # the loss is not a number on one of them: nothing is known
        return None
    if not gap > _MARGIN * abs(own / weight):
        return False
    if gaps:
        gap_of = torch.cat(gaps)
        return bool(gap_of.mean() > 4 * gap_of.std() / len(gap_of) ** 0.5)
    return True


def _exchanged(batch: Batch, loss: Objective) -> Batch | None:
    size = batch_size(batch)
    if loss.from_output is None or size < 2:
        return None
    # A random order: neither sorted nor regularly repeated labels fall on themselves.
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    if isinstance(batch, Mapping):
        keys = [k for k in ("labels", "label", "target", "targets") if k in batch]
        return {**batch, keys[0]: take(batch[keys[0]], order, size)} if keys else None
    return batch[0], take(target_of(batch), order, size)
