"""The eager module inside a compiled or distributed wrapper."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself: out of ``torch.compile``, ``DistributedDataParallel`` and ``DataParallel``."""
    # A compiled model implies that this module is loaded; loading torch's compiler takes seconds.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    compiled = () if compiler is None else compiler.OptimizedModule
    inner: Any = model
    while True:
        if isinstance(inner, compiled):
            inner = inner._orig_mod
        elif isinstance(inner, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = inner.module
        else:
            return inner
