"""The user's model and process: as found after a return, an error, Ctrl-C, other threads; and nothing kept alive."""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import skipscope as ss
import test_untouched as zoo_check
from skipscope import _public_call, _untouched
from skipscope.testing import check_shortcut
from trust._hazard import Hazard, TimeIsUp, replaced
from zoo import ZOO

entropy = nn.functional.cross_entropy
ANIMALS = [name for name, animal in ZOO.items() if not animal.slow]


# --- as found ---


def _pairs(count: int) -> Iterator[tuple[str, str]]:
    pairs = [(function, name) for function in zoo_check.CALLS for name in ANIMALS]
    random.Random(0).shuffle(pairs)
    # Those that a forward pass changes come first: a fault shows within a few tries.
    pairs.sort(key=lambda pair: pair[1] not in {"batch_norm_in_training_mode", "keeps_its_activations"})
    return iter(pairs[:count])


def returns(count: int) -> Iterator[str | None]:
    """Each public function on each awkward model."""
    for function, name in _pairs(count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            changed, _, raised = zoo_check.run_and_compare(zoo_check.CALLS[function], name)
        raw = raised is not None and not isinstance(raised, ss.SkipscopeError)
        if changed:
            yield f"{function} on {name} changed {changed[:3]}"
        elif raw and name != "raises_on_its_second_call":
            yield f"{function} on {name} raised {raised!r}"
        else:
            yield None


def fails_within(count: int) -> Iterator[str | None]:
    """An exception or a KeyboardInterrupt at the first, a middle and the last module call of a public function."""
    tried = 0
    for function, name in _pairs(10**6):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, calls, _ = zoo_check.run_and_compare(zoo_check.CALLS[function], name)
            for at in sorted({1, (calls + 1) // 2, calls} - {0}):
                for error in (zoo_check.Planted, KeyboardInterrupt):
                    changed, _, _ = zoo_check.run_and_compare(zoo_check.CALLS[function], name, at, error)
                    where = f"{function} on {name}, {error.__name__} at module call {at} of {calls}"
                    yield f"{where}: changed {changed[:3]}" if changed else None
                    tried += 1
        if tried >= count:
            return


def _forgets_to_restore():
    return replaced((_untouched._Snapshot, "restore", lambda self: None))


# --- Ctrl-C ---


class Block(nn.Module):
    """x + tanh(norm(W x))."""

    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh())

    def forward(self, x):
        return x + self.f(x)


def network(depth: int = 4) -> nn.Module:
    """A residual network with batch norms, always the same."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(depth)), nn.Linear(8, 3))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """24 samples of three classes, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 8, generator=generator), torch.randint(0, 3, (24,), generator=generator)


CALLS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "find_shortcuts": lambda m, d: ss.find_shortcuts(m, d[0]),
    "ablate": lambda m, d: ss.ablate(m, inputs=d[0]),
    "rewire": lambda m, d: ss.rewire(m, ss.find_shortcuts(m, d[0]), kind="rezero"),
    "add_shortcuts": lambda m, d: ss.add_shortcuts(m, d[0], report=None),
    "gradient_flow": lambda m, d: ss.gradient_flow(m, d, entropy),
    "gradient_split": lambda m, d: ss.gradient_split(m, d, entropy),
    "path_spectrum": lambda m, d: ss.path_spectrum(m, d, entropy),
    "gradient_correlation": lambda m, d: ss.gradient_correlation(m, d, entropy, of="loss"),
    "importance": lambda m, d: ss.importance(m, d, entropy),
    "prescribe": lambda m, d: ss.prescribe(m, d, entropy, steps=1),
    "landscape": lambda m, d: ss.landscape(m, d, entropy, grid=3, strategy="plain"),
    "extreme_eigenvalues": lambda m, d: ss.extreme_eigenvalues(m, d, entropy, max_products=6),
    "spectral_density": lambda m, d: ss.spectral_density(m, d, entropy, probes=2, steps=3),
    "curvature_trace": lambda m, d: ss.curvature_trace(m, d, entropy, products=3),
    "train_twins": lambda m, d: ss.train_twins({"a": m}, d, entropy, seeds=1, steps=3, optimizers={"SGD": [0.1]}),
    "compare": lambda m, d: ss.compare(m, d, entropy, train=False, grid=3),
}  # fmt: skip
INTERRUPTED = (
    "find_shortcuts", "ablate", "gradient_flow", "path_spectrum", "importance", "landscape", "extreme_eigenvalues",
    "curvature_trace", "train_twins", "compare",
)  # fmt: skip


def _left_behind() -> list[str]:
    """What a call must not leave in the process."""
    left = [] if torch.is_grad_enabled() else ["gradients are disabled"]
    if not _public_call.turn.acquire(blocking=False):
        left.append("the turn is still taken")
    else:
        _public_call.turn.release()
    left += ["a snapshot is still shared"] if _untouched._shared else []
    left += (
        ["the handler of SIGINT is not the one that was there"]
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        else []
    )
    left += ["a process is still running"] if multiprocessing.active_children() or _children() else []
    return left


def _children() -> list[int]:
    """The processes that this one has started and that still run."""
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def _interrupt_one(name: str, seconds: float) -> str | None:
    model, data = network(), batch()
    model(data[0]).sum().backward()
    before, children = zoo_check.state_of(model, data), _children()
    sender = threading.Thread(target=lambda: (time.sleep(seconds), os.kill(os.getpid(), signal.SIGINT)))
    with contextlib.suppress(KeyboardInterrupt):  # one that comes as the call, or the inner block, ends
        with contextlib.suppress(KeyboardInterrupt):
            sender.start()
            CALLS[name](model, data)
        sender.join()
        time.sleep(0.01)
    sender.join()
    changed = zoo_check.differences(before, zoo_check.state_of(model, data))
    if changed:
        return f"{name} stopped after {seconds * 1e3:.1f} ms: changed {sorted(changed)[:3]}"
    end = time.monotonic() + 5  # a worker may take a moment to end
    while set(_children()) - set(children) and time.monotonic() < end:
        time.sleep(0.02)
    left = [
        what
        for what in _left_behind()
        if what != "a process is still running" or set(_children()) - set(children)
    ]
    return f"{name} stopped after {seconds * 1e3:.1f} ms: {', '.join(left)}" if left else None


@contextlib.contextmanager
def sigint_raises() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt inside; a shell starts background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def interrupted(count: int) -> Iterator[str | None]:
    """SIGINT at a random moment of ten public functions in turn."""
    draw, lengths = random.Random(0), {}
    names = INTERRUPTED if count >= len(INTERRUPTED) else ("gradient_flow",)
    with sigint_raises():
        for name in names:
            for _ in range(2):  # the first call of a process takes longer
                begun = time.perf_counter()
                with contextlib.suppress(KeyboardInterrupt):
                    CALLS[name](network(), batch())
                lengths[name] = time.perf_counter() - begun
        for i in range(count):
            name = names[i % len(names)]
            yield _interrupt_one(name, draw.random() * lengths[name])


@contextlib.contextmanager
def _interrupted_while_restoring() -> Iterator[None]:
    """Ctrl-C reaches the code that puts the model back, and stops it."""

    def restore(self):
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(1000))  # the signal is delivered here
        original(self)

    original = _untouched._Snapshot.restore
    with replaced(
        (_public_call, "_is_restoring", lambda frame: False), (_untouched._Snapshot, "restore", restore)
    ):
        yield


# --- memory ---


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _call_and_forget(name: str) -> weakref.ref[nn.Module]:
    model = network(2)
    MEASURED[name](model, batch())
    return weakref.ref(model)


def _raise_within(model: nn.Module, data: Any) -> None:
    """A call that fails half way, in the model's own code."""

    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    model[1].register_forward_hook(fail)
    with contextlib.suppress(ss.SkipscopeError, RuntimeError):
        ss.gradient_flow(model, data, entropy)


def _watch(model: nn.Module, data: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with ss.watch(model, optimizer):
        entropy(model(data[0]), data[1]).backward()
        optimizer.step()


def _save_and_load(result: Any) -> None:
    with tempfile.TemporaryDirectory(prefix="skipscope-trust-") as folder:
        ss.load(result.save(Path(folder) / "result.json"))


def _solution(seed: int) -> nn.Module:
    model, draw = network(2), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn(weight.shape, generator=draw)
    return model


# What is not in CALLS: it returns no result that can be compared, or takes its turn inside those.
MEASURED: dict[str, Callable[[nn.Module, Any], Any]] = CALLS | {
    "a call that fails": _raise_within,
    "watch": _watch,
    "check_shortcut": lambda m, d: check_shortcut(m[0], d[0], compile=False),
    "save, load": lambda m, d: _save_and_load(ss.gradient_flow(m, d, entropy)),
    "random_direction": lambda m, d: ss.random_direction(m),
    "solutions_plane": lambda m, d: ss.solutions_plane(m, _solution(1), _solution(2)),
    "trajectory_plane": lambda m, d: ss.trajectory_plane(
        m, [_solution(1).state_dict(), _solution(2).state_dict()]
    ),
    "recalibrate": lambda m, d: ss.recalibrate(m, d),
    "curvature_operator": lambda m, d: ss.curvature_operator(m, d, entropy),
    "curvature_map": lambda m, d: ss.curvature_map(m, d, entropy, grid=2, max_products=6),
    "paired_landscapes": lambda m, d: ss.paired_landscapes({"a": m}, d, entropy, grid=3, strategy="plain"),
}
# Resident bytes that a call may add: what it keeps of a model is more. An allocator's own growth comes once.
A_CALL, ONCE = 4096, 4 * 2**20


# Calls of each function: where a call takes less than 50 ms, and else.
MANY, FEW = 1000, 30


def leaks(count: int) -> Iterator[str | None]:
    """New models through every public function in turn: none may stay alive, and resident memory stays flat.

    The functions are called in rounds of at most 25 calls or 0.3 seconds, until each was called often enough. What the
    first round adds is not counted, since it is what a process loads once.

    Returns:
        How often each was called, and which added most.
    """
    names = list(MEASURED) if count >= 8 * len(MEASURED) else ["gradient_flow"]
    grown, calls, seconds = (dict.fromkeys(names, zero) for zero in (0, 0, 0.0))
    wanted = dict.fromkeys(names, count)
    with contextlib.suppress(TimeIsUp):
        for turn in itertools.count():
            for name in [name for name in names if calls[name] < wanted[name]]:
                begun, used, before = time.perf_counter(), time.process_time(), _resident_bytes()
                alive: list[weakref.ref[nn.Module]] = []
                while not alive or (time.perf_counter() - begun < 0.3 and len(alive) < 25):
                    alive.append(_call_and_forget(name))
                if turn:
                    calls[name] += len(alive)
                    seconds[name] += time.process_time() - used  # of this process: others may keep it waiting
                    wanted[name] = MANY if seconds[name] / calls[name] < 0.05 else FEW
                gc.collect()
                grown[name] += _resident_bytes() - before if turn else 0
                kept = sum(model() is not None for model in alive)
                # First what was found: on a fast machine a round has more calls than a short run takes.
                yield (
                    f"{name}: {kept} of {len(alive)} models are alive"
                    if kept
                    else f"{name}: {grown[name] / 2**20:.1f} MiB more after {calls[name]} calls"
                    if grown[name] > ONCE + A_CALL * calls[name]
                    else None
                )
                for _ in alive[1:]:
                    yield None
            if turn and all(calls[name] >= wanted[name] for name in names):
                break
    often = {name for name in names if wanted[name] == MANY}
    most = max(names, key=lambda name: grown[name] / max(1, calls[name]))
    return (
        f"{min((calls[name] for name in often), default=0)} calls or more of each of {len(often)} functions, "
        f"{min((calls[name] for name in set(names) - often), default=0)} of each of {len(names) - len(often)} that take "
        f"more than 50 ms; most is added by {most}: {grown[most]:,} bytes in {calls[most]} calls; all together: "
        f"{sum(grown.values()) / 2**20:.1f} MiB"
    )


def _keeps_every_model():
    kept: list[Any] = []
    original = MEASURED["gradient_flow"]
    return replaced((MEASURED, "gradient_flow", lambda m, d: (kept.append(m), original(m, d))[1]))


# --- threads ---

# Importance first: it is the first to go wrong where threads do not take turns.
THREADED = ("importance", *(name for name in CALLS if name not in {"importance", "prescribe"}))
_VARIES = {"provenance", "checks", "curves", "engine", "seconds"}


def _lasting(value: Any) -> Any:
    """Plain data without how long things took, and which of two equal engines was the faster."""
    if isinstance(value, dict):
        return {key: _lasting(item) for key, item in value.items() if key not in _VARIES}
    return [_lasting(item) for item in value] if isinstance(value, list) else value


def _plain(result: Any) -> Any:
    if isinstance(result, nn.Module):
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in result.modules())
        return repr((hooks, {name: tensor.tolist() for name, tensor in result.state_dict().items()}))
    if hasattr(result, "to_dict"):
        return repr(_lasting(result.to_dict()))
    return repr([(s.name, s.kind, s.fork) for s in result])


def threads(count: int) -> Iterator[str | None]:
    """The same call from 2 to 8 threads, on one model and on a model each: every answer is that of one thread."""
    draw, tried, expected = random.Random(0), 0, {}
    while tried < count:
        name, workers, shared = THREADED[tried // 8 % len(THREADED)], draw.randint(2, 8), draw.random() < 0.6
        if name not in expected:
            expected[name] = _plain(CALLS[name](network(), batch()))
        models = [network()] * workers if shared else [network() for _ in range(workers)]
        data, answers = batch(), [""] * workers
        before = zoo_check.state_of(*dict.fromkeys(models))

        def work(i: int, name=name, models=models, data=data, answers=answers) -> None:
            try:
                answers[i] = _plain(CALLS[name](models[i], data))
            except ss.SkipscopeError:
                answers[i] = "refused"
            except Exception as error:
                answers[i] = f"raised {error!r}"

        at_a_time = [threading.Thread(target=work, args=(i,)) for i in range(workers)]
        for thread in at_a_time:
            thread.start()
        for thread in at_a_time:
            thread.join()
        changed = zoo_check.differences(before, zoo_check.state_of(*dict.fromkeys(models)))
        for answer in answers:
            wrong = answer not in {expected[name], "refused"}
            yield (
                f"{name} in {workers} threads: another answer than in one"
                if wrong
                else f"{name} changed {sorted(changed)[:2]}"
                if changed
                else None
            )
            tried += 1


class _NoTurn:
    """A lock that locks nothing."""

    def acquire(self, *_: Any, **__: Any) -> bool:
        return True

    def release(self) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@contextlib.contextmanager
def _no_turns() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with replaced((_public_call, "turn", _NoTurn()), (_untouched, "turn", _NoTurn())):
            yield
    finally:
        sys.setswitchinterval(before)
        # What threads leave that do not take turns: torch's stance on compiled code is one for the process.
        if "torch._dynamo" in sys.modules:
            torch.compiler.set_stance("default")
        torch.set_grad_enabled(True)


# --- determinism ---


def repeated(count: int) -> Iterator[str | None]:
    """The same call twice, from two random states of the user's: the same bits, and the user's states as they were."""
    names = [
        name for name in CALLS if name not in {"ablate", "rewire", "add_shortcuts", "compare", "prescribe"}
    ]
    for i in range(count):
        name, answers, moved = names[i % len(names)], [], []
        for seed in (i, i + 1):
            model = network()
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            answers.append(_plain(CALLS[name](model, batch())))
            moved.append(not torch.equal(before, torch.get_rng_state()))
        yield (
            f"{name} moved the user's generator"
            if any(moved)
            else f"{name}: two answers"
            if answers[0] != answers[1]
            else None
        )


def _draws_from_the_user():
    original = CALLS["find_shortcuts"]
    return replaced((CALLS, "find_shortcuts", lambda m, d: (torch.rand(1), original(m, d))[1]))


MODEL = (
    Hazard("A model changed by a measurement", "one public function on one awkward model; every bit compared", returns, _forgets_to_restore, 1200, 6),
    Hazard("A model changed by an error within", "an exception or interrupt at one module call; every bit compared", fails_within, _forgets_to_restore, 600, 6),
    Hazard("A model changed by Ctrl-C", "one SIGINT at a random moment of one of ten functions", interrupted, _interrupted_while_restoring, 2000, 4),
    Hazard("Memory that is never freed", "one call on a new model; weak references and resident memory", leaks, _keeps_every_model, 60000, 8),
    Hazard("Threads that read each other's state", "one call beside others, 2 to 8 threads", threads, _no_turns, 500, 8),
    Hazard("Answers that vary", "one call twice, from two random states", repeated, _draws_from_the_user, 100, 3),
)  # fmt: skip
