"""Train twins side by side: same batches, same seeds, each at the best learning rate of a small sweep.

The sweep uses a separate seed, so that the reported runs did not choose the rate. A best rate at the edge
extends the sweep.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from skipscope._data import Objective, read, tensors_in
from skipscope._errors import SkipscopeError
from skipscope._model_calls import no_gradient
from skipscope._public_call import public_call
from skipscope._ranks import ranks_of
from skipscope._untouched import random_state_kept, untouched
from skipscope.comparison.training._network_makers import Maker, maker_of
from skipscope.comparison.training._optimizers import RATES as RATES
from skipscope.comparison.training._optimizers import choices
from skipscope.comparison.training._processes import workers
from skipscope.comparison.training._stream import Stream
from skipscope.comparison.training._sweep import FALLEN, Sweep, Trainee, final, sweep_then_seeds
from skipscope.comparison.training._threads import Plan, StepSeconds, step_seconds
from skipscope.comparison.training._training_arguments import require_size, require_whole, seeds_of
from skipscope.comparison.training._training_result import Training
from skipscope.comparison.training._training_run import Course

# Timing a step of a network costs about eight steps, so it is done only if the training is twenty times
# longer.
_TRIAL_STEPS, _TRIAL_SHARE = 8, 20


@dataclass(frozen=True)
class Recipe:
    """Training options besides the optimizer.

    Attributes:
        schedule, clip_norm, autocast: see :func:`train_twins`.
    """

    schedule: Callable[[int], float] | None = None
    clip_norm: float | None = None
    autocast: torch.dtype | None = None


@public_call("train_twins")
def train_twins(
    twins: Mapping[str, nn.Module | Callable[[], nn.Module]],
    data: Any,
    loss: Any = None,
    *,
    seeds: int | Sequence[int] = 3,
    steps: int = 400,
    batch_size: int | None = None,
    optimizers: Any = None,
    schedule: Callable[[int], float] | None = None,
    clip_norm: float | None = None,
    autocast: torch.dtype | None = None,
    target: float | None = None,
    weight: Callable[[Any], float] | None = None,
    test: Any = None,
    keep: bool = False,
) -> Training:
    """Train networks side by side and measure how fast each of them learns.

    For a given seed, every twin sees the same batches in the same order. Each twin has the best learning rate
    of the same sweep, on a seed that is not reported. If the best rate is the largest or smallest tried,
    the sweep is extended; a best rate still at the edge is named in the result. Each run is a plain loop:
    seed, make the network, train it in the modes in which it was made (a module entirely in evaluation mode
    is put into training mode). The models given are not trained: their copies are.

    Runs are independent of each other. If that is faster, they are trained in forked worker processes with
    one thread each, with the numbers of one process with one thread. Side effects of a model or a loss then
    stay in the worker. Local.

    Args:
        twins: name -> factory (called for every run, after seeding) or module (seeds then vary the batch
            order only, and the result says so).
        data: training data; a single large batch is cut into random batches if its rows are independent
            samples (tested: the model's output on some rows does not depend on the others). A batch of
            ``skipscope.batches``, a graph or another object is used whole.
        loss: see ``skipscope.gradient_flow``.
        seeds: number of seeds, or the seeds themselves.
        steps: optimizer steps per run.
        batch_size: samples per step if the data is a single batch; default 64.
        optimizers: names out of "SGD" (momentum 0.9), "Adam" and "AdamW" (decay 0.01), or name -> rates to
            try, or name -> factory ``f(parameters)`` of any optimizer, or name -> ``(f, rates)`` with
            ``f(parameters, rate)``. A factory may return ``(optimizer, scheduler)``. Default: SGD and Adam.
        schedule: function of the step, from 0, that returns a factor on the rate.
        clip_norm: scale a gradient of larger norm down to this norm.
        autocast: ``torch.bfloat16`` or ``torch.float16`` (with a gradient scaler); None: full precision.
        target: the loss whose first crossing is counted; default: half of the lowest first loss of any twin.
            If a loss reaches zero or below: half-way from that first loss to the lowest loss of any twin.
        weight: see ``skipscope.gradient_flow``.
        test: test data for the accuracy of each trained network, beside its accuracy on training batches.
            Accuracy is measured if the loss is a cross-entropy on classes.
        keep: keep the trained networks, as ``Training.networks``.

    Returns:
        :class:`Training`.

    Raises:
        SkipscopeError: no twins, an unknown optimizer, numbers out of range, a loss that cannot be
            differentiated, data that cannot be read, or a ready module with hooks that a copy cannot have.

    Example:
        >>> from skipscope import reference
        >>> make = lambda: reference.deep_mlp(4, shortcut="identity")
        >>> loss = nn.functional.cross_entropy
        >>> runs = train_twins({"with": make}, reference.digits(256), loss, seeds=2, steps=30, keep=True)
        >>> runs.curves["with"]["Adam"].losses.shape, type(runs.networks["with"]["Adam"]).__name__
        ((2, 30), 'DeepMLP')
    """
    training, networks = train_and_keep(
        twins,
        data,
        loss,
        seeds=seeds,
        steps=steps,
        batch_size=batch_size,
        optimizers=optimizers,
        target=target,
        weight=weight,
        test=test,
        recipe=Recipe(schedule, clip_norm, autocast),
        keep=keep,
    )
    return training.holding(networks) if keep else training


def train_and_keep(
    twins: Mapping[str, nn.Module | Callable[[], nn.Module]],
    data: Any,
    loss: Any = None,
    *,
    seeds: int | Sequence[int] = 3,
    steps: int = 400,
    batch_size: int | None = None,
    optimizers: Any = None,
    target: float | None = None,
    weight: Callable[[Any], float] | None = None,
    test: Any = None,
    recipe: Recipe = Recipe(),
    stop_at_target: bool = False,
    extend: bool = True,
    keep: bool = True,
) -> tuple[Training, dict[str, dict[str, nn.Module]]]:
    """Train twins as :func:`train_twins` does, and return the trained networks as well.

    The networks are ``twin -> optimizer -> network``: the first seed's at its best rate. With
    ``stop_at_target``, which needs a ``target``, a sweep ends as soon as a rate has reached the target: the
    result is the number of steps of the best rate, no network is kept, and the sweep is not extended. Without
    ``extend`` a sweep is not extended; without ``keep`` no network is kept.
    """
    _refuse(twins, steps, batch_size, target, recipe)
    chosen = seeds_of("train_twins", seeds)
    chosen_optimizers = choices("train_twins", optimizers)
    models = [twin for twin in twins.values() if isinstance(twin, nn.Module)]
    notes: dict[str, None] = {}
    makers = {name: maker_of(name, twin, notes) for name, twin in twins.items()}
    with untouched(*models, operation="train_twins"):
        first = next(iter(makers.values()))(chosen[0])
        stream, objective = _stream(first, data, loss, batch_size, weight, notes)
        tested = None if test is None else read(first, test, loss, "train_twins", weight=weight)[0]
        stop_at = target if stop_at_target else None
        course = Course(stream, objective, steps, stop_at, recipe.schedule, recipe.clip_norm, recipe.autocast)
        trainees = {
            (name, choice.name): Trainee(name, make, choice, course, tested)
            for name, make in makers.items()
            for choice in chosen_optimizers.values()
        }
        plan = _plan(trainees, makers, chosen, workers() if _can_be_copied(first, stream, keep) else 1)
        with plan.threads():
            sweeps = sweep_then_seeds(
                trainees,
                chosen,
                extend=extend and not stop_at_target,
                keep=keep,
                copies=plan.copies,
                patience=plan.patience,
            )
    logs: dict[str, dict[str, Sweep]] = {name: {} for name in makers}
    for (name, optimizer), sweep in sweeps.items():
        logs[name][optimizer] = sweep
    _refuse_bad_first_loss(logs)
    if target is None:
        target = _default_target(logs)
    curves = {name: {o: sweep.curves(target) for o, sweep in by.items()} for name, by in logs.items()}
    kept = {
        name: {o: network for o, sweep in by.items() if (network := sweep.reported[0].network) is not None}
        for name, by in logs.items()
    }
    varies = "batch order only" if models else "initialisation and batch order"
    training = Training(curves, target, steps, stream.size, chosen, varies, tuple(notes), plan.copies)
    return training, kept


def _refuse(twins: Any, steps: int, batch_size: int | None, target: float | None, recipe: Recipe) -> None:
    """Refuse arguments that cannot be used, before anything runs."""
    if not isinstance(twins, Mapping) or not twins:
        raise SkipscopeError(
            "train_twins",
            "there is nothing to train",
            expected='{"with": make_a, "without": make_b}',
            got=f"{twins!r:.60}",
            cure="name each network",
        )
    require_whole("train_twins", steps=steps, batch_size=batch_size)
    require_size("train_twins", clip_norm=recipe.clip_norm)
    if target is not None and not math.isfinite(target):
        raise SkipscopeError(
            "train_twins",
            "the target is not finite",
            expected="a finite number",
            got=target,
            cure="leave target out",
        )
    if recipe.autocast not in {None, torch.bfloat16, torch.float16}:
        raise SkipscopeError(
            "train_twins",
            "torch.autocast cannot train in this dtype",
            expected="torch.bfloat16 or torch.float16",
            got=repr(recipe.autocast)[:60],
            cure="autocast=torch.bfloat16",
        )


def _stream(
    first: nn.Module,
    data: Any,
    loss: Any,
    batch_size: int | None,
    weight: Callable[[Any], float] | None,
    notes: dict[str, None],
) -> tuple[Stream, Objective]:
    """The stream of batches and the objective, checked with the first network."""
    if not any(p.requires_grad for p in first.parameters()):
        raise SkipscopeError(
            "train_twins",
            "no parameter requires a gradient: there is nothing to train",
            got=type(first).__name__,
            cure="pass the model before it is frozen or quantised",
        )
    batches, objective = read(first, data, loss, "train_twins", weight=weight)
    stream = Stream(batches, first, objective, batch_size)
    if batches.single and not stream.cut and stream.size > (batch_size or 64):
        notes.setdefault(
            f"every step took the whole batch of {stream.size}: its rows are not known to be"
            " independent samples (for smaller batches pass a DataLoader)"
        )
    with random_state_kept(0):
        if not objective(first, next(stream.batches(0))).requires_grad:
            raise no_gradient("train_twins", first)
    return stream, objective


def _plan(
    trainees: Mapping[Any, Trainee], makers: Mapping[str, Maker], seeds: Sequence[int], copies: int
) -> Plan:
    """Plan worker processes and threads by timing a step of each network."""
    course = next(iter(trainees.values())).course
    runs = sum(len(one.choice.rates) + len(seeds) for one in trainees.values()) // len(makers)
    seconds: list[StepSeconds] = []
    if course.steps * runs >= _TRIAL_STEPS * _TRIAL_SHARE:
        batch = next(course.stream.batches(0))
        seconds = [step_seconds(make(seeds[0]), course.objective, batch) for make in makers.values()]
    at_a_time = sum(1 if one.is_indivisible else len(seeds) for one in trainees.values())
    return Plan.fastest(seconds, course.steps * runs, at_a_time, copies)


def _can_be_copied(model: nn.Module, stream: Stream, keep: bool) -> bool:
    """Whether forked workers can train: CPU only, one rank, data in memory, model picklable if kept."""
    if stream.held is None or ranks_of(model) or torch.cuda.is_initialized():
        return False
    tensors = [*model.parameters(), *model.buffers(), *tensors_in(stream.held)]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return False
    try:
        return not keep or bool(pickle.dumps(model))
    except Exception:
        return False


# --- the target ---


def _refuse_bad_first_loss(logs: dict[str, dict[str, Sweep]]) -> None:
    for by in logs.values():
        for sweep in by.values():
            first = [float(log.losses[0]) for log in sweep.reported]
            if not np.isfinite(first).all():
                raise SkipscopeError(
                    "train_twins",
                    "the loss is not finite on the first batch",
                    expected="a finite loss",
                    got=first[0],
                    cure="look for NaN in the data or the weights: skipscope.gradient_flow says where",
                )


def _default_target(logs: dict[str, dict[str, Sweep]]) -> float:
    """Half of the lowest first loss of any twin; if a loss reaches zero, half-way to the lowest loss reached.

    In the second case the target is at least a hundredth below the first loss, and at least three times the
    noise of a smoothed loss, estimated from the steps of the best run.
    """
    runs = [[log.losses for sweep in by.values() for log in sweep.reported] for by in logs.values()]
    first = min(float(np.mean([losses[0] for losses in of_twin])) for of_twin in runs)
    flat = [losses for of_twin in runs for losses in of_twin]
    if all(np.nanmin(losses) > 0 for losses in flat):
        return first / 2
    best = min(flat, key=final)
    differences = np.abs(np.diff(best[np.isfinite(best)]))
    noise = 3 * float(np.median(differences)) / 0.954 / math.sqrt(10) if len(differences) else 0.0
    fall = first - min(final(best), first)
    return first - max(fall / 2, FALLEN * abs(first), noise)
