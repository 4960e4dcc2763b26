"""FSDP2 in real processes (torchrun, gloo): the ranks evaluate each point together, as one process does alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from needs import SHARDING_ON_CPU
from skipscope._ranks import RankGroup, _chunk, sendable_error

pytestmark = SHARDING_ON_CPU


def torchrun(kind, *arguments, processes=2, fails=False):
    worker = Path(__file__).parent / "sharded_worker.py"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        "--monitor-interval=2", str(worker), kind, *map(str, arguments),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert fails == bool(done.returncode), done.stderr[-6000:]
    return done.stdout


class Conv1D(nn.Module):
    """Hugging Face's layer, known by its name: it computes x W."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(12.0).reshape(3, 4) + 1)


def test_one_rank_alone_has_the_bits_of_the_whole_model(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(5, 3))

    data = torch.randn(24, 4), torch.randint(3, (24,))
    expected = ss.landscape(make(), data, F.cross_entropy, grid=3, strategy="plain")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(make(), mesh=init_device_mesh("cpu", (1,)))
        before = [(id(p), p.to_local().clone()) for p in model.parameters()]
        ours = ss.landscape(model, data, F.cross_entropy, grid=3, store=tmp_path / "store")
        assert all(
            id(p) == i and torch.equal(p.to_local(), t) for p, (i, t) in zip(model.parameters(), before)
        )
        direction = ss.random_direction(model)
        assert torch.equal(direction["0.weight"].full_tensor(), ss.random_direction(make())["0.weight"])
        for name, pair in (("stderr", ours.stderr), ("values", ours.values)):
            assert (pair == getattr(expected, name)).all(), name
        assert ours.checks.passed and model.training
        assert ours.provenance.weights_hash == expected.provenance.weights_hash
        # fully_shard puts a class of its own before it; its filters are columns all the same.
        columns = fully_shard(Conv1D(), mesh=init_device_mesh("cpu", (1,)))
        expected_columns = ss.random_direction(Conv1D())["weight"]
        assert torch.equal(ss.random_direction(columns)["weight"].full_tensor(), expected_columns)
        alone = ss.landscape(make(), data, F.cross_entropy, grid=3, store=tmp_path / "store")
        assert (alone.values == ours.values).all()  # read from the store
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [0, 1, 2, 5, 8, 9])
def test_parts_are_cut_as_fsdp_cuts_them(size, count):
    whole = torch.arange(size * 3).reshape(size, 3)
    parts = list(torch.chunk(whole, count)) + [whole[:0]] * count
    for at in range(count):
        assert torch.equal(_chunk(whole, 0, at, count), parts[at])


def test_what_one_rank_raises_all_raise():
    group = RankGroup((None,), 2, 3)
    errors = [
        None,
        sendable_error(KeyError("x")),
        sendable_error(ss.SkipscopeError("data", "it is empty", cure="fill it")),
    ]
    with pytest.raises(ss.SkipscopeError, match="call: rank 1 failed: KeyError: 'x'"):
        group.raise_first("call", errors, None)
    with pytest.raises(ss.SkipscopeError, match="rank 2 failed: it is empty") as refused:
        group.raise_first("call", [None, None, errors[2]], None)
    assert refused.value.cure == "fill it"
    with pytest.raises(OSError, match="mine"):
        group.raise_first("call", errors, OSError("mine"))
    group.raise_first("call", [None, None], None)


def test_two_ranks():
    torchrun("short")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize(
    "kind",
    [
        "directions",
        "same_data",
        "own_shares",
        "batch_norm",
        "found_whole",
        "losses",
        "sharding_options",
        "eigenvalues",
    ],
)
def test_the_ranks_measure_what_one_process_does(kind, processes):
    torchrun(kind, processes=processes)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_twins(tmp_path, processes):
    torchrun("paired", tmp_path / "pair.zarr", processes=processes)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_what_is_wrong_on_one_rank_ends_the_call_on_all_in_words(tmp_path, processes):
    torchrun("errors", tmp_path, processes=processes)


@pytest.mark.slow
def test_a_call_on_one_rank_alone_is_refused_with_the_cure():
    assert "REFUSED landscape: not every rank called it" in torchrun("alone")


@pytest.mark.slow
def test_a_lost_rank_ends_the_eigenvalues_in_words(tmp_path):
    torchrun("eigenvalues_killed", tmp_path, fails=True)
    assert "another rank was lost" in (tmp_path / "told-0.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "later"), [(2, 2), (2, 4), (4, 2)])
def test_a_lost_rank_ends_with_the_cure_and_a_store_that_resumes(tmp_path, processes, later):
    torchrun("killed", tmp_path, processes=processes, fails=True)
    told = (tmp_path / "told-0.txt").read_text()
    assert "another rank was lost" in told and "start again with the same store" in told
    kept = int(told.split("; ")[1].split(" of 81 points are kept")[0])
    assert 20 < kept < 81
    torchrun("run", tmp_path, processes=later)
    left = int((tmp_path / f"calls-{later - 1}.txt").read_text())
    again = tmp_path / "again"
    again.mkdir()
    torchrun("run", again, processes=later)
    afresh = int((again / f"calls-{later - 1}.txt").read_text())
    assert afresh - left >= kept - 3, "what was kept was computed again"
    surfaces = [ss.load(folder / "surface.zarr").values for folder in (tmp_path, again)]
    assert abs(surfaces[0] - surfaces[1]).max() <= (0.0 if later == processes else 1e-14)
