"""Training runs as plain loops: seed, make the network, train it.

For torch's own optimizers the weights are joined into a few flat tensors: the same bits in less time.
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
    """Seed and learning rate of a training run (None: the optimizer's own rate)."""

    seed: int
    rate: float | None


@dataclass
class Log:
    """Log of a run: losses and update sizes, each [steps], and the trained network."""

    losses: np.ndarray
    update_ratio: np.ndarray
    network: nn.Module


@dataclass(frozen=True)
class Course:
    """Training procedure of every run.

    Attributes:
        stream: source of the batches.
        objective: the loss.
        steps: most optimizer steps.
        stop_at: smoothed loss at which to stop; a run whose loss has not fallen by a hundredth after half of
            the steps is stopped too. None: never stop early.
        schedule: function of the step, from 0, that returns a factor on the rate.
        clip_norm: norm to which larger gradients are scaled down.
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
        """Whether to stop after these losses, [networks, steps]; checked at every tenth step."""
        if self.stop_at is None or losses.shape[1] % 10:
            return False
        curve = smoothed(losses)
        is_there = bool((curve <= self.stop_at).any())
        is_stuck = losses.shape[1] >= self.steps // 2 and not (curve[:, -1] < 0.99 * losses[:, 0]).any()
        return is_there or is_stuck

    def factor(self, step: int) -> float:
        """Factor on the learning rate at a step."""
        return 1.0 if self.schedule is None else float(self.schedule(step))

    def casting(self, device: torch.device) -> Any:
        """Autocast context for the loss, or a null context."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self.autocast)


def train_each(
    make: Maker, runs: Sequence[Run], choice: OptimizerChoice, course: Course, name: str
) -> dict[Run, Log]:
    """Train a network for each run; its random numbers continue from the state after building it.

    If the course stops at a loss, later runs have no more steps than the first run that reached it.
    """
    logs = {}
    # Callers that train a single run show their own progress.
    several = len(runs) > 1
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
    """Plain training loop of one run.

    Attributes:
        flat: the weights as flat tensors, or None if the optimizer gets them separately.
    """

    def __init__(self, model: nn.Module, run: Run, choice: OptimizerChoice, course: Course):
        self.model, self.course = model, course
        self.weights = [p for p in model.parameters() if p.requires_grad]
        halves = course.autocast == torch.float16
        self.flat = None if choice.factory or halves else FlatWeights.of(model)
        self.make = lambda weights: choice.make(weights, run.rate)
        self.driver = self.make(self.weights if self.flat is None else self.flat.tables)
        # Cached, because the property inspects a signature.
        self.needs_closure = self.driver.needs_closure
        self.rates = [group["lr"] for group in self.driver.optimizer.param_groups]
        self.device = self.weights[0].device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=halves and not self.needs_closure)
        self.update = _Update(self.weights if self.flat is None else self.flat.tables)

    @classmethod
    @contextmanager
    def of(cls, *arguments: Any) -> Iterator[_Loop]:
        """Make a loop with its optimizer in training mode; on exit the weights regain their own storage.

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
        """Take a step. Returns the loss before it, and |update| / |weights|."""
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
        """Compute the loss and its gradients, of the weights and of the flat tensors; return the loss."""
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
    """Relative size of the change of weights between two calls."""

    def __init__(self, weights: Sequence[Tensor]):
        alike: dict[Any, list[Tensor]] = {}
        for weight in weights:
            alike.setdefault((weight.device, weight.dtype), []).append(weight)
        # Two flat buffers for each device and dtype: the weights before and after a step.
        self.weights = list(alike.values())
        self.before, self.now = ([self._row(some) for some in self.weights] for _ in range(2))
        self.size = math.hypot(*map(_norm, self.before))

    def ratio(self) -> float:
        """|update| / |weights| since the last call."""
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
