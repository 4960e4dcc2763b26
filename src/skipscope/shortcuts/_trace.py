"""One forward pass seen twice: as the calls that join activations, and as autograd's graph between them.

The graph has a node for every ``grad_fn``. An *activation* is what is reachable from a float input or from an
embedding; what is not is computed from weights alone. Sets of nodes are Python integers used as bit sets, so that
ancestors and descendants of every node cost one pass each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skipscope import _data
from skipscope.shortcuts import _calls
from skipscope.shortcuts._results import CallKey


@dataclass(eq=False)
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
        checkpointed: recomputed in backward outside of any module's forward.
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


@dataclass(eq=False)
class Trace:
    """What one forward pass showed.

    Attributes:
        model: the traced module.
        output: what the model returned, alive.
        calls: merge-like calls with an activation among their operands, in order.
        sources: where activations begin: autograd node and name (``"input"`` or the embedding's call key).
        producers: autograd node -> path of the innermost module that returned it.
        runs: paths of modules with their own weights in the order they ran, each with the number of calls before.
    """

    model: nn.Module
    output: Any = None
    calls: list[Call] = field(default_factory=list)
    sources: dict[Any, str] = field(default_factory=dict)
    embeddings: list[tuple[Any, CallKey, str]] = field(default_factory=list)
    producers: dict[Any, str] = field(default_factory=dict)
    runs: list[tuple[str, int, int, Any]] = field(default_factory=list)
    used_inputs: list[Any] = field(default_factory=list)


def node_of(value: Any) -> Any:
    """The autograd node that produced a tensor (for a leaf: the one that accumulates its gradient), or None."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return None
    if value.grad_fn is not None:
        return value.grad_fn
    return torch.autograd.graph.get_gradient_edge(value).node


class _Recorder(TorchFunctionMode):
    def __init__(self, trace: Trace):
        super().__init__()
        self.trace, self.sites = trace, _calls.Sites(trace.model)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "embedding":
            output = func(*args, **kwargs)
            key, owner, _ = self.sites.key(_calls.caller(), name)
            if (node := node_of(output)) is not None:
                self.trace.embeddings.append((node, key, owner))
            return output
        operation = _calls.OPERATIONS.get(name)
        if operation is None:
            return func(*args, **kwargs)
        values = _calls.operands(operation, args, kwargs)
        if _calls.tensor_operands(values) < 2:
            return func(*args, **kwargs)
        nodes = tuple(node_of(value) for value in values)  # before the call: it may write into an operand
        tensors = tuple(isinstance(value, Tensor) for value in values)
        frame = _calls.caller()
        key, owner, again = self.sites.key(frame, operation.name)
        output = func(*args, **kwargs)
        calls = self.trace.calls
        calls.append(
            Call(
                operation.name,
                key,
                owner,
                _calls.source_of(frame),
                nodes,
                node_of(output),
                len(calls),
                tensors,
            )
        )
        return output


def trace(model: nn.Module, inputs: Any) -> Trace:
    """Run one forward pass with gradients and record it; the graph stays alive as long as the result does.

    Call it inside ``untouched(model)``: parameters are made to require gradients and hooks are set.

    Args:
        model: any eager module.
        inputs: what it is called with.
    """
    record = Trace(model)
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.requires_grad:
            parameter.requires_grad_(True)
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1].clone()  # a leaf that requires gradients may not be written into; its copy may

    inputs = _data.map_tensors(inputs, leaf)
    record.sources = {node_of(tensor): "input" for tensor in leaves}
    recorder = _Recorder(record)
    with _watched(record, recorder.sites), recorder:
        record.output = _data.forward(model, (inputs, None), "find_shortcuts")
    for call in record.calls:
        call.key = recorder.sites.complete(call.key)
    return record


@contextmanager
def _watched(record: Trace, sites: _calls.Sites) -> Iterator[None]:
    """Note, by forward hooks, which module returned which node, and in which order those with weights ran."""
    handles = []
    times: dict[str, int] = {}

    def note(path: str, has_weights: bool):
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            sites.leave(path)
            tensors = _data.tensors_in(output)
            nodes = [node for node in map(node_of, tensors) if node is not None]
            for node in nodes:
                record.producers.setdefault(node, path)
            if has_weights:
                record.runs.append((path, times.get(path, 0), len(record.calls), nodes[0] if nodes else None))
                times[path] = times.get(path, 0) + 1

        return hook

    try:
        for path, module in record.model.named_modules():
            handles.append(module.register_forward_hook(note(path, bool(module._parameters))))
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- the graph ------------------------------------------------------------------------------------------------------


class Graph:
    """Autograd's graph of a trace, with bit sets of ancestors and descendants.

    Attributes:
        nodes: autograd nodes in an order where parents (what a node was computed from) come first.
        position: node -> its index in ``nodes``, the bit that stands for it.
        parents: for each node the indices of the nodes it was computed from.
        active: bit set of activations.
        modules: module paths that own weights; bit i of a weight set stands for ``modules[i]``.
        weights: for each activation the set of modules whose weights enter there.
        matrices: the same, only where a weight of two or more dimensions enters.
    """

    def __init__(self, record: Trace):
        self.record = record
        starts = [node_of(t) for t in _data.tensors_in(record.output)]
        for call in record.calls:
            starts += [*call.operands, call.output]
        self.nodes, self.position, self.parents = _ordered([s for s in starts if s is not None])
        self._mark_weights()
        self.ancestors = self._closure()
        self.descendants = self._closure_back()
        self.weighted = sum(1 << i for i, w in enumerate(self.weights) if w)

    def _mark_weights(self) -> None:
        self.modules = [path for path, _ in self.record.model.named_modules()]
        owners = {}
        self.weighted_modules: list[str] = []
        for i, module in enumerate(self.record.model.modules()):
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners.setdefault(id(parameter), (1 << i, parameter.ndim >= 2))
            if any(p is not None for p in module._parameters.values()):
                self.weighted_modules.append(self.modules[i])
        self.active, self.weights, self.matrices = 0, [], []
        embedded = {id(node) for node, _, _ in self.record.embeddings}
        pure: list[
            tuple[int, int]
        ] = []  # for nodes computed from weights alone: the modules, and those with matrices
        for i, node in enumerate(self.nodes):
            parents = self.parents[i]
            starts = node in self.record.sources or id(node) in embedded
            all_weights = matrices = 0
            for parent in parents:
                if not self.active >> parent & 1:
                    all_weights |= pure[parent][0]
                    matrices |= pure[parent][1]
            if (variable := getattr(node, "variable", None)) is not None:
                owner, is_matrix = owners.get(id(variable), (0, False))
                all_weights, matrices = owner, owner if is_matrix else 0
            if starts or any(self.active >> parent & 1 for parent in parents):
                self.active |= 1 << i
                pure.append((0, 0))
                self.weights.append(0 if starts else all_weights)
                self.matrices.append(0 if starts else matrices)
            else:
                pure.append((all_weights, matrices))
                self.weights.append(0)
                self.matrices.append(0)

    def _closure(self) -> list[int]:
        ancestors: list[int] = []
        for i, parents in enumerate(self.parents):
            mask = 1 << i if self.active >> i & 1 else 0
            if mask:
                for parent in parents:
                    mask |= ancestors[parent]
            ancestors.append(mask)
        return ancestors

    def _closure_back(self) -> list[int]:
        descendants = [1 << i for i in range(len(self.nodes))]
        for i in range(len(self.nodes) - 1, -1, -1):
            if self.active >> i & 1:
                for parent in self.parents[i]:
                    descendants[parent] |= descendants[i]
        return descendants

    def modules_in(self, region: int) -> list[str]:
        """Paths of the modules whose weights enter in a set of nodes, in order of execution."""
        found: dict[str, None] = {}
        for i in bits(region & self.weighted):
            for m in bits(self.weights[i]):
                found[self.modules[m]] = None
        return list(found)

    def region_has_weights(self, region: int) -> bool:
        """Whether a weight enters anywhere in a set of nodes."""
        return bool(region & self.weighted)

    def matrices_in(self, region: int) -> int:
        """The set of modules whose matrices enter in a set of nodes."""
        mask = 0
        for i in bits(region & self.weighted):
            mask |= self.matrices[i]
        return mask

    def kind(self, i: int) -> str:
        """The operation of node ``i``: autograd's name without ``Backward0``."""
        return self.nodes[i].name().partition("Backward")[0]


def bits(mask: int) -> Iterator[int]:
    """The positions of the ones, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _ordered(starts: list[Any]) -> tuple[list[Any], dict[Any, int], list[tuple[int, ...]]]:
    """Every node reachable from ``starts``, parents first."""
    nodes: list[Any] = []
    position: dict[Any, int] = {}
    parents: list[tuple[int, ...]] = []
    for start in starts:
        stack: list[tuple[Any, list[Any] | None]] = [(start, None)]
        while stack:
            node, before = stack.pop()
            if node in position:
                continue
            if before is None:
                before = [n for n, _ in node.next_functions if n is not None]
                waiting = [n for n in before if n not in position]
                if waiting:
                    stack.append((node, before))
                    stack.extend((n, None) for n in waiting)
                    continue
            position[node] = len(nodes)
            nodes.append(node)
            parents.append(tuple(position[n] for n in before))
    return nodes, position, parents
