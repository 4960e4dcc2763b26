"""Model, data and loss of a command, built from the command line; every guess is reported."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipscope import reference
from skipscope._data import (
    as_batches,
    call_model,
    forward,
    inputs_of,
    map_tensors,
    objective,
    target_of,
    tensors_in,
)
from skipscope._errors import SkipscopeError
from skipscope._files import refuse_devices
from skipscope._free_memory import free_bytes
from skipscope._model_calls import error_text
from skipscope._untouched import random_state_kept, untouched
from skipscope.cli._named import called, factory, named_model, resolve

if TYPE_CHECKING:
    from skipscope.cli import Source

_SHAPE = re.compile(r"[1-9]\d{0,6}(x[1-9]\d{0,6})*")


@dataclass
class Subject:
    """Model, data and loss of a command.

    Attributes:
        name: the MODEL argument.
        make: factory of the model, or None if a module was given.
        model: the model, built once.
        data: a batch or batches.
        loss: the loss, or None if the output carries its own.
        said: every guess, a sentence each.
    """

    name: str
    make: Callable[[], nn.Module] | None
    model: nn.Module
    data: Any
    loss: Any
    said: list[str] = field(default_factory=list)

    @property
    def inputs(self) -> Any:
        """Inputs of the first batch, as they are passed to the model."""
        return inputs_of(as_batches(self.data, self.name, any_shape=True).first())


def load_subject(name: str, source: Source, samples: int = 128, *, uses_loss: bool = True) -> Subject:
    """Build the model, the data and the loss that the command line names.

    Args:
        name: the MODEL argument.
        source: options for data, loss, weights and device.
        samples: number of samples of skipscope's own data, for its own networks.
        uses_loss: whether the command needs a loss; if not, none is guessed.

    Raises:
        SkipscopeError: the module, callable, network, file or loss does not exist.
    """
    said: list[str] = []
    found = named_model(name, said)
    make = None if isinstance(found, nn.Module) else factory(found, name)
    with random_state_kept(source.seed):
        model = make() if make else found
    assert isinstance(model, nn.Module)
    if source.weights:
        _load_weights(model, source.weights)
        # Weights from a file define a single model, not a family of initialisations.
        make = None
    if source.device:
        model, make = _moved(model, source.device), None
    data, loss = _data(name, model, source, samples, said, uses_loss)
    return Subject(name, make, model, data, loss, said)


def _moved(model: nn.Module, device: str) -> nn.Module:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise SkipscopeError(
            "device",
            f"the model cannot be moved to {device} ({error_text(error)})",
            expected="cpu, cuda, cuda:1, mps, ...",
            got=device,
        ) from error


def _load_weights(model: nn.Module, path: Path) -> None:
    expected = "safetensors, or a state_dict of this very model"
    refuse_devices(path, operation="weights", expected=expected)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        wrapped: Any = state.get("state_dict", state) if isinstance(state, dict) else state
        model.load_state_dict(wrapped)
    # Unpicklers and load_state_dict raise many types of errors; none may end in a traceback.
    except Exception as error:
        raise SkipscopeError(
            "weights",
            f"cannot load {path}: {str(error)[:400]}",
            expected=expected,
            cure="save them with safetensors.torch.save_file(model.state_dict(), ...)",
        ) from error


# --- data and loss ---


def _data(
    name: str, model: nn.Module, source: Source, samples: int, said: list[str], uses_loss: bool
) -> tuple[Any, Any]:
    if source.data:
        found = resolve(source.data, "data")
        if callable(found) and not isinstance(found, Tensor):
            # The data must be the same when the command is run again.
            with random_state_kept(source.seed):
                found = called(found, source.data, "data")
        found = _on_device(found, source.device)
        return found, _loss(model, found, source.loss, said) if uses_loss else None
    if source.input:
        inputs = _on_device(_random_inputs(source.input, model, source, said), source.device)
        return inputs, _mean_square(source, said) if uses_loss else None
    if name in reference.networks():
        data = _on_device(reference.data_for(name, samples), source.device)
        said.append(f"data: {samples} {_text_or_digits(data)}")
        if not uses_loss:
            return data, None
        return data, _named_loss(source.loss) if source.loss else _guessed(data[1], said)
    raise SkipscopeError(
        "data",
        "nothing says what the model is to be called with",
        expected="--data module:callable, or --input SHAPE",
        cure="--data my_package.data:make_batch, or --input 8x3x224x224 for random data",
    )


class _OnDevice:
    """Batches that are moved to a device as they are read."""

    def __init__(self, batches: Any, device: str):
        self.batches, self.device = batches, device

    def __iter__(self) -> Iterator[Any]:
        return (map_tensors(batch, lambda t: t.to(self.device)) for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _on_device(data: Any, device: str | None) -> Any:
    if device is None:
        return data
    if isinstance(data, Tensor | Mapping | list | tuple):
        return map_tensors(data, lambda t: t.to(device))
    return _OnDevice(data, device)


def _text_or_digits(data: tuple[Tensor, Tensor]) -> str:
    if data[0].is_floating_point():
        return "of the UCI optical digits (Alpaydin and Kaynak, CC BY 4.0)"
    return f"passages of English from Python's pydoc_data.topics (SHA-256 {reference.english_text().sha256})"


def _random_inputs(shape: str, model: nn.Module, source: Source, said: list[str]) -> Tensor:
    if not _SHAPE.fullmatch(shape):
        raise SkipscopeError(
            "input", "this is not a shape", expected="numbers joined by x, e.g. 8x3x224x224", got=shape[:60]
        )
    sizes = [int(n) for n in shape.split("x")]
    needed, free = 4 * math.prod(sizes), free_bytes(torch.device("cpu"))
    if needed > free:
        raise SkipscopeError(
            "input",
            "inputs of this shape do not fit into memory",
            expected=f"at most {free / 2**30:.1f} GiB",
            got=f"{shape[:60]}, {needed / 2**30:,.1f} GiB",
        )
    generator = torch.Generator().manual_seed(source.seed)
    words = next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), None)
    tokens = words is not None and len(sizes) <= 2
    said.append(f"data: random {'token ids' if tokens else 'normal numbers'} of shape {shape}, not real data")
    if words is not None and tokens:
        return torch.randint(0, words, sizes, generator=generator)
    return torch.randn(sizes, generator=generator)


def _mean_square(source: Source, said: list[str]) -> Any:
    """A loss for random inputs, which have no targets."""
    if source.loss:
        raise SkipscopeError(
            "loss",
            "a loss needs targets, and random inputs have none",
            cure="give --data, or leave --loss out",
        )
    said.append("loss: the mean square of the output, which is enough to send a gradient back")

    @objective
    def mean_square(model: nn.Module, batch: Any) -> Tensor:
        outputs = [
            t for t in tensors_in(call_model(model, batch)) if t.is_floating_point() and t.requires_grad
        ]
        return torch.stack([t.float().square().mean() for t in outputs]).sum()

    return mean_square


def _named_loss(name: str) -> Any:
    if ":" in name:
        return resolve(name, "loss")
    found = getattr(F, name, None) if re.fullmatch(r"[a-z]\w*", name) else None
    if callable(found) and (name.endswith("_loss") or "entropy" in name):
        return found
    known = "cross_entropy, mse_loss, l1_loss, binary_cross_entropy_with_logits, nll_loss"
    raise SkipscopeError(
        "loss",
        f"there is no loss called {name!r:.60}",
        expected=f"one of torch.nn.functional: {known}; or your own as module:callable",
    )


def _loss(model: nn.Module, data: Any, name: str | None, said: list[str]) -> Any:
    if name:
        return _named_loss(name)
    batch = as_batches(data, "data", any_shape=True).first()
    with untouched(model, operation="data"), torch.no_grad():
        output = forward(model, batch, "data")
    if getattr(output, "loss", None) is not None:
        said.append("loss: the output's own")
        return None
    return _guessed(target_of(batch, "data"), said)


def _guessed(target: Any, said: list[str]) -> Any:
    guess = F.mse_loss if isinstance(target, Tensor) and target.is_floating_point() else F.cross_entropy
    said.append(f"loss: {guess.__name__}, guessed from the target; --loss says otherwise")
    return guess
