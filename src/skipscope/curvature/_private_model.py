"""A private copy of the user's model, to move and to differentiate, and a batch's loss on it."""

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
    """A model of our own, equal to the user's when it was made.

    Attributes:
        module: the copy.
        names: of the chosen parameters.
        parameters: the chosen parameters, leaves that require a gradient; all others do not.
        objective: the loss.
        seed: of the random numbers of the first batch; every pass over a batch draws the same.
        operation: named in errors.
        throwaway: a copy made to look at, whose parameters need not come back to the last bit after a move.
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
        """How flat vectors are cut."""
        return Layout(tuple(self.names), tuple(tuple(p.shape) for p in self.parameters))

    def running(self, index: int):
        """The context in which batch number ``index`` is run."""
        return untouched(self.module, seed=self.seed + index, operation=self.operation)

    def output_and_loss(self, batch: Batch, index: int, *, output: bool = False) -> tuple[Any, Tensor]:
        """The loss of a batch, with its graph; and the model's output if it is asked for (else None)."""
        with self.running(index):
            self._own_buffers()
            if not output:
                return None, self.objective(self.module, batch)
            assert self.objective.from_output is not None
            found = forward(self.module, batch, self.operation)
            return found, self.objective.from_output(found, batch)

    def _own_buffers(self) -> None:
        # Statistics that a forward pass updates are saved in its graph: each graph gets its own.
        for module in self.module.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.clone()

    def gradients(self, batch: Batch, index: int) -> list[Tensor]:
        """The gradient of the loss of a batch, one tensor a parameter."""
        _, loss = self.output_and_loss(batch, index)
        return gradients_of(loss, self.parameters)

    def refuse_hidden_parameters(self, batch: Batch, index: int) -> None:
        """Refuse parameters that a reentrant checkpoint hides, whose Hessian would come out as zero.

        Such a checkpoint hides what it runs over from everything but ``backward()``.

        Raises:
            SkipscopeError: naming such a parameter, where it is known; or the loss draws noise that cannot
                be seeded, or the model reads a weight from a cache of its own.
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
        except RuntimeError as error:  # the choice of a mode reports all others
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

        If it depends on some, but on none of the chosen, the Hessian is zero, which is no error.
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
        """A copy of the copy, in float64; made once for a point."""
        if self._twin is None:
            module = private_copy(self.module, self.operation).double()
            found = dict(module.named_parameters())
            self._twin = replace(
                self, module=module, parameters=[found[name] for name in self.names], throwaway=True
            )
        return self._twin

    def drop_double(self) -> None:
        """Let go of the copy in float64."""
        self._twin = None

    def gradient_in_parts(
        self, batch: Batch, index: int, read: Callable[[int, Tensor], Tensor]
    ) -> list[Tensor]:
        """``read(i, gradient)`` of each parameter i; a gradient is let go of as soon as it has been read."""
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
        """Give parameters of the copy other values."""
        self._twin = None
        with torch.no_grad():
            for parameter, value in moves:
                parameter.copy_(value)


def gradients_of(loss: Tensor, parameters: list[nn.Parameter], *, create_graph: bool = False) -> list[Tensor]:
    """dL/dp for each parameter, zeros where the loss does not depend on it."""
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(loss, parameters, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def in_double(model: PrivateModel, batch: Batch, index: int) -> tuple[PrivateModel, Batch] | None:
    """The same model and batch in float64, or None where something cannot be run in it."""
    if model.parameters[0].dtype == torch.float64:
        return model, batch
    try:
        twin, batch = model.doubled(), map_tensors(batch, _doubled)
        if twin.output_and_loss(batch, index)[1].dtype != torch.float64:
            return None
    except Exception:  # a class weight in float32, a kernel without float64, ...
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
        model: the user's; only read.
        objective: the loss.
        operation: named in errors.
        parameters: names or patterns (``"layer1.*"``); None for all that require a gradient.
        training: the mode to run in; None keeps each module's flag.
        seed: of the random numbers inside the model.

    Raises:
        SkipscopeError: the model cannot be copied, no parameter was chosen, or one of them is complex.
    """
    own = whole_copy(model, operation) if units(model) else private_copy(model, operation)
    if training is not None:
        set_mode(own, training)
    chosen = _chosen(
        [n for n, p in model.named_parameters() if p.requires_grad], parameters, model, operation
    )
    for module in own.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = (
                False  # a sparse gradient cannot be differentiated again; a dense one is the same numbers
            )
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
