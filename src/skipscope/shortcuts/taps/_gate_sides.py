"""The two summands of a gate, computed by repeating its calls.

For fixed t a gate is linear in x and in H, in whatever form it is written. So its value with H = 0 is the
shortcut's summand (1 - t) x, and with x = 0 the branch's summand t H. For x + t (H - x) the repeated calls
are those from the difference to the addition; for ``lerp`` it is one call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from skipscope._data import map_tensors, tensors_in
from skipscope._untouched import random_state_kept
from skipscope.shortcuts._shortcut_result import CallKey, OperandSide, Place
from skipscope.shortcuts.trace import _operations


class Call(NamedTuple):
    """A torch call that was intercepted and not yet executed.

    Attributes:
        operation: its operation if it joins tensors, or None.
        func: the torch function.
        args: positional arguments.
        kwargs: keyword arguments.
    """

    operation: _operations.Operation | None
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def make(self) -> Any:
        """Execute the call unchanged."""
        return self.func(*self.args, **self.kwargs)

    @property
    def pure(self) -> Callable[..., Any]:
        """The equivalent function that does not write into its first operand."""
        return self.func if self.operation is None else _operations.out_of_place(self.operation, self.func)


class GateSides:
    """Follows the calls of one gate up to its merge, and repeats each of them for each side.

    Args:
        zeros: for each side, the operands that are set to zero to compute its summand. Without sides, calls
            are only followed.

    Attributes:
        finish: function that replaces the sum over a stack, if the merge is such a sum; else None.
    """

    def __init__(self, zeros: Mapping[OperandSide, tuple[Place, ...]] | None = None):
        self.zeros = dict(zeros or {})
        self.finish: Callable[[Tensor], Tensor] | None = None
        # The id of a followed call's result -> that tensor and its value on each side of the gate. Holding
        # the tensor keeps its id from being reused.
        self._made: dict[int, tuple[Tensor, dict[OperandSide, Tensor]]] = {}

    def touches(self, call: Call) -> bool:
        """Whether a call takes the result of a followed call."""
        made = self._made
        return bool(made) and any(id(tensor) in made for tensor in tensors_in((call.args, call.kwargs)))

    def on_each_side(self, call: Call, key: CallKey | None = None) -> dict[OperandSide, Any]:
        """The result of a call on each side; a random call draws the same numbers each time.

        Args:
            call: the call, not yet executed.
            key: its key, if some of its operands are zero on a side.
        """
        operation, args, name = call.operation, call.args, getattr(call.func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        overwrites = in_place and args and isinstance(args[0], Tensor) and id(args[0]) not in self._made
        is_random = "dropout" in name or "bernoulli" in name
        results = {}
        for side, places in self.zeros.items():
            own_args, own_kwargs = map_tensors((args, call.kwargs), partial(self._on, side))
            if overwrites:  # each side a tensor of its own
                own_args = (own_args[0].clone(), *own_args[1:])
            empty = [place.operand for place in places if place.call == key]
            if empty and operation is not None:
                values = _operations.operands(operation, own_args, own_kwargs)
                values = [torch.zeros_like(v) if i in empty else v for i, v in enumerate(values)]
                own_args, own_kwargs = _operations.with_operands(operation, own_args, own_kwargs, values)
            # A checkpoint around the gate counts saved tensors, and must not see those saved here.
            unsaved = saved_tensors_hooks(lambda t: t, lambda t: t)
            with unsaved, random_state_kept() if is_random else nullcontext():
                results[side] = call.pure(*own_args, **own_kwargs)
        return results

    def _on(self, side: OperandSide, tensor: Tensor) -> Tensor:
        made = self._made.get(id(tensor))
        return tensor if made is None else made[1][side]

    def follow(self, output: Any, on_each_side: Mapping[OperandSide, Any]) -> None:
        """Store the results of a call, with their values on each side."""
        nested: dict[OperandSide, list[Tensor]] = {s: tensors_in(value) for s, value in on_each_side.items()}
        for i, tensor in enumerate(tensors_in(output)):
            self._made[id(tensor)] = tensor, {side: values[i] for side, values in nested.items()}

    def of(self, tensor: Tensor) -> dict[OperandSide, Tensor]:
        """The value on each side of a tensor that a followed call returned."""
        return self._made[id(tensor)][1]


def make_followed(gates: list[GateSides], call: Call, key: CallKey | None = None) -> Any:
    """Execute a call, and follow it in several gates."""
    sides = [gate.on_each_side(call, key) for gate in gates]
    output = call.make()
    # x[:2] = y gives nothing: what it made is x.
    written = call.args[0] if output is None and call.operation is not None else output
    for gate, on_each_side in zip(gates, sides, strict=True):
        gate.follow(written, on_each_side)
    return output
