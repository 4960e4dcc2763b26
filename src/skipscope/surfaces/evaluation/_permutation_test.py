"""The model's own loss, and a permutation test for whether the network has learnt its targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from skipscope._data import Batch, Batches, Objective, batch_size, forward, rows, target_of, without_gradients
from skipscope._rank_batches import RankBatches

_MARGIN = 0.05


def own_loss(model: nn.Module, data: Batches, loss: Objective) -> tuple[float, bool | None]:
    """Compute the loss of ``model``, and whether it is clearly lower than with permuted targets.

    Permuting the targets does not change the loss of a network that has learnt nothing. "Clearly" means by
    5 % and, if per-sample losses are known, by four standard errors. One forward pass per batch gives both
    losses if the loss is a function of the output.

    Returns:
        The loss, and True or False; or None if targets cannot be permuted (an ``@objective``, one sample).
    """
    return without_gradients(lambda: _Permutation(model, loss).run(data))


@dataclass
class _Sums:
    """Sums over a pass through the data.

    Attributes:
        total: weighted sum of the loss.
        normaliser: sum of the weights.
        own: weighted loss of the batches whose targets were permuted.
        exchanged: the same batches' loss with permuted targets.
        weight: sum of these batches' weights.
        gaps: per-sample differences between the two losses.
    """

    total: float = 0.0
    normaliser: float = 0.0
    own: float = 0.0
    exchanged: float = 0.0
    weight: float = 0.0
    gaps: list[Tensor] = field(default_factory=list)


class _Permutation:
    def __init__(self, model: nn.Module, loss: Objective):
        self.model, self.loss = model, loss
        self.samples = loss.samples if loss.from_output is not None else None
        self.sums, self.in_step = _Sums(), False

    def run(self, data: Batches) -> tuple[float, bool | None]:
        self.in_step = isinstance(data, RankBatches)
        for batch, counts in data.turns():
            weight = float(self.loss.weight(batch)) if counts else 0.0
            share = 1.0 if counts and (self.loss.sums or data.single) else weight
            value, output = self._value(batch)
            # A batch without weight has an undefined mean and must not enter the sum.
            if share:
                self.sums.total += share * value
                self.sums.normaliser += share
            self._permute(batch, weight, value, output)
        parts = data.together(self.sums)
        total, normaliser = (sum(getattr(p, n) for p in parts) for n in ("total", "normaliser"))
        mean = total / normaliser if normaliser else float("nan")
        return total if self.loss.sums else mean, _has_learnt(parts)

    def _value(self, batch: Batch) -> tuple[float, Any]:
        if self.loss.from_output is None:
            return _number(self.loss(self.model, batch)), None
        output = forward(self.model, batch, "landscape")
        return _number(self.loss.from_output(output, batch)), output

    def _permute(self, batch: Batch, weight: float, value: float, output: Any) -> None:
        other, sums = _exchanged(batch, self.loss), self.sums
        if self.in_step and other is None and isinstance(batch, Mapping):
            # The other ranks run a second forward pass, so this rank must join in.
            self.loss(self.model, batch)
        if other is None or self.loss.from_output is None:
            return
        # The targets of a mapping are among the model's inputs, so it needs another forward pass.
        if isinstance(batch, Mapping):
            exchanged = self.loss(self.model, other)
        elif weight:
            exchanged = self.loss.from_output(output, other)
        if not weight:
            return
        sums.exchanged += weight * _number(exchanged)
        sums.own += weight * value
        sums.weight += weight
        if self.samples is not None:
            gap = self.samples(output, other)[0] - self.samples(output, batch)[0]
            sums.gaps.append(gap.detach().double().flatten())


def _has_learnt(parts: list[_Sums]) -> bool | None:
    weight, own = sum(p.weight for p in parts), sum(p.own for p in parts)
    if not weight:
        return None
    gap = (sum(p.exchanged for p in parts) - own) / weight
    # The loss is NaN for the given or the permuted targets.
    if gap != gap:
        return None
    if not gap > _MARGIN * abs(own / weight):
        return False
    if gaps := [g for part in parts for g in part.gaps]:
        each = torch.cat(gaps)
        return bool(each.mean() > 4 * each.std() / len(each) ** 0.5)
    return True


def _number(value: Tensor) -> float:
    return float(value.detach().double())


def _exchanged(batch: Batch, loss: Objective) -> Batch | None:
    size = batch_size(batch)
    if loss.from_output is None or size < 2:
        return None
    # A shift could map sorted or regularly repeated labels onto themselves; a random order does not.
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    if isinstance(batch, Mapping):
        keys = [k for k in ("labels", "label", "target", "targets") if k in batch]
        return {**batch, keys[0]: rows(batch[keys[0]], order, size)} if keys else None
    return batch[0], rows(target_of(batch), order, size)
