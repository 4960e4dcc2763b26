"""What some tests need of torch, asked of torch itself."""

import functools

import pytest
import torch
from torch.overrides import TorchFunctionMode

SHARDING_ON_CPU = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason=f"FSDP2 of torch {torch.__version__} does not run on a CPU: its streams record no events",
)


class _Seen(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@functools.cache
def compiled_code_shows_assignments() -> bool:
    """Whether function modes see ``x[i] = y`` in compiled code; those of torch 2.14 do not."""
    seen = _Seen()

    @torch.compile(backend="eager", fullgraph=True)
    def assign(x):
        with seen:
            x[0] = x[1] + 1
        return x

    assign(torch.zeros(2))
    return "__setitem__" in seen.names
