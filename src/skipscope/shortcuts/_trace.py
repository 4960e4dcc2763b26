"""One forward pass, recorded: its inputs made to require gradients, its modules watched, and what hides the graph undone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from skipscope import _data, _sharding
from skipscope._errors import SkipscopeError
from skipscope.shortcuts import _sites
from skipscope.shortcuts._nodes import node_of
from skipscope.shortcuts._record import Run, Trace
from skipscope.shortcuts._recorder import Recorder


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
    recorder = Recorder(record, inputs, follow)
    with _watched(record, recorder.sites), _unhidden(), recorder:
        record.output = _data.forward(model, (inputs, None), "find_shortcuts")
    for call in record.calls:
        call.key = recorder.sites.complete(call.key)
        if (place := call.assigned_at) is not None:
            call.assigned_at = replace(place, call=recorder.sites.complete(place.call))
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
def _watched(record: Trace, sites: _sites.Sites) -> Iterator[None]:
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
