"""What some tests need of torch, asked of torch itself."""

import pytest
import torch

SHARDING_ON_CPU = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason=f"FSDP2 of torch {torch.__version__} does not run on a CPU: its streams record no events",
)
