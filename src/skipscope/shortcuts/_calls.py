"""Merge-like calls: which functions join tensors, which of their arguments are operands, and where a call is made.

A call is met again in another run by its *key*: the module whose forward makes it (host), the function, line and
instruction (site), and how many times that host has been there (nth).
"""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skipscope.shortcuts._results import CallKey

Slot = tuple[int, str]  # position and keyword of one tensor argument
SlotsIn = Callable[[Sequence[Any], Mapping[str, Any]], tuple[Slot, ...] | None]


@dataclass(frozen=True)
class Operation:
    """A function that joins tensors.

    Attributes:
        name: of the operation: ``add`` for ``add``, ``add_`` and ``__radd__``.
        slots: its operands; empty when they come as one list.
        in_place: whether it writes into its first operand.
        slots_in: where the operands of one call are, by its arguments, and None where it adds nothing up; without it
            they are always in ``slots``.
        is_many: it takes lists, and is one such operation for each of their tensors.
    """

    name: str
    slots: tuple[Slot, ...] = ()
    in_place: bool = False
    slots_in: SlotsIn | None = None
    is_many: bool = False


_TWO: tuple[Slot, ...] = ((0, "input"), (1, "other"))
_LIKE_ADDMM = {
    "addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2"), "addbmm": ("batch1", "batch2"),
    "addmv": ("mat", "vec"), "addr": ("vec1", "vec2"), "addcmul": ("tensor1", "tensor2"),
    "addcdiv": ("tensor1", "tensor2"), "lerp": ("end", "weight"),
}  # fmt: skip
_SUMS: dict[str, tuple[Slot, ...]] = {
    **dict.fromkeys(("add", "sub", "rsub"), _TWO),
    **{name: ((0, "input"), (1, a), (2, b)) for name, (a, b) in _LIKE_ADDMM.items()},
    **dict.fromkeys(("index_add", "scatter_add"), ((0, "input"), (3, "source"))),
    "index_put": ((0, "input"), (2, "values")),
    "scatter_reduce": ((0, "input"), (3, "src")),
    "where": ((1, "input"), (2, "other")),
}


def _in_index_put(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Slot, ...] | None:
    accumulates = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
    return _SUMS["index_put"] if accumulates else None


def _in_scatter_reduce(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Slot, ...] | None:
    reduce = args[4] if len(args) > 4 else kwargs.get("reduce")
    return _SUMS["scatter_reduce"] if reduce == "sum" else None


def _in_where(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Slot, ...] | None:
    """``torch.where(t, H, x)`` is t H + (1 - t) x, and so is ``H.where(t, x)``; of a condition alone it gives indices."""
    if len(args) + len(kwargs) < 3:
        return None
    # Asked in compiled code too: torch 2.6 cannot trace the bool of a tuple.
    is_method = len(args) > 0 and args[0].dtype != torch.bool
    return ((0, "input"), (2, "other")) if is_method else _SUMS["where"]


_SLOTS_IN: dict[str, SlotsIn] = {
    "index_put": _in_index_put, "scatter_reduce": _in_scatter_reduce, "where": _in_where,
}  # fmt: skip
PRODUCTS = frozenset({"mul"})
# In place of an operand's number: all of the tensor into a part of which the call writes.
WHOLE = -1
# What sums over an axis; by name, as a tape meets it.
REDUCTIONS = frozenset(
    {"sum", "mean", "einsum", "matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "mv", "dot", "tensordot", "inner"}
)  # fmt: skip
LISTS = frozenset({"cat", "hstack", "vstack", "dstack", "column_stack", "stack"})


def _operations() -> dict[str, Operation]:
    slots = {**_SUMS, **dict.fromkeys(PRODUCTS, _TWO), **dict.fromkeys(LISTS, ())}
    table = {name: Operation(name, places, False, _SLOTS_IN.get(name)) for name, places in slots.items()}
    table |= {f"{name}_": replace(one, in_place=True) for name, one in table.items() if one.slots}
    same = {
        "subtract": "sub", "subtract_": "sub_", "multiply": "mul", "multiply_": "mul_", "concat": "cat",
        "concatenate": "cat", "__rsub__": "rsub", "__radd__": "add", "__rmul__": "mul",
    }  # fmt: skip
    table |= {name: table[other] for name, other in same.items()}
    for name in ("add", "sub", "mul", "lerp"):
        for end in ("", "_"):
            table[f"_foreach_{name}{end}"] = Operation(name + end, is_many=True)
    return table | {"__setitem__": Operation("setitem", ((0, ""), (2, "")))}


# By the function's own name; looked up in compiled code too, which is why it is a plain dict.
OPERATIONS = _operations()

TORCH = os.path.dirname(str(torch.__file__)) + os.sep
_MODULES = os.path.join(TORCH, "nn", "modules") + os.sep
_PLUMBING = os.path.join(_MODULES, "module.py")
_OURS = tuple(
    os.path.join(os.path.dirname(__file__), name)
    for name in ("_calls.py", "_twin.py", "_taps.py", "_recorder.py", "_mark.py")
)
_CHECKPOINT = os.path.join(TORCH, "utils", "checkpoint.py")
_is_plumbing: dict[str, bool] = {}


def operands(operation: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The operands of a call, in order; what is no tensor is kept as it is. None where it adds nothing up."""
    slots = operation.slots if operation.slots_in is None else operation.slots_in(args, kwargs)
    if slots is None:
        return []
    if not slots:
        return list(args[0] if args else kwargs["tensors"])
    return [args[i] if i < len(args) else kwargs.get(key) for i, key in slots]


def with_operands(
    operation: Operation, args: Sequence[Any], kwargs: Mapping[str, Any], values: Sequence[Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the same call with other operands."""
    slots = operation.slots if operation.slots_in is None else operation.slots_in(args, kwargs)
    if not slots:
        return (
            ((list(values), *args[1:]), dict(kwargs)) if args else ((), {**kwargs, "tensors": list(values)})
        )
    new_args, new_kwargs = list(args), dict(kwargs)
    for (i, key), value in zip(slots, values):
        if i < len(new_args):
            new_args[i] = value
        elif key in new_kwargs:
            new_kwargs[key] = value
    return tuple(new_args), new_kwargs


def out_of_place(operation: Operation, func: Callable[..., Any]) -> Callable[..., Any]:
    """The function that computes the same without writing into its first operand."""
    return getattr(torch, operation.name) if operation.in_place else func


def one_by_one(
    mode: TorchFunctionMode, operation: Operation, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """A call on lists as the calls that it stands for, each of which goes through ``mode``."""
    if len(args) < 2 or kwargs.keys() - {"alpha"}:
        return func(*args, **kwargs)
    single = getattr(Tensor, operation.name)
    made = []
    for i in range(len(args[0])):
        own = tuple(a[i] if isinstance(a, list | tuple) else a for a in args)
        made.append(mode.__torch_function__(single, (), own, kwargs))
    return tuple(made)


# --- where a call is made ---------------------------------------------------------------------------------------------


def caller() -> FrameType:
    """The innermost frame that is the model's: outside torch's plumbing and our modes."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        filename = frame.f_code.co_filename
        plumbing = _is_plumbing.get(filename)
        if plumbing is None:
            in_torch = filename.startswith(TORCH)
            plumbing = in_torch and (not filename.startswith(_MODULES) or filename == _PLUMBING)
            _is_plumbing[filename] = plumbing = plumbing or filename in _OURS
        if not plumbing:
            return frame
        frame = frame.f_back
    return frame


_sites: dict[tuple[int, int, str], tuple[CodeType, str]] = {}


def site_of(frame: FrameType, operation: str) -> str:
    """Function, line, columns and operation: two additions on one line are two sites."""
    code = frame.f_code
    known = _sites.get((id(code), frame.f_lasti, operation))
    if known is None:
        # Not the instruction itself: Python's specialisation may give one call two instructions.
        line, _, begin, end = next(itertools.islice(code.co_positions(), frame.f_lasti // 2, None))
        where = f"{begin}-{end}" if begin is not None else str(frame.f_lasti)
        known = _sites[id(code), frame.f_lasti, operation] = (
            code,
            f"{code.co_qualname}:{line}:{where}:{operation}",
        )
    return known[1]


_sources: dict[tuple[int, int], tuple[CodeType, str]] = {}


def source_of(frame: FrameType) -> str:
    """``file.py:line`` for people."""
    code = frame.f_code
    known = _sources.get((id(code), frame.f_lasti))
    if known is None:
        source = f"{os.path.basename(code.co_filename)}:{frame.f_lineno}"
        known = _sources[id(code), frame.f_lasti] = (code, source)
    return known[1]


def first_argument(frame: FrameType) -> Any:
    """The value of a function's first parameter (``self`` in a method), or None."""
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def is_forward(frame: FrameType) -> bool:
    """Whether a frame that belongs to a module is its forward: a method named so, or called by ``Module.__call__``."""
    back = frame.f_back
    return frame.f_code.co_qualname.endswith(".forward") or (
        back is not None and back.f_code.co_filename == _PLUMBING
    )


@dataclass(eq=False)
class _Entered:
    """One call of a module's forward: the frame (kept, so that its id stays its own) and the counts when it began."""

    frame: FrameType | None
    path: str
    call: int
    before: dict[str, int]
    after: dict[str, int] | None = None


class Sites:
    """Finds the key of a call from its frames, and counts occurrences over one forward pass.

    Args:
        model: the module whose forward pass runs.
    """

    def __init__(self, model: nn.Module):
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.reset()

    def reset(self) -> None:
        """Begin a new forward pass."""
        self.occurrences: Counter[tuple[str, str]] = Counter()
        self.operations: Counter[str] = Counter()
        self.entered: dict[int, _Entered] = {}
        self._calls: dict[tuple[str, int], _Entered] = {}
        self._times: Counter[str] = Counter()
        self._latest: dict[str, _Entered] = {}

    def owner_and_host(self, frame: FrameType | None) -> tuple[str, str, FrameType | None, bool]:
        """Who makes a call.

        Returns:
            The innermost module on the stack; the innermost whose forward runs, and that frame; and whether
            checkpointing stands between the call and that forward, which will then be run again without it.
        """
        owner, checkpointed = None, False
        while frame is not None:
            if frame.f_code.co_filename == _CHECKPOINT:
                checkpointed = True
            elif frame.f_code.co_filename != _PLUMBING:
                path = self.paths.get(id(first_argument(frame)))
                if path is not None:
                    owner = path if owner is None else owner
                    if is_forward(frame):
                        return owner, path, frame, checkpointed
            frame = frame.f_back
        return owner or "", "", None, checkpointed

    def occurrence(self, frame: FrameType, operation: str) -> tuple[str, str, int]:
        """Host, site and how many times this host was at this site before."""
        _, host, _, _ = self.owner_and_host(frame)
        site = site_of(frame, operation)
        nth = self.occurrences[host, site]
        self.occurrences[host, site] += 1
        return host, site, nth

    def key(self, frame: FrameType, operation: str) -> tuple[CallKey, str, bool]:
        """The call's whole key, its owner's path, and whether it is checkpointed outside any module."""
        owner, host, host_frame, checkpointed = self.owner_and_host(frame)
        site = site_of(frame, operation)
        nth = self.occurrences[host, site]
        self.occurrences[host, site] += 1
        entered = self._enter(host_frame, host)
        index = self.operations[operation] - entered.before.get(operation, 0)
        self.operations[operation] += 1
        return CallKey(host, site, nth, index, entered.call), owner, checkpointed

    def _enter(self, frame: FrameType | None, path: str) -> _Entered:
        """Note a forward that has begun, and those around it, with what had been counted before."""
        known = self.entered.get(id(frame))
        if known is not None:
            return known
        if frame is not None and frame.f_back is not None:
            _, outer, outer_frame, _ = self.owner_and_host(frame.f_back)
            if outer_frame is not None:
                self._enter(outer_frame, outer)
        entered = self.entered[id(frame)] = _Entered(frame, path, self._times[path], dict(self.operations))
        self._calls[path, self._times[path]] = entered
        self._times[path] += 1
        self._latest[path] = entered
        return entered

    def leave(self, path: str) -> None:
        """A forward has ended."""
        entered = self._latest.get(path)
        if entered is not None and entered.after is None:
            entered.after = dict(self.operations)

    def complete(self, key: CallKey) -> CallKey:
        """The key with what is known only when the forward pass is over."""
        operation = key.site.rpartition(":")[2]
        entered = self._calls[key.host, key.call]
        among = 0 if entered.after is None else entered.after[operation] - entered.before.get(operation, 0)
        total = self.occurrences[key.host, key.site]
        return CallKey(key.host, key.site, key.nth, key.index, key.call, total, among)


def tensor_operands(values: Sequence[Any]) -> int:
    """How many operands are floating tensors."""
    return len([v for v in values if isinstance(v, Tensor) and v.is_floating_point()])
