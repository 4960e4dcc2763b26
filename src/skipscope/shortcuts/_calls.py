"""Merge-like calls: which functions join tensors, which of their arguments are operands, and where a call is made.

A call is met again in another run by its *key*: the module whose forward makes it (host), the function, line and
instruction (site), and how many times that host has been there (nth).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

from skipscope.shortcuts._results import CallKey

Slot = tuple[int, str]  # position and keyword of one tensor argument

_TWO: tuple[Slot, ...] = ((0, "input"), (1, "other"))
_MATRIX = {
    "addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2"), "addbmm": ("batch1", "batch2"),
    "addmv": ("mat", "vec"), "addr": ("vec1", "vec2"), "addcmul": ("tensor1", "tensor2"),
    "addcdiv": ("tensor1", "tensor2"), "lerp": ("end", "weight"),
}  # fmt: skip
SUMS: dict[str, tuple[Slot, ...]] = {
    **dict.fromkeys(("add", "sub", "subtract", "rsub", "__radd__", "__rsub__"), _TWO),
    **{name: ((0, "input"), (1, a), (2, b)) for name, (a, b) in _MATRIX.items()},
    **dict.fromkeys(("index_add", "scatter_add"), ((0, "input"), (3, "source"))),
}
PRODUCTS: dict[str, tuple[Slot, ...]] = dict.fromkeys(("mul", "multiply", "__rmul__"), _TWO)
LISTS = frozenset({"cat", "concat", "concatenate", "hstack", "vstack", "dstack", "column_stack", "stack"})
_SAME = {
    "subtract": "sub",
    "multiply": "mul",
    "rmul": "mul",
    "radd": "add",
    "concat": "cat",
    "concatenate": "cat",
}
_SLOTS = {**SUMS, **PRODUCTS}
_SLOTS |= {name + "_": slots for name, slots in _SLOTS.items() if not name.startswith("_")}

TORCH = os.path.dirname(torch.__file__) + os.sep
_MODULES = os.path.join(TORCH, "nn", "modules") + os.sep
_PLUMBING = os.path.join(_MODULES, "module.py")
_OURS = tuple(os.path.join(os.path.dirname(__file__), name) for name in ("_edit.py", "_taps.py", "_trace.py"))
_is_plumbing: dict[str, bool] = {}


def is_merge_like(name: str) -> bool:
    """Whether a function of this name joins tensors (products included: they are gates)."""
    return name in _SLOTS or name in LISTS


def base_name(name: str) -> str:
    """The operation's name without what says in place or reflected: ``add_`` and ``__radd__`` are ``add``."""
    plain = name.strip("_")
    return _SAME.get(plain, plain)


def operands(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The operands of a merge-like call, in order; what is no tensor is kept as it is."""
    if name in LISTS:
        return list(args[0] if args else kwargs["tensors"])
    return [args[i] if i < len(args) else kwargs.get(key) for i, key in _SLOTS[name]]


def with_operands(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], values: Sequence[Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the same call with other operands."""
    if name in LISTS:
        return (
            ((list(values), *args[1:]), dict(kwargs)) if args else ((), {**kwargs, "tensors": list(values)})
        )
    new_args, new_kwargs = list(args), dict(kwargs)
    for (i, key), value in zip(_SLOTS[name], values, strict=True):
        if i < len(new_args):
            new_args[i] = value
        elif key in new_kwargs:
            new_kwargs[key] = value
    return tuple(new_args), new_kwargs


def out_of_place(name: str, func: Callable[..., Any]) -> Callable[..., Any]:
    """The function that computes the same without writing into its first operand."""
    return getattr(torch, name[:-1]) if is_in_place(name) else func


def is_in_place(name: str) -> bool:
    """Whether the call writes into its first operand."""
    return name.endswith("_") and not name.startswith("__")


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


def site_of(frame: FrameType, operation: str) -> str:
    """Function, line, instruction and operation: two additions on one line are two sites."""
    return f"{frame.f_code.co_qualname}:{frame.f_lineno}:{frame.f_lasti}:{operation}"


def source_of(frame: FrameType) -> str:
    """``file.py:line`` for people."""
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


class Sites:
    """Finds the key of a call from its frames, and counts occurrences over one forward pass.

    Args:
        model: the module whose forward pass runs.
    """

    def __init__(self, model: nn.Module):
        self.paths = {id(module): path for path, module in model.named_modules()}
        self._names: dict[tuple[int, int, str], tuple[CodeType, str]] = {}
        self.counts: dict[tuple[str, str], int] = {}
        self._calls: dict[int, list[Any]] = {}

    def reset(self) -> None:
        """Begin a new forward pass."""
        self.counts.clear()
        self._calls.clear()

    def site(self, frame: FrameType, operation: str) -> str:
        """The site's name, remembered."""
        code = frame.f_code
        known = self._names.get((id(code), frame.f_lasti, operation))
        if known is None:
            known = self._names[id(code), frame.f_lasti, operation] = (code, site_of(frame, operation))
        return known[1]

    def _module_of(self, frame: FrameType) -> str | None:
        code = frame.f_code
        if not code.co_argcount:
            return None
        return self.paths.get(id(frame.f_locals.get(code.co_varnames[0])))

    def host(self, frame: FrameType | None) -> tuple[str, str, FrameType | None]:
        """Owner (innermost module on the stack), host (innermost whose ``forward`` runs), and the host's frame."""
        owner = None
        while frame is not None:
            if frame.f_code.co_filename != _PLUMBING:
                path = self._module_of(frame)
                if path is not None:
                    owner = path if owner is None else owner
                    if frame.f_code.co_name == "forward":
                        return owner, path, frame
            frame = frame.f_back
        return owner or "", "", None

    def key(self, frame: FrameType, operation: str) -> tuple[CallKey, str]:
        """The call's key, counted, and its owner's path."""
        owner, host, host_frame = self.host(frame)
        site = self.site(frame, operation)
        nth = self.counts.get((host, site), 0)
        self.counts[host, site] = nth + 1
        # The frame is kept with its count, so that its id is not given to another while the pass runs.
        entry = self._calls.setdefault(id(host_frame), [host_frame, 0])
        index = entry[1]
        entry[1] += operation != "embedding"
        return CallKey(host, site, nth, index), owner


def tensor_operands(values: Sequence[Any]) -> int:
    """How many operands are floating tensors."""
    return sum(isinstance(v, Tensor) and v.is_floating_point() for v in values)
