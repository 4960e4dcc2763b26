"""Errors with the operation, the layer, the expected and the given value, and a cure."""

from __future__ import annotations

import linecache
import traceback
from pathlib import Path

from skipscope._printable import printable_lines

_PACKAGE = str(Path(__file__).parent)


class SkipscopeError(ValueError):
    """Error that a user can fix.

    Args:
        operation: the public call that raised it, e.g. ``"gradient_flow"``.
        problem: what is wrong, in one sentence.
        layer: the module, shortcut or boundary concerned, if any.
        expected: what would have been accepted.
        got: what was given.
        cure: what to write instead.

    Example:
        >>> raise SkipscopeError(
        ...     "ablate", "the shortcut cannot be edited", layer="block.3", cure="use nn.Module"
        ... )
        Traceback (most recent call last):
        ...
        skipscope._errors.SkipscopeError: ablate: the shortcut cannot be edited
          layer:    block.3
          cure:     use nn.Module
    """

    def __init__(
        self,
        operation: str,
        problem: str,
        *,
        layer: str | None = None,
        expected: object = None,
        got: object = None,
        cure: str | None = None,
    ):
        self.operation, self.problem, self.layer = operation, problem, layer
        self.expected, self.got, self.cure = expected, got, cure
        details = {"layer": layer, "expected": expected, "got": got, "cure": cure}
        lines = [f"{operation}: {problem}"]
        lines += [f"  {key + ':':<9} {value}" for key, value in details.items() if value is not None]
        super().__init__(printable_lines("\n".join(lines)))

    def _render_traceback_(self) -> list[str]:
        """Short traceback for IPython: the user's line that made the call, and the message."""
        frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(self.__traceback__)]
        first = next((i for i, (file, _) in enumerate(frames) if file.startswith(_PACKAGE)), len(frames))
        shown = [f"{type(self).__name__}: {self}"]
        if first:
            file, line = frames[first - 1]
            shown = [f"line {line}: {linecache.getline(file, line).strip()}", "", *shown]
        return shown

    def rename(self, operation: str) -> None:
        """Replace the inner operation that the error names by the public call ``operation``."""
        if self.operation.partition(" ")[0] != operation:
            self.args = (operation + str(self).removeprefix(self.operation),)
            self.operation = operation

    def __reduce__(self):
        # The default drops keyword arguments, and errors are pickled under torchrun and Ray.
        return _rebuild, (type(self), self.operation, self.problem, self.layer, str(self), self.cure)


def _rebuild(kind, operation, problem, layer, text, cure):
    error = kind.__new__(kind)
    error.operation, error.problem, error.layer, error.cure = operation, problem, layer, cure
    error.expected = error.got = None
    error.args = (text,)
    return error


class MissingExtra(SkipscopeError, ImportError):
    """Error for an optional package that is not installed; the cure is the command that installs it."""

    def __init__(self, operation: str, package: str):
        super().__init__(
            operation, f"the package {package} is not installed", cure=f"python -m pip install {package}"
        )
