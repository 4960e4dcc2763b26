"""Linear layers of a private copy through oneDNN, in the same precision, fused with the next activation.

torch's BLAS runs at half speed on some processors; oneDNN's kernel does not, and can apply an activation
function. One forward pass shows which activation follows which layer. It cannot show that nothing else reads
the layer's output, but the autotuner rejects a strategy that changes the values
(:mod:`skipscope.surfaces.evaluation._autotune`).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from skipscope._torch_private import fused_linear

# oneDNN's name of an activation function, and of its algorithm.
Epilogue = tuple[str, str]

# Only exact types are fused: a subclass may override forward.
_EPILOGUES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu", nn.GELU: "gelu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.SiLU: "swish",
}  # fmt: skip


def linears(model: nn.Module) -> list[nn.Linear]:
    """Layers that oneDNN's kernel can run: linear, in float32, on a CPU, not under autocast."""
    if not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu"):
        return []
    return [
        m
        for m in model.modules()
        if type(m) is nn.Linear and m.weight.dtype == torch.float32 and m.weight.device.type == "cpu"
    ]


def through_one_dnn(copy: nn.Module, run: Callable[[], Any] | None) -> None:
    """Run the linear layers of ``copy`` by oneDNN's kernel.

    Args:
        copy: private copy; its modules' ``forward`` is replaced.
        run: one forward pass of it; None leaves the activations unfused.
    """
    layers = linears(copy)
    after = {} if run is None else _followers(copy, layers, run)
    for layer in layers:
        activation = after.get(layer)
        then = None if activation is None else type(activation).forward.__get__(activation)
        layer.forward = functools.partial(_linear, layer, _epilogue(activation), then)
    for activation in set(after.values()):
        activation.forward = _as_it_is


def _epilogue(activation: nn.Module | None) -> Epilogue:
    if activation is None:
        return "none", ""
    return _EPILOGUES[type(activation)], getattr(activation, "approximate", "")


def _linear(
    layer: nn.Linear, epilogue: Epilogue, then: Callable[[Tensor], Tensor] | None, input: Tensor
) -> Tensor:
    # The kernel supports only float32 inputs of two or more dimensions.
    if input.dtype != torch.float32 or input.ndim < 2:
        output = functional.linear(input, layer.weight, layer.bias)
        return output if then is None else then(output)
    name, algorithm = epilogue
    return fused_linear()(input, layer.weight, layer.bias, name, [], algorithm)


def _as_it_is(input: Tensor) -> Tensor:
    return input


def _followers(
    copy: nn.Module, layers: list[nn.Linear], run: Callable[[], Any]
) -> dict[nn.Linear, nn.Module]:
    """Map each layer to the activation that gets its output at every call, and no other layer's output."""
    # Keeping the outputs alive keeps their ids unique.
    producers: dict[int, tuple[Tensor, nn.Linear]] = {}
    calls: Counter[nn.Linear] = Counter()
    uses: Counter[tuple[nn.Module, nn.Linear | None]] = Counter()

    def record_output(layer: Any, args: Any, output: Tensor) -> None:
        producers[id(output)] = (output, layer)
        calls[layer] += 1

    def count_use(activation: nn.Module, args: Any) -> None:
        uses[activation, producers[id(args[0])][1] if args and id(args[0]) in producers else None] += 1

    handles = [layer.register_forward_hook(record_output) for layer in layers]
    handles += [m.register_forward_pre_hook(count_use) for m in copy.modules() if type(m) in _EPILOGUES]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    found = {layer: activation for (activation, layer), n in uses.items() if layer and n == calls[layer]}
    mixed = {activation for activation, layer in uses if layer is None or found.get(layer) is not activation}
    return {layer: activation for layer, activation in found.items() if activation not in mixed}
