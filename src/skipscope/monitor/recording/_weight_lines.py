"""Towers and execution order of weights, found by observing the forward passes of one step.

Gradients of parameters can be compared only along a line, in the order of execution. The model's own order is
that of registration, and says nothing of two towers (an actor and a critic, an image and a text encoder),
whose losses may differ by many decades. Autograd's graph knows: weights of which none is upstream of the
other, nor of a third one that both reach, belong to different towers. Towers that are joined at a head, and
have an input of the model each, are a line each, head and all, where both are several matrices deep: a small
embedding of the time step, or of a class, is no tower.

If a tensor without gradient is concatenated in the middle of a tower (such as the input in NeRF), the layers
before it are a branch: the input reaches the rest without them. They form a stretch of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from skipscope import _torch_private
from skipscope._data import tensors_in
from skipscope._untouched import is_measuring
from skipscope.monitor.recording._backward_passes import inside_backward
from skipscope.monitor.recording._tracked_parameters import TrackedParameters

# By parameter's name: the numbers of its towers, its place in the order of execution, and its stretch.
WeightLines = Mapping[str, tuple[tuple[int, ...], int, int]]
# So many matrices of its own make an input's layers a tower.
_OWN = 3


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
        self._models = {id(model) for model in models.values()}
        # By autograd node, the parameters upstream of it; nodes are let go of when the step is over.
        self._upstream: dict[Any, int] = {}
        # Of each output with weights upstream: their bits, and which tensors the call was given.
        self._reached: list[tuple[int, list[int]]] = []
        self._inputs: list[Tensor] = []  # of the models
        # Parameters upstream of each concatenation with what carries no gradient.
        self._joined: list[int] = []
        self._is_hidden = False
        self._is_eager = _torch_private.eager.begin()
        self._hooks = [
            _torch_private.quiet_about_global_hooks(),
            module_hooks.register_module_forward_hook(self._called),
        ]

    def _called(self, module: nn.Module, args: Any, output: Any) -> None:
        if is_measuring():
            return
        given = []
        if id(module) in self._models or id(module) in self._waiting:
            given = [_whole(t) for t in tensors_in((args, _torch_private.keywords_of_call()))]
        if id(module) in self._models:
            self._inputs += given  # held until the step is over, so that no other tensor gets their ids
        if id(module) not in self._waiting:
            return
        if inside_backward():
            # A checkpoint recomputes its part in a graph that is not connected to the rest.
            self._is_hidden = True
            return
        made = [t.grad_fn for t in tensors_in(output) if isinstance(t, Tensor) and t.grad_fn is not None]
        if made:
            self._waiting.discard(id(module))
            self._reached += [(self._parameters_of(node), [id(t) for t in given]) for node in made]

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
        entries = {id(tensor): 1 << k for k, tensor in enumerate(self._inputs)}
        from_entries: dict[int, int] = {}  # by parameter, the inputs that its layer's output depends on
        seen = 0
        for bits, given in self._reached:
            before = bits & seen
            computed_from = 0
            for i in _indices(before):
                computed_from |= from_entries[i]
            if not before:
                for tensor in given:
                    computed_from |= entries.get(tensor, 0)
            for i in _indices(bits & ~seen):
                order[i], from_entries[i] = len(order), computed_from
            seen |= bits
            apart = [tower for tower in towers if not tower & bits]
            for tower in towers:
                bits |= tower if tower & bits else 0
            towers = [*apart, bits]
        self._reached, self._inputs = [], []
        if self._is_hidden or self._matrices & ~seen:
            return None
        lines = [line for tower in towers for line in self._joined_towers(tower, from_entries)]
        stretches: dict[tuple[bool, ...], int] = {}
        found = {}
        for i in _indices(seen):
            before_join = tuple(bool(join >> i & 1) for join in self._joined)
            stretch = stretches.setdefault(before_join, len(stretches))
            mine = tuple(k for k, line in enumerate(lines) if line >> i & 1)
            found[self._names[i]] = mine, order[i], stretch
        return found

    def _joined_towers(self, whole: int, from_entries: Mapping[int, int]) -> list[int]:
        """The lines of layers that are joined somewhere, one for each input with a tower of its own."""
        mine = {i: from_entries[i] for i in _indices(whole)}
        inputs = 0
        for entries in mine.values():
            inputs |= entries
        groups = [1 << k for k in _indices(inputs)]
        for one, other in combinations(list(groups), 2):
            own = [e for i, e in mine.items() if self._matrices >> i & 1 and bool(e & one) != bool(e & other)]
            if min(sum(bool(e & side) for e in own) for side in (one, other)) < _OWN:
                together = [group for group in groups if group & (one | other)]
                groups = [group for group in groups if group not in together] + [sum(together)]
        if len(groups) < 2:
            return [whole]
        return [
            sum(1 << i for i, entries in mine.items() if entries & group or not entries) for group in groups
        ]

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


def _whole(tensor: Tensor) -> Tensor:
    """What a tensor is a view of, or itself."""
    return tensor if tensor._base is None else tensor._base
