"""Copy-on-write inputs for a recorded pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from skipscope._data import map_tensors, tensors_in
from skipscope.shortcuts.trace._tensor_memory import memory_of


class LentInputs:
    """Lends input tensors to a pass without copying, and restores those that the pass wrote into.

    A lent tensor has its own version counter and autograd history, so the owner's graph is not disturbed.
    Tensors that share memory, and tensors that are not plain strided ones, are copied at once.
    """

    def __init__(self):
        self._lent: dict[int, Tensor] = {}
        self._before: list[tuple[Tensor, Tensor, int]] = []

    def lend(self, nest: Any) -> Any:
        """The same nest with lent tensors."""
        tensors = {id(tensor): tensor for tensor in tensors_in(nest)}
        uses = Counter(map(memory_of, tensors.values()))

        def one(tensor: Tensor) -> Tensor:
            memory = memory_of(tensor)
            is_plain = type(tensor.data) is Tensor and tensor.layout is torch.strided
            if memory is None or uses[memory] > 1 or tensor.is_inference() or not is_plain:
                return tensor.detach().clone()
            self._lent[memory] = tensor.data
            return self._lent[memory]

        return map_tensors(nest, one)

    def before_write(self, tensors: Iterable[Tensor]) -> None:
        """Keep the contents of lent tensors whose memory a call may write into."""
        for tensor in tensors if self._lent else ():
            memory = memory_of(tensor)
            # A tensor under torch.func has no memory address, so it may be any of the lent tensors.
            for key in [memory] if memory is not None else list(self._lent):
                lent = self._lent.pop(key, None)
                if lent is not None:
                    self._before.append((lent, lent.clone(), lent.untyped_storage().nbytes()))

    def restore(self) -> bool:
        """Restore the contents of all lent tensors.

        Returns:
            Whether the pass had changed any.
        """
        self._lent.clear()
        is_changed = False
        with torch.no_grad():
            while self._before:
                lent, before, size = self._before[-1]
                # Reversible networks free the memory of tensors that they can recompute.
                is_freed = lent.untyped_storage().nbytes() < size
                if is_freed:
                    lent.untyped_storage().resize_(size)
                if is_freed or not torch.equal(lent, before):
                    is_changed = True
                    lent.data.copy_(before)
                self._before.pop()
        return is_changed
