"""Results of curvature measurements: extreme eigenvalues, spectral density and trace."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from skipscope._errors import SkipscopeError
from skipscope._numbers import short
from skipscope._result import Result, Table

if TYPE_CHECKING:
    from torch import Tensor

End = Literal["smallest", "largest"]
_MATRICES = {"hessian": "Hessian", "gauss_newton": "Gauss-Newton matrix"}


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the parameters in a flat vector.

    Attributes:
        names: the parameters, in the order of the vector.
        shapes: shape of each parameter.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Length of the flat vector."""
        return sum(math.prod(shape) for shape in self.shapes)

    def cut(self, vector: np.ndarray) -> dict[str, Tensor]:
        """Split a flat vector ``[size]`` into tensors by parameter name."""
        import torch

        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        parts = np.split(np.asarray(vector, dtype=float), ends[:-1])
        return {
            name: torch.tensor(p).reshape(shape)
            for name, shape, p in zip(self.names, self.shapes, parts, strict=True)
        }


@dataclass(frozen=True, eq=False)
class ExtremeEigenvalues(Result):
    """Both ends of the spectrum of a loss's Hessian (or Gauss-Newton matrix), each with a bound.

    Attributes:
        smallest: the k smallest eigenvalues ``[k]``, the smallest first.
        largest: the k largest ``[k]``, the largest first.
        smallest_residuals: for each of ``smallest`` a bound on its distance to the nearest eigenvalue
            ``[k]``.
        largest_residuals: the same for ``largest``.
        converged: every residual is at most ``tol`` times max |lambda|, and ``probability`` is at least
            ``confidence``.
        probability: probability, over the random start, that no eigenvalue lies beyond the reported ends by
            more than the tolerance.
        confidence: the requested probability.
        tol: the requested tolerance, relative to max |lambda|.
        products: matrix-vector products spent.
        method: how products were computed, and the solver.
        matrix: "hessian" or "gauss_newton".
        parameters: number of parameters, the size of the matrix.
        block: start vectors of a run.
        noise: estimated rounding error of the products, already included in the residuals.
        asymmetry: largest |u'Hv - v'Hu| seen, relative to max |lambda|.
        layout: names and shapes of the parameters in an eigenvector.
        smallest_vectors: eigenvectors of ``smallest`` ``[k, parameters]``, or None if not requested.
        largest_vectors: eigenvectors of ``largest``, or None if not requested.
        loss_name: name of the loss.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = torch.nn.Linear(4, 1), (torch.randn(20, 4), torch.randn(20, 1))
        >>> ends = ss.extreme_eigenvalues(model, data, torch.nn.functional.mse_loss, k=2)
        >>> ends.largest.shape, ends.converged, bool(ends.smallest[0] > 0)
        ((2,), True, True)
    """

    smallest: np.ndarray
    largest: np.ndarray
    smallest_residuals: np.ndarray
    largest_residuals: np.ndarray
    converged: bool
    probability: float
    confidence: float
    tol: float
    products: int
    method: str
    matrix: str
    parameters: int
    block: int
    noise: float
    asymmetry: float
    layout: Layout
    smallest_vectors: np.ndarray | None = None
    largest_vectors: np.ndarray | None = None
    loss_name: str = ""

    @property
    def residuals(self) -> np.ndarray:
        """Residuals of ``smallest``, then of ``largest`` ``[2 k]``."""
        return np.concatenate([self.smallest_residuals, self.largest_residuals])

    @property
    def scale(self) -> float:
        """Max |lambda|, which the tolerance is relative to."""
        return float(max(abs(self.smallest[0]), abs(self.largest[0])))

    @property
    def ratio(self) -> float:
        """|lambda_min / lambda_max|: near 0 if the surface is almost convex; nan for a zero matrix."""
        return float(abs(self.smallest[0] / self.largest[0])) if self.largest[0] else math.nan

    def direction(self, end: End = "largest", index: int = 0) -> dict[str, Tensor]:
        """Eigenvector as tensors by parameter name, usable as a direction of a landscape.

        Args:
            end: ``"largest"`` or ``"smallest"``.
            index: which of the k at that end, the outermost first.

        Raises:
            SkipscopeError: the eigenvectors were not kept, or ``end`` or ``index`` is out of range.
        """
        if end not in ("largest", "smallest") or not 0 <= index < len(self.largest):
            raise SkipscopeError(
                "direction",
                "there is no such eigenvector",
                got=f"end={end!r}, index={index!r}",
                expected=f'end="largest" or "smallest", index= from 0 to {len(self.largest) - 1}',
                cure=f'direction("largest", {end})' if isinstance(end, int) else None,
            )
        vectors = self.smallest_vectors if end == "smallest" else self.largest_vectors
        if vectors is None:
            raise SkipscopeError(
                "direction", "the eigenvectors were not kept", cure="extreme_eigenvalues(..., vectors=True)"
            )
        return self.layout.cut(vectors[index])

    def table(self) -> Table:
        """Table of the eigenvalues with their bounds."""
        rows = [
            [
                f"{end} {i + 1}" if len(self.largest) > 1 else end,
                f"{value:.6g}",
                f"+- {short(float(bound), 2)}",
            ]
            for end, values, bounds in (
                ("largest", self.largest, self.largest_residuals),
                ("smallest", self.smallest, self.smallest_residuals),
            )
            for i, (value, bound) in enumerate(zip(values, bounds, strict=True))
        ]
        notes = [
            ("Converged" if self.converged else "NOT converged")
            + f": tolerance {short(self.tol)} of max |lambda|; {self.parameters:,} parameters,"
            f" {self.products} products ({self.method}).",
            (
                "+- bounds the distance to an eigenvalue. That none is farther out by more than the"
                f" tolerance holds with probability {_percent(self.probability)}, over the random start."
            ),
        ]
        if self.noise > self.tol * self.scale:
            notes.append(
                f"The products' own error ({short(self.noise, 2)}) is above the tolerance: use float64, or"
                " see whether the loss draws random numbers of its own or has a backward pass that cannot be"
                " differentiated."
            )
        return Table(
            f"Both ends of the {_MATRICES[self.matrix]}",
            ["end", "lambda", "bound"],
            rows,
            notes,
        )


@dataclass(frozen=True, eq=False)
class SpectralDensity(Result):
    """The distribution of a matrix's eigenvalues, by stochastic Lanczos quadrature.

    Attributes:
        grid: values of lambda at which the density is given ``[points]``.
        density: probability density of the eigenvalues; integrates to 1 ``[points]``.
        low, high: 95 % band over probes ``[points]``.
        bandwidth: standard deviation of the Gaussian that widens each node.
        nodes: Ritz values of each probe ``[probes, steps]``; nan after a probe that ended early.
        weights: share of eigenvalues that each node represents ``[probes, steps]``.
        negative_share: share of eigenvalues below ``-cut``.
        negative_share_stderr: standard error over probes, combined with the change from half the steps.
        negative_mass: sum of |lambda| over negative eigenvalues, divided by the sum over all.
        negative_mass_stderr: standard error over probes, combined with the change from half the steps.
        trace: sum of the eigenvalues.
        trace_stderr: standard error over probes.
        cut: |lambda| below which an eigenvalue counts as zero.
        products: matrix-vector products spent.
        method: how products were computed.
        matrix: "hessian" or "gauss_newton".
        parameters: number of parameters, the size of the matrix.
        loss_name: name of the loss.
        half_nodes: nodes at half the steps, for the errors ``[probes, steps]``.
        half_weights: weights of ``half_nodes``.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = torch.nn.Linear(4, 1), (torch.randn(20, 4), torch.randn(20, 1))
        >>> rho = ss.spectral_density(model, data, torch.nn.functional.mse_loss, probes=3, points=50)
        >>> rho.grid.shape, rho.negative_share
        ((50,), 0.0)
    """

    grid: np.ndarray
    density: np.ndarray
    low: np.ndarray
    high: np.ndarray
    bandwidth: float
    nodes: np.ndarray
    weights: np.ndarray
    negative_share: float
    negative_share_stderr: float
    negative_mass: float
    negative_mass_stderr: float
    trace: float
    trace_stderr: float
    cut: float
    products: int
    method: str
    matrix: str
    parameters: int
    loss_name: str = ""
    half_nodes: np.ndarray | None = None
    half_weights: np.ndarray | None = None

    def effective_dimension(self, ridge: float) -> tuple[float, float]:
        """Effective dimension, the sum of lambda+ / (lambda+ + ridge), and its standard error.

        The sum is over all eigenvalues; lambda+ is max(lambda, 0).

        Args:
            ridge: the curvature at which a direction counts half, e.g. the weight decay times the samples.

        Raises:
            SkipscopeError: ``ridge`` is not positive.
        """
        if not ridge > 0:
            raise SkipscopeError(
                "effective_dimension", "the ridge is not positive", expected="a number > 0", got=ridge
            )

        def of(nodes: np.ndarray, weights: np.ndarray) -> np.ndarray:
            above = np.clip(np.nan_to_num(nodes), 0, None)
            return self.parameters * (weights * above / (above + ridge)).sum(1)

        probes = of(self.nodes, self.weights)
        if self.half_nodes is None or self.half_weights is None:
            return float(probes.mean()), stderr_of(probes)
        return float(probes.mean()), error_of(probes, of(self.half_nodes, self.half_weights))

    def table(self) -> Table:
        """Table of the spectrum's ends, trace and negative shares."""
        rows = [
            ["smallest node", short(float(np.nanmin(self.nodes))), ""],
            ["largest node", short(float(np.nanmax(self.nodes))), ""],
            ["trace", short(self.trace), f"+- {short(self.trace_stderr, 2)}"],
            [
                "share of eigenvalues that are negative",
                short(self.negative_share),
                f"+- {short(self.negative_share_stderr, 2)}",
            ],
            [
                "share of curvature that is negative",
                short(self.negative_mass),
                f"+- {short(self.negative_mass_stderr, 2)}",
            ],
        ]
        notes = [
            (
                f"{self.parameters:,} parameters; {len(self.nodes)} random probes of {self.nodes.shape[1]}"
                f" steps, {self.products} products ({self.method}); +- is one standard error over probes,"
                " with what doubling the steps still changed."
            ),
            (
                f"An eigenvalue within {short(self.cut)} of zero counts as zero. The outermost nodes lie"
                " inside the spectrum; extreme_eigenvalues gives the ends with bounds."
            ),
        ]
        return Table(
            f"Spectral density of the {_MATRICES[self.matrix]}",
            ["quantity", "value", "error"],
            rows,
            notes,
        )


@dataclass(frozen=True, eq=False)
class TraceEstimate(Result):
    """Trace of a matrix, estimated from random probes.

    Attributes:
        value: the estimate.
        stderr: standard error over probes; 0 if the probes span the whole space.
        probes: number of random probes.
        products: matrix-vector products spent.
        method: "hutchinson" or "hutch++", and how products were computed.
        matrix: "hessian" or "gauss_newton".
        parameters: number of parameters, the size of the matrix.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = torch.nn.Linear(4, 1), (torch.randn(20, 4), torch.randn(20, 1))
        >>> trace = ss.curvature_trace(model, data, torch.nn.functional.mse_loss)
        >>> trace.parameters, trace.value > 0, trace.stderr  # exact: as many products as parameters
        (5, True, 0.0)
    """

    value: float
    stderr: float
    probes: int
    products: int
    method: str
    matrix: str
    parameters: int

    def table(self) -> Table:
        """Table of the trace and its standard error."""
        return Table(
            f"Trace of the {_MATRICES[self.matrix]}",
            ["trace", "standard error"],
            [[self.value, self.stderr]],
            [
                f"{self.parameters:,} parameters; {self.probes} probes, {self.products} products"
                f" ({self.method})."
            ],
        )


def error_of(values: np.ndarray, at_half: np.ndarray) -> float:
    """Standard error of a mean over probes, combined with the mean's change when the steps double."""
    return math.hypot(stderr_of(values), float(values.mean() - at_half.mean()))


def stderr_of(values: np.ndarray) -> float:
    """Standard error of a mean; nan for a single value."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _percent(probability: float) -> str:
    return f"> {99.99} %" if probability > 0.9999 else f"{100 * probability:.4g} %"
