"""Recorded forward pass of our own copy, with activation functions fused into the linear layers.

:mod:`skipscope.surfaces.evaluation._onednn_linears` sees activation functions that are modules; here those
that are called as functions are seen too (``F.gelu(self.fc(x))``). What looks at numbers on its way (``if
x.sum() > 0``, ``.item()``) cannot be recorded and is refused by torch; what was read from a weight by other
means would stand in the recording as a number that no longer moves, and is refused here. And, as every
strategy, it is taken only if it gives the plain loop's numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from skipscope._data import Batch
from skipscope._torch_private import fused_linear

_MOST = 4  # shapes of batches: each is recorded

Run = Callable[[nn.Module, Batch], Any]


class Recorded:
    """``run(copy, batch)``, recorded once for each shape of a batch.

    Args:
        copy: our own, its linear layers run by oneDNN.
        run: its forward pass.

    Raises:
        ValueError: this forward pass cannot be recorded; torch has other errors for other reasons.
    """

    def __init__(self, copy: nn.Module, run: Run):
        self.copy, self.run = copy, run
        self.graphs: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, model: nn.Module, batch: Batch) -> Any:
        inputs = batch[0] if isinstance(batch, tuple | list) else batch
        leaves, form = pytree.tree_flatten(inputs)
        if model is not self.copy or not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise ValueError("only tensors go into a recording")
        key = (*((leaf.shape, leaf.dtype, leaf.stride()) for leaf in leaves), str(form))
        if key not in self.graphs:
            if len(self.graphs) == _MOST:
                raise ValueError("batches of many shapes")
            self.graphs[key] = self._record(batch, leaves, form)
        return self.graphs[key](*leaves)

    def _record(self, batch: Batch, leaves: list[Any], form: Any) -> Callable[..., Any]:
        from torch.fx.experimental.proxy_tensor import make_fx

        def forward(*tensors: Tensor) -> Any:
            inputs = pytree.tree_unflatten(tensors, form)
            return self.run(self.copy, (inputs, *batch[1:]) if isinstance(batch, tuple | list) else inputs)

        graph = make_fx(forward)(*leaves)
        own = {t.data_ptr() for t in itertools.chain(self.copy.parameters(), self.copy.buffers())}
        for node in graph.graph.nodes:
            if node.op == "get_attr" and getattr(graph, node.target).data_ptr() not in own:
                raise ValueError(
                    "a tensor that is neither a parameter nor a buffer: it may have been read from one"
                )
        _take_in(graph)
        return graph


def _take_in(graph: torch.fx.GraphModule) -> None:
    """Let each linear layer compute the activation function that alone is given its output."""
    aten, linear = torch.ops.aten, fused_linear().default
    names = {
        aten.gelu.default: "gelu", aten.relu.default: "relu", aten.tanh.default: "tanh",
        aten.sigmoid.default: "sigmoid", aten.silu.default: "swish",
    }  # fmt: skip
    for node in list(graph.graph.nodes):
        layer = node.args[0] if node.target in names else None
        if layer is None or layer.target is not linear or layer.args[3] != "none" or len(layer.users) > 1:
            continue
        algorithm = node.kwargs.get("approximate", "none") if node.target is aten.gelu.default else ""
        layer.args = (*layer.args[:3], names[node.target], [], algorithm)
        node.replace_all_uses_with(layer)
        graph.graph.erase_node(node)
    graph.recompile()
