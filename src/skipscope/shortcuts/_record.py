"""What one forward pass showed, as plain data: the calls that join activations, and the modules that ran.

The graph between them is autograd's; ``_graph`` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from skipscope.shortcuts._results import CallKey, Place


@dataclass(eq=False, slots=True)
class Call:
    """One merge-like call: what was called, where, with which operands, giving what.

    Attributes:
        name: the operation, e.g. ``"add"``.
        key: how it is met again.
        owner: path of the innermost module on the stack.
        source: ``file.py:line``.
        operands: for each operand its autograd node before the call, or None where it has none.
        output: the result's autograd node.
        order: position among all calls.
        tensors: which operands are tensors.
        dead: multiplied with zeros of its own size that are no weights: a state that has not begun.
        checkpointed: recomputed in backward outside of any module's forward.
        whole: for a call that updates a part of a tensor, the node of all of it before; else None.
        written: the same after it.
        part: the operand that is the part.
        assigned_at: where the updated part is put back, if another call does that: x[a:b] = x[a:b] + F.
    """

    name: str
    key: CallKey
    owner: str
    source: str
    operands: tuple[Any, ...]
    output: Any
    order: int
    tensors: tuple[bool, ...] = ()
    checkpointed: bool = False
    dead: bool = False
    whole: Any = None
    written: Any = None
    part: int = 0
    assigned_at: Place | None = None


@dataclass(eq=False)
class Trace:
    """What one forward pass showed.

    Attributes:
        model: the traced module.
        modules: it and those inside it, by path.
        output: what the model returned, alive.
        calls: merge-like calls with an activation among their operands, in order.
        sources: where activations begin: autograd node and name (``"input"`` or the embedding's call key).
        producers: autograd node -> path of the innermost module that returned it.
        embeddings: autograd node, call key and owner of each embedding of integers.
        streams: where activations begin in weights, autograd node and module; found once the merges have been judged.
        runs: modules with their own weights in the order they ran.
        weights: each weight that a module held, by identity: position of the first such module, and the weight.
        transformed: where a function under ``torch.vmap`` or ``torch.func`` joins activations: ``file.py:line``.
        as_numbers: the inputs are integers, and were given as floats; no gradient can be read there.
    """

    model: nn.Module
    modules: dict[str, nn.Module]
    output: Any = None
    calls: list[Call] = field(default_factory=list)
    sources: dict[Any, str] = field(default_factory=dict)
    embeddings: list[tuple[Any, CallKey, str]] = field(default_factory=list)
    producers: dict[Any, str] = field(default_factory=dict)
    streams: dict[Any, str] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    weights: dict[int, tuple[int, Tensor]] = field(default_factory=dict)
    transformed: set[str] = field(default_factory=set)
    as_numbers: bool = False


class Run(NamedTuple):
    """One run of a module that has weights of its own.

    Attributes:
        path: of the module.
        nth: how many times it had run before.
        calls_before: how many merge-like calls had been made when it ended.
        node: autograd node of its first output, or None.
    """

    path: str
    nth: int
    calls_before: int
    node: Any
