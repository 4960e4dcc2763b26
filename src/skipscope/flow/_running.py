"""How this room runs a user's model: left as found, seeded, and as its code is written."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from skipscope._data import Batch, Batches, Objective, inputs_of, read
from skipscope._errors import SkipscopeError
from skipscope._ranks import meet, ranks_of
from skipscope._untouched import require_module, untouched
from skipscope.shortcuts import Boundary, Shortcuts, boundaries, find_shortcuts
from skipscope.shortcuts._unwrap import unwrapped


def as_written() -> AbstractContextManager[Any]:
    """Compiled modules run as their code is written: hooks set after compilation would silently not be called."""
    # Whoever has compiled something has this module loaded; loading it otherwise takes seconds.
    loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if loaded else contextlib.nullcontext()


def asked(
    model: nn.Module, data: Any, loss: Any, operation: str, weight: Callable[[Batch], float] | None
) -> tuple[nn.Module, Batches, Objective]:
    """What every public call of this room starts with: the model out of its wrappers, data and loss as they are read."""
    require_module(model, operation)
    meet(operation, ranks_of(model))
    model = unwrapped(model)
    batches, objective = read(model, data, loss, operation, weight=weight)
    return model, batches, objective


@contextmanager
def running(model: nn.Module, seed: int, operation: str) -> Iterator[None]:
    """Run ``model`` inside: in the modes its modules are in, with a seed; outside nothing has changed."""
    with untouched(model, seed=seed, operation=operation), as_written():
        yield


def places(
    model: nn.Module, data: Batches, operation: str, found: Shortcuts | None = None
) -> tuple[Shortcuts, tuple[Boundary, ...]]:
    """The shortcuts of a model (``found``, if given) and its boundaries.

    Raises:
        SkipscopeError: the model has no float activation at all.
    """
    inputs = inputs_of(data.first())
    with as_written():
        found = find_shortcuts(model, inputs) if found is None else found
        points = boundaries(model, inputs, found=found)
    if not points:
        raise SkipscopeError(
            operation, "no float activation was seen in a forward pass", expected="a float input, or an embedding",
            got=f"a model of type {type(model).__name__}", cure="pass the inputs that the model is trained on",
        )  # fmt: skip
    return found, points
