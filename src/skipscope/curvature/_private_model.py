"""Private copy of the user's model, to move and to differentiate, and a batch's loss on it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from skipscope._cached_weights import refuse_full_caches, tensors_kept
from skipscope._data import Batch, Objective, forward, map_tensors
from skipscope._errors import SkipscopeError
from skipscope._model_calls import no_gradient
from skipscope._random import refuse_noise
from skipscope._sharding import units
from skipscope._untouched import private_copy, set_mode, untouched, whole_copy
from skipscope._validation import names_matching
from skipscope.curvature._curvature_results import Layout

Selection = str | Iterable[str] | None


@dataclass
class PrivateModel:
    """Copy of the user's model.

    Attributes:
        module: the copied module.
        names: names of the chosen parameters.
        parameters: the chosen parameters, as leaves that require a gradient; no other parameter does.
        objective: the loss.
        seed: random seed of the first batch; every pass over a batch draws the same numbers.
        operation: public call named in errors.
        throwaway: whether the parameters may differ by rounding after a move forth and back.
    """

    module: nn.Module
    names: list[str]
    parameters: list[nn.Parameter]
    objective: Objective
    seed: int
    operation: str
    throwaway: bool = False
    _twin: PrivateModel | None = None

    @property
    def layout(self) -> Layout:
        """Names and shapes of the parameters in a flat vector."""
        return Layout(tuple(self.names), tuple(tuple(p.shape) for p in self.parameters))

    def running(self, index: int):
        """Context for a forward pass over batch number ``index``."""
        return untouched(self.module, seed=self.seed + index, operation=self.operation)

    def output_and_loss(self, batch: Batch, index: int, *, output: bool = False) -> tuple[Any, Tensor]:
        """Run a batch. Returns the model's output (None unless ``output``) and the loss with its graph."""
        with self.running(index):
            self._own_buffers()
            if not output:
                return None, self.objective(self.module, batch)
            assert self.objective.from_output is not None
            found = forward(self.module, batch, self.operation)
            return found, self.objective.from_output(found, batch)

    def _own_buffers(self) -> None:
        # A forward pass saves the statistics that it updates in its graph, so each graph needs its own copy.
        for module in self.module.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.clone()

    def gradients(self, batch: Batch, index: int) -> list[Tensor]:
        """Gradient of the loss of a batch, one tensor per parameter."""
        _, loss = self.output_and_loss(batch, index)
        return gradients_of(loss, self.parameters)

    def refuse_hidden_parameters(self, batch: Batch, index: int) -> None:
        """Refuse parameters inside a reentrant checkpoint, whose Hessian would come out as zero.

        Only ``backward()`` reaches what a reentrant checkpoint wraps.

        Raises:
            SkipscopeError: a parameter is hidden (it is named if known), the loss draws noise that cannot
                be seeded, or the model reads a weight from its own cache.
        """
        held = {} if self.module.training else tensors_kept(self.module)
        if held:
            with self.running(index):
                refuse_full_caches(
                    self.operation, self.module, held, self.names, lambda m: self.objective(m, batch)
                )
        again = float(self.output_and_loss(batch, index)[1].detach())
        _, loss = self.output_and_loss(batch, index)
        refuse_noise(self.operation, again, float(loss.detach()), loss.dtype)
        if not loss.requires_grad:
            return self._refuse_no_gradient(batch, index)
        try:
            found = torch.autograd.grad(loss, self.parameters, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            # select_mode reports all other errors.
            if "use_reentrant" in str(error):
                raise self._hidden(None) from error
            return
        unused = [i for i, gradient in enumerate(found) if gradient is None]
        if unused:
            loss.backward()
            reached = [self.parameters[i].grad is not None for i in unused]
            for parameter in self.parameters:
                parameter.grad = None
            if any(reached):
                raise self._hidden(self.names[unused[reached.index(True)]])

    def _refuse_no_gradient(self, batch: Batch, index: int) -> None:
        """Raise if the loss depends on no parameter of the model.

        If it depends only on parameters that were not chosen, the Hessian is zero, which is not an error.
        """
        others = [p for p in self.module.parameters() if p.is_floating_point() and not p.requires_grad]
        try:
            for parameter in others:
                parameter.requires_grad_(True)
            if not self.output_and_loss(batch, index)[1].requires_grad:
                raise no_gradient(self.operation, self.module)
        finally:
            for parameter in others:
                parameter.requires_grad_(False)

    def _hidden(self, name: str | None) -> SkipscopeError:
        return SkipscopeError(
            self.operation,
            "the model has gradients under backward() only, and no second derivative",
            layer=name,
            got="a reentrant checkpoint, most likely",
            cure="checkpoint(..., use_reentrant=False)",
        )

    def doubled(self) -> PrivateModel:
        """Float64 copy of this copy, cached until the parameters move."""
        if self._twin is None:
            module = private_copy(self.module, self.operation).double()
            found = dict(module.named_parameters())
            self._twin = replace(
                self, module=module, parameters=[found[name] for name in self.names], throwaway=True
            )
        return self._twin

    def drop_double(self) -> None:
        """Free the float64 copy."""
        self._twin = None

    def gradient_in_parts(
        self, batch: Batch, index: int, read: Callable[[int, Tensor], Tensor]
    ) -> list[Tensor]:
        """Apply ``read(i, gradient)`` to each parameter's gradient, and free the gradient at once."""
        _, loss = self.output_and_loss(batch, index)
        found: dict[int, Tensor] = {}
        if loss.requires_grad:

            def keep(i: int, parameter: Tensor) -> None:
                assert parameter.grad is not None
                found[i], parameter.grad = read(i, parameter.grad), None

            handles = [
                parameter.register_post_accumulate_grad_hook(functools.partial(keep, i))
                for i, parameter in enumerate(self.parameters)
            ]
            try:
                loss.backward()
            finally:
                for handle in handles:
                    handle.remove()
        return [
            found[i] if i in found else read(i, torch.zeros_like(parameter))
            for i, parameter in enumerate(self.parameters)
        ]

    def move(self, moves: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        """Overwrite parameters of the copy."""
        self._twin = None
        with torch.no_grad():
            for parameter, value in moves:
                parameter.copy_(value)


def gradients_of(loss: Tensor, parameters: list[nn.Parameter], *, create_graph: bool = False) -> list[Tensor]:
    """Gradient of the loss by each parameter; zeros if the loss does not depend on it."""
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(loss, parameters, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def in_double(model: PrivateModel, batch: Batch, index: int) -> tuple[PrivateModel, Batch] | None:
    """Convert model and batch to float64. Returns None if they cannot be run in it."""
    if model.parameters[0].dtype == torch.float64:
        return model, batch
    try:
        twin, batch = model.doubled(), map_tensors(batch, _doubled)
        if twin.output_and_loss(batch, index)[1].dtype != torch.float64:
            return None
    except Exception:
        # For instance a class weight in float32, or a kernel without float64.
        return None
    return twin, batch


def _doubled(value: Any) -> Any:
    return value.double() if value.is_floating_point() else value


def private_model(
    model: nn.Module,
    objective: Objective,
    operation: str,
    *,
    parameters: Selection = None,
    training: bool | None = False,
    seed: int = 0,
) -> PrivateModel:
    """Copy ``model``; see :class:`PrivateModel`.

    Args:
        model: the user's model; only read.
        objective: the loss.
        operation: public call named in errors.
        parameters: names or patterns (``"layer1.*"``); None for all that require a gradient.
        training: whether to run in training mode; None keeps each module's flag.
        seed: random seed for random numbers inside the model.

    Raises:
        SkipscopeError: the model cannot be copied, no parameter was chosen, or a chosen parameter is complex.
    """
    own = whole_copy(model, operation) if units(model) else private_copy(model, operation)
    if training is not None:
        set_mode(own, training)
    chosen = _chosen(
        [n for n, p in model.named_parameters() if p.requires_grad], parameters, model, operation
    )
    for module in own.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            # A sparse gradient cannot be differentiated again; a dense gradient has the same values.
            module.sparse = False
    found = dict(own.named_parameters())
    for name in chosen:
        if found[name].is_complex():
            raise SkipscopeError(
                operation,
                "the Hessian by complex parameters is not defined here",
                layer=name,
                expected="real parameters",
                got=str(found[name].dtype),
                cure="choose the real ones: parameters=[...]",
            )
    for name, parameter in found.items():
        parameter.requires_grad_(name in chosen)
        parameter.grad = None
    names = [name for name in found if name in chosen]
    return PrivateModel(own, names, [found[n] for n in names], objective, seed, operation)


def _chosen(available: list[str], wanted: Selection, model: nn.Module, operation: str) -> set[str]:
    every = [name for name, p in model.named_parameters() if p.is_floating_point() or p.is_complex()]
    if wanted is None:
        chosen, pattern = set(available), "all that require a gradient"
    else:
        patterns = [wanted] if isinstance(wanted, str) else list(wanted)
        chosen, pattern = names_matching(every, patterns, operation), ", ".join(patterns)
    if not chosen:
        raise SkipscopeError(
            operation,
            "there is no parameter to measure the curvature in",
            got=pattern,
            cure='requires_grad_(True), or parameters=["..."]',
        )
    return chosen
