"""The eager module inside a compiled or distributed wrapper."""

from __future__ import annotations

from typing import Any

from torch import nn

from skipscope._torch_private import compiled_from


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``, ``DistributedDataParallel`` and ``DataParallel`` wrappers."""
    inner: Any = model
    while True:
        if (compiled := compiled_from(inner)) is not None:
            inner = compiled
        elif isinstance(inner, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = inner.module
        else:
            return inner
