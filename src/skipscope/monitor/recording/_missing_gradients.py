"""Causes of missing gradients, found by observing one step.

The main causes: the gradients were cleared between ``backward`` and the step; no ``backward`` ran; it ran,
but no path leads from the loss to the parameters; or the modules that hold them were not called. Parameters
have a hook during the observed step only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from skipscope import _torch_private
from skipscope._option_words import MissingCause
from skipscope._untouched import is_measuring
from skipscope.monitor.recording._tracked_parameters import TrackedParameters, names_of


@dataclass(frozen=True)
class MissingGradients:
    """Cause of missing gradients.

    Attributes:
        cause: ``"cleared"``, ``"no backward"``, ``"detached"``, ``"replaced"``, ``"unused"``, or ``"zero"``
            if the gradients arrived and were exactly 0.
        reason: the cause in a sentence.
        advice: what to do.
        unused: parameters of modules that were not called.
    """

    cause: MissingCause
    reason: str
    advice: str
    unused: tuple[str, ...] = ()


class GradientSearch:
    """Observer of the next step of an optimizer.

    Args:
        tracked: parameters of the optimizer.
        models: models by prefix.
    """

    def __init__(self, tracked: TrackedParameters, models: Mapping[str, nn.Module]):
        self.tracked, self.models = tracked, models
        self._arrived: set[int] = set()
        self._called: set[int] = set()
        self._hooks: list[Any] = [module_hooks.register_module_forward_pre_hook(self._note_call)]
        for i, p in enumerate(tracked.parameters):
            if p.requires_grad and p.is_leaf:
                self._hooks.append(p.register_post_accumulate_grad_hook(self._note_arrival(i)))
        # Compiled code would not call hooks that are added after compilation.
        self._is_eager = _torch_private.eager.begin()
        self._passes = _torch_private.count_backward_passes()

    def _note_call(self, module: nn.Module, _: Any) -> None:
        if not is_measuring():
            self._called.add(id(module))

    def _note_arrival(self, i: int):
        def note(parameter: Tensor) -> None:
            grad = parameter.grad
            if grad is not None and not is_measuring() and bool((grad.detach() != 0).any()):
                self._arrived.add(i)

        return note

    def conclude(self) -> MissingGradients | None:
        """The cause of missing gradients in the observed step, or None if no gradient is missing."""
        passes = _torch_private.count_backward_passes() - self._passes - 1
        self.close()
        parameters, names = self.tracked.parameters, self.tracked.names
        trained = [i for i, p in enumerate(parameters) if p.requires_grad]
        none = [i for i in trained if parameters[i].grad is None]
        empty = none or [i for i in trained if not _is_nonzero(parameters[i].grad)]
        if not empty:
            return None
        if not set(names_of(self.models)) & {id(parameters[i]) for i in empty}:
            return MissingGradients(
                "replaced",
                "the optimizer updates tensors that are no longer parameters of the model",
                "Make the optimizer after the model is in its final form.",
            )
        cleared = [i for i in empty if i in self._arrived]
        if cleared:
            return MissingGradients(
                "cleared",
                f"the gradients were cleared between backward() and step(): {len(cleared)} of {len(trained)}"
                " parameters had one after backward() and have none at step()",
                "Call zero_grad() before backward() or after step(), not between them.",
            )
        if len(empty) == len(trained) and not passes:
            return MissingGradients(
                "no backward",
                "no backward() ran since the last step()",
                "Call loss.backward() before optimizer.step().",
            )
        if not none:
            return (
                None
                if len(empty) < len(trained)
                else MissingGradients(
                    "zero",
                    "backward() ran, and every gradient that it brought is exactly 0",
                    "Check the activations before the loss (dead or saturated units) and the loss itself.",
                )
            )
        return self._cut(none, [names[i] for i in none], len(trained), bool(self._arrived))

    def _cut(
        self, none: Sequence[int], names: Sequence[str], trained: int, any_arrived: bool
    ) -> MissingGradients:
        """The cause for parameters that no gradient reached: not called, or not connected to the loss."""
        holders: dict[int, list[nn.Module]] = {}
        for module in (m for model in self.models.values() for m in model.modules()):
            for p in module._parameters.values():
                if p is not None:
                    holders.setdefault(id(p), []).append(module)
        unused = tuple(
            name
            for i, name in zip(none, names)
            if (found := holders.get(id(self.tracked.parameters[i])))
            and not any(id(m) in self._called for m in found)
        )
        cut = [name for name in names if name not in unused]
        if cut:
            which = "any parameter" if len(none) == trained else _few(cut)
            return MissingGradients(
                "detached",
                f"backward() ran, but no path leads from the loss to {which}",
                "Look for detach(), no_grad(), .item(), .data or a new tensor between them and the loss.",
                unused,
            )
        if not any_arrived:
            return MissingGradients(
                "detached",
                "backward() ran, but not through the model: none of the modules that hold parameters was"
                " called",
                "Compute the loss from this model's output.",
            )
        return MissingGradients(
            "unused",
            f"the forward pass does not call the modules that hold {_few(unused)}",
            "Leave them out of the model, or call them.",
            unused,
        )

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._is_eager:
            self._is_eager = False
            _torch_private.eager.end()


def _is_nonzero(grad: Tensor | None) -> bool:
    if grad is None:
        return False
    local: Tensor = grad.to_local() if hasattr(grad, "to_local") else grad  # type: ignore[operator]
    return bool((local.detach() != 0).any())


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
