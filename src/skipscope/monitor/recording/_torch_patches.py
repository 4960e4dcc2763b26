"""Callbacks for gradient clipping and scaled steps, while a monitor is open.

Functions of torch are wrapped, and restored when the last monitor closes: the function inside
``clip_grad_norm_`` that scales the gradients (however ``clip_grad_norm_`` itself was imported),
``clip_grad_value_``, and ``GradScaler.step``, which alone knows the loss scale and whether a step is skipped.
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
    """Receiver of callbacks for gradient clipping and scaled steps."""

    def wants_clips(self) -> bool:
        """Whether the next step is recorded."""
        ...

    def clipped(self, parameters: list[Tensor], factor: Tensor, total: Tensor) -> None:
        """Called after gradients of total norm ``total`` were multiplied by ``factor``."""
        ...

    def clipped_by_value(self, parameters: list[Tensor]) -> None:
        """Called after gradients were clipped elementwise; their values before are not known."""
        ...

    def scaled_step(self, optimizer: Any, scale: Tensor, step: Callable[[], Any]) -> Any:
        """Called for ``GradScaler.step(optimizer)``; must call ``step`` and return its result."""
        ...


_listeners: weakref.WeakSet[Any] = weakref.WeakSet()
_originals: list[tuple[Any, str, Any, Any]] = []  # (where, name, torch's own, ours)
_lock = threading.RLock()


def register(listener: Listener) -> None:
    """Register a listener, by a weak reference."""
    with _lock:
        _listeners.add(listener)
        if not _originals:
            _wrap(clip_grad, "_clip_grads_with_norm_", _clip_by_norm)
            _wrap(torch.nn.utils, "clip_grads_with_norm_", _clip_by_norm)
            _wrap(clip_grad, "clip_grad_value_", _clip_by_value)
            _wrap(torch.nn.utils, "clip_grad_value_", _clip_by_value)
            _wrap(torch.amp.GradScaler, "step", _scaler_step)


def registered() -> list[Any]:
    """All registered listeners."""
    return list(_listeners)


def unregister(listener: Listener) -> None:
    """Unregister a listener; after the last, torch's functions are restored."""
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
