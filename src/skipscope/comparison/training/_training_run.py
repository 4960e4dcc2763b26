"""A training run is a plain loop: seed, make the network, train it.

Torch's own optimizers move the weights of a network as few tensors, which leaves every bit as it is and takes
less time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skipscope._data import Objective
from skipscope._progress import track
from skipscope._random import random_state_kept
from skipscope.comparison.training._flat_weights import FlatWeights
from skipscope.comparison.training._network_makers import Maker
from skipscope.comparison.training._optimizers import OptimizerChoice
from skipscope.comparison.training._stream import Stream
from skipscope.comparison.training._training_result import smoothed


@dataclass(frozen=True)
class Run:
    """One training run: which seed, which rate (None: the optimizer's own)."""

    seed: int
    rate: float | None


@dataclass
class Log:
    """What a run left: losses and update sizes, each [steps], and the trained network."""

    losses: np.ndarray
    update_ratio: np.ndarray
    network: nn.Module


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


def train_each(
    make: Maker, runs: Sequence[Run], choice: OptimizerChoice, course: Course, name: str
) -> dict[Run, Log]:
    """Train a network for each run; its noise continues from the state that making it left.

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
    losses, ratios = np.full((2, course.steps), np.nan)
    with _Loop.of(model, run, choice, course) as loop:
        for step, batch in zip(range(course.steps), course.stream.batches(run.seed)):
            losses[step], ratios[step] = loop.step(batch, course.factor(step))
            if not math.isfinite(losses[step]):
                break
            if course.is_over(losses[None, : step + 1]):
                losses, ratios = losses[: step + 1], ratios[: step + 1]
                break
    return Log(losses, ratios, model)


class _Loop:
    """The loop of one run, as a person would write it.

    Attributes:
        flat: the weights as few tensors, as long as an optimizer may see them so.
    """

    def __init__(self, model: nn.Module, run: Run, choice: OptimizerChoice, course: Course):
        self.model, self.course = model, course
        self.weights = [p for p in model.parameters() if p.requires_grad]
        halves = course.autocast == torch.float16
        self.flat = None if choice.factory or halves else FlatWeights.of(model)
        self.make = lambda weights: choice.make(weights, run.rate)
        self.driver = self.make(self.weights if self.flat is None else self.flat.tables)
        self.needs_closure = self.driver.needs_closure  # it inspects a signature: not at every step
        self.rates = [group["lr"] for group in self.driver.optimizer.param_groups]
        self.device = self.weights[0].device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=halves and not self.needs_closure)
        self.update = _Update(self.weights if self.flat is None else self.flat.tables)

    @classmethod
    @contextmanager
    def of(cls, *arguments: Any) -> Iterator[_Loop]:
        """A loop with its optimizer in training mode; on exit the weights are the network's own again.

        A schedule-free optimizer has a training and an evaluation mode.
        """
        loop = cls(*arguments)
        whole = loop.flat
        try:
            getattr(loop.driver.optimizer, "train", lambda: None)()
            yield loop
            getattr(loop.driver.optimizer, "eval", lambda: None)()
        finally:
            if whole is not None:
                whole.release()

    def step(self, batch: Any, factor: float) -> tuple[float, float]:
        """The loss before a step, and how large the step was: |update| / |weights|."""
        if self.course.schedule is not None:
            for group, rate in zip(self.driver.optimizer.param_groups, self.rates):
                group["lr"] = rate * factor
        if self.needs_closure:
            value = float(self.driver.optimizer.step(lambda: self._backward(batch)))  # type: ignore[arg-type]
        else:
            value = self._backward(batch)
            self.scaler.step(self.driver.optimizer)
            self.scaler.update()
        if isinstance(self.driver.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.driver.scheduler.step(value)
        elif self.driver.scheduler is not None:
            self.driver.scheduler.step()
        return value, self.update.ratio()

    def _backward(self, batch: Any) -> float:
        """The loss; its gradient is with the weights, and with what the optimizer moves."""
        if self.flat is None:
            self.driver.optimizer.zero_grad()
        else:
            self.flat.zero_grad()
        with self.course.casting(self.device):
            value = self.course.objective(self.model, batch)
        self.scaler.scale(value).backward()
        if self.course.clip_norm is not None:
            self.scaler.unscale_(self.driver.optimizer)
            nn.utils.clip_grad_norm_(self.weights, self.course.clip_norm)
        if self.flat is not None and not self.flat.gather():
            self.driver = self.flat.apart(self.driver, self.make)
            self.flat = None
        return float(value.detach())


class _Update:
    """The size of what a step does to some weights: from one call to the next."""

    def __init__(self, weights: Sequence[Tensor]):
        alike: dict[Any, list[Tensor]] = {}
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
    def _row(weights: list[Tensor]) -> Tensor:
        return torch.cat([w.detach().reshape(-1) for w in weights])


def _norm(row: Tensor) -> float:
    return float(torch.linalg.vector_norm(row))
