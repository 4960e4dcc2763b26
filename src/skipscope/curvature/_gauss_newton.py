"""Modes of multiplying a batch's Gauss-Newton matrix with a vector.

With f the model's outputs, l the loss as a function of them and J = df/dp, the matrix is J' (d2l/df2) J
(Schraudolph 2002): the Hessian of the loss of the linearised model. The modes differ in how they compute
``J v``; the rest runs in reverse mode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipscope._data import Batch, inputs_of, tensors_in
from skipscope._errors import SkipscopeError
from skipscope.curvature._hessian_products import Differences, Tangent, backward, difference, each
from skipscope.curvature._private_model import PrivateModel


@dataclass(frozen=True)
class _Linearised:
    """A batch's outputs with their graph, and the loss's gradient by them with its graph."""

    model: PrivateModel
    batch: Batch
    index: int
    # Which of the output's tensors the loss reads.
    positions: list[int]
    outputs: list[Tensor]
    leaves: list[Tensor]
    loss_gradient: list[Tensor]

    def pull_back(self, changes: list[Tensor]) -> Tangent:
        """Compute ``J' (d2l/df2) changes``."""
        live = [i for i, g in enumerate(self.loss_gradient) if g.requires_grad]
        if not live:
            return [torch.zeros_like(p) for p in self.model.parameters]
        bent = backward([self.loss_gradient[i] for i in live], self.leaves, [changes[i] for i in live])
        return backward(self.outputs, self.model.parameters, bent)


def _linearise(model: PrivateModel, batch: Batch, index: int) -> _Linearised:
    from_output = model.objective.from_output
    if from_output is None:
        raise SkipscopeError(
            model.operation,
            "the Gauss-Newton matrix needs the loss as a function of the model's output",
            expected="loss(output, target)",
            got=f"the objective {model.objective.name!r} of model and batch",
            cure='pass loss(output, target), or use matrix="hessian"',
        )
    output, _ = model.output_and_loss(batch, index, output=True)
    every = tensors_in(output)
    leaves = {i: t.detach().requires_grad_() for i, t in enumerate(every) if t.requires_grad}
    swap = {id(every[i]): leaf for i, leaf in leaves.items()}
    with model.running(index):
        loss = from_output(_rebuilt(output, swap), batch)
    found = (None,) * len(leaves)
    if loss.requires_grad and leaves and not any(loss is leaf for leaf in leaves.values()):
        found = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
    gradient = {i: g for i, g in zip(leaves, found, strict=True) if g is not None}
    if not gradient:
        raise SkipscopeError(
            model.operation,
            "the loss does not depend on the model's output, so it has no Gauss-Newton matrix",
            got=f"{model.objective.name} of an output of type {type(output).__name__}",
            cure=(
                "pass a loss(output, target) that reads the output's tensors; an output's own .loss cannot be"
                " split"
            ),
        )
    positions = list(gradient)
    return _Linearised(
        model,
        batch,
        index,
        positions,
        [every[i] for i in positions],
        [leaves[i] for i in positions],
        list(gradient.values()),
    )


class GaussNewtonReverse:
    """``J v`` in reverse mode only, as the derivative of ``u -> J' u``, which is linear in u."""

    name = "reverse over reverse"

    def prepare(
        self, model: PrivateModel, batch: Batch, index: int
    ) -> tuple[_Linearised, list[Tensor], Tangent]:
        """Linearise the batch and build the graph of ``J' u``."""
        linear = _linearise(model, batch, index)
        probes = [torch.zeros_like(t, requires_grad=True) for t in linear.outputs]
        pulled = torch.autograd.grad(
            linear.outputs, model.parameters, probes, create_graph=True, allow_unused=True
        )
        return (
            linear,
            probes,
            [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters, pulled, strict=True)],
        )

    def product(
        self, prepared: tuple[_Linearised, list[Tensor], Tangent], tangents: list[Tangent]
    ) -> list[Tangent]:
        """Run three backward passes per tangent, one of them through the loss only."""
        linear, probes, pulled = prepared
        live = [i for i, g in enumerate(pulled) if g.requires_grad]
        return [
            linear.pull_back(backward([pulled[i] for i in live], probes, [tangent[i] for i in live]))
            for tangent in tangents
        ]


class GaussNewtonForward:
    """``J v`` in forward mode."""

    name = "forward over reverse"

    def prepare(self, model: PrivateModel, batch: Batch, index: int) -> _Linearised:
        """Linearise the batch."""
        return _linearise(model, batch, index)

    def product(self, prepared: _Linearised, tangents: list[Tangent]) -> list[Tangent]:
        """Run one forward and one backward pass per tangent."""
        model, point = prepared.model, tuple(p.detach() for p in prepared.model.parameters)

        def along(*tangent: Tensor) -> tuple[Tensor, ...]:
            return torch.func.jvp(lambda *values: _outputs_at(prepared, values), point, tangent)[1]

        with model.running(prepared.index):
            changes = each(along, tangents)
        return [prepared.pull_back(change) for change in changes]


class GaussNewtonDifferences(Differences):
    """``J v`` as the central difference of two outputs."""

    def product(self, prepared: tuple[PrivateModel, Batch, int], tangents: list[Tangent]) -> list[Tangent]:
        """Run two forward passes per tangent, then linearise once for the products with ``J'``."""
        model, batch, index = prepared
        positions = _linearise(*prepared).positions

        def outputs() -> list[Tensor]:
            every = tensors_in(model.output_and_loss(batch, index, output=True)[0])
            return [every[i].detach() for i in positions]

        changes = [difference(model, tangent, outputs, self.step) for tangent in tangents]
        linear = _linearise(*prepared)
        return [linear.pull_back(change) for change in changes]


def _outputs_at(linear: _Linearised, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    inputs = inputs_of(linear.batch)
    given = dict(zip(linear.model.names, values, strict=True))
    if isinstance(inputs, Mapping):
        output = torch.func.functional_call(linear.model.module, given, (), dict(inputs))
    else:
        output = torch.func.functional_call(
            linear.model.module, given, tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        )
    every = tensors_in(output)
    return tuple(every[i] for i in linear.positions)


def _rebuilt(value: Any, swap: dict[int, Tensor]) -> Any:
    """Replace tensors inside nested containers, keeping the container types (Hugging Face outputs too)."""
    if isinstance(value, Tensor):
        return swap.get(id(value), value)
    if isinstance(value, Mapping):
        items = {key: _rebuilt(item, swap) for key, item in value.items()}
        return type(value)(**items) if hasattr(value, "__dataclass_fields__") else items
    if isinstance(value, list | tuple):
        parts = [_rebuilt(item, swap) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: _rebuilt(getattr(value, f.name), swap) for f in dataclasses.fields(value)}
        )
    return value
