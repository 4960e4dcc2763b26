"""Towers and execution order of weights, found by observing the forward passes of one step.

Gradients of parameters can only be compared within a tower, in the order of execution. The model's own order
is that of registration, and does not separate towers (an actor and a critic, an image and a text encoder),
whose losses may differ by many decades. Autograd's graph does: two weights belong to different towers if
neither is upstream of the other and no observed output depends on both.

If a tensor without gradient is concatenated in the middle of a tower (such as the input in NeRF), the layers
before it are a branch: the input reaches the rest without them. They form a stretch of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from skipscope import _torch_private
from skipscope._data import tensors_in
from skipscope._untouched import is_measuring
from skipscope.monitor.recording._backward_passes import inside_backward
from skipscope.monitor.recording._tracked_parameters import TrackedParameters

# Name of a parameter -> index of its tower, position in the order of execution, index of its stretch.
WeightLines = Mapping[str, tuple[int, int, int]]


class LineSearch:
    """Observer of the forward passes of the next step.

    Args:
        tracked: parameters of each optimizer.
        models: models by prefix.
    """

    def __init__(self, tracked: Sequence[TrackedParameters], models: Mapping[str, nn.Module]):
        named = {name: p for one in tracked for name, p in zip(one.names, one.parameters) if p.requires_grad}
        self._names = list(named)
        self._bits = {
            _torch_private.accumulator(p): 1 << i for i, p in enumerate(named.values()) if p.is_leaf
        }
        matrices = {id(p) for p in named.values() if p.ndim > 1}
        self._waiting = {
            id(module)
            for model in models.values()
            for module in model.modules()
            if any(id(p) in matrices for p in module._parameters.values())
        }
        self._matrices = sum(1 << i for i, p in enumerate(named.values()) if p.ndim > 1)
        # Autograd node -> bits of the parameters upstream of it; nodes are released after the step.
        self._upstream: dict[Any, int] = {}
        self._reached: list[int] = []
        # Parameters upstream of each concatenation with a tensor without gradient.
        self._joined: list[int] = []
        self._is_hidden = False
        self._is_eager = _torch_private.eager.begin()
        self._hooks = [
            _torch_private.quiet_about_global_hooks(),
            module_hooks.register_module_forward_hook(self._called),
        ]

    def _called(self, module: nn.Module, _: Any, output: Any) -> None:
        if id(module) not in self._waiting or is_measuring():
            return
        if inside_backward():
            # A checkpoint recomputes its part in a graph that is not connected to the rest.
            self._is_hidden = True
            return
        made = [t.grad_fn for t in tensors_in(output) if isinstance(t, Tensor) and t.grad_fn is not None]
        if made:
            self._waiting.discard(id(module))
            self._reached += [self._parameters_of(node) for node in made]

    def _parameters_of(self, root: Any) -> int:
        """Bits of the parameters upstream of a node."""
        known, stack = self._upstream, [root]
        while stack:
            node = stack[-1]
            if node in known:
                stack.pop()
                continue
            parents = [parent for parent, _ in node.next_functions if parent is not None]
            missing = [parent for parent in parents if parent not in known]
            if missing:
                stack += missing
                continue
            found = self._bits.get(node, 0)
            for parent in parents:
                found |= known[parent]
            known[node] = found
            if node.name() == "CatBackward0" and found:
                given = [parent for parent, _ in node.next_functions if not known.get(parent, 0)]
                self._joined += [found] * bool(given)
            stack.pop()
        return known[root]

    def conclude(self) -> WeightLines | None:
        """The towers, positions and stretches, or None if the position of a weight is not known."""
        self.close()
        towers: list[int] = []
        order: dict[int, int] = {}
        seen = 0
        for bits in self._reached:
            for i in _indices(bits & ~seen):
                order[i] = len(order)
            seen |= bits
            apart = [tower for tower in towers if not tower & bits]
            for tower in towers:
                bits |= tower if tower & bits else 0
            towers = [*apart, bits]
        if self._is_hidden or self._matrices & ~seen:
            return None
        stretches: dict[tuple[bool, ...], int] = {}
        found = {}
        for k, tower in enumerate(towers):
            for i in _indices(tower):
                before = tuple(bool(join >> i & 1) for join in self._joined)
                stretch = stretches.setdefault(before, len(stretches))
                found[self._names[i]] = k, order[i], stretch
        return found

    def close(self) -> None:
        """Remove the hooks, and release autograd's nodes, outputs first."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        while self._upstream:
            self._upstream.popitem()
        self._bits = {}
        if self._is_eager:
            self._is_eager = False
            _torch_private.eager.end()


def _indices(bits: int) -> list[int]:
    return [i for i in range(bits.bit_length()) if bits >> i & 1]
