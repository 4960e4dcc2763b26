"""``prescribe``: remedies applied to copies of a network and measured on the user's data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from skipscope._data import Batch
from skipscope._errors import SkipscopeError
from skipscope._model_calls import error_text
from skipscope._numbers import short
from skipscope._option_words import VerdictCause
from skipscope._progress import track
from skipscope._public_call import public_call
from skipscope._subject import Subject, prepare
from skipscope._torch_private import as_written
from skipscope._untouched import private_copy, random_state_kept
from skipscope.flow._flow_measures import Prescription, Remedy
from skipscope.flow._flow_result import Verdict
from skipscope.flow._gradient_flow import flow_of
from skipscope.flow.advice._remedies import Candidate, candidates, frozen, only_the_last_is_trained
from skipscope.flow.advice._residual_blocks import is_normed
from skipscope.flow.verdict._verdict_words import HEALTHY

# Optimizers and rates with which each copy is trained for a few steps; the best result counts.
RATES: tuple[tuple[str, type[torch.optim.Optimizer], float], ...] = (
    ("SGD 0.01", torch.optim.SGD, 0.01),
    ("SGD 0.1", torch.optim.SGD, 0.1),
    ("Adam 0.001", torch.optim.Adam, 0.001),
)
# Causes in the data, the loss or the graph, which no change of the network mends.
BROKEN: set[VerdictCause] = {
    "data",
    "weights",
    "loss",
    "missing path",
    "softmax",
    "sqrt",
    "div",
    "log",
    "norm",
}
# A copy with more than this share of its loss left has learnt nothing.
STUCK = 0.99
# A fall below this many decades is not the cause of slow learning.
TOLD = 1.0


@public_call("prescribe")
def prescribe(
    model: nn.Module,
    data: Any,
    loss: Any = None,
    *,
    steps: int = 20,
    seed: int = 0,
    weight: Callable[[Batch], float] | None = None,
) -> Prescription:
    """Try remedies on copies of a network, and rank them by their effect.

    Remedies are initialisations, norms, kinds of shortcuts and scaled branches. For each, the flow and the
    loss are measured before and after, and the loss after the same few training steps at the best of three
    rates. Frozen layers keep their weights. If the data, the loss or the graph is broken, nothing is tried,
    and ``advice`` says what to fix. Local.

    Args:
        model: any eager module, restored afterwards.
        data: a batch ``(inputs, target)``, a Mapping, or a re-iterable of batches.
        loss: ``loss(output, target)``; not needed if the output carries ``.loss``.
        steps: training steps for each copy and rate; 0 for none.
        seed: seed of initialisations and of the random numbers drawn inside.
        weight: batch -> its weight in the mean over batches.

    Raises:
        SkipscopeError: data, loss or model cannot be read, the loss has no gradient, or the model cannot be
            copied.

    Example:
        >>> import skipscope as ss
        >>> blocks = [nn.Sequential(nn.Linear(16, 16), nn.Sigmoid()) for _ in range(10)]
        >>> deep = nn.Sequential(*blocks, nn.Linear(16, 4))
        >>> batch = torch.randn(32, 16), torch.randint(0, 4, (32,))
        >>> advice = ss.prescribe(deep, batch, nn.functional.cross_entropy, steps=5)
        >>> advice.before.state, advice.remedies[0].state
        ('vanishing', 'healthy')
    """
    subject = prepare(model, data, loss, "prescribe", weight=weight)
    model = subject.model
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SkipscopeError(
            "prescribe",
            "no parameter requires a gradient: there is nothing to train",
            got=type(model).__name__,
            cure="pass the model before it is frozen or quantised",
        )
    found = subject.found
    tools = _Tools(subject, steps, seed)
    before, verdict = tools.measure("as it is", "", private_copy(model, "prescribe"))
    if verdict.cause in BROKEN:
        return Prescription(
            before, (), (), f"No remedy for the network can help. {verdict.finding} {verdict.advice}"
        )
    if verdict.cause == "batch norm":
        # With stale running statistics nothing is known of the network itself, which may be healthy.
        return Prescription(
            before, (), (), f"{verdict.finding} {verdict.advice} Then run prescribe again.", _why(before)
        )
    if only_the_last_is_trained(model):
        advice = (
            "Only the last layer is trained. The others are frozen and left alone, so nothing was tried. To"
            " let them learn, too, call requires_grad_(True) on them and ask again"
        )
        return Prescription(before, (), (), advice, _why(before))
    tried, refused = [], []
    listed = candidates(len(found), is_normed(model), verdict.cause)
    for one in track(listed, "remedies"):
        try:
            tried.append(tools.attempt(one))
        except Exception as error:  # whatever the user's own code says to a changed copy
            problem = error.problem if isinstance(error, SkipscopeError) else error_text(error)
            refused.append(f"Not tried: {one.name}: {problem}.")
    tried.sort(key=_rank)
    advice, named = _advice(before, tried)
    by_hand = [tools.by_hand(one) for remedy in named for one in listed if one.name == remedy.name]
    names = {remedy.name for remedy in tried}
    means = [f"{one.name}: {one.means}" for one in listed if one.means and one.name in names]
    notes = _notes(before, by_hand, means, tried, steps, frozen(model))
    return Prescription(before, tuple(tried), tuple(refused), advice, notes)


class _Tools:
    """Measurement and training of copies, with the same data, steps and seed."""

    def __init__(self, subject: Subject, steps: int, seed: int):
        self.subject, self.steps, self.seed = subject, steps, seed

    def attempt(self, one: Candidate) -> Remedy:
        with random_state_kept(self.seed), as_written():
            changed = one.apply(private_copy(self.subject.model, "prescribe"), self.subject.inputs)
        return self.measure(one.name, one.code, changed)[0]

    def by_hand(self, one: Candidate) -> str:
        """Describe how and where to apply a remedy by hand."""
        places = ""
        if one.places is not None:
            with random_state_kept(self.seed), as_written():
                found = one.places(private_copy(self.subject.model, "prescribe"), self.subject.inputs)
                places = f" By the layers' names in the model: {found}"
        return f"To do it by hand: {one.name}: {one.code}.{places}"

    def measure(self, name: str, code: str, model: nn.Module) -> tuple[Remedy, Verdict]:
        flow = flow_of(self.subject.other(private_copy(model, "prescribe")), self.seed)
        reached, rate = self.train(model) if self.steps else (None, "")
        verdict = flow.verdict
        state, fall = verdict.state, verdict.fall_decades
        return Remedy(name, code, state, fall, flow.loss, reached, rate, verdict.reason), verdict

    def train(self, model: nn.Module) -> tuple[float, str]:
        """Train copies at each rate. Returns the lowest loss after the steps, and its rate."""
        best = math.inf, ""
        for name, optimizer, rate in RATES:
            with random_state_kept(self.seed), torch.enable_grad(), as_written():
                value = self.steps_of(private_copy(model, "prescribe"), optimizer, rate)
            best = min(best, (value, name))
        return best

    def steps_of(self, model: nn.Module, optimizer: type[torch.optim.Optimizer], rate: float) -> float:
        parameters = [p for p in model.parameters() if p.requires_grad]
        for module in model.modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                module.sparse = False  # Adam takes no sparse gradients; dense ones are the same numbers
        stepper = optimizer(parameters, lr=rate)  # type: ignore[call-arg]
        done = 0
        while done < self.steps:
            for batch in self.subject.data:
                stepper.zero_grad()
                self.subject.loss(model, batch).backward()
                stepper.step()
                done += 1
                if done == self.steps:
                    break
        value = float(
            self.subject.loss(model, self.subject.data.first()).detach()
        )  # it may differentiate inside
        return value if math.isfinite(value) else math.inf


def _rank(remedy: Remedy) -> tuple[bool, float, float]:
    """Sort key: a healthy flow first, then the loss reached, then the size of the fall."""
    fall = math.inf if remedy.fall_decades is None else abs(remedy.fall_decades)
    reached = remedy.reached if remedy.reached is not None else fall
    return remedy.state != "healthy", reached, fall


def _advice(before: Remedy, tried: list[Remedy]) -> tuple[str, list[Remedy]]:
    """The answer in a sentence or two, and the remedies that it names."""
    best = tried[0] if tried else None
    lowest = min((r for r in tried if r.reached is not None), key=lambda r: r.reached, default=None)  # type: ignore[arg-type, return-value]
    if tried and all(r.reached is not None and r.reached > STUCK * r.loss for r in (before, *tried)):
        return (
            "Nothing that was tried brings the loss down in so few steps: all end where they began, at about"
            f" {short(before.loss)}. Check the targets and the loss, then try more steps (steps=)"
        ), []
    if before.state == "healthy":
        further = _lower(lowest, before)
        return f"The flow is healthy as it is. {HEALTHY[:-1]}" + further, [
            lowest
        ] if further and lowest else []
    if best is None or best.state != "healthy":
        further = _lower(lowest, before)
        advice = f"The flow is {before.state}, and nothing that was tried makes it healthy"
        return advice + further, [lowest] if further and lowest else []
    change = f"flow {before.state} -> {best.state}"
    if before.fall_decades is not None and abs(before.fall_decades) >= TOLD:
        change = f"fall {short(before.fall_decades)} -> {short(best.fall_decades)} decades"
    if best.reached is not None:
        change += f", loss after a few steps {short(before.reached)} -> {short(best.reached)}"
    advice = f"The flow is {before.state}; best of what was tried: {best.name} ({change})"
    further = _lower(lowest, best)
    return advice + further, [best, *([lowest] if further and lowest else [])]


def _lower(lowest: Remedy | None, than: Remedy) -> str:
    """A second sentence if another remedy lowers the loss much faster, otherwise ''."""
    if lowest is None or lowest is than or than.reached is None or lowest.reached is None:
        return ""
    further = than.loss - lowest.reached > 2 * (than.loss - than.reached)
    if not (further or lowest.reached < 0.5 * than.reached):
        return ""
    still = "" if lowest.state == "healthy" else f", though its flow is {lowest.state}"
    return (
        f". Lowest loss after a few steps: {lowest.name} ({short(than.reached)} ->"
        f" {short(lowest.reached)}{still})"
    )


def _why(before: Remedy) -> tuple[str, ...]:
    """The reason for the state of the unedited network, if it is not healthy."""
    return (f"As it is: {before.reason}.",) if before.state != "healthy" else ()


def _notes(
    before: Remedy, by_hand: list[str], means: list[str], tried: list[Remedy], steps: int, frozen_maps: int
) -> tuple[str, ...]:
    """Why the flow is as it is, how to do what came out best, what the names say, how the steps were made."""
    notes = [*_why(before), *by_hand]
    if means:
        notes.append(f"What the names say: {'. '.join(means)}. x goes in, F is the layer, y comes out.")
    if frozen_maps:
        notes.append(
            f"{frozen_maps} frozen layer{'s keep their' if frozen_maps > 1 else ' keeps its'} weights."
        )
    if any("init" in one.code for one in tried):
        notes.append("An initialisation draws new weights: what trained layers have learnt is lost.")
    if any(one.name.endswith("shortcuts") or "blocks" in one.name for one in tried):
        notes.append(
            "A shortcut changes what the layers after it take: trained ones must be trained further."
        )
    rates = ", ".join(name for name, _, _ in RATES)
    notes += [f"Each copy was trained for {steps} steps at {rates}; its lowest loss counts."] if steps else []
    return tuple(notes)
