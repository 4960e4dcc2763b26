"""Spectral density by stochastic Lanczos quadrature (Golub & Meurant 1994; Lin, Saad & Yang 2016).

A random unit vector's Lanczos run of m steps gives nodes and weights of a Gauss rule for its spectral
measure, exact for polynomials up to degree 2m - 1. The mean of that measure over random vectors is the
density of eigenvalues.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from skipscope._data import Batch
from skipscope._errors import SkipscopeError
from skipscope._numbers import student_quantile
from skipscope._progress import track
from skipscope._public_call import public_call
from skipscope.curvature._curvature_operator import How, open_operator
from skipscope.curvature._curvature_results import SpectralDensity, error_of, stderr_of
from skipscope.curvature._lanczos import Draw, Krylov, Product, gaussian_blocks
from skipscope.curvature._private_model import Selection
from skipscope.curvature._product_modes import Matrix
from skipscope.curvature._vector_memory import require_vectors


def quadrature(product: Product, size: int, steps: int, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    """Lanczos quadrature of one random vector's spectral measure: nodes and weights ``[2, steps]``.

    After an early end the nodes are nan and the weights 0. The first row is the full rule; the second uses
    half of the steps, and the difference between the two shows the resolution. If the run found an invariant
    subspace, the rule is exact and both are the same.
    """
    probe = draw(1)
    rows = torch.empty(steps + 1, size, dtype=torch.float64, device=probe.device)
    run = Krylov(product, size, steps, draw, rows, probe[:0])
    run.start(probe)
    while run.filled < steps and not run.exhausted and not run.invariant:
        run.step()
    exact = run.exhausted or run.invariant
    nodes, weights = np.full((2, steps), np.nan), np.zeros((2, steps))
    for row, used in enumerate((run.filled, run.filled if exact else max(1, run.filled // 2))):
        part = torch.from_numpy(run.projected[:used, :used].copy())
        values, vectors = (t.numpy() for t in torch.linalg.eigh(part))
        nodes[row, :used], weights[row, :used] = values, vectors[0] ** 2
    return nodes, weights


@public_call("spectral_density")
def spectral_density(
    model: nn.Module,
    data: Any,
    loss: Any = None,
    *,
    probes: int = 10,
    steps: int = 40,
    points: int = 400,
    bandwidth: float | None = None,
    cut: float = 1e-4,
    matrix: Matrix = "hessian",
    parameters: Selection = None,
    weight: Callable[[Batch], float] | None = None,
    training: bool | None = False,
    seed: int = 0,
    mode: str | None = None,
) -> SpectralDensity:
    """Eigenvalue density of a loss's Hessian, with a band over random probes. Local under DDP.

    Args:
        model: any module; left unchanged.
        data: one batch, or a re-iterable of batches, averaged as the loss does.
        loss: ``loss(output, target)``; None when the output carries ``.loss``; or an ``@ss.objective``.
        probes: random vectors, at least 2; the band narrows with their square root.
        steps: products per probe; more of them resolve the spectrum better.
        points: number of grid points.
        bandwidth: standard deviation of the Gaussian that widens each node; default: the spectrum's width /
            steps.
        cut: eigenvalues within this fraction of max |lambda| of zero count as zero in the shares.
        matrix: "hessian" or "gauss_newton".
        parameters: names or patterns (``"layer1.*"``); default: all that require a gradient.
        weight: weight of a batch in the mean.
        training: False runs in eval mode, True in training mode, None leaves each module's flag.
        seed: random seed of the probes and inside the model.
        mode: as in :func:`curvature_operator`.

    Raises:
        SkipscopeError: data or loss cannot be read; a product is not finite; ``probes``, ``steps`` or
            ``points`` is too small; or the vectors of a run (``steps + 6`` of the parameters' size, in
            float64) do not fit into memory.

    Example:
        >>> import torch, skipscope as ss
        >>> x = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
        >>> model = torch.nn.Linear(3, 1, bias=False).double()
        >>> rho = ss.spectral_density(model, (x, torch.zeros(3, 1).double()), torch.nn.functional.mse_loss)
        >>> rho.nodes[0, :3].round(6)  # 2/N x'x: 2/3, 8/3, 6
        array([0.666667, 2.666667, 6.      ])
    """
    operation = "spectral_density"
    for name, value, least in (("probes", probes, 2), ("steps", steps, 1), ("points", points, 2)):
        if value < least:
            raise SkipscopeError(operation, f"{name} is too small", expected=f"at least {least}", got=value)
    how = How(matrix, parameters, weight, training, seed, mode)
    operator = open_operator(operation, model, data, loss, how)
    size, device = operator.shape[0], operator.basis_device
    steps = min(steps, size)
    require_vectors(operation, size, steps, 6, device, lambda n: f"steps={n}" if n > 1 else None)
    draw = gaussian_blocks(size, seed, device)
    found = [quadrature(operator.apply, size, steps, draw) for _ in track(range(probes), "spectral density")]
    nodes, weights = (np.stack(parts, axis=1) for parts in zip(*found, strict=True))
    numbers = _summary(nodes, weights, size, cut)
    (nodes, half_nodes), (weights, half_weights) = nodes, weights
    return SpectralDensity(
        **_curve(nodes, weights, points, bandwidth),
        **numbers,
        nodes=nodes,
        weights=weights,
        products=operator.products,
        method=operator.method,
        matrix=matrix,
        parameters=size,
        loss_name=operator.model.objective.name,
        half_nodes=half_nodes,
        half_weights=half_weights,
    )


def _curve(nodes: np.ndarray, weights: np.ndarray, points: int, bandwidth: float | None) -> dict[str, Any]:
    low, high = float(np.nanmin(nodes)), float(np.nanmax(nodes))
    width = bandwidth or (high - low) / nodes.shape[1] or max(abs(high), 1.0) * 1e-3
    grid = np.linspace(low - 4 * width, high + 4 * width, points)
    shapes = np.exp(-0.5 * ((grid - np.nan_to_num(nodes)[..., None]) / width) ** 2) / (
        width * np.sqrt(2 * np.pi)
    )
    each = (weights[..., None] * shapes).sum(1)  # [probes, points]
    half = student_quantile(0.975, len(each) - 1) * each.std(0, ddof=1) / np.sqrt(len(each))
    density = each.mean(0)
    return {
        "grid": grid,
        "density": density,
        "low": np.clip(density - half, 0, None),
        "high": density + half,
        "bandwidth": width,
    }


def _summary(nodes: np.ndarray, weights: np.ndarray, size: int, cut: float) -> dict[str, Any]:
    """Shares, trace and their errors, from both rules ``[2, probes, steps]``."""
    values = np.nan_to_num(nodes)
    edge = cut * float(np.abs(values[0]).max())
    share, half_share = (weights * (values < -edge)).sum(2)
    negative = (weights * np.clip(-values, 0, None)).sum(2)
    total = (weights * np.abs(values)).sum(2)
    mass, half_mass = negative / np.where(total > 0, total, 1.0)
    # The first moment of a Gauss rule is exact, so the trace needs no rule at half the steps.
    trace = size * (weights[0] * values[0]).sum(1)
    return {
        "cut": edge,
        "negative_share": float(share.mean()),
        "negative_share_stderr": error_of(share, half_share),
        "negative_mass": float(negative[0].sum() / total[0].sum()) if total[0].sum() else 0.0,
        "negative_mass_stderr": error_of(mass, half_mass),
        "trace": float(trace.mean()),
        "trace_stderr": stderr_of(trace),
    }
