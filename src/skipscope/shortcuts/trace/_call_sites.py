"""Stable identifiers for call sites, comparable across runs.

The *key* of a call: the module whose forward makes it (host), the function, line and instruction (site), and
how many times that host has been there (nth).
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections import Counter
from dataclasses import dataclass, replace
from types import CodeType, FrameType
from typing import Any, Literal

import torch
from torch import nn

from skipscope._torch_private import compiler_is_loaded
from skipscope.shortcuts._shortcut_result import CallKey

TORCH = os.path.dirname(str(torch.__file__)) + os.sep
_DISTRIBUTED = os.path.join(TORCH, "distributed") + os.sep
_MODULES = os.path.join(TORCH, "nn", "modules") + os.sep
PLUMBING = os.path.join(_MODULES, "module.py")
# What runs between a call and a mode of ours.
_ROOM = os.path.dirname(os.path.dirname(__file__))
_OURS = tuple(os.path.join(_ROOM, name) + os.sep for name in ("trace", "taps", "twin"))
# What runs around the methods of an edited module.
_TWIN = os.path.join(_ROOM, "twin") + os.sep
_CHECKPOINT = os.path.join(TORCH, "utils", "checkpoint.py")
_COMPILED = os.path.join(TORCH, "_dynamo", "eval_frame.py")
_is_plumbing: dict[str, bool] = {}


def caller() -> FrameType:
    """The innermost frame of the model's own code."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        filename = frame.f_code.co_filename
        plumbing = _is_plumbing.get(filename)
        if plumbing is None:
            in_torch = filename.startswith(TORCH)
            plumbing = in_torch and (not filename.startswith(_MODULES) or filename == PLUMBING)
            _is_plumbing[filename] = plumbing = plumbing or filename.startswith(_OURS)
        if not plumbing:
            return frame
        frame = frame.f_back
    return frame


def is_between_processes(frame: FrameType) -> bool:
    """Whether code of ``torch.distributed`` makes the current call, somewhere below ``frame``."""
    inner = sys._getframe(2)
    while inner is not frame and inner.f_back is not None:
        if inner.f_code.co_filename.startswith(_DISTRIBUTED):
            return True
        inner = inner.f_back
    return False


_sites: dict[tuple[int, int, str], tuple[CodeType, str]] = {}


def site_of(frame: FrameType, operation: str) -> str:
    """Function, line, columns and operation: two additions on one line are two sites."""
    code = frame.f_code
    known = _sites.get((id(code), frame.f_lasti, operation))
    if known is None:
        # Not the instruction itself: Python's specialisation may give one call two instructions.
        line, _, begin, end = next(itertools.islice(code.co_positions(), frame.f_lasti // 2, None))
        where = f"{begin}-{end}" if begin is not None else str(frame.f_lasti)
        known = _sites[id(code), frame.f_lasti, operation] = (
            code,
            f"{code.co_qualname}:{line}:{where}:{operation}",
        )
    return known[1]


_sources: dict[tuple[int, int], tuple[CodeType, str]] = {}


def source_of(frame: FrameType) -> str:
    """``file.py:line``."""
    code = frame.f_code
    known = _sources.get((id(code), frame.f_lasti))
    if known is None:
        source = f"{os.path.basename(code.co_filename)}:{frame.f_lineno}"
        known = _sources[id(code), frame.f_lasti] = (code, source)
    return known[1]


def first_argument(frame: FrameType) -> Any:
    """The value of a function's first parameter (``self`` in a method), or None."""
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def is_model_code(frame: FrameType) -> bool:
    """Whether a frame is neither a module's call nor what runs around the methods of an edited module."""
    filename = frame.f_code.co_filename
    return filename != PLUMBING and not filename.startswith(_TWIN)


def is_forward(frame: FrameType) -> bool:
    """Whether a frame of a module's method is its forward: by its name, or called by ``Module.__call__``."""
    back = frame.f_back
    while back is not None and back.f_code.co_filename.startswith(_TWIN):
        back = back.f_back
    return frame.f_code.co_qualname.endswith(".forward") or (
        back is not None and back.f_code.co_filename == PLUMBING
    )


def _is_called_between(inner: FrameType, outer: FrameType) -> bool:
    """Whether a module is called between two frames."""
    frame = inner.f_back
    while frame is not None and frame is not outer:
        if frame.f_code.co_filename == PLUMBING:
            return True
        frame = frame.f_back
    return False


def _compiled_around(frame: FrameType | None, host: FrameType | None) -> Literal["", "function", "host"]:
    """What was compiled around a call: a function that the host's forward calls, or the host."""
    is_inside = host is not None
    while frame is not None:
        is_inside = is_inside and frame is not host
        if frame.f_code.co_filename == _COMPILED:
            return "function" if is_inside else "host"
        frame = frame.f_back
    return ""


@dataclass(eq=False)
class _Entered:
    """One call of a module's forward, and the counts when it began; the frame keeps its id unique."""

    frame: FrameType | None
    path: str
    call: int
    before: dict[str, int]
    after: dict[str, int] | None = None


class Sites:
    """The keys of calls, found from frames and from counts over one forward pass.

    Args:
        model: the module whose forward pass runs.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.reset()

    @functools.cached_property
    def paths(self) -> dict[int, str]:
        """The path of each module, by its id."""
        return {id(module): path for path, module in self.model.named_modules()}

    def reset(self) -> None:
        """Begin a new forward pass."""
        self.occurrences: Counter[tuple[str, str]] = Counter()
        self.operations: Counter[str] = Counter()
        self.entered: dict[int, _Entered] = {}
        self._calls: dict[tuple[str, int], _Entered] = {}
        self._times: Counter[str] = Counter()
        self._ended: Counter[str] = Counter()
        self._latest: dict[str, _Entered] = {}

    def owner_and_host(self, frame: FrameType | None) -> tuple[str, str, FrameType | None, bool]:
        """Find the modules that make a call.

        Returns:
            The path of the innermost module on the stack; that of the innermost whose forward runs, and its
            frame; and whether a checkpoint is between the call and that forward, so that the call is run
            again outside of it.
        """
        owner, checkpointed = None, False
        while frame is not None:
            if frame.f_code.co_filename == _CHECKPOINT:
                checkpointed = True
            elif is_model_code(frame):
                path = self.paths.get(id(first_argument(frame)))
                if path is not None:
                    owner = path if owner is None else owner
                    if is_forward(frame):
                        return owner, path, frame, checkpointed
            frame = frame.f_back
        return owner or "", "", None, checkpointed

    def occurrence(self, frame: FrameType, operation: str) -> tuple[str, str, int]:
        """The host, the site, and how many times this host was at this site before."""
        _, host, _, _ = self.owner_and_host(frame)
        site = site_of(frame, operation)
        nth = self.occurrences[host, site]
        self.occurrences[host, site] += 1
        return host, site, nth

    def key(self, frame: FrameType, operation: str) -> tuple[CallKey, str, bool]:
        """The complete key of a call, its owner's path, and whether it is checkpointed outside any module."""
        owner, host, host_frame, checkpointed = self.owner_and_host(frame)
        site = site_of(frame, operation)
        nth = self.occurrences[host, site]
        self.occurrences[host, site] += 1
        entered = self._enter(host_frame, host)
        index = self.operations[operation] - entered.before.get(operation, 0)
        self.operations[operation] += 1
        # Compiled code implies that this module is loaded.
        compiled = _compiled_around(frame, host_frame) if compiler_is_loaded() else ""
        return CallKey(host, site, nth, index, entered.call, compiled=compiled), owner, checkpointed

    def _enter(self, frame: FrameType | None, path: str) -> _Entered:
        """Note a forward that has begun, and those around it, with the counts before it."""
        known = self.entered.get(id(frame))
        if known is not None:
            return known
        if frame is not None and frame.f_back is not None:
            _, outer, outer_frame, _ = self.owner_and_host(frame.f_back)
            if outer_frame is not None:
                around = self._enter(outer_frame, outer)
                if outer == path and not _is_called_between(frame, outer_frame):  # a decorated forward
                    self.entered[id(frame)] = replace(
                        around, frame=frame
                    )  # keeps it, so that its id stays its own
                    return around
        call = max(self._ended[path], self._times[path])  # runs without a merge count too
        before = {} if frame is None else dict(self.operations)
        entered = self.entered[id(frame)] = _Entered(frame, path, call, before)
        self._calls[path, call] = entered
        self._times[path] = call + 1
        self._latest[path] = entered
        return entered

    def leave(self, path: str) -> None:
        """A forward has ended."""
        self._ended[path] += 1
        entered = self._latest.get(path)
        if entered is not None and entered.after is None:
            entered.after, entered.frame = dict(self.operations), None
            # A frame holds its variables, and they the activations: of a forward that is over none is kept.
            over = (path, entered.call)
            self.entered = {at: e for at, e in self.entered.items() if (e.path, e.call) != over}

    def complete(self, key: CallKey) -> CallKey:
        """Add to a key what is known only after the forward pass."""
        operation = key.site.rpartition(":")[2]
        entered = self._calls[key.host, key.call]
        among = 0 if entered.after is None else entered.after[operation] - entered.before.get(operation, 0)
        total = self.occurrences[key.host, key.site]
        runs = max(self._ended[key.host], self._times[key.host])
        return replace(key, total=total, among=among, runs=runs)
