"""A tape of the calls that make up a gate, which plays them again for one side alone.

For fixed t a gate is linear in x and in H, however it is written. Its value with H = 0 is therefore what comes by the
shortcut, (1 - t) x, and its value with x = 0 what comes by the branch, t H: the operands of t H + (1 - t) x, whatever
the calls are. In x + t (H - x) the tape runs from the difference to the addition; of ``lerp`` it holds one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipscope._data import map_tensors, tensors_in
from skipscope._untouched import random_state_kept
from skipscope.shortcuts import _calls
from skipscope.shortcuts._calls import Operation
from skipscope.shortcuts._results import CallKey, Place


@dataclass(eq=False)
class _Step:
    """One call: the arguments as they were before it, and what came out."""

    key: CallKey | None
    operation: Operation | None
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random: tuple[Any, Any] | None
    output: Any = None

    def again(self, args: Any, kwargs: Any) -> Any:
        """The call with other arguments; a random one draws what it drew."""
        if self.random is None:
            return self.function(*args, **kwargs)
        with random_state_kept():
            _set_generators(self.random)
            return self.function(*args, **kwargs)


class Tape:
    """The calls between a gate's first and its merge, in order.

    Attributes:
        finish: what takes the place of what comes out of the sum over what was stacked; None before that, and where
            the merge is no such sum.
    """

    def __init__(self):
        self.finish: Callable[[Tensor], Tensor] | None = None
        self.steps: list[_Step] = []
        self._made: set[int] = set()  # ids of outputs, which the steps keep alive

    def touches(self, args: Any, kwargs: Any) -> bool:
        """Whether a call takes something that a noted call made."""
        return any(id(tensor) in self._made for tensor in tensors_in((args, kwargs)))

    def note(self, func: Any, args: Any, kwargs: Any, key: CallKey | None = None) -> None:
        """Note a call that is about to be made.

        Args:
            func: what is called.
            args: with these.
            kwargs: and these.
            key: of a call that holds an operand of the gate.
        """
        name = getattr(func, "__name__", "")
        operation = _calls.OPERATIONS.get(name)
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place and args and isinstance(args[0], Tensor) and id(args[0]) not in self._made:
            args = (args[0].clone(), *args[1:])  # about to be overwritten
        pure = func if operation is None else _calls.out_of_place(operation, func)
        random = _generators() if "dropout" in name or "bernoulli" in name else None
        self.steps.append(_Step(key, operation, pure, args, kwargs, random))

    def made(self, output: Any) -> None:
        """What the call noted last gave."""
        self.steps[-1].output = output
        self._made.add(id(output))

    def play(self, zeros: Iterable[Place] = ()) -> Tensor:
        """What comes out in the end, from zeros at some operands; with the same random numbers."""
        zeros, now, output = tuple(zeros), {}, None
        # A checkpoint around the gate counts what is saved: what is saved here is none of its own.
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            for step in self.steps:
                args, kwargs = map_tensors((step.args, step.kwargs), lambda t: now.get(id(t), t))
                empty = [place.operand for place in zeros if place.call == step.key]
                if empty and step.operation is not None:
                    values = _calls.operands(step.operation, args, kwargs)
                    for i in empty:
                        values[i] = torch.zeros_like(values[i])
                    args, kwargs = _calls.with_operands(step.operation, args, kwargs, values)
                output = now[id(step.output)] = step.again(args, kwargs)
        assert isinstance(output, Tensor)
        return output


def _generators() -> tuple[Any, Any]:
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_gpu else None


def _set_generators(state: tuple[Any, Any]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])
