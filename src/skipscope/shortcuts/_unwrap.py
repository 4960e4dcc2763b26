"""The eager module inside a compiled or distributed wrapper."""

from __future__ import annotations

import sys

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself: out of ``torch.compile``, ``DistributedDataParallel`` and ``DataParallel``."""
    # Whoever has compiled a model has this module loaded; loading torch's compiler otherwise takes seconds.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    compiled = () if compiler is None else compiler.OptimizedModule
    while True:
        if isinstance(model, compiled):
            model: nn.Module = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model
