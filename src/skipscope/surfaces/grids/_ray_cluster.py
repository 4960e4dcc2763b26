"""Units of work on a Ray cluster: one task per unit, with Ray's retries if a worker dies.

Models, samples and settings are put into Ray's object store once. A worker builds its evaluators on its first
unit and keeps them; it uses as many threads per point as this process, for the same result bit for bit.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn

from skipscope._data import Batches, Objective
from skipscope._errors import MissingExtra
from skipscope.surfaces._landscape_settings import Settings
from skipscope.surfaces.evaluation._strategies import PER_CORE
from skipscope.surfaces.evaluation._work_setup import open_work
from skipscope.surfaces.grids._grid_runner import Remote

_RETRIES = 5
# The work of a worker's current job.
_built: dict[str, tuple[Any, ExitStack]] = {}


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that a worker needs.

    Attributes:
        key: identifier of the job, so that a worker builds it once.
        models: the user's models.
        data: resident batches.
        loss: the objective.
        settings: settings of the call.
        axes: axes of the grid.
        strategies: each twin's strategy.
        threads: threads per point in the calling process.
    """

    key: str
    models: Mapping[str, nn.Module]
    data: Batches
    loss: Objective
    settings: Settings
    axes: tuple[np.ndarray, ...]
    strategies: dict[str, str]
    threads: int


def job(
    models: Mapping[str, nn.Module],
    data: Batches,
    loss: Objective,
    settings: Settings,
    axes: tuple[np.ndarray, ...],
    strategies: dict[str, str],
) -> Job:
    """Create a job with a unique key."""
    settings = dataclasses.replace(settings, store=None, engine="local", directions=settings.own_directions)
    # A strategy with one point per core runs each point in one thread, and so must a task.
    alone = any(name.endswith(PER_CORE) for name in strategies.values())
    threads = 1 if alone else torch.get_num_threads()
    return Job(uuid.uuid4().hex, dict(models), data, loss, settings, axes, strategies, threads)


def on_ray(job: Job) -> Remote:
    """Create a function that computes units on the cluster and yields them as they arrive.

    Raises:
        MissingExtra: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("landscape", "ray") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    cluster = ray.cluster_resources()
    needs = {"num_cpus": min(job.threads, max(1, int(cluster.get("CPU", 1))))}
    if any(p.is_cuda for model in job.models.values() for p in model.parameters()):
        needs["num_gpus"] = 1
    task = ray.remote(max_retries=_RETRIES, **needs)(compute_unit)

    def run(units: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        reference = ray.put(job)
        pending = {task.remote(reference, unit): unit for unit in units}
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1)
            yield pending.pop(done[0]), ray.get(done[0])

    return run


def compute_unit(job: Job, unit: np.ndarray) -> np.ndarray:
    """Compute one unit, in a worker."""
    if job.key not in _built:
        for _, opened in _built.values():
            opened.close()
        _built.clear()
        torch.set_num_threads(job.threads)
        _built[job.key] = open_work(job.models, job.data, job.loss, job.settings, job.axes, job.strategies)
    return _built[job.key][0](np.array(unit))
