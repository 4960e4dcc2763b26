"""``gradient_correlation``: correlation of input gradients of different samples (Balduzzi et al. 2017).

For each sample i, g_i is the gradient with respect to its input (the first boundary) of a fixed scalar: the
loss, or the output along a fixed random direction. The correlation of two samples is the cosine between g_i
and g_j. Balduzzi et al. find that it falls like 2^-L in plain ReLU networks of depth L, and like 1/sqrt(L)
with shortcuts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from skipscope._data import Batch, batch_size, tensors_in
from skipscope._errors import SkipscopeError
from skipscope._model_calls import no_gradient
from skipscope._public_call import public_call
from skipscope._subject import prepare
from skipscope._validation import require_option
from skipscope.flow._flow_measures import GradientCorrelation
from skipscope.flow.passes._gradient_seed import backward_error
from skipscope.shortcuts import tap_boundaries


@public_call("gradient_correlation")
def gradient_correlation(
    model: nn.Module,
    data: Any,
    loss: Any = None,
    *,
    of: Literal["output", "loss"] = "output",
    pairs: int = 2000,
    bins: int = 8,
    seed: int = 0,
    weight: Callable[[Batch], float] | None = None,
) -> GradientCorrelation:
    """Correlate the input gradients of pairs of samples, against the distance between their inputs.

    Local; under FSDP2 collective: every rank calls it.

    Args:
        model: any eager module, run in its current modes and restored afterwards.
        data: see :func:`gradient_flow`; only the first batch is used, with at least two samples.
        loss: see :func:`gradient_flow`; only needed with ``of="loss"``, or to find the output.
        of: scalar to differentiate: the ``"output"`` along a random direction common to all samples (as in
            Balduzzi et al.), or the ``"loss"``, whose targets differ.
        pairs: most pairs, drawn at random.
        bins: number of rows in the summary.
        seed: seed of the pairs, the direction and the random numbers drawn inside.
        weight: batch -> its weight in the mean over batches.

    Raises:
        SkipscopeError: fewer than two samples, or no gradient reaches the input.

    Example:
        >>> import skipscope as ss
        >>> linear = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        >>> data = torch.randn(16, 8), torch.zeros(16, 2)
        >>> round(ss.gradient_correlation(linear, data, nn.MSELoss()).mean, 6)
        1.0
    """
    require_option("gradient_correlation", "quantity", of, ("output", "loss"))
    subject = prepare(model, data, loss, "gradient_correlation", weight=weight)
    points, batch = subject.boundaries, subject.data.first()
    with subject.running(seed):
        inputs, gradients = _gradients(subject.model, batch, subject.loss, points[0], of, seed)
    n = min(inputs.shape[0], batch_size(batch))
    if n < 2:
        raise SkipscopeError(
            "gradient_correlation",
            "there is nothing to compare",
            expected="a batch of two samples or more",
            got=f"{n}",
        )
    x, g = inputs[:n].flatten(1).double(), gradients[:n].flatten(1).double()
    first, second = _pairs(n, pairs, seed)
    distances = (x[first] - x[second]).norm(dim=1)
    lengths = g.norm(dim=1)
    cosines = (g[first] * g[second]).sum(1) / (lengths[first] * lengths[second])
    alive = torch.isfinite(cosines)
    d, c = distances[alive].cpu().numpy(), cosines[alive].cpu().numpy()
    lost = int((~alive).sum())
    notes = (f"{lost} pairs were left out: a sample without gradient.",) if lost else ()
    return GradientCorrelation(
        d, c, float(c.mean()) if len(c) else math.nan, _binned(d, c, bins), points[0].name, notes
    )


def _gradients(
    model: nn.Module, batch: Batch, objective: Any, point: Any, of: str, seed: int
) -> tuple[Tensor, Tensor]:
    """Activations at a boundary and the gradient with respect to them, with a row for each sample."""
    reached: list[Tensor] = []
    outputs: list[Any] = []

    def reach(_: int, activation: Tensor) -> Tensor:
        reached.append(activation.detach().requires_grad_())
        return reached[-1].clone()

    handle = model.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        with tap_boundaries(model, (point,), reach):
            value = objective(model, batch)
    finally:
        handle.remove()
    if of == "output":
        output = (
            next((t for t in tensors_in(outputs[-1]) if t.requires_grad and t.ndim > 0), None)
            if outputs
            else None
        )
        if output is not None:
            draw = torch.Generator().manual_seed(seed)
            direction = torch.randn(output[:1].shape, generator=draw).to(output)
            value = (output * direction).sum()
    if not value.requires_grad or not reached:
        raise no_gradient("gradient_correlation", model)
    try:
        (gradient,) = torch.autograd.grad(value, reached[0], allow_unused=True)
    except RuntimeError as error:
        raise backward_error("gradient_correlation", error) from error
    if gradient is None:
        raise SkipscopeError(
            "gradient_correlation",
            f"no gradient reaches {point.name}",
            layer=point.name,
            cure="ss.gradient_flow says where the network comes apart",
        )
    return reached[0].detach(), gradient


def _pairs(n: int, most: int, seed: int) -> tuple[Tensor, Tensor]:
    if n * (n - 1) // 2 <= most:
        both = torch.triu_indices(n, n, 1)
        return both[0], both[1]
    draw = torch.Generator().manual_seed(seed)
    first = torch.randint(n, (most,), generator=draw)
    return first, (first + torch.randint(1, n, (most,), generator=draw)) % n


def _binned(
    distances: np.ndarray, correlations: np.ndarray, bins: int
) -> tuple[tuple[float, float, int], ...]:
    order = np.argsort(distances, kind="stable")
    parts = [part for part in np.array_split(order, min(bins, len(order))) if len(part)] if len(order) else []
    return tuple((float(distances[p].mean()), float(correlations[p].mean()), len(p)) for p in parts)
