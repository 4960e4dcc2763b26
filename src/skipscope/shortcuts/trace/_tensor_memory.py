"""The current value of each live tensor, also after writes into memory that it shares.

Tensors are held by weak references only, so recording needs no memory for activations. A write through a view
changes the whole tensor too: the whole becomes a new value, computed from its old value and the written one.
Any other view of that memory is recomputed from the new whole when it is next read.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import Tensor

from skipscope._torch_private import memory_without_address
from skipscope.shortcuts.trace._recorded_trace import Trace


def memory_of(tensor: Tensor) -> int | None:
    """An identifier of a tensor's memory. None if it has no memory of its own."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr() or -memory_without_address(storage) or None
    except (RuntimeError, NotImplementedError, AttributeError):  # sparse, nested, transformed
        return None


class Memory:
    """Map from live tensors to their current values.

    Args:
        trace: the trace that holds the values.
        infer: function that adds a call that was not executed, and returns the value of its result.
    """

    def __init__(self, trace: Trace, infer: Callable[..., int]):
        self.trace, self.infer = trace, infer
        self._values: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        # Memory -> the value of the whole tensor, and the number of the last write to it.
        self._wholes: dict[int, tuple[int, int]] = {}
        # The value after a write -> the value before it.
        self._before: dict[int, int] = {}
        self._writes = 0

    def get(self, tensor: Tensor) -> int | None:
        """The current value of a tensor. None if it is unknown."""
        entry = self._values.get(id(tensor))
        if entry is None or entry[0]() is not tensor:
            return None
        _, value, time = entry
        if time < self._writes and value >= 0:
            written = self._wholes.get(memory_of(tensor) or 0)
            if written is not None and written[1] > time:
                value = self._read_again(value, written[0])
                self.set(tensor, value)
        return value

    def set(self, tensor: Tensor, value: int) -> None:
        """Set the current value of a tensor."""
        self._values[id(tensor)] = (weakref.ref(tensor), value, self._writes)

    def wrote(self, tensor: Tensor, before: int, after: int) -> tuple[int, int] | None:
        """Note that a call wrote into a tensor.

        Returns:
            If the tensor is a part of another: the values of the whole before and after. Else None.
        """
        memory = memory_of(tensor)
        root, views = self._views(before)
        self._before[after] = before
        new, whole, is_part = after, before, False
        if views:
            written = self._wholes.get(memory or 0)
            whole = root if written is None or written[0] < root else written[0]
            is_part = self.trace.values[root].numel != self.trace.values[before].numel
            name, operands = ("write", (whole, after)) if is_part else ("write_all", (after,))
            new = self.infer(name, operands, self.trace.values[whole])
        if memory is not None:
            self._writes += 1
            self._wholes[memory] = (new, self._writes)
        self.set(tensor, after)
        return (whole, new) if is_part else None

    def _views(self, value: int) -> tuple[int, list[int]]:
        """The value of which ``value`` is a view, and the views in between, the last first."""
        values, calls, views = self.trace.values, self.trace.calls, []
        while True:
            call = values[value].call
            if value in self._before:
                value = self._before[value]
            elif call is not None and calls[call].is_view:
                views.append(value)
                value = calls[call].operands[0]
            else:
                return value, views

    def _read_again(self, value: int, whole: int) -> int:
        """Take the views that led to ``value`` again, from the current whole."""
        values, now = self.trace.values, whole
        for view in reversed(self._views(value)[1]):
            call = self.trace.calls[values[view].call or 0]
            now = self.infer(call.function, (now, *call.operands[1:]), values[view], call)
        return now
