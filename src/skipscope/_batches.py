"""Data as a batch or several batches, and the tensors in them.

A *batch* is ``(inputs, target)`` or a Mapping that is passed to the model as keywords; *data* is a batch or a
re-iterable of batches. A list or tuple is always a single batch; ambiguous data is refused.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from skipscope._errors import SkipscopeError
from skipscope._random import drawn_apart
from skipscope._ranks import whole
from skipscope._tensor_layouts import strided_parts

Batch = Any
Part = TypeVar("Part")


class Batches:
    """Re-iterable batches; iteration leaves the global random states unchanged.

    Args:
        items: list, or an object that returns a new iterator for each pass.
        single: whether there is only one batch, which needs no averaging.
        operation: public call, named in errors.
        cuttable: whether batches may be split; those of ``ss.batches`` may not.

    Raises:
        SkipscopeError: while iterating, if a pass has fewer or more batches than the previous pass.
    """

    def __init__(
        self,
        items: Iterable[Batch],
        *,
        single: bool = False,
        operation: str = "data",
        cuttable: bool = True,
    ):
        self.items, self.single, self.operation, self.cuttable = items, single, operation, cuttable
        # For any other iterable, a second iterator may not start where the first one did.
        self._restarts = isinstance(items, list | tuple) or (
            isinstance(items, DataLoader) and not isinstance(getattr(items, "dataset", None), IterableDataset)
        )
        self._ahead: list[Batch] = []
        self._rest: Iterator[Batch] | None = None
        self._known_first: Batch | None = None
        self._length: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        ahead, rest = self._ahead, self._rest
        self._ahead, self._rest = [], None
        count = 0
        for batch in chain(ahead, drawn_apart(self.items) if rest is None else rest):
            count += 1
            yield batch
        if self._length not in {None, count}:
            raise SkipscopeError(
                self.operation,
                "the data has another number of batches in a second pass",
                expected=f"{self._length} batches in every pass",
                got=f"{count}, from a {type(self.items).__name__}",
                cure="read it once and keep the batches: ss.batches(list(...))",
            )
        self._length = count

    def peek(self, count: int) -> list[Batch]:
        """The first ``count`` batches or fewer; the next pass repeats them, even on a stream."""
        if self._restarts:
            return list(islice(self, count))
        if self._rest is None:
            self._rest = drawn_apart(self.items)
        self._ahead += islice(self._rest, max(0, count - len(self._ahead)))
        return self._ahead[:count]

    def first(self) -> Batch:
        """The first batch."""
        if self._known_first is None:
            self._known_first = self.peek(1)[0]
        return self._known_first

    # Index of this process's first batch.
    start = 0

    def turns(self) -> Iterator[tuple[Batch, bool]]:
        """Iterate over the batches to run in a pass, each with whether it counts."""
        return ((batch, True) for batch in self)

    def together(self, part: Part, error: Exception | None = None) -> list[Part]:
        """The results of all processes: here this process's alone, which has all batches."""
        return [part]

    def defer(self, error: Exception) -> Exception:
        """Raise an error at once, because no other process takes part in the pass."""
        raise error

    def hash(self) -> str:
        """A hash of every tensor of every batch."""
        return hash_of(t for batch in self for t in tensors_in(batch))

    def copied(self) -> Batches:
        """The same batches with tensors copied at each reading, for a model that writes into its inputs."""
        return Batches(_Copied(self.items), single=self.single, cuttable=self.cuttable)


@dataclass(frozen=True)
class _Copied:
    items: Iterable[Batch]

    def __iter__(self) -> Iterator[Batch]:
        return (map_tensors(batch, lambda tensor: tensor.detach().clone()) for batch in self.items)


def hash_of(tensors: Iterable[Tensor]) -> str:
    """Hash the shapes, dtypes and bits of tensors; sharded tensors are hashed whole."""
    digest = hashlib.blake2b(digest_size=16)
    for t in tensors:
        for part in strided_parts(whole(t.detach())):
            digest.update(f"{tuple(part.shape)}{part.dtype}".encode())
            flat = part.cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def batches(items: Sequence[Batch]) -> Batches:
    """Mark a list as a list of batches (a plain list or tuple is always a single batch).

    Batches are never split into smaller batches. Local.

    Args:
        items: batches, each ``(inputs, target)`` or a Mapping.

    Example:
        >>> import torch
        >>> data = batches([(torch.ones(2, 3), torch.zeros(2)), (torch.ones(1, 3), torch.zeros(1))])
        >>> len(list(data))
        2
    """
    items = list(items)
    if not items:
        raise SkipscopeError(
            "batches",
            "the data is empty",
            expected="at least one batch",
            got="[]",
            cure="check what fills it",
        )
    return Batches(items, single=len(items) == 1, cuttable=False)


def as_batches(data: Any, operation: str, *, any_shape: bool = False) -> Batches:
    """Read ``data`` as a batch or batches, or raise an error with a cure.

    Args:
        data: a batch, or a re-iterable of batches.
        operation: public call, named in errors.
        any_shape: whether the loss is an ``@objective``, which may take a batch of any form.
    """
    if isinstance(data, Batches):
        return data
    if isinstance(data, Tensor | Mapping):
        if isinstance(data, Tensor) and not any_shape:
            raise SkipscopeError(
                operation,
                "the data is a bare tensor, and nothing says what the target is",
                expected="(inputs, target), a Mapping, or a re-iterable of these",
                got=f"a tensor of shape {tuple(data.shape)}",
                cure="pass (inputs, target), or wrap the loss: @ss.objective on f(model, batch)",
            )
        return Batches([data], single=True)
    if isinstance(data, list | tuple):
        return Batches([_one_batch(data, operation, any_shape)], single=True)
    if _is_dataset(data):
        raise SkipscopeError(
            operation,
            "the data is a dataset: it gives samples, not batches",
            expected="a DataLoader, one batch, or ss.batches([...])",
            got=type(data).__name__,
            cure="torch.utils.data.DataLoader(dataset, batch_size=32)",
        )
    if isinstance(data, Iterator) or not isinstance(data, Iterable):
        raise SkipscopeError(
            operation,
            "the data can be read only once" if isinstance(data, Iterator) else "this is not data",
            expected=(
                "(inputs, target), a Mapping, or a re-iterable of these (a DataLoader, ss.batches([...]))"
            ),
            got=type(data).__name__,
            cure="ss.batches(list(data))" if isinstance(data, Iterator) else "pass (inputs, target)",
        )
    found = Batches(data, operation=operation)
    if _is_batch(data, found):
        return Batches([data], single=True)
    if not found.peek(1):
        raise SkipscopeError(
            operation,
            "the data is empty",
            expected="at least one batch",
            got=f"an empty {type(data).__name__}",
            cure="check what fills it",
        )
    found.first()
    return found


def _is_batch(data: Any, read: Batches) -> bool:
    """Whether an iterable object is a batch (a graph, an array, a structure that unpacks), not a loader.

    A loader has no ``to(device)``, and yields neither its own attributes nor pairs of a name and a value.
    """
    if isinstance(data, DataLoader):
        return False
    if hasattr(data, "__array__") or callable(getattr(data, "to", None)):
        return True
    items = read.peek(1)
    if not items:
        return False
    own = getattr(data, "__dict__", {}).values()
    named = isinstance(items[0], tuple) and len(items[0]) == 2 and isinstance(items[0][0], str)
    return named or any(items[0] is value for value in own)


def _is_dataset(data: Any) -> bool:
    """Whether ``data`` is a map-style dataset of torch, or a dataset of Hugging Face."""
    torchs = isinstance(data, Dataset) and not isinstance(data, IterableDataset)
    return torchs or (type(data).__module__.partition(".")[0] == "datasets" and hasattr(data, "__getitem__"))


def _one_batch(data: Sequence[Any], operation: str, any_shape: bool) -> Batch:
    if not data:
        raise SkipscopeError(
            operation,
            "the data is empty",
            expected="(inputs, target)",
            got="an empty " + type(data).__name__,
            cure="check what fills it",
        )
    looks_like_batches = all(
        isinstance(item, Mapping) or (isinstance(item, list | tuple) and len(item) == 2) for item in data
    )
    if looks_like_batches:
        raise SkipscopeError(
            operation,
            "this could be one batch or a list of batches",
            expected="a list or tuple is always one batch, (inputs, target)",
            got=f"a {type(data).__name__} of {len(data)} things that look like batches",
            cure=(
                "for several batches write ss.batches([...]); for one, pass inputs as a tuple of tensors and"
                " the target as a tensor, or use @ss.objective"
            ),
        )
    if len(data) != 2 and not any_shape:
        raise SkipscopeError(
            operation,
            "a list or tuple is one batch, and a batch has two parts",
            expected="(inputs, target)",
            got=f"a {type(data).__name__} of length {len(data)}",
            cure="for several inputs pass ((x1, x2), target); for several batches ss.batches([...])",
        )
    return data


@dataclass(frozen=True)
class Arguments:
    """Positional and keyword arguments of a call of the model.

    Attributes:
        positional: positional arguments, in order.
        keywords: keyword arguments by name.
    """

    positional: tuple[Any, ...]
    keywords: Mapping[str, Any]

    def plain(self) -> Any:
        """The simplest form of the arguments: a tensor, a tuple or a Mapping if possible."""
        if self.positional and self.keywords:
            return self
        if self.keywords:
            return self.keywords
        alone = len(self.positional) == 1 and isinstance(self.positional[0], Tensor)
        return self.positional[0] if alone else self.positional


def inputs_of(batch: Batch) -> Any:
    """The inputs of a batch, as they are passed to the model."""
    return batch[0] if isinstance(batch, list | tuple) else batch


# The most frequent types without tensors.
_ATOMS = frozenset({int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size})


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists, Mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    # The most frequent case comes first, because isinstance with Mapping is slow.
    if type(value) in _ATOMS:
        return []
    if type(value) is tuple or type(value) is list:
        found: list[Tensor] = []
        for item in value:
            if isinstance(item, Tensor):
                found.append(item)
            elif type(item) not in _ATOMS:
                found += tensors_in(item)
        return found
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in tensors_in(item)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors_in(item)]
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return [t for name in value.__dataclass_fields__ for t in tensors_in(getattr(value, name))]
    return []


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply ``function`` to every tensor of a nested structure, and return the new structure."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [map_tensors(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        mapped = copy.copy(value)
        for name in value.__dataclass_fields__:
            # The dataclass may be frozen.
            object.__setattr__(mapped, name, map_tensors(getattr(value, name), function))
        return mapped
    return value


def sample_count(batch: Batch) -> int | None:
    """Number of samples of a batch: the first dimension of its first tensor and of its target.

    Returns:
        The number, or None if it cannot be inferred: no tensor has a dimension, inputs and target disagree
        (images in a list, tokens flattened in the target alone), or both are lists of samples.

    Example:
        >>> import torch
        >>> images = [torch.ones(3, 8, 8)], [torch.tensor(1)]
        >>> sample_count((torch.ones(5, 3), torch.ones(5))), sample_count(images)
        (5, None)
    """
    sizes = [tensor.shape[0] for tensor in tensors_in(batch) if tensor.ndim]
    if not sizes:
        return None
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        return sizes[0]
    inputs, target = batch
    entries = inputs[0] if isinstance(inputs, tuple) and len(inputs) == 1 else inputs
    one_each = isinstance(entries, list) and len(entries) > 1 and _length(target) == len(entries)
    if one_each and (isinstance(target, Tensor) or len(set(sizes)) > 1):
        return None
    of_target = tensors_in(target)
    if isinstance(target, list | tuple) and of_target and not any(t.ndim for t in of_target):
        return None
    shared = {t.shape[0] for t in of_target if t.ndim}
    return sizes[0] if not shared or sizes[0] in shared else None


def _length(value: Any) -> int | None:
    if isinstance(value, Tensor):
        return value.shape[0] if value.ndim else None
    return len(value) if isinstance(value, list | tuple) else None


def batch_size(batch: Batch) -> int:
    """Number of samples of a batch, or 1 if it cannot be inferred."""
    count = sample_count(batch)
    return 1 if count is None else count


def rows(batch: Any, index: Tensor | slice, size: int | None = None) -> Any:
    """Select samples of a batch of ``size``: tensors of that length are indexed, other values are kept."""
    n = batch_size(batch) if size is None else size

    def some(tensor: Tensor) -> Tensor:
        if not tensor.ndim or tensor.shape[0] != n:
            return tensor
        return tensor[index.to(tensor.device) if isinstance(index, Tensor) else index]

    return map_tensors(batch, some)


def target_of(batch: Batch, operation: str = "loss") -> Any:
    """The target of a batch: its second half, or the labels of a Mapping."""
    if isinstance(batch, Mapping):
        for key in ("labels", "label", "target", "targets"):
            if key in batch:
                return batch[key]
        raise SkipscopeError(
            operation,
            "the batch is a Mapping without labels",
            expected="a key 'labels'",
            got=f"keys {list(batch)}",
            cure="leave the loss out if the output carries .loss, or use @ss.objective on f(model, batch)",
        )
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise SkipscopeError(
            operation,
            "a batch does not have two parts",
            expected="(inputs, target)",
            got=(
                f"{type(batch).__name__} of length {len(batch)}"
                if isinstance(batch, list | tuple)
                else type(batch).__name__
            ),
            cure="yield (inputs, target) from the data, or use @ss.objective on f(model, batch)",
        )
    return batch[1]
