"""Chains of masked writes that together replace every element of a tensor: experts chosen by an id.

That one mask is the complement of another can be read from how they were computed (``finding._routes``). For
other masks the elements that were replaced in this pass are compared here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from skipscope._torch_private import without_modes
from skipscope.shortcuts.trace._recorded_trace import Routed, TracedCall

_CHOOSING = frozenset({"setitem", "index_put", "index_copy", "masked_scatter", "where"})


class RoutedRows:
    """Chains of masked writes to disjoint parts of one tensor, keyed by the value of the last result.

    A chain holds the mask of all elements replaced so far, the calls, each with the operand of which it keeps
    the rest, and the number of calls that replaced anything.
    """

    def __init__(self):
        self._chains: dict[int, list[tuple[Tensor, tuple[tuple[TracedCall, int], ...], int]]] = {}

    def note(self, call: TracedCall, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Note one call. If it completes a chain that replaces every element, mark all calls of the chain."""
        if call.joins not in _CHOOSING or not call.results:
            return
        with without_modes():
            extended = [self._extended(call, i, chosen) for i, chosen in _replaced(call, args, kwargs)]
            for replaced, calls, replacing in extended:
                if replacing > 1 and bool(replaced.all()):
                    _mark(calls, call.results[0])
        longest = max((len(calls) for _, calls, _ in extended), default=0)
        self._chains[call.results[0]] = [chain for chain in extended if len(chain[1]) == longest]

    def _extended(self, call: TracedCall, i: int, chosen: Tensor) -> Any:
        """The chain that continues with a call, or begins with it."""
        before, replaces = call.joined[i], int(bool(chosen.any()))
        for replaced, calls, replacing in self._chains.get(-1 if before is None else before, ()):
            if replaced.shape == chosen.shape and not bool((replaced & chosen).any()):
                return replaced | chosen, (*calls, (call, i)), replacing + replaces
        return chosen, ((call, i),), replaces


def _mark(calls: tuple[tuple[TracedCall, int], ...], end: int) -> None:
    """Set ``routed`` in every call of a complete chain."""
    first, at = calls[0]
    base = first.joined[at]
    put: tuple[int | None, ...] = ()
    for call, operand in calls:
        if base is not None:
            call.routed = Routed(operand, base, put, end)
        put += (call.joined[1 - operand],)


def _replaced(
    call: TracedCall, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[int, Tensor]]:
    """Yield each operand of which a call keeps a part, with the mask of the elements that it replaces."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    if any(t.is_meta or t.is_nested or t.layout != torch.strided for t in tensors) or len(tensors) < 2:
        return
    if call.joins == "where":
        mask = next((t for t in tensors if t.dtype == torch.bool), None)
        if mask is not None:
            shape = torch.broadcast_shapes(*(t.shape for t in tensors))
            yield 1, mask.expand(shape)
            yield 0, ~mask.expand(shape)
        return
    if kwargs or len(args) < 3 or (not _is_chosen(args[1]) and call.joins != "index_copy"):
        return
    chosen = torch.zeros(args[0].shape, dtype=torch.bool, device=args[0].device)
    if call.joins == "index_copy":
        chosen.index_fill_(args[1], args[2], True)
    elif call.joins == "masked_scatter":
        chosen |= args[1]
    else:
        chosen[args[1]] = True
    yield 0, chosen


def _is_chosen(index: Any) -> bool:
    """Whether an index contains a tensor or a list."""
    parts = index if isinstance(index, tuple | list) else (index,)
    return any(isinstance(part, Tensor | list) for part in parts)
