"""Check of a mode's first product: a derivative that exists may still be wrong.

Known cases: a backward pass marked ``once_differentiable`` is silently left out of a second derivative, and
the second derivative of torch's fused weight norm is wrong. So the first product of every mode is compared
with differences of gradients, in float64 if the model runs in it. Differences across a kink (ReLU) are wrong
themselves, so a mode is rejected only if differences at two step sizes agree with each other but not with the
mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from skipscope._data import Batch
from skipscope.curvature._hessian_products import Differences, Mode, Tangent
from skipscope.curvature._private_model import PrivateModel, in_double

# For each precision: two step sizes relative to |p|, how well the differences must agree, and the error that
# a right product may have.
_STEPS = {torch.float64: (1e-5, 1e-7, 1e-3, 1e-6), torch.float32: (1e-2, 3e-3, 3e-2, 3e-2)}
# The error that a right product in float32 may always have.
_ROUNDED = 1e-4
# Number of compared coordinates per parameter; a wrong derivative affects most of them.
_MOST = 1 << 14


@dataclass
class ProductCheck:
    """Compare a mode's first product with gradient differences, at some coordinates of each parameter.

    Attributes:
        model: model whose matrix was multiplied.
        batch: the batch.
        index: number of the batch.
        tangent: the vector.
        differences: creates the matrix's finite-difference mode from a step size.
    """

    model: PrivateModel
    batch: Batch
    index: int
    tangent: Tangent
    differences: Callable[[float], Differences]

    def __post_init__(self):
        generator = torch.Generator().manual_seed(0)
        self.places = [
            None
            if p.numel() <= _MOST
            else torch.randint(p.numel(), (_MOST,), generator=generator).to(p.device)
            for p in self.model.parameters
        ]

    def part(self, i: int, tensor: Tensor) -> Tensor:
        """Select the compared coordinates of parameter ``i``, in float64."""
        flat, places = tensor.detach().reshape(-1), self.places[i]
        return (flat if places is None else flat[places]).double().clone()

    def some(self, parts: Tangent) -> Tensor:
        """Select the compared coordinates of a product."""
        return torch.cat([self.part(i, part) for i, part in enumerate(parts)])

    def reason_to_doubt(self, found: Tensor, mode: Mode) -> str | None:
        """Find a reason why a product must be wrong.

        Args:
            found: the product's coordinates, selected by :meth:`some`.
            mode: mode that computed it; where rounding may hide an error, it recomputes the product in
                float64.

        Returns:
            The reason, or None if the product may be right.
        """
        if not found.isfinite().all():
            # The caller reports products that are not finite.
            return None
        own = self.model.parameters[0].dtype
        model, batch = in_double(self.model, self.batch, self.index) or (self.model, self.batch)
        dtype = model.parameters[0].dtype
        if dtype not in _STEPS:
            return None
        try:
            return self._compare(found, mode, model, batch, rounded=own != dtype)
        except Exception:
            # Without a check there is no evidence against the product.
            return None
        finally:
            self.model.drop_double()

    def _compare(
        self, found: Tensor, mode: Mode, model: PrivateModel, batch: Batch, rounded: bool
    ) -> str | None:
        dtype = model.parameters[0].dtype
        *steps, agree, exact = _STEPS[dtype]
        slow: list[Tensor] = []
        for step in steps:
            parts = self.differences(step).in_parts(model, batch, self.index, self.tangent, self.part)
            slow.append(torch.cat(parts))
            if _relative_difference(found, slow[-1]) <= (max(exact, _ROUNDED) if rounded else exact):
                return None
        if rounded:
            tangent = [t.to(dtype) for t in self.tangent]
            found = self.some(mode.product(mode.prepare(model, batch, self.index), [tangent])[0])
        apart, spread = _relative_difference(found, slow[0]), _relative_difference(*slow)
        if spread > agree or apart <= 10 * max(spread, exact):
            return None
        share = f"{100 * apart:.0f} %" if apart > 0.01 else f"{apart:.1g} of its size"
        return (
            f"differs by {share} from differences of gradients: some operation's second derivative is wrong"
        )


def _relative_difference(a: Tensor, b: Tensor) -> float:
    size = max(float(a.norm()), float(b.norm()))
    return float((a - b).norm()) / size if size else 0.0
