"""Extreme Hessian eigenvalues at each point of a grid, each solve started from its neighbours' results.

Neighbours have nearly the same outermost eigenvectors, so a row is processed from one end. Its first point is
solved without a warm start; each later point starts near a linear extrapolation of the last two points'
eigenvectors. A solve stops as soon as no eigenvalue is likely to lie grossly farther out. At every sixteenth
point it continues until it is as certain as without a warm start, which the random part of the start allows.
If the ends then move, another eigenvalue has become outermost, and the points since the last such check are
solved again without a warm start.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from skipscope._errors import SkipscopeError
from skipscope.curvature import CurvatureOperator, Ends, SolverOptions, find_ends, gaussian_blocks
from skipscope.surfaces.grids._surface_store import AWAY
from skipscope.surfaces.planes._directions import Direction

NAMES = ["smallest", "largest", "residual", "probability", "converged", "products", "checked", "differs"]
# Columns after which a walk starts again.
SEGMENT = 64
# Columns between two points whose ends must be as certain as without a warm start.
_CHECK = 16
# For so few parameters the whole space costs no more products than a walk, so every point is certain.
_SMALL = 32
# Confidence and margin elsewhere: the probability that no eigenvalue lies farther out by more than this share
# of max |lambda|.
SCREENING = (0.9, 0.5)


class Walk:
    """Solve grid points one after another along a row.

    Args:
        operator: the matrix; its parameters move.
        directions: one direction per axis.
        at: the axes.
        options: solver options for a point without a warm start.
    """

    def __init__(
        self,
        operator: CurvatureOperator,
        directions: list[Direction],
        at: tuple[np.ndarray, ...],
        options: SolverOptions,
    ):
        self.operator, self.directions, self.at, self.options = operator, directions, at, options
        parameters = operator.model.module.named_parameters()
        self.origin = {n: p.detach().clone() for n, p in parameters if any(n in d for d in directions)}

    def __call__(self, flat: np.ndarray) -> np.ndarray:
        """Compute the values at flat grid indices ``[names, points]``."""
        out, row = np.full((len(NAMES), len(flat)), np.nan), len(self.at[-1])
        before: list[Tensor] = []
        # Points since the last check.
        unchecked: list[int] = []
        for i, index in enumerate(flat):
            column = int(index % row) % SEGMENT
            before = before if column else []
            out[:, i], before = self._point(int(index), before, check=column % _CHECK == 0)
            number = dict(zip(NAMES, out[:, i], strict=True))
            if number["differs"] == 1:
                for j in unchecked:
                    spent = out[NAMES.index("products"), j]
                    out[:, j], _ = self._point(int(flat[j]), [], check=True)
                    out[NAMES.index("products"), j] += spent
                self._move(int(index))
            unchecked = [] if number["checked"] == 1 else [*unchecked, i]
        return out

    def fingerprint(self) -> dict[str, float]:
        """Loss, and norm of the matrix times a fixed vector, at the origin and two corners of the plane.

        Another loss or another choice of parameters gives other values.
        """
        operator, found = self.operator, {}
        vector = gaussian_blocks(operator.shape[0], 0, operator.basis_device)(1)
        last = math.prod(len(axis) for axis in self.at) - 1
        for place, index in (("at the origin", None), (f"{AWAY}, corner 1", 0), (f"{AWAY}, corner 2", last)):
            if index is None:
                operator.move_to(self.origin)
            else:
                self._move(index)
            found[f"loss {place}"] = operator.loss()
            try:
                found[f"curvature {place}"] = float(operator.apply(vector).norm())
            except SkipscopeError:
                found[f"curvature {place}"] = math.nan
        return found

    def _point(self, index: int, before: list[Tensor], check: bool) -> tuple[np.ndarray, list[Tensor]]:
        self._move(index)
        near = _continued(before) if before else None
        certain, spent = check or near is None or self.operator.shape[0] <= _SMALL, 0
        try:
            found = self._solve(index, near, certain)
            if near is not None and not found.converged:
                spent, certain = found.products, True
                found = self._solve(index, None, certain)
        except SkipscopeError:
            # Far out, the loss may not be finite.
            return np.array([math.nan] * 4 + [0.0, math.nan, 0.0, 0.0]), []
        low, high = found.order(1)[:, 0]
        numbers = [
            found.values[low],
            found.values[high],
            found.residuals[[low, high]].max(),
            max(0.0, 1 - found.miss_probability),
            float(found.converged),
            spent + found.products,
            float(certain),
            float(self._moved(found)),
        ]
        vectors = found.vectors[[low, high]]
        return np.array(numbers), [vectors, *before[:1]]

    def _solve(self, index: int, near: Tensor | None, certain: bool) -> Ends:
        options = replace(self.options, seed=self.options.seed + 7919 * (index + 1))
        if not certain:
            options = replace(options, confidence=SCREENING[0], margin=SCREENING[1])
        elif near is not None:
            options = replace(options, screening=SCREENING)
        operator = self.operator
        return find_ends(operator.apply, operator.shape[0], options, device=operator.basis_device, near=near)

    def _moved(self, found: Ends) -> bool:
        """Whether stopping as early as at the points between checks would have given other ends."""
        if found.screened is None:
            return False
        ends = found.values[found.order(1)[:, 0]]
        return bool(np.abs(ends - found.screened).max() > 2 * self.options.tol * found.scale)

    def _move(self, index: int) -> None:
        place = np.unravel_index(index, tuple(len(axis) for axis in self.at))
        values = dict(self.origin)
        for axis, i, direction in zip(self.at, place, self.directions, strict=True):
            for name, step in direction.items():
                if axis[i]:
                    values[name] = values[name] + float(axis[i]) * step.to(values[name])
        self.operator.move_to(values)


def _continued(before: list[Tensor]) -> Tensor:
    """Extrapolate eigenvectors ``[2, n]`` to the next point, from the last one or two points."""
    last = before[0]
    if len(before) == 1:
        return last
    inner = (last * before[1]).sum(1, keepdim=True)
    line = 2 * last - inner.sign() * before[1]
    # After a large turn it is another eigenvector, which cannot be extrapolated.
    return torch.where(inner.abs() > 0.8, line / line.norm(dim=1, keepdim=True), last)
