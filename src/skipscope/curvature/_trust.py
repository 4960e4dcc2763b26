"""Is a product what it claims to be? A derivative that exists may still be a wrong one.

Seen: a backward pass marked ``once_differentiable`` is left out of a second derivative without a word, and the second
derivative of torch's fused weight norm is wrong. So the first product of every mode is held against differences of
gradients, in float64 where the model can be run in it. A kink (ReLU) between the points of a difference proves nothing:
a mode is refused only when differences at two steps agree with each other and not with it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from skipscope._data import Batch
from skipscope.curvature._modes import Mode, Tangent
from skipscope.curvature._private import PrivateModel, in_double

# For each precision: two steps, as parts of |p|; how well two differences agree; and the error of a right product.
_STEPS = {torch.float64: (1e-5, 1e-7, 1e-3, 1e-6), torch.float32: (1e-2, 3e-3, 3e-2, 3e-2)}


def reason_to_doubt(
    found: Tangent,
    mode: Mode,
    differences: Callable[[float], Mode],
    model: PrivateModel,
    batch: Batch,
    index: int,
    tangent: Tangent,
) -> str | None:
    """Why the product ``found`` of ``tangent`` cannot be right.

    Args:
        found: the product.
        mode: what made it; where the model can be run in float64 the product is made again there, without rounding.
        differences: makes the finite-difference mode for a step.
        model: what was multiplied with.
        batch: the batch it was on.
        index: its number.
        tangent: the vector.

    Returns:
        The reason, or None when nothing speaks against the product.
    """
    if not all(part.isfinite().all() for part in found):
        return None  # told by the product itself
    model, batch = in_double(model, batch, index) or (model, batch)
    dtype = model.parameters[0].dtype
    if dtype not in _STEPS:
        return None
    *steps, agree, exact = _STEPS[dtype]
    there = [t.to(dtype) for t in tangent]
    slow: list[Tensor] = []
    for step in steps:
        try:
            slow.append(_flat(_product(differences(step), model, batch, index, there)))
            if len(slow) == 1 and found[0].dtype != dtype:
                found = _product(mode, model, batch, index, there)
        except Exception:  # a check that cannot be made speaks for nothing
            return None
        product = _flat(found)
        if _apart(product, slow[-1]) <= exact:
            return None
    apart, spread = _apart(product, slow[0]), _apart(*slow)
    if spread <= agree and apart > 10 * max(spread, exact):
        share = f"{100 * apart:.0f} %" if apart > 0.01 else f"{apart:.1g} of its size"
        return (
            f"differs by {share} from differences of gradients: some operation's second derivative is wrong"
        )
    return None


def _product(mode: Mode, model: PrivateModel, batch: Batch, index: int, tangent: Tangent) -> Tangent:
    return mode.product(mode.prepare(model, batch, index), [tangent])[0]


def _flat(parts: Tangent) -> Tensor:
    return torch.cat([part.reshape(-1).double() for part in parts])


def _apart(a: Tensor, b: Tensor) -> float:
    size = max(float(a.norm()), float(b.norm()))
    return float((a - b).norm()) / size if size else 0.0
