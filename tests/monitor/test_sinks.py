"""Sinks that need no package: a function, a table; what is none is refused."""

import csv
import importlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import skipscope as ss
from skipscope.monitor import _sinks, watch
from skipscope.monitor._record import Record
from skipscope.monitor._sinks import Csv, as_sink
from skipscope.monitor.history._live_verdict import UNKNOWN

from ._loops import Spy, agrees, loss_of, network


def train(model, optimizer, n=3):
    for _ in range(n):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def test_any_function_of_step_and_values_is_a_sink():
    model = network()
    optimizer, heard = Spy(model.parameters()), []
    with watch(model, optimizer, sinks=[lambda step, values: heard.append((step, values))]) as monitor:
        train(model, optimizer)
    assert [step for step, _ in heard] == [1, 2, 3]
    np.testing.assert_allclose(
        [v["gradients/total_norm"] for _, v in heard], monitor.history.total_norm, rtol=1e-12
    )
    assert heard[0][1]["gradient_rms/0.weight"] == monitor.history.rms[0, 0]
    assert all(isinstance(value, float) for _, values in heard for value in values.values())


def test_a_function_that_fails_is_dropped_and_the_training_goes_on():
    def fails(step, values):
        raise RuntimeError("no connection")

    model = network()
    optimizer = Spy(model.parameters())
    with pytest.warns(UserWarning, match="no connection"), watch(model, optimizer, sinks=[fails]) as monitor:
        train(model, optimizer)
    agrees(monitor.history, optimizer.received)


def test_a_table_has_a_line_for_each_parameter_and_one_for_the_whole(tmp_path):
    model = network()
    optimizer = Spy(model.parameters())
    with watch(model, optimizer, sinks=[str(tmp_path / "run.csv")]) as monitor:
        train(model, optimizer)
    rows = list(csv.DictReader((tmp_path / "run.csv").open(encoding="utf-8")))
    history = monitor.history
    assert len(rows) == 3 * (1 + len(history.parameters))
    whole = [float(row["rms"]) for row in rows if not row["parameter"]]
    np.testing.assert_array_equal(whole, history.total_norm)
    named = [row for row in rows if row["parameter"] == "2.weight"]
    np.testing.assert_array_equal([float(row["rms"]) for row in named], history.rms[:, 2])
    assert {row["state"] for row in named} == {"ok"}


@pytest.mark.parametrize("sink", [3, dict, "nowhere", None])
def test_what_is_no_sink_is_refused_with_the_cure(sink):
    model = network()
    with pytest.raises(ss.SkipscopeError) as refusal:
        watch(model, Spy(model.parameters()), sinks=[sink])
    assert refusal.value.cure and "sink" in str(refusal.value)


@pytest.mark.parametrize("sink", ["csv", "jsonl"])
def test_a_bare_ending_is_answered_with_a_file_name(sink):
    with pytest.raises(ss.SkipscopeError, match=f"run.{sink}"):
        as_sink(sink)


def test_endings_in_capitals_are_endings(tmp_path):
    sink = as_sink(str(tmp_path / "RUN.CSV"))
    assert isinstance(sink, Csv)
    sink._file.close()


def test_every_sink_stands_in_the_error_the_docstring_and_the_documentation():
    known = {*_sinks._BY_ENDING, *_sinks._BY_NAME, "terminal"}
    assert {name.partition(":")[0].removeprefix("run") for name in _sinks.SINKS} == known
    page = (Path(__file__).parents[2] / "docs" / "howto" / "watch.md").read_text(encoding="utf-8")
    docstring = " ".join((watch.__doc__ or "").split())
    with pytest.raises(ss.SkipscopeError) as refusal:
        as_sink("nowhere")
    for name in _sinks.SINKS:
        assert f'``"{name}"``' in docstring and f'`"{name}"`' in page and name in str(refusal.value)


def test_a_sink_written_in_a_folder_that_is_not_there_is_refused(tmp_path):
    model = network()
    for name in ("log.csv", "log.jsonl"):
        with pytest.raises(ss.SkipscopeError, match="cannot write"):
            watch(model, Spy(model.parameters()), sinks=[str(tmp_path / "none" / name)])


def record(step):
    one = np.array([2.0])
    ok = ("ok",)
    return Record(0, step, 0.1 * step, ("w",), one, one / 4, one, ok, 2.0, math.nan, math.nan, False, UNKNOWN)


@pytest.fixture
def logged(monkeypatch):
    """Stand-ins for mlflow and wandb, which are not installed here, and what was logged to them."""
    steps = []
    mlflow = SimpleNamespace(
        active_run=lambda: SimpleNamespace(info=SimpleNamespace(run_id="run")),
        log_metrics=lambda values, step, run_id: steps.append((step, values)),
    )
    run = SimpleNamespace(log=lambda values, commit: steps.append((values.pop("skipscope/step"), values)))
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=run, init=None))
    return steps


@pytest.mark.parametrize("name", ["mlflow:MLflow", "wandb:WandB"])
def test_each_parameters_numbers_are_logged_at_every_third_recorded_step(logged, name):
    module, _, sink = name.partition(":")
    sink = getattr(importlib.import_module(f"skipscope.monitor.{module}"), sink)(every=3)
    for step in range(5, 12):
        sink.step(record(step))
    assert [step for step, _ in logged] == list(range(5, 12))
    always = {"gradients/total_norm": 2.0, "gradients/skipped": 0.0}
    for i, (_, values) in enumerate(logged):
        assert values == always | ({} if i % 3 else {"gradient_rms/w": 2.0, "gradient_mean_abs/w": 0.5})
