"""Two training engines: many networks as one batch of networks, or one network after the other.

Both give the numbers of a plain training loop. The stacked engine (parameters stacked, the forward pass under
``torch.vmap``, one backward pass for all) is taken only for a model whose gradients it was seen to reproduce,
in less time than one network after the other takes.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.overrides import TorchFunctionMode

from skipscope._data import Objective, map_tensors
from skipscope._progress import track
from skipscope._random import random_state_kept
from skipscope._torch_internals import copy_each, has_backward_hooks, has_gradient_hooks
from skipscope.comparison._comparison_result import smoothed
from skipscope.comparison._optimizers import Driver, OptimizerChoice
from skipscope.comparison._stream import Stream


@dataclass(frozen=True)
class Maker:
    """Makes a network; called with a seed, it leaves the global random states as they are.

    Attributes:
        build: makes the network from the random numbers that come next.
    """

    build: Callable[[], nn.Module]

    def __call__(self, seed: int) -> nn.Module:
        with random_state_kept(seed):
            return self.build()


@dataclass(frozen=True)
class Run:
    """One training run: which seed, which rate (None: the optimizer's own)."""

    seed: int
    rate: float | None


@dataclass
class Log:
    """What a run left: losses and update sizes, each [steps], and how to get the trained network."""

    losses: np.ndarray
    update_ratio: np.ndarray
    trained: Callable[[], nn.Module]


@dataclass(frozen=True)
class Course:
    """What every run goes through.

    Attributes:
        stream: where its batches come from.
        objective: the loss.
        steps: how many, at most.
        stop_at: stop as soon as the smoothed loss of one of the networks trained together is here, and half
            way if none of them has come down by a hundredth; None: go on.
        schedule: a factor on the rate at each step, from 0 on.
        clip_norm: the gradient is scaled down to this norm where it is longer.
        autocast: the dtype of ``torch.autocast``.
    """

    stream: Stream
    objective: Objective
    steps: int
    stop_at: float | None = None
    schedule: Callable[[int], float] | None = None
    clip_norm: float | None = None
    autocast: torch.dtype | None = None

    def is_over(self, losses: np.ndarray) -> bool:
        """Whether the losses so far, [networks, steps], are enough (looked at every tenth step)."""
        if self.stop_at is None or losses.shape[1] % 10:
            return False
        curve = smoothed(losses)
        is_there = bool((curve <= self.stop_at).any())
        is_stuck = losses.shape[1] >= self.steps // 2 and not (curve[:, -1] < 0.99 * losses[:, 0]).any()
        return is_there or is_stuck

    def factor(self, step: int) -> float:
        """The factor on the rate."""
        return 1.0 if self.schedule is None else float(self.schedule(step))

    def casting(self, device: torch.device) -> Any:
        """The context in which the loss is computed."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self.autocast)


# --- one network after the other


def train_one_by_one(
    make: Maker, runs: Sequence[Run], choice: OptimizerChoice, course: Course, name: str
) -> dict[Run, Log]:
    """Each run is a plain loop: seed, make the network, train it; its noise continues from the state that
    making it left.

    Where the course stops at a loss, a run ends there, and later ones have no more steps than the first that
    got there.
    """
    logs = {}
    several = len(runs) > 1  # who asks for one run at a time counts them
    for run in track(runs, f"training {name!r} under {choice.name}") if several else runs:
        with random_state_kept(run.seed):
            logs[run] = _train(make.build(), run, choice, course)
        if course.stop_at is not None and (smoothed(logs[run].losses) <= course.stop_at).any():
            course = replace(course, steps=len(logs[run].losses))
    return logs


def _train(model: nn.Module, run: Run, choice: OptimizerChoice, course: Course) -> Log:
    weights = [p for p in model.parameters() if p.requires_grad]
    driver = choice.make(weights, run.rate)
    rates = [group["lr"] for group in driver.optimizer.param_groups]
    step_once = _step(model, weights, driver, course)
    update = _Update(weights)
    getattr(driver.optimizer, "train", lambda: None)()  # a schedule-free optimizer has modes
    losses, ratios = np.full((2, course.steps), np.nan)
    for step, batch in zip(range(course.steps), course.stream.batches(run.seed)):
        if course.schedule is not None:
            for group, rate in zip(driver.optimizer.param_groups, rates):
                group["lr"] = rate * course.factor(step)
        losses[step] = step_once(batch)
        ratios[step] = update.ratio()
        if not math.isfinite(losses[step]):
            break
        if course.is_over(losses[None, : step + 1]):
            losses, ratios = losses[: step + 1], ratios[: step + 1]
            break
    getattr(driver.optimizer, "eval", lambda: None)()
    return Log(losses, ratios, lambda: model)


class _Update:
    """The size of what a step does to some weights: from one call to the next."""

    def __init__(self, weights: list[nn.Parameter]):
        alike: dict[Any, list[nn.Parameter]] = {}
        for weight in weights:
            alike.setdefault((weight.device, weight.dtype), []).append(weight)
        # Weights of one kind in one row, twice: as they were, and as they are.
        self.weights = list(alike.values())
        self.before, self.now = ([self._row(some) for some in self.weights] for _ in range(2))
        self.size = math.hypot(*map(_norm, self.before))

    def ratio(self) -> float:
        """|update| / |weights| of what happened since the last call."""
        for some, now, before in zip(self.weights, self.now, self.before):
            torch.cat([w.detach().reshape(-1) for w in some], out=now)
            before.sub_(now)
        update, size = math.hypot(*map(_norm, self.before)), self.size
        self.size = math.hypot(*map(_norm, self.now))
        self.before, self.now = self.now, self.before
        return update / max(size, 1e-150)

    @staticmethod
    def _row(weights: list[nn.Parameter]) -> Tensor:
        return torch.cat([w.detach().reshape(-1) for w in weights])


def _norm(row: Tensor) -> float:
    return float(torch.linalg.vector_norm(row))


def _step(
    model: nn.Module, weights: list[nn.Parameter], driver: Driver, course: Course
) -> Callable[[Any], float]:
    """One step of a plain loop on a batch; returns the loss before it."""
    optimizer, device, needs_closure = driver.optimizer, weights[0].device, driver.needs_closure
    scaler = torch.amp.GradScaler(device.type, enabled=course.autocast == torch.float16 and not needs_closure)

    def backward(batch: Any) -> Tensor:
        optimizer.zero_grad()
        with course.casting(device):
            value = course.objective(model, batch)
        scaler.scale(value).backward()
        if course.clip_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(weights, course.clip_norm)
        return value

    def step(batch: Any) -> float:
        if needs_closure:
            value = float(optimizer.step(lambda: float(backward(batch).detach())))  # type: ignore[arg-type]
        else:
            value = float(backward(batch).detach())
            scaler.step(optimizer)
            scaler.update()
        if isinstance(driver.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            driver.scheduler.step(value)
        elif driver.scheduler is not None:
            driver.scheduler.step()
        return value

    return step


# --- one batch of networks


def train_stacked(
    make: Maker, runs: Sequence[Run], choice: OptimizerChoice, course: Course, name: str
) -> dict[Run, Log]:
    """All runs at once, with torch's own SGD, Adam or AdamW."""
    starts = {seed: make(seed) for seed in dict.fromkeys(run.seed for run in runs)}
    networks = Stacked([starts[run.seed] for run in runs], course.objective)
    # The optimizer acts on a displacement that starts at zero each step. SGD's and Adam's steps are
    # proportional to the rate, so one optimizer at rate 1 serves all rates, and the displacement is the
    # update whose size we report. Weight decay, which is a part of the weights, is added to it.
    displacement = torch.zeros_like(networks.table).requires_grad_()
    plain = OptimizerChoice("Adam", ()) if choice.name == "AdamW" else choice
    optimizer = plain.make([displacement], 1.0).optimizer
    rates = torch.tensor([[run.rate] for run in runs], dtype=torch.float64).to(networks.table)
    sources = {seed: course.stream.batches(seed) for seed in starts}
    losses, ratios = np.full((2, len(runs), course.steps), np.nan)
    goes_on = np.ones(len(runs), dtype=bool)
    for step in track(range(course.steps), f"training {name!r} under {choice.name}"):
        fresh = {seed: next(source) for seed, source in sources.items()}
        with course.casting(networks.table.device):
            value = networks.losses([fresh[run.seed] for run in runs])
        displacement.grad = _clipped(networks.gradient(value), course.clip_norm)
        optimizer.step()
        moved = displacement.detach()
        if choice.decay:
            moved = moved - choice.decay * networks.table
        sizes = networks.move(moved * (rates * course.factor(step)))
        losses[goes_on, step] = value.detach().double().cpu().numpy()[goes_on]
        ratios[goes_on, step] = sizes[goes_on]
        displacement.detach().zero_()
        for index in np.flatnonzero(goes_on & ~np.isfinite(losses[:, step])):
            networks.stop(int(index))
            goes_on[index] = False
        if not goes_on.any():
            break
        if course.is_over(losses[:, : step + 1]):
            losses, ratios = losses[:, : step + 1], ratios[:, : step + 1]
            break
    return {run: Log(losses[i], ratios[i], partial(networks.network, i)) for i, run in enumerate(runs)}


def _clipped(gradients: Tensor, norm: float | None) -> Tensor:
    """Each network's gradient ``[networks, weights]`` as ``clip_grad_norm_`` scales it."""
    if norm is None:
        return gradients
    return gradients * (norm / (gradients.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)


class Stacked:
    """Networks of one architecture as one: every parameter is [networks, ...].

    Attributes:
        parameters: name -> ``[networks, ...]``, leaves of the graph.
        table: ``[networks, weights]``, all of them side by side: an optimizer has one tensor to move.
        views: the table's part for each parameter.
        stopped: network -> its weights, where its training is over.
    """

    def __init__(self, models: list[nn.Module], objective: Objective):
        self.model, self.objective = copy.deepcopy(models[0]), objective
        stacked, _ = stack_module_state(models)  # type: ignore[arg-type]
        self.table = torch.cat([p.detach().flatten(1) for p in stacked.values()], dim=1)
        parts = self.table.split([p[0].numel() for p in stacked.values()], dim=1)
        self.views = [part.view(p.shape) for part, p in zip(parts, stacked.values())]
        self.parameters = {name: p.detach().clone().requires_grad_() for name, p in stacked.items()}
        self.stopped: dict[int, Tensor] = {}

    def gradient(self, losses: Tensor) -> Tensor:
        """The gradient of each network's loss, laid out like the table."""
        leaves = list(self.parameters.values())
        found = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, materialize_grads=True)
        return torch.cat([grad.flatten(1) for grad in found], dim=1)

    @torch.no_grad()
    def move(self, update: Tensor) -> np.ndarray:
        """Add an update; returns |update| / |weights| of each network."""
        size = self.table.double().norm(dim=1)
        if self.stopped:
            update[list(self.stopped)] = 0.0
        self.table += update
        copy_each(list(self.parameters.values()), self.views)
        return (update.double().norm(dim=1) / size).cpu().numpy()

    @torch.no_grad()
    def stop(self, index: int) -> None:
        """Keep the weights of one network as they are now.

        Its place is filled by zeros from here on, and stays: without it tensors would have another size, and
        the others' numbers other last digits.
        """
        self.stopped[index] = self.table[index].clone()
        self.table[index] = 0.0
        copy_each(list(self.parameters.values()), self.views)

    def losses(self, batches: list[Any]) -> Tensor:
        """The loss of each network on its own batch, [networks]."""
        alike: dict[Any, list[int]] = {}
        for index, batch in enumerate(batches):
            alike.setdefault(_form(batch), []).append(index)
        if len(alike) == 1:
            return self._losses(self.parameters, batches)
        losses: list[Tensor] = [torch.empty(0)] * len(batches)
        for chosen in alike.values():  # only batches of one form can be stacked
            some = {name: p[chosen] for name, p in self.parameters.items()}
            for index, loss in zip(chosen, self._losses(some, [batches[i] for i in chosen])):
                losses[index] = loss
        return torch.stack(losses)

    def _losses(self, parameters: dict[str, Tensor], batches: list[Any]) -> Tensor:
        tensors = [torch.stack(column) for column in zip(*map(_leaves, batches))]

        def one(parameters, leaves):
            leaf = iter(leaves)
            return self.objective(
                _Bound(self.model, parameters), map_tensors(batches[0], lambda _: next(leaf))
            )

        return torch.vmap(one, randomness="different")(parameters, tensors)

    @torch.no_grad()
    def network(self, index: int) -> nn.Module:
        """One of the networks as an ordinary module."""
        model = copy.deepcopy(self.model)
        table = self.stopped.get(index, self.table[index])
        parts = table.split([view[0].numel() for view in self.views])
        values = dict(zip(self.parameters, parts))
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name].view_as(parameter))
        return model


def _leaves(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in the order in which ``map_tensors`` visits them."""
    leaves: list[Tensor] = []
    map_tensors(batch, leaves.append)
    return leaves


def _form(batch: Any) -> Any:
    """Equal for two batches that differ in nothing but the values of their tensors."""
    if isinstance(batch, Tensor):
        return batch.shape, batch.dtype, batch.device
    if isinstance(batch, Mapping):
        return type(batch), tuple((key, _form(item)) for key, item in batch.items())
    if isinstance(batch, list | tuple):
        return type(batch), tuple(map(_form, batch))
    return (type(batch), batch) if isinstance(batch, str | int | float | None) else id(batch)


class _Bound(nn.Module):
    """A module with other parameters, to hand to a loss that calls its model."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]):
        super().__init__()
        self.call = partial(functional_call, model, parameters)

    def forward(self, *args, **kwargs):
        return self.call(args, kwargs)


# --- which models can be stacked


def is_stackable(make: Maker, seeds: Sequence[int], course: Course) -> bool:
    """Whether the stacked engine trains this model as a plain loop does.

    It is tried on one batch: losses and gradients of every seed's network equal those of a plain step on a
    network made again, which draws no noise, keeps no state from call to call, and has no hooks that a copy
    could lose; and a step of all takes less time stacked.
    """
    if course.autocast == torch.float16:
        return False  # each network would need a loss scale of its own
    try:
        models = [make(seed) for seed in seeds]
        if not all(map(_has_plain_weights, models)):
            return False
        batch = next(course.stream.batches(0))
        plain = [_plain_gradients(make(seed), batch, course) for seed in seeds]
        if any(gradients is None for gradients in plain):
            return False
        networks = Stacked(models, course.objective)
        with _no_loops(), course.casting(networks.table.device):
            losses = networks.losses([batch] * len(models))
        gradients = torch.autograd.grad(losses.sum(), list(networks.parameters.values()))
        if any(gradient.layout != torch.strided for gradient in gradients):
            return False
        networks.network(0)  # what a forward pass left on the module may forbid a copy
        return all(
            _close(stacked[i], alone)
            for i, alones in enumerate(plain)
            for stacked, alone in zip(gradients, alones or [], strict=True)
        ) and _is_faster(models, batch, course)
    except Exception:  # whatever vmap cannot do, the other engine can; a user's own error shows itself there
        return False


# What was timed before: asked again, the answer is the same, and with it the bits of a training.
_TIMED: dict[Any, bool] = {}


def _is_faster(models: list[nn.Module], batch: Any, course: Course) -> bool:
    """Whether the gradients of at least four networks take less time stacked than one after the other."""
    shapes = tuple((name, p.shape, p.dtype) for name, p in models[0].named_parameters())
    key = type(models[0]), shapes, tuple((t.shape, t.dtype) for t in _leaves(batch)), course.autocast
    if key not in _TIMED:
        several = [models[i % len(models)] for i in range(max(4, len(models)))]
        networks = Stacked(several, course.objective)

        def stacked() -> None:
            with course.casting(networks.table.device):
                losses = networks.losses([batch] * len(several))
            networks.gradient(losses)

        def one_by_one() -> None:
            for model in several:
                with course.casting(networks.table.device):
                    loss = course.objective(model, batch)
                torch.autograd.grad(loss, list(model.parameters()))

        seconds = dict.fromkeys((stacked, one_by_one), math.inf)
        for _ in range(4):
            for engine in seconds:
                start = time.perf_counter()
                engine()
                seconds[engine] = min(seconds[engine], time.perf_counter() - start)
        _TIMED[key] = seconds[stacked] < seconds[one_by_one]
    return _TIMED[key]


def _has_plain_weights(model: nn.Module) -> bool:
    """No buffers (batch norm writes them in place), nothing frozen, no hooks on what is trained."""
    parameters, modules = list(model.parameters()), list(model.modules())
    return (
        not any(True for _ in model.buffers())
        and all(p.requires_grad for p in parameters)
        and not has_gradient_hooks(parameters)
        and not any(map(has_backward_hooks, modules))
    )


def _plain_gradients(model: nn.Module, batch: Any, course: Course) -> list[Tensor] | None:
    """The gradients of a plain step; None where the model is more than a function of its weights and the
    batch.
    """
    before, watch = _state(model), _GradientHooks()
    with random_state_kept(0):
        generators = torch.get_rng_state()
        with watch, course.casting(next(model.parameters()).device):
            value = course.objective(model, batch)
        draws_noise = not torch.equal(generators, torch.get_rng_state())
        value.backward()
    gradients = [p.grad for p in model.parameters()]
    if draws_noise or watch.seen or _state(model) != before or any(g is None for g in gradients):
        return None
    return gradients  # type: ignore[return-value]


def _state(model: nn.Module) -> dict[str, Any]:
    """What modules keep in plain attributes: numbers by value, everything else by identity."""
    return {
        f"{path}.{name}": value if isinstance(value, int | float | str | bool) else id(value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
    }


class _GradientHooks(TorchFunctionMode):
    """Notices a forward pass that hangs hooks on its activations: under vmap they would see another
    tensor.
    """

    def __init__(self):
        super().__init__()
        self.seen = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen |= "hook" in getattr(func, "__name__", "")
        return func(*args, **(kwargs or {}))


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding, as vectors."""
    tolerance = torch.finfo(b.dtype).eps ** 0.6
    return float((a - b).norm()) <= tolerance * float(b.norm())


@contextmanager
def _no_loops() -> Iterator[None]:
    """Where vmap only loops over the networks, and says so, nothing is gained by stacking them."""
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*performance drop.*")
            yield
    finally:
        torch.set_warn_always(always)
