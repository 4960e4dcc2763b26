"""The model's own loss, and a permutation test of whether the network has learnt its targets."""

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
    """The loss of ``model`` as it is, and whether the loss is clearly lower than with permuted targets.

    A network that knows nothing loses nothing when targets change places. "Clearly" means by 5 % and, where
    per-sample losses are known, by four standard errors. Both are read from one forward pass a batch where
    the loss is a function of the output.

    Returns:
        The loss, and True or False; None where targets cannot be permuted (an ``@objective``, one sample).
    """
    return without_gradients(lambda: _Permutation(model, loss).run(data))


@dataclass
class _Sums:
    """What a pass adds up to.

    Attributes:
        total: of the loss, weighted.
        normaliser: of the weights.
        own: the loss of the batches whose targets were permuted.
        exchanged: their loss with permuted targets.
        weight: theirs.
        gaps: of each sample between the two.
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
            if share:  # a batch with nothing to count has an undefined mean, and counts for nothing
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
            self.loss(self.model, batch)  # other ranks run theirs once more
        if other is None or self.loss.from_output is None:
            return
        if isinstance(batch, Mapping):  # its targets are among the model's inputs
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
    if gap != gap:  # the loss is not a number on one of them: nothing is known
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
    # A random order: neither sorted nor regularly repeated labels fall on themselves.
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    if isinstance(batch, Mapping):
        keys = [k for k in ("labels", "label", "target", "targets") if k in batch]
        return {**batch, keys[0]: rows(batch[keys[0]], order, size)} if keys else None
    return batch[0], rows(target_of(batch), order, size)
