"""DDP and FSDP2 in real processes (torchrun, gloo): every rank's numbers equal a single process's on the same data."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import skipscope as ss
from skipscope.monitor import watch

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
    "kind", ["ddp", "ddp-accumulate-clip", "fsdp", "fsdp-clip", "fsdp-accumulate-clip", "ddp-flow"]
)
def test_processes(kind, processes, tmp_path):
    compare(kind, processes, tmp_path)


@pytest.mark.slow
def test_flow_under_fsdp(tmp_path):
    """FSDP2 hides the weights of the branches, so boundaries are modules; those that both runs have are equal."""
    torchrun("fsdp-flow", 2, tmp_path)
    expected = single("fsdp-flow")
    history = ss.load(tmp_path / "rank1.json")
    for name in ("input", "first", "head"):
        found, right = (h.flow[:, h.boundaries.index(name)] for h in (history, expected))
        np.testing.assert_allclose(found, right, rtol=1e-6, err_msg=name)
    assert any("modules, not shortcuts" in note for note in history.notes)


@pytest.mark.slow
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
def test_a_call_on_one_rank_alone_fails_with_the_cure(tmp_path):
    done = torchrun("one-rank", 2, tmp_path)
    assert "REFUSED watch: not every rank called it within 2 s" in done.stdout
    assert "none on rank 1" in done.stdout
    assert "call ss.watch on every rank" in done.stdout
