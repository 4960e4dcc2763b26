"""Operations that join tensors: their functions, and which of the arguments are operands."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from skipscope.shortcuts.trace._recorded_trace import is_number

Slot = tuple[int, str]  # position and keyword of one tensor argument
SlotsIn = Callable[[Sequence[Any], Mapping[str, Any]], tuple[Slot, ...] | None]


@dataclass(frozen=True)
class Operation:
    """A function that joins tensors.

    Attributes:
        name: canonical name: ``add`` for ``add``, ``add_`` and ``__radd__``.
        slots: its operands; empty if they come as one list.
        in_place: whether it writes into its first operand.
        slots_in: function from a call's arguments to its operands, or to None if the call does not
            accumulate. Without it the operands are always ``slots``.
        is_many: whether it takes lists of tensors and applies the operation to each (``_foreach_add``).
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
    **dict.fromkeys(("index_add", "index_copy"), ((0, "input"), (3, "source"))),
    **dict.fromkeys(("scatter_add", "scatter"), ((0, "input"), (3, "src"))),
    **dict.fromkeys(("slice_scatter", "select_scatter", "diagonal_scatter"), ((0, "input"), (1, "src"))),
    "copy": ((0, "input"), (1, "src")),
    "masked_scatter": ((0, "input"), (2, "source")),
    "index_put": ((0, "input"), (2, "values")),
    "scatter_reduce": ((0, "input"), (3, "src")),
    "where": ((1, "input"), (2, "other")),
}


def _in_scatter_reduce(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Slot, ...] | None:
    reduce = args[4] if len(args) > 4 else kwargs.get("reduce")
    return _SUMS["scatter_reduce"] if reduce == "sum" else None


def _in_where(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Slot, ...] | None:
    """Operands of ``torch.where(t, H, x)`` or ``H.where(t, x)``; None for ``where(t)``."""
    if len(args) + len(kwargs) < 3:
        return None
    # This runs in compiled code too, and torch 2.6 cannot trace the bool of a tuple.
    is_method = len(args) > 0 and args[0].dtype != torch.bool
    return ((0, "input"), (2, "other")) if is_method else _SUMS["where"]


_SLOTS_IN: dict[str, SlotsIn] = {"scatter_reduce": _in_scatter_reduce, "where": _in_where}
PRODUCTS = frozenset({"mul"})
# Operand number that stands for the whole tensor when a call writes into a part of it.
WHOLE = -1
# Functions that sum over an axis.
REDUCTIONS = frozenset(
    {
        "sum",
        "mean",
        "einsum",
        "matmul",
        "__matmul__",
        "__rmatmul__",
        "bmm",
        "mm",
        "mv",
        "dot",
        "tensordot",
        "inner",
    }
)
LISTS = frozenset({"cat", "hstack", "vstack", "dstack", "column_stack", "stack"})
# Operations that write one tensor into a part of another; ``index_put`` only if it does not accumulate.
PUTTING = frozenset(
    {
        "setitem",
        "copy",
        "index_copy",
        "index_put",
        "masked_scatter",
        "scatter",
        "slice_scatter",
        "select_scatter",
        "diagonal_scatter",
    }
)


def _operations() -> dict[str, Operation]:
    slots = {**_SUMS, **dict.fromkeys(PRODUCTS, _TWO), **dict.fromkeys(LISTS, ())}
    table = {name: Operation(name, places, False, _SLOTS_IN.get(name)) for name, places in slots.items()}
    table |= {f"{name}_": replace(one, in_place=True) for name, one in table.items() if one.slots}
    same = {
        "subtract": "sub", "subtract_": "sub_", "multiply": "mul", "multiply_": "mul_", "concat": "cat",
        "concatenate": "cat", "add_relu": "add", "__rsub__": "rsub", "__radd__": "add", "__rmul__": "mul",
    }  # fmt: skip
    table |= {name: table[other] for name, other in same.items()}
    for name in ("add", "sub", "mul", "lerp"):
        for end in ("", "_"):
            table[f"_foreach_{name}{end}"] = Operation(name + end, is_many=True)
    # The names of operators in torch.ops.aten and exported graphs: add.Tensor, cat.default.
    overloads = ("Tensor", "Scalar", "default", "self", "two")
    table |= {
        f"{name}.{end}": one for name, one in list(table.items()) for end in overloads if not one.is_many
    }
    return table | {"__setitem__": Operation("setitem", ((0, ""), (2, "")), in_place=True)}


# Keyed by the function's own name. A plain dict, because compiled code looks operations up too.
OPERATIONS = _operations()
# Attribute of a marked function that holds its operation.
MARK = "_skipscope_operation"


def operation_of(func: Any) -> Operation | None:
    """The joining operation that a function performs, or None. A marked function carries its own."""
    return OPERATIONS.get(getattr(func, "__name__", "")) or getattr(func, MARK, None)


def operands(operation: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The operands of a call, including those that are not tensors. [] if it does not accumulate."""
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
    """The equivalent of ``func`` that does not write into its first operand."""
    if operation.name in {"setitem", "copy"}:
        return functools.partial(_put_into_a_copy, func)
    return getattr(torch, operation.name) if operation.in_place else func


def _put_into_a_copy(func: Callable[..., Any], target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    copied = target.clone()
    func(copied, *args, **kwargs)
    return copied


def whole_of(operation: Operation, target: Tensor) -> Tensor:
    """The whole tensor of which a call writes into a part; for any other call, ``target`` itself."""
    is_part = operation.name in PUTTING and operation.in_place and target._base is not None
    return target._base if is_part and target._base is not None else target


def put_into(operation: Operation, func: Callable[..., Any], target: Tensor) -> Callable[..., Any]:
    """The out-of-place form of a write to ``target``; it takes and returns the whole tensor."""
    whole = whole_of(operation, target)
    if whole is target:
        return out_of_place(operation, func)
    size, stride, offset = target.size(), target.stride(), target.storage_offset() - whole.storage_offset()

    def put(before: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copied = before.clone()
        func(copied.as_strided(size, stride, copied.storage_offset() + offset), *args, **kwargs)
        return copied

    return put


def one_by_one(
    mode: TorchFunctionMode, operation: Operation, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Replace a call on lists of tensors by one call for each tensor, made through ``mode``."""
    if len(args) < 2 or kwargs.keys() - {"alpha"}:
        return func(*args, **kwargs)
    single = getattr(Tensor, operation.name)
    made = []
    for i in range(len(args[0])):
        own = tuple(a[i] if isinstance(a, list | tuple) else a for a in args)
        made.append(mode.__torch_function__(single, (), own, kwargs))
    return tuple(made)


def tensor_operands(values: Sequence[Any]) -> int:
    """The number of operands that are real or complex tensors."""
    return len([v for v in values if isinstance(v, Tensor) and is_number(v.dtype)])
