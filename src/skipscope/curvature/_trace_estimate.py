"""Trace of a matrix from products: Hutchinson, and Hutch++ (Meyer, Musco, Musco & Woodruff 2021)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from skipscope._data import Batch
from skipscope._errors import SkipscopeError
from skipscope._progress import track
from skipscope._public_call import public_call
from skipscope._validation import require_option
from skipscope.curvature._curvature_operator import How, open_operator
from skipscope.curvature._curvature_results import TraceEstimate, stderr_of
from skipscope.curvature._lanczos import Product, own_generator
from skipscope.curvature._private_model import Selection
from skipscope.curvature._product_modes import Matrix
from skipscope.curvature._vector_memory import require_vectors

Method = Literal["hutch++", "hutchinson"]


def trace_of(
    product: Product, size: int, products: int, method: Method, seed: int, device: torch.device | str = "cpu"
) -> tuple[float, float, int]:
    """Estimate a trace. Returns it with its standard error and the number of random vectors.

    Args:
        product: multiplies the matrix with rows ``[b, size]``.
        size: dimension of the matrix.
        products: number of products to spend.
        method: "hutchinson": the mean of g'Ag over random signs g. "hutch++": a third of the products finds a
            subspace that carries most of the matrix, a third computes the trace there exactly, a third
            estimates the rest.
        seed: random seed of the vectors.
        device: device of the vectors.
    """
    generator = own_generator(seed)

    def signs() -> Tensor:
        return (torch.randint(0, 2, (1, size), generator=generator) * 2 - 1).to(device, torch.float64)

    third = min(products // 3, size) if method == "hutch++" else 0
    carried = torch.empty(third, size, dtype=torch.float64, device=device)
    for kept in track(range(third), "trace"):
        # If the rows already span the matrix's range, a random row fills up the subspace.
        if not _append_orthonormal(carried, kept, product(signs())[0]):
            other = torch.randn(size, generator=generator, dtype=torch.float64).to(device)
            _append_orthonormal(carried, kept, other)
    exact = sum(float(row @ product(row[None])[0]) for row in track(carried, "trace"))
    if third and third == size:
        return exact, 0.0, third
    rest = []
    for _ in track(range(max(2, products - 2 * third)), "trace"):
        probe = signs()
        probe.addmm_(probe @ carried.T, carried, alpha=-1)
        rest.append(float((probe * product(probe)).sum()))
    return exact + float(np.mean(rest)), stderr_of(np.array(rest)), len(rest)


def _append_orthonormal(rows: Tensor, count: int, row: Tensor) -> bool:
    """Append the normalised part of ``row`` that is orthogonal to the first ``count`` rows.

    Returns False, without appending, if that part is only rounding.
    """
    whole = float(torch.linalg.vector_norm(row))
    # Twice is enough (Giraud, Langou & Rozloznik 2005).
    for _ in range(2):
        row.addmv_(rows[:count].T, rows[:count] @ row, alpha=-1)
    rest = float(torch.linalg.vector_norm(row))
    if rest <= 1e-12 * whole:
        return False
    torch.div(row, rest, out=rows[count])
    return True


@public_call("curvature_trace")
def curvature_trace(
    model: nn.Module,
    data: Any,
    loss: Any = None,
    *,
    products: int = 60,
    method: Method = "hutch++",
    matrix: Matrix = "hessian",
    parameters: Selection = None,
    weight: Callable[[Batch], float] | None = None,
    training: bool | None = False,
    seed: int = 0,
    mode: str | None = None,
) -> TraceEstimate:
    """Trace of a loss's Hessian, with its standard error. Local under DDP.

    The trace is the mean curvature times the number of parameters.

    Args:
        model: any module; left unchanged.
        data: one batch, or a re-iterable of batches, averaged as the loss does.
        loss: ``loss(output, target)``; None when the output carries ``.loss``; or an ``@ss.objective``.
        products: number of matrix-vector products to spend.
        method: "hutch++" or "hutchinson".
        matrix: "hessian" or "gauss_newton".
        parameters: names or patterns (``"layer1.*"``); default: all that require a gradient.
        weight: weight of a batch in the mean.
        training: False runs in eval mode, True in training mode, None leaves each module's flag.
        seed: random seed of the probes and inside the model.
        mode: as in :func:`curvature_operator`.

    Raises:
        SkipscopeError: data or loss cannot be read; a product is not finite; the method is unknown; or
            the vectors of hutch++ (a third of ``products``, in float64) do not fit into memory.

    Example:
        >>> import torch, skipscope as ss
        >>> x = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
        >>> model = torch.nn.Linear(3, 1, bias=False).double()
        >>> found = ss.curvature_trace(model, (x, torch.zeros(3, 1).double()), torch.nn.functional.mse_loss)
        >>> round(found.value, 6)  # 2/N sum of x squared
        9.333333
    """
    operation = "curvature_trace"
    require_option(operation, "method", method, get_args(Method))
    if products < 2:
        raise SkipscopeError(operation, "too few products", expected="at least 2", got=products)
    how = How(matrix, parameters, weight, training, seed, mode)
    operator = open_operator(operation, model, data, loss, how)
    size, device = operator.shape[0], operator.basis_device
    kept = min(products // 3, size) if method == "hutch++" else 0
    require_vectors(
        operation,
        size,
        kept,
        6,
        device,
        lambda n: f'products={3 * n}, or method="hutchinson"' if n > 0 else None,
    )
    value, stderr, probes = trace_of(operator.apply, size, products, method, seed, device)
    return TraceEstimate(
        value=value,
        stderr=stderr,
        probes=probes,
        products=operator.products,
        method=f"{method}; {operator.method}",
        matrix=matrix,
        parameters=operator.shape[0],
    )
