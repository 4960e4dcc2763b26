"""What the monitor costs on a CPU, beside the bare step, one read of the gradients, and ``wandb.watch``.

One training takes a bare step and a watched step in turns, in either order: the same weights, the same memory, the
same caches, so that nothing but the watching differs and a machine that slows down slows both. (Twins, each with its
own weights, were tried: whichever step came after its own twin's found them in the cache, and the difference of that
was greater than what was to be measured.) ``wandb`` is compared where it is installed (offline).
"""

from __future__ import annotations

import gc
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
    step: Callable[[], None], watched: Callable[[bool], Any], rounds: int, each: int = 1
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(wall, CPU) seconds a step, bare and watched, ``rounds`` times, the order turned round every time.

    Args:
        step: one step of a training.
        watched: called with whether the coming steps are watched.
        rounds: pairs.
        each: steps timed together.
    """
    times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    gc.collect()
    gc.disable()  # as timeit does: a collection takes as long as ten hooks, and falls on either kind of step
    for i in range(rounds):
        for on in (False, True) if i % 2 else (True, False):
            watched(on)
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(each):
                step()
            times[on].append(((time.perf_counter() - wall) / each, (time.process_time() - cpu) / each))
    gc.enable()
    watched(False)
    return times[False], times[True]


def over(bare: list[tuple[float, float]], watched: list[tuple[float, float]], clock: int = 0) -> float:
    """What a watched step takes more than the bare step beside it, the median over pairs, in bare steps."""
    more = statistics.median(w[clock] - b[clock] for w, b in zip(watched, bare))
    return more / statistics.median(b[clock] for b in bare)


def switch(optimizer: torch.optim.Optimizer) -> Callable[[bool], None]:
    """Takes the optimizer's step hooks away and puts them back: a bare step is bare."""
    kept = [
        (hooks, dict(hooks)) for hooks in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    ]  # fmt: skip

    def turn(on: bool) -> None:
        for hooks, entries in kept:
            hooks.clear()
            hooks.update(entries if on else {})

    return turn


def seconds(what: Callable[[], Any], before: Callable[[], Any], rounds: int = 15) -> float:
    """The median time of one call, each after ``before`` (a step, which leaves the caches as training does)."""
    times = []
    for _ in range(rounds):
        before()
        start = time.perf_counter()
        what()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def against_wandb(training: Training, rounds: int) -> float | None:
    """What ``wandb.watch(log="gradients", log_freq=1)`` in an offline run adds to a step; None without wandb."""
    try:
        import wandb
    except ImportError:
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    with (
        tempfile.TemporaryDirectory() as folder,
        wandb.init(project="benchmark", mode="offline", dir=folder) as run,
    ):
        state = {"on": False}

        def turn(on: bool) -> None:
            if on != state["on"]:
                run.watch(training.model, log="gradients", log_freq=1) if on else run.unwatch(training.model)
                state["on"] = on

        def step() -> None:
            training.step()
            if state["on"]:
                run.log({"step": 1.0})  # without it W&B would only collect

        return over(*in_turns(step, turn, rounds))


def figures(rounds: int = 60) -> list[dict]:
    """Overheads as shares of the bare step; shares of the floor; memory."""
    found = []
    for name, (make, batch) in networks().items():
        found += _of(name, Training(make, batch), rounds)
    found.append(_memory())
    return found


def _of(name: str, training: Training, rounds: int) -> list[dict]:
    with ss.watch(training.model, training.optimizer) as monitor:
        for _ in range(3):
            training.step()
        turns = in_turns(training.step, switch(training.optimizer), rounds)
        judge = seconds(monitor._judge, training.step)
        hook = seconds(monitor._recorders[0]._measure, training.step)
        read = seconds(lambda: [p.grad.sum() for p in training.model.parameters()], training.step)
    with ss.watch(training.model, training.optimizer, every=10):
        training.step()
        tenth = in_turns(training.step, switch(training.optimizer), max(6, rounds // 4), 10)
    reading = _flow_over(training, max(10, rounds // 3))
    with ss.watch(training.model, training.optimizer, every=10**9) as sleeping:
        training.step()
        not_due = seconds(lambda: _hooks_alone(sleeping, training.optimizer), training.step)
    theirs = against_wandb(training, max(6, rounds // 4))
    step_ms = 1e3 * statistics.median(wall for wall, _ in turns[0])
    every_32 = 1e3 * judge / 32 / step_ms  # single steps rarely meet it: added to their median
    ours = over(*turns) + every_32
    detail = (
        f"bare step {step_ms:.0f} ms on {torch.get_num_threads()} threads; by CPU time {over(*turns, 1):.2%}; hook alone "
        f"{1e3 * hook:.2f} ms; one read of the gradients {1e3 * read:.2f} ms; verdict {1e3 * judge:.2f} ms every 32"
    )
    rows = [
        {"name": f"monitor every=1 over the bare step: {name}", "value": ours, "unit": "ratio", "aim": "<= 0.04",
         "detail": detail},
        {"name": f"monitor every=1 with flow_every=100 over the bare step: {name}", "value": ours + reading / 100,
         "unit": "ratio", "aim": "<= 0.04",
         "detail": f"a step whose flow is read takes {reading:.0%} of a bare step more than one that is not"},
        {"name": f"monitor every=10 over the bare step: {name}", "value": over(*tenth) + every_32 / 10,
         "unit": "ratio", "aim": "<= 0.005", "detail": f"by CPU time {over(*tenth, 1):.2%}"},
        {"name": f"the same by its parts: {name}", "value": ours / 10 + 0.9 * not_due * 1e3 / step_ms, "unit": "ratio",
         "aim": "<= 0.005", "detail": f"a tenth of every=1, and {1e6 * not_due:.0f} us at a step that is not recorded: "
                                      "ten steps at a time differ by more than this from one time to the next"},
        {"name": f"the hook's own time over the bare step: {name}", "value": (hook + judge / 32) * 1e3 / step_ms,
         "unit": "ratio", "aim": "<= 0.04", "detail": "timed alone, after a step: steadier on a busy machine"},
        {"name": f"the hook over one read of the gradients: {name}", "value": hook / read, "unit": "ratio",
         "aim": "the floor is 1", "detail": "the sum of every gradient, by torch"},
    ]  # fmt: skip
    if theirs is not None:
        rows.append(
            {"name": f"wandb.watch(log='gradients', log_freq=1) over the monitor: {name}",
             "value": theirs / max(ours, 1e-4), "unit": "ratio", "aim": ">= 50",
             "detail": f"wandb {theirs:.0%} over the bare step; against the hook's own time "
                       f"{theirs / ((hook + judge / 32) * 1e3 / step_ms):.0f}"}
        )  # fmt: skip
    return rows


def _flow_over(training: Training, rounds: int) -> float:
    """What reading the flow adds to a recorded step, in bare steps; finding the boundaries, once a run, apart."""
    with ss.watch(training.model, training.optimizer, flow_every=1) as monitor:
        reader = monitor._flow
        for _ in range(2):
            training.step()

        def turn(on: bool) -> None:
            if on:
                reader.begin()
            else:
                reader._let_go()

        def step() -> None:
            reading = reader._reading
            training.step()
            if not reading:
                reader._let_go()  # the reader would begin with the next step

        return over(*in_turns(step, turn, rounds))


def _hooks_alone(monitor: Any, optimizer: torch.optim.Optimizer) -> None:
    """What the monitor does at an optimizer's step, without the step."""
    for recorder in monitor._recorders:
        recorder._before(optimizer, (optimizer,), {})
        recorder._after()


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
