"""``compare`` without a model: deep versions of the lecture's network, on real digits.

Four networks separate the effect of shortcuts from that of the initialisation: plain, plain with He's
initialisation, with the lecture's shortcuts, and with shortcuts and branches scaled by 1/sqrt(L).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch.nn.functional as F
from torch import nn

from skipscope import reference
from skipscope._progress import say, track
from skipscope._subject import Subject, prepare
from skipscope._untouched import one_snapshot, random_state_kept
from skipscope.comparison._claims import comparison_of
from skipscope.comparison._comparison_result import Comparison, DepthResult
from skipscope.comparison._evidence import Evidence, Factory, Roles, Settings
from skipscope.comparison._stages import (
    FEWEST_STEPS,
    Clock,
    describe,
    measure_flow,
    measure_importance,
    measure_surfaces,
    seconds_a_step,
    trained_alike,
)
from skipscope.comparison.training import Training, fitting_threads, train_and_keep, workers
from skipscope.flow import GradientFlow, flow_of

DEPTHS, QUICK_DEPTHS = (8, 16, 30), (8, 30)
# Three rates per optimizer: a fourth, smaller rate was not the best at any depth.
RATES = {"SGD": (0.1, 0.03, 0.01), "Adam": (0.01, 0.003, 0.001)}
QUICK_RATES = {"SGD": (0.1, 0.01), "Adam": (0.01, 0.001)}
# Well below 2.303, the loss of guessing among ten digits.
TARGET = 0.5
ROLES = Roles("shortcuts", "plain", ("plain, He", "shortcuts, scaled"))
MEANINGS = {
    "plain": "trained without",
    "plain, He": "trained without, He initialisation",
    "shortcuts": "as built",
    "shortcuts, scaled": "as built, branches scaled by 1/sqrt(depth)",
}
DESCRIPTIONS = {
    "plain": "no shortcuts, torch's own initialisation",
    "plain, He": "no shortcuts, He's initialisation",
    "shortcuts": "the lecture's, x + layer(x)",
    "shortcuts, scaled": "x + layer(x)/sqrt(depth)",
}
_BUILD = {
    "plain": {},
    "plain, He": {"init": "he"},
    "shortcuts": {"shortcut": "identity"},
    "shortcuts, scaled": {"shortcut": "identity", "scale": "depth"},
}
DETAILS = (
    "Each hidden layer is a linear layer of width 64 and a GELU (tanh form); with shortcuts x + layer(x),"
    " scaled x + layer(x)/sqrt(depth); the head is linear. The data are the UCI optical digits (1,797 images"
    " of 8 x 8, CC BY 4.0, Alpaydin and Kaynak). "
)


def makers(depth: int) -> dict[str, Factory]:
    """Factories of the four networks at one depth; the same seed draws the same weights."""
    return {name: partial(reference.deep_mlp, depth, **options) for name, options in _BUILD.items()}


def build(depth: int, seed: int) -> dict[str, nn.Module]:
    """Build the four networks at one depth."""
    networks = {}
    for name, make in makers(depth).items():
        with random_state_kept(seed):
            networks[name] = make().train()
    return networks


def compare_lecture(settings: Settings, clock: Clock, *, quick: bool, steps: int | None = None) -> Comparison:
    """Compare the lecture's network with and without shortcuts, at several depths."""
    depths = QUICK_DEPTHS if quick else DEPTHS
    settings = replace(
        settings,
        seeds=1 if quick else 3,
        steps=steps or (70 if quick else 300),
        batch_size=64,
        grid=11 if quick else 25,
        samples=128 if quick else 256,
        optimizers=QUICK_RATES if quick else RATES,
        target=TARGET,
    )
    deepest = build(depths[-1], settings.seed)
    batch = reference.digits(settings.samples)
    plain = prepare(deepest[ROLES.without_shortcuts], batch, F.cross_entropy, "compare")
    subjects = {name: plain.other(model, owned=False) for name, model in deepest.items()}
    evidence = Evidence(
        ROLES, describe(subjects, MEANINGS, f"{depths[-1]} hidden layers of width 64", DESCRIPTIONS)
    )
    with (
        one_snapshot(*deepest.values()),
        fitting_threads(build(depths[-1], settings.seed)[ROLES.without_shortcuts], plain.loss, batch),
    ):
        _measure(evidence, subjects, depths, settings, clock)
    subject = f"The lecture's network, {depths[-1]} hidden layers deep, on 1,797 real digits"
    shallower = ", ".join(map(str, depths[:-1]))
    details = (
        DETAILS
        + f"Everything but the charts over depth is measured on {depths[-1]} hidden layers: flow, paths and"
        f" strength at initialisation, surfaces and importance after training. At {shallower} hidden layers"
        " each network is trained on one seed; that sweep ends when its first rate is at the target, or"
        " half way when no rate has brought the loss down by 1 %: there '> N' counts the steps that were"
        " run. "
    )
    return comparison_of(evidence, subject, settings, clock, details if settings.train else DETAILS)


def _measure(
    evidence: Evidence,
    deepest: dict[str, Subject],
    depths: Sequence[int],
    settings: Settings,
    clock: Clock,
) -> None:
    """Measure everything on the deepest networks, but only the fall and the training on shallower ones."""
    plain = deepest[ROLES.without_shortcuts]
    measure_flow(evidence, deepest, settings, clock)
    trainings: dict[int, Training] = {}
    trained = deepest
    if settings.train:
        with clock.stage("training"):
            trainings, kept = _train_all(depths, settings, plain, clock)
        evidence.training = trainings.get(depths[-1])
    else:
        clock.notes.append("nothing was trained: the surfaces are those of the initial weights")
    if evidence.training is not None:
        trained = {
            name: deepest[name].other(model, owned=False)
            for name, model in trained_alike(evidence.training, kept).items()
        }
    with clock.stage("other depths"):
        for depth in depths[:-1]:
            networks = build(depth, settings.seed)
            flows = {name: flow_of(plain.other(model)) for name, model in networks.items()}
            evidence.depths.append(_at_depth(depth, flows, trainings.get(depth)))
    flows = {name: evidence.flow[name] for name in deepest}
    evidence.depths.append(_at_depth(depths[-1], flows, evidence.training))
    measure_surfaces(evidence, trained, settings, clock)
    measure_importance(evidence, trained, clock)


# --- the trainings ---


def _train_all(
    depths: Sequence[int], settings: Settings, plain: Subject, clock: Clock
) -> tuple[dict[int, Training], dict[str, dict[str, nn.Module]]]:
    """Train at each depth. Returns depth -> training, and the deepest networks by name and optimizer."""
    each = seconds_a_step(plain, settings.batch_size) / depths[-1]
    chosen, settings = _affordable(depths, settings, each, clock)
    trainings: dict[int, Training] = {}
    kept: dict[str, dict[str, nn.Module]] = {}
    for depth in track(chosen, "training, depths"):
        is_deepest = depth == depths[-1]
        trainings[depth], networks = train_and_keep(
            makers(depth),
            reference.digits(),
            F.cross_entropy,
            seeds=range(settings.seed, settings.seed + (settings.seeds if is_deepest else 1)),
            steps=settings.steps,
            batch_size=settings.batch_size,
            optimizers=settings.optimizers,
            target=TARGET,
            stop_at_target=not is_deepest,
            extend=False,
            keep=is_deepest,
        )
        kept = networks if is_deepest else kept
    return trainings, kept


def _affordable(
    depths: Sequence[int], settings: Settings, each: float, clock: Clock
) -> tuple[list[int], Settings]:
    """Choose the depths, deepest first, and the number of steps that fit into the budget.

    Args:
        depths: the requested depths.
        settings: settings with the requested steps.
        each: seconds per step and layer of one network.
        clock: clock with the remaining time; what is left out becomes a note.
    """
    rates = sum(map(len, settings.optimizers.values()))
    a_step = (
        each * len(_BUILD) * depths[-1] * (rates + len(settings.optimizers) * (settings.seeds)) / workers()
    )
    # At this width the optimizer and the log take as long as the forward and backward passes.
    a_step *= 2 * clock.slowed
    seconds = a_step * settings.steps
    say(
        f"training: about {seconds:.0f} s; {len(depths)} depths, 4 networks, 2 optimizers,"
        f" {settings.seeds} seeds"
    )
    if clock.budget is None:
        return sorted(depths, reverse=True), settings
    left = max(0.0, 0.6 * (clock.budget - clock.spent))
    steps = min(settings.steps, int(left / a_step))
    if steps < min(FEWEST_STEPS, settings.steps):
        clock.notes.append(
            f"training was left out: the budget of {clock.budget:.0f} s has room for {steps} steps only"
        )
        return [], settings
    chosen = [depths[-1]]
    for depth in depths[:-1]:
        seconds += a_step * settings.steps * 0.4 * depth / depths[-1]
        if seconds > left:
            clock.notes.append(
                f"training at {depth} hidden layers was left out to stay within {clock.budget:.0f} s"
            )
        else:
            chosen.append(depth)
    if steps < settings.steps:
        clock.notes.append(
            f"training was cut from {settings.steps} to {steps} steps to stay within {clock.budget:.0f} s"
        )
    return chosen, replace(settings, steps=steps)


def _at_depth(depth: int, flows: dict[str, GradientFlow], training: Training | None) -> DepthResult:
    """Collect the results at one depth. A network learns if the loss of every seed reaches the target."""
    curves = training.curves if training is not None else {}
    return DepthResult(
        depth,
        {name: flow.verdict.fall_decades or 0.0 for name, flow in flows.items()},
        {name: flow.verdict.state for name, flow in flows.items()},
        {name: {o: training.steps_text(name, o) for o in by} for name, by in curves.items()},  # type: ignore[union-attr]
        {name: {o: None not in c.steps_to_target for o, c in by.items()} for name, by in curves.items()},
    )
