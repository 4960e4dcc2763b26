"""The rules of a rewired twin: what takes the place of a sum, and of what the branch reads."""

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
    """A sum of a shortcut and a branch that is computed by a connection.

    Attributes:
        place: the operand that carries the shortcut.
        branch: number of the operand that carries the branch.
        name: of the shortcut, for errors.
        module: the connection, or the chain.
        reads: it also gives the branch another input than the fork's tensor.
        index: the place in a chain; 0 where there is none.
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
        """What distinguishes this rule from others at the same place."""
        return id(self.module), self.index

    def read(self, x: Tensor, passing: dict[Any, Any]) -> Tensor:
        """What the branch is given in place of ``x``."""
        read = self.module.read(x)
        passing[self.name], passing[self.name, "join"] = x, self
        return read

    def result(self, x: Tensor, f: Tensor, passing: dict[Any, Any]) -> Tensor:
        """What the merge gives in place of ``x + f``."""
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
        """The call ``x + f`` as the connection makes it, in place where the call is."""
        if len(args) > 2 or kwargs.keys() - {"input", "other"}:
            raise self.misfit("the sum has further arguments")
        if not operation.in_place:
            return self.result(values[self.place.operand], values[self.branch], passing)
        # What is overwritten may be saved for the way back.
        whole = values[0].clone()
        x, f = (whole if i == 0 else values[i] for i in (self.place.operand, self.branch))
        return values[0].copy_(self.result(x, f, passing))

    def given(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], this: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replace the first tensor input of the module that the fork feeds by what the connection reads.

        Args:
            args: its inputs as built.
            kwargs: the same by name.
            this: the current pass.

        Raises:
            SkipscopeError: something else has used the fork's tensor before.
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
        """The refusal of a merge that this kind does not fit."""
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
    """A merge of a chain: the output of one merge is what the next one's shortcut must carry."""

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
