"""|lambda_min / lambda_max| over a landscape's grid: where the loss is convex in all directions, not in two.

The convexity map of Li et al. (arXiv 1712.09913, section 6). Neighbours have nearly the same outermost eigenvectors, so
a row is walked from one end: its first point is solved afresh, each next one starts near the eigenvectors of the two
before it, continued in a straight line. What such a walk could miss is an eigenvalue that overtakes from elsewhere: at
every eighth point it is solved afresh as well, and when the two differ the points since the last check are solved anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skipscope._data import Batch, mean_loss, read
from skipscope._errors import SkipscopeError
from skipscope._untouched import untouched
from skipscope._version import __version__
from skipscope.curvature import CurvatureOperator, Ends, Matrix, Wish, find_ends, open_operator
from skipscope.surfaces._directions import Direction
from skipscope.surfaces._grid import Sheet, axes
from skipscope.surfaces._map_result import CurvatureMap
from skipscope.surfaces._planes import Plane
from skipscope.surfaces._points import data_hash, hash_of, resident, weights_hash
from skipscope.surfaces._runner import Runner, engine_for
from skipscope.surfaces._settings import Settings
from skipscope.surfaces._store import Plan, Store, check_plan, read_plan
from skipscope.surfaces._twins import directions_for

_NAMES = ["smallest", "largest", "residual", "probability", "converged", "products", "checked", "differs"]
_CHECK = 8  # columns between two points that are solved afresh as well
_SEGMENT = 64  # columns after which a walk starts anew
_REACH = 0.1  # for a point of a walk: how far out, of max |lambda|, the stated probability looks


def curvature_map(
    model: nn.Module,
    data: Any,
    loss: Any = None,
    *,
    grid: int | Sequence[int] = 21,
    span: Any = 1.0,
    seed: int = 0,
    store: Any = None,
    directions: Sequence[Any] | Plane | None = None,
    normalize: str = "filter",
    zero: Iterable[str] = ("biases", "norms"),
    orthogonal: bool = False,
    samples: int | None = None,
    tol: float = 1e-2,
    confidence: float = 0.99,
    max_products: int = 300,
    matrix: Matrix = "hessian",
    engine: str = "auto",
    weight: Callable[[Batch], float] | None = None,
) -> CurvatureMap:
    """Both ends of the Hessian's spectrum at every point of a landscape's grid.

    The plane is that of :func:`landscape` with the same seed and settings, so that the two lie on top of each other; and
    a twin made by :func:`ablate` has the same directions as its original, so that two maps can be held side by side.
    Local, or shared between torchrun's ranks as a landscape is.

    Args:
        model: in eval mode; only read.
        data: one batch or re-iterable batches; read once and kept.
        loss: ``loss(output, target)``; left out when the output carries ``.loss``; or ``@ss.objective``.
        grid: as in :func:`landscape`; a point costs some ten products with the Hessian.
        span: as in :func:`landscape`.
        seed: as in :func:`landscape`; of the solver's random vectors too.
        store: a folder to keep finished rows in, where the same call resumes; inside a landscape's store it takes a folder
            of its own.
        directions: as in :func:`landscape`.
        normalize: as in :func:`landscape`.
        zero: as in :func:`landscape`.
        orthogonal: as in :func:`landscape`.
        samples: use a random subset of the data of this size.
        tol: largest residual, relative to max |lambda| at the point.
        confidence: the probability asked for where a point is solved afresh.
        max_products: at one point; after these it is marked as not converged.
        matrix: "hessian" or "gauss_newton".
        engine: "local", "torchrun", or "auto": the ranks when there are some and a store, else local.
        weight: what a batch counts for in the mean over batches.

    Raises:
        SkipscopeError: model, data, loss or settings that cannot be used, or a store that holds something else.

    Example:
        >>> import torch, skipscope as ss
        >>> batch = torch.randn(20, 4), torch.randn(20, 1)
        >>> found = ss.curvature_map(torch.nn.Linear(4, 1), batch, torch.nn.functional.mse_loss, grid=3)
        >>> found.ratio.shape, bool((found.smallest > 0).all())  # least squares is convex everywhere
        ((3, 3), True)
    """
    operation = "curvature_map"
    settings = Settings(
        grid=grid, span=span, seed=seed, store=store, directions=directions, normalize=normalize, zero=zero,
        orthogonal=orthogonal, samples=samples, engine=engine, weight=weight,
    )  # fmt: skip
    if engine == "ray":
        raise SkipscopeError(
            operation, "a map is not computed on Ray", expected="local or torchrun", got=engine
        )
    model = getattr(model, "_orig_mod", model)  # curvature is measured on the uncompiled module, by its names
    at = axes(grid, span, settings.axis_count)
    held = resident(model, data, loss, samples, seed)
    batches, objective = read(model, held, loss, operation, weight=weight)
    operator = open_operator(operation, model, held, loss, matrix=matrix, weight=weight)
    with untouched(model, training=False, seed=0, operation=operation):
        centre = mean_loss(model, batches, objective)
    moved = directions_for(model, settings, len(at))
    wish = Wish(1, tol, confidence, seed=seed, max_products=max_products, precision=operator.precision)
    sheet = Sheet(_NAMES, tuple(len(axis) for axis in at))
    identity = {
        "weights": weights_hash(model), "data": data_hash(held), "loss": objective.name, "grid": [a.tolist() for a in at],
        "directions": hash_of(t for d in moved for t in d.values()),
        "settings": {"map": matrix, "tol": tol, "confidence": confidence, "seed": seed, "max_products": max_products},
        "versions": {"skipscope": __version__, "torch": torch.__version__},
    }  # fmt: skip
    kept = _open(store, Plan(identity, [centre], _NAMES, sheet.done.size, min(len(at[-1]), _SEGMENT), "walk"))
    runner = Runner(
        sheet, Walk(operator, moved, at, wish), kept, engine_for(engine, kept is not None), "curvature map"
    )
    _fill(runner, sheet)
    result = _result(type(model).__name__, sheet, at, operator, wish, identity)
    if kept is not None and runner.rank == 0:
        kept.finish(result)
    return result


def _fill(runner: Runner, sheet: Sheet) -> None:
    """Row by row, so that with or without a store a walk starts at the same points."""
    everything = np.arange(sheet.done.size)
    if runner.store is not None:
        runner.compute(everything)
        return
    for row in everything.reshape(-1, sheet.shape[-1]):
        runner.compute(row)


def _open(store: Any, plan: Plan) -> Store | None:
    if store is None:
        return None
    folder = Path(store)
    found = read_plan(folder)
    if found is not None and "map" not in found.identity["settings"]:  # a landscape's
        folder = folder / "curvature"
        found = read_plan(folder)
    if found is None:
        return Store.create(folder, plan)
    check_plan(found, plan, folder)
    return Store(folder, found)


class Walk:
    """The numbers at grid points, along a row.

    Args:
        operator: the matrix; its parameters move.
        directions: of the axes.
        at: the axes.
        wish: what is asked of a point that is solved afresh.
    """

    def __init__(
        self, operator: CurvatureOperator, directions: list[Direction], at: tuple[np.ndarray, ...], wish: Wish
    ):
        self.operator, self.directions, self.at, self.wish = operator, directions, at, wish
        parameters = operator.model.module.named_parameters()
        self.origin = {n: p.detach().clone() for n, p in parameters if any(n in d for d in directions)}

    def __call__(self, flat: np.ndarray) -> np.ndarray:
        """The numbers at flat grid indices ``[names, points]``."""
        out, row = np.full((len(_NAMES), len(flat)), np.nan), len(self.at[-1])
        before: list[Tensor] = []
        unchecked: list[int] = []  # points of the walk since the last that was solved afresh
        for i, index in enumerate(flat):
            column = int(index % row) % _SEGMENT
            before = before if column else []
            out[:, i], before = self._point(int(index), before, check=column % _CHECK == 0)
            number = dict(zip(_NAMES, out[:, i], strict=True))
            if number["differs"] == 1:
                for j in unchecked:
                    spent = out[_NAMES.index("products"), j]
                    out[:, j], _ = self._point(int(flat[j]), [], check=True)
                    out[_NAMES.index("products"), j] += spent
                self._move(int(index))
            unchecked = [] if number["checked"] == 1 else [*unchecked, i]
        return out

    def _point(self, index: int, before: list[Tensor], check: bool) -> tuple[np.ndarray, list[Tensor]]:
        self._move(index)
        try:
            walked = self._solve(index, near=_continued(before)) if before else None
            afresh = self._solve(index) if check or walked is None or not walked.converged else None
        except SkipscopeError:  # not finite: far out a loss may be
            return np.array([math.nan] * 4 + [0.0, math.nan, 0.0, 0.0]), []
        found = afresh or walked
        assert found is not None
        low, high = found.order(1)[:, 0]
        differs = (
            walked is not None and afresh is not None and walked.converged and self._differ(walked, afresh)
        )
        numbers = [
            found.values[low], found.values[high], found.residuals[[low, high]].max(), max(0.0, 1 - found.doubt),
            float(found.converged), sum(e.products for e in (walked, afresh) if e), float(afresh is not None), float(differs),
        ]  # fmt: skip
        vectors = found.vectors[[low, high]]
        return np.array(numbers), [vectors, *before[:1]]

    def _solve(self, index: int, near: Tensor | None = None) -> Ends:
        wish = replace(self.wish, seed=self.wish.seed + 7919 * (index + 1))
        if near is not None:
            wish = replace(wish, confidence=0.0, margin=_REACH)
        operator = self.operator
        return find_ends(operator.apply, operator.shape[0], wish, device=operator.basis_device, near=near)

    def _differ(self, a: Ends, b: Ends) -> bool:
        ends = [found.values[found.order(1)[:, 0]] for found in (a, b)]
        return bool(np.abs(ends[0] - ends[1]).max() > 2 * self.wish.tol * max(a.scale, b.scale))

    def _move(self, index: int) -> None:
        place = np.unravel_index(index, tuple(len(axis) for axis in self.at))
        values = dict(self.origin)
        for axis, i, direction in zip(self.at, place, self.directions, strict=True):
            for name, step in direction.items():
                if axis[i]:
                    values[name] = values[name] + float(axis[i]) * step.to(values[name])
        self.operator.move_to(values)


def _continued(before: list[Tensor]) -> Tensor:
    """Eigenvectors at the next point ``[2, n]``, from those at the last one or two."""
    last = before[0]
    if len(before) == 1:
        return last
    inner = (last * before[1]).sum(1, keepdim=True)
    line = 2 * last - inner.sign() * before[1]
    # Where they turned by much it is another eigenvector, and there is no line to follow.
    return torch.where(inner.abs() > 0.8, line / line.norm(dim=1, keepdim=True), last)


def _result(
    name: str,
    sheet: Sheet,
    at: tuple[np.ndarray, ...],
    operator: CurvatureOperator,
    wish: Wish,
    identity: dict[str, Any],
) -> CurvatureMap:
    return CurvatureMap(
        name=name,
        smallest=sheet["smallest"],
        largest=sheet["largest"],
        residuals=sheet["residual"],
        probability=sheet["probability"],
        converged=sheet["converged"] == 1,
        checked=sheet["checked"] == 1,
        alphas=at[0],
        betas=at[1] if len(at) > 1 else np.zeros(0),
        tol=wish.tol,
        confidence=wish.confidence,
        products=int(np.nansum(sheet["products"])),
        differed=int(np.nansum(sheet["differs"])),
        method=operator.method,
        matrix=operator.matrix,
        parameters=operator.shape[0],
        loss_name=identity["loss"],
        seed=wish.seed,
        weights_hash=identity["weights"],
        data_hash=identity["data"],
    )
