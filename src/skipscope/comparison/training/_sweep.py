"""Runs of each twin under each optimizer: a learning-rate sweep on its own seed, then the reported seeds.

Apart from this order the runs are independent. They are trained in worker processes if that is faster.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
from torch import nn

from skipscope._data import Batches
from skipscope._progress import track
from skipscope.comparison.training._accuracy import accuracy
from skipscope.comparison.training._network_makers import Maker
from skipscope.comparison.training._optimizers import OptimizerChoice
from skipscope.comparison.training._processes import Answering, side_by_side
from skipscope.comparison.training._training_result import Curves, smoothed
from skipscope.comparison.training._training_run import Course, Log, Run, train_each

# Most extensions of a sweep, each by two rates, while its best rate is its largest or smallest.
EXTENSIONS = 3

# The training accuracy is measured on one batch for every ten steps.
_STEPS_PER_BATCH = 10

Key = TypeVar("Key", bound=Hashable)


@dataclass
class Trained:
    """Record of a finished run.

    Attributes:
        losses: training losses, [steps]; float32 losses as their shortest decimals.
        update_ratio: |update| / |weights|, [steps], rounded to eight digits.
        accuracy: accuracy on training and on test samples; None if targets are not classes or nothing was
            measured.
        network: the trained network if it is kept.
    """

    losses: np.ndarray
    update_ratio: np.ndarray
    accuracy: tuple[float | None, float | None] = (None, None)
    network: nn.Module | None = None

    def __getstate__(self) -> tuple[Any, ...]:
        # The network travels as bytes: multiprocessing would open a file for each tensor.
        return self.losses, self.update_ratio, self.accuracy, pickle.dumps(self.network)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.losses, self.update_ratio, self.accuracy, network = state
        self.network = pickle.loads(network)


@dataclass(frozen=True)
class Trainee:
    """One twin under one optimizer.

    Attributes:
        name: name of the twin.
        make: maker of its network.
        choice: optimizer.
        course: training procedure of every run.
        test: test data for the accuracy.
    """

    name: str
    make: Maker
    choice: OptimizerChoice
    course: Course
    test: Batches | None = None

    def train(self, runs: Sequence[Run], reported: bool, kept: int | None) -> list[Trained]:
        """Train these runs; measure their accuracy if ``reported``, and keep the network of seed ``kept``."""
        logs = train_each(self.make, runs, self.choice, self.course, self.name)
        return [self._trained(run, logs[run], reported, run.seed == kept) for run in runs]

    def _trained(self, run: Run, log: Log, reported: bool, is_kept: bool) -> Trained:
        measured = (None, None)
        if reported and np.isfinite(log.losses).all():
            measured = self._accuracies(log.network, run)
        with np.errstate(over="ignore"):
            losses = log.losses.astype(np.float32)
        # Losses computed in float32 or less are kept as their shortest decimals.
        if np.array_equal(losses, log.losses, equal_nan=True):
            log.losses = np.array([float(str(loss)) for loss in losses])
        ratios = np.array([float(f"{ratio:.8g}") for ratio in log.update_ratio])
        return Trained(log.losses, ratios, measured, log.network if is_kept else None)

    def _accuracies(self, network: nn.Module, run: Run) -> tuple[float | None, float | None]:
        stream, count = self.course.stream, max(1, self.course.steps // _STEPS_PER_BATCH)
        seen = islice(stream.batches(run.seed), min(count, stream.count or count))
        objective = self.course.objective
        return (
            accuracy(network, objective, seen),
            None if self.test is None else accuracy(network, objective, self.test),
        )

    @property
    def is_indivisible(self) -> bool:
        """Whether the runs of a sweep depend on each other: reaching the target shortens later runs."""
        return self.course.stop_at is not None


@dataclass
class Sweep:
    """One twin under one optimizer: the rates tried, and the runs reported.

    Attributes:
        seed: seed of the sweep; None if there was only one rate.
        tried: rate -> losses on that seed.
        rate: the best rate.
        is_at_edge: whether the best rate is the largest or smallest tried and clearly beats its neighbour.
        reported: one run per seed, at the best rate.
    """

    seed: int | None
    tried: dict[float, np.ndarray]
    rate: float
    is_at_edge: bool
    reported: list[Trained]

    def curves(self, target: float) -> Curves:
        """Summarise the reported runs as curves, for this target."""
        losses = np.stack([run.losses for run in self.reported])
        curve = smoothed(losses)
        crossed = [np.flatnonzero(row <= target) for row in curve]
        train, test = zip(*(run.accuracy for run in self.reported))
        return Curves(
            rate=self.rate,
            sweep={str(rate): final(self.tried[rate]) for rate in sorted(self.tried, reverse=True)},
            losses=losses,
            update_ratio=np.stack([run.update_ratio for run in self.reported]),
            steps_to_target=tuple(int(c[0]) + 1 if len(c) else None for c in crossed),
            learns=bool(np.all(curve[:, -1] <= target)),
            is_at_edge=self.is_at_edge,
            sweep_seed=self.seed,
            train_accuracy=None if all(a is None for a in train) else train,
            test_accuracy=None if all(a is None for a in test) else test,
        )


@dataclass(frozen=True)
class _Question(Generic[Key]):
    """Runs of one trainee that are trained together."""

    trainee: Key
    runs: tuple[Run, ...]
    reported: bool
    kept: int | None


def sweep_then_seeds(
    trainees: Mapping[Key, Trainee],
    seeds: Sequence[int],
    *,
    extend: bool,
    keep: bool,
    copies: int,
    patience: float,
) -> dict[Key, Sweep]:
    """Try every rate on a separate seed, then train the reported seeds at the best rate.

    Args:
        trainees: key -> trainee, all with the same course.
        seeds: the reported seeds.
        extend: whether a sweep may try rates beyond those given.
        keep: whether to keep the network of the first seed; ignored if the course stops at a loss.
        copies: number of worker processes, each with one thread; below two, this process trains.
        patience: seconds without any answer after which workers are abandoned.
    """

    def train(question: _Question[Key]) -> list[Trained]:
        return trainees[question.trainee].train(question.runs, question.reported, question.kept)

    stops = any(one.course.stop_at is not None for one in trainees.values())
    kept = seeds[0] if keep and not stops else None
    with side_by_side(train, copies, patience) as answering:
        return _Scheduler(trainees, seeds, kept, stops, answering).sweeps(extend)


@dataclass(frozen=True)
class _Scheduler(Generic[Key]):
    """Scheduler of the runs of all trainees: sweeps, extensions, then reported seeds."""

    trainees: Mapping[Key, Trainee]
    seeds: Sequence[int]
    kept: int | None
    stops: bool
    answering: Answering[_Question[Key], list[Trained]]

    def sweeps(self, extend: bool) -> dict[Key, Sweep]:
        # A course that stops at a target reports the steps of the sweep itself, so they share a seed.
        own = self.seeds[0] if self.stops else max(self.seeds) + 1
        rates = {key: one.choice.rates for key, one in self.trainees.items() if len(one.choice.rates) > 1}
        tried: dict[Key, dict[float, Trained]] = {key: {} for key in rates}
        for _ in range(1 + (EXTENSIONS if extend else 0)):
            sweeping = {key: [Run(own, rate) for rate in chosen] for key, chosen in rates.items()}
            for key, runs in self._train(sweeping).items():
                tried[key] |= {run.rate: trained for run, trained in runs.items() if run.rate is not None}
            rates = {key: more for key, by_rate in tried.items() if (more := _beyond(_losses(by_rate)))}
            if not rates:
                break
        best = {key: _best(_losses(by_rate)) for key, by_rate in tried.items()}
        at = {key: best.get(key, next(iter(one.choice.rates), None)) for key, one in self.trainees.items()}
        others = {
            key: [Run(seed, rate) for seed in self.seeds if key not in best or seed != own]
            for key, rate in at.items()
        }
        reported = self._train(others, reported=not self.stops)
        return {key: self._sweep(key, own, tried.get(key), at[key], reported[key]) for key in self.trainees}

    def _sweep(
        self,
        key: Key,
        own: int,
        tried: dict[float, Trained] | None,
        rate: float | None,
        reported: dict[Run, Trained],
    ) -> Sweep:
        by_seed = {run.seed: trained for run, trained in reported.items()}
        if tried is not None and rate is not None:
            by_seed.setdefault(own, tried[rate])
        runs = [by_seed[seed] for seed in self.seeds]
        if rate is None:
            one = self.trainees[key]
            rate = one.choice.learning_rate(one.make(self.seeds[0]))
        if tried is None:
            return Sweep(None, {}, rate, False, runs)
        losses = _losses(tried)
        return Sweep(own, losses, rate, bool(_beyond(losses)), runs)

    def _train(
        self, runs: Mapping[Key, Sequence[Run]], reported: bool = False
    ) -> dict[Key, dict[Run, Trained]]:
        """Train runs of several trainees; runs that depend on each other form one question."""
        questions = []
        for key, chosen in runs.items():
            together = [tuple(chosen)] if self.trainees[key].is_indivisible else [(run,) for run in chosen]
            questions += [_Question(key, some, reported, self.kept) for some in together if some]
        found: dict[Key, dict[Run, Trained]] = {key: {} for key in runs}
        words = "training, networks x optimizers x " + ("seeds" if reported else "rates")
        for i, answer in track(self.answering(questions), words, len(questions)):
            found[questions[i].trainee] |= dict(zip(questions[i].runs, answer))
        return {key: {run: found[key][run] for run in chosen} for key, chosen in runs.items()}


def _losses(tried: Mapping[float, Trained]) -> dict[float, np.ndarray]:
    return {rate: trained.losses for rate, trained in tried.items()}


def _best(tried: Mapping[float, np.ndarray]) -> float:
    """The rate with the lowest final loss; the smaller rate in a tie."""
    return min(tried, key=lambda rate: (final(tried[rate]), rate))


# Smallest fall that counts, as a share of the first loss.
FALLEN = 0.01


def _beyond(tried: dict[float, np.ndarray]) -> list[float]:
    """Two more learning rates beyond the range, if the best is at its edge and clearly beats its neighbour.

    All rates saw the same batches, so their final losses differ by the rate alone. "Clearly" means by a
    fiftieth of the spread of these losses, if the spread exceeds a thousandth of the first loss. A loss that
    rose counts as unchanged; if every loss rose, a smaller rate may work.
    """
    rates = sorted(tried)
    first = float(tried[rates[0]][0])
    if not math.isfinite(first):
        return []
    finals = {rate: min(final(tried[rate]), first) for rate in rates}
    best = _best(tried)
    if best not in {rates[0], rates[-1]}:
        return []
    beside = rates[1] if best == rates[0] else rates[-2]
    if final(tried[best]) <= first:
        spread, gain = max(finals.values()) - finals[best], finals[beside] - finals[best]
        if spread < 1e-3 * abs(first) or gain < 0.02 * spread:
            return []
    elif best != rates[0] or final(tried[best]) - first < FALLEN * abs(first):
        return []
    if not best or not beside:
        return []
    factor = best / beside
    return [float(f"{best * factor:.3g}"), float(f"{best * factor**2:.3g}")]


def final(losses: np.ndarray) -> float:
    """The smoothed loss at the end; infinite if training diverged."""
    final = float(smoothed(losses)[-1])
    return final if math.isfinite(final) else math.inf
