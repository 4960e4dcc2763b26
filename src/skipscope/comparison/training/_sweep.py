"""The runs of one twin under one optimizer: a learning-rate sweep on its own seed, then the reported seeds.

Except for this order the runs are independent. They are trained side by side in copies of this process where
that takes less time.
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

# A sweep whose best rate is its greatest or smallest is extended by two rates, at most so many times.
EXTENSIONS = 3

# The accuracy on the training data rests on a step's batch for every tenth step.
_STEPS_A_BATCH = 10

Key = TypeVar("Key", bound=Hashable)


@dataclass
class Trained:
    """What is kept of a run.

    Attributes:
        losses, update_ratio: each [steps]; no longer than they are exact: losses of float32 in its shortest
            decimals, ratios in eight digits.
        accuracy: share of training samples and of test samples named rightly; None where targets are no
            classes, or nothing was asked.
        network: the trained network, where it was asked for.
    """

    losses: np.ndarray
    update_ratio: np.ndarray
    accuracy: tuple[float | None, float | None] = (None, None)
    network: nn.Module | None = None

    def __getstate__(self) -> tuple[Any, ...]:
        # As bytes: through a pipe each tensor would be an open file of its own.
        return self.losses, self.update_ratio, self.accuracy, pickle.dumps(self.network)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.losses, self.update_ratio, self.accuracy, network = state
        self.network = pickle.loads(network)


@dataclass(frozen=True)
class Trainee:
    """One twin under one optimizer.

    Attributes:
        name: the twin's.
        make: makes its network.
        choice: the optimizer.
        course: what every run goes through.
        test: data on which accuracy is measured, beside the training data.
    """

    name: str
    make: Maker
    choice: OptimizerChoice
    course: Course
    test: Batches | None = None

    def train(self, runs: Sequence[Run], reported: bool, kept: int | None) -> list[Trained]:
        """Train these runs; measure the accuracy of those that are reported, keep the network of one seed."""
        logs = train_each(self.make, runs, self.choice, self.course, self.name)
        return [self._trained(run, logs[run], reported, run.seed == kept) for run in runs]

    def _trained(self, run: Run, log: Log, reported: bool, is_kept: bool) -> Trained:
        measured = (None, None)
        if reported and np.isfinite(log.losses).all():
            measured = self._accuracies(log.network, run)
        with np.errstate(over="ignore"):
            losses = log.losses.astype(np.float32)
        if np.array_equal(losses, log.losses, equal_nan=True):  # it was computed in float32 or less
            log.losses = np.array([float(str(loss)) for loss in losses])
        ratios = np.array([float(f"{ratio:.8g}") for ratio in log.update_ratio])
        return Trained(log.losses, ratios, measured, log.network if is_kept else None)

    def _accuracies(self, network: nn.Module, run: Run) -> tuple[float | None, float | None]:
        stream, count = self.course.stream, max(1, self.course.steps // _STEPS_A_BATCH)
        seen = islice(stream.batches(run.seed), min(count, stream.count or count))
        objective = self.course.objective
        return (
            accuracy(network, objective, seen),
            None if self.test is None else accuracy(network, objective, self.test),
        )

    @property
    def is_indivisible(self) -> bool:
        """Whether the runs of a sweep need each other: each ends where another got to."""
        return self.course.stop_at is not None


@dataclass
class Sweep:
    """One twin under one optimizer: the rates tried, and the runs reported.

    Attributes:
        seed: on which the rates were tried; None where there was nothing to choose.
        tried: rate -> losses on that seed.
        rate: the best.
        is_at_edge: the best is the greatest or the smallest that was tried, and better than the one beside
            it.
        reported: one run a seed, at the best rate.
    """

    seed: int | None
    tried: dict[float, np.ndarray]
    rate: float
    is_at_edge: bool
    reported: list[Trained]

    def curves(self, target: float) -> Curves:
        """The runs as they are reported."""
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
    """Every rate on a seed of its own; the best one on the seeds that are reported.

    Args:
        trainees: by any key; all with the same course.
        seeds: those that are reported.
        extend: whether a sweep may try rates beyond those given.
        keep: whether to keep the network of the first seed; never where a course stops at a loss.
        copies: of this process, each with one thread; fewer than two: everything is trained here.
        patience: seconds without any answer after which copies are given up.
    """

    def train(question: _Question[Key]) -> list[Trained]:
        return trainees[question.trainee].train(question.runs, question.reported, question.kept)

    stops = any(one.course.stop_at is not None for one in trainees.values())
    kept = seeds[0] if keep and not stops else None
    with side_by_side(train, copies, patience) as answering:
        return _Scheduler(trainees, seeds, kept, stops, answering).sweeps(extend)


@dataclass(frozen=True)
class _Scheduler(Generic[Key]):
    """Asks for the runs of all trainees, stage by stage."""

    trainees: Mapping[Key, Trainee]
    seeds: Sequence[int]
    kept: int | None
    stops: bool
    answering: Answering[_Question[Key], list[Trained]]

    def sweeps(self, extend: bool) -> dict[Key, Sweep]:
        # If only the steps to a target are asked for, the runs that chose the rate are the answer.
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
        """Train runs of several trainees; those that need each other are one question."""
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
    """The rate with the lowest loss at the end; the smaller one of two."""
    return min(tried, key=lambda rate: (final(tried[rate]), rate))


# A loss has come down when it fell by this share of its first value.
FALLEN = 0.01


def _beyond(tried: dict[float, np.ndarray]) -> list[float]:
    """Two more learning rates beyond the range, if the best is at its edge and clearly beats its neighbour.

    All rates saw the same batches, so their last losses differ by the rate alone. Clearly: by a fiftieth of
    the spread of these losses, if the spread is more than a thousandth of the first loss. A loss that rose
    counts as unchanged; if every loss rose, a smaller rate may work.
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
    """The smoothed loss at the end; infinite where training diverged."""
    final = float(smoothed(losses)[-1])
    return final if math.isfinite(final) else math.inf
