"""The main job on a user's own model: its twins, everything measured on them, the words around it."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from skipscope._calls import no_gradient
from skipscope._data import batch_size, rows
from skipscope._errors import SkipscopeError
from skipscope._progress import say
from skipscope._public_call import public_call
from skipscope._subject import Subject, prepare
from skipscope._untouched import one_snapshot, private_copy, random_state_kept, require_module, set_mode
from skipscope._version import __version__
from skipscope.comparison._measure import Clock, attempt, strength_sweep
from skipscope.comparison._options import require_size, require_whole
from skipscope.comparison._results import Comparison, Rung, StrengthSweep, Training, Twin
from skipscope.comparison._threads import fitting_threads
from skipscope.comparison._train import RATES, train_and_keep
from skipscope.comparison._words import claims, methods, summary
from skipscope.flow import (
    GradientFlow,
    GradientSplit,
    Importance,
    PathSpectrum,
    flow_of,
    importance_of,
    paths_of,
    split_of,
)
from skipscope.shortcuts import Shortcuts, ablate, add_shortcuts
from skipscope.surfaces import PairedSurfaces, paired_landscapes

Factory = Callable[[], nn.Module]


@dataclass(frozen=True)
class Settings:
    """How much is done.

    Attributes:
        seeds, steps, batch_size: of the training.
        grid: points a side of a surface.
        samples: how many samples gradients and surfaces rest on.
        train: whether to train at all.
        optimizers: optimizer -> rates to try.
        target: the loss to be reached; None: half of the first loss.
        seed: for everything drawn.
    """

    seeds: int = 3
    steps: int = 200
    batch_size: int | None = None
    grid: int = 21
    samples: int = 256
    train: bool = True
    optimizers: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: RATES)
    target: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Roles:
    """Which twin has the shortcuts, which has none, and which are controls."""

    having: str
    lacking: str
    controls: tuple[str, ...] = ()


@dataclass
class Evidence:
    """What has been measured so far; becomes a :class:`Comparison`."""

    roles: Roles
    twins: dict[str, Twin]
    found: dict[str, Shortcuts] = field(default_factory=dict)
    flow: dict[str, GradientFlow] = field(default_factory=dict)
    split: dict[str, GradientSplit] = field(default_factory=dict)
    paths: dict[str, PathSpectrum] = field(default_factory=dict)
    training: Training | None = None
    ladder: list[Rung] = field(default_factory=list)
    surfaces: dict[str, PairedSurfaces] = field(default_factory=dict)
    importance: dict[str, Importance] = field(default_factory=dict)
    strength: dict[str, StrengthSweep] = field(default_factory=dict)

    def finish(self, subject: str, settings: Settings, clock: Clock, details: str = "") -> Comparison:
        """Put the words around the numbers."""
        provenance = {
            "skipscope": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
            "seed": settings.seed,
            "seconds": {name: round(seconds, 2) for name, seconds in clock.stages.items()},
            "seconds in all": round(clock.spent, 1),
        }
        return Comparison(
            subject=subject,
            summary=summary(self),
            claims=claims(self),
            twins=tuple(self.twins.values()),
            found=self.found,
            flow=self.flow,
            split=self.split,
            paths=self.paths,
            training=self.training,
            ladder=tuple(self.ladder),
            surfaces=self.surfaces,
            importance=self.importance,
            strength=self.strength,
            methods=methods(self, settings, details),
            notes=tuple(clock.notes),
            provenance=provenance,
        )


@public_call("compare")
def compare(
    model: nn.Module | Factory | None = None,
    data: Any = None,
    loss: Any = None,
    *,
    variants: Mapping[str, nn.Module | Factory] | None = None,
    train: bool = True,
    seeds: int = 3,
    steps: int | None = None,
    batch_size: int | None = None,
    grid: int = 21,
    budget: float | None = None,
    quick: bool = False,
    seed: int = 0,
    name: str | None = None,
    about: Sequence[str] = (),
    weight: Callable[[Any], float] | None = None,
) -> Comparison:
    """What do its shortcuts do for a network? Everything skipscope measures, with and without, as one result.

    The shortcuts are found, not declared. A model that has some is compared with the twin from which they were
    removed; a model that has none with the twin to which they were added. Nothing is done to the model given: twins
    are copies. Local.

    Args:
        model: a factory (called anew for each seed) or a ready module (seeds then vary the order of batches only);
            None: the lecture's network, made deep, on embedded digits.
        data: one batch ``(inputs, target)``, a Mapping, or any re-iterable of these.
        loss: ``loss(output, target)``, ``@skipscope.objective``, or nothing when the output carries ``.loss``.
        variants: more networks to stand beside the model, by name, each a factory or a module.
        train: whether the twins are also trained side by side.
        seeds: training runs of each twin.
        steps: optimizer steps a run; by default 200, with ``quick`` 60 (the lecture's network: 400 and 120).
        batch_size: samples a step where the data is one batch.
        grid: points a side of the loss surfaces.
        budget: seconds to stay within; parts that do not fit are left out and named in ``notes``.
        quick: a smaller version of everything.
        seed: for all that is drawn.
        name: what the page calls the model.
        about: sentences on the data or the model for the paragraph of methods.
        weight: what a batch counts for, when the loss is not a mean over samples.

    Returns:
        :class:`Comparison`; ``result.save("report.html")`` writes the page.

    Raises:
        SkipscopeError: the model, the data or the loss cannot be read, a number is out of range, or the loss is not finite.

    Example:
        >>> from skipscope import reference
        >>> make = lambda: reference.deep_mlp(6, shortcut="identity")
        >>> result = compare(make, reference.digits(64), nn.functional.cross_entropy, train=False, grid=5)
        >>> sorted(result.flow)
        ['with', 'with, detached', 'without']
    """
    require_whole("compare", seeds=seeds, steps=steps, batch_size=batch_size)
    require_whole("compare", 3, grid=grid)
    require_size("compare", budget=budget)
    settings = Settings(
        seeds=1 if quick else seeds, steps=steps or (60 if quick else 200), batch_size=batch_size,
        grid=min(grid, 11) if quick else grid, samples=128 if quick else 256, train=train, seed=seed,
    )  # fmt: skip
    if model is None:
        if data is not None or variants is not None:
            raise SkipscopeError(
                "compare", "data without a model", cure="compare(model, data, loss), or compare()"
            )
        from skipscope.comparison._lecture import compare_lecture

        return compare_lecture(settings, Clock(budget), quick=quick, steps=steps)
    return _compare_own(model, data, loss, variants or {}, settings, Clock(budget), name, about, weight)


def _compare_own(
    model,
    data,
    loss,
    variants,
    settings: Settings,
    clock: Clock,
    name: str | None,
    about: Sequence[str],
    weight,
) -> Comparison:
    base = _ready(model, settings.seed)
    whole = prepare(base, data, loss, "compare", weight=weight)
    batch = _some(whole.data.first(), settings.samples)
    subject = whole.on(batch)
    label = name or type(base).__name__
    with one_snapshot(base):
        _refuse_bad_loss(whole)
        with clock.stage("find"):
            subjects, makers, roles, meanings = _twins(model, subject, variants, settings, clock)
        evidence = Evidence(roles, describe(subjects, meanings, label))
        with (
            one_snapshot(*(one.model for one in subjects.values())),
            fitting_threads(copy.deepcopy(base), whole.loss, batch),
        ):
            measure_flow(evidence, subjects, clock)
            trained: dict[str, nn.Module] = {}
            if settings.train:
                trained = measure_training(evidence, makers, data, loss, settings, clock, weight)
            if not trained:
                clock.notes.append(
                    "nothing was trained: surfaces and importance are those of the weights as they were given"
                )
            subjects = {
                name: subjects[name].twin(one, owned=False) for name, one in trained.items()
            } or subjects
            measure_surfaces(evidence, subjects, settings, clock)
            measure_importance(evidence, subjects, clock)
    details = "".join(f"{sentence[0].upper()}{sentence[1:]}. " for sentence in about)
    return evidence.finish(f"{label}, measured on {batch_size(batch)} samples", settings, clock, details)


def _ready(model: Any, seed: int) -> nn.Module:
    """A copy in training mode: the user's own is never run."""
    if isinstance(model, nn.Module):
        require_module(model, "compare")
        return private_copy(model, "compare").train()
    if not callable(model):
        require_module(model, "compare")
    with random_state_kept(seed):
        made: Any = model()
    require_module(made, "compare")
    return made.train()


def _some(batch: Any, samples: int) -> Any:
    return rows(batch, slice(0, samples)) if batch_size(batch) > samples else batch


def _refuse_bad_loss(subject: Subject) -> None:
    with subject.running(0):
        value = subject.loss(subject.model, subject.data.first())
    if not torch.isfinite(value.detach()):
        raise SkipscopeError(
            "compare", "the loss is not finite on the first batch", expected="a finite loss", got=float(value.detach()),
            cure="look for NaN in the data or the weights: skipscope flow MODEL says where they begin",
        )  # fmt: skip
    if not value.requires_grad:
        raise no_gradient("compare", subject.model)


def _twins(model, subject: Subject, variants, settings: Settings, clock: Clock):
    """The networks to compare, how to make each anew, who plays which part, and what each one is."""
    base, found = subject.model, subject.found
    again = model if not isinstance(model, nn.Module) else None
    if len(found):
        plain = ablate(base, found, how="remove")
        subjects = {"with": subject, "without": subject.twin(plain, owned=False)}
        makers: dict[str, Any] = {"with": again or base}
        makers["without"] = (lambda: ablate(again(), found, how="remove")) if again else plain
        roles, meanings = Roles("with", "without"), {"with": "as built", "without": "removed"}
    else:
        added = add_shortcuts(base, subject.inputs, report=None)
        subjects = {"without": subject, "with": subject.other(added, owned=False)}
        makers = {"without": again or base}
        makers["with"] = (lambda: add_shortcuts(again(), subject.inputs, report=None)) if again else added
        roles, meanings = Roles("with", "without"), {"without": "as built", "with": "shortcuts added"}
        clock.notes.append(
            "the model has no shortcuts of its own: its twin has the lecture's, added where shapes agree"
        )
    for name, variant in variants.items():
        subjects[name] = subject.other(_ready(variant, settings.seed), owned=False)
        makers[name], meanings[name] = variant, "variant"
    return subjects, makers, roles, meanings


def describe(subjects: Mapping[str, Subject], meanings: Mapping[str, str], label: str) -> dict[str, Twin]:
    """One line of description for each network."""
    return {
        name: Twin(
            name, meanings[name], f"{label}, {meanings[name]}", sum(p.numel() for p in one.model.parameters())
        )
        for name, one in subjects.items()
    }


def measure_flow(evidence: Evidence, subjects: Mapping[str, Subject], clock: Clock) -> None:
    """Flow of every network; for those with shortcuts also removed and detached, split, paths and strength."""
    say("gradient flow, paths and shortcut strength")
    removed = {name for name, twin in evidence.twins.items() if twin.meaning == "removed"}
    for name, subject in subjects.items():
        with clock.stage("flow"):
            evidence.flow[name] = flow_of(subject)
        if name in removed or not len(subject.found):
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
        sweep = attempt(clock, f"strength: {name}", strength_sweep, subject, name)
        if sweep is not None:
            evidence.strength[name] = sweep


def _flow_of_twin(subject: Subject, how: str) -> GradientFlow:
    return flow_of(subject.twin(ablate(subject.model, subject.found, how=how)))


def measure_training(
    evidence, makers, data, loss, settings: Settings, clock: Clock, weight
) -> dict[str, nn.Module]:
    """Train the twins side by side; returns one trained network each, under the optimizer that most of them like."""
    runs = len(makers) * sum(len(r) + settings.seeds for r in settings.optimizers.values())
    steps, per_step = settings.steps, seconds_a_step(makers, data, loss, settings, weight)
    if clock.budget is not None:
        steps = int(min(steps, max(0.0, (clock.budget - clock.spent) * 0.6) / (runs * per_step)))
    say(f"training: {runs} runs of {steps} steps, about {runs * steps * per_step:.0f} s")
    if steps < min(20, settings.steps):
        clock.notes.append(
            f"training was left out: the budget of {clock.budget:.0f} s has room for {steps} steps only"
        )
        return {}
    if steps < settings.steps:
        clock.notes.append(f"training was cut to {steps} steps to stay within the budget")
    with clock.stage("training"):
        evidence.training, kept = train_and_keep(
            makers, data, loss, seeds=range(settings.seed, settings.seed + settings.seeds), steps=steps,
            batch_size=settings.batch_size, optimizers=settings.optimizers, target=settings.target, weight=weight,
            extend=clock.budget is None,
        )  # fmt: skip
    return trained_alike(evidence.training, kept)


def trained_alike(training: Training, kept: Mapping[str, Mapping[str, nn.Module]]) -> dict[str, nn.Module]:
    """One trained network a twin, all under one optimizer: the one under which most of them learn."""
    optimizers = list(next(iter(kept.values())))

    def merit(optimizer: str) -> tuple[int, float]:
        finals = [
            np.nan_to_num(by[optimizer].final_loss, nan=1e9, posinf=1e9) for by in training.curves.values()
        ]
        return len(training.learners(optimizer)), -float(np.mean(finals))

    best = max(optimizers, key=merit)
    return {name: by[best] for name, by in kept.items()}


def seconds_a_step(makers, data, loss, settings: Settings, weight) -> float:
    """What one step of the first twin takes, under each optimizer's first rate, timed over a few steps."""
    name, maker = next(iter(makers.items()))
    few = {optimizer: rates[:1] for optimizer, rates in settings.optimizers.items()}
    seconds = {}
    for steps in (1, 2, 12):  # the first pays for what happens only once
        start = time.perf_counter()
        train_and_keep(
            {name: maker},
            data,
            loss,
            seeds=1,
            steps=steps,
            batch_size=settings.batch_size,
            optimizers=few,
            weight=weight,
        )
        seconds[steps] = time.perf_counter() - start
    return max((seconds[12] - seconds[2]) / 10, seconds[12] / 48) / len(few)


def measure_surfaces(
    evidence: Evidence, subjects: Mapping[str, Subject], settings: Settings, clock: Clock
) -> None:
    """Each network's own surface; and, from shared weights, with against removed."""
    say(f"loss surfaces of {len(subjects)} networks, {settings.grid} x {settings.grid} points each")
    if not clock.fits("the loss surfaces", 2.0):
        return
    having = evidence.roles.having
    networks = {name: subject.model for name, subject in subjects.items()}
    subject = subjects[having]

    def surfaces_of(models: dict[str, nn.Module]) -> PairedSurfaces:
        return paired_landscapes(models, subject.data, subject.loss, grid=settings.grid, seed=settings.seed)

    def with_and_removed() -> PairedSurfaces:
        twin = ablate(networks[having], evidence.found[having], how="remove")
        subject.recalibrate(twin)
        return surfaces_of({having: networks[having], f"{having}, removed": twin})

    questions: dict[str, Callable[[], PairedSurfaces]] = {"trained": lambda: surfaces_of(dict(networks))}
    if having in evidence.found:
        questions["paired"] = with_and_removed
    for name, question in questions.items():
        answer = attempt(clock, f"surfaces: {name}", question)
        if answer is not None:
            evidence.surfaces[name] = answer


def measure_importance(evidence: Evidence, subjects: Mapping[str, Subject], clock: Clock) -> None:
    """Which shortcuts matter, on the network that has them."""
    having = evidence.roles.having
    if having in subjects and having in evidence.found and clock.fits("importance", 2.0):
        model = private_copy(subjects[having].model, "compare")
        set_mode(model, False)
        subject = subjects[having].twin(model, owned=False)
        answer = attempt(clock, f"importance: {having}", importance_of, subject)
        if answer is not None:
            evidence.importance[having] = answer
