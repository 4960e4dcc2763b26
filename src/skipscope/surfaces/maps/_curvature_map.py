"""|lambda_min / lambda_max| over a landscape's grid: where the loss is convex in all directions, not in two.

This is the convexity map of Li et al. (arXiv 1712.09913, section 6), for one network or for twins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import numpy as np
import torch
from torch import nn

from skipscope._data import Batch, Batches, Objective, mean_loss, read
from skipscope._errors import SkipscopeError
from skipscope._option_words import Engine, Normalization, Zeroable
from skipscope._public_call import public_call
from skipscope._sharding import refuse_spread
from skipscope._untouched import private_copy, require_module, set_mode, untouched
from skipscope._version import __version__
from skipscope.curvature import CurvatureOperator, How, Matrix, SolverOptions, open_operator, require_memory
from skipscope.shortcuts import average_statistics, unwrapped
from skipscope.surfaces._landscape_settings import Settings
from skipscope.surfaces.evaluation._point_loss import direction_hash, resident, weights_hash
from skipscope.surfaces.evaluation._twins_on_plane import (
    directions_for,
    refuse_own_directions,
    same_weights,
    stale_statistics,
)
from skipscope.surfaces.grids._grid import Sheet, axes
from skipscope.surfaces.grids._grid_runner import Runner, engine_for
from skipscope.surfaces.grids._surface_store import PLAN, Plan, Store, read_plan
from skipscope.surfaces.maps._map_result import CurvatureMap, PairedMaps
from skipscope.surfaces.maps._row_walk import NAMES, SEGMENT, Walk
from skipscope.surfaces.maps._row_workers import rows_side_by_side
from skipscope.surfaces.planes._directions import Direction
from skipscope.surfaces.planes._plane import Plane

_OPERATION = "curvature_map"


class _Options(TypedDict, total=False):
    """Options of :func:`curvature_map`, for type checkers."""

    grid: int | Sequence[int]
    span: Any
    seed: int
    store: Any
    directions: Sequence[Any] | Plane | None
    normalize: Normalization
    zero: Zeroable | Iterable[Zeroable]
    parameters: str | Iterable[str] | None
    orthogonal: bool
    samples: int | None
    tol: float
    confidence: float
    max_products: int
    basis: int | None
    matrix: Matrix
    engine: Engine
    weight: Callable[[Batch], float] | None


@overload
def curvature_map(
    model: nn.Module, data: Any, loss: Any = None, **options: Unpack[_Options]
) -> CurvatureMap: ...
@overload
def curvature_map(
    model: Mapping[str, nn.Module], data: Any, loss: Any = None, **options: Unpack[_Options]
) -> PairedMaps: ...
@public_call("curvature_map")
def curvature_map(
    model: nn.Module | Mapping[str, nn.Module],
    data: Any,
    loss: Any = None,
    *,
    grid: int | Sequence[int] = 21,
    span: Any = 1.0,
    seed: int = 0,
    store: Any = None,
    directions: Sequence[Any] | Plane | None = None,
    normalize: Normalization = "filter",
    zero: Zeroable | Iterable[Zeroable] = ("biases", "norms"),
    parameters: str | Iterable[str] | None = None,
    orthogonal: bool = False,
    samples: int | None = None,
    tol: float = 1e-2,
    confidence: float = 0.99,
    max_products: int = 300,
    basis: int | None = None,
    matrix: Matrix = "hessian",
    engine: Engine = "auto",
    weight: Callable[[Batch], float] | None = None,
) -> CurvatureMap | PairedMaps:
    """Both ends of the Hessian's spectrum at every point of a landscape's grid.

    The plane is that of :func:`landscape` with the same seed and settings, so that map and surface can be
    overlaid. Local, or shared between torchrun's ranks as a landscape is.

    Args:
        model: evaluated in eval mode; only read. Or twins, name -> model: twins that share the first one's
            weights (removed, detached) move along its directions; others along the same draw, normalised to
            their own filters. If a twin has the first one's batch-norm statistics but computes something
            else, they are measured again, with a note in the result.
        data: one batch or re-iterable batches; read once and kept.
        loss: ``loss(output, target)``; left out if the output carries ``.loss``; or ``@ss.objective``.
        grid: as in :func:`landscape`; a point costs some ten products with the Hessian.
        span: as in :func:`landscape`.
        seed: as in :func:`landscape`; also the random seed of the solver's vectors.
        store: folder to keep finished rows in, from which the same call resumes. Each twin, and a map inside
            a landscape's store, gets its own subfolder.
        directions: as in :func:`landscape`; with twins only if all share weights.
        normalize: as in :func:`landscape`.
        zero: as in :func:`landscape`.
        parameters: names or patterns of the parameters that move and that the curvature is taken in; default:
            all may move, and the curvature is taken in all that require a gradient.
        orthogonal: as in :func:`landscape`.
        samples: use a random subset of the data of this size.
        tol: largest residual, relative to max |lambda| at the point.
        confidence: required probability at the start of a row and at every sixteenth point; see
            :class:`CurvatureMap`.
        max_products: largest number of products at a point, after which it is marked as not converged.
        basis: vectors of a solve, as in :func:`extreme_eigenvalues`.
        matrix: "hessian" or "gauss_newton".
        engine: "local", "torchrun", or "auto": torchrun if there are several ranks and a store, else local.
        weight: weight of a batch in the mean over batches.

    Returns:
        A :class:`CurvatureMap`; for twins :class:`PairedMaps`.

    Raises:
        SkipscopeError: model, data, loss or settings cannot be used, or the store holds something else.

    Example:
        >>> import torch, skipscope as ss
        >>> batch = torch.randn(20, 4), torch.randn(20, 1)
        >>> found = ss.curvature_map(torch.nn.Linear(4, 1), batch, torch.nn.functional.mse_loss, grid=3)
        >>> found.ratio.shape, bool((found.smallest > 0).all())  # least squares is convex everywhere
        ((3, 3), True)
    """
    if engine == "ray":
        raise SkipscopeError(
            _OPERATION,
            "a map is not computed on Ray",
            expected="local or torchrun",
            got=engine,
            cure="several processes share one as ranks: torchrun --nproc-per-node=N, with store=",
        )
    paired = isinstance(model, Mapping)
    if paired and not model:
        raise SkipscopeError(
            _OPERATION, "no twins were given", expected='a model, or {"with": model, "without": plain}'
        )
    settings = Settings(
        grid=grid,
        span=span,
        seed=seed,
        store=store,
        directions=directions,
        normalize=normalize,
        zero=zero,
        parameters=parameters,
        orthogonal=orthogonal,
        samples=samples,
        engine=engine,
        weight=weight,
    )
    named = model if isinstance(model, Mapping) else {type(model).__name__: model}
    models = {name: unwrapped(network) for name, network in named.items()}
    for network in models.values():
        require_module(network, _OPERATION)
        refuse_spread(network, _OPERATION)
    first = next(iter(models.values()))
    at = axes(grid, span, settings.axis_count)
    held = resident(first, data, loss, samples, seed)
    batches, objective = read(first, held, loss, _OPERATION, weight=weight)
    options = SolverOptions(1, tol, confidence, basis=basis, seed=seed, max_products=max_products)
    plane = _Plane(settings, at, batches, objective, How(matrix, settings.parameters, weight), options)
    maps, notes, shared = plane.maps(models, paired)
    return PairedMaps(maps, shared, tuple(notes)) if paired else next(iter(maps.values()))


class _Plane:
    """Plane, data and solver that all maps of a call share.

    Args:
        settings: settings of the call.
        at: the grid's axes.
        data: resident batches.
        loss: the objective.
        how: options of the matrix.
        options: solver options for a point without a warm start.
    """

    def __init__(
        self,
        settings: Settings,
        at: tuple[np.ndarray, ...],
        data: Batches,
        loss: Objective,
        how: How,
        options: SolverOptions,
    ):
        self.settings, self.at, self.data, self.loss, self.how, self.options = (
            settings,
            at,
            data,
            loss,
            how,
            options,
        )

    def maps(
        self, models: Mapping[str, nn.Module], paired: bool
    ) -> tuple[dict[str, CurvatureMap], list[str], bool]:
        """Compute every model's map. Returns them, notes, and whether all share the first one's weights."""
        (first_name, first), *_ = models.items()
        centre, directions = self._centre(first), directions_for(first, self.settings, len(self.at))
        maps, notes, apart = {}, [], []
        for name, model in models.items():
            moved, shared = directions, model is first or same_weights(first, model)
            if not shared:
                refuse_own_directions(name, self.settings)
                apart.append(name)
                moved = directions_for(model, self.settings, len(self.at))
            elif stale_statistics(first, model, centre, self._centre(model)):
                model = private_copy(model, _OPERATION)
                set_mode(model, False)
                average_statistics(model, self.data, self.loss.run)
                notes.append(
                    f"{name}: batch-norm statistics measured again (they were those of {first_name})."
                )
            maps[name] = self._map(name, model, moved, name if paired else "")
        if apart:
            notes.append(
                f"{', '.join(apart)}: other weights than {first_name}; the same Gaussian draw, normalised to"
                " their own filters."
            )
        return maps, notes, not apart

    def _centre(self, model: nn.Module) -> float:
        with untouched(model, training=False, seed=0, operation=_OPERATION):
            return mean_loss(model, self.data, self.loss)

    def _map(self, name: str, model: nn.Module, moved: list[Direction], folder: str) -> CurvatureMap:
        operator = open_operator(_OPERATION, model, self.data, self.loss, self.how)
        options = replace(self.options, precision=operator.precision)
        require_memory(_OPERATION, operator.shape[0], options, operator.basis_device)
        sheet = Sheet(NAMES, tuple(len(axis) for axis in self.at))
        identity = self._identity(model, moved, operator)
        # A walk restarts at each row, or segment of a line, so that a store does not change where it starts.
        unit = sheet.shape[-1] if len(sheet.shape) > 1 else SEGMENT
        walk = Walk(operator, moved, self.at, options)
        kept = None
        if self.settings.store is not None:
            plan = Plan(identity, walk.fingerprint(), NAMES, sheet.done.size, unit, "walk")
            kept = _open(self.settings.store, folder, plan)
        engine = engine_for(self.settings.engine, kept is not None)
        with rows_side_by_side(walk, operator, sheet.done.size // unit, unit) as remote:
            runner = Runner(sheet, walk, kept, engine, f"curvature map of {name}", unit, remote)
            runner.compute(np.arange(sheet.done.size))
        result = CurvatureMap(
            name=name,
            smallest=sheet["smallest"],
            largest=sheet["largest"],
            residuals=sheet["residual"],
            probability=sheet["probability"],
            converged=sheet["converged"] == 1,
            checked=sheet["checked"] == 1,
            alphas=self.at[0],
            betas=self.at[1] if len(self.at) > 1 else np.zeros(0),
            tol=options.tol,
            confidence=options.confidence,
            products=int(np.nansum(sheet["products"])),
            differed=int(np.nansum(sheet["differs"])),
            method=operator.method,
            matrix=operator.matrix,
            parameters=operator.shape[0],
            loss_name=self.loss.name,
            seed=options.seed,
            weights_hash=identity["weights"],
            data_hash=identity["data"],
        )
        if kept is not None and runner.rank == 0:
            kept.finish(result)
        return result

    def _identity(
        self, model: nn.Module, moved: list[Direction], operator: CurvatureOperator
    ) -> dict[str, Any]:
        options = self.options
        return {
            "weights": weights_hash(model),
            "data": self.data.hash(),
            "loss": self.loss.name,
            "grid": [axis.tolist() for axis in self.at],
            "directions": direction_hash(moved),
            "parameters": list(operator.layout.names),
            "settings": {
                "map": self.how.matrix,
                "tol": options.tol,
                "confidence": options.confidence,
                "seed": options.seed,
                "max_products": options.max_products,
            },
            "versions": {"skipscope": __version__, "torch": torch.__version__},
        }


def _open(store: Any, twin: str, plan: Plan) -> Store:
    folder = Path(store)
    found = read_plan(folder) if not twin or (folder / PLAN).exists() else None
    # The folder is a landscape's store.
    if found is not None and "map" not in found.identity["settings"]:
        folder = folder / "curvature"
    if twin:
        folder = folder / re.sub(r"[^\w.-]+", "_", twin)
    return Store.opened(folder, plan)
