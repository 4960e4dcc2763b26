"""Both ends of the spectrum from one Lanczos run, with bounds, and with the probability that they are the ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skipscope._data import Batch
from skipscope._errors import SkipscopeError
from skipscope._progress import track
from skipscope.curvature._certificate import chance_unseen
from skipscope.curvature._lanczos import Krylov, Product, begin
from skipscope.curvature._operator import CurvatureOperator, Matrix, open_operator
from skipscope.curvature._private import Selection
from skipscope.curvature._results import ExtremeEigenvalues

_BASIS_BYTES = 1 << 30
_ASYMMETRY = 0.02  # of max |lambda|: more is no rounding, and no bound of a symmetric matrix holds


@dataclass
class Ends:
    """What the solver found, for any symmetric matrix.

    Attributes:
        values: the k smallest, ascending, then the k largest, descending ``[2, k]``.
        residuals: their bounds ``[2, k]``.
        vectors: their vectors ``[2, k, n]``, or None.
        probability: that no eigenvalue lies beyond the ends by more than the tolerance.
        converged: residuals and probability are as asked.
        run: the run.
    """

    values: np.ndarray
    residuals: np.ndarray
    vectors: Tensor | None
    probability: float
    converged: bool
    run: Krylov


def find_ends(
    product: Product,
    size: int,
    *,
    k: int = 1,
    tol: float = 1e-3,
    confidence: float = 0.99,
    block: int = 1,
    seed: int = 0,
    basis: int | None = None,
    max_products: int = 1000,
    device: torch.device | str = "cpu",
    vectors: bool = False,
) -> Ends:
    """The k smallest and the k largest eigenvalues of a symmetric matrix known by products.

    Args:
        product: the matrix times rows ``[b, size]``.
        size: n.
        k: eigenvalues wanted at each end.
        tol: largest residual, relative to max |lambda|.
        confidence: the probability wanted.
        block: start vectors.
        seed: of the start.
        basis: vectors kept before a thick restart; default: as many as 1 GiB holds, at most 300.
        max_products: after these it stops, converged or not.
        device: where the basis lives.
        vectors: return eigenvectors.
    """
    block = min(block, size)
    room = basis or int(np.clip(_BASIS_BYTES / (8 * size), 4 * k + 4 * block + 20, 300))
    run = begin(product, size, block=block, room=max(room, 2 * k + 3 * block + 2), seed=seed, device=device)
    for _ in track(_until_done(max_products, run), "Lanczos"):
        run.step()
        found = _judge(run, k, tol, confidence, block)
        if found.converged or run.exhausted:
            break
        if run.filled + run.width > run.room:
            run.restart(_worth_keeping(run.filled, k, block))
    if vectors:
        chosen = _ends_of(run.filled, k)
        coordinates = run.ritz()[1][:, chosen.reshape(-1)]
        found.vectors = run.vectors(coordinates).reshape(*chosen.shape, size)
    return found


def _until_done(max_products: int, run: Krylov) -> Iterator[int]:
    step = 0
    while step == 0 or run.products + run.width <= max_products:
        yield step
        step += 1


def _ends_of(filled: int, k: int) -> np.ndarray:
    """Indices of the k smallest, then of the k largest (descending), of ``filled`` ascending values ``[2, k]``."""
    k = min(k, filled)
    return np.array([range(k), range(filled - 1, filled - 1 - k, -1)])


def _worth_keeping(filled: int, k: int, block: int) -> np.ndarray:
    """Indices kept at a thick restart: the wanted ends, and as much beside them as leaves half the room."""
    each = min(k + max(2 * block, filled // 5), (filled - block) // 2)
    return np.r_[0:each, filled - each : filled]


def _judge(run: Krylov, k: int, tol: float, confidence: float, block: int) -> Ends:
    values, _, residuals = run.ritz()
    chosen = _ends_of(run.filled, k)
    scale = float(max(abs(values[0]), abs(values[-1])))
    bounds = residuals[chosen]
    good = chosen.shape[1] == k and bool((bounds <= tol * scale).all() or (scale == 0.0 and run.noise == 0.0))
    probability = 0.0
    if good or run.exhausted:
        below, above = values[0] - tol * scale, values[-1] + tol * scale
        probability = max(0.0, 1.0 - chance_unseen(run, below, block) - chance_unseen(run, above, block))
    symmetric = run.asymmetry <= _ASYMMETRY * scale
    return Ends(
        values[chosen], bounds, None, probability, good and symmetric and probability >= confidence, run
    )


def extreme_eigenvalues(
    model: nn.Module,
    data: Any,
    loss: Any = None,
    *,
    k: int = 1,
    tol: float = 1e-3,
    matrix: Matrix = "hessian",
    parameters: Selection = None,
    vectors: bool = False,
    block: int = 1,
    confidence: float = 0.99,
    max_products: int = 1000,
    basis: int | None = None,
    weight: Callable[[Batch], float] | None = None,
    training: bool | None = False,
    seed: int = 0,
    mode: str | None = None,
) -> ExtremeEigenvalues:
    """The smallest and the largest eigenvalues of a loss's Hessian, each with a bound. Local under DDP.

    One Lanczos run gives both ends: float64 basis, twice re-orthogonalised, thick restart. Three things are told apart:
    the *residual* bounds the distance of each number to an eigenvalue; the *probability* says how surely no eigenvalue
    lies farther out (see ``_certificate``: it holds for every matrix, over the random start); ``converged`` is both.

    Args:
        model: any module; left as found.
        data: one batch, or a re-iterable of batches, averaged as the loss does.
        loss: ``loss(output, target)``; None when the output carries ``.loss``; or an ``@ss.objective``.
        k: eigenvalues wanted at each end.
        tol: largest residual, relative to max |lambda|.
        matrix: "hessian" or "gauss_newton".
        parameters: names or patterns (``"layer1.*"``); default: all that require a gradient.
        vectors: keep the eigenvectors, as directions for a landscape (``.direction("largest")``).
        block: start vectors: an eigenvalue that occurs several times is seen up to ``block`` times.
        confidence: the probability wanted; 0 asks for the residuals alone.
        max_products: after these it stops, converged or not.
        basis: vectors kept before a thick restart; default: as many as 1 GiB holds, at most 300.
        weight: what a batch counts for in the mean.
        training: False runs in eval mode, True in training mode, None leaves each module's flag.
        seed: of the start vector, and of random numbers inside the model.
        mode: as in :func:`curvature_operator`.

    Raises:
        SkipscopeError: data or loss cannot be read; a product is not finite (the batch is named); or ``k``, ``tol``,
            ``block`` are out of range.

    Example:
        >>> import torch, skipscope as ss
        >>> x = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
        >>> model = torch.nn.Linear(3, 1, bias=False).double()
        >>> ends = ss.extreme_eigenvalues(model, (x, torch.zeros(3, 1).double()), torch.nn.functional.mse_loss)
        >>> ends.converged, ends.largest.round(6), ends.smallest.round(6)  # 2/N x'x
        (True, array([6.]), array([0.666667]))
    """
    operation = "extreme_eigenvalues"
    operator = open_operator(
        operation,
        model,
        data,
        loss,
        matrix=matrix,
        parameters=parameters,
        weight=weight,
        training=training,
        seed=seed,
        mode=mode,
    )
    return ends_of(
        operator, k=k, tol=tol, vectors=vectors, block=block, confidence=confidence, max_products=max_products, basis=basis,
        seed=seed, operation=operation,
    )  # fmt: skip


def ends_of(
    operator: CurvatureOperator,
    *,
    k: int = 1,
    tol: float = 1e-3,
    vectors: bool = False,
    block: int = 1,
    confidence: float = 0.99,
    max_products: int = 1000,
    basis: int | None = None,
    seed: int = 0,
    operation: str = "extreme_eigenvalues",
) -> ExtremeEigenvalues:
    """:func:`extreme_eigenvalues` of an operator that is at hand."""
    size = operator.shape[0]
    for name, value, good, expected in (
        ("k", k, 1 <= k <= size, f"1 to {size}, the number of parameters"),
        ("tol", tol, 0 < tol < 1, "between 0 and 1, relative to max |lambda|"),
        ("block", block, block >= 1, "at least 1"),
        ("confidence", confidence, 0 <= confidence < 1, "at least 0 and below 1"),
    ):
        if not good:
            raise SkipscopeError(operation, f"{name} is out of range", expected=expected, got=value)
    device = operator.device if operator.device.type != "mps" else "cpu"  # Apple's GPUs have no float64
    found = find_ends(
        operator.apply, size, k=k, tol=tol, confidence=confidence, block=block, seed=seed, basis=basis,
        max_products=max_products, device=device, vectors=vectors,
    )  # fmt: skip
    scale = float(np.abs(found.values).max())
    kept = found.vectors.cpu().numpy() if found.vectors is not None else (None, None)
    return ExtremeEigenvalues(
        smallest=found.values[0], largest=found.values[1],
        smallest_residuals=found.residuals[0], largest_residuals=found.residuals[1],
        converged=found.converged, probability=found.probability, confidence=confidence, tol=tol,
        products=operator.products, method=operator.method, matrix=operator.matrix, parameters=size, block=block,
        noise=found.run.noise, asymmetry=found.run.asymmetry / scale if scale else 0.0, layout=operator.layout,
        smallest_vectors=kept[0], largest_vectors=kept[1], loss_name=operator.model.objective.name,
    )  # fmt: skip
