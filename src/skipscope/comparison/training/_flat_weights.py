"""Flat storage of a network's weights, for faster elementwise optimizers.

SGD, Adam and AdamW are elementwise: they compute the same for one long tensor as for many short tensors, with
fewer operator calls. For 30 layers of width 64 under Adam a whole training step takes 3.8 ms instead of 5.1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence, ValuesView
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from skipscope._torch_private import copy_each
from skipscope.comparison.training._optimizers import Driver

# Each weight is aligned like a separate allocation, so that vector instructions see the same blocks.
_ALIGNED_BYTES = 64

# Longest table, in elements: the optimizer's temporaries should stay in the processor's cache.
_MAX_TABLE_NUMEL = 1 << 17


class FlatWeights:
    """The trainable weights of a network, with small weights joined into tables.

    Attributes:
        weights: the parameters of the network.
        tables: the parameters for the optimizer: tables of several weights, and large weights on their own.
    """

    def __init__(self, weights: list[nn.Parameter]):
        groups = list(_grouped(weights))
        self.weights = weights
        self._joined = [_Table(group) for group in groups if len(group) > 1]
        self.tables = [table.parameter for table in self._joined] + [g[0] for g in groups if len(g) == 1]

    @classmethod
    def of(cls, model: nn.Module) -> FlatWeights | None:
        """Join the model's trainable weights into flat tensors.

        Returns None unless all are contiguous CPU parameters of one floating-point dtype that share no memory
        with each other or with any other tensor of the model.
        """
        weights = [p for p in model.parameters() if p.requires_grad]
        if not weights:
            return None
        kinds = {(type(p), p.device.type, p.dtype, p.layout, p.is_contiguous()) for p in weights}
        kind = nn.Parameter, "cpu", weights[0].dtype, torch.strided, True
        if kinds != {kind} or not weights[0].is_floating_point():
            return None
        owned = [id(weight) for weight in weights]
        others = [t for m in model.modules() for t in _attribute_tensors(m) if id(t) not in owned]
        memory = [_address(weight) for weight in weights]
        if len(set(memory)) < len(memory) or not set(memory).isdisjoint(map(_address, others)):
            return None
        return cls(weights)

    def zero_grad(self) -> None:
        """Set the gradient of each weight to None."""
        for weight in self.weights:
            weight.grad = None

    def gather(self) -> bool:
        """Copy the weights' gradients into the flat tensors.

        Returns False if a weight in a flat tensor has no dense gradient: an optimizer would skip that weight,
        but cannot skip a part of a tensor.
        """
        return all(table.gather() for table in self._joined)

    def apart(self, driver: Driver, make: Callable[[Sequence[Tensor]], Driver]) -> Driver:
        """Make an optimizer of the separate weights, with the state of the optimizer of the tables."""
        whole, own = driver.optimizer, make(self.weights).optimizer
        settings = {name: value for name, value in whole.param_groups[0].items() if name != "params"}
        own.param_groups[0].update(settings)
        for weight in self.weights:
            if weight in whole.state:
                own.state[weight] = whole.state[weight]
        for table in self._joined:
            for name, value in whole.state[table.parameter].items():
                for weight, part in zip(table.weights, table.split_state(value)):
                    own.state[weight][name] = part
        return replace(driver, optimizer=own)

    def release(self) -> None:
        """Move each weight back to its original storage, with its current values."""
        for table in self._joined:
            table.release()


class _Table:
    """Several weights as views of one flat tensor, padded with zeros between them."""

    def __init__(self, weights: list[nn.Parameter]):
        self.weights, self._lengths = weights, [_aligned_numel(weight) for weight in weights]
        self._own = [weight.data for weight in weights]
        self.parameter = nn.Parameter(weights[0].new_zeros(sum(self._lengths)))
        self.parameter.grad = torch.zeros_like(self.parameter)
        self._gradients = self._parts(self.parameter.grad)
        parts = self._parts(self.parameter.data)
        copy_each(parts, self._own)
        for weight, part in zip(weights, parts):
            weight.data = part

    def gather(self) -> bool:
        """Copy the weights' gradients into the table's; False if a gradient is missing or not dense."""
        gradients = [weight.grad for weight in self.weights]
        dense = [g for g in gradients if g is not None and g.layout == torch.strided]
        if len(dense) < len(gradients):
            return False
        copy_each(self._gradients, dense)
        return True

    def split_state(self, value: Any) -> list[Any]:
        """Split an entry of the optimizer's state into an entry for each weight."""
        if isinstance(value, Tensor) and value.shape == self.parameter.shape:
            return [part.clone() for part in self._parts(value)]
        return [copy.deepcopy(value) for _ in self.weights]

    def release(self) -> None:
        copy_each(self._own, [weight.data for weight in self.weights])
        for weight, own in zip(self.weights, self._own):
            weight.data = own

    def _parts(self, table: Tensor) -> list[Tensor]:
        return [
            part[: weight.numel()].view(weight.shape)
            for part, weight in zip(table.split(self._lengths), self.weights)
        ]


def _grouped(weights: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Group consecutive weights that fit into a table together."""
    group: list[nn.Parameter] = []
    numbers = 0
    for weight in weights:
        numbers += _aligned_numel(weight)
        if group and numbers > _MAX_TABLE_NUMEL:
            yield group
            group, numbers = [], _aligned_numel(weight)
        group.append(weight)
    yield group


def _aligned_numel(weight: Tensor) -> int:
    """Number of elements that a weight takes in a table, with padding."""
    unit = max(1, _ALIGNED_BYTES // weight.element_size())
    return -(-weight.numel() // unit) * unit


def _attribute_tensors(module: nn.Module) -> Iterator[Tensor]:
    """The tensors among a module's attributes, including those in lists, tuples and dicts."""
    for value in vars(module).values():
        several = value.values() if isinstance(value, Mapping) else value
        if not isinstance(several, list | tuple | ValuesView):
            several = [value]
        yield from (one for one in several if isinstance(one, Tensor))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)
