"""Copies of the process: right answers, whatever dies, and nothing left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope.surfaces.evaluation import _autotune, _process_pool, _strategies
from skipscope.surfaces.evaluation._process_pool import Forked, Lost

pytestmark = pytest.mark.skipif(not _process_pool.CAN_FORK, reason="copies are made by fork, on Linux")


@pytest.fixture(autouse=True)
def _nothing_is_left():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2 and not multiprocessing.active_children()
    torch.set_num_threads(threads)


def _ended(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- the copies ---


def test_answers_come_in_order_from_other_processes_with_a_thread_each():
    copies = Forked(lambda n: (n * n, os.getpid(), torch.get_num_threads()), 3, 60)
    answers = copies(range(50))
    assert [a for a, *_ in answers] == [n * n for n in range(50)]
    pids = {pid for _, pid, _ in answers}
    assert os.getpid() not in pids and 1 <= len(pids) <= 3 and {t for *_, t in answers} == {1}
    assert copies([7])[0][0] == 49 and copies([]) == []
    copies.close()
    assert all(map(_ended, pids))


def test_no_copy_waits_while_another_has_two_questions(tmp_path):
    """Each of two questions waits for the other to be asked: one copy alone would never answer."""

    def compute(n: int) -> int:
        (tmp_path / str(n)).touch()
        while not (tmp_path / str(1 - n)).exists():
            time.sleep(0.01)
        return os.getpid()

    copies = Forked(compute, 2, 60)
    assert len(set(copies([0, 1]))) == 2
    copies.close()


def test_a_copy_that_dies_leaves_its_questions_to_the_others(tmp_path):
    def compute(n: int) -> int:
        try:
            (tmp_path / "first").touch(exist_ok=False)
        except FileExistsError:
            return n + 1
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    copies = Forked(compute, 3, 60)
    assert copies(range(40)) == [n + 1 for n in range(40)]
    assert len(multiprocessing.active_children()) == 2
    copies.close()


@pytest.mark.parametrize("how", ["dies", "raises", "is silent"])
def test_without_answers_the_copies_are_gone(how):
    def compute(n: int) -> int:
        if n == 3:
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "raises":
                raise ZeroDivisionError("three")
            time.sleep(600)
        return n

    copies = Forked(compute, 2, 600 if how != "is silent" else 1)
    with pytest.raises(Lost, match={"dies": "no copy", "raises": "three", "is silent": "silent"}[how]):
        copies(range(9))
    assert not multiprocessing.active_children()
    with pytest.raises(Lost):
        copies([1])


def test_the_memory_of_a_copy_is_measured():
    needed, seconds, answer = _process_pool.measured_in_a_copy(
        lambda n: torch.ones(n).sum().item(), 2**24, 60
    )
    assert 2**26 <= needed < 2**27 and seconds > 0 and answer == 2**24


SCRIPT = """
    import os, sys, time, torch
    from skipscope.surfaces.evaluation._process_pool import Forked
    torch.set_num_threads(2)
    torch.randn(600, 600) @ torch.randn(600, 600)
    one, two = (Forked(lambda n: (os.getpid(), time.sleep(n))[0], 2, 600) for _ in range(2))
    pids = {*one([0.2] * 4), *two([0.2] * 4)}
    print(*pids, flush=True)
    one([600])
"""


def test_copies_end_with_the_process_that_made_them():
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) >= 2 and not any(map(_ended, pids))
    process.kill()
    process.wait()
    # One of them is asleep at its question, as one that computes would be: it ends when it has answered.
    _wait_for(lambda: sum(map(_ended, pids)) >= len(pids) - 1)
    for pid in pids:
        if not _ended(pid):
            os.kill(pid, signal.SIGKILL)


# --- surfaces ---


def _net(dtype=torch.float32) -> tuple[nn.Module, tuple]:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 4)]
    model, x = nn.Sequential(*layers).to(dtype), torch.randn(100, 6, dtype=dtype)
    model(3 * x)  # statistics that are not those of the data
    return model, (x, torch.randint(4, (100,)))


def _same(one, other) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True)
        for name in ("values", "stderr", "centre_stderr")
    )


@pytest.mark.parametrize("base", ["plain", "oneDNN", "oneDNN, recorded"])
def test_how_many_copies_there_are_changes_no_bit(base, monkeypatch):
    model, data = _net()
    name, found = base + ", a point a core", []
    for cores in (2, 3, 1, 0):
        if cores:
            torch.set_num_threads(cores)
        else:
            monkeypatch.setattr(_strategies, "CAN_FORK", False)
        found.append(
            ss.landscape(model, data, F.cross_entropy, grid=7, strategy=name, metrics={"m": _metric})
        )
        torch.set_num_threads(2)
    plain = ss.landscape(model, data, F.cross_entropy, grid=7, strategy="plain", metrics={"m": _metric})
    assert all(_same(found[0], other) for other in found[1:])
    assert {surface.provenance.strategy for surface in found} == {name}, found[0].provenance.why
    assert np.allclose(found[0].values, plain.values, rtol=1e-5) and found[0].checks.passed
    assert np.allclose(found[0].metrics["m"], plain.metrics["m"]) and np.ptp(plain.metrics["m"]) > 0


def _metric(output, target):
    return (output.argmax(1) == target).double().mean()


@pytest.mark.parametrize(
    "case", ["recalibrate", "batch", "strength", "draws", "dict", "l2", "adaptive", "twins"]
)
def test_a_point_a_core_equals_the_plain_loop(case):
    model, data = _net(torch.float64)
    options: dict = {"grid": 9}
    if case in {"recalibrate", "batch"}:
        options["batch_norm"] = case
    if case == "l2":
        options["l2"] = 0.1
    if case == "adaptive":
        options |= {"grid": 21, "tolerance": 0.02}
    if case == "draws":
        model = nn.Sequential(model, _Noise())
    if case == "dict":
        model, data = _ByName(model), ({"x": data[0]}, data[1])
    if case == "strength":
        model = nn.Sequential(model, _Residual()).double()
        options["strength"] = ss.find_shortcuts(model, data[0])
    if case == "twins":
        other = _net(torch.float64)[0]
        with torch.no_grad():
            other[0].weight.mul_(1.1)
        found, plain = (
            ss.paired_landscapes({"a": model, "b": other}, data, F.cross_entropy, strategy=s, **options)
            for s in ("plain, a point a core", "plain")
        )
        pairs = [(found.surfaces[name], plain.surfaces[name]) for name in "ab"]
    else:
        pairs = [
            [
                ss.landscape(model, data, F.cross_entropy, strategy=s, **options)
                for s in ("plain, a point a core", "plain")
            ]
        ]
    for one, other in pairs:
        assert one.provenance.strategy == "plain, a point a core", one.provenance.why
        assert np.allclose(one.values, other.values, rtol=1e-9) and np.ptp(other.values) > 0
        assert np.array_equal(one.computed, other.computed)
        assert one.checks.passed


class _Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class _ByName(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class _Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.tanh(self.fc(x))


def test_an_error_in_a_copy_is_the_users_own():
    """Far enough out a loss of the user's own raises: the same error as without copies, and no copy is left."""
    model, data = _net()

    def fussy(output, target):
        value = F.cross_entropy(output, target)
        if value > limit:
            raise ValueError(f"too large: {value:.3f}")
        return value

    limit = 1e9
    surface = ss.landscape(model, data, fussy, grid=9, strategy="plain, a point a core")
    limit = float(np.sort(surface.values.ravel())[-3])
    with pytest.raises(ValueError, match="too large"):
        ss.landscape(model, data, fussy, grid=9, strategy="plain, a point a core")


def test_a_copy_killed_on_the_way_costs_nothing(tmp_path):
    model, data = _net()
    calls = 0

    def loss(output, target):
        nonlocal calls
        calls += 1
        if multiprocessing.parent_process() is not None and calls > 40 and not (tmp_path / "one").exists():
            (tmp_path / "one").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return F.cross_entropy(output, target)

    surface = ss.landscape(model, data, loss, grid=15, strategy="plain, a point a core")
    assert (tmp_path / "one").exists()
    plain = ss.landscape(model, data, F.cross_entropy, grid=15, strategy="plain")
    assert np.allclose(surface.values, plain.values, rtol=1e-6)


@pytest.mark.parametrize("strategy", ["auto", "plain, a point a core"])
def test_ctrl_c_while_ways_are_tried_leaves_no_copy(strategy, monkeypatch):
    """It comes while a strategy is timed whose copies nobody else knows yet."""
    monkeypatch.setattr(_autotune, "_known", {})
    # On so small a surface no trial would pay, and with one thread a core is not tried.
    monkeypatch.setattr(_autotune._Autotune, "_worth", lambda *_: True)
    monkeypatch.setattr(_autotune, "MIN_SPEEDUP", 0.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    real, seen = _autotune._timed, []

    def time_of(way, points):
        if way.name.endswith("a point a core"):
            seen.append(len(multiprocessing.active_children()))
            raise KeyboardInterrupt
        return real(way, points)

    monkeypatch.setattr(_autotune, "_timed", time_of)
    model, data = _net(torch.float64)
    with pytest.raises(KeyboardInterrupt):
        ss.landscape(model, data, F.cross_entropy, grid=5, strategy=strategy)
    assert seen == [2] and not multiprocessing.active_children()


def test_copies_that_do_not_fit_are_not_made(monkeypatch):
    asked = []
    monkeypatch.setattr(_strategies, "fits", lambda needed: asked.append(needed))
    model, data = _net()
    surface = ss.landscape(model, data, F.cross_entropy, grid=5, strategy="plain, a point a core")
    assert surface.provenance.strategy == "plain" and "2 copies need" in surface.provenance.why
    assert asked and asked[0] > 0


def test_where_it_pays_it_is_chosen(monkeypatch):
    """The clock is ours: a point a core takes half the time of every other way."""
    monkeypatch.setattr(_autotune, "_known", {})
    monkeypatch.setattr(_autotune, "_SHARE", 1e9)
    real = _autotune._timed

    def time_of(strategy, points):
        _, reading = real(strategy, points)
        return (0.5 if strategy.name.endswith("a point a core") else 1.0), reading

    monkeypatch.setattr(_autotune, "_timed", time_of)
    model, data = _net(torch.float64)
    surface = ss.landscape(model, data, F.cross_entropy, grid=5)
    assert surface.provenance.strategy == "plain, a point a core", surface.provenance.why
    torch.set_num_threads(1)
    surface = ss.landscape(model, data, F.cross_entropy, grid=5)
    assert "a point a core" not in surface.provenance.why, "one thread is one core"
    torch.set_num_threads(2)


def test_a_store_filled_by_copies_is_resumed_with_the_same_bits(tmp_path):
    model, data = _net()
    options = {"grid": 21, "tolerance": 0.02, "strategy": "oneDNN, a point a core", "metrics": {"m": _metric}}
    whole = ss.landscape(model, data, F.cross_entropy, **options)
    process = multiprocessing.get_context("fork").Process(
        target=_fill_and_die, args=(model, data, tmp_path / "s", options)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = [file for file in (tmp_path / "s" / "sheet" / "c").rglob("*") if file.is_file()]
    again = ss.landscape(model, data, F.cross_entropy, store=tmp_path / "s", **options | {"strategy": "auto"})
    assert 0 < len(kept) < again.computed.sum(), (len(kept), again.computed.sum())
    assert _same(whole, again) and again.provenance.strategy == whole.provenance.strategy


def _fill_and_die(model, data, store, options):
    torch.set_num_threads(1)  # no copies of the copy: what is computed is counted here
    left = 60

    def counted(output, target):
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return _metric(output, target)

    ss.landscape(model, data, F.cross_entropy, store=store, **options | {"metrics": {"m": counted}})


CTRL_C = """
    import os, signal, torch, torch.nn.functional as F, skipscope as ss
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell begins without it
    torch.set_num_threads(2)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
    data = torch.randn(2000, 64), torch.randint(10, (2000,))
    calls = 0
    def metric(output, target):
        global calls
        calls += 1
        if calls == 200:
            os.write(1, b"on the way\\n")  # whole: copies share one pipe
        return output.mean()
    try:
        ss.landscape(model, data, F.cross_entropy, grid=301, metrics={"m": metric}, strategy="plain, a point a core")
    except KeyboardInterrupt:
        import multiprocessing
        print("stopped", len(multiprocessing.active_children()), flush=True)
"""


def test_ctrl_c_ends_the_copies_without_a_word():
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CTRL_C)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "on the way\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everybody
    out, err = process.communicate(timeout=300)
    assert out.splitlines()[-1] == "stopped 0" and "Traceback" not in err and process.returncode == 0
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
