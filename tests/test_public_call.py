"""Threads take turns, and Ctrl-C leaves everything as it was found, also while it is being restored."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope import _public_call, _untouched
from skipscope._public_call import public_call, turn
from skipscope._torch_private import without_modes
from trust._model import CALLS
from trust._model import batch as _data
from trust._model import network as _net


@pytest.fixture(autouse=True)
def ctrl_c_raises():
    """A shell starts background jobs with SIGINT ignored; these tests send it to themselves."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _state(model: nn.Module) -> list[Any]:
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    bits = [None if t is None else t.detach().numpy().tobytes() for t in tensors]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    numbers = torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes(), random.getstate()  # type: ignore[index]
    return [bits, hooks, modes, numbers, torch.is_grad_enabled(), torch._C._len_torch_function_stack()]


# --- Ctrl-C ---


def _interrupted(call: Callable[..., Any], seconds: float) -> tuple[bool, list[Any], list[Any]]:
    """Send SIGINT ``seconds`` after a call has begun: whether it was interrupted, and the state before and after."""
    model, data = _net(), _data()
    model(data[0]).sum().backward()
    before, stopped = _state(model), False
    sender = threading.Thread(target=lambda: (time.sleep(seconds), os.kill(os.getpid(), signal.SIGINT)))
    try:
        sender.start()
        call(model, data)
        sender.join()
        time.sleep(0.01)
    except KeyboardInterrupt:
        stopped = True
    sender.join()
    return stopped, before, _state(model)


def _interrupt_often(name: str, times: int) -> None:
    call, draw = CALLS[name], random.Random(0)
    call(_net(), _data())
    begun = time.perf_counter()
    call(_net(), _data())
    length, stops = time.perf_counter() - begun, 0
    for _ in range(times):
        stopped, before, after = _interrupted(call, draw.random() * length)
        stops += stopped
        assert before == after
        assert turn.acquire(blocking=False), "the turn is still taken"
        turn.release()
        assert not _untouched._shared and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert stops > times // 3


@pytest.mark.parametrize("name", ["gradient_flow", "find_shortcuts"])
def test_ctrl_c_at_any_moment_leaves_everything_as_found(name):
    _interrupt_often(name, 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_ctrl_c_at_any_moment_leaves_everything_as_found_often(name):
    _interrupt_often(name, 60)


def _interrupted_at_step(step: int) -> bool:
    """Send SIGINT at the ``step``-th instruction that the entry of a public call runs: whether there is one."""
    met = 0

    def trace(frame, event, argument):
        nonlocal met
        name = frame.f_code.co_name
        if not frame.f_code.co_filename.endswith("_public_call.py") or name == "enter_call":
            return None  # the interpreter itself looks for signals in enter_call only where it calls
        frame.f_trace_opcodes = True
        if event == "opcode":
            met += 1
            if met == step:
                os.kill(os.getpid(), signal.SIGINT)
        return trace

    @public_call("outer")
    def outer():
        return inner()

    @public_call("inner")
    def inner():
        return sum(range(100))

    try:
        sys.settrace(trace)
        outer()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return met >= step


def test_ctrl_c_at_every_instruction_of_the_entry_leaves_it_usable():
    step = 1
    while _interrupted_at_step(step):
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, step
        assert _public_call._interrupts.depth == 0, step
        free = []
        other = threading.Thread(target=lambda: free.append(turn.acquire(blocking=False)) or turn.release())
        other.start()
        other.join()
        assert free == [True], step
        step += 1
    assert step > 150


def test_ctrl_c_while_the_model_is_restored_comes_afterwards(monkeypatch):
    restore, sent = _untouched._Snapshot.restore, []

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        sent.append(1)
        restore(self)

    model, data = _net(), _data()
    model(data[0]).sum().backward()
    before = _state(model)
    monkeypatch.setattr(_untouched._Snapshot, "restore", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ss.gradient_flow(model, data, F.cross_entropy)
    assert sent and _state(model) == before


def test_ctrl_c_as_gradients_are_switched_off_leaves_them_on(monkeypatch):
    enter, sent = torch.no_grad.__enter__, []

    def __enter__(self):
        enter(self)
        if not sent:
            sent.append(1)
            os.kill(os.getpid(), signal.SIGINT)
            sum(range(1000))  # a check for signals comes with the next call

    model, data = _net(), _data()
    before = _state(model)
    monkeypatch.setattr(torch.no_grad, "__enter__", __enter__)
    gc.collect()  # Python ignores an interrupt that arrives in a finalizer: other tests' garbage must not have one
    gc.disable()
    try:
        with pytest.raises(KeyboardInterrupt):
            ss.extreme_eigenvalues(model, data, F.cross_entropy, max_products=6)
    finally:
        gc.enable()
    assert sent and torch.is_grad_enabled() and _state(model) == before


def test_a_gradient_mode_that_was_left_off_is_put_back():
    @public_call("careless")
    def careless():
        torch.set_grad_enabled(False)
        torch.rand(1), random.random()
        raise KeyboardInterrupt

    before = torch.get_rng_state(), random.getstate()
    with pytest.raises(KeyboardInterrupt):
        careless()
    assert torch.is_grad_enabled() and torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


@pytest.mark.skipif(not hasattr(torch._C, "_get_torch_function_state"), reason="this torch cannot say it")
def test_function_modes_see_calls_again_after_an_interrupt():
    """Where a debugger traces, Ctrl-C may come after a block of torch's own and before it is left."""

    @public_call("measure")
    def stopped() -> None:
        without_modes().__enter__()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert torch._C._is_torch_function_enabled() and len(ss.find_shortcuts(_net(), _data()[0])) == 4
    with without_modes():  # the caller's own stays
        with pytest.raises(KeyboardInterrupt):
            stopped()
        assert not torch._C._is_torch_function_enabled()


def test_a_handler_of_the_users_own_gets_the_signal_and_stays():
    got = []
    before = signal.signal(signal.SIGINT, lambda number, frame: got.append(number))
    try:
        ours = signal.getsignal(signal.SIGINT)

        @public_call("test")
        def call():
            os.kill(os.getpid(), signal.SIGINT)
            return sum(range(1000))

        assert call() == 499500 and got == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is ours
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        call()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN and len(got) == 1
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_a_call_waits_for_its_turn():
    holds, ends = threading.Event(), threading.Event()

    def hold():
        with turn:
            holds.set()
            ends.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    holds.wait()
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    begun = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        ss.find_shortcuts(_net(), _data()[0])
    assert time.perf_counter() - begun < 10
    ends.set()
    holder.join()
    assert turn.acquire(timeout=1)
    turn.release()


# --- threads ---


def _in_threads(works: list[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(works)

    def run(i: int) -> None:
        try:
            results[i] = works[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def _plain(result: Any) -> Any:
    if isinstance(result, nn.Module):
        return _state(result)[:3]
    if hasattr(result, "to_dict"):
        return {
            k: v for k, v in result.to_dict().items() if k not in {"provenance", "checks", "curves", "engine"}
        }
    return [(s.name, s.kind, s.fork) for s in result]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in {"importance", "ablate", "gradient_split"} else pytest.mark.slow) for n in CALLS if n != "compare"]
)  # fmt: skip
def test_threads_that_measure_the_same_model_get_the_same_as_one(name):
    model, data = _net(), _data()
    expected, before = _plain(CALLS[name](model, data)), _state(model)
    given = _in_threads([lambda: _plain(CALLS[name](model, data))] * 6)
    assert all(repr(one) == repr(expected) for one in given)
    assert _state(model) == before


def test_a_twin_carries_nothing_of_a_measurement_in_another_thread():
    model, data = _net(), _data()
    found, stop = ss.find_shortcuts(model, data[0]), threading.Event()

    def measure():
        while not stop.is_set():
            ss.landscape(model, data, F.cross_entropy, grid=3, strategy="plain")

    thread = threading.Thread(target=measure)
    thread.start()
    try:
        for _ in range(12):
            twin = ss.ablate(model, found)
            assert not any(m._forward_pre_hooks or m._backward_hooks for m in twin.modules())
            assert all(m.training for m in twin.modules())
            assert not any(int(b) for name, b in twin.named_buffers() if name.endswith("tracked"))
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("name", ["extreme_eigenvalues", "curvature_trace", "train_twins"])
def test_calls_of_several_threads_leave_the_random_state(name):
    data = _data()
    models = [_net(1) for _ in range(4)]
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    given = _in_threads([lambda m=m: CALLS[name](m, data) for m in models])
    assert not any(isinstance(one, Exception) for one in given)
    assert torch.equal(before[0], torch.get_rng_state()) and random.getstate() == before[2]
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]


def test_errors_carry_the_name_of_the_outer_call():
    @public_call("inner")
    def inner():
        raise ss.SkipscopeError("deep", "wrong", cure="right")

    @public_call("outer")
    def outer():
        inner()

    with pytest.raises(ss.SkipscopeError, match="outer: wrong") as refusal:
        outer()
    assert refusal.value.operation == "outer"
