"""Recalibrate the running statistics of an edited twin's norms by one pass over data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from skipscope import _data
from skipscope._batches import Batches
from skipscope._public_call import public_call
from skipscope._untouched import random_state_kept, set_mode


@public_call("recalibrate")
def recalibrate(twin: nn.Module, data: Any) -> nn.Module:
    """Set the running statistics of batch norms and instance norms to the average over ``data``, in place.

    Local: under DDP each rank's statistics are those of its own data. Collective where the twin is sharded.

    Args:
        twin: usually the result of ``ablate``; without such norms nothing happens.
        data: batches (definitions.md), or bare inputs of the model.

    Returns:
        The twin.

    Example:
        >>> net = nn.BatchNorm1d(2)
        >>> _ = recalibrate(net, torch.tensor([[0.0, 4.0], [2.0, 8.0]]))
        >>> net.running_mean
        tensor([1., 6.])
    """
    single = isinstance(data, torch.Tensor)
    batches = [(data,)] if single else _data.as_batches(data, "recalibrate", any_shape=True)
    return average_statistics(
        twin, batches, lambda model, batch: _data.call_model(model, _data.inputs_of(batch))
    )


def average_statistics(
    twin: nn.Module, batches: Iterable[Any], run: Callable[[nn.Module, Any], object]
) -> nn.Module:
    """Set every norm's running statistics to the average over ``run(twin, batch)``, in place (local)."""
    norms = norms_with_statistics(twin)
    if not norms:
        return twin
    data = batches if isinstance(batches, Batches) else Batches(batches)
    flags = {m: m.training for m in twin.modules()}
    momenta = [norm.momentum for norm in norms]
    try:
        set_mode(twin, False)
        for norm in norms:
            norm.reset_running_stats()
            norm.training = True
        with random_state_kept(0), torch.no_grad():
            count = 0
            for batch, counts in data.turns():
                count += counts
                for norm in norms:
                    # This gives the plain average over batches. momentum=None does so for batch norms only.
                    norm.momentum = 1 / count if counts else 0.0
                run(twin, batch)
            _average_over_ranks(norms, data, count)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, flag in flags.items():
            module.training = flag
    return twin


def _average_over_ranks(norms: list[nn.modules.batchnorm._NormBase], data: Batches, count: int) -> None:
    """Set each norm's statistics to the average over the batches of all ranks."""
    parts: list[Any] = data.together((count, [(norm.running_mean, norm.running_var) for norm in norms]))
    if len(parts) < 2:
        return
    total = sum(each for each, _ in parts)
    for i, norm in enumerate(norms):
        for k, statistic in enumerate((norm.running_mean, norm.running_var)):
            if statistic is not None:
                mean: Any = sum(each / total * held[i][k] for each, held in parts)
                statistic.copy_(mean)


def norms_with_statistics(model: nn.Module) -> list[nn.modules.batchnorm._NormBase]:
    """The batch norms and instance norms that keep running statistics."""
    return [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats
    ]
