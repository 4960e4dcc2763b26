"""Twins trained side by side: the same batches, the same seeds, each with its best rate out of one small sweep.

The rates of a sweep, and then the seeds, are trained at once, as one batch of networks (the parameters stacked, the forward pass
under ``torch.vmap``, one backward pass for all), where the model allows it; one after the other where it does not
(batch norm in training mode, control flow on data). The optimizer is torch's own in both cases.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from skipscope._calls import no_gradient
from skipscope._data import Objective, map_tensors, read
from skipscope._errors import SkipscopeError, asked_as
from skipscope._progress import track
from skipscope._untouched import private_copy, random_state_kept, require_module, untouched
from skipscope.comparison._options import rates_of, require_whole, seeds_of
from skipscope.comparison._results import Curves, Training, smoothed
from skipscope.comparison._stream import Stream
from skipscope.comparison._threads import fitting_threads
from skipscope.shortcuts import refuse_shared

RATES: dict[str, tuple[float, ...]] = {"SGD": (0.1, 0.03, 0.01, 0.003), "Adam": (0.01, 0.003, 0.001, 0.0003)}


@dataclass(frozen=True)
class Run:
    """One training run: which seed, which rate."""

    seed: int
    rate: float


@dataclass(frozen=True)
class _Course:
    """What every run goes through.

    Attributes:
        stream: where its batches come from.
        objective: the loss.
        steps: how many, at most.
        stop_at: stop as soon as the smoothed loss of one of the networks trained together is here, and half way if
            none of them has come down by a hundredth; None: go on.
    """

    stream: Stream
    objective: Objective
    steps: int
    stop_at: float | None = None

    def is_over(self, losses: np.ndarray) -> bool:
        """Whether the losses so far, [networks, steps], are enough (looked at every tenth step)."""
        if self.stop_at is None or losses.shape[1] % 10:
            return False
        curve = smoothed(losses)
        is_there = bool((curve <= self.stop_at).any())
        is_stuck = losses.shape[1] >= self.steps // 2 and not (curve[:, -1] < 0.99 * curve[:, 0]).any()
        return is_there or is_stuck


@asked_as("train_twins")
def train_twins(
    twins: Mapping[str, nn.Module | Callable[[], nn.Module]],
    data: Any,
    loss: Any = None,
    *,
    seeds: int | Sequence[int] = 3,
    steps: int = 400,
    batch_size: int | None = None,
    optimizers: Mapping[str, Sequence[float]] | None = None,
    target: float | None = None,
    weight: Callable[[Any], float] | None = None,
) -> Training:
    """Train networks side by side and tell how fast each one learns.

    Every twin sees the same batches in the same order for a given seed, and has its best learning rate out of the
    same sweep (on the first seed). The models given are not trained: their copies are. Local.

    Args:
        twins: name -> factory (called anew for every seed, after seeding) or ready module (seeds then vary the batch
            order only, and the result says so).
        data: training data; one large batch is cut into random batches.
        loss: see ``skipscope.gradient_flow``.
        seeds: how many, or which.
        steps: optimizer steps a run.
        batch_size: samples a step, where the data is one batch; default 64.
        optimizers: "SGD" (momentum 0.9) and "Adam", each with the rates to try.
        target: the loss whose first crossing is counted; default: half of the lowest first loss of any twin.
        weight: see ``skipscope.gradient_flow``.

    Returns:
        :class:`Training`.

    Raises:
        SkipscopeError: no twins, an unknown optimizer, numbers out of range, a loss that cannot be differentiated, data that cannot be read.

    Example:
        >>> from skipscope import reference
        >>> make = lambda: reference.deep_mlp(4, shortcut="identity")
        >>> runs = train_twins({"with": make}, reference.digits(256), nn.functional.cross_entropy, seeds=2, steps=30)
        >>> runs.curves["with"]["Adam"].losses.shape
        (2, 30)
    """
    return train_and_keep(
        twins, data, loss, seeds=seeds, steps=steps, batch_size=batch_size, optimizers=optimizers, target=target, weight=weight
    )[0]  # fmt: skip


def train_and_keep(
    twins: Mapping[str, nn.Module | Callable[[], nn.Module]],
    data: Any,
    loss: Any = None,
    *,
    seeds: int | Sequence[int] = 3,
    steps: int = 400,
    batch_size: int | None = None,
    optimizers: Mapping[str, Sequence[float]] | None = None,
    target: float | None = None,
    weight: Callable[[Any], float] | None = None,
    stop_at_target: bool = False,
) -> tuple[Training, dict[str, dict[str, nn.Module]]]:
    """As :func:`train_twins`, and the trained networks: twin -> optimizer -> the first seed's at its best rate.

    With ``stop_at_target`` a sweep ends when its first rate has reached the target, which must then be given: enough
    to tell in how many steps the best rate gets there.
    """
    if not isinstance(twins, Mapping) or not twins:
        raise SkipscopeError(
            "train_twins", "there is nothing to train", expected='{"with": make_a, "without": make_b}',
            got=f"{twins!r:.60}", cure="name each network",
        )  # fmt: skip
    require_whole("train_twins", steps=steps, batch_size=batch_size)
    if target is not None and not math.isfinite(target):
        raise SkipscopeError(
            "train_twins",
            "the target is no loss",
            expected="a finite number",
            got=target,
            cure="leave target out",
        )
    chosen = seeds_of("train_twins", seeds)
    rates = rates_of("train_twins", optimizers, RATES)
    makers = {name: _maker(name, twin) for name, twin in twins.items()}
    varies = (
        "batch order only"
        if any(isinstance(t, nn.Module) for t in twins.values())
        else "initialisation and batch order"
    )
    models = [twin for twin in twins.values() if isinstance(twin, nn.Module)]
    logs: dict[str, dict[str, dict[Run, _Log]]] = {}
    engine: dict[str, str] = {}
    with untouched(*models, operation="train_twins"):
        first = next(iter(makers.values()))(chosen[0])
        if not any(p.requires_grad for p in first.parameters()):
            raise SkipscopeError(
                "train_twins", "no parameter requires a gradient: there is nothing to train",
                got=type(first).__name__, cure="pass the model before it is frozen or quantised",
            )  # fmt: skip
        batches, objective = read(first, data, loss, "train_twins", weight=weight)
        stream = Stream(batches, batch_size)
        with random_state_kept(0):
            if not objective(copy.deepcopy(first), next(stream.batches(0))).requires_grad:
                raise no_gradient("train_twins", first)
        course = _Course(stream, objective, steps, target if stop_at_target else None)
        for name, make in makers.items():
            starts = {seed: make(seed) for seed in chosen}
            engine[name] = "stacked" if _stackable(starts[chosen[0]], stream, objective) else "one by one"
            train = _train_stacked if engine[name] == "stacked" else _train_one_by_one
            with fitting_threads(copy.deepcopy(starts[chosen[0]]), objective, next(stream.batches(0))):
                logs[name] = {
                    optimizer: _sweep_then_seeds(train, starts, values, optimizer, course, name)
                    for optimizer, values in rates.items()
                }
    if target is None:
        target = min(_first_loss(by) for by in logs.values()) / 2
    curves = {name: {o: _best(runs, chosen, target) for o, runs in by.items()} for name, by in logs.items()}
    kept = {
        name: {o: runs[Run(chosen[0], curves[name][o].rate)].trained() for o, runs in by.items()}
        for name, by in logs.items()
    }
    return Training(curves, target, steps, stream.size, chosen, varies, engine), kept


@dataclass
class _Log:
    losses: np.ndarray
    update_ratio: np.ndarray
    trained: Callable[[], nn.Module]


def _maker(name: str, twin: nn.Module | Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    if isinstance(twin, nn.Module):
        refuse_shared(twin, "train_twins", name)
        return lambda seed: private_copy(twin, "train_twins").train()

    if not callable(twin):
        raise SkipscopeError(
            "train_twins", "a twin is neither a module nor a function that makes one", layer=name,
            expected='{"with": make_a, "without": make_b}', got=type(twin).__name__,
            cure="pass the module, or a function without arguments that returns a fresh one",
        )  # fmt: skip

    def make(seed: int) -> nn.Module:
        with random_state_kept(seed):
            model = twin()
        require_module(model, f"train_twins ({name})")
        refuse_shared(model, "train_twins", name)
        return model.train()

    return make


def _first_loss(by_optimizer: dict[str, dict[Run, _Log]]) -> float:
    first = [float(log.losses[0]) for runs in by_optimizer.values() for log in runs.values()]
    if not np.isfinite(first).all():
        raise SkipscopeError(
            "train_twins", "the loss is not finite on the first batch", expected="a finite loss", got=first[0],
            cure="look for NaN in the data or the weights: skipscope.gradient_flow says where",
        )  # fmt: skip
    return float(np.mean(first))


def _sweep_then_seeds(train, starts, rates, optimizer, course: _Course, name) -> dict[Run, _Log]:
    """Every rate on the first seed; the best one on the other seeds."""
    first, *others = starts
    runs = train(starts, [Run(first, r) for r in rates], optimizer, course, name)
    best = min(rates, key=lambda r: (_final(runs[Run(first, r)].losses), r))
    if others:
        runs |= train(starts, [Run(s, best) for s in others], optimizer, course, name)
    return runs


def _best(runs: dict[Run, _Log], seeds: tuple[int, ...], target: float) -> Curves:
    swept = [run for run in runs if run.seed == seeds[0]]
    sweep = {str(run.rate): _final(runs[run].losses) for run in swept}
    rate = min(swept, key=lambda run: (sweep[str(run.rate)], run.rate)).rate
    losses = np.stack([runs[Run(seed, rate)].losses for seed in seeds])
    curve = smoothed(losses)
    crossed = [np.flatnonzero(row <= target) for row in curve]
    return Curves(
        rate=rate,
        sweep=sweep,
        losses=losses,
        update_ratio=np.stack([runs[Run(seed, rate)].update_ratio for seed in seeds]),
        steps_to_target=tuple(int(c[0]) + 1 if len(c) else None for c in crossed),
        learns=bool(np.all(curve[:, -1] <= target)),
    )


def _final(losses: np.ndarray) -> float:
    final = float(smoothed(losses)[-1])
    return final if math.isfinite(final) else math.inf


def _optimizer(name: str, parameters: Sequence[Tensor], rate: float) -> torch.optim.Optimizer:
    if name == "SGD":
        return torch.optim.SGD(parameters, lr=rate, momentum=0.9)
    return torch.optim.Adam(parameters, lr=rate)


# --- one batch of networks


def _stackable(model: nn.Module, stream: Stream, objective: Objective) -> bool:
    """Whether the stacked engine computes this model: it is tried on one batch, against an ordinary step."""
    probe = copy.deepcopy(model)
    if any(True for _ in probe.buffers()) or not all(p.requires_grad for p in probe.parameters()):
        return False  # buffers are written in place by batch norm, frozen weights need no stack
    try:
        networks = _Stacked([probe, probe], objective)
        batch = next(stream.batches(0))
        with random_state_kept(0), _loops_are_errors():
            losses = networks.losses([batch, batch])
        with random_state_kept(0):
            expected = objective(probe, batch)
        gradients = torch.autograd.grad(losses.sum(), list(networks.parameters.values()))
        networks.network(0)  # what a forward pass left on the module may forbid a copy
        dense = all(gradient.layout == torch.strided for gradient in gradients)
        return dense and torch.allclose(losses, expected.expand(2), rtol=1e-3)
    except Exception:  # whatever vmap cannot do, the other engine can; a user's own error shows itself there
        return False


@contextmanager
def _loops_are_errors() -> Iterator[None]:
    """Where vmap only loops over the networks, and says so, nothing is gained by stacking them."""
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*performance drop.*")
            yield
    finally:
        torch.set_warn_always(always)


class _Stacked:
    """Networks of one architecture as one: every parameter is [networks, ...].

    Attributes:
        parameters: name -> ``[networks, ...]``, leaves of the graph.
        table: ``[networks, weights]``, all of them side by side: an optimizer has one tensor to move.
        views: the table's part for each parameter.
    """

    def __init__(self, models: list[nn.Module], objective: Objective):
        self.model, self.objective = copy.deepcopy(models[0]), objective
        stacked, _ = stack_module_state(models)  # type: ignore[arg-type]
        self.table = torch.cat([p.detach().flatten(1) for p in stacked.values()], dim=1)
        parts = self.table.split([p[0].numel() for p in stacked.values()], dim=1)
        self.views = [part.view(p.shape) for part, p in zip(parts, stacked.values())]
        self.parameters = {name: p.detach().clone().requires_grad_() for name, p in stacked.items()}

    def gradient(self, losses: Tensor) -> Tensor:
        """The gradient of each network's loss, laid out like the table."""
        leaves = list(self.parameters.values())
        found = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, materialize_grads=True)
        return torch.cat([grad.flatten(1) for grad in found], dim=1)

    @torch.no_grad()
    def move(self, update: Tensor) -> np.ndarray:
        """Add an update; returns |update| / |weights| of each network."""
        size = self.table.double().norm(dim=1)
        self.table += update
        torch._foreach_copy_(list(self.parameters.values()), self.views)
        return (update.double().norm(dim=1) / size).cpu().numpy()

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
        for name, parameter in model.named_parameters():
            parameter.copy_(self.parameters[name][index])
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


def _train_stacked(
    starts: dict[int, nn.Module],
    runs: list[Run],
    optimizer: str,
    course: _Course,
    name: str,
) -> dict[Run, _Log]:
    networks = _Stacked([starts[run.seed] for run in runs], course.objective)
    # The optimizer acts on a displacement that starts at zero each step. SGD's and Adam's steps are proportional to
    # the rate, so one optimizer at rate 1 serves all rates, and the displacement is the update whose size we report.
    displacement = torch.zeros_like(networks.table).requires_grad_()
    driver = _optimizer(optimizer, [displacement], 1.0)
    rates = torch.tensor([[run.rate] for run in runs], dtype=torch.float64).to(networks.table)
    sources = {run.seed: course.stream.batches(run.seed) for run in runs}
    losses, ratios = np.full((2, len(runs), course.steps), np.nan)
    for step in track(range(course.steps), f"training {name!r} under {optimizer}"):
        fresh = {seed: next(source) for seed, source in sources.items()}
        value = networks.losses([fresh[run.seed] for run in runs])
        displacement.grad = networks.gradient(value)
        driver.step()
        losses[:, step] = value.detach().double().cpu().numpy()
        ratios[:, step] = networks.move(displacement.detach() * rates)
        displacement.detach().zero_()
        if course.is_over(losses[:, : step + 1]):
            losses, ratios = losses[:, : step + 1], ratios[:, : step + 1]
            break
    return {run: _Log(losses[i], ratios[i], partial(networks.network, i)) for i, run in enumerate(runs)}


# --- one network after the other


def _train_one_by_one(
    starts: dict[int, nn.Module],
    runs: list[Run],
    optimizer: str,
    course: _Course,
    name: str,
) -> dict[Run, _Log]:
    logs = {}
    for run in track(runs, f"training {name!r} under {optimizer}"):
        with random_state_kept(run.seed):
            logs[run] = _train(copy.deepcopy(starts[run.seed]), run, optimizer, course)
    return logs


def _train(model: nn.Module, run: Run, optimizer: str, course: _Course) -> _Log:
    weights = [p for p in model.parameters() if p.requires_grad]
    driver = _optimizer(optimizer, weights, run.rate)
    losses, ratios = np.full((2, course.steps), np.nan)
    for step, batch in zip(range(course.steps), course.stream.batches(run.seed)):
        driver.zero_grad()
        value = course.objective(model, batch)
        value.backward()
        before = [w.detach().clone() for w in weights]
        driver.step()
        losses[step] = float(value.detach())
        moved = sum(float((w.detach() - b).square().sum()) for w, b in zip(weights, before))
        ratios[step] = math.sqrt(moved / max(sum(float(b.square().sum()) for b in before), 1e-300))
        if not math.isfinite(losses[step]):
            break
    return _Log(losses, ratios, lambda: model)
