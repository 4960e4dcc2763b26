"""What torch calls before an optimizer step, listened to while a monitor is open.

Two of torch's own functions are wrapped, and put back when the last monitor closes: the one inside
``clip_grad_norm_`` that scales the gradients (so that it is heard however it was imported), and
``GradScaler.step`` (which knows the loss scale, and alone knows of a step that it skipped).
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grad


class Listener(Protocol):
    """Who wants to hear."""

    def wants_clips(self) -> bool:
        """Whether the coming step is recorded."""
        ...

    def clipped(self, parameters: list[Tensor], factor: Tensor, total: Tensor) -> None:
        """Gradients were multiplied by ``factor`` because their total norm was ``total``."""
        ...

    def clipped_by_value(self, parameters: list[Tensor]) -> None:
        """Elements were clipped one by one: what they were is not known."""
        ...

    def scaled_step(self, optimizer: Any, scale: Tensor, step: Callable[[], Any]) -> Any:
        """``GradScaler.step(optimizer)``: call ``step`` and return what it returns."""
        ...


_listeners: weakref.WeakSet[Any] = weakref.WeakSet()
_originals: list[tuple[Any, str, Any, Any]] = []  # (where, name, torch's own, ours)
_lock = threading.RLock()


def register(listener: Listener) -> None:
    """Begin to tell ``listener``; it is not kept alive by it."""
    with _lock:
        _listeners.add(listener)
        if not _originals:
            _wrap(clip_grad, "_clip_grads_with_norm_", _clip_by_norm)
            _wrap(torch.nn.utils, "clip_grads_with_norm_", _clip_by_norm)
            _wrap(clip_grad, "clip_grad_value_", _clip_by_value)
            _wrap(torch.nn.utils, "clip_grad_value_", _clip_by_value)
            _wrap(torch.amp.GradScaler, "step", _scaler_step)


def registered() -> list[Any]:
    """All that are open."""
    return list(_listeners)


def unregister(listener: Listener) -> None:
    """Stop telling it; with the last one torch is as it was."""
    with _lock:
        _listeners.discard(listener)
        if not _listeners:
            for where, name, original, ours in _originals:
                if (
                    getattr(where, name) is ours
                ):  # someone else's wrapper around ours stays, and ours just passes on
                    setattr(where, name, original)
            _originals.clear()


def _wrap(where: Any, name: str, make: Callable[[Any], Any]) -> None:
    original = getattr(where, name, None)
    if original is not None:
        ours = functools.wraps(original)(make(original))
        setattr(where, name, ours)
        _originals.append((where, name, original, ours))


def _parameters(parameters: Any) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _clip_by_norm(original: Any) -> Any:
    def clip(parameters, max_norm, total_norm, foreach=None):
        parameters = _parameters(parameters)
        result = original(parameters, max_norm, total_norm, foreach)
        if torch.compiler.is_compiling():
            return result
        listeners = [listener for listener in _listeners if listener.wants_clips()]
        if listeners:
            total = total_norm.detach() if isinstance(total_norm, Tensor) else torch.tensor(float(total_norm))
            if hasattr(total, "full_tensor"):
                total = total.full_tensor()  # type: ignore[operator]
            factor = torch.clamp(float(max_norm) / (total + 1e-6), max=1.0)  # torch's own formula
            for listener in listeners:
                listener.clipped(parameters, factor, total)
        return result

    return clip


def _clip_by_value(original: Any) -> Any:
    def clip(parameters, *args, **kwargs):
        parameters = _parameters(parameters)
        result = original(parameters, *args, **kwargs)
        if torch.compiler.is_compiling():
            return result
        for listener in list(_listeners):
            listener.clipped_by_value(parameters)
        return result

    return clip


def _scaler_step(original: Any) -> Any:
    def step(self, optimizer, *args, **kwargs):
        call: Callable[[], Any] = functools.partial(original, self, optimizer, *args, **kwargs)
        if self._enabled:
            for listener in list(_listeners):
                call = functools.partial(listener.scaled_step, optimizer, self._scale, call)
        return call()

    return step
