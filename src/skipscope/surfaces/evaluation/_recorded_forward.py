"""Recorded forward pass of a private copy, with activation functions fused into the linear layers.

:mod:`skipscope.surfaces.evaluation._onednn_linears` fuses activations that are modules; a recording also
shows those that are called as functions (``F.gelu(self.fc(x))``). A forward pass that depends on values (``if
x.sum() > 0``, ``.item()``) cannot be recorded and is refused by torch. A value read from a weight by other
means would become a constant of the recording, and is refused here. As any strategy, it is used only if it
gives the plain loop's values.
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

# Largest number of batch shapes, because each needs its own recording.
_MOST = 4

Run = Callable[[nn.Module, Batch], Any]


class Recorded:
    """Forward pass ``run(copy, batch)``, recorded once for each batch shape.

    Args:
        copy: private copy whose linear layers run by oneDNN.
        run: its forward pass.

    Raises:
        ValueError: this forward pass cannot be recorded; torch raises its own errors for other reasons.
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
    """Fuse each activation function into the linear layer whose output only it reads."""
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
