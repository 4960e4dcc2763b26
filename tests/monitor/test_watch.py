"""What a monitor records, against an independent float64 reading of the gradients just before each step."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import skipscope as ss
from skipscope import reference
from skipscope.monitor import STATES, JsonLines, Terminal, watch

from ._loops import Spy, agrees, data, loss_of, network, oracle


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_step_equals_the_oracle(dtype):
    model = network(dtype)
    optimizer = Spy(model.parameters())
    with watch(model, optimizer) as monitor:
        for _ in range(5):
            optimizer.zero_grad()
            model(data(dtype)).square().mean().backward()
            optimizer.step()
    agrees(monitor.history, optimizer.received)
    assert monitor.history.parameters == tuple(name for name, _ in model.named_parameters())
    np.testing.assert_array_equal(monitor.history.steps, [1, 2, 3, 4, 5])


def test_the_oracle_can_fail():
    model = network()
    optimizer = Spy(model.parameters())
    with watch(model, optimizer) as monitor:
        model(data()).square().mean().backward()
        optimizer.step()
    optimizer.received[0][0][0] *= 1 + 1e-5
    with pytest.raises(AssertionError):
        agrees(monitor.history, optimizer.received)


def test_every_and_public_name():
    model = network()
    optimizer = Spy(model.parameters())
    monitor = ss.watch(model, optimizer, every=3)
    for _ in range(8):
        optimizer.zero_grad()
        model(data()).square().mean().backward()
        optimizer.step()
    monitor.close()
    monitor.close()
    np.testing.assert_array_equal(monitor.history.steps, [1, 4, 7])
    agrees(monitor.history, optimizer.received[::3])
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_history_is_data_that_saves_and_loads(tmp_path):
    model = network()
    optimizer = Spy(model.parameters())
    with watch(model, optimizer, folder=tmp_path / "run") as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            model(data()).square().mean().backward()
            optimizer.step()
        running = ss.load(tmp_path / "run")
        assert not running.complete
        np.testing.assert_array_equal(running.norm, monitor.history.norm)
    history = ss.load(tmp_path / "run")
    assert history.complete
    assert history.verdict.state == monitor.verdict.state
    path = monitor.history.save(tmp_path / "history.json")
    again = ss.load(path)
    np.testing.assert_array_equal(again.norm, history.norm)
    assert again.shapes == history.shapes
    assert "0.weight" in str(again)
    with pytest.raises(ss.SkipscopeError, match="already holds a history"):
        watch(model, optimizer, folder=tmp_path / "run")


@pytest.mark.parametrize("cut", range(0, 400, 7))
def test_a_torn_file_reads_up_to_the_last_whole_row(tmp_path, cut):
    model = network(depth=1)
    optimizer = Spy(model.parameters())
    with watch(model, optimizer, folder=tmp_path / "run") as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            model(data()).square().mean().backward()
            optimizer.step()
    rows = tmp_path / "run" / "gradients-0-000.rows"
    whole = rows.read_bytes()
    rows.write_bytes(whole[: len(whole) - cut])
    history = ss.load(tmp_path / "run")
    width = 8 * (6 + 3 * 4 + 1)  # scalars, three numbers a parameter, the checksum
    assert len(history) == 4 - math.ceil(cut / width)
    np.testing.assert_array_equal(history.norm, monitor.history.norm[: len(history)])


def test_matrix_has_layer_by_step():
    model = network()
    optimizer = Spy(model.parameters())
    with watch(model, optimizer) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            model(data()).square().mean().backward()
            optimizer.step()
    picture = monitor.history.matrix()
    assert picture["rows"] == ["0.weight", "2.weight", "4.weight", "6.weight"]
    assert picture["values"].shape == (4, 4)
    assert picture["columns"] == [1, 2, 3, 4]
    assert len(monitor.history.matrix("mean_abs", weights_only=False)["rows"]) == 8
    with pytest.raises(ss.SkipscopeError, match="no quantity"):
        monitor.history.matrix("nonsense")


def test_a_step_that_calls_its_parents_step_is_one_step():
    class Outer(Spy):
        def step(self, closure=None):
            if self.fails:
                raise ZeroDivisionError
            return super().step(closure)

    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # torch hooks each class's step at its first use
    model = network()
    Spy(model.parameters())
    optimizer = Outer(model.parameters())
    with watch(model, optimizer) as monitor:
        for i in range(6):
            optimizer.zero_grad()
            model(data()).square().mean().backward()
            optimizer.fails = i == 2
            if optimizer.fails:
                with pytest.raises(ZeroDivisionError):
                    optimizer.step()
                optimizer.received.append(oracle(model.parameters()))
            else:
                optimizer.step()
    agrees(monitor.history, optimizer.received)


def test_memory_is_bounded_and_the_folder_keeps_all(tmp_path):
    model = network(depth=1)
    optimizer = Spy(model.parameters())
    with watch(model, optimizer, keep=16, folder=tmp_path / "run") as monitor:
        for _ in range(100):
            optimizer.zero_grad()
            model(data()).square().mean().backward()
            optimizer.step()
    steps = monitor.history.steps
    assert len(steps) <= 17
    assert steps[0] == 1
    assert steps[-1] == 100
    assert len(set(np.diff(steps)[:-1])) == 1
    received = np.array(optimizer.received)[steps.astype(int) - 1]
    np.testing.assert_allclose(monitor.history.norm, received[:, 0], rtol=1e-6)
    agrees(ss.load(tmp_path / "run"), optimizer.received)


def test_a_long_run_is_read_in_part_and_says_so(tmp_path, monkeypatch):
    from skipscope.monitor import read_history
    from skipscope.monitor.history import _row_files

    monkeypatch.setattr(_row_files, "_ROOM", 0)
    model = network(depth=1)
    optimizer = Spy(model.parameters())
    with watch(model, optimizer, folder=tmp_path / "run") as monitor:
        for _ in range(150):
            optimizer.zero_grad()
            model(data()).square().mean().backward()
            optimizer.step()
    assert len(monitor.history) <= 65
    part = ss.load(tmp_path / "run")
    assert len(part) <= 65
    assert part.steps[-1] == 150
    assert any("of 150 rows" in note for note in part.notes)
    agrees(read_history(tmp_path / "run", all_rows=True), optimizer.received)


def test_the_three_kinds_of_zero_stay_apart():
    model = nn.ModuleDict(
        {name: nn.Linear(2, 2, bias=False) for name in ("fine", "dead", "tiny", "loose", "broken", "frozen")}
    )
    model["frozen"].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer) as monitor:
        for name, value in {"fine": 1.0, "dead": 0.0, "tiny": 1e-40, "broken": math.nan}.items():
            model[name].weight.grad = torch.full((2, 2), value)
        optimizer.step()
    states = [STATES[int(code)] for code in monitor.history.states[0]]
    assert states == ["ok", "exact_zero", "underflow", "not_connected", "nonfinite", "frozen"]


def test_jsonl_and_terminal_when_piped(tmp_path, capsys):
    model = network()
    optimizer = Spy(model.parameters())
    with watch(model, optimizer, sinks=[Terminal(every=2), str(tmp_path / "log.jsonl")]):
        for _ in range(4):
            optimizer.zero_grad()
            model(data()).square().mean().backward()
            optimizer.step()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines if line["kind"] != "event"] == ["open", *["step"] * 4, "close"]
    first = next(line for line in lines if line["kind"] == "step")
    np.testing.assert_allclose(
        first["parameters"]["0.weight"]["mean_abs"], optimizer.received[0][1][0], rtol=1e-6
    )
    assert first["parameters"]["0.weight"]["norm_before_clip"] is None
    printed = capsys.readouterr().err.splitlines()
    assert sum("step      " in line for line in printed) >= 2
    assert all(line.startswith("skipscope: ") and line.isprintable() for line in printed)


def test_a_sink_that_fails_is_dropped_and_training_goes_on(tmp_path):
    class Broken(JsonLines):
        def step(self, record):
            raise OSError("no space left")

    model = network()
    optimizer = Spy(model.parameters())
    with (
        pytest.warns(UserWarning, match="Broken failed"),
        watch(model, optimizer, sinks=[Broken(tmp_path / "x")]),
    ):
        for _ in range(2):
            optimizer.zero_grad()
            model(data()).square().mean().backward()
            optimizer.step()
    assert len(optimizer.received) == 2


def test_it_detaches_after_an_exception():
    from torch.nn.utils import clip_grad

    inner, step = clip_grad._clip_grads_with_norm_, torch.amp.GradScaler.step
    model = network()
    optimizer = Spy(model.parameters())
    with pytest.raises(ZeroDivisionError), watch(model, optimizer):
        assert clip_grad._clip_grads_with_norm_ is not inner
        raise ZeroDivisionError
    assert clip_grad._clip_grads_with_norm_ is inner
    assert torch.amp.GradScaler.step is step
    assert not optimizer._optimizer_step_pre_hooks


def test_refusals():
    model, other = network(), network()
    with pytest.raises(ss.SkipscopeError, match="none of the model's parameters"):
        watch(model, torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(ss.SkipscopeError, match="steps cannot be seen"):
        watch(model, object())
    twin = ss.ablate(reference.deep_mlp(3, shortcut="identity"), inputs=torch.zeros(1, 64), share=True)
    with pytest.raises(ss.SkipscopeError, match="shares its parameters with the original"):
        watch(twin, torch.optim.SGD(twin.parameters(), lr=0.1))
    with pytest.raises(ss.SkipscopeError, match=r"not a torch\.nn\.Module"):
        watch("model", torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ss.SkipscopeError, match="every"):
        watch(model, torch.optim.SGD(model.parameters(), lr=0.1), every=0)
    with pytest.raises(ss.SkipscopeError, match="no sink"):
        watch(model, torch.optim.SGD(model.parameters(), lr=0.1), sinks=["nowhere"])


def test_a_total_over_what_is_not_finite_is_not_finite(tmp_path):
    """A sum that leaves NaN out would show a broken step as a small one, and a wholly broken one as 0."""
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), torch.ones(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, sinks=[str(tmp_path / "run.jsonl")]) as monitor:
        for poison in (False, "one", "all"):
            optimizer.zero_grad()
            model(data).square().mean().backward()
            for p in (
                list(model.parameters())
                if poison == "all"
                else list(model.parameters())[:1]
                if poison
                else []
            ):
                p.grad.fill_(math.nan)
            optimizer.step()
    total = monitor.history.total_norm
    assert np.isfinite(total[0]) and total[0] > 0 and np.isinf(total[1:]).all()
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["total_norm"] for line in lines if line["kind"] == "step"] == [
        pytest.approx(total[0]),
        None,
        None,
    ]


def test_a_history_that_a_full_disk_has_cut_does_not_pass_for_whole(tmp_path):
    # A real full file: the limit of the operating system, in a process of its own.
    code = f"""
import resource, signal, warnings, torch
from skipscope.monitor import watch
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
warnings.simplefilter("ignore")
model = torch.nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with watch(model, optimizer, folder={str(tmp_path / "run")!r}) as monitor:
    for _ in range(200):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()
assert len(monitor.history) == 200
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = ss.load(tmp_path / "run")
    assert 0 < len(found) < 200 and not found.complete
    assert any("cut short" in note for note in found.notes)


def test_a_monitor_says_what_it_is():
    model = nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as monitor:
        assert "open: 0 steps recorded" in repr(monitor)
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert "closed: 1 step recorded" in repr(monitor)
    assert "Gradients over 1 step, 1 recorded" in str(monitor.history) and "1 weights" not in str(
        monitor.history
    )


WRONG = {
    "no model": lambda model, optimizer: watch(3, optimizer),
    "no optimizer": lambda model, optimizer: watch(model, []),
    "every": lambda model, optimizer: watch(model, optimizer, every=0),
    "part of a step": lambda model, optimizer: watch(model, optimizer, every=1.5),
    "keep": lambda model, optimizer: watch(model, optimizer, keep=0),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_watched_is_refused_with_the_cure(name):
    model = nn.Linear(3, 1)
    with pytest.raises(ss.SkipscopeError) as refusal:
        WRONG[name](model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert refusal.value.operation == "watch" and refusal.value.cure and refusal.value.got


@pytest.mark.parametrize("first_step", [0, 4])
@pytest.mark.parametrize("every", [2, 3, 5])
def test_the_first_step_and_every_nth_after_it_are_recorded(every, first_step):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, every=every, first_step=first_step) as monitor:
        for _ in range(11):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    np.testing.assert_array_equal(monitor.history.steps, first_step + np.arange(1, 12, every))
    assert not monitor.history.evaluations.any()  # there is no closure
