"""Stages of a comparison, each a function of the evidence so far, and a clock for the time budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import nn

from skipscope._data import rows
from skipscope._errors import SkipscopeError
from skipscope._progress import say, track
from skipscope._subject import Subject
from skipscope._untouched import private_copy, set_mode
from skipscope.comparison._comparison_result import KIND, StrengthSweep, Twin
from skipscope.comparison._evidence import Evidence, Settings
from skipscope.comparison.training import Training, can_be_cut, workers
from skipscope.flow import GradientFlow, flow_of, importance_of, paths_of, split_of
from skipscope.shortcuts import ablate
from skipscope.surfaces import PairedSurfaces, paired_landscapes

# Default budget of ``quick``. Starting Python and torch adds about three seconds to the command.
QUICK_SECONDS = 27.0
# Fewer steps show nothing, so training is left out if the budget has no time for them.
FEWEST_STEPS = 20


@dataclass
class Clock:
    """Time per stage, and whether another stage fits into the budget.

    Attributes:
        budget: seconds for everything; None: no limit.
        stages: stage -> its seconds.
        notes: what was left out, and why.
    """

    budget: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)
    _cpu_at_start: float = field(default_factory=time.process_time)

    @property
    def spent(self) -> float:
        """Seconds since the clock was started."""
        return time.perf_counter() - self.start

    @property
    def slowed(self) -> float:
        """Wall-clock time over CPU time of this process: above 1 if other work shares the machine."""
        computed = time.process_time() - self._cpu_at_start
        return max(1.0, self.spent / computed) if computed > 0.2 else 1.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the code inside."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - begun

    def fits(self, name: str, estimate: Callable[[], float]) -> bool:
        """Whether ``estimate()`` more seconds fit into the budget; if not, note what was left out."""
        if self.budget is None or self.spent + (seconds := estimate()) <= self.budget:
            return True
        self.notes.append(
            f"left out: {name}; about {seconds:.0f} s more would have passed the budget of"
            f" {self.budget:.0f} s"
        )
        return False


def strength_sweep(
    subject: Subject, name: str, known: Mapping[float, GradientFlow], count: int
) -> StrengthSweep:
    """Measure the gradient flow at ``count`` shortcut strengths from 0 to 1, except those in ``known``."""
    flows, strengths = [], np.linspace(0.0, 1.0, count)
    for strength in track(strengths, f"shortcut strength of {name}", count):
        flow = known.get(float(strength))
        if flow is None:
            twin = ablate(subject.model, subject.found, strength=float(strength), share=True)
            flow = flow_of(subject.twin(twin))
        flows.append(flow)
    return StrengthSweep(
        strengths=strengths,
        names=tuple(b.name for b in flows[0].boundaries),
        gradient_rms=np.array([[_number(b.gradient_rms) for b in f.boundaries] for f in flows]),
        fall_decades=np.array([_number(f.verdict.fall_decades) for f in flows]),
        states=tuple(f.verdict.state for f in flows),
    )


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def attempt(clock: Clock, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run one stage. A SkipscopeError becomes a note; the page then leaves the stage out."""
    with clock.stage(name.partition(":")[0]):
        try:
            return function(*arguments)
        except SkipscopeError as error:
            clock.notes.append(f"{name} could not be measured: {error.problem}")
            return None


def describe(
    subjects: Mapping[str, Subject],
    meanings: Mapping[str, str],
    label: str,
    descriptions: Mapping[str, str] = {},
) -> dict[str, Twin]:
    """Describe each network in one line, by default with its meaning."""
    return {
        name: Twin(
            name,
            meanings[name],
            f"{label}, {descriptions.get(name, meanings[name])}",
            sum(p.numel() for p in one.model.parameters()),
        )
        for name, one in subjects.items()
    }


def measure_flow(
    evidence: Evidence, subjects: Mapping[str, Subject], settings: Settings, clock: Clock
) -> None:
    """Measure the gradient flow of every network.

    For a network with shortcuts, also measure the flow of its removed and detached twins, the gradient split,
    the path spectrum and a strength sweep.
    """
    say("gradient flow, paths and shortcut strength")
    removed = {name for name, twin in evidence.twins.items() if twin.meaning == "removed"}
    by_kind = {name for name, twin in evidence.twins.items() if twin.meaning.startswith(KIND)}
    for name, subject in subjects.items():
        with clock.stage("flow"):
            evidence.flow[name] = flow_of(subject)
        if name in removed or name in by_kind or not len(subject.found):
            continue
        evidence.found[name] = subject.found
        twins = {"detached": "detach"} if removed else {"removed": "remove", "detached": "detach"}
        for word, how in twins.items():
            flow = attempt(clock, f"flow: {name}, {word}", _flow_of_twin, subject, how)
            if flow is not None:
                evidence.flow[f"{name}, {word}"] = flow
        questions = ("split", split_of, evidence.split), ("paths", paths_of, evidence.paths)
        for question, measure, store in questions:
            answer = attempt(clock, f"{question}: {name}", measure, subject)
            if answer is not None:
                store[name] = answer
        without = evidence.flow.get(evidence.roles.without_shortcuts if removed else f"{name}, removed")
        known = {1.0: evidence.flow[name]} | ({0.0: without} if without is not None else {})
        sweep = attempt(clock, f"strength: {name}", strength_sweep, subject, name, known, settings.strengths)
        if sweep is not None:
            evidence.strength[name] = sweep


def _flow_of_twin(subject: Subject, how: Literal["remove", "detach", "lesion"]) -> GradientFlow:
    return flow_of(subject.twin(ablate(subject.model, subject.found, how=how)))


def measure_training(
    evidence: Evidence,
    makers: Mapping[str, Any],
    train: Callable[..., Any],
    subject: Subject,
    settings: Settings,
    clock: Clock,
) -> dict[str, nn.Module]:
    """Train the twins side by side.

    Args:
        evidence: evidence to which the training is added.
        makers: twin -> its maker.
        train: ``train_and_keep`` with the data, the loss and the weight bound.
        subject: twin on which a step is timed.
        settings: steps, seeds and rates.
        clock: clock whose budget limits the steps.

    Returns:
        A trained network of each twin, under the optimizer with which most twins learn; empty if the budget
        leaves no time.
    """
    runs = len(makers) * sum(len(r) + settings.seeds for r in settings.optimizers.values())
    steps, per_step = settings.steps, seconds_a_step(subject, settings.batch_size) * clock.slowed
    if clock.budget is not None:
        steps = int(min(steps, max(0.0, (clock.budget - clock.spent) * 0.6) / (runs * per_step)))
    say(f"training: {runs} runs of {steps} steps, about {runs * steps * per_step:.0f} s")
    if steps < min(FEWEST_STEPS, settings.steps):
        clock.notes.append(
            f"training was left out: the budget of {clock.budget:.0f} s has room for {steps} steps only"
        )
        return {}
    if steps < settings.steps:
        clock.notes.append(f"training was cut to {steps} steps to stay within the budget")
    with clock.stage("training"):
        training, kept = train(
            makers,
            seeds=range(settings.seed, settings.seed + settings.seeds),
            steps=steps,
            batch_size=settings.batch_size,
            optimizers=settings.optimizers,
            target=settings.target,
            extend=clock.budget is None,
        )
    evidence.training = training
    return trained_alike(training, kept)


def trained_alike(training: Training, kept: Mapping[str, Mapping[str, nn.Module]]) -> dict[str, nn.Module]:
    """The trained networks under the optimizer with which most twins learn, one per twin."""
    optimizers = list(next(iter(kept.values())))

    def merit(optimizer: str) -> tuple[int, float]:
        finals = [
            np.nan_to_num(by[optimizer].final_loss, nan=1e9, posinf=1e9) for by in training.curves.values()
        ]
        return len(training.learners(optimizer)), -float(np.mean(finals))

    best = max(optimizers, key=merit)
    return {name: by[best] for name, by in kept.items()}


def seconds_a_step(subject: Subject, batch_size: int | None) -> float:
    """Seconds per training step on an idle machine: forward and backward timed, 20 % for the optimizer."""
    batch = subject.data.first()
    if batch_size is not None and can_be_cut(subject.model, subject.data, subject.loss, batch_size):
        batch = rows(batch, slice(batch_size))
    seconds = []
    with subject.running(0):
        # The first pass is a warm-up.
        for _ in range(4):
            start = time.perf_counter()
            subject.loss(subject.model, batch).backward()
            seconds.append(time.perf_counter() - start)
            subject.model.zero_grad()
    return 1.2 * min(seconds[1:])


def measure_surfaces(
    evidence: Evidence, subjects: Mapping[str, Subject], settings: Settings, clock: Clock
) -> None:
    """Compute the surface of each network, and the pair with and without shortcuts from shared weights."""
    say(f"loss surfaces of {len(subjects)} networks, {settings.grid} x {settings.grid} points each")
    having = evidence.roles.with_shortcuts
    networks = {
        name: subject.model
        for name, subject in subjects.items()
        if not evidence.twins[name].meaning.startswith(KIND)
    }
    subject = subjects[having]
    evaluations = settings.grid**2 * (len(networks) + 2)  # a forward pass is about a third of a step
    if not clock.fits(
        "the loss surfaces", lambda: evaluations * seconds_a_step(subject, None) / 3 / workers()
    ):
        return

    def surfaces_of(models: dict[str, nn.Module]) -> PairedSurfaces:
        return paired_landscapes(models, subject.data, subject.loss, grid=settings.grid, seed=settings.seed)

    def with_and_removed() -> PairedSurfaces:
        twin = ablate(networks[having], evidence.found[having], how="remove")
        subject.recalibrate(twin)
        return surfaces_of({having: networks[having], f"{having}, removed": twin})

    questions: dict[str, Callable[[], PairedSurfaces]] = {"trained": lambda: surfaces_of(dict(networks))}
    if having in evidence.found:
        questions["paired"] = with_and_removed
    # Without training, the twin with removed shortcuts still has the weights of the original.
    removed = evidence.twins[evidence.roles.without_shortcuts].meaning == "removed"
    is_paired = evidence.training is None and removed and len(networks) == 2
    for name, question in questions.items():
        if name == "paired" and is_paired and "trained" in evidence.surfaces:
            evidence.surfaces[name] = evidence.surfaces["trained"]
            continue
        answer = attempt(clock, f"surfaces: {name}", question)
        if answer is not None:
            evidence.surfaces[name] = answer


def measure_importance(evidence: Evidence, subjects: Mapping[str, Subject], clock: Clock) -> None:
    """Rank the shortcuts of the network with shortcuts by importance."""
    having = evidence.roles.with_shortcuts
    if having not in subjects or having not in evidence.found:
        return
    # Two edits per shortcut, and about as long as one edit for measuring them.
    count = 3 * len(evidence.found[having])
    if clock.fits("importance", lambda: count * seconds_a_step(subjects[having], None)):
        model = private_copy(subjects[having].model, "compare")
        set_mode(model, False)
        subject = subjects[having].twin(model, owned=False)
        answer = attempt(clock, f"importance: {having}", importance_of, subject)
        if answer is not None:
            evidence.importance[having] = answer
