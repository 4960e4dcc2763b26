"""Gradient flow at boundaries, read from the training's own forward and backward passes every n-th step.

Only while a step is read, a global forward pre-hook waits for the model to be called. That forward pass runs
under a tap, which puts a hook on the activation of each boundary. Nothing is set on the model or its
parameters, so that copies and files of the model made meanwhile contain nothing of skipscope. Only backward
passes whose gradients the optimizer receives count (``_backward_passes``); gradients of several passes at an
activation are added before they are squared. Nothing is run a second time, except to find the boundaries at
the start. A compiled model runs eagerly in the step that is read (``torch.compiler.set_stance``), because
hooks would be skipped or break its graph.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from skipscope import _data, _torch_private
from skipscope._errors import SkipscopeError
from skipscope._ranks import RankGroup, world
from skipscope._sharding import gathered_weights
from skipscope._untouched import is_measuring, untouched
from skipscope.flow import GROWTH, Layout, Reach, by_step, layout_of, reach_of
from skipscope.monitor.recording import _gradient_norms, _rank_sums
from skipscope.monitor.recording._backward_passes import BackwardPass, BackwardPasses, inside_backward
from skipscope.monitor.recording._step_row import on_its_way
from skipscope.monitor.recording._wrappers import innermost
from skipscope.shortcuts import Boundary, boundaries, tap_boundaries


@dataclass(frozen=True, eq=False)
class FlowRow:
    """Gradient flow at a step.

    Attributes:
        owner: the optimizer whose step it is.
        step: its number.
        names: of the boundaries.
        norm: L2 norm of dL/d(activation) over the whole batch; inf where a gradient is not finite, NaN where
            none arrived.
        relative: L2 norm of the gradient times the activation, where norms stand between the weights; else
            NaN.
        elements: that it is of, so that the RMS is ``norm / sqrt(elements)``.
        hidden: whether the boundary is between input and output.
        lines: the lines that it is on, as bits: one line for each input of the model.
        averaging: decades that each loses by averages between it and the output.
        normed: norms over the data stand between the weights.
        reach: of the recurrent layer through which the gradient grows, or with the shortest one for its
            length; None without one.
    """

    owner: int
    step: int
    names: tuple[str, ...]
    norm: np.ndarray
    relative: np.ndarray
    elements: np.ndarray
    hidden: tuple[bool, ...]
    lines: tuple[int, ...]
    averaging: tuple[float, ...]
    normed: bool
    reach: Reach | None


@dataclass(eq=False)
class _Activation:
    """Gradients at an activation of a forward pass, by backward pass.

    Attributes:
        boundary: its number; -1 for the input of a recurrent layer.
        elements: of the gradient.
        recurrent: the layer, or the cell.
        step: of a cell, how many of its calls came before in this forward pass; None of a layer.
        batch_first: the layer's input is ``[B, T, F]``.
        value: the activation, where gradient times activation is asked for.
        relative: that norm, by backward pass.
    """

    boundary: int
    elements: int
    recurrent: str = ""
    step: int | None = None
    batch_first: bool = False
    arrived: dict[BackwardPass, Any] = field(default_factory=dict)  # a norm; [gradient] where more may follow
    value: Tensor | None = None
    relative: dict[BackwardPass, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Pending:
    """A row whose numbers are being transferred from an accelerator."""

    owner: int
    step: int
    names: tuple[str, ...]
    elements: np.ndarray
    norms: Any
    scale: Any
    reach: Reach | None


class FlowReader:
    """Reader of a model's gradient flow at every n-th step.

    Args:
        model: the model, possibly in wrappers of a trainer.
        parameters: index of an optimizer -> the parameters of the model that it updates.
        every: steps between readings; the first step is read.
        deliver: function called with each :class:`FlowRow`.
        first_step: number of steps made before.
        ended: function called after each step that was read, outside of the backward pass.

    Attributes:
        problem: why the flow cannot be read, or None.
        root: name of the part of the model in which the flow is read instead.
        found: number of steps read; ``rows`` of them gave a flow.
        ran: number of forward passes in these steps.
        cleared: number of backward passes in these steps whose gradients were cleared.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[int, Sequence[Tensor]],
        every: int,
        deliver: Callable[[FlowRow], None],
        ended: Callable[[], None],
        first_step: int = 0,
    ):
        self.model, self.every, self.deliver, self.ended = innermost(model), every, deliver, ended
        self.problem: str | None = None
        self.root = ""
        self.found = self.rows = self.ran = self.cleared = self.forwards = 0
        self.parameters = parameters
        self.passes = BackwardPasses(parameters, self._gathered)
        self.first_step = first_step
        self.steps = dict.fromkeys(parameters, first_step)
        self._points: tuple[Boundary, ...] | None = None
        self._layout = Layout((), (), (), False)
        self._whole = self.model
        self._parts: set[int] = set()
        self._running: list[int] = []
        self._called: dict[str, nn.Module] = {}
        self._reading = self._at_end = False
        self._is_eager = False
        self._hooks: list[Any] = []
        self._activations: list[_Activation] = []
        self._cell_calls: Counter[str] = Counter()
        self._left: set[int] = set()
        self._received: dict[int, tuple[int, Any]] = {}
        self._ranks, self._agreed = world()[1], False
        self._waiting: deque[_Pending] = deque()

    def _gathered(self) -> dict[int, Tensor]:
        return gathered_weights(self._whole)

    # --- once a step ---

    def begin(self) -> None:
        """Begin a step, before its passes: if it is to be read, wait for the model to be called."""
        step = max(self.steps.values(), default=self.first_step) - self.first_step
        if self.problem is not None or step % self.every or self._reading:
            return
        self._reading, self._left, self._received = True, set(self.parameters), {}
        self._activations, self.forwards = [], 0
        self._running = []
        self.passes = BackwardPasses(self.parameters, self._gathered)
        self._is_eager = _torch_private.eager.begin()
        self._hooks = [
            _torch_private.quiet_about_global_hooks(),
            module_hooks.register_module_forward_pre_hook(self._called_before),
        ]
        if not self.rows:  # until the model has been seen running, parts of it may be what the training calls
            self._parts = {id(part) for part in self._whole.modules()} - {id(self.model)}
            self._hooks.append(
                module_hooks.register_module_forward_hook(self._called_after, always_call=True)
            )

    def received(self, owner: int, scale: Tensor | None) -> None:
        """Take the flow of an optimizer's step, when its gradients are final."""
        if not self._reading or owner not in self.steps:
            return
        if inside_backward():
            self.passes.stepped_inside(owner)
            self._received[owner] = self.steps[owner] + 1, scale
            self._when_backward_ends()
        elif owner not in self._received:
            self._received[owner] = self.steps[owner] + 1, scale
            self._cut(owner, self.passes.counted(owner), scale)
            if len(self.parameters) == 1:
                # A closure may be evaluated again, but the first evaluation gives the gradient of the step.
                self._unhook()

    def stepped(self, owner: int, step: int) -> None:
        """Finish the step of an optimizer."""
        if owner not in self.steps:
            return
        self.steps[owner] = step
        if inside_backward():
            if not self._reading:
                self._when_backward_ends()
            return
        if self._reading:
            if self.forwards or len(self.parameters) == 1:
                self._left.discard(owner)
            self._received.pop(owner, None)
            if self._left:
                return
            self._end()
        self.begin()

    def _when_backward_ends(self) -> None:
        """Finish the step at the end of the backward pass, for optimizers that step inside it."""
        if not self._at_end:
            self._at_end = True
            _torch_private.at_end_of_backward(self._backward_ended)

    def _backward_ended(self) -> None:
        self._at_end = False
        if self._reading and self._received:
            owner, (_, scale) = next(reversed(self._received.items()))
            self._cut(owner, self.passes.counted(owner), scale)
            self._end()
        self.begin()

    def _end(self) -> None:
        self.found += 1
        self.ran += self.forwards
        self.cleared += self.passes.cleared
        self._follow_what_is_called()
        self._let_go()
        self.hand_over()
        self.ended()

    def _follow_what_is_called(self) -> None:
        """Read the flow in a part of the model if only that part is called, as in a LightningModule."""
        if self.rows or self.forwards or not self._called or self.model is not self._whole:
            return
        if len(self._called) == 1:
            self.root, self.model = next(iter(self._called.items()))

    def why_nothing(self) -> str | None:
        """Why no flow was read although steps were made, or None if flow was read or no step was made."""
        if self.problem is not None or self.rows or not self.found:
            return None
        if not self.ran:
            called = ", ".join(self._called)
            cure = (
                f"It calls parts of it: {called}. Watch one." if called else "Watch the module that it calls."
            )
            return f"No flow was read: the training never calls the model's forward. {cure}"
        if self.cleared:
            return "No flow was read: the gradients were cleared between backward() and step()."
        return "No flow was read: no backward pass reached the optimizer's parameters."

    def _cut(self, owner: int, counted: Sequence[BackwardPass], scale: Any) -> None:
        """Build the row of this step from the counted passes."""
        self.passes.forget(counted)
        step, points = self.steps[owner] + (not inside_backward()), self._points or ()
        if counted and all(p.certain for p in counted):
            step = max(self.steps.values())
        norms: dict[int, list[Any]] = {}
        relative: dict[int, list[Any]] = {}
        elements = np.zeros(len(points))
        recurrent = [activation for activation in self._activations if activation.recurrent]
        crossed = [activation for activation in self._activations if not activation.recurrent]
        for activation in crossed:
            value = _norm_of([activation.arrived[p] for p in counted if p in activation.arrived])
            if value is not None:
                norms.setdefault(activation.boundary, []).append(value)
                relative.setdefault(activation.boundary, []).append(_relative_of(activation, counted))
                elements[activation.boundary] += activation.elements
        seen = {activation.boundary for activation in crossed}
        if len(self.parameters) > 1 and not any(p.certain for p in counted):
            seen &= set(norms)  # another optimizer's loss may lead elsewhere
        elif any(p.partial for p in counted):
            seen &= set(norms)
        if self._ranks > 1:
            self._cut_on_all_ranks(owner, step, points, norms, relative, elements, seen, scale)
        elif norms:
            at = sorted(seen)
            values = [*(_root(norms.get(i)) for i in at), *(_root(relative.get(i)) for i in at)]
            names = tuple(points[i].name for i in at)
            self._wait_for(owner, step, names, elements[at], values, scale, _reach_of(recurrent, counted))

    def _cut_on_all_ranks(
        self,
        owner: int,
        step: int,
        points: tuple[Boundary, ...],
        norms: dict[int, list[Any]],
        relative: dict[int, list[Any]],
        elements: np.ndarray,
        seen: set[int],
        scale: Any,
    ) -> None:
        """Sum squares and counts over ranks (collective).

        The loss is the mean of the ranks' losses, so each rank contributes 1/ranks of its gradient.
        """
        if not (self._agreed or self._all_agree(points)):
            return
        device = next((v.device for values in norms.values() for v in values if isinstance(v, Tensor)), "cpu")
        sums = torch.zeros(4, len(points), dtype=torch.float64)
        for i in range(len(points)):
            sums[1, i], sums[2, i] = elements[i], i in seen
        sums = sums.to(device)
        for i, values in norms.items():
            sums[0, i] = sum(v**2 for v in values)
            sums[3, i] = sum(v**2 for v in relative[i])
        _rank_sums.all_reduced(sums)
        squares, counts, reached, of_products = sums.cpu().numpy()
        at = np.flatnonzero(reached)
        if counts.any():
            values = [float(v) for q in (squares, of_products) for v in np.sqrt(q[at]) / self._ranks]
            self._wait_for(owner, step, tuple(points[i].name for i in at), counts[at], values, scale)

    def _all_agree(self, points: tuple[Boundary, ...]) -> bool:
        """Whether all ranks have the same boundaries (collective).

        Otherwise they would wait for each other or add different quantities. If a rank has not run the model
        yet, reading is postponed to the next step.
        """
        every = RankGroup.everyone().gathered((tuple(point.name for point in points), self.problem))
        self.problem = next((problem for _, problem in every if problem), None)
        if self.problem is None and len({names for names, _ in every if names}) > 1:
            self.problem = "the flow at boundaries cannot be read: not every rank has the same boundaries"
        self._agreed = self.problem is None and all(names for names, _ in every)
        return self._agreed

    def hand_over(self, *, wait: bool = False) -> None:
        """Deliver the rows whose transfers have finished."""
        while self._waiting:
            row = self._waiting[0]
            inside_of = [n for n in (row.norms, row.scale) if isinstance(n, _gradient_norms.Reading)]
            if not (wait or all(n.ready() for n in inside_of)):
                return
            self._waiting.popleft()
            is_reading = isinstance(row.norms, _gradient_norms.Reading)
            values = row.norms.array() if is_reading else np.array(row.norms, dtype=float)
            factor = float(row.scale.array()) if isinstance(row.scale, _gradient_norms.Reading) else row.scale
            with np.errstate(invalid="ignore", divide="ignore"):
                norm, relative = np.split(values / factor, 2)
            relative = relative if self._layout.normed else np.full(len(relative), np.nan)
            norm[~np.isfinite(norm)] = np.inf  # NaN says that none arrived, and nothing else
            norm = np.where(row.elements > 0, norm, np.nan)
            self.rows += 1
            at, layout = {point.name: i for i, point in enumerate(self._points or ())}, self._layout
            numbers = [at.get(name) for name in row.names]
            hidden, lines, averaging = zip(
                *(
                    (True, 0, 0.0) if i is None else (layout.hidden[i], layout.lines[i], layout.averaging[i])
                    for i in numbers
                )
            )
            self.deliver(
                FlowRow(
                    row.owner,
                    row.step,
                    row.names,
                    norm,
                    relative,
                    row.elements,
                    hidden,
                    lines,
                    averaging,
                    layout.normed,
                    row.reach,
                )
            )

    def replace_parameters(self, parameters: Mapping[int, Sequence[Tensor]]) -> None:
        """Replace the parameters after a change of the model or optimizer, and find the boundaries again."""
        self.parameters = parameters
        self.steps = {owner: self.steps.get(owner, self.first_step) for owner in parameters}
        self._points, self._agreed = None, False

    def close(self) -> None:
        """Remove all hooks and deliver the remaining rows."""
        self._let_go()
        self.hand_over(wait=True)

    # --- while the step runs ---

    def _called_before(self, module: nn.Module, args: Any) -> Any:
        if is_measuring() or self.problem is not None or not torch.is_grad_enabled():
            return None
        if module is self.model:
            return self._forward_begins(module, args, _torch_private.keywords_of_call())
        if self.forwards and isinstance(module, nn.RNNBase | nn.RNNCellBase):
            return self._recurrence_begins(module, args)
        if id(module) in self._parts and not self.forwards:
            if not self._running and any(True for _ in module.parameters()):
                name = next(name for name, part in self._whole.named_modules() if part is module)
                self._called[name] = module
            self._running.append(id(module))
        return None

    def _recurrence_begins(self, module: nn.RNNBase | nn.RNNCellBase, args: Any) -> Any:
        """Read the gradient of a recurrent layer's input at each step; a cell's call is one."""
        name = next((name for name, part in self.model.named_modules() if part is module), None)
        if name is None or not args or not isinstance(args[0], Tensor) or self._ranks > 1:
            return None
        if isinstance(module, nn.RNNCellBase):
            arrived = _Activation(-1, 0, name or "the model", self._cell_calls[name])
            self._cell_calls[name] += 1
        else:
            arrived = _Activation(-1, 0, name or "the model", batch_first=module.batch_first)
        return self._hooked(args[0], arrived, is_input=True), *args[1:]

    def _called_after(self, module: nn.Module, *_: Any) -> None:
        if self._running and self._running[-1] == id(module):
            self._running.pop()

    def _forward_begins(self, model: nn.Module, args: Any, keywords: dict[str, Any]) -> Any:
        if self._points is None and not self._find(args, keywords):
            return None
        self.forwards += 1
        self._cell_calls.clear()
        points = self._points or ()
        stack = contextlib.ExitStack()
        inner = tuple(p for p in points if p.key.site != "input")  # our own hook is the one at the input
        places = [i for i, p in enumerate(points) if p.key.site != "input"]
        stack.enter_context(
            tap_boundaries(model, inner, lambda k, activation: self._touch(places[k], activation))
        )
        # Called even if the forward pass raises, because the tap must not outlive it.
        after = model.register_forward_hook(lambda *_: stack.close(), always_call=True)
        stack.callback(after.remove)
        given = dict(keywords)
        for i, point in enumerate(points):
            if point.key.site == "input":
                touch = functools.partial(self._touch, i, is_input=True)
                args, given = _replace_nth(point.key.nth, touch, (args, given))
        keywords.update(given)
        return args

    def _touch(self, i: int, activation: Tensor, is_input: bool = False) -> Tensor:
        if not torch.is_grad_enabled():  # inside re-entrant checkpointing: not seen, which is not a zero
            return activation
        return self._hooked(activation, _Activation(i, 0), is_input)

    def _hooked(self, activation: Tensor, arrived: _Activation, is_input: bool) -> Tensor:
        if not activation.requires_grad:
            # A clone may be changed in place downstream.
            activation = activation.detach().requires_grad_().clone()
        elif is_input or activation.is_leaf:
            activation = activation.view_as(activation)  # the user's own tensor gets no hook
        if self._layout.normed and not arrived.recurrent:
            arrived.value = activation.detach()
        self._activations.append(arrived)
        self._hooks.append(activation.register_hook(functools.partial(self._arrive, arrived)))
        return activation

    def _arrive(self, activation: _Activation, gradient: Tensor) -> None:
        current = self.passes.under_way() if self._reading else None
        if current is None:
            return
        grad = _gradient_norms.plain(gradient).detach()
        activation.elements = grad.numel()
        if _torch_private.keeps_graph() or activation.arrived or activation.recurrent:
            # Cloned, because another pass through the same graph may add to this tensor in place.
            activation.arrived[current] = [grad.clone()]
        else:
            activation.arrived[current] = _norm(grad)
            if activation.value is not None:
                activation.relative[current] = _product_norm(grad, activation.value)
                activation.value = None

    def _find(self, args: Any, keywords: dict[str, Any]) -> bool:
        """Find the boundaries on these inputs; a failure ends the flow readings, but not the training."""
        try:
            points = boundaries(self.model, _as_inputs(self.model, args, keywords))
            with untouched(self.model, seed=0, operation="watch"):
                # The model may write into its inputs, so they are copied.
                given, named = _data.map_tensors((args, dict(keywords)), torch.clone)
                self._layout = layout_of(self.model, lambda: self.model(*given, **named), points)
            self._points = tuple(replace(point) for point in points)
        except Exception as error:  # any model may come; a monitor must not end a training
            first = (error.problem if isinstance(error, SkipscopeError) else str(error)).splitlines()
            self.problem = (
                f"the flow at boundaries cannot be read: {first[0] if first else type(error).__name__}"
            )
        return self.problem is None

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._activations = [], []

    def _let_go(self) -> None:
        self._reading = False
        self._unhook()
        if self._is_eager:
            self._is_eager = False
            _torch_private.eager.end()

    def _wait_for(
        self,
        owner: int,
        step: int,
        names: tuple[str, ...],
        elements: np.ndarray,
        norms: list[Any],
        scale: Any,
        reach: Reach | None = None,
    ) -> None:
        device = next((v for v in norms if isinstance(v, Tensor)), None)
        if device is not None:
            norms = [v if isinstance(v, Tensor) else device.new_tensor(v) for v in norms]
            inside_of: Any = _gradient_norms.Reading(torch.stack(norms))
        else:
            inside_of = norms
        factor = 1.0 if scale is None else on_its_way(scale)
        self._waiting.append(_Pending(owner, step, names, elements, inside_of, factor, reach))


def _reach_of(recurrent: Sequence[_Activation], counted: Sequence[BackwardPass]) -> Reach | None:
    """Of the recurrent layer through which the gradient grows, or with the shortest reach for its length."""
    profiles: dict[str, list[float]] = {}
    for activation in recurrent:
        gradients = [grad for p in counted if p in activation.arrived for grad in activation.arrived[p]]
        if gradients:
            total = gradients[0] if len(gradients) == 1 else torch.stack(gradients).double().sum(dim=0)
            first = activation.step or 0
            steps = by_step(total, None, activation.batch_first) if activation.step is None else [total]
            rows = torch.stack(steps).flatten(1)
            squares = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square().tolist()
            known = profiles.setdefault(activation.recurrent, [])
            known += [0.0] * (first + len(squares) - len(known))
            for t, square in enumerate(squares, first):
                known[t] += square
    profiles = {name: profile for name, profile in profiles.items() if len(profile) > 3}
    found = (reach_of(name, [math.sqrt(q) for q in profile]) for name, profile in profiles.items())
    long = [reach for reach in found if reach is not None]
    growing = max(long, key=lambda reach: reach.growth, default=None)
    if growing is not None and growing.growth >= GROWTH:
        return growing
    return max(long, key=lambda reach: reach.length / (reach.steps or math.inf), default=None)


def _norm_of(arrived: list[Any]) -> Any:
    """Norm of the sum of the gradients of several backward passes at an activation, or None without any."""
    if not arrived:
        return None
    if not isinstance(arrived[-1], list):
        return arrived[-1]
    gradients = [grad for (grad,) in arrived]
    return _norm(gradients[0] if len(gradients) == 1 else torch.stack(gradients).double().sum(dim=0))


def _relative_of(activation: _Activation, counted: Sequence[BackwardPass]) -> Any:
    """Norm of gradient times activation, or 0 if it is not needed."""
    known = [activation.relative[p] for p in counted if p in activation.relative]
    if known or activation.value is None:
        return known[-1] if known else 0.0
    gradients = [grad for p in counted if p in activation.arrived for grad in activation.arrived[p]]
    total = gradients[0] if len(gradients) == 1 else torch.stack(gradients).double().sum(dim=0)
    return _product_norm(total, activation.value)


def _product_norm(grad: Tensor, value: Tensor) -> Any:
    value = _gradient_norms.plain(value)
    return _norm(grad * value) if grad.shape == value.shape and grad.layout == value.layout else 0.0


def _norm(grad: Tensor) -> Any:
    if grad.device.type == "cpu":
        return _gradient_norms.one_on_host(grad)[0]
    return torch.linalg.vector_norm(grad, dtype=torch.float64)


def _root(norms: list[Any] | None) -> Any:
    """Norm over several forward passes of a step."""
    if not norms:
        return 0.0
    if isinstance(norms[0], Tensor):
        norms = [norm if isinstance(norm, Tensor) else norms[0].new_tensor(norm) for norm in norms]
        return torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
    return math.hypot(*norms)


def _as_inputs(model: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Arguments of a call as a tuple or a dict, as ``find_shortcuts`` takes inputs."""
    if not keywords:
        return args
    if not args:
        return dict(keywords)
    return dict(inspect.signature(model.forward).bind(*args, **keywords).arguments)


def _replace_nth(which: int, touch: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Replace the ``which``-th floating-point tensor of a nested value."""
    count = -1

    def visit(tensor: Tensor) -> Tensor:
        nonlocal count
        count += tensor.is_floating_point()
        return touch(tensor) if tensor.is_floating_point() and count == which else tensor

    return _data.map_tensors(value, visit)
