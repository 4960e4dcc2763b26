"""How the networks that are trained are made: by a factory, or as copies of a module that is there."""

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
    """Makes a network; called with a seed, it leaves the global random states as they are.

    Attributes:
        build: makes the network from the random numbers that come next.
    """

    build: Callable[[], nn.Module]

    def __call__(self, seed: int) -> nn.Module:
        with random_state_kept(seed):
            return self.build()


def maker_of(name: str, twin: nn.Module | Callable[[], nn.Module], notes: dict[str, None]) -> Maker:
    """Make the network of one seed, ready for training; remarks become notes."""
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
    """A copy whose parameters have the same gradient hooks, which ``deepcopy`` drops."""
    copied = private_copy(model, "train_twins")
    for parameter, own in zip(model.parameters(), copied.parameters(), strict=True):
        if not gradient_hooks(own):
            for hook in gradient_hooks(parameter):
                own.register_hook(hook)
    return copied


def _in_training(model: nn.Module, name: str, notes: dict[str, None]) -> nn.Module:
    """Put a model that is wholly in evaluation mode into training mode; mixed modes stay as found."""
    modes = {module.training for module in model.modules()}
    if modes == {False}:
        notes.setdefault(f"{name} was in evaluation mode, and was trained in training mode")
        return model.train()
    if len(modes) > 1:
        notes.setdefault(f"{name} was trained with some modules in evaluation mode, as they were found")
    return model
