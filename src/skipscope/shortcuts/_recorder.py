"""The mode under which a forward pass is recorded: it notes merge-like calls and which integers come from the data."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.overrides import TorchFunctionMode

from skipscope import _data
from skipscope.shortcuts import _calls, _sites
from skipscope.shortcuts._nodes import kind_of, node_of, output_of
from skipscope.shortcuts._record import Call, Trace
from skipscope.shortcuts._results import CallKey, Place

# Functions whose result has a tensor's shape but nothing of its values.
_SHAPE_ONLY = frozenset(
    {"zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_full", "size"}
)


# What cuts autograd's graph inside a model but not its dataflow: passed over while a trace follows the data.
_CUTS: dict[str, Callable[..., Any]] = {
    "detach": lambda func, args, kwargs: args[0].view_as(args[0]),
    "_set_grad_enabled": lambda func, args, kwargs: None,
    "numpy": lambda func, args, kwargs: func(args[0].detach(), *args[1:], **kwargs),
    "__array__": lambda func, args, kwargs: func(args[0].detach(), *args[1:], **kwargs),
}


class Recorder(TorchFunctionMode):
    """Notes merge-like calls and embeddings, and which integers come from the data.

    Args:
        record: what is noted goes there.
        inputs: of the model.
        follow: whether what cuts the graph is passed over.
    """

    def __init__(self, record: Trace, inputs: Any, follow: bool):
        super().__init__()
        self.follow = follow
        self.slices: dict[Any, tuple[Call, list[Any]]] = {}
        self.record, self.sites = record, _sites.Sites(record.model)
        # Embeddings of these are activations; embeddings of positions are weights.
        self.data = {id(t): t for t in _data.tensors_in(inputs) if not t.is_floating_point()}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        operation = _calls.OPERATIONS.get(name)
        if operation is None:
            return self._other(name, func, args, kwargs)
        if operation.is_many:
            return _calls.one_by_one(self, operation, func, args, kwargs)
        values = _calls.operands(operation, args, kwargs)
        # Without gradients it is the inside of an autograd.Function: opaque, its backward would not follow an edit.
        if _calls.tensor_operands(values) < 2 or not torch.is_grad_enabled():
            output = func(*args, **kwargs)
            self._integers(args, kwargs, args[0] if operation.name == "setitem" else output)
            return output
        frame = _sites.caller()
        if any(map(_is_transformed, values)):
            self.record.transformed.add(_sites.source_of(frame))
            return func(*args, **kwargs)
        key, owner, again = self.sites.key(frame, operation.name)
        if operation.name == "setitem":
            return self._assigned(key, *args)
        nodes = tuple(node_of(value) for value in values)  # before the call: it may write into an operand
        zero = operation.name in _calls.PRODUCTS and _is_zeroed(values)
        wholes = [_whole_of(value) for value in values]
        whole = node_of(wholes[0]) if operation.in_place else None
        output = func(*args, **kwargs)
        calls = self.record.calls
        call = Call(operation.name, key, owner, _sites.source_of(frame), nodes, node_of(output), len(calls))
        call.tensors, call.checkpointed, call.dead = tuple(isinstance(v, Tensor) for v in values), again, zero
        call.whole, call.written = whole, node_of(wholes[0]) if whole is not None else None
        if call.output is not None and any(whole is not None for whole in wholes):
            self.slices[call.output] = call, [None if w is None else weakref.ref(w) for w in wholes]
        calls.append(call)
        return output

    def _other(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """A call that joins nothing."""
        if self.follow and name in _CUTS:
            return _CUTS[name](func, args, kwargs)
        output = func(*args, **kwargs)
        if name == "embedding":
            return self._embedded(args, kwargs, output)
        if name not in _SHAPE_ONLY and (
            isinstance(output, tuple) or (isinstance(output, Tensor) and not output.is_floating_point())
        ):
            self._integers(args, kwargs, output)
        return output

    def _assigned(self, key: CallKey, target: Tensor, index: Any, value: Tensor) -> None:
        """``target[index] = value``: where that was computed from the part of the target, it updates it."""
        base = target if target._base is None else target._base
        before, found = node_of(base), self._updating(target, base, value)
        target[index] = value
        if found is not None:
            call, part = found
            if call.whole is None:
                call.whole, call.part, call.assigned_at = before, part, Place(key, _calls.WHOLE)
            call.written = node_of(base)

    def _updating(self, target: Tensor, base: Tensor, value: Tensor) -> tuple[Call, int] | None:
        """The call that made ``value``, and which of its operands is a part of the target."""
        last = self.record.calls[-1] if self.record.calls else None
        if last is not None and last.output is not None and last.output == node_of(value):
            before = node_of(target)  # y[indices] += F: what is gathered is a copy, and no view
            for i, operand in enumerate(last.operands):
                if before is not None and _gathered_from(operand) == before:
                    return last, i
        if (known := self.slices.get(node_of(value))) is not None:
            for i, whole in enumerate(known[1]):
                if whole is not None and whole() is base:
                    return known[0], i
        return None

    def _embedded(self, args: Any, kwargs: Any, output: Any) -> Any:
        key, owner, _ = self.sites.key(_sites.caller(), "embedding")
        indices = args[0] if args else kwargs.get("input")
        if id(indices) in self.data:
            if self.follow and not output.requires_grad:
                output = (
                    output.requires_grad_().clone()
                )  # from a table that is no weight: a codebook in a buffer
            if (node := node_of(output)) is not None:
                self.record.embeddings.append((node, key, owner))
        return output

    def _integers(self, args: Any, kwargs: Any, output: Any) -> None:
        """An integer tensor computed from the data's integers, or from activations, is data too."""
        outputs = [output] if isinstance(output, Tensor) else output
        if not isinstance(outputs, tuple | list):
            return
        whole = [t for t in outputs if isinstance(t, Tensor) and not t.is_floating_point()]
        if whole and any(
            id(t) in self.data or (t.requires_grad and t.grad_fn is not None)
            for t in _data.tensors_in((args, kwargs))
        ):
            self.data.update((id(t), t) for t in whole)


def _whole_of(value: Any) -> Tensor | None:
    """The tensor of which ``value`` is a slice, or None where it is none."""
    base = value._base if isinstance(value, Tensor) else None
    return base if base is not None and base.numel() != value.numel() else None


def _gathered_from(node: Any) -> Any:
    """What a node takes some of by indices; None for any other node."""
    return output_of(*node.next_functions[0]) if node is not None and kind_of(node) == "Index" else None


def _is_transformed(value: Any) -> bool:
    """Whether it is what ``torch.vmap`` or ``torch.func.grad`` shows of a tensor: it has no node in the outer graph."""
    return isinstance(value, Tensor) and functorch.is_functorch_wrapped_tensor(value)


def _is_zeroed(values: list[Any]) -> bool:
    """Whether one factor is zeros, and as large as the product: smaller, it is a gain (a frozen norm's may start at 0)."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    most = max(tensor.numel() for tensor in tensors)
    constant = [t for t in tensors if not t.requires_grad and not t.is_meta and t.numel() == most > 1]
    return any(not bool(tensor.any()) for tensor in constant)
