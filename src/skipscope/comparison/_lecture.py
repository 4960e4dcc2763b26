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
from skipscope.flow import GradientFlow, flow_of

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
        _measure(evidence, subjects, depths, settings, clock)
    subject = f"The lecture's network, {depths[-1]} hidden layers deep, on 1,797 real digits"
    shallower = ", ".join(map(str, depths[:-1]))
    details = DETAILS + (
        f"Everything but the charts over depth is measured on {depths[-1]} hidden layers: flow, paths and strength at "
        f"initialisation, surfaces and importance after training. At {shallower} hidden layers each network is trained on "
        "one seed; that sweep ends when its first rate is at the target, or half way when no rate has brought the loss "
        "down by 1 %: there '> N' counts the steps that were run. "
    )
    return evidence.finish(subject, settings, clock, details if settings.train else DETAILS)


def _measure(
    evidence: Evidence,
    deepest: dict[str, Subject],
    depths: tuple[int, ...],
    settings: Settings,
    clock: Clock,
) -> None:
    """Measure everything on the deepest networks, and the fall and the training also on shallower ones."""
    data, subject = reference.digits(), deepest[ROLES.lacking]
    measure_flow(evidence, deepest, clock)
    trained = deepest
    with clock.stage("other depths"):
        evidence.ladder = [_rung(depth, subject, data, settings) for depth in depths[:-1]]
    if settings.train:
        say(f"{depths[-1]} hidden layers")
        with clock.stage("training"):
            evidence.training, kept = _train(depths[-1], data, settings, settings.seeds)
        trained = {
            name: deepest[name].other(model, owned=False)
            for name, model in trained_alike(evidence.training, kept).items()
        }
    else:
        clock.notes.append("nothing was trained: the surfaces are those of the initial weights")
    flows = {name: evidence.flow[name] for name in deepest}
    evidence.ladder.append(_rung_of(depths[-1], flows, evidence.training))
    measure_surfaces(evidence, trained, settings, clock)
    measure_importance(evidence, trained, clock)


def _estimate(depths: tuple[int, ...], settings: Settings) -> str:
    if not settings.train:
        return "without training: about 15 s"
    each = (
        seconds_a_step(makers(depths[-1]), reference.digits(256), F.cross_entropy, settings, None)
        / depths[-1]
    )
    # Four rates at once cost about twice as much as one.
    sweeps = 2 * len(settings.optimizers)
    # The shallower networks stop early; the deepest have a sweep and the seeds.
    layers = 0.5 * sum(depths[:-1]) + 2 * depths[-1]
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
    training = _train(depth, data, settings, 1, stop_at_target=True)[0] if settings.train else None
    return _rung_of(depth, flows, training)


def _rung_of(depth: int, flows: dict[str, GradientFlow], training: Training | None) -> Rung:
    """What one depth shows; a network learns where every seed's loss reaches the target under that optimizer."""
    curves = training.curves if training is not None else {}
    return Rung(
        depth,
        {name: flow.verdict.fall_decades or 0.0 for name, flow in flows.items()},
        {name: flow.verdict.state for name, flow in flows.items()},
        {name: {o: training.steps_text(name, o) for o in by} for name, by in curves.items()},  # type: ignore[union-attr]
        {name: {o: None not in c.steps_to_target for o, c in by.items()} for name, by in curves.items()},
    )
