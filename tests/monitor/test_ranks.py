"""DDP and FSDP2 in real processes (torchrun, gloo): every rank's numbers equal a single process's on the same data."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import skipscope as ss
from needs import SHARDING_ON_CPU
from skipscope.monitor import read_history, watch
from skipscope.testing import check_shortcut

from . import ranks_worker as worker

COLUMNS = (
    "norm",
    "mean_abs",
    "norm_before_clip",
    "total_before_clip",
    "states",
    "steps",
    "flow",
    "flow_steps",
)


def torchrun(kind, processes, folder):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        str(Path(worker.__file__)), kind, str(folder),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def single(kind):
    model = worker.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    flow = {"flow_every": 2} if "flow" in kind else {}
    with watch(model, optimizer, **flow) as monitor:
        worker.train(model, optimizer, clip=0.1 if "clip" in kind else None)
    return monitor.history


def compare(kind, processes, folder):
    done = torchrun(kind, processes, folder)
    expected = single(kind)
    histories = [ss.load(folder / f"rank{rank}.json") for rank in range(processes)]
    for history in histories:
        assert history.parameters == expected.parameters
        assert history.shapes == expected.shapes
        for column in COLUMNS:
            right = getattr(expected, column)
            # JSON does not keep the shape of what is empty
            values = getattr(history, column).reshape(right.shape)
            np.testing.assert_allclose(values, right, rtol=1e-6, atol=1e-15, err_msg=column)
        assert history.verdict == histories[0].verdict
        assert history.verdict.state == expected.verdict.state
    written = ss.load(folder / "run")
    np.testing.assert_array_equal(written.norm, histories[0].norm)
    assert done.stderr.count("steps recorded") == 1  # only rank 0 speaks


def test_two_processes_ddp(tmp_path):
    compare("ddp-clip-flow", 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize(
    "kind",
    [
        *("ddp", "ddp-accumulate-clip", "ddp-flow"),
        *(
            pytest.param(f"fsdp{k}", marks=SHARDING_ON_CPU)
            for k in ("", "-clip", "-accumulate-clip", "-flow")
        ),
    ],
)
def test_processes(kind, processes, tmp_path):
    compare(kind, processes, tmp_path)


@pytest.mark.slow
@SHARDING_ON_CPU
def test_hybrid_sharding(tmp_path):
    compare("fsdp-hybrid-clip", 4, tmp_path)


@pytest.mark.slow
def test_gradients_that_are_not_reduced_are_refused(tmp_path):
    torchrun("local", 2, tmp_path)
    history = ss.load(tmp_path / "rank0.json")
    assert len(history) == 0
    assert history.verdict.state == "unknown"
    assert "not reduced before the step" in history.verdict.reason


@pytest.mark.slow
@SHARDING_ON_CPU
def test_tensor_parallel_and_sharded_on_one_mesh(tmp_path):
    compare("tensor-clip", 4, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, processes, problem",
    [
        ("old-fsdp-refused", 2, "FSDP1 flattens parameters"),
        ("tensor-part-refused", 4, "spread over only some of the ranks"),
    ],
)
def test_what_cannot_be_made_whole_is_refused_on_every_rank(kind, processes, problem, tmp_path):
    done = torchrun(kind, processes, tmp_path)
    lines = [line for line in done.stdout.splitlines() if line.startswith("REFUSED")]
    assert len(lines) == processes
    assert all(problem in line and "cure:" in line for line in lines)


@pytest.mark.slow
@SHARDING_ON_CPU
def test_what_is_collective_fails_in_time_on_a_rank_alone_and_works_again_together(tmp_path):
    """FSDP2: every forward pass needs every rank. Nothing hangs, nothing of one call is taken for another."""
    done = torchrun("fsdp-alone", 2, tmp_path)
    refused = {
        line.split()[1].rstrip(":"): line for line in done.stdout.splitlines() if line.startswith("REFUSED")
    }
    assert "WENT" not in done.stdout
    for name in ("watch", "find_shortcuts", "gradient_flow"):
        assert "not every rank called it within 2 s" in refused[name]
        assert "none on rank 1" in refused[name] and "on every rank" in refused[name]
    assert done.stdout.count("TOGETHER healthy") == 2


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("folder", "already holds a history"),
        pytest.param("sink", "no such sink", marks=pytest.mark.slow),
    ],
)
def test_what_rank_0_alone_is_refused_ends_the_call_on_every_rank(what, problem, tmp_path):
    model = worker.make()
    with watch(model, torch.optim.SGD(model.parameters(), lr=0.1), folder=tmp_path / "taken"):
        pass
    lines = torchrun(f"ddp-refused-{what}", 2, tmp_path).stdout.splitlines()
    refused = [line for line in lines if line.startswith("REFUSED rank")]
    assert sorted(line.split()[2] for line in refused) == ["0:", "1:"]
    assert all(problem in line and "cure:" in line for line in refused)


def test_watch_is_collective_under_ddp_and_without_a_wrapper(tmp_path):
    done = torchrun("ddp-alone", 2, tmp_path)
    assert "REFUSED watch: watch: not every rank called it within 2 s" in done.stdout
    assert "WENT gradient_flow" in done.stdout  # local: a model in DDP is measured as itself
    assert done.stdout.count("TOGETHER healthy") == 2


def test_every_public_function_says_whether_it_is_local_or_collective():
    functions = {name: getattr(ss, name) for name in dir(ss) if inspect.isfunction(getattr(ss, name))}
    functions |= {"read_history": read_history, "check_shortcut": check_shortcut}
    assert {"watch", "gradient_flow", "landscape", "load"} <= set(functions)
    silent = [
        n for n, f in functions.items() if not re.search(r"\b([Ll]ocal|[Cc]ollective)\b", f.__doc__ or "")
    ]
    assert not silent
