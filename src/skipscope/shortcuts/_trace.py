"""One forward pass, recorded: the calls that join activations, and the modules that ran.

The graph between them is autograd's; ``_graph`` reads it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skipscope import _data, _sharding
from skipscope._errors import SkipscopeError
from skipscope.shortcuts import _calls
from skipscope.shortcuts._results import CallKey


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
        whole: for a call that writes into a slice, the node of the whole tensor before it; else None.
        written: the same after it.
        written_back: its result is assigned to the slice that one of its operands is.
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
    written_back: bool = False


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


@dataclass(frozen=True)
class Step:
    """One output of ``unbind`` or ``split``, as a node of its own: autograd has one node for all of them."""

    node: Any
    index: int

    def name(self) -> str:
        """As ``select`` is called, which does the same."""
        return "SelectBackward0"

    @property
    def next_functions(self) -> tuple[tuple[Any, int], ...]:
        """What it was computed from."""
        return ((self.node, 0),)


def node_of(value: Any) -> Any:
    """The autograd node that produced a tensor (for a leaf: the one that accumulates its gradient), or None."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return None
    if value.grad_fn is None:
        return torch.autograd.graph.get_gradient_edge(value).node
    return output_of(value.grad_fn, value.output_nr)


_MANY = frozenset({"UnbindBackward0", "SplitBackward0", "SplitWithSizesBackward0", "UnsafeSplitBackward0"})
# FSDP2 hands a unit's inputs through one function, to learn when its backward ends: input i is output i.
_HANDS_THROUGH = "RegisterPostBackwardFunctionBackward"


_kinds: dict[type, str] = {}
_plain: dict[type, bool] = {}


def kind_of(node: Any) -> str:
    """The operation of a node: autograd's name without ``Backward0``."""
    kind = _kinds.get(type(node))
    if kind is None:
        name = node.name()
        kind = name.partition("Backward")[0]
        if type(node).__name__ == name:  # else the type is one of many operations
            _kinds[type(node)] = kind
    return kind


def shape_of(node: Any) -> tuple[int, ...] | None:
    """Of what a node gives, where that is known."""
    node, index = (node.node, node.index) if isinstance(node, Step) else (node, 0)
    known = getattr(node, "_input_metadata", None)
    return tuple(known[index].shape) if known else None


def _is_plain(node: Any) -> bool:
    """Whether a node is what it is, and neither hands on what another made nor has many outputs."""
    plain = _plain.get(type(node))
    if plain is None:
        name = node.name()
        plain = name not in _MANY and name not in {_HANDS_THROUGH, "AliasBackward0", "SliceBackward0"}
        if type(node).__name__ == name:
            _plain[type(node)] = plain
    return plain


def output_of(node: Any, index: int) -> Any:
    """The node of one output of an autograd node, seen through what only hands it on."""
    while node is not None:
        if _is_plain(node):
            return node
        name = node.name()
        if name == _HANDS_THROUGH:
            node, index = node.next_functions[index]
        elif name == "AliasBackward0" or (name == "SliceBackward0" and _takes_everything(node)):
            node, index = node.next_functions[0]
        else:
            return Step(node, index) if name in _MANY else node
    return None


def _takes_everything(node: Any) -> bool:
    """Whether a slice is all of what it is taken from: torch 2.6 has one in ``x[:, t]``, and in ``x[:]`` for an alias."""
    if node._saved_step != 1:
        return False
    size = node._saved_self_sym_sizes[signed(node._saved_dim)]
    start, end = signed(node._saved_start or 0), node._saved_end
    return (start == 0 or start <= -size) and (end is None or signed(end) >= size)


def signed(saved: int) -> int:
    """A number that autograd may have saved as the unsigned 64 bits of a negative one."""
    return saved - 2**64 if saved >= 2**63 else saved


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


class _Recorder(TorchFunctionMode):
    """Notes merge-like calls and embeddings, and which integers come from the data."""

    def __init__(self, record: Trace, inputs: Any, follow: bool):
        super().__init__()
        self.follow = follow
        self.slices: dict[Any, tuple[Call, list[Any]]] = {}
        self.record, self.sites = record, _calls.Sites(record.model)
        # Embeddings of these are activations; embeddings of positions are weights.
        self.data = {id(t): t for t in _data.tensors_in(inputs) if not t.is_floating_point()}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        operation = _calls.OPERATIONS.get(name)
        if operation is None:
            if self.follow and name in _CUTS:
                return _CUTS[name](func, args, kwargs)
            if name == "__setitem__":
                self._assigned(args[0], args[2])
            output = func(*args, **kwargs)
            if name == "embedding":
                output = self._embedded(args, kwargs, output)
            elif name == "__setitem__":
                self._integers(args, kwargs, args[0])
            elif name not in _SHAPE_ONLY and (
                isinstance(output, tuple) or (isinstance(output, Tensor) and not output.is_floating_point())
            ):
                self._integers(args, kwargs, output)
            return output
        values = _calls.operands(operation, args, kwargs)
        # Without gradients it is the inside of an autograd.Function: opaque, its backward would not follow an edit.
        if _calls.tensor_operands(values) < 2 or not torch.is_grad_enabled():
            output = func(*args, **kwargs)
            self._integers(args, kwargs, output)
            return output
        nodes = tuple(node_of(value) for value in values)  # before the call: it may write into an operand
        zero = operation.name in _calls.PRODUCTS and _is_zeroed(values)
        frame = _calls.caller()
        key, owner, again = self.sites.key(frame, operation.name)
        wholes = [_whole_of(value) for value in values]
        whole = node_of(wholes[0]) if operation.in_place else None
        output = func(*args, **kwargs)
        calls = self.record.calls
        call = Call(operation.name, key, owner, _calls.source_of(frame), nodes, node_of(output), len(calls))
        call.tensors, call.checkpointed, call.dead = tuple(isinstance(v, Tensor) for v in values), again, zero
        call.whole, call.written = whole, node_of(wholes[0]) if whole is not None else None
        if call.output is not None and any(whole is not None for whole in wholes):
            self.slices[call.output] = call, [None if w is None else weakref.ref(w) for w in wholes]
        calls.append(call)
        return output

    def _assigned(self, target: Any, value: Any) -> None:
        """Whether what is assigned to a part of a tensor was computed from a part of the same."""
        last = self.record.calls[-1] if self.record.calls else None
        if last is not None and last.output is not None and last.output == node_of(value):
            before = node_of(target)  # y[indices] += F: what is gathered is a copy, and no view
            last.written_back |= any(_gathered_from(operand) == before for operand in last.operands)
        call, wholes = self.slices.get(node_of(value), (None, ()))
        if call is not None and call.whole is None:
            base = target if target._base is None else target._base
            call.written_back |= any(whole is not None and whole() is base for whole in wholes)

    def _embedded(self, args: Any, kwargs: Any, output: Any) -> Any:
        key, owner, _ = self.sites.key(_calls.caller(), "embedding")
        indices = args[0] if args else kwargs.get("input")
        if id(indices) in self.data:
            if (
                self.follow and not output.requires_grad
            ):  # from a table that is no weight: a codebook in a buffer
                output = output.requires_grad_().clone()
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
    """What a node takes some of by indices; an object of its own for any other node."""
    return output_of(*node.next_functions[0]) if node is not None and kind_of(node) == "Index" else object()


def _is_zeroed(values: list[Any]) -> bool:
    """Whether one factor is zeros, and as large as the product: smaller, it is a gain (a frozen norm's may start at 0)."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    most = max(tensor.numel() for tensor in tensors)
    constant = [t for t in tensors if not t.requires_grad and not t.is_meta and t.numel() == most > 1]
    return any(not bool(tensor.any()) for tensor in constant)


def trace(model: nn.Module, inputs: Any) -> Trace:
    """Run one forward pass with gradients and record it; the graph stays alive as long as the result does.

    Call it inside ``untouched(model)``: parameters are made to require gradients and hooks are set. ``detach`` and
    ``no_grad`` inside the model are passed over, so that the graph is that of the data; where a model does not bear
    that (it writes into its parameters) they are left as they are.

    Args:
        model: any eager module.
        inputs: what it is called with.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.requires_grad:
            parameter.requires_grad_(True)
    if any(parameter.is_meta for parameter in model.parameters()):
        inputs = _data.map_tensors(inputs, lambda tensor: tensor.to("meta"))
    try:
        record = _traced(model, inputs, follow=True)
    except SkipscopeError:
        record = _traced(model, inputs, follow=False)
    if not record.sources and not record.embeddings:
        return _as_numbers(model, inputs) or record
    return record


def _as_numbers(model: nn.Module, inputs: Any) -> Trace | None:
    """The trace with the data's integers as floats, where they are numbers (the bytes of an image) and no indices."""

    def as_float(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.float()

    try:
        record = _traced(model, _data.map_tensors(inputs, as_float), follow=True)
    except SkipscopeError:  # they are something else
        return None
    record.as_numbers = True
    return record


def _traced(model: nn.Module, inputs: Any, follow: bool) -> Trace:
    record = Trace(model, dict(model.named_modules()))
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        alone = (
            tensor.detach()
        )  # the model gets a copy; inference mode's tensors cannot require gradients themselves
        leaves.append((alone.clone() if alone.is_inference() else alone).requires_grad_())
        return leaves[-1].clone()  # a leaf that requires gradients may not be written into; its copy may

    inputs = _data.map_tensors(inputs, leaf)
    record.sources = {node_of(tensor): "input" for tensor in leaves}
    recorder = _Recorder(record, inputs, follow)
    with _watched(record, recorder.sites), _unhidden(), recorder:
        record.output = _data.forward(model, (inputs, None), "find_shortcuts")
    for call in record.calls:
        call.key = recorder.sites.complete(call.key)
    recorder.sites.reset()  # it holds frames, and they this record: with it every activation
    return record


@contextmanager
def _unhidden() -> Iterator[None]:
    """Run compiled code eagerly, and re-entrant checkpoints as plain calls: both would hide the graph."""
    function = torch.utils.checkpoint.CheckpointFunction
    with torch.compiler.set_stance("force_eager"):
        function.apply = staticmethod(lambda run, keep, *args: run(*args))
        try:
            yield
        finally:
            del function.apply


@contextmanager
def _watched(record: Trace, sites: _calls.Sites) -> Iterator[None]:
    """Note, by forward hooks, which module returned which node, and in which order those with weights ran."""
    handles = []
    times: dict[str, int] = {}

    def note(path: str, has_weights: bool):
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            sites.leave(path)
            tensors = (output,) if isinstance(output, Tensor) else _data.tensors_in(output)
            nodes = [node for node in map(node_of, tensors) if node is not None]
            for node in nodes:
                record.producers.setdefault(node, path)
            if has_weights:
                record.runs.append(
                    Run(path, times.get(path, 0), len(record.calls), nodes[0] if nodes else None)
                )
                times[path] = times.get(path, 0) + 1

        return hook

    places = {id(module): i for i, module in enumerate(record.modules.values())}

    def hold(unit: nn.Module, *_: Any) -> None:
        for module in unit.modules():
            for weight in module._parameters.values():
                if weight is not None:
                    record.weights.setdefault(id(weight), (places[id(module)], weight))

    try:
        hold(record.model)
        for unit in _sharding.units(
            record.model
        ):  # whole weights take the place of shards as its forward begins
            handles.append(unit.register_forward_pre_hook(hold))
        for path, module in record.modules.items():
            handles.append(module.register_forward_hook(note(path, bool(module._parameters))))
        yield
    finally:
        for handle in handles:
            handle.remove()
