"""What a person waits for: whole commands, first calls of a process, and what is repeated in loops.

``python -m benchmarks waiting`` measures everything (about eight minutes on a quiet machine of two cores). Commands
are given in seconds over a bare ``import torch``, measured in turns with it; everything else as a ratio to the plain
PyTorch loop that it stands for.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import skipscope as ss
from benchmarks.monitor import Training
from skipscope import reference

COMMANDS = {"find resnet20": 1.0, "flow resnet20": 1.3, "paths gpt": 1.5, "book": 2.5}
JOBS = {"compare --quick": 15.0, "compare": 55.0}
FIRST = {
    "find_shortcuts": ("ss.find_shortcuts(model, inputs)", 0.1),
    "gradient_flow": ("ss.gradient_flow(model, (inputs, target), F.cross_entropy)", 0.3),
}
SETUP = (
    "import time, torch, torch.nn.functional as F, skipscope as ss; from skipscope import reference\n"
    "model, (inputs, target) = reference.deep_mlp(12, shortcut='identity'), reference.digits(64)\n"
)


def seconds_of(*arguments: str) -> float:
    """Seconds of one new Python process, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], cwd=folder, check=True, capture_output=True)
        return time.perf_counter() - start


def commands() -> list[dict]:
    """Seconds of each command over ``import torch``, five times in turns; the main jobs once."""
    over: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(5):
        bare = seconds_of("-c", "import torch")
        for name in COMMANDS:
            over[name].append(seconds_of("-m", "skipscope", *name.split()) - bare)
    figures = [
        figure(f"skipscope {name}, over import torch", statistics.median(over[name]), "s", aim)
        for name, aim in COMMANDS.items()
    ]
    for name, aim in JOBS.items():
        figures.append(figure(f"skipscope {name}", seconds_of("-m", "skipscope", *name.split()), "s", aim))
    return figures


def first_calls() -> list[dict]:
    """Seconds of the first call of a process, torch and the room it is in imported before."""
    found = []
    for name, (call, aim) in FIRST.items():
        code = f"{SETUP}ss.{name}\nstart = time.perf_counter()\n{call}\nprint(time.perf_counter() - start)"
        seconds = [
            float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
            for _ in range(5)
        ]
        found.append(figure(f"first {name} of a process", statistics.median(seconds), "s", aim))
    return found


def ratio(measured: Callable[[], Any], plain: Callable[[], Any], rounds: int) -> float:
    """Median of the quotients of CPU seconds, in turns; those of copies of this process count too."""
    measured(), plain()
    quotients = []
    for _ in range(rounds):
        start = cpu_seconds()
        plain()
        middle = cpu_seconds()
        measured()
        quotients.append((cpu_seconds() - middle) / (middle - start))
    return statistics.median(quotients)


def cpu_seconds() -> float:
    """Of this process, to the microsecond, and of its copies that have ended."""
    both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


def networks() -> dict[str, tuple[torch.nn.Module, Any]]:
    """Each with its batch."""
    torch.manual_seed(0)
    return {
        "MLP 30 x 64": (reference.deep_mlp(30, shortcut="identity", scale="depth"), reference.digits(64)),
        "MLP 32 x 64": (reference.deep_mlp(32, shortcut="identity", scale="depth"), reference.digits(64)),
        "GPT 12 x 256": (reference.gpt(12, 256, 8), reference.english(4)),
        "GPT 12 x 64": (reference.gpt(12), reference.english(4)),
        "ResNet-20": (reference.resnet20(), reference.digits(32)),
        "ResNet-56": (reference.resnet56(), reference.digits(32)),
        "ResNet-110": (reference.resnet110(), reference.digits(32)),
    }


def measurements() -> list[dict]:
    """``gradient_flow`` over one forward and backward pass; ``importance`` over 2 L + 1 of them."""
    found, every = [], networks()

    def passes(model: torch.nn.Module, batch: Any, count: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(count):
                F.cross_entropy(model(batch[0]), batch[1]).backward()
                model.zero_grad()

        return run

    for name, aim in {"MLP 30 x 64": 2.5, "GPT 12 x 256": 1.4, "ResNet-110": 1.2}.items():
        model, batch = every[name]
        known = ss.find_shortcuts(model, batch[0])
        measured = partial(ss.gradient_flow, model, batch, F.cross_entropy, found=known)
        value = ratio(measured, passes(model, batch, 1), 9)
        found.append(figure(f"gradient_flow, {name}, of one forward + backward", value, "x", aim))
    for name in ("MLP 32 x 64", "GPT 12 x 64", "ResNet-56"):
        model, batch = every[name]
        known = ss.find_shortcuts(model, batch[0])
        start = time.process_time()
        ss.importance(model, batch, F.cross_entropy, found=known)
        middle = time.process_time()
        passes(model, batch, 2 * len(known) + 1)()
        value = (middle - start) / (time.process_time() - middle)
        found.append(figure(f"importance, {name}, of (2 L + 1) forward + backward", value, "x", 2.0))
    return found


SEEDS, SIZE = (0, 1, 2), 16


def by_hand(make: Callable[[], torch.nn.Module], batch: Any, steps: int) -> None:
    """The loop that one writes oneself: three seeds, random batches, the loss of every step."""
    for seed in SEEDS:
        torch.manual_seed(seed)
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), 0.001)
        losses: list[float] = []
        while len(losses) < steps:
            for rows in torch.randperm(len(batch[0])).split(SIZE)[: steps - len(losses)]:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(batch[0][rows]), batch[1][rows])
                loss.backward()
                optimizer.step()
                losses.append(loss.item())


def trainings() -> list[dict]:
    """``train_twins`` over a hand-written loop of the same runs: one network, three seeds under Adam."""
    found = []
    for name, make, batch, steps, aim in [
        ("width 64", partial(reference.deep_mlp, 4, 64), reference.digits(), 400, 1.0),
        ("width 256", partial(reference.deep_mlp, 4, 256), reference.digits(), 400, 1.1),
        ("width 512", partial(reference.deep_mlp, 4, 512), reference.digits(), 100, 1.1),
        ("4-layer GPT", reference.gpt, reference.english(64), 20, 1.1),
    ]:
        options: dict[str, Any] = {
            "seeds": SEEDS, "steps": steps, "batch_size": SIZE, "optimizers": {"Adam": 0.001}, "target": 0.0
        }  # fmt: skip
        twins = partial(ss.train_twins, {"one": make}, batch, F.cross_entropy, **options)
        value = ratio(twins, partial(by_hand, make, batch, steps), 3)
        found.append(figure(f"train_twins, {name}, of a hand-written loop", value, "x", aim))
    return found


def watched() -> list[dict]:
    """``watch(every=1)`` of the bare step in turns, plain and with the flow at every step; opening it is not counted."""
    found, every = [], networks()
    aims = {"ResNet-20": (1.05, 1.15), "ResNet-110": (1.02, 1.10), "MLP 30 x 64": (1.08, 1.20)}
    options: dict[str, dict[str, Any]] = {"": {}, ", with the flow": {"flow_every": 1}}

    def seconds(training: Training, steps: int) -> float:
        training.step()
        start = time.process_time()
        for _ in range(steps):
            training.step()
        return time.process_time() - start

    for name, goals in aims.items():
        model, batch = every[name]
        training = Training(lambda: model, batch)  # noqa: B023
        steps = 4 if name == "ResNet-110" else 20
        for (words, option), goal in zip(options.items(), goals):
            first, later = [], []
            for _ in range(7):
                bare = seconds(training, steps)
                with ss.watch(training.model, training.optimizer, every=1, **option):
                    first.append(seconds(training, steps) / bare)
                    seconds(training, 20 - steps)
                    later.append(seconds(training, steps) / bare)
            said = f"watch(every=1){words}, {name}"
            # The verdict is given after steps 1, 2, 4, 8 and so on.
            found.append(figure(f"{said}, of the bare step", statistics.median(later), "x", goal))
            found.append(figure(f"{said}, its first {steps} steps", statistics.median(first), "x", goal))
    return found


def figure(name: str, value: float, unit: str, aim: float) -> dict:
    """One row of the table."""
    return {"name": name, "value": float(value), "unit": unit, "aim": f"at most {aim:g}", "detail": {}}


def figures() -> list[dict]:
    """The whole table."""
    return [*commands(), *first_calls(), *measurements(), *trainings(), *watched()]
