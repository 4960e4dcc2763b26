"""The subject of a public call: model, data and loss, checked and read once, and what was found in them.

:func:`prepare` is what a public call does first. What it returns is handed down; inner functions take it.
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
    """A model with its data and its loss. Shortcuts and boundaries are found at first use, and kept.

    Attributes:
        model: out of its wrappers.
        data: the batches.
        loss: the objective.
        operation: the public call, named in errors.
        ranks: those without which the model cannot run; empty for most.
        owned: the model is a throwaway copy, so nothing is restored after it has run.
        given: shortcuts that are known already.
        given_inputs: what the model is called with, where that is known already.
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
        """What the model is called with for the first batch: tensor, tuple, Mapping or :class:`Arguments`.

        For an ``@objective``, which calls the model as it likes, one run shows it; the run ends at that call.

        Raises:
            SkipscopeError: the objective never calls the model.
        """
        return self._once("inputs", self._inputs)

    @property
    def found(self) -> Shortcuts:
        """The model's shortcuts."""
        return self._once("found", self._found)

    @property
    def boundaries(self) -> tuple[Boundary, ...]:
        """Where the flow is read; an edited twin has its original's.

        Raises:
            SkipscopeError: the model has no float activation at all.
        """
        return self._once("boundaries", self._boundaries)

    @contextmanager
    def running(self, seed: int) -> Iterator[None]:
        """Run the model inside, in the modes its modules are in, with a seed; outside nothing has changed."""
        if self.owned:
            left = throwaway(self.model, seed)
        else:
            left = untouched(self.model, seed=seed, operation=self.operation)
        with left, as_written():
            yield

    def with_own_inputs(self) -> Subject:
        """The same, with inputs copied for each pass where the model writes into them."""
        if not getattr(self.found, "writes_inputs", False):  # it may be a plain list of shortcuts
            return self
        return replace(self, data=self.data.copied(), given=self.found, given_inputs=self.inputs)

    def twin(self, model: nn.Module, *, owned: bool = True) -> Subject:
        """The same data, loss and shortcuts with a copy of the model (edited, trained or neither)."""
        return replace(self, model=model, owned=owned, given=self.found, given_inputs=self.inputs)

    def other(self, model: nn.Module, *, owned: bool = True) -> Subject:
        """The same data and loss for another network, whose shortcuts are its own."""
        return replace(self, model=unwrapped(model), owned=owned, given=None, given_inputs=None)

    def on(self, batch: Batch) -> Subject:
        """The same model and loss on one batch."""
        return replace(self, data=Batches([batch], single=True, cuttable=self.data.cuttable))

    def recalibrate(self, twin: nn.Module) -> nn.Module:
        """Measure a twin's batch-norm statistics again on the data, as ``skipscope.recalibrate`` does."""
        return average_statistics(twin, self.data, self.loss.run)

    def _once(self, name: str, compute: Callable[[], Any]) -> Any:
        """What ``compute`` returns, computed at its first use.

        Not ``functools.cached_property``: until Python 3.12 that holds one lock for all subjects, and a
        thread that waits for its turn to run the model would wait for ever for a thread that waits for that
        lock.
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
    """Ends a run of an objective once the model is called; not an Exception, which people catch."""


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
    """Check and read what a public call was given.

    Args:
        model: as the user gave it.
        data: as the user gave it.
        loss: as the user gave it.
        operation: the public call, named in errors.
        weight: what a batch counts for in the mean over batches.
        found: shortcuts that are known already; found at first use by default.

    Raises:
        SkipscopeError: model, data or loss cannot be read, or a rank stays away from a collective call.
    """
    require_module(model, operation)
    ranks = ranks_of(model)
    meet(operation, ranks)
    model = unwrapped(model)
    batches, objective = read(model, data, loss, operation, weight=weight)
    return Subject(model, batches, objective, operation, ranks, given=found)
