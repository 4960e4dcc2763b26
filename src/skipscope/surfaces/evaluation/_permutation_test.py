"""The model's own loss, and whether the network has learnt: its loss compared with the loss on permuted
targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from skipscope._data import Batch, Batches, Objective, batch_size, forward, rows, target_of, without_gradients

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


class _Permutation:
    def __init__(self, model: nn.Module, loss: Objective):
        self.model, self.loss = model, loss
        self.samples = loss.samples if loss.from_output is not None else None
        self.total = self.normaliser = 0.0  # of the loss itself
        self.own = self.exchanged = self.weight = 0.0  # of the batches whose targets were permuted
        self.gaps: list[Tensor] = []

    def run(self, data: Batches) -> tuple[float, bool | None]:
        for batch in data:
            weight = float(self.loss.weight(batch))
            share = 1.0 if self.loss.sums or data.single else weight
            value, output = self._value(batch) if share or weight else (float("nan"), None)
            if share:  # a batch with nothing to count has an undefined mean, and counts for nothing
                self.total += share * value
                self.normaliser += share
            if weight:
                self._permute(batch, weight, value, output)
        mean = self.total / self.normaliser if self.normaliser else float("nan")
        return self.total if self.loss.sums else mean, self._has_learnt()

    def _value(self, batch: Batch) -> tuple[float, Any]:
        if self.loss.from_output is None:
            return _number(self.loss(self.model, batch)), None
        output = forward(self.model, batch, "landscape")
        return _number(self.loss.from_output(output, batch)), output

    def _permute(self, batch: Batch, weight: float, value: float, output: Any) -> None:
        other = _exchanged(batch, self.loss)
        if other is None or self.loss.from_output is None:
            return
        if isinstance(batch, Mapping):  # its targets are among the model's inputs
            self.exchanged += weight * _number(self.loss(self.model, other))
        else:
            self.exchanged += weight * _number(self.loss.from_output(output, other))
        self.own += weight * value
        self.weight += weight
        if self.samples is not None:
            gap = self.samples(output, other)[0] - self.samples(output, batch)[0]
            self.gaps.append(gap.detach().double().flatten())

    def _has_learnt(self) -> bool | None:
        if not self.weight:
            return None
        gap = (self.exchanged - self.own) / self.weight
        if gap != gap:  # the loss is not a number on one of them: nothing is known
            return None
        if not gap > _MARGIN * abs(self.own / self.weight):
            return False
        if self.gaps:
            gaps = torch.cat(self.gaps)
            return bool(gaps.mean() > 4 * gaps.std() / len(gaps) ** 0.5)
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
