"""Modes of multiplying a batch's Hessian with a vector.

With p the parameters, L the loss of a batch and g = dL/dp:

    H v = d(g . v)/dp                       reverse over reverse: the gradient's graph, kept, run backward
        = d g(p + t v)/dt                   forward over reverse
        = (g(p + h v) - g(p - h v)) / 2h    finite differences

(Pearlmutter 1994.) A candidate's ``prepare`` does what does not depend on v, once; ``product`` the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from skipscope._data import Batch
from skipscope.curvature._private_model import PrivateModel, gradients_of, in_double
from skipscope.curvature._smooth_activations import SharedDerivatives

Tangent = list[Tensor]  # one tensor a parameter


class Mode(Protocol):
    """Computes products for one batch."""

    name: str

    def prepare(self, model: PrivateModel, batch: Batch, index: int) -> Any:
        """What every product on this batch needs, at the model's present parameters."""
        ...

    def product(self, prepared: Any, tangents: list[Tangent]) -> list[Tangent]:
        """The batch's matrix times each tangent."""
        ...


# --- Hessian ---


@dataclass(frozen=True)
class _Graph:
    parameters: list[nn.Parameter]
    gradients: list[Tensor]


class ReverseOverReverse:
    """The gradient with its graph, which each product runs backward once more.

    A layer's gradient takes 3 matrix products and its Hessian product 6 (the first layer's 2 and 2), so a
    product costs at most about twice a gradient where these are all the work.
    """

    name = "reverse over reverse"

    def prepare(self, model: PrivateModel, batch: Batch, index: int) -> _Graph:
        """The gradient and its graph."""
        try:
            with SharedDerivatives():
                _, loss = model.output_and_loss(batch, index)
        except RuntimeError:  # torch.func inside the loss does not take functions of our own
            _, loss = model.output_and_loss(batch, index)
        return _Graph(model.parameters, gradients_of(loss, model.parameters, create_graph=True))

    def product(self, prepared: _Graph, tangents: list[Tangent]) -> list[Tangent]:
        """One backward pass through the gradient's graph a tangent."""
        live = [i for i, g in enumerate(prepared.gradients) if g.requires_grad]
        if not live:  # the loss is linear in every parameter
            return [[torch.zeros_like(p) for p in prepared.parameters] for _ in tangents]
        outputs = [prepared.gradients[i] for i in live]
        return [backward(outputs, prepared.parameters, [tangent[i] for i in live]) for tangent in tangents]


class ForwardOverReverse:
    """Derivative of the gradient along v in forward mode, under vmap for several vectors if that works."""

    name = "forward over reverse"

    def prepare(self, model: PrivateModel, batch: Batch, index: int) -> tuple[PrivateModel, Batch, int]:
        """Nothing is kept."""
        return model, batch, index

    def product(self, prepared: tuple[PrivateModel, Batch, int], tangents: list[Tangent]) -> list[Tangent]:
        """One pass for all tangents, or one a tangent."""
        model, batch, index = prepared
        point = tuple(p.detach() for p in model.parameters)

        def gradient(*values: Tensor) -> tuple[Tensor, ...]:
            return torch.func.grad(lambda given: _loss_at(model, given, batch))(values)

        def along(*tangent: Tensor) -> tuple[Tensor, ...]:
            return torch.func.jvp(gradient, point, tangent)[1]

        with model.running(index):
            return each(along, tangents)


@dataclass(frozen=True)
class Differences(ABC):
    """A derivative as the difference of two values: for what cannot be differentiated twice.

    Attributes:
        step: as a part of |p|; default: the best for the precision.
    """

    step: float | None = None
    name = "finite differences"

    def prepare(self, model: PrivateModel, batch: Batch, index: int) -> tuple[PrivateModel, Batch, int]:
        """The model and batch, in float64 if possible; no graph is kept, because the parameters move."""
        return *(in_double(model, batch, index) or (model, batch)), index

    @abstractmethod
    def product(self, prepared: tuple[PrivateModel, Batch, int], tangents: list[Tangent]) -> list[Tangent]:
        """Two values a tangent."""

    def in_parts(
        self,
        model: PrivateModel,
        batch: Batch,
        index: int,
        tangent: Tangent,
        read: Callable[[int, Tensor], Tensor],
    ) -> list[Tensor]:
        """Apply ``read(i, part)`` to each parameter's part of one product; for checks, not for results."""
        tangent = [t.to(p.dtype) for t, p in zip(tangent, model.parameters, strict=True)]
        return [read(i, part) for i, part in enumerate(self.product((model, batch, index), [tangent])[0])]


class FiniteDifferences(Differences):
    """The difference of two gradients."""

    def product(self, prepared: tuple[PrivateModel, Batch, int], tangents: list[Tangent]) -> list[Tangent]:
        """Two gradients a tangent."""
        model, batch, index = prepared
        return [
            difference(model, tangent, lambda: model.gradients(batch, index), self.step)
            for tangent in tangents
        ]

    def in_parts(
        self,
        model: PrivateModel,
        batch: Batch,
        index: int,
        tangent: Tangent,
        read: Callable[[int, Tensor], Tensor],
    ) -> list[Tensor]:
        """As :meth:`Differences.in_parts`, without ever holding a whole gradient."""
        return difference(model, tangent, lambda: model.gradient_in_parts(batch, index, read), self.step)


# --- shared ---


def backward(outputs: list[Tensor], inputs: list[Any], seeds: list[Tensor]) -> Tangent:
    """The pull-back of ``seeds`` from outputs to inputs, the graph kept; zeros where unconnected."""
    found = torch.autograd.grad(outputs, inputs, seeds, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(inputs, found, strict=True)]


class _Loss(nn.Module):
    """A module whose output is the loss, so that functional_call reaches the model's parameters."""

    def __init__(self, model: PrivateModel):
        super().__init__()
        self.model, self.objective = model.module, model.objective

    def forward(self, batch: Batch) -> Tensor:
        return self.objective(self.model, batch)


def _loss_at(model: PrivateModel, values: tuple[Tensor, ...], batch: Batch) -> Tensor:
    given = {f"model.{name}": value for name, value in zip(model.names, values, strict=True)}
    return torch.func.functional_call(_Loss(model), given, (batch,))


def each(along: Callable[..., tuple[Tensor, ...]], tangents: list[Tangent]) -> list[list[Tensor]]:
    """``along`` of every tangent: all at once under vmap where every operation has a batching rule."""
    if len(tangents) > 1:
        try:
            stacked = torch.func.vmap(along, randomness="same")(
                *(torch.stack(parts) for parts in zip(*tangents, strict=True))
            )
            return [[part[i] for part in stacked] for i in range(len(tangents))]
        except RuntimeError:  # an operation without a batching rule: one by one
            pass
    return [list(along(*tangent)) for tangent in tangents]


def difference(
    model: PrivateModel, tangent: Tangent, function: Callable[[], list[Tensor]], step: float | None = None
) -> list[Tensor]:
    """Central difference of ``function()`` along ``tangent``, by default with the optimal step size."""
    parameters = model.parameters
    here, there = _norm(parameters), _norm(tangent)
    if there == 0.0:
        return [torch.zeros_like(t) for t in function()]
    size = (step or torch.finfo(parameters[0].dtype).eps ** (1 / 3)) * max(1.0, here) / there
    # A copy made for looks alone is moved back by arithmetic, and no second set of weights is held.
    point = None if model.throwaway else [p.detach().clone() for p in parameters]
    try:
        _shift(model, tangent, size)
        ahead = [t.detach() for t in function()]
        _shift(model, tangent, -2 * size)
        behind = [t.detach() for t in function()]
    finally:
        if point is None:
            _shift(model, tangent, size)
        else:
            model.move(zip(parameters, point, strict=True))
    return [(a - b) / (2 * size) for a, b in zip(ahead, behind, strict=True)]


def _shift(model: PrivateModel, tangent: Tangent, step: float) -> None:
    model.move((p, p + step * t.to(p.dtype)) for p, t in zip(model.parameters, tangent, strict=True))


def _norm(parts: Iterable[Tensor]) -> float:
    return float(sum(float(p.detach().double().square().sum()) for p in parts)) ** 0.5
