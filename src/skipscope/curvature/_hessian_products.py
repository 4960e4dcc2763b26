"""Modes of multiplying a batch's Hessian with a vector.

With p the parameters, L the loss of a batch and g = dL/dp:

    H v = d(g . v)/dp                       reverse over reverse: the gradient's graph, kept, run backward
        = d g(p + t v)/dt                   forward over reverse
        = (g(p + h v) - g(p - h v)) / 2h    finite differences

(Pearlmutter 1994.) ``Mode.prepare`` does once what does not depend on v; ``Mode.product`` does the rest.
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

# One tensor per parameter.
Tangent = list[Tensor]


class Mode(Protocol):
    """Strategy for multiplying one batch's matrix with vectors."""

    name: str

    def prepare(self, model: PrivateModel, batch: Batch, index: int) -> Any:
        """Precompute what all products on this batch share, at the model's current parameters."""
        ...

    def product(self, prepared: Any, tangents: list[Tangent]) -> list[Tangent]:
        """Multiply the batch's matrix with each tangent."""
        ...


# --- Hessian ---


@dataclass(frozen=True)
class _Graph:
    parameters: list[nn.Parameter]
    gradients: list[Tensor]


class ReverseOverReverse:
    """Keep the gradient's graph and run it backward once per product.

    A layer's gradient takes 3 matrix products and its Hessian product 6 (2 and 2 for the first layer), so a
    product costs at most about twice a gradient if matrix products dominate.
    """

    name = "reverse over reverse"

    def prepare(self, model: PrivateModel, batch: Batch, index: int) -> _Graph:
        """Compute the gradient and keep its graph."""
        try:
            with SharedDerivatives():
                _, loss = model.output_and_loss(batch, index)
        except RuntimeError:
            # torch.func inside the loss does not accept custom autograd functions.
            _, loss = model.output_and_loss(batch, index)
        return _Graph(model.parameters, gradients_of(loss, model.parameters, create_graph=True))

    def product(self, prepared: _Graph, tangents: list[Tangent]) -> list[Tangent]:
        """Run one backward pass through the gradient's graph per tangent."""
        live = [i for i, g in enumerate(prepared.gradients) if g.requires_grad]
        # Without a graph the loss is linear in every parameter.
        if not live:
            return [[torch.zeros_like(p) for p in prepared.parameters] for _ in tangents]
        outputs = [prepared.gradients[i] for i in live]
        return [backward(outputs, prepared.parameters, [tangent[i] for i in live]) for tangent in tangents]


class ForwardOverReverse:
    """Forward-mode derivative of the gradient along v; under vmap for several vectors, if that works."""

    name = "forward over reverse"

    def prepare(self, model: PrivateModel, batch: Batch, index: int) -> tuple[PrivateModel, Batch, int]:
        """Return the arguments: nothing is precomputed."""
        return model, batch, index

    def product(self, prepared: tuple[PrivateModel, Batch, int], tangents: list[Tangent]) -> list[Tangent]:
        """Run one pass for all tangents under vmap, or one pass per tangent."""
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
    """Finite differences, for models that cannot be differentiated twice.

    Attributes:
        step: step size relative to |p|; None: the best for the precision.
    """

    step: float | None = None
    name = "finite differences"

    def prepare(self, model: PrivateModel, batch: Batch, index: int) -> tuple[PrivateModel, Batch, int]:
        """Convert model and batch to float64 if possible; no graph is kept, because the parameters move."""
        return *(in_double(model, batch, index) or (model, batch)), index

    @abstractmethod
    def product(self, prepared: tuple[PrivateModel, Batch, int], tangents: list[Tangent]) -> list[Tangent]:
        """Take the central difference of two evaluations per tangent."""

    def in_parts(
        self,
        model: PrivateModel,
        batch: Batch,
        index: int,
        tangent: Tangent,
        read: Callable[[int, Tensor], Tensor],
    ) -> list[Tensor]:
        """Apply ``read(i, part)`` to each parameter's part of one product. For checks, not for results."""
        tangent = [t.to(p.dtype) for t, p in zip(tangent, model.parameters, strict=True)]
        return [read(i, part) for i, part in enumerate(self.product((model, batch, index), [tangent])[0])]


class FiniteDifferences(Differences):
    """Central differences of gradients."""

    def product(self, prepared: tuple[PrivateModel, Batch, int], tangents: list[Tangent]) -> list[Tangent]:
        """Compute two gradients per tangent."""
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
        """Apply ``read`` as :meth:`Differences.in_parts`, but never hold a whole gradient."""
        return difference(model, tangent, lambda: model.gradient_in_parts(batch, index, read), self.step)


# --- shared ---


def backward(outputs: list[Tensor], inputs: list[Any], seeds: list[Tensor]) -> Tangent:
    """Vector-Jacobian product of ``seeds``, keeping the graph; zeros for unconnected inputs."""
    found = torch.autograd.grad(outputs, inputs, seeds, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(inputs, found, strict=True)]


class _Loss(nn.Module):
    """Module that returns the loss, so that functional_call can swap the model's parameters."""

    def __init__(self, model: PrivateModel):
        super().__init__()
        self.model, self.objective = model.module, model.objective

    def forward(self, batch: Batch) -> Tensor:
        return self.objective(self.model, batch)


def _loss_at(model: PrivateModel, values: tuple[Tensor, ...], batch: Batch) -> Tensor:
    given = {f"model.{name}": value for name, value in zip(model.names, values, strict=True)}
    return torch.func.functional_call(_Loss(model), given, (batch,))


def each(along: Callable[..., tuple[Tensor, ...]], tangents: list[Tangent]) -> list[list[Tensor]]:
    """Call ``along`` on every tangent: at once under vmap if every operation has a batching rule."""
    if len(tangents) > 1:
        try:
            stacked = torch.func.vmap(along, randomness="same")(
                *(torch.stack(parts) for parts in zip(*tangents, strict=True))
            )
            return [[part[i] for part in stacked] for i in range(len(tangents))]
        except RuntimeError:
            # Some operation has no batching rule.
            pass
    return [list(along(*tangent)) for tangent in tangents]


def difference(
    model: PrivateModel, tangent: Tangent, function: Callable[[], list[Tensor]], step: float | None = None
) -> list[Tensor]:
    """Central difference of ``function()`` along ``tangent``, by default with the optimal step size."""
    parameters = model.parameters
    parameter_norm, tangent_norm = _norm(parameters), _norm(tangent)
    if tangent_norm == 0.0:
        return [torch.zeros_like(t) for t in function()]
    size = (step or torch.finfo(parameters[0].dtype).eps ** (1 / 3)) * max(1.0, parameter_norm) / tangent_norm
    # A throwaway copy is moved back by arithmetic, which saves a second set of weights.
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
