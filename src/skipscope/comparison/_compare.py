"""``compare`` for a user's own model: build its twins, measure them and judge the claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from skipscope._data import batch_size, rows
from skipscope._errors import SkipscopeError
from skipscope._model_calls import no_gradient
from skipscope._option_words import ConnectionKind
from skipscope._public_call import public_call
from skipscope._subject import Subject, prepare
from skipscope._untouched import one_snapshot, private_copy, random_state_kept, require_module
from skipscope.comparison._claims import comparison_of
from skipscope.comparison._comparison_result import KIND, Comparison
from skipscope.comparison._evidence import Evidence, Factory, Roles, Settings
from skipscope.comparison._kind_variants import kind_names, twins_by_kind
from skipscope.comparison._lecture import compare_lecture
from skipscope.comparison._stages import (
    QUICK_SECONDS,
    Clock,
    describe,
    measure_flow,
    measure_importance,
    measure_surfaces,
    measure_training,
)
from skipscope.comparison.training import (
    can_be_cut,
    fitting_threads,
    require_size,
    require_whole,
    train_and_keep,
)
from skipscope.shortcuts import ablate, add_shortcuts


@public_call("compare")
def compare(
    model: nn.Module | Factory | None = None,
    data: Any = None,
    loss: Any = None,
    *,
    variants: Mapping[str, nn.Module | Factory] | Sequence[ConnectionKind] | None = None,
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

    The shortcuts are found, not declared. A model with shortcuts is compared with a twin without them; a
    model without shortcuts with a twin to which they were added. Twins are copies: the model given is not
    changed. Local.

    Args:
        model: a factory (called again for each seed) or a module (seeds then vary the order of batches
            only); None: a deep version of the lecture's network, on embedded digits.
        data: one batch ``(inputs, target)``, a Mapping, or any re-iterable of these.
        loss: ``loss(output, target)``, ``@skipscope.objective``, or nothing when the output carries
            ``.loss``.
        variants: further networks to compare, name -> factory or module; or kinds of
            ``skipscope.nn.registry()``: a twin with shortcuts of each kind (``result.kinds_table()``).
        train: whether the twins are also trained side by side.
        seeds: training runs of each twin.
        steps: optimizer steps per run; by default 200, with ``quick`` 60 (the lecture's network: 300 and 70).
        batch_size: samples per step if the data is one batch.
        grid: points per side of the loss surfaces.
        budget: time limit in seconds; parts that do not fit are left out and named in ``notes``.
        quick: a smaller version of everything, within a ``budget`` of 27 seconds unless another is given.
        seed: seed of every random draw.
        name: name of the model on the page.
        about: sentences on the data or the model for the paragraph on methods.
        weight: batch -> its weight, if the loss is not a mean over samples.

    Returns:
        :class:`Comparison`; ``result.save("report.html")`` writes the page.

    Raises:
        SkipscopeError: the model, the data or the loss cannot be read, a number is out of range, or the loss
            is not finite.

    Example:
        >>> from skipscope import reference
        >>> make = lambda: reference.deep_mlp(6, shortcut="identity")
        >>> result = compare(make, reference.digits(64), nn.functional.cross_entropy, train=False, grid=5)
        >>> sorted(result.flow)
        ['with', 'with, detached', 'without']
    """
    require_whole("compare", seeds=seeds, steps=steps, batch_size=batch_size)
    require_whole("compare", 3, grid=grid)
    kind_names(variants)
    require_size("compare", budget=budget)
    settings = Settings(
        seeds=1 if quick else seeds,
        steps=steps or (60 if quick else 200),
        batch_size=batch_size,
        grid=min(grid, 11) if quick else grid,
        samples=128 if quick else 256,
        train=train,
        seed=seed,
        strengths=6 if quick else 11,
    )
    clock = Clock(QUICK_SECONDS if quick and budget is None else budget)
    if model is None:
        if data is not None or variants is not None:
            raise SkipscopeError(
                "compare",
                "data without a model" if data is not None else "variants without a model",
                cure="compare(model, data, loss), or compare()",
            )
        return compare_lecture(settings, clock, quick=quick, steps=steps)
    return _compare_own(model, data, loss, variants, settings, clock, name, about, weight)


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
    base = _training_copy(model, settings.seed)
    whole = prepare(base, data, loss, "compare", weight=weight)
    batch = _measured_batch(whole, settings.samples)
    subject = whole.on(batch)
    label = name or type(base).__name__
    with one_snapshot(base):
        _refuse_bad_loss(whole)
        with clock.stage("find"):
            subjects, makers, roles, meanings = _twins(model, subject, variants, settings, clock)
        evidence = Evidence(roles, describe(subjects, meanings, label))
        with (
            one_snapshot(*(one.model for one in subjects.values())),
            fitting_threads(private_copy(base, "compare"), whole.loss, batch),
        ):
            measure_flow(evidence, subjects, settings, clock)
            trained: dict[str, nn.Module] = {}
            if settings.train:
                train = partial(train_and_keep, data=data, loss=loss, weight=weight)
                trained = measure_training(evidence, makers, train, subject, settings, clock)
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
    return comparison_of(
        evidence, f"{label}, measured on {batch_size(batch)} samples", settings, clock, details
    )


def _training_copy(model: Any, seed: int) -> nn.Module:
    """Copy a module, or build one from a factory, in training mode; the user's own module is never run."""
    if isinstance(model, nn.Module):
        require_module(model, "compare")
        return private_copy(model, "compare").train()
    if not callable(model):
        require_module(model, "compare")
    with random_state_kept(seed):
        made: Any = model()
    require_module(made, "compare")
    return made.train()


def _measured_batch(subject: Subject, samples: int) -> Any:
    """The first batch, cut to ``samples`` rows if its rows are independent samples."""
    one = subject.on(subject.data.first())
    batch = one.data.first()
    return rows(batch, slice(samples)) if can_be_cut(one.model, one.data, one.loss, samples) else batch


def _refuse_bad_loss(subject: Subject) -> None:
    with subject.running(0):
        value = subject.loss(subject.model, subject.data.first())
    if not torch.isfinite(value.detach()):
        raise SkipscopeError(
            "compare",
            "the loss is not finite on the first batch",
            expected="a finite loss",
            got=float(value.detach()),
            cure="look for NaN in the data or the weights: skipscope flow MODEL says where they begin",
        )
    if not value.requires_grad:
        raise no_gradient("compare", subject.model)


def _twins(model, subject: Subject, variants, settings: Settings, clock: Clock):
    """The networks to compare, a maker of each, their roles, and their meanings."""
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
    for name, (twin, maker) in twins_by_kind(kind_names(variants), subject, again, clock.notes).items():
        subjects[name], makers[name], meanings[name] = (
            subject.other(twin, owned=False),
            maker,
            f"{KIND}{name}",
        )
    for name, variant in variants.items() if isinstance(variants, Mapping) else ():
        subjects[name] = subject.other(_training_copy(variant, settings.seed), owned=False)
        makers[name], meanings[name] = variant, "variant"
    return subjects, makers, roles, meanings
