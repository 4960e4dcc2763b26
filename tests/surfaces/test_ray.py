"""The same units on a Ray cluster: the same bits, and a killed worker's unit is done again."""

import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope._errors import MissingExtra

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    paths = os.pathsep.join(__import__("sys").path)
    ray.init(
        num_cpus=2,
        log_to_driver=False,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    yield ray
    ray.shutdown()


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def _data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(50, 6, generator=generator), torch.randint(4, (50,), generator=generator)


def test_ray_gives_the_same_bits(cluster, tmp_path):
    own = ss.landscape(_model(), _data(), F.cross_entropy, grid=(9, 7), strategy="plain")
    there = ss.landscape(_model(), _data(), F.cross_entropy, grid=(9, 7), strategy="plain", engine="ray")
    assert np.array_equal(own.values, there.values) and np.array_equal(own.stderr, there.stderr)
    stored = ss.landscape(
        _model(), _data(), F.cross_entropy, grid=(9, 7), strategy="plain", engine="ray", store=tmp_path / "s"
    )
    assert np.array_equal(own.values, stored.values) and np.array_equal(
        ss.load(tmp_path / "s").values, own.values
    )


def test_a_worker_killed_in_flight_costs_its_unit_only(cluster, tmp_path):
    marker, driver = tmp_path / "killed", os.getpid()

    def deadly(output, target):
        if os.getpid() != driver and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return F.cross_entropy(output, target)

    own = ss.landscape(_model(), _data(), F.cross_entropy, grid=(9, 7), strategy="plain")
    there = ss.landscape(_model(), _data(), deadly, grid=(9, 7), strategy="plain", engine="ray")
    assert marker.exists() and np.array_equal(own.values, there.values)


def test_without_ray_the_install_command_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"skipscope\[ray\]"):
        ss.landscape(_model(), _data(), F.cross_entropy, grid=3, engine="ray")


def test_a_point_a_core_on_ray_is_a_task_a_core(cluster):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    options = {"grid": (9, 7), "strategy": "plain, a point a core"}
    try:
        own = ss.landscape(_model(), _data(), F.cross_entropy, **options)
        there = ss.landscape(_model(), _data(), F.cross_entropy, engine="ray", **options)
    finally:
        torch.set_num_threads(threads)
    assert own.provenance.strategy == there.provenance.strategy == options["strategy"]
    assert np.array_equal(own.values, there.values) and np.array_equal(own.stderr, there.stderr)
