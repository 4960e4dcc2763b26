"""Modes of multiplying with a matrix, and selection of the cheapest mode that is right on a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from skipscope._data import Batch, tensors_in
from skipscope._errors import SkipscopeError
from skipscope._torch_private import is_fused_weight_norm
from skipscope._validation import require_option
from skipscope.curvature._gauss_newton import GaussNewtonDifferences, GaussNewtonForward, GaussNewtonReverse
from skipscope.curvature._hessian_products import (
    Differences,
    FiniteDifferences,
    ForwardOverReverse,
    Mode,
    ReverseOverReverse,
    Tangent,
)
from skipscope.curvature._private_model import PrivateModel
from skipscope.curvature._product_check import ProductCheck

Matrix = Literal["hessian", "gauss_newton"]
_REVERSE: dict[str, Mode] = {"hessian": ReverseOverReverse(), "gauss_newton": GaussNewtonReverse()}
_FORWARD: dict[str, Mode] = {"hessian": ForwardOverReverse(), "gauss_newton": GaussNewtonForward()}
_DIFFERENCES: dict[str, Callable[..., Differences]] = {
    "hessian": FiniteDifferences,
    "gauss_newton": GaussNewtonDifferences,
}


@dataclass(frozen=True)
class ProductMode:
    """A mode, with or without fused kernels.

    Attributes:
        name: display name.
        mode: computes the products.
        plain: whether fused kernels without a right second derivative are replaced by plain operations.
        keeps: whether the prepared graph is worth keeping between products.
    """

    name: str
    mode: Mode
    plain: bool = False
    keeps: bool = False

    def running(self) -> contextlib.AbstractContextManager[Any]:
        """Context for ``mode.prepare`` and ``mode.product``."""
        return _plain_kernels() if self.plain else contextlib.nullcontext()


@contextlib.contextmanager
def _plain_kernels() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH), _PlainWeightNorm():
        yield


class _PlainWeightNorm(TorchFunctionMode):
    """Run the fused weight norm, whose second derivative is wrong in torch 2.13, in plain operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_fused_weight_norm(func):
            return _weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def product_modes(matrix: Matrix) -> list[ProductMode]:
    """All modes for a matrix, the cheapest first."""
    reverse, forward, differences = _REVERSE[matrix], _FORWARD[matrix], _DIFFERENCES[matrix]()
    return [
        ProductMode(reverse.name, reverse, keeps=True),
        ProductMode(forward.name, forward),
        ProductMode(f"{reverse.name}, math kernels", reverse, True, keeps=True),
        ProductMode(f"{forward.name}, math kernels", forward, True),
        ProductMode(differences.name, differences),
    ]


def select_mode(
    model: PrivateModel, batch: Batch, index: int, matrix: Matrix, trial: Tangent, mode: str | None
) -> tuple[ProductMode, dict[str, str]]:
    """Select the first mode whose product with ``trial`` is right.

    Args:
        model: model whose matrix is multiplied.
        batch: a batch with a weight.
        index: number of the batch.
        matrix: "hessian" or "gauss_newton".
        trial: a random vector.
        mode: prefix of the names of the modes to try; None: all.

    Returns:
        The mode, and the reason for each mode rejected before it.

    Raises:
        SkipscopeError: no mode works, or ``mode`` is no mode's prefix.
    """
    candidates = [
        candidate for candidate in product_modes(matrix) if mode is None or candidate.name.startswith(mode)
    ]
    if not candidates:
        require_option(model.operation, "mode", mode, [candidate.name for candidate in product_modes(matrix)])
    refused: dict[str, str] = {}
    check = ProductCheck(model, batch, index, trial, _DIFFERENCES[matrix])
    for candidate in candidates:
        try:
            with candidate.running():
                found = check.some(
                    candidate.mode.product(candidate.mode.prepare(model, batch, index), [trial])[0]
                )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if isinstance(error, SkipscopeError) and error.__cause__ is None:
                # The input was refused, not the mode: another mode would not help.
                raise
            reason = f"{type(error.__cause__ or error).__name__}: {error.__cause__ or error}"
            refused[candidate.name] = reason.strip().splitlines()[0][:200]
            continue
        objection = None
        # Differences are the reference of the check.
        if not isinstance(candidate.mode, Differences):
            with candidate.running():
                objection = check.reason_to_doubt(found, candidate.mode)
        if objection is None:
            return candidate, refused
        refused[candidate.name] = objection
    raise SkipscopeError(
        model.operation,
        "no mode of multiplying with the matrix works on this model",
        got="; ".join(f"{name}: {why}" for name, why in refused.items()),
        cure=None if mode is None else "leave mode= out: the first mode that works is used",
    )


def graph_bytes(prepared: Any) -> int:
    """Bytes that a graph keeps alive: all distinct storages saved for a backward pass."""
    waiting = [t.grad_fn for t in tensors_in(prepared) if t.grad_fn is not None]
    seen, storages = set(), {}
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions if following is not None)
        for name in dir(node):
            if name.startswith("_saved_") or name == "saved_tensors":
                with contextlib.suppress(RuntimeError, AttributeError):
                    for tensor in tensors_in(getattr(node, name)):
                        storage = tensor.untyped_storage()
                        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
