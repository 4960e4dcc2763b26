"""The share of targets that a network names rightly, where the targets are classes; None where they are not.

Classes are what a cross-entropy says they are. The loss is run once and listened to: where it calls torch's
cross-entropy (or negative log-likelihood) once, on whole numbers that come from the batch, its scores and its
targets are those of the accuracy. So a loss of one's own, a model that computes its loss and labels that are
shifted by one are read alike; a contrastive loss, whose targets it makes itself, has no accuracy.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skipscope._data import Objective, tensors_in, without_gradients
from skipscope._untouched import untouched

_IGNORED = -100
_SIGNATURES = {loss: inspect.signature(loss) for loss in (F.cross_entropy, F.nll_loss)}


def accuracy(model: nn.Module, objective: Objective, batches: Iterable[Any]) -> float | None:
    """The share over all batches, in evaluation mode; None where the targets are no classes."""
    right = counted = 0
    with untouched(model, training=False, seed=0, operation="train_twins"):
        for batch in batches:
            found = without_gradients(partial(_right_and_counted, model, objective, batch))
            if found is None:
                return None
            right, counted = right + found[0], counted + found[1]
    return right / counted if counted else None


def _right_and_counted(model: nn.Module, objective: Objective, batch: Any) -> tuple[int, int] | None:
    listener = _ClassLosses(batch)
    with listener:
        objective(model, batch)
    if len(listener.heard) != 1 or listener.heard[0] is None:
        return None
    scores, targets, ignored = listener.heard[0]
    counts = targets != ignored
    named = scores.argmax(1 if scores.ndim > 1 else 0)
    return int(((named == targets) & counts).sum()), int(counts.sum())


def _is_whole(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and not (tensor.is_floating_point() or tensor.is_complex())


class _ClassLosses(TorchFunctionMode):
    """Recorder of the scores, targets and ``ignore_index`` of each cross-entropy call.

    None stands for a call whose targets are not the batch's classes.
    """

    def __init__(self, batch: Any):
        super().__init__()
        self.heard: list[tuple[Tensor, Tensor, int] | None] = []
        self.of_batch: dict[int, Tensor] = {id(t): t for t in filter(_is_whole, tensors_in(batch))}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _SIGNATURES:
            self.heard.append(self._classes(func, args, kwargs))
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if not name.startswith("new_") and not name.endswith("_like") and self._takes_some(args, kwargs):
            written = [args[0]] if name == "__setitem__" else tensors_in(result)
            self.of_batch |= {id(t): t for t in written if _is_whole(t)}
        return result

    def _takes_some(self, args: Any, kwargs: Any) -> bool:
        return any(id(tensor) in self.of_batch for tensor in tensors_in([*args, *kwargs.values()]))

    def _classes(self, func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, int] | None:
        given = _SIGNATURES[func].bind(*args, **kwargs).arguments
        if id(given["target"]) not in self.of_batch:
            return None
        return given["input"].detach(), given["target"], given.get("ignore_index", _IGNORED)
