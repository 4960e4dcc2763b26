"""Both ends of the spectrum from one Lanczos run, with bounds and the probability that they are the ends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from skipscope._data import Batch
from skipscope._errors import SkipscopeError
from skipscope._public_call import public_call
from skipscope._sharding import sharded_call
from skipscope._untouched import require_module
from skipscope._validation import is_finite, is_integer
from skipscope.curvature._curvature_operator import CurvatureOperator, How, open_operator
from skipscope.curvature._curvature_results import ExtremeEigenvalues
from skipscope.curvature._eigensolver import SolverOptions, find_ends, require_memory
from skipscope.curvature._private_model import Selection
from skipscope.curvature._product_modes import Matrix
from skipscope.curvature._ranked_operator import open_ranked


@public_call("extreme_eigenvalues")
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

    Collective under FSDP2 (``fully_shard``), which has no second derivative: each rank holds a plain copy of
    all weights, their gradient and a product, and multiplies on its own batches; only rank 0 holds the basis.
    The result is the same on every rank.

    One Lanczos run gives both ends: float64 basis, full re-orthogonalisation, thick restart. A *residual*
    bounds the distance of a value to an eigenvalue. The *probability*, over the random start, that no
    eigenvalue lies farther out holds for every matrix (see ``_certificate``). ``converged`` requires both.

    Args:
        model: any module; left unchanged.
        data: one batch, or a re-iterable of batches, averaged as the loss does. Under FSDP2 the batches of
            all ranks together, read once and kept; identical batches on every rank, in one order, count once.
        loss: ``loss(output, target)``; None when the output carries ``.loss``; or an ``@ss.objective``.
        k: eigenvalues wanted at each end.
        tol: largest residual, relative to max |lambda|.
        matrix: "hessian" or "gauss_newton".
        parameters: names or patterns (``"layer1.*"``); default: all that require a gradient.
        vectors: keep the eigenvectors, as directions for a landscape (``.direction("largest")``).
        block: start vectors of a run; for k > 1, more of them find multiple eigenvalues sooner.
        confidence: required probability; 0 requires the residuals only.
        max_products: matrix-vector products after which the solver stops, converged or not.
        basis: vectors kept before a thick restart, in float64; default: as many as 1 GiB holds, from ``4 k +
            4 block + 20`` to 300. The peak is at most 1.3 times that. A basis that does not fit into free
            memory is refused, and the error names the ``basis`` that fits.
        weight: weight of a batch in the mean.
        training: False runs in eval mode, True in training mode, None leaves each module's flag.
        seed: random seed of the start vector and inside the model.
        mode: as in :func:`curvature_operator`.

    Raises:
        SkipscopeError: data or loss cannot be read; a product is not finite (the batch is named); or ``k``,
            ``tol``, ``block`` are out of range; or the basis does not fit into memory.

    Example:
        >>> import torch, skipscope as ss
        >>> x = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
        >>> model = torch.nn.Linear(3, 1, bias=False).double()
        >>> data = x, torch.zeros(3, 1).double()
        >>> ends = ss.extreme_eigenvalues(model, data, torch.nn.functional.mse_loss)
        >>> ends.converged, ends.largest.round(6), ends.smallest.round(6)  # 2/N x'x
        (True, array([6.]), array([0.666667]))
    """
    operation = "extreme_eigenvalues"
    how = How(matrix, parameters, weight, training, seed, mode)
    options = SolverOptions(k, tol, confidence, block, basis, max_products, seed)
    require_module(model, operation)
    with sharded_call([model], operation, _lost_rank) as group:
        if group is None:
            operator = open_operator(operation, model, data, loss, how)
            return ends_of(operator, options, vectors=vectors, operation=operation)
        ranked = open_ranked(operation, model, data, loss, how, group)
        solve = functools.partial(ends_of, ranked, options, vectors=vectors, operation=operation)
        return ranked.solved_by_first(solve)


def _lost_rank() -> SkipscopeError:
    return SkipscopeError(
        "extreme_eigenvalues",
        "another rank was lost, or did not answer: all ranks make each product together",
        expected="every rank until the end",
        cure="start it again: it begins from the first product",
    )


def ends_of(
    operator: CurvatureOperator,
    options: SolverOptions,
    *,
    vectors: bool = False,
    operation: str = "extreme_eigenvalues",
) -> ExtremeEigenvalues:
    """Compute :func:`extreme_eigenvalues` of an existing operator."""
    size, k = operator.shape[0], options.k
    count = "a whole number, at least 1"
    for name, holds, expected in (
        ("k", is_integer(k, 1, size), f"a whole number from 1 to {size}, the number of parameters"),
        ("tol", is_finite(options.tol) and 0 < options.tol < 1, "between 0 and 1, relative to max |lambda|"),
        ("block", is_integer(options.block), count),
        (
            "confidence",
            is_finite(options.confidence) and 0 <= options.confidence < 1,
            "at least 0 and below 1",
        ),
        ("max_products", is_integer(options.max_products), count),
    ):
        if not holds:
            got = repr(getattr(options, name))
            raise SkipscopeError(operation, f"{name} is out of range", expected=expected, got=got)
    options = replace(options, precision=operator.precision)
    require_memory(operation, size, options, operator.basis_device)
    found = find_ends(operator.apply, size, options, device=operator.basis_device)
    low, high = found.order(k)
    return ExtremeEigenvalues(
        smallest=found.values[low],
        largest=found.values[high],
        smallest_residuals=found.residuals[low],
        largest_residuals=found.residuals[high],
        converged=found.converged,
        probability=max(0.0, 1.0 - found.miss_probability),
        confidence=options.confidence,
        tol=options.tol,
        products=operator.products,
        method=operator.method,
        matrix=operator.matrix,
        parameters=size,
        block=options.block,
        noise=found.noise,
        asymmetry=found.asymmetry / found.scale if found.scale else 0.0,
        layout=operator.layout,
        smallest_vectors=found.vectors[low].cpu().numpy() if vectors else None,
        largest_vectors=found.vectors[high].cpu().numpy() if vectors else None,
        loss_name=operator.model.objective.name,
    )
