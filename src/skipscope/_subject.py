"""Subject of a public call: the checked model, data and loss, with the shortcuts and boundaries found.

A public call first calls :func:`prepare`, and passes the result to inner functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from skipscope._data import Arguments, Batch, Batches, Objective, inputs_of, map_tensors, read
from skipscope._errors import SkipscopeError
from skipscope._ranks import meet, ranks_of
from skipscope._torch_private import as_written
from skipscope._untouched import require_module, throwaway, untouched
from skipscope.shortcuts import Boundary, Shortcuts, average_statistics, boundaries, find_shortcuts, unwrapped


@dataclass(frozen=True, eq=False)
class Subject:
    """A model with its data and its loss. Shortcuts and boundaries are computed at first use and cached.

    Attributes:
        model: the model without its wrappers.
        data: the batches.
        loss: the objective.
        operation: public call, named in errors.
        ranks: ranks that must run the model together; empty unless it is sharded.
        owned: whether the model is a throwaway copy that is not restored after a run.
        given: shortcuts, if known in advance.
        given_inputs: inputs of the model, if known in advance.
    """

    model: nn.Module
    data: Batches
    loss: Objective
    operation: str
    ranks: tuple[int, ...] = ()
    owned: bool = False
    given: Shortcuts | None = None
    given_inputs: Any = None

    @property
    def inputs(self) -> Any:
        """Inputs of the model for the first batch: tensor, tuple, Mapping or :class:`Arguments`.

        For an ``@objective`` they are recorded in a run that is stopped at the first call of the model.

        Raises:
            SkipscopeError: the objective never calls the model.
        """
        return self._cached("inputs", self._inputs)

    @property
    def found(self) -> Shortcuts:
        """The model's shortcuts."""
        return self._cached("found", self._found)

    @property
    def boundaries(self) -> tuple[Boundary, ...]:
        """Boundaries at which the gradient flow is measured; an edited twin shares those of its original.

        Raises:
            SkipscopeError: the model has no floating-point activation.
        """
        return self._cached("boundaries", self._boundaries)

    @contextmanager
    def running(self, seed: int) -> Iterator[None]:
        """Run the model inside with a seed, in its modules' current modes; all state is restored on exit."""
        if self.owned:
            left = throwaway(self.model, seed)
        else:
            left = untouched(self.model, seed=seed, operation=self.operation)
        with left, as_written():
            yield

    def with_own_inputs(self) -> Subject:
        """This subject, with inputs copied for each pass if the model writes into them."""
        # `found` may be a plain list of shortcuts.
        if not getattr(self.found, "writes_inputs", False):
            return self
        return replace(self, data=self.data.copied(), given=self.found, given_inputs=self.inputs)

    def twin(self, model: nn.Module, *, owned: bool = True) -> Subject:
        """This subject with a copy of the model (edited, trained or neither), and the same shortcuts."""
        return replace(self, model=model, owned=owned, given=self.found, given_inputs=self.inputs)

    def other(self, model: nn.Module, *, owned: bool = True) -> Subject:
        """This subject with another network, which has its own shortcuts."""
        return replace(self, model=unwrapped(model), owned=owned, given=None, given_inputs=None)

    def on(self, batch: Batch) -> Subject:
        """This subject with a single batch as data."""
        return replace(self, data=Batches([batch], single=True, cuttable=self.data.cuttable))

    def recalibrate(self, twin: nn.Module) -> nn.Module:
        """Measure a twin's batch-norm statistics again on the data, as ``skipscope.recalibrate`` does."""
        return average_statistics(twin, self.data, self.loss.run)

    def _cached(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return ``compute()``, cached under ``name``.

        ``functools.cached_property`` could deadlock: until Python 3.12 it holds a single lock for all
        subjects while ``compute`` waits for the lock of public calls.
        """
        known = self.__dict__.setdefault("_known", {})
        if name not in known:
            known[name] = compute()
        return known[name]

    def _inputs(self) -> Any:
        if self.given_inputs is not None:
            return self.given_inputs
        batch = self.data.first()
        return inputs_of(batch) if self.loss.from_output is not None else self._first_call(batch)

    def _found(self) -> Shortcuts:
        if self.given is not None:
            return self.given
        with as_written():
            return find_shortcuts(self.model, self.inputs)

    def _boundaries(self) -> tuple[Boundary, ...]:
        with as_written():
            points = boundaries(self.model, self.inputs, found=self.found)
        if not points:
            raise SkipscopeError(
                self.operation,
                "no float activation was seen in a forward pass",
                expected="a float input, or an embedding",
                got=f"a model of type {type(self.model).__name__}",
                cure="pass the inputs that the model is trained on",
            )
        return points

    def _first_call(self, batch: Batch) -> Any:
        calls: list[Any] = []

        def note(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            calls.append(Arguments(positional, keywords).plain())
            raise _Called

        with self.running(0):
            handle = self.model.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
            try:
                self.loss(self.model, batch)
            except _Called:
                pass
            finally:
                handle.remove()
        if not calls:
            raise SkipscopeError(
                self.operation,
                "the objective never calls the model, so nothing tells what it is called with",
                expected="model(...) somewhere in it",
                got=self.loss.name,
                cure="call the model itself in the objective, not a method or a part of it",
            )
        return map_tensors(calls[0], _without_history)


class _Called(BaseException):
    """Stops a run of an objective at its call of the model; user code may catch any Exception."""


def _without_history(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_inference() else tensor.detach()


def prepare(
    model: nn.Module,
    data: Any,
    loss: Any,
    operation: str,
    *,
    weight: Callable[[Batch], float] | None = None,
    found: Shortcuts | None = None,
) -> Subject:
    """Check and read the arguments of a public call.

    Args:
        model: the user's model.
        data: the user's data.
        loss: the user's loss.
        operation: public call, named in errors.
        weight: batch -> its weight in the mean over batches.
        found: shortcuts, if known in advance; by default they are found at first use.

    Raises:
        SkipscopeError: model, data or loss cannot be read, or a rank does not take part in a collective call.
    """
    require_module(model, operation)
    ranks = ranks_of(model)
    meet(operation, ranks)
    model = unwrapped(model)
    batches, objective = read(model, data, loss, operation, weight=weight)
    return Subject(model, batches, objective, operation, ranks, given=found)
