"""Makers of the networks to train: from a factory, or as copies of a module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from skipscope._errors import SkipscopeError
from skipscope._random import random_state_kept
from skipscope._torch_private import accumulation_hooks, gradient_hooks
from skipscope._untouched import private_copy, require_module
from skipscope.shortcuts import refuse_shared


@dataclass(frozen=True)
class Maker:
    """Maker of a network from a seed; the global random states are restored.

    Attributes:
        build: function that makes the network with the current random states.
    """

    build: Callable[[], nn.Module]

    def __call__(self, seed: int) -> nn.Module:
        with random_state_kept(seed):
            return self.build()


def maker_of(name: str, twin: nn.Module | Callable[[], nn.Module], notes: dict[str, None]) -> Maker:
    """Check a twin and wrap it in a Maker of networks in training mode; remarks become notes."""
    if isinstance(twin, nn.Module):
        refuse_shared(twin, "train_twins", name)
        if any(map(accumulation_hooks, twin.parameters())):
            raise SkipscopeError(
                "train_twins",
                "parameters carry hooks that act once their gradient is there, and would act on the model"
                " itself",
                layer=name,
                expected="a model without an optimizer in its backward pass",
                got="register_post_accumulate_grad_hook",
                cure="pass a factory that makes the model and its hooks: train_twins({name: make}, ...)",
            )
        return Maker(lambda: _in_training(_copy_with_hooks(twin), name, notes))

    if not callable(twin):
        raise SkipscopeError(
            "train_twins",
            "a twin is neither a module nor a function that makes one",
            layer=name,
            expected='{"with": make_a, "without": make_b}',
            got=type(twin).__name__,
            cure="pass the module, or a function without arguments that returns a fresh one",
        )

    def build() -> nn.Module:
        model = twin()
        require_module(model, f"train_twins ({name})")
        refuse_shared(model, "train_twins", name)
        return _in_training(model, name, notes)

    return Maker(build)


def _copy_with_hooks(model: nn.Module) -> nn.Module:
    """Copy a model with the gradient hooks of its parameters, which ``deepcopy`` drops."""
    copied = private_copy(model, "train_twins")
    for parameter, own in zip(model.parameters(), copied.parameters(), strict=True):
        if not gradient_hooks(own):
            for hook in gradient_hooks(parameter):
                own.register_hook(hook)
    return copied


def _in_training(model: nn.Module, name: str, notes: dict[str, None]) -> nn.Module:
    """Put a model into training mode if every module is in evaluation mode; mixed modes are kept."""
    modes = {module.training for module in model.modules()}
    if modes == {False}:
        notes.setdefault(f"{name} was in evaluation mode, and was trained in training mode")
        return model.train()
    if len(modes) > 1:
        notes.setdefault(f"{name} was trained with some modules in evaluation mode, as they were found")
    return model
