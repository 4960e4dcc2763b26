"""Leaving a model, its gradients and the user's random state as they were found.

Every public call that runs a user's model does so inside :func:`untouched`. It takes a cheap snapshot (references,
flags, clones of buffers; never of parameters), and puts everything back in ``finally``: after a return, an exception
or Ctrl-C.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skipscope._errors import SkipscopeError

# Two threads of functional_call on one module corrupt its weights for good (seen), and the random state is one for
# all threads: measurements take turns.
_turn = threading.RLock()


@contextmanager
def random_state_kept(seed: int | None = None) -> Iterator[None]:
    """Give Python's, NumPy's and torch's global generators back as they were; seed them first if asked."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = (
        torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    )
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)


class _Snapshot:
    """What one module holds, apart from the values of its parameters."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.attributes = dict(module.__dict__)
        # Hooks, parameters, buffers, children and the user's own caches live in containers that are changed in place.
        self.containers = {
            key: (value, value.copy())
            for key, value in self.attributes.items()
            if isinstance(value, dict | list | set)
        }
        self.tensors = [
            (value, value.detach().clone())
            for value in [*module._buffers.values(), *self.attributes.values()]
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
        ]

    def restore(self) -> None:
        state = self.module.__dict__
        if state.keys() != self.attributes.keys() or any(
            state[k] is not v for k, v in self.attributes.items()
        ):
            state.clear()
            state.update(self.attributes)
        for container, before in self.containers.values():
            if isinstance(container, list):
                container[:] = before
            elif not _same_items(container, before):
                container.clear()
                container.update(before)
        for tensor, before in self.tensors:
            if not _same_bits(tensor, before):
                with torch.no_grad():
                    tensor.copy_(before)


def _same_items(a: dict | set, b: dict | set) -> bool:
    # By identity: a module that gave itself a new buffer holds tensors that cannot be compared with ==.
    if isinstance(a, set) or isinstance(b, set):
        return a == b
    pairs = zip(a.items(), b.items(), strict=False)
    return len(a) == len(b) and all(i is j and x is y for (i, x), (j, y) in pairs)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.is_meta:
        return True
    return torch.equal(a, b) or (
        torch.equal(torch.isnan(a), torch.isnan(b)) and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    )


@contextmanager
def untouched(
    *models: nn.Module, training: bool | None = None, seed: int | None = None, operation: str = "skipscope"
) -> Iterator[None]:
    """Do anything with ``models`` inside; outside nothing has changed.

    Kept bit for bit: buffers, the identity of every ``.grad``, training flags, ``requires_grad``, hooks, attributes,
    and the global random state. Inside, every ``.grad`` is None, gradients are enabled and inference mode is off.
    Parameters are the caller's to leave alone.

    Args:
        models: the modules that will be run.
        training: True or False puts the models into that mode; None leaves each module's flag as it is.
        seed: seeds the global generators inside, so that dropout draws the same numbers every time.
        operation: named in errors.

    Raises:
        SkipscopeError: a model has parameters that do not exist yet (lazy modules), or is no ``nn.Module``.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> with untouched(model, training=True):
        ...     model(torch.randn(8, 2)).sum().backward()
        >>> model[0].weight.grad is None
        True
    """
    for model in models:
        require_module(model, operation)
    with _turn, random_state_kept(seed), torch.inference_mode(False), torch.enable_grad():
        modules = {id(m): m for model in models for m in model.modules()}.values()
        parameters = list({id(p): p for model in models for p in model.parameters()}.values())
        snapshots = [_Snapshot(module) for module in modules]
        gradients = [(p, p.grad, p.requires_grad) for p in parameters]
        try:
            for p in parameters:
                p.grad = None
            if training is not None:
                for model in models:
                    model.train(training)
            yield
        finally:
            for snapshot in snapshots:
                snapshot.restore()
            for p, grad, requires_grad in gradients:
                p.grad = None  # a gradient of another dtype can only be replaced through None
                p.requires_grad_(requires_grad)
                p.grad = grad


def require_module(model: Any, operation: str) -> None:
    """Refuse what is not a module, or is one whose parameters do not exist yet."""
    if not isinstance(model, nn.Module):
        raise SkipscopeError(
            operation,
            "the model is not a torch.nn.Module",
            expected="an nn.Module",
            got=f"{type(model).__name__}: {model!r:.80}",
            cure="pass the module itself; a factory is called first: make_model()",
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise SkipscopeError(
                operation,
                "a lazy module has no weights yet, and the first forward pass would change it",
                layer=name,
                cure="run model(inputs) once before measuring",
            )
