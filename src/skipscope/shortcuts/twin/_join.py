"""The rules of a rewired twin, which replace a sum by a connection, and possibly the branch's input."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skipscope._errors import SkipscopeError
from skipscope.nn import identity_shortcut
from skipscope.shortcuts._shortcut_result import Place, Shortcut
from skipscope.shortcuts.trace import _operations

SECOND_READER = "something else uses the fork's tensor too"


@dataclass(frozen=True, eq=False)
class Join:
    """A rule that replaces a sum of a shortcut and a branch by a connection.

    Attributes:
        place: the operand that carries the shortcut.
        branch: number of the operand that carries the branch.
        name: name of the shortcut, for errors.
        module: the connection, or the chain.
        reads: whether it also replaces the branch's input by the connection's ``read``.
        index: position of the merge in a chain; 0 if there is no chain.
    """

    place: Place
    branch: int
    name: str
    module: Any
    reads: bool = False
    index: int = 0

    @classmethod
    def at(cls, shortcut: Shortcut, module: nn.Module, *, reads: bool = False, index: int = 0) -> Join:
        """The rule for one shortcut."""
        operand, branch = shortcut.sides.index("shortcut"), shortcut.sides.index("branch")
        return cls(Place(shortcut.key, operand), branch, shortcut.name, module, reads, index)

    def __deepcopy__(self, memo: Any) -> Join:
        return type(self)(
            self.place, self.branch, self.name, copy.deepcopy(self.module, memo), self.reads, self.index
        )

    @property
    def action(self) -> Any:
        """Value that is equal for equal rules, to compare the rules of several calls."""
        return id(self.module), self.index

    def read(self, x: Tensor, passing: dict[Any, Any]) -> Tensor:
        """The branch's input, which replaces ``x``."""
        read = self.module.read(x)
        passing[self.name], passing[self.name, "join"] = x, self
        return read

    def result(self, x: Tensor, f: Tensor, passing: dict[Any, Any]) -> Tensor:
        """The merge's output, which replaces ``x + f``."""
        if self.reads:
            self._expect(x, passing.pop(self.name, None))
        return self.module.write(x, f)

    def _expect(self, x: Tensor, handed: Any) -> None:
        """Refuse a merge whose shortcut is another tensor than expected; compiled code is checked earlier."""
        if handed is None or (not torch.compiler.is_compiling() and handed is not x):
            raise self.misfit("the shortcut carries another tensor than the one that was read")

    def sum(
        self,
        operation: _operations.Operation,
        args: Any,
        kwargs: Any,
        values: list[Any],
        passing: dict[Any, Any],
    ) -> Tensor:
        """The connection's result for the call ``x + f``; in place if the call is."""
        if len(args) > 2 or kwargs.keys() - {"input", "other"}:
            raise self.misfit("the sum has further arguments")
        if not operation.in_place:
            return self.result(values[self.place.operand], values[self.branch], passing)
        # The connection may save its operands for the backward pass, so do not overwrite them.
        whole = values[0].clone()
        x, f = (whole if i == 0 else values[i] for i in (self.place.operand, self.branch))
        return values[0].copy_(self.result(x, f, passing))

    def given(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], this: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replace the first tensor input of the module that the fork feeds by the connection's ``read``.

        Args:
            args: its positional arguments.
            kwargs: its keyword arguments.
            this: the current pass.

        Raises:
            SkipscopeError: another call has used the fork's tensor before.
        """
        at = next((i for i, value in enumerate(args) if isinstance(value, Tensor)), None)
        name = next((key for key, value in kwargs.items() if isinstance(value, Tensor)), None)
        if at is None and name is None:
            return args, kwargs
        x = args[at] if at is not None else kwargs[name]  # type: ignore[index]
        if not torch.compiler.is_compiling() and this.is_used(x):
            raise self.misfit(SECOND_READER)
        this.is_reading = True
        read = self.read(x, this.passing)
        this.is_reading = False
        if at is not None:
            return (*args[:at], read, *args[at + 1 :]), kwargs
        return args, {**kwargs, str(name): read}

    def misfit(self, got: str) -> SkipscopeError:
        """The error for a merge that this kind of connection does not fit."""
        return SkipscopeError(
            "rewire",
            "this kind of connection does not fit this merge",
            layer=self.name,
            expected=(
                "a fork that feeds the branch by one module and the merge, and nothing else before the merge"
            ),
            got=got,
            cure="choose a kind that only joins (rezero, layer-scale, highway, ...), or leave this merge out",
        )


@dataclass(frozen=True, eq=False)
class ChainJoin(Join):
    """The rule for one merge of a chain, in which each merge's output must be the next merge's shortcut."""

    def read(self, x: Tensor, passing: dict[Any, Any]) -> Tensor:
        state, h = self.module.begin(x)
        passing[self.name], passing[self.name, "join"] = x, self
        passing[id(self.module)] = 0, state, x
        return h

    def result(self, x: Tensor, f: Tensor, passing: dict[Any, Any]) -> Tensor:
        if self.index == 0 and not self.reads:
            passing[id(self.module)] = (0, self.module.begin(x)[0], x)
        index, state, handed = passing.get(id(self.module), (None, None, None))
        if index != self.index:
            raise self.misfit("the merges are not passed in the order in which they were found")
        if self.index == 0 and self.reads:
            passing.pop(self.name, None)
        if not torch.compiler.is_compiling() and handed is not x:
            raise SkipscopeError(
                "rewire",
                "the merges do not form one chain",
                layer=self.name,
                expected="each merge's output as the next merge's shortcut",
                got="something between two merges changes the stream",
                cure=(
                    "choose a kind that goes around one branch, or give a part of the chain:"
                    " found.select(name=...)"
                ),
            )
        state, y = self.module.step(
            self.index, state, identity_shortcut(x, f) if self.module.of_blocks else f
        )
        passing[id(self.module)] = (self.index + 1, state, y)
        return y
