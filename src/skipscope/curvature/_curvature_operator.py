"""The Hessian or Gauss-Newton matrix of a loss over data, as a linear operator.

The loss over several batches is their weighted mean (or sum), and so is its matrix; products are summed in
float64. The modes are tried on the first batch, the cheapest first; the mode that is used is reported.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from skipscope._data import Batch, Batches, Objective
from skipscope._errors import SkipscopeError
from skipscope._public_call import public_call
from skipscope._rank_batches import RankBatches
from skipscope._sharding import refuse_spread
from skipscope._subject import prepare
from skipscope._untouched import random_state_kept, require_module
from skipscope._validation import require_option
from skipscope.curvature._curvature_results import Layout
from skipscope.curvature._hessian_products import Tangent
from skipscope.curvature._lanczos import own_generator
from skipscope.curvature._private_model import PrivateModel, Selection, private_model
from skipscope.curvature._product_modes import Matrix, graph_bytes, select_mode

_MEMORY = 1 << 30


@dataclass(frozen=True)
class How:
    """Options of :func:`curvature_operator`."""

    matrix: Matrix = "hessian"
    parameters: Selection = None
    weight: Callable[[Batch], float] | None = None
    training: bool | None = False
    seed: int = 0
    mode: str | None = None
    memory: int = _MEMORY


class CurvatureOperator:
    """Matrix of second derivatives of a loss, known only through matrix-vector products.

    Created by :func:`curvature_operator`, whose result is also a ``scipy.sparse.linalg.LinearOperator``.
    Keeps a copy of the model as it was at that time.

    Attributes:
        dtype: float64.
        shape: ``(n, n)`` for n chosen parameters.
        matrix: "hessian" or "gauss_newton".
        layout: names and shapes of the parameters in a vector ``[n]``.
        products: vectors multiplied so far, including the trial of the modes.
        tried: each rejected mode with the reason.
        held_bytes: memory of the kept graphs.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = torch.nn.Linear(4, 1), (torch.randn(20, 4), torch.randn(20, 1))
        >>> operator = ss.curvature_operator(model, data, torch.nn.functional.mse_loss)
        >>> operator.shape, (operator @ torch.ones(5).double().numpy()).shape
        ((5, 5), (5,))
    """

    def __init__(
        self,
        model: PrivateModel,
        data: Batches,
        matrix: Matrix,
        *,
        mode: str | None = None,
        memory: int = _MEMORY,
    ):
        self.model, self.data, self.matrix = model, data, matrix
        self.layout: Layout = model.layout
        # The trial of the modes counts as one product.
        self.products = 1
        self.held_bytes = 0
        self._memory, self._held = memory, {}
        self._shares = self._count_shares()
        index, batch = self._first_batch()
        self.dtype, self.shape = np.dtype(np.float64), (self.layout.size, self.layout.size)
        # An error in the user's own code is raised here, before the trial could report it as a failed mode.
        model.refuse_hidden_parameters(batch, index)
        trial = self._cut(torch.randn(self.layout.size, generator=own_generator(0)))
        self._product_mode, self.tried = select_mode(model, batch, index, matrix, trial, mode)

    # --- as a matrix ---

    @property
    def device(self) -> torch.device:
        """Device of the products."""
        return self.model.parameters[0].device

    @property
    def basis_device(self) -> torch.device:
        """Device for float64 vectors: the CPU for models on MPS, which has no float64."""
        return self.device if self.device.type != "mps" else torch.device("cpu")

    @property
    def precision(self) -> float:
        """Smallest relative rounding error to expect of a product."""
        coarsest = max(torch.finfo(p.dtype).eps for p in self.model.parameters)
        return coarsest ** (2 / 3) if self._product_mode.name == "finite differences" else coarsest

    @property
    def method(self) -> str:
        """Name of the mode in use, with the share of batches whose graph is kept."""
        name, held, total = self._product_mode.name, len(self._held), len(self._shares)
        if not held:
            return name
        return (
            f"{name}, cached graph"
            if held == total
            else f"{name}, cached graph for {held} of {total} batches"
        )

    @public_call("curvature_operator")
    def apply(self, vectors: Tensor) -> Tensor:
        """Multiply the matrix with each row of ``vectors [b, n]``, in float64.

        Raises:
            SkipscopeError: a product is not finite; the batch is named.
        """
        total = self._multiplied(vectors)
        self.products += vectors.shape[0]
        return total

    def _multiplied(self, vectors: Tensor) -> Tensor:
        tangents = [self._cut(vector) for vector in vectors]
        total = torch.zeros(vectors.shape, dtype=torch.float64, device=vectors.device)
        sizes = [parameter.numel() for parameter in self.model.parameters]
        for index, batch, share in self._batches():
            found = self._on_batch(index, batch, tangents)
            for row, parts in zip(total, found, strict=True):
                for piece, part in zip(row.split(sizes), parts, strict=True):
                    piece.add_(part.reshape(-1).to(piece.device), alpha=share)
            # The sum is the cheap test, but it may overflow where every entry is finite.
            if not math.isfinite(float(total.sum())) and not total.isfinite().all():
                self._refuse_nonfinite(index, batch, found)
        return total

    def loss(self) -> float:
        """Loss over all batches at the current parameters."""
        total = 0.0
        for index, batch, share in self._batches(held=False):
            total += share * float(self.model.output_and_loss(batch, index)[1].detach().double())
        return total

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(np.array(X.T, dtype=np.float64))
        return self.apply(rows).cpu().numpy().T

    def _adjoint(self) -> CurvatureOperator:
        return self

    def move_to(self, values: Mapping[str, Tensor]) -> None:
        """Set parameters by name and drop the kept graphs (a landscape's next point)."""
        parameters = dict(self.model.module.named_parameters())
        self.model.move((parameters[name], value) for name, value in values.items())
        self._held.clear()
        self.held_bytes = 0

    # --- batches ---

    def _batches(self, held: bool = True) -> Iterator[tuple[int, Batch, float]]:
        """Yield (number, batch, share of the mean) of every batch with a weight; the share is 1 in a sum.

        With ``held``, the data are not read if every batch's graph is kept; the batches are then None.
        """
        if held and len(self._held) == len(self._shares):
            yield from ((index, None, share) for index, share in self._shares.items())
            return
        # A shuffling loader gives the same batches in every pass.
        with random_state_kept(self.model.seed):
            items = enumerate(self.data, self.data.start)
            while (item := next(items, None)) is not None:
                if item[0] in self._shares:
                    yield item[0], item[1], self._shares[item[0]]

    def _count_shares(self) -> dict[int, float]:
        objective: Objective = self.model.objective
        alone = self.data.single or objective.sums
        with random_state_kept(self.model.seed):
            weights = {
                i: 1.0 if alone else float(objective.weight(batch))
                for i, batch in enumerate(self.data, self.data.start)
            }
        if alone:
            return weights
        total = sum(self.data.together(sum(weights.values())))
        if not total > 0:
            raise SkipscopeError(
                self.model.operation,
                "the weights of the batches have no positive sum, so their mean is undefined",
                expected="weights with a positive sum",
                got=f"a sum of {total}",
                cure="check weight=, or the labels that are ignored",
            )
        return {i: weight / total for i, weight in weights.items() if weight}

    def _first_batch(self) -> tuple[int, Batch]:
        """First batch with a weight; on every rank that of rank 0, so that all ranks choose the same mode."""
        if not isinstance(self.data, RankBatches):
            return next((index, batch) for index, batch, _ in self._batches())
        objective: Objective = self.model.objective
        seen = self.data.peek(8)
        return 0, next((b for b in seen if objective.sums or objective.weight(b)), seen[0])

    # --- products of a batch ---

    def _on_batch(self, index: int, batch: Batch, tangents: list[Tangent]) -> list[Tangent]:
        mode = self._product_mode.mode
        with self._product_mode.running():
            prepared = self._held.get(index)
            if prepared is None:
                prepared = mode.prepare(self.model, batch, index)
                if self._product_mode.keeps:
                    self._hold(index, prepared)
            return mode.product(prepared, tangents)

    def _hold(self, index: int, prepared: Any) -> None:
        size = graph_bytes(prepared)
        if self.held_bytes + size <= self._memory:
            self._held[index] = prepared
            self.held_bytes += size

    def _cut(self, vector: Tensor) -> Tangent:
        parameters = self.model.parameters
        # One conversion instead of one per parameter.
        if len({(p.device, p.dtype) for p in parameters}) == 1:
            vector = vector.to(parameters[0].device, parameters[0].dtype)
        parts = torch.split(vector, [p.numel() for p in parameters])
        return [part.to(p.device, p.dtype).view(p.shape) for part, p in zip(parts, parameters, strict=True)]

    def _refuse_nonfinite(self, index: int, batch: Batch, found: list[Tangent]) -> None:
        if batch is None:
            with random_state_kept(self.model.seed):
                batch = next(b for i, b in enumerate(self.data, self.data.start) if i == index)
        _, loss = self.model.output_and_loss(batch, index)
        bad = [
            n
            for n, g in zip(self.layout.names, self.model.gradients(batch, index), strict=True)
            if not g.isfinite().all()
        ]
        if not loss.isfinite():
            what, layer = f"the loss itself is {float(loss.detach())}", None
        elif bad:
            what, layer = f"the loss is {float(loss.detach()):.4g} but its gradient is not finite", bad[0]
        else:
            layer = next(
                (
                    n
                    for parts in found
                    for n, part in zip(self.layout.names, parts, strict=True)
                    if not part.isfinite().all()
                ),
                None,
            )
            what = (
                "loss and gradient are finite, but a second derivative is not (a square root at 0, for"
                " instance)"
            )
        raise SkipscopeError(
            self.model.operation,
            f"a product is not finite on batch {index}: {what}",
            layer=layer,
            expected="finite numbers",
            cure=(
                "look at that batch and layer; float64, or a smaller learning rate before measuring, may help"
            ),
        )


@public_call("curvature_operator")
def curvature_operator(
    model: nn.Module,
    data: Any,
    loss: Any = None,
    *,
    matrix: Matrix = "hessian",
    parameters: Selection = None,
    weight: Callable[[Batch], float] | None = None,
    training: bool | None = False,
    seed: int = 0,
    mode: str | None = None,
    memory: int = _MEMORY,
) -> CurvatureOperator:
    """Hessian or Gauss-Newton matrix of a loss as a linear operator. Local: this rank's data under DDP.

    Args:
        model: any module; it is copied and left unchanged.
        data: one batch, or a re-iterable of batches.
        loss: ``loss(output, target)``; None when the output carries ``.loss``; or an ``@ss.objective``.
        matrix: "hessian", or "gauss_newton": the Hessian of the loss with the model replaced by its
            linearisation.
        parameters: names or patterns (``"layer1.*"``) of the parameters to differentiate by; default: all
            that require a gradient.
        weight: weight of a batch in the mean; default: the loss's own normaliser.
        training: False runs in eval mode, True in training mode, None leaves each module's flag.
        seed: random seed inside the model (dropout), the same in every product.
        mode: how products are computed; default: the first that works of "reverse over reverse", "forward
            over reverse", the two without fused kernels ("math kernels"), and "finite differences".
        memory: bytes for kept graphs; further batches are run again for each product.

    Returns:
        A scipy ``LinearOperator`` of shape ``(n, n)`` in float64, with ``.method``, ``.products`` and
        ``.apply`` for rows of torch vectors.

    Raises:
        SkipscopeError: data or loss cannot be read, batches cannot be averaged, or no mode works.

    Example:
        >>> import torch, skipscope as ss
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> operator = ss.curvature_operator(model, (x, y), torch.nn.functional.mse_loss)
        >>> operator.matvec([1.0])  # 2/N x'x
        array([5.])
    """
    how = How(matrix, parameters, weight, training, seed, mode, memory)
    return open_operator("curvature_operator", model, data, loss, how, _scipy_class())


@functools.cache
def _scipy_class() -> type[CurvatureOperator]:
    """Subclass that is also a ``LinearOperator``. Created lazily: scipy.sparse is slow to import."""
    from scipy.sparse.linalg import LinearOperator

    class LinearCurvatureOperator(CurvatureOperator, LinearOperator):
        def __init__(self, *arguments: Any, **options: Any):
            CurvatureOperator.__init__(self, *arguments, **options)
            LinearOperator.__init__(self, self.dtype, self.shape)

    return LinearCurvatureOperator


def open_operator(
    operation: str,
    model: nn.Module,
    data: Any,
    loss: Any,
    how: How,
    kind: type[CurvatureOperator] = CurvatureOperator,
) -> CurvatureOperator:
    """Open an operator as :func:`curvature_operator`, with ``operation`` named in errors."""
    require_option(operation, "matrix", how.matrix, get_args(Matrix))
    require_module(model, operation)
    if not isinstance(data, RankBatches):
        refuse_spread(model, operation)
    subject = prepare(model, data, loss, operation, weight=how.weight)
    own = private_model(
        subject.model,
        subject.loss,
        operation,
        parameters=how.parameters,
        training=how.training,
        seed=how.seed,
    )
    return kind(own, subject.data, how.matrix, mode=how.mode, memory=how.memory)
