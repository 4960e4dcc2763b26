"""Checks before the first step: remarks for the reader, and setups that would give wrong numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from skipscope._errors import SkipscopeError
from skipscope._ranks import world
from skipscope._sharding import refuse_flattened
from skipscope._untouched import require_module
from skipscope._validation import is_integer
from skipscope.monitor.recording._step_recorder import StepRecorder
from skipscope.monitor.recording._tracked_parameters import names_of
from skipscope.shortcuts import refuse_shared


def notes_on(models: Mapping[str, nn.Module], recorders: Sequence[StepRecorder]) -> list[str]:
    notes = []
    size = world()[1]
    held = {id(p) for s in recorders for p in s.tracked.parameters}
    names = names_of(models)
    left_out = [name for key, (_, name) in names.items() if key not in held]
    foreign = sum(len(s.tracked.parameters) for s in recorders) - sum(
        id(p) in names for s in recorders for p in s.tracked.parameters
    )
    if left_out:
        notes.append(f"{len(left_out)} parameters are in none of the watched optimizers: {_few(left_out)}.")
    if foreign:
        notes.append(f"{foreign} parameters of the optimizers belong to none of the watched models.")
    if size > 1:
        how = (
            "summed over their shards"
            if any(s.sharded for s in recorders)
            else "reduced by the training itself"
        )
        notes.append(f"{size} ranks; the gradients are {how}.")
    return notes


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def check(
    models: Mapping[str, nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    every: Any,
    flow_every: Any,
    keep: Any,
) -> None:
    """Refuse arguments and setups that would give wrong numbers."""
    for name, value in {"every": every, "flow_every": flow_every}.items():
        if not is_integer(value) and (name, value) != ("flow_every", None):
            raise SkipscopeError(
                "watch",
                f"{name} is the number of steps from one reading to the next",
                expected="1 or more",
                got=repr(value),
                cure=f"{name}=10",
            )
    if keep is not None and not (isinstance(keep, int) and keep >= 2):
        raise SkipscopeError(
            "watch",
            "keep is the number of rows held in memory",
            expected="2 or more",
            got=repr(keep),
            cure="keep=100",
        )
    if not optimizers:
        raise SkipscopeError(
            "watch",
            "no optimizer was given",
            expected="an optimizer, or a list of them",
            got="[]",
            cure="watch(model, optimizer)",
        )
    for model in models.values():
        require_module(model, "watch")
        refuse_shared(model, "watch")
        refuse_flattened(model, "watch")
    known = names_of(models)
    if not any(id(p) in known for o in optimizers for group in o.param_groups for p in group["params"]):
        raise SkipscopeError(
            "watch",
            "the optimizer updates none of the model's parameters",
            expected="an optimizer made from model.parameters()",
            got="an optimizer of other tensors (made before the parameters were replaced?)",
            cure="make the optimizer after the model is in its final form",
        )
