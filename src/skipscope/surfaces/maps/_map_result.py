"""Result of a curvature map: both ends of the Hessian's spectrum on a landscape's grid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from skipscope._numbers import short
from skipscope._result import Table
from skipscope.surfaces.results._grid_exports import Exported, Layer


@dataclass(frozen=True, eq=False)
class CurvatureMap(Exported):
    """Smallest and largest eigenvalue of the Hessian at every point of a plane or line in weight space.

    Attributes:
        name: name of the network.
        smallest: smallest eigenvalue ``[a, b]``; nan where the loss is not finite.
        largest: largest eigenvalue ``[a, b]``.
        residuals: bound on the distance of both to an eigenvalue ``[a, b]``.
        probability: probability, over the random starts, that no eigenvalue lies farther out ``[a, b]``: by
            more than the tolerance where ``checked``, by more than half of max |lambda| elsewhere.
        converged: whether the residual is within the tolerance and the probability at least ``confidence``
            where ``checked``, 90 % elsewhere ``[a, b]``.
        checked: whether the probability holds for the tolerance; elsewhere the solver only continued from
            neighbours ``[a, b]``.
        alphas: the first axis ``[a]``.
        betas: the second axis ``[b]``; empty for a line.
        tol: tolerance, relative to max |lambda| at a point.
        confidence: required probability where ``checked``.
        products: matrix-vector products of the whole map.
        differed: number of checks that found the preceding points wrong, so that those were solved again.
        method: how products were computed.
        matrix: "hessian" or "gauss_newton".
        parameters: number of parameters, the size of the matrix.
        loss_name: name of the loss.
        seed: random seed of directions and solver.
        weights_hash: hash of the model's parameters and buffers.
        data_hash: hash of the data.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = torch.nn.Linear(4, 1), (torch.randn(20, 4), torch.randn(20, 1))
        >>> found = ss.curvature_map(model, data, torch.nn.functional.mse_loss, grid=3)
        >>> found.smallest.shape, bool(found.converged.all())
        ((3, 3), True)
    """

    name: str
    smallest: np.ndarray
    largest: np.ndarray
    residuals: np.ndarray
    probability: np.ndarray
    converged: np.ndarray
    checked: np.ndarray
    alphas: np.ndarray
    betas: np.ndarray
    tol: float
    confidence: float
    products: int
    differed: int
    method: str
    matrix: str
    parameters: int
    loss_name: str
    seed: int
    weights_hash: str
    data_hash: str

    def __post_init__(self):
        # A loaded file holds numbers instead of booleans.
        for name in ("converged", "checked"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=bool))

    @property
    def ratio(self) -> np.ndarray:
        """|lambda_min / lambda_max| ``[a, b]``, as in the paper: near 0 where the loss is nearly convex."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.abs(self.smallest / self.largest)

    @property
    def convex(self) -> np.ndarray:
        """Whether no eigenvalue is below zero by more than its bound ``[a, b]``; False if not converged."""
        return self.converged & (self.smallest >= -self.residuals)

    def table(self) -> Table:
        """Table that summarises the map."""
        ratio = self.ratio[self.converged]
        rows = [
            ["grid", " x ".join(str(n) for n in self.smallest.shape)],
            ["|lambda_min / lambda_max|, median", short(float(np.median(ratio)) if ratio.size else None)],
            ["the same, largest", short(float(ratio.max()) if ratio.size else None)],
            ["largest lambda_max", short(_extreme(np.nanmax, self.largest))],
            ["smallest lambda_min", short(_extreme(np.nanmin, self.smallest))],
            ["share of points that are convex", short(float(self.convex.mean()))],
            ["points not converged", short(int((~self.converged).sum()))],
        ]
        notes = [
            (
                f"{self.products:,} products ({self.method}), {self.products / self.smallest.size:.1f} a"
                f" point; {self.parameters:,} parameters; tolerance {short(self.tol)} of max |lambda|."
            ),
            (
                f"At {int(self.checked.sum())} points nothing is farther out by more than the tolerance"
                f" with probability {100 * self.confidence:g} %, at the others by more than half of max"
                f" |lambda| with 90 %; {self.differed} checks found a wrong value, and the points before"
                " it were solved again."
            ),
            "Convex: no eigenvalue below zero by more than its bound.",
        ]
        return Table(f"curvature map of {self.name}", ["what", "value"], rows, notes)

    def layers(self) -> Iterator[Layer]:
        yield self.layer()

    def layer(self, name: str = "") -> Layer:
        """The map's values on its grid; ``name`` distinguishes several maps."""
        columns = {
            "smallest": self.smallest,
            "largest": self.largest,
            "ratio": self.ratio,
            "residuals": self.residuals,
            "probability": self.probability,
            "converged": self.converged,
            "checked": self.checked,
        }
        return Layer(name or self.name, self.alphas, self.betas, columns, name)


@dataclass(frozen=True, eq=False)
class PairedMaps(Exported):
    """Curvature maps of twins on one plane: with shortcuts and without.

    Attributes:
        maps: twin -> map.
        shared_weights: whether every twin has the first twin's weights (removed, detached, other strength).
        notes: what was done to make the maps comparable, and what must not be compared.

    Example:
        >>> import torch, skipscope as ss
        >>> twins = {"one": torch.nn.Linear(4, 1), "other": torch.nn.Linear(4, 1)}
        >>> data = torch.randn(20, 4), torch.randn(20, 1)
        >>> pair = ss.curvature_map(twins, data, torch.nn.functional.mse_loss, grid=3)
        >>> list(pair.maps), pair.shared_weights
        (['one', 'other'], False)
    """

    maps: dict[str, CurvatureMap]
    shared_weights: bool
    notes: tuple[str, ...]

    def table(self) -> Table:
        """Table that summarises the maps side by side."""
        tables = {name: found.table() for name, found in self.maps.items()}
        first = next(iter(tables.values()))
        rows = [
            [str(row[0]), *(table.rows[i][1] for table in tables.values())]
            for i, row in enumerate(first.rows)
        ]
        spent = ", ".join(f"{name} {found.products:,}" for name, found in self.maps.items())
        notes = [*self.notes, f"Products: {spent}.", first.notes[-1]]
        return Table("curvature maps", ["what", *tables], rows, notes)

    def layers(self) -> Iterator[Layer]:
        for name, found in self.maps.items():
            yield found.layer(name)


def _extreme(function, values: np.ndarray) -> float | None:
    return float(function(values)) if np.isfinite(values).any() else None
