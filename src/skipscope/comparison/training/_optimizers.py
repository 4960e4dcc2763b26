"""Optimizers of a run: torch's own by name with rates to try, or the result of a factory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skipscope._errors import SkipscopeError
from skipscope._validation import is_finite
from skipscope.comparison.training._training_arguments import require_size

# Default learning rates to try, in descending order. AdamW is used only if it is named.
RATES: dict[str, tuple[float, ...]] = {"SGD": (0.1, 0.03, 0.01, 0.003), "Adam": (0.01, 0.003, 0.001, 0.0003)}
_KNOWN = {**RATES, "AdamW": (0.01, 0.003, 0.001, 0.0003)}
MOMENTUM, DECAY = 0.9, 0.01


@dataclass(frozen=True)
class Driver:
    """An optimizer and its learning-rate scheduler, if it has one."""

    optimizer: torch.optim.Optimizer
    scheduler: Any = None

    @property
    def needs_closure(self) -> bool:
        """Whether the optimizer evaluates the loss itself (L-BFGS)."""
        closure = inspect.signature(self.optimizer.step).parameters.get("closure")
        return closure is not None and closure.default is closure.empty


@dataclass(frozen=True)
class OptimizerChoice:
    """One optimizer to train with.

    Attributes:
        name: name in tables.
        rates: learning rates to try; empty: the factory sets its own.
        factory: function of the parameters, and of a rate if ``rates`` is not empty, that makes the
            optimizer; None: torch's optimizer of that name.
    """

    name: str
    rates: tuple[float, ...]
    factory: Callable[..., Any] | None = None

    def make(self, parameters: Sequence[Tensor], rate: float | None) -> Driver:
        """Make the optimizer of these parameters.

        Raises:
            SkipscopeError: the factory does not make an optimizer.
        """
        if self.factory is None:
            assert rate is not None
            stock = {
                "SGD": partial(torch.optim.SGD, momentum=MOMENTUM),
                "Adam": torch.optim.Adam,
                "AdamW": partial(torch.optim.AdamW, weight_decay=DECAY),
            }
            return Driver(stock[self.name](parameters, lr=rate))
        made = self.factory(parameters) if rate is None else self.factory(parameters, rate)
        optimizer, scheduler = made if isinstance(made, tuple | list) and len(made) == 2 else (made, None)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise SkipscopeError(
                "train_twins",
                "the factory of an optimizer makes something else",
                layer=self.name,
                expected="a torch.optim.Optimizer, or (optimizer, scheduler)",
                got=type(made).__name__,
                cure="lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)",
            )
        return Driver(optimizer, scheduler)

    def learning_rate(self, model: nn.Module) -> float:
        """Learning rate of the first parameter group, for a factory that sets its own."""
        driver = self.make([p for p in model.parameters() if p.requires_grad], None)
        group = driver.optimizer.param_groups[0]
        return float(group.get("initial_lr", group.get("lr", float("nan"))))


def choices(operation: str, optimizers: Any) -> dict[str, OptimizerChoice]:
    """Read the ``optimizers`` argument of ``train_twins``.

    Raises:
        SkipscopeError: an unknown name, a rate that is not a number, or no optimizer at all.
    """
    if optimizers is None:
        optimizers = RATES
    if isinstance(optimizers, str):
        optimizers = [optimizers]
    if callable(optimizers):
        optimizers = {getattr(optimizers, "__name__", "optimizer"): optimizers}
    if not isinstance(optimizers, Mapping):
        optimizers = dict.fromkeys(optimizers) if isinstance(optimizers, Iterable) else {}
    found = {name: _choice(operation, name, value) for name, value in optimizers.items()}
    if not found:
        raise SkipscopeError(
            operation,
            "there is no optimizer to train with",
            expected='e.g. {"SGD": [0.1, 0.01]}',
            got=repr(optimizers)[:60],
            cure="leave optimizers out for the default",
        )
    return found


def _choice(operation: str, name: Any, value: Any) -> OptimizerChoice:
    if callable(value):
        return OptimizerChoice(name, (), value)
    factory = None
    if isinstance(value, tuple) and value and callable(value[0]):
        factory, value = value[0], value[1] if len(value) == 2 else ()
    elif name not in _KNOWN:
        raise SkipscopeError(
            operation,
            "unknown optimizer",
            expected=", ".join(_KNOWN) + ", or a factory of your own",
            got=repr(name)[:60],
            cure=f'optimizers={{"{name}": lambda parameters: torch.optim.SGD(parameters, lr=0.1)}}',
        )
    given: Any = (
        _KNOWN[name] if value is None and factory is None else (value,) if is_finite(value) else value
    )
    rates: tuple[float, ...] = tuple(given) if isinstance(given, Iterable) else ()
    if not rates:
        raise SkipscopeError(
            operation,
            f"there is no rate to train {name} with",
            expected='e.g. {"SGD": [0.1, 0.01]}',
            got=repr(value)[:60],
            cure="leave optimizers out for the default",
        )
    for rate in rates:
        require_size(operation, **{f"a rate of {name}": rate})
    return OptimizerChoice(name, tuple(dict.fromkeys(rates)), factory)
