"""Calls of the user's model and loss, with errors that name the layer, the shapes and a cure."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from skipscope._batches import Arguments as Arguments
from skipscope._batches import Batch, inputs_of, tensors_in
from skipscope._errors import SkipscopeError

# Errors that code typically raises on unsuitable arguments. Other errors are passed on unchanged.
_MISFITS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError)


T = TypeVar("T")


def without_gradients(run: Callable[[], T]) -> T:
    """Run without recording gradients, unless ``run`` differentiates the network (gradient penalty)."""
    try:
        with torch.no_grad():
            return run()
    except Exception as error:
        if not differentiates(error):
            raise
    finally:
        # Older versions of torch reuse casts that were made without gradients.
        torch.clear_autocast_cache()
    with torch.enable_grad():
        return run()


def differentiates(error: BaseException) -> bool:
    """Whether a model or loss failed because it computes or hooks gradients, and none were recorded."""
    text = str(error.__cause__ or error)
    return "does not require grad" in text or "hook on a tensor that doesn't require grad" in text


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call ``model`` with a tensor, a tuple (positional), a Mapping (keywords), or :class:`Arguments` (both).

    Stateful objects, such as a key-value cache, are copied: every pass sees the same state, and the user's
    objects are not changed.
    """
    if isinstance(inputs, Arguments):
        positional, keywords = with_own_state(tuple(inputs.positional)), with_own_state(dict(inputs.keywords))
        return model(*positional, **keywords)
    if isinstance(inputs, Mapping):
        return model(**{key: with_own_state(value) for key, value in inputs.items()})
    if isinstance(inputs, tuple | list):
        return model(*map(with_own_state, inputs))
    return model(with_own_state(inputs))


def with_own_state(value: Any) -> Any:
    """Copy the objects in a value that a model may write into; tensors are not copied.

    Example:
        >>> cache = [1]
        >>> with_own_state((cache, 2))[0] is cache
        False
    """
    if isinstance(value, Tensor | nn.Module) or value is None:
        return value
    if isinstance(value, list):
        return type(value)(map(with_own_state, value)) if type(value) is list else _copied(value)
    if isinstance(value, dict):
        copied = {key: with_own_state(item) for key, item in value.items()}
        return copied if type(value) is dict else _copied(value)
    if isinstance(value, tuple):
        items = [with_own_state(item) for item in value]
        same = all(new is old for new, old in zip(items, value, strict=True))
        return value if same else type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    package = type(value).__module__.partition(".")[0]
    if package in {"torch", "numpy"} or package in sys.stdlib_module_names or callable(value):
        return value
    return _copied(value)


def _copied(value: Any) -> Any:
    """Deep-copy an object, or return the object itself if it cannot be copied."""
    try:
        with torch.no_grad():
            return copy.deepcopy(value)
    # A user's object may raise anything: it may hold an open file, a lock, or a tensor with a history.
    except Exception:
        return value


def forward(model: nn.Module, batch: Batch, operation: str) -> Any:
    """Run the model on a batch; a shape error states the shapes and, if known, the layer."""
    try:
        return call_model(model, inputs_of(batch))
    except _MISFITS as error:
        if isinstance(error, SkipscopeError | torch.OutOfMemoryError):
            raise
        _require_keywords(model, inputs_of(batch), operation, error)
        name, layer = _failing_layer(model, error)
        tensors = tensors_in(inputs_of(batch))
        raise SkipscopeError(
            operation,
            f"the model does not accept this input ({error_text(error)})",
            layer=name or None,
            expected=_taken_by(layer),
            got=(
                f"inputs of shape {_shapes(tensors)}"
                if tensors
                else f"{type(inputs_of(batch)).__name__}, no tensor"
            ),
            cure=_how_to_pass(inputs_of(batch)),
        ) from error


def _require_keywords(model: nn.Module, inputs: Any, operation: str, error: BaseException) -> None:
    """Refuse a batch with keywords that ``forward`` does not take, or without required keywords."""
    if not isinstance(inputs, Mapping):
        return
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p for p in parameters if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    unknown = [] if open_ended else [key for key in inputs if key not in {p.name for p in named}]
    missing = [p.name for p in named if p.default is p.empty and p.name not in inputs]
    if unknown or missing:
        raise SkipscopeError(
            operation,
            "the keys of the batch are not the keywords of the model's forward",
            expected=", ".join(p.name if p.default is p.empty else f"{p.name} (optional)" for p in named)
            or "none",
            got=", ".join(map(str, inputs)),
            cure="; ".join(
                part
                for part in (
                    f"leave out or rename {', '.join(map(str, unknown))}" if unknown else "",
                    f"add {', '.join(missing)}" if missing else "",
                )
                if part
            )
            + "; to hand over the dict itself: (({...},), target); or write @ss.objective on f(model, batch)",
        ) from error


def _how_to_pass(inputs: Any) -> str:
    """Cure for inputs that a model does not accept."""
    if isinstance(inputs, Mapping):
        return "a dict goes to the model as keywords; to hand over the dict itself: (({...},), target)"
    if isinstance(inputs, list):
        return (
            "a list goes to the model as positional arguments; to hand over the list itself: ((images,),"
            " target)"
        )
    if hasattr(inputs, "__array__") and not isinstance(inputs, Tensor):
        return "make it a tensor: torch.as_tensor(...)"
    if not tensors_in(inputs):
        return "call the model yourself: @ss.objective on f(model, batch) -> loss"
    return "pass the inputs as the model's forward takes them: a tensor, a tuple, or a Mapping of keywords"


def call_loss(loss: Callable[..., Any], output: Any, target: Any, operation: str) -> Any:
    """Call ``loss(output, target)``; an error states the shapes, and the values of targets out of range."""
    try:
        return loss(output, target)
    except _MISFITS as error:
        if isinstance(error, SkipscopeError | torch.OutOfMemoryError):
            raise
        classes = isinstance(error, IndexError) and isinstance(output, Tensor) and output.ndim > 0
        n = output.shape[min(1, output.ndim - 1)] if classes else 0
        raise SkipscopeError(
            operation,
            f"the loss does not accept this output and target ({error_text(error)})",
            expected=f"class indices from 0 to {n - 1}: the output has {n} classes" if classes else None,
            got=f"output {_shapes(tensors_in(output)) or type(output).__name__}; "
            f"target {_shapes(tensors_in(target), ranges=True) or type(target).__name__}",
            cure="number the classes from 0, or give the model more of them"
            if classes
            else "wrap the loss: lambda output, target: ..., or use @ss.objective",
        ) from error


def no_gradient(operation: str, model: nn.Module) -> SkipscopeError:
    """Error for a loss that does not depend on anything with a gradient."""
    frozen = all(not p.requires_grad for p in model.parameters())
    return SkipscopeError(
        operation,
        "the loss has no gradient",
        expected="a loss that depends on the model's output differentiably",
        got="a loss without grad_fn" + (" (every parameter is frozen)" if frozen else ""),
        cure="compute the output without torch.no_grad, .detach(), .item() or argmax, and the loss from it",
    )


def error_text(error: BaseException) -> str:
    """First line of an error's message, preceded by its type unless the type is a common one."""
    lines = str(error).strip().splitlines()
    words = lines[0][:300] if lines else ""
    if isinstance(error, RuntimeError | TypeError | ValueError | IndexError) and words:
        return words
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _shapes(tensors: list[Tensor], *, ranges: bool = False) -> str:
    def one(tensor: Tensor) -> str:
        text = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        whole = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
        if ranges and whole and tensor.numel() and not tensor.is_meta:
            text += f" from {int(tensor.min())} to {int(tensor.max())}"
        return text

    return ", ".join(map(one, tensors))


def _failing_layer(model: nn.Module, error: BaseException) -> tuple[str, nn.Module | None]:
    """Name and module of the innermost module in the error's traceback, or ("", None)."""
    names, found, step = {id(m): n for n, m in model.named_modules()}, None, error.__traceback__
    while step is not None:
        owner = step.tb_frame.f_locals.get("self")
        found = owner if id(owner) in names else found
        step = step.tb_next
    return ("", None) if found is None else (names[id(found)], found)


def _taken_by(layer: nn.Module | None) -> str | None:
    """Describe the inputs of a torch layer by its repr; None for any other module."""
    if layer is None or any(layer.children()) or not type(layer).__module__.startswith("torch.nn"):
        return None
    numbers = next(layer.parameters(), None)
    if numbers is None or isinstance(layer, nn.Embedding):
        return f"what {layer} takes"
    return f"what {layer} takes, in {str(numbers.dtype).removeprefix('torch.')}"
