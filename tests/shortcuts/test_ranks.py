"""DDP and FSDP2 in real processes (torchrun, gloo): what is found, read and trained is what one process has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from needs import SHARDING_ON_CPU


def torchrun(kind, processes=2):
    worker = Path(__file__).parent / "ranks_worker.py"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        str(worker), kind,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def test_two_ranks_of_ddp():
    torchrun("ddp_short")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize(
    "kind",
    [
        *(pytest.param(f"fsdp_{k}", marks=SHARDING_ON_CPU) for k in ("find", "options", "measure", "edit")),
        "tensor_parallel",
        "spread_stream",
        "collectives",
    ],
)
def test_sharded(kind, processes):
    torchrun(kind, processes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "ddp_batch_norm"])
def test_ddp_with_four_ranks_and_batch_norm(kind):
    torchrun(kind, 4)


@pytest.mark.slow
def test_a_sharded_model_asked_on_one_rank_alone_is_refused_with_the_cure():
    out = torchrun("fsdp_alone")
    assert "REFUSED find_shortcuts: not every rank called it" in out
    assert "call find_shortcuts on every rank" in out
