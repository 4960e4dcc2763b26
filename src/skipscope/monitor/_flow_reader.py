"""The flow at boundaries, read from the training's own forward and backward passes, every so many steps.

For the step that is read (and only for it) a hook waits at the model; its forward pass runs under a tap, which hangs a
hook on the activation of each boundary. Nothing is run a second time, but for finding the boundaries at the start.
A compiled model runs that one step as written (``torch.compiler.set_stance``): its hooks would not be seen, or break
its graph.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skipscope import _data
from skipscope._errors import SkipscopeError
from skipscope._ranks import world
from skipscope.monitor import _gradient_norms, _rank_sums
from skipscope.monitor._step_row import on_its_way
from skipscope.shortcuts import Boundary, boundaries, tap_boundaries

Deliver = Callable[[tuple[str, ...], int, np.ndarray], None]


class FlowReader:
    """Reads the flow of one model at one step in ``every``.

    Args:
        model: the model, in whatever a trainer wrapped it.
        every: steps from one reading to the next; the first step is read.
        deliver: called with the boundaries' names, the step and the RMS at each: inf where a gradient is not finite, NaN
            where none arrived.

    Attributes:
        problem: why there is no flow; None while all is well.
    """

    def __init__(self, model: nn.Module, every: int, deliver: Deliver):
        self.model, self.every, self.deliver = _innermost(model), every, deliver
        self.problem: str | None = None
        self._points: tuple[Boundary, ...] | None = None
        self._hook: Any = None
        self._stance: Any = None
        self._busy = False
        self._ranks, self._agreed = world()[1], False
        self._seen: set[int] = set()
        self._norms: dict[int, list[Any]] = {}
        self._counts: dict[int, int] = {}
        self._waiting: deque[tuple[tuple[str, ...], int, np.ndarray, Any, Any]] = deque()

    # --- once a step ---

    def begin(self, step: int) -> None:
        """Before the passes of this step: wait at the model if it is one to be read."""
        if self.problem is not None or (step - 1) % self.every:
            return
        self._seen, self._norms, self._counts = set(), {}, {}
        if "torch._dynamo" in sys.modules:
            self._stance = torch.compiler.set_stance("force_eager")
        self._hook = self.model.register_forward_pre_hook(self._forward_begins, with_kwargs=True)

    def end(self, step: int, scale: Tensor | None) -> None:
        """After the optimizer's step: what has arrived is this step's flow."""
        if self._hook is None:
            return
        self._let_go()
        points = self._points or ()
        if self._ranks > 1:
            self._end_on_all_ranks(points, step, scale)
        elif self._norms:
            at = [i for i in range(len(points)) if i in self._seen]
            norms = [_root(self._norms.get(i)) for i in at]
            counts = np.array([self._counts.get(i, 0) for i in at], dtype=float)
            self._wait_for(tuple(points[i].name for i in at), step, counts, norms, scale)
        self._norms = {}
        self.hand_over()

    def _end_on_all_ranks(self, points: tuple[Boundary, ...], step: int, scale: Tensor | None) -> None:
        """Sum squares and counts over ranks (collective); the loss is the mean of theirs, so each holds 1/ranks of it."""
        if not (self._agreed or self._all_agree(points)):
            return
        device = next(
            (v.device for norms in self._norms.values() for v in norms if isinstance(v, Tensor)), "cpu"
        )
        sums = torch.zeros(3, len(points), dtype=torch.float64)
        for i in range(len(points)):
            sums[1, i], sums[2, i] = self._counts.get(i, 0), i in self._seen
        sums = sums.to(device)
        for i, norms in self._norms.items():
            sums[0, i] = sum(v**2 for v in norms)
        _rank_sums.all_reduced(sums)
        squares, counts, seen = sums.cpu().numpy()
        at = np.flatnonzero(seen)
        if counts.any():
            norms = [float(v) for v in np.sqrt(squares[at]) / self._ranks]
            self._wait_for(tuple(points[i].name for i in at), step, counts[at], norms, scale)

    def _all_agree(self, points: tuple[Boundary, ...]) -> bool:
        """Whether all ranks have the same boundaries (collective): else they would wait for each other, or add apples
        to pears. A rank that has not run the model yet is waited for until the next reading.
        """
        every = _rank_sums.gathered((tuple(point.name for point in points), self.problem))
        self.problem = next((problem for _, problem in every if problem), None)
        if self.problem is None and len({names for names, _ in every if names}) > 1:
            self.problem = "the flow at boundaries cannot be read: not every rank has the same boundaries"
        self._agreed = self.problem is None and all(names for names, _ in every)
        return self._agreed

    def hand_over(self, *, wait: bool = False) -> None:
        """Deliver the readings that have arrived."""
        while self._waiting:
            names, step, counts, norms, scale = self._waiting[0]
            on_the_way = [n for n in (norms, scale) if isinstance(n, _gradient_norms.Reading)]
            if not (wait or all(n.ready() for n in on_the_way)):
                return
            self._waiting.popleft()
            values = (
                norms.array() if isinstance(norms, _gradient_norms.Reading) else np.array(norms, dtype=float)
            )
            factor = float(scale.array()) if isinstance(scale, _gradient_norms.Reading) else scale
            with np.errstate(invalid="ignore", divide="ignore"):
                rms = values / factor / np.sqrt(counts)
            rms[~np.isfinite(rms)] = np.inf  # NaN says that none arrived, and nothing else
            self.deliver(names, step, np.where(counts > 0, rms, np.nan))

    def forget_points(self) -> None:
        """The model has changed: find its boundaries anew."""
        self._points, self._agreed = None, False

    def close(self) -> None:
        """Leave the model as it was."""
        self._let_go()
        self._norms = {}
        self.hand_over(wait=True)

    # --- while the step runs ---

    def _forward_begins(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._busy or self.problem is not None or not torch.is_grad_enabled():
            return None
        if self._points is None and not self._find(args, kwargs):
            return None
        points = self._points or ()
        stack = contextlib.ExitStack()
        inner = tuple(p for p in points if p.key.site != "input")  # our own hook is the one at the input
        places = [i for i, p in enumerate(points) if p.key.site != "input"]
        stack.enter_context(
            tap_boundaries(model, inner, lambda k, activation: self._touch(places[k], activation))
        )
        # Called also when the forward pass raises: the tap must not outlive it.
        after = model.register_forward_hook(lambda *_: stack.close(), always_call=True)
        stack.callback(after.remove)
        for i, point in enumerate(points):
            if point.key.site == "input":
                replaced = functools.partial(_replace_nth, point.key.nth, functools.partial(self._touch, i))
                args, kwargs = replaced((args, kwargs))
        return args, kwargs

    def _touch(self, i: int, activation: Tensor) -> Tensor:
        if (
            not torch.is_grad_enabled()
        ):  # inside re-entrant checkpointing: cannot be seen, which is not a zero
            return activation
        self._seen.add(i)
        if not activation.requires_grad:
            activation = (
                activation.detach().requires_grad_().clone()
            )  # a clone may be changed in place downstream
        activation.register_hook(functools.partial(self._arrive, i))
        return activation

    def _arrive(self, i: int, gradient: Tensor) -> None:
        grad = _gradient_norms.plain(gradient)
        if grad.device.type == "cpu":
            norm: Any = _gradient_norms.one_on_host(grad)[0]
        else:
            norm = torch.linalg.vector_norm(grad, dtype=torch.float64)
        self._norms.setdefault(i, []).append(norm)
        self._counts[i] = self._counts.get(i, 0) + grad.numel()

    def _find(self, args: Any, kwargs: Any) -> bool:
        """Find the boundaries with the inputs at hand; when that fails the flow is given up, the training goes on."""
        self._busy = True
        try:
            points = boundaries(self.model, _as_inputs(self.model, args, kwargs))
            self._points = tuple(replace(point) for point in points)
        except Exception as error:  # any model may come; a monitor must not end a training
            first = (error.problem if isinstance(error, SkipscopeError) else str(error)).splitlines()
            self.problem = (
                f"the flow at boundaries cannot be read: {first[0] if first else type(error).__name__}"
            )
        finally:
            self._busy = False
        return self.problem is None

    def _let_go(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None

    def _wait_for(
        self, names: tuple[str, ...], step: int, counts: np.ndarray, norms: list[Any], scale: Tensor | None
    ) -> None:
        device = next((v for v in norms if isinstance(v, Tensor)), None)
        if device is not None:
            norms = [v if isinstance(v, Tensor) else device.new_tensor(v) for v in norms]
            on_the_way: Any = _gradient_norms.Reading(torch.stack(norms))
        else:
            on_the_way = norms
        factor = 1.0 if scale is None else on_its_way(scale)
        self._waiting.append((names, step, counts, on_the_way, factor))


def _root(norms: list[Any] | None) -> Any:
    """The norm over several backward passes of one step."""
    if not norms:
        return 0.0
    if isinstance(norms[0], Tensor):
        return torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
    return _gradient_norms.nrm2_of(norms)


def _innermost(model: nn.Module) -> nn.Module:
    """The module whose forward is the user's: inside DDP and torch.compile's wrapper."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _as_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call's arguments in one of the forms that ``inputs`` has."""
    if not kwargs:
        return args
    if not args:
        return kwargs
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def _replace_nth(which: int, touch: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nest, its ``which``-th float tensor replaced."""
    count = -1

    def visit(tensor: Tensor) -> Tensor:
        nonlocal count
        count += tensor.is_floating_point()
        return touch(tensor) if tensor.is_floating_point() and count == which else tensor

    return _data.map_tensors(value, visit)
