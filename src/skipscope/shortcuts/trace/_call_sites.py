"""Stable identifiers for call sites, comparable across runs.

The *key* of a call holds the module whose forward makes it (host), the function, line and columns of the code
(site), and the number of earlier calls of that host at that site (nth).
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
# Folders of the frames between a call and one of our modes.
_SHORTCUTS_FOLDER = os.path.dirname(os.path.dirname(__file__))
_OURS = tuple(os.path.join(_SHORTCUTS_FOLDER, name) + os.sep for name in ("trace", "taps", "twin"))
# Folder of the frames around the methods of an edited module.
_TWIN = os.path.join(_SHORTCUTS_FOLDER, "twin") + os.sep
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
    """Identifier of a call site: function, line, columns and operation. Two additions on one line differ."""
    code = frame.f_code
    known = _sites.get((id(code), frame.f_lasti, operation))
    if known is None:
        # The columns, not the instruction: Python's specialisation may give one call two instructions.
        line, _, begin, end = next(itertools.islice(code.co_positions(), frame.f_lasti // 2, None))
        where = f"{begin}-{end}" if begin is not None else str(frame.f_lasti)
        known = _sites[id(code), frame.f_lasti, operation] = (
            code,
            f"{code.co_qualname}:{line}:{where}:{operation}",
        )
    return known[1]


_sources: dict[tuple[int, int], tuple[CodeType, str]] = {}


def source_of(frame: FrameType) -> str:
    """The source location of a frame's current line, as ``file.py:line``."""
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
    """Whether a frame is neither ``Module.__call__`` nor our wrapper of an edited module's method."""
    filename = frame.f_code.co_filename
    return filename != PLUMBING and not filename.startswith(_TWIN)


def is_forward(frame: FrameType) -> bool:
    """Whether a frame of a module's method is its forward, by name or as called by ``Module.__call__``."""
    back = frame.f_back
    while back is not None and back.f_code.co_filename.startswith(_TWIN):
        back = back.f_back
    return frame.f_code.co_qualname.endswith(".forward") or (
        back is not None and back.f_code.co_filename == PLUMBING
    )


def _is_called_between(inner: FrameType, outer: FrameType) -> bool:
    """Whether ``Module.__call__`` is between two frames."""
    frame = inner.f_back
    while frame is not None and frame is not outer:
        if frame.f_code.co_filename == PLUMBING:
            return True
        frame = frame.f_back
    return False


def _compiled_around(frame: FrameType | None, host: FrameType | None) -> Literal["", "function", "host"]:
    """The compiled code around a call: a function that the host's forward calls, the host, or none ("")."""
    is_inside = host is not None
    while frame is not None:
        is_inside = is_inside and frame is not host
        if frame.f_code.co_filename == _COMPILED:
            return "function" if is_inside else "host"
        frame = frame.f_back
    return ""


@dataclass(eq=False)
class _Entered:
    """One run of a module's forward, with the operation counts before it and after it.

    It holds the frame, so that the frame's id is not reused.
    """

    frame: FrameType | None
    path: str
    call: int
    before: dict[str, int]
    after: dict[str, int] | None = None


class Sites:
    """Computes the keys of calls from frames and from counts over one forward pass.

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
        """Clear all counts for a new forward pass."""
        self.occurrences: Counter[tuple[str, str]] = Counter()
        self.operations: Counter[str] = Counter()
        self.entered: dict[int, _Entered] = {}
        self._calls: dict[tuple[str, int], _Entered] = {}
        self._times: Counter[str] = Counter()
        self._ended: Counter[str] = Counter()
        self._latest: dict[str, _Entered] = {}

    def owner_and_host(self, frame: FrameType | None) -> tuple[str, str, FrameType | None, bool]:
        """Find the modules whose code makes a call.

        Returns:
            The path of the innermost module on the stack (owner); the path and the frame of the innermost
            module whose forward runs (host); and whether a checkpoint is between the call and the host's
            forward, so that the call is recomputed outside of that forward.
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
        """The host, the site, and the number of earlier calls of this host at this site."""
        _, host, _, _ = self.owner_and_host(frame)
        site = site_of(frame, operation)
        nth = self.occurrences[host, site]
        self.occurrences[host, site] += 1
        return host, site, nth

    def key(self, frame: FrameType, operation: str) -> tuple[CallKey, str, bool]:
        """The key of a call, its owner's path, and whether a checkpoint recomputes it outside its host."""
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
        """Note a forward that has begun, and those around it, with the counts before them."""
        known = self.entered.get(id(frame))
        if known is not None:
            return known
        if frame is not None and frame.f_back is not None:
            _, outer, outer_frame, _ = self.owner_and_host(frame.f_back)
            if outer_frame is not None:
                around = self._enter(outer_frame, outer)
                # The wrapper and the body of a decorated forward are one run of it.
                if outer == path and not _is_called_between(frame, outer_frame):
                    # The entry holds the frame, so that its id is not reused.
                    self.entered[id(frame)] = replace(around, frame=frame)
                    return around
        # Runs without a merge are only counted as they end, by leave().
        call = max(self._ended[path], self._times[path])
        before = {} if frame is None else dict(self.operations)
        entered = self.entered[id(frame)] = _Entered(frame, path, call, before)
        self._calls[path, call] = entered
        self._times[path] = call + 1
        self._latest[path] = entered
        return entered

    def leave(self, path: str) -> None:
        """Note that a forward has ended."""
        self._ended[path] += 1
        entered = self._latest.get(path)
        if entered is not None and entered.after is None:
            entered.after, entered.frame = dict(self.operations), None
            # A frame holds its local variables and so the activations: release those of an ended forward.
            over = (path, entered.call)
            self.entered = {at: e for at, e in self.entered.items() if (e.path, e.call) != over}

    def complete(self, key: CallKey) -> CallKey:
        """Add to a key the totals that are known only after the forward pass."""
        operation = key.site.rpartition(":")[2]
        entered = self._calls[key.host, key.call]
        among = 0 if entered.after is None else entered.after[operation] - entered.before.get(operation, 0)
        total = self.occurrences[key.host, key.site]
        runs = max(self._ended[key.host], self._times[key.host])
        return replace(key, total=total, among=among, runs=runs)
