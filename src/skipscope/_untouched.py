"""Restoring a model, its gradients and the user's random state after a measurement.

Every public call that runs a user's model does so inside :func:`untouched`. It takes a cheap snapshot
(references, flags, and clones of buffers and of anything else that a forward pass can write to, except
parameters), and restores it in ``finally``: after a return, an exception or Ctrl-C.
"""

from __future__ import annotations

import copy
import functools
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skipscope import _sharding
from skipscope._errors import SkipscopeError
from skipscope._public_call import turn
from skipscope._random import random_state_kept as random_state_kept
from skipscope._ranks import meet, ranks_of
from skipscope._rebinding import rebind
from skipscope._tensor_layouts import is_strided, strided_parts
from skipscope._torch_private import compiled_from

_thread = threading.local()


def is_measuring() -> bool:
    """Whether this thread runs a model for a measurement, so that its passes are not part of a training."""
    return getattr(_thread, "depth", 0) > 0


# Snapshots of :func:`one_snapshot` by id of the model; accessed only with the lock ``turn``.
_shared: dict[int, _Snapshot] = {}


class _Snapshot:
    """Snapshot of all mutable state reachable from the modules' attributes, except values of parameters.

    Modules (even in a plain list), containers, tensors, arrays, generators and custom objects keep their
    identity, and their contents are restored; for parameters ``.grad`` and ``requires_grad`` are restored.
    """

    def __init__(self, models: Iterable[nn.Module]):
        self.empty: list[Any] = []
        self.kept: list[tuple[Callable[[Any, Any], None], Any, Any]] = []
        self.gradients: list[tuple[Tensor, Tensor | None, bool]] = []
        self.storages: list[tuple[nn.Parameter, Tensor]] = []
        modules = [module for model in models for module in model.modules()]
        for weight in _renormalised(modules):
            self.kept.append((_restore_tensor, weight, weight.detach().clone()))
        queue, seen = list[Any](modules), set()
        while queue:
            thing = queue.pop()
            if type(thing) in _ATOMS or id(thing) in seen:
                continue
            seen.add(id(thing))
            if isinstance(thing, dict | list | set) and not thing:
                # Most of torch's own containers are empty; without copies the snapshot stays cheap.
                self.empty.append(thing)
            else:
                queue += self._keep(thing)

    def _keep(self, thing: Any) -> Iterable[Any]:
        """Save the contents of ``thing``. Returns the objects that it refers to."""
        kind = type(thing)
        if isinstance(thing, Tensor):
            is_parameter = isinstance(thing, nn.Parameter)
            if is_parameter or thing.is_leaf:
                self.gradients.append((thing, thing.grad, thing.requires_grad))
            if is_parameter:
                # The storage of a shard is managed by its library.
                if type(thing.data) is Tensor:
                    self.storages.append((thing, thing.data))
                return ()
        keeper = _restorer_of(kind)
        if keeper is None and _has_attributes(kind):
            thing, keeper = vars(thing), _restorer_of(dict)
        if keeper is None:
            return thing if isinstance(thing, tuple) else ()
        duplicate, restore = keeper
        before = duplicate(thing)
        self.kept.append((restore, thing, before))
        return before.values() if isinstance(before, dict) else before if isinstance(before, list) else ()

    def clear_gradients(self) -> None:
        for parameter, _, _ in self.gradients:
            parameter.grad = None

    def restore(self) -> None:
        for container in filter(None, self.empty):
            container.clear()
        for parameter, held in self.storages:
            _restore_storage(parameter, held)
        for restore, thing, before in self.kept:
            restore(thing, before)
        for tensor, grad, requires_grad in self.gradients:
            if tensor.grad_fn is not None:
                # An in-place operation has given the tensor a history.
                tensor.detach_()
            # A gradient of another dtype can only be replaced after setting it to None.
            tensor.grad = None
            tensor.requires_grad_(requires_grad)
            tensor.grad = grad


@functools.lru_cache(4096)
def _has_attributes(kind: type) -> bool:
    """Whether a class is a module or a class of the user's, whose attributes are saved."""
    if issubclass(kind, nn.Module):
        return True
    # Objects of the standard library and of torch may hold threads, locks and files, so they are skipped.
    package = kind.__module__.partition(".")[0]
    left_alone = package in {"torch", "numpy", "skipscope"} or package in sys.stdlib_module_names
    return not left_alone and not issubclass(kind, type) and bool(kind.__dictoffset__)


@functools.lru_cache(4096)
def _restorer_of(kind: type) -> tuple[Callable[[Any], Any], Callable[[Any, Any], Any]] | None:
    """Functions that copy a mutable object of this class and restore its contents, or None."""
    return next(
        ((duplicate, restore) for kinds, duplicate, restore in _RESTORERS if issubclass(kind, kinds)), None
    )


def _renormalised(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Weights of embeddings with ``max_norm``, which a forward pass rescales in place."""
    embeddings = [m for m in modules if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    return [m.weight for m in embeddings if m.max_norm is not None and not m.weight.is_meta]


def _restore_storage(parameter: nn.Parameter, held: Tensor) -> None:
    """Undo ``parameter.data = other``, which is used to merge, average and swap weights."""
    now = parameter.data
    same = now.dtype == held.dtype and now.shape == held.shape and now.stride() == held.stride()
    if not same or now.data_ptr() != held.data_ptr() or now.device != held.device:
        parameter.data = held


def _restore_tensor(tensor: Tensor, before: Tensor) -> None:
    if tensor.is_meta:
        return
    if not _are_equal(tensor, before):
        with torch.no_grad():
            if tensor.is_nested:
                for part, held in zip(strided_parts(tensor), strided_parts(before)):
                    # A part of a nested tensor shares its memory.
                    part.copy_(held)
            elif tensor.shape == before.shape:
                tensor.copy_(before)
            else:
                tensor.data = before


def _are_equal(tensor: Tensor, before: Tensor) -> bool:
    """Whether two tensors have the same layout, shape and bits."""
    if tensor.layout != before.layout or (not tensor.is_nested and tensor.shape != before.shape):
        return False
    mine, theirs = strided_parts(tensor.detach()), strided_parts(before.detach())
    return len(mine) == len(theirs) and all(
        a.shape == b.shape and torch.equal(_bits(a), _bits(b)) for a, b in zip(mine, theirs)
    )


def _bits(tensor: Tensor) -> Tensor:
    """View a tensor's memory as integers, so that NaN equals NaN and -0 does not equal 0."""
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.view(integer) if tensor.is_floating_point() else tensor


def _restore_array(array: np.ndarray, before: np.ndarray) -> None:
    if array.dtype == object or array.tobytes() != before.tobytes():
        array[...] = before


def _restore_dict(items: dict[Any, Any], before: dict[Any, Any]) -> None:
    # Compared by identity, because tensors cannot be compared with ==; a changed order counts as a change.
    pairs = zip(items.items(), before.items(), strict=False)
    if len(items) != len(before) or any(i is not j or x is not y for (i, x), (j, y) in pairs):
        items.clear()
        items.update(before)


def _restore_items(items: list[Any] | deque[Any] | set[Any], before: list[Any]) -> None:
    if len(items) != len(before) or any(x is not y for x, y in zip(items, before)):
        items.clear()
        items.update(before) if isinstance(items, set) else items.extend(before)


def _restore_numpy_generator(generator: np.random.Generator, before: tuple[Any]) -> None:
    (generator.bit_generator.state,) = before


# The most frequent immutable types.
_ATOMS = {int, float, complex, bool, str, bytes, type(None), torch.Size, torch.dtype, torch.device}

# Mutable types, with functions to copy an object and to restore its contents. A copy that is a dict or a list
# is searched further.
_RESTORERS: list[tuple[Any, Callable[[Any], Any], Callable[[Any, Any], Any]]] = [
    (Tensor, lambda tensor: tensor.detach().clone(), _restore_tensor),
    (dict, dict, _restore_dict),
    (list | deque | set, list, _restore_items),
    (np.ndarray, np.copy, _restore_array),
    (torch.Generator, torch.Generator.get_state, torch.Generator.set_state),
    (np.random.Generator, lambda generator: (generator.bit_generator.state,), _restore_numpy_generator),
    (random.Random, random.Random.getstate, random.Random.setstate),
]


@contextmanager
def untouched(
    *models: nn.Module, training: bool | None = None, seed: int | None = None, operation: str = "skipscope"
) -> Iterator[None]:
    """Restore ``models`` and the global random state on exit, whatever runs inside.

    Restored bit for bit: buffers, the identity of every ``.grad``, training flags, ``requires_grad``, hooks,
    attributes, and the global random state. Inside, every ``.grad`` is None, gradients are enabled and
    inference mode is off. The storage of a parameter is restored, but not values that were written into it:
    the caller must not write to parameters.

    Args:
        models: modules that will be run.
        training: True or False sets the modules' flags (see :func:`set_mode`); None keeps them.
        seed: seed of the global generators inside, so that dropout draws the same numbers every time.
        operation: public call, named in errors.

    Raises:
        SkipscopeError: a model is not an ``nn.Module`` or has uninitialised parameters (lazy modules), or a
            rank of a sharded model has not made the same call within a minute.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> with untouched(model, training=True):
        ...     model(torch.randn(8, 2)).sum().backward()
        >>> model[0].weight.grad is None
        True
    """
    for model in models:
        require_module(model, operation)
        # Inside another measurement the outer call has already waited for the ranks.
        if not is_measuring():
            meet(operation, ranks_of(model))
    with _running(seed):
        snapshots = [_shared[id(model)] for model in models if id(model) in _shared]
        rest = [model for model in models if id(model) not in _shared]
        snapshots += [_Snapshot(rest)] if rest else []
        try:
            # Sharding is restored before the modules get their original Parameter objects back.
            with _sharding.as_found(models):
                for snapshot in snapshots:
                    snapshot.clear_gradients()
                if training is not None:
                    for model in models:
                        set_mode(model, training)
                yield
        finally:
            for snapshot in snapshots:
                snapshot.restore()


@contextmanager
def throwaway(model: nn.Module, seed: int | None) -> Iterator[None]:
    """Run a private copy inside, as in :func:`untouched`, but without restoring it.

    If the copy shares parameters with the user's model, the caller wraps this in :func:`untouched` of that
    model.
    """
    with _running(seed):
        for parameter in model.parameters():
            parameter.grad = None
        yield


@contextmanager
def _running(seed: int | None) -> Iterator[None]:
    with turn, random_state_kept(seed), torch.inference_mode(False), torch.enable_grad():
        _thread.depth = getattr(_thread, "depth", 0) + 1
        try:
            yield
        finally:
            _thread.depth -= 1


@contextmanager
def one_snapshot(*models: nn.Module) -> Iterator[None]:
    """Take a snapshot of each model that is reused by every :func:`untouched` inside.

    Inside, models must not be changed except within :func:`untouched`.
    """
    with turn:
        new = {id(model): _Snapshot([model]) for model in models if id(model) not in _shared}
        _shared.update(new)
        try:
            yield
        finally:
            for key in new:
                del _shared[key]


def set_mode(model: nn.Module, training: bool) -> None:
    """Set the ``training`` flag of every module, without calling the model's own ``train()`` or ``eval()``.

    An override of these methods may merge, fuse or swap weights, and may not undo it exactly. If a module has
    an override, it is called on a copy, and the resulting flags are set here, so that layers that it keeps in
    evaluation mode stay so.
    """
    flags: dict[str, bool] = {}
    if model.training is not training and changes_on_mode(model):
        try:
            with random_state_kept():
                flags = {
                    n: m.training for n, m in private_copy(model, "train").train(training).named_modules()
                }
        # An exported module refuses any mode; other modules may not be copyable.
        except Exception:
            flags = {}
    elif changes_on_mode(model):
        # The user has called the override, and may have changed flags since.
        return
    for name, module in model.named_modules():
        module.training = flags.get(name, training)


def changes_on_mode(model: nn.Module) -> bool:
    """Whether a module overrides ``train()`` or ``eval()``, which may then do more than set flags."""
    for module in model.modules():
        # A compiled module forwards both methods to the original.
        own = compiled_from(module) or module
        for method, stock in ((own.train, nn.Module.train), (own.eval, nn.Module.eval)):
            if getattr(method, "__func__", None) is not stock:
                return True
    return False


def require_module(model: Any, operation: str) -> None:
    """Refuse objects that are not modules, modules with uninitialised weights, and opaque modules."""
    if not isinstance(model, nn.Module):
        raise SkipscopeError(
            operation,
            "the model is not a torch.nn.Module",
            expected="an nn.Module",
            got=f"{type(model).__name__}: {model!r:.80}",
            cure="pass the module itself; a factory is called first: make_model()",
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise SkipscopeError(
                operation,
                "TorchScript hides what happens inside a module",
                layer=name or None,
                got=type(module).__name__,
                cure="pass the module from which it was scripted or traced",
            )
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and torch.nn.parameter.is_lazy(tensor):
                raise SkipscopeError(
                    operation,
                    "a lazy module has no weights yet, and the first forward pass would change it",
                    layer=f"{name}.{own}".lstrip("."),
                    cure="run model(inputs) once before measuring",
                )


def require_numbers(model: Any, operation: str) -> None:
    """Refuse as :func:`require_module` does, and refuse models on the meta device, which have no values."""
    require_module(model, operation)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise SkipscopeError(
            operation,
            "the model is on the meta device: it has shapes, and no numbers to measure",
            cure=(
                "give it weights: model.to_empty(device=...), then load them; "
                "find_shortcuts takes it with meta inputs"
            ),
        )


def _tensors_within(value: Any) -> Iterator[Tensor]:
    """The tensors in an attribute value, including containers (e.g. a cache of position biases)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors_within(inner)


def private_copy(model: nn.Module, operation: str, *, share: bool = False) -> nn.Module:
    """Make a deep copy of a model, with functions rebound to the copy.

    Args:
        model: any module.
        operation: public call, named in the error.
        share: whether the copy shares the Parameter objects of the original.

    Raises:
        SkipscopeError: the model holds an object that cannot be copied.
    """
    if _sharding.units(model):
        raise SkipscopeError(
            operation,
            "FSDP2 cannot copy a sharded model",
            got="fully_shard was called on it",
            cure=(
                "give it the model as it was built, before fully_shard; fully_shard the twin that comes out,"
                " and give it the weights: torch.distributed.checkpoint.state_dict.set_model_state_dict"
            ),
        )
    # During a call in another thread, the copy would get that call's hooks, modes and statistics.
    with turn:
        return _copied(model, operation, share)


def whole_copy(model: nn.Module, operation: str) -> nn.Module:
    """Copy an FSDP2 model as it was before ``fully_shard``, with whole weights on each rank (collective)."""
    with turn, _sharding.taken_apart(model):
        # The full weights belong to the copy alone, so they can be shared.
        return private_copy(model, operation, share=True)


def _copied(model: nn.Module, operation: str, share: bool) -> nn.Module:
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()} if share else {}
    # Torch refuses to copy tensors of most layouts, and tensors with a history, which each forward pass
    # recomputes (the weight under an old weight norm or pruning, a stored activation).
    for module in model.modules():
        for tensor in _tensors_within(vars(module)):
            if not tensor.is_leaf or not is_strided(tensor):
                memo[id(tensor)] = tensor.detach().clone()
    try:
        with torch.no_grad():
            copied = copy.deepcopy(model, memo)
    # A model may hold any kind of object that cannot be copied.
    except Exception as error:
        raise SkipscopeError(
            operation,
            f"the model cannot be copied ({type(error).__name__}: {str(error)[:200]})",
            cure="keep open files, locks and tensors of a forward pass out of the model's attributes",
        ) from error
    rebind(copied, memo, operation)
    return copied
