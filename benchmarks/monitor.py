"""What the monitor costs on a CPU, beside the bare step, one read of the gradients, and ``wandb.watch``.

Twins with the same weights take steps in turns, one bare and the others watched, so that a machine that slows down
slows all of them. ``wandb`` is compared where it is installed (offline).
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import skipscope as ss
from skipscope import reference


class Training:
    """A model, an optimizer, a batch, and one step."""

    def __init__(self, make: Callable[[], nn.Module], batch: tuple[Tensor, Tensor]):
        torch.manual_seed(0)
        self.model, self.batch = make(), batch
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def step(self) -> None:
        """Forward, backward, update."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.batch[0]), self.batch[1]).backward()
        self.optimizer.step()


def networks() -> dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, Tensor]]]:
    """The two of the issue, with a batch each."""
    tokens = torch.randint(0, 1024, (2, 4, 64), generator=torch.Generator().manual_seed(0))
    return {
        "GPT 9.8 M, 148 tensors, 4 x 64 tokens": (
            lambda: reference.gpt(12, 256, 8, vocab=1024, context=64), (tokens[0], tokens[1])
        ),
        "ResNet-56, digits, batch 64": (reference.resnet56, reference.digits(64)),
    }  # fmt: skip


def in_turns(
    steps: dict[str, Callable[[], None]], rounds: int, each: int
) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) seconds a step of each kind, ``rounds`` times, the order turned round every time."""
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in steps}
    for i in range(rounds):
        for kind in list(steps)[:: 1 if i % 2 else -1]:
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(each):
                steps[kind]()
            times[kind].append(((time.perf_counter() - wall) / each, (time.process_time() - cpu) / each))
    return times


def over(times: dict[str, list[tuple[float, float]]], kind: str, clock: int = 0) -> float:
    """The median over rounds of what a watched step takes more than the bare step beside it, in bare steps."""
    return statistics.median(w[clock] / b[clock] for w, b in zip(times[kind], times["bare"])) - 1


def seconds(what: Callable[[], Any], before: Callable[[], Any], rounds: int = 15) -> float:
    """The median time of one call, each after ``before`` (a step, which leaves the caches as training does)."""
    times = []
    for _ in range(rounds):
        before()
        start = time.perf_counter()
        what()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@contextlib.contextmanager
def wandb_watching(training: Training):
    """``wandb.watch(log="gradients", log_freq=1)`` in an offline run; yields the step with its ``run.log``."""
    import wandb

    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("WANDB_SILENT", "true")
        with wandb.init(project="skipscope-benchmark", mode="offline", dir=folder) as run:
            run.watch(training.model, log="gradients", log_freq=1)

            def step() -> None:
                training.step()
                run.log({"step": 1.0})  # without it W&B would only collect

            yield step
            run.unwatch(training.model)


def figures(rounds: int = 24) -> list[dict]:
    """Overheads as shares of the bare step; shares of the floor; memory."""
    found = []
    for name, (make, batch) in networks().items():
        with contextlib.ExitStack() as stack:
            found += _of(name, make, batch, rounds, stack)
    found.append(_memory())
    return found


def _of(name: str, make: Any, batch: Any, rounds: int, stack: contextlib.ExitStack) -> list[dict]:
    bare, first, tenth = (Training(make, batch) for _ in range(3))
    steps: dict[str, Callable[[], None]] = {"bare": bare.step, "every=1": first.step}
    monitor = stack.enter_context(ss.watch(first.model, first.optimizer))
    with contextlib.suppress(ImportError):
        other = Training(make, batch)
        steps["wandb"] = stack.enter_context(wandb_watching(other))
    for step in steps.values():
        for _ in range(3):
            step()
    times = in_turns(steps, rounds, 1)
    stack.enter_context(ss.watch(tenth.model, tenth.optimizer, every=10))
    tenth.step()
    times10 = in_turns({"bare": bare.step, "every=10": tenth.step}, max(4, rounds // 4), 10)
    step_ms = 1e3 * statistics.median(wall for wall, _ in times["bare"])
    grads = [p.grad for p in first.model.parameters()]
    read = seconds(lambda: [g.sum() for g in grads], first.step)
    judge = seconds(monitor._judge, first.step)
    hook = seconds(lambda: monitor._steppers[0]._measure(), first.step)
    every_32 = 1e3 * judge / 32 / step_ms  # rounds of single steps rarely meet it: added to their median
    detail = (
        f"bare step {step_ms:.0f} ms on {torch.get_num_threads()} threads; by CPU time {over(times, 'every=1', 1):.2%}; "
        f"hook alone {1e3 * hook:.2f} ms; one read of the gradients {1e3 * read:.2f} ms; verdict {1e3 * judge:.2f} ms every 32"
    )
    rows = [
        {"name": f"monitor every=1 over the bare step: {name}", "value": over(times, "every=1") + every_32,
         "unit": "ratio", "aim": "<= 0.04", "detail": detail},
        {"name": f"monitor every=10 over the bare step: {name}", "value": over(times10, "every=10") + every_32 / 10,
         "unit": "ratio", "aim": "<= 0.005", "detail": f"by CPU time {over(times10, 'every=10', 1):.2%}"},
        {"name": f"the hook's own time over the bare step: {name}", "value": (hook + judge / 32) * 1e3 / step_ms,
         "unit": "ratio", "aim": "<= 0.04", "detail": "timed alone, after a step: steadier on a busy machine"},
        {"name": f"the hook over one read of the gradients: {name}", "value": hook / read, "unit": "ratio",
         "aim": "the floor is 1", "detail": "the sum of every gradient, by torch"},
    ]  # fmt: skip
    if "wandb" in times:
        theirs = over(times, "wandb")
        rows.append(
            {"name": f"wandb.watch(log='gradients', log_freq=1) over the monitor: {name}",
             "value": theirs / max(over(times, "every=1") + every_32, 1e-4), "unit": "ratio", "aim": ">= 50",
             "detail": f"wandb {theirs:.0%} over the bare step"}
        )  # fmt: skip
    return rows


def _memory() -> dict:
    make, batch = next(iter(networks().values()))
    training = Training(make, batch)
    training.step()
    with ss.watch(training.model, training.optimizer):  # imports and caches, once
        training.step()
    tracemalloc.start()
    monitor = ss.watch(training.model, training.optimizer)
    for _ in range(20):
        training.step()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    history = sum(rows._data.nbytes for sets in monitor._store._gradients.values() for _, rows in sets)
    monitor.close()
    return {
        "name": "memory of the monitor besides its history", "value": (held - history) / 1e6, "unit": "MB", "aim": "< 1",
        "detail": f"Python and NumPy; no tensor is held; the history holds {history / 1e6:.2f} MB of at most 3.6",
    }  # fmt: skip


if __name__ == "__main__":
    for row in figures():
        print(row)
