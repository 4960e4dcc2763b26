"""The main job without a model: the lecture's network, made deep, on real digits, at several depths.

Four networks, so that no one can say "bad initialisation": plain, plain with He's initialisation, with the lecture's
shortcuts, and with shortcuts whose branches are scaled by 1/sqrt(L).
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import nn

from skipscope import reference
from skipscope._progress import say
from skipscope._subject import Subject, prepare
from skipscope._untouched import one_snapshot, random_state_kept
from skipscope.comparison._compare import (
    Evidence,
    Factory,
    Roles,
    Settings,
    describe,
    measure_flow,
    measure_importance,
    measure_surfaces,
    seconds_a_step,
    trained_alike,
)
from skipscope.comparison._measure import Clock
from skipscope.comparison._results import Comparison, Rung, Training
from skipscope.comparison._threads import fitting_threads
from skipscope.comparison._train import train_and_keep
from skipscope.flow import flow_of

DEPTHS = (8, 12, 16, 30)
TARGET = 0.5  # well below 2.303, the loss of guessing among ten digits
ROLES = Roles("shortcuts", "plain", ("plain, He", "shortcuts, scaled"))
MEANINGS = {
    "plain": "trained without",
    "plain, He": "trained without, He initialisation",
    "shortcuts": "as built",
    "shortcuts, scaled": "as built, branches scaled by 1/sqrt(depth)",
}
_BUILD = {
    "plain": {},
    "plain, He": {"init": "he"},
    "shortcuts": {"shortcut": "identity"},
    "shortcuts, scaled": {"shortcut": "identity", "scale": "depth"},
}
DETAILS = (
    "Each hidden layer is a linear layer of width 64 and a GELU (tanh form); with shortcuts x + layer(x), scaled "
    "x + layer(x)/sqrt(depth); the head is linear. The data are the UCI optical digits (1,797 images of 8 x 8, CC BY "
    "4.0, Alpaydin and Kaynak). "
)


def makers(depth: int) -> dict[str, Factory]:
    """How to build each of the four networks at one depth; the same seed draws the same weights."""
    return {name: partial(reference.deep_mlp, depth, **options) for name, options in _BUILD.items()}


def build(depth: int, seed: int) -> dict[str, nn.Module]:
    """The four networks at one depth."""
    networks = {}
    for name, make in makers(depth).items():
        with random_state_kept(seed):
            networks[name] = make().train()
    return networks


def compare_lecture(settings: Settings, clock: Clock, *, quick: bool, steps: int | None = None) -> Comparison:
    """The main job on the lecture's network."""
    depths = (8, 30) if quick else DEPTHS
    steps = steps or (120 if quick else 400)
    settings = Settings(
        seeds=2 if quick else 3, steps=steps, batch_size=64, grid=15 if quick else 31, samples=256,
        train=settings.train, target=TARGET, seed=settings.seed,
    )  # fmt: skip
    deepest = build(depths[-1], settings.seed)
    batch = reference.digits(settings.samples)
    plain = prepare(deepest[ROLES.lacking], batch, F.cross_entropy, "compare")
    subjects = {name: plain.other(model, owned=False) for name, model in deepest.items()}
    evidence = Evidence(ROLES, describe(subjects, MEANINGS, f"{depths[-1]} hidden layers of width 64"))
    with (
        one_snapshot(*deepest.values()),
        fitting_threads(build(depths[-1], settings.seed)[ROLES.lacking], plain.loss, batch),
    ):
        say(_estimate(depths, settings))
        rung = _measure(evidence, subjects, depths, settings, clock)
    subject = f"The lecture's network, {depths[-1]} hidden layers deep, on 1,797 real digits"
    details = DETAILS + (
        f"Flow, paths and strength are those of {depths[-1]} hidden layers at initialisation; curves, surfaces and "
        f"importance those of {rung} hidden layers, the deepest of {', '.join(map(str, depths))} where both the plain "
        "network and the one with shortcuts learn. At the other depths a sweep of one seed ends when its first rate is at the "
        "target, or half way when no rate has brought the loss down by 1 %: there '> N' counts the steps that were run. "
    )
    return evidence.finish(subject, settings, clock, details if settings.train else DETAILS)


def _measure(
    evidence: Evidence,
    deepest: dict[str, Subject],
    depths: tuple[int, ...],
    settings: Settings,
    clock: Clock,
) -> int:
    """Everything that is measured; returns the depth that was trained in full."""
    data = reference.digits()
    measure_flow(evidence, deepest, clock)
    with clock.stage("ladder"):
        evidence.ladder = [_rung(depth, deepest[ROLES.lacking], data, settings) for depth in depths]
    trained, rung = deepest, depths[-1]
    if settings.train:
        rung = deepest_where_both_learn(evidence.ladder)
        with clock.stage("training"):
            evidence.training, kept = _train(rung, data, settings, settings.seeds)
        trained = {
            name: deepest[name].other(model, owned=False)
            for name, model in trained_alike(evidence.training, kept).items()
        }
    else:
        clock.notes.append("nothing was trained: the surfaces are those of the initial weights")
    measure_surfaces(evidence, trained, settings, clock)
    measure_importance(evidence, trained, clock)
    return rung


def _estimate(depths: tuple[int, ...], settings: Settings) -> str:
    if not settings.train:
        return "without training: about 15 s"
    each = (
        seconds_a_step(makers(depths[-1]), reference.digits(256), F.cross_entropy, settings, None)
        / depths[-1]
    )
    sweeps = 2 * len(settings.optimizers)  # four rates at once cost about twice as much as one
    layers = (
        0.5 * sum(depths) + 2 * depths[len(depths) // 3]
    )  # the ladder, which stops early; a sweep and the seeds of one rung
    seconds = 20 + each * settings.steps * 4 * sweeps * layers
    return f"about {seconds:.0f} s: {len(depths)} depths, 4 networks, 2 optimizers, {settings.seeds} seeds"


def _train(depth: int, data, settings: Settings, seeds: int, *, stop_at_target: bool = False):
    return train_and_keep(
        makers(depth), data, F.cross_entropy, seeds=range(settings.seed, settings.seed + seeds),
        steps=settings.steps, batch_size=settings.batch_size, optimizers=settings.optimizers, target=TARGET,
        stop_at_target=stop_at_target, extend=False,
    )  # fmt: skip


def _rung(depth: int, subject: Subject, data, settings: Settings) -> Rung:
    say(f"{depth} hidden layers")
    flows = {name: flow_of(subject.other(model)) for name, model in build(depth, settings.seed).items()}
    fall = {name: flow.verdict.fall_decades or 0.0 for name, flow in flows.items()}
    state = {name: flow.verdict.state for name, flow in flows.items()}
    if not settings.train:
        return Rung(depth, fall, state)
    training: Training = _train(depth, data, settings, 1, stop_at_target=True)[0]
    steps = {name: {o: training.steps_text(name, o) for o in by} for name, by in training.curves.items()}
    learns = {
        name: {o: c.steps_to_target[0] is not None for o, c in by.items()}
        for name, by in training.curves.items()
    }
    return Rung(depth, fall, state, steps, learns)


def deepest_where_both_learn(ladder: list[Rung]) -> int:
    """The deepest rung where plain and shortcuts both learn under some optimizer; else the shallowest."""
    both = [
        rung.depth
        for rung in ladder
        if any(rung.learns[ROLES.having].values()) and any(rung.learns[ROLES.lacking].values())
    ]
    return max(both, default=ladder[0].depth)
