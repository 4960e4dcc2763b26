"""Classification accuracy, with scores and targets read from the cross-entropy call of the loss.

The loss is run once under a recorder. If it calls torch's cross-entropy (or negative log-likelihood) exactly
once, with integer targets from the batch, the accuracy uses the scores and targets of that call. This covers
custom losses, models that compute their own loss, and shifted labels. A contrastive loss, which makes its own
targets, has no accuracy.
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
    """Accuracy over all batches, in evaluation mode; None if the targets are not classes."""
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
    if len(listener.recordings) != 1 or listener.recordings[0] is None:
        return None
    scores, targets, ignored = listener.recordings[0]
    counts = targets != ignored
    named = scores.argmax(1 if scores.ndim > 1 else 0)
    return int(((named == targets) & counts).sum()), int(counts.sum())


def _is_integer_tensor(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and not (tensor.is_floating_point() or tensor.is_complex())


class _ClassLosses(TorchFunctionMode):
    """Recorder of the scores, targets and ``ignore_index`` of each cross-entropy call.

    A call whose targets are not integers from the batch is recorded as None.
    """

    def __init__(self, batch: Any):
        super().__init__()
        self.recordings: list[tuple[Tensor, Tensor, int] | None] = []
        self.of_batch: dict[int, Tensor] = {id(t): t for t in filter(_is_integer_tensor, tensors_in(batch))}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _SIGNATURES:
            self.recordings.append(self._classes(func, args, kwargs))
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if not name.startswith("new_") and not name.endswith("_like") and self._reads_batch(args, kwargs):
            written = [args[0]] if name == "__setitem__" else tensors_in(result)
            self.of_batch |= {id(t): t for t in written if _is_integer_tensor(t)}
        return result

    def _reads_batch(self, args: Any, kwargs: Any) -> bool:
        return any(id(tensor) in self.of_batch for tensor in tensors_in([*args, *kwargs.values()]))

    def _classes(self, func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, int] | None:
        given = _SIGNATURES[func].bind(*args, **kwargs).arguments
        if id(given["target"]) not in self.of_batch:
            return None
        return given["input"].detach(), given["target"], given.get("ignore_index", _IGNORED)
